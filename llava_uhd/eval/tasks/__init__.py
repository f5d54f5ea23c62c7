"""The benchmarks, one file each. To add one: write it, import it, register it here."""

from llava_uhd.eval.task import TASKS, Task
from llava_uhd.eval.tasks.ai2d import AI2D
from llava_uhd.eval.tasks.chartqa import ChartQA
from llava_uhd.eval.tasks.documents import ESTVQA, DeepForm, InfographicVQA
from llava_uhd.eval.tasks.docvqa import DocVQA, DocVQATest
from llava_uhd.eval.tasks.synthetic import Synthetic
from llava_uhd.eval.tasks.textvqa import TextVQA, TextVQAWithoutOCR
from llava_uhd.eval.tasks.vizwiz import VizWiz, VizWizVal
from llava_uhd.eval.tasks.vqav2 import VQAv2, VQAv2Val

# Further names that scripts and papers use.
ALIASES = {
    "sqa": "scienceqa",
    "seed": "seed_bench",
    "llavabench": "llava_bench",
    "docvqa_val": "docvqa",
    "infovqa": "infographicvqa",
    "infovqa_val": "infographicvqa",
}

TASKS.add(Synthetic.name, Synthetic())
TASKS.add(VQAv2.name, VQAv2())
TASKS.add(VQAv2Val.name, VQAv2Val())
TASKS.add(VizWiz.name, VizWiz())
TASKS.add(VizWizVal.name, VizWizVal())
TASKS.add(TextVQA.name, TextVQA())
TASKS.add(TextVQAWithoutOCR.name, TextVQAWithoutOCR())
for kind in (DocVQA, DocVQATest, InfographicVQA, DeepForm, ESTVQA, ChartQA, AI2D):
    TASKS.add(kind.name, kind())


def find_task(name: str) -> Task:
    """A task by its name or by a further name; capitals, "-" and "_" do not matter.

    Raises:
        UserError: unknown name.
    """
    plain = name.strip().lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    return TASKS.get(plain if plain in TASKS else name.strip())


__all__ = ["ALIASES", "TASKS", "find_task"]
