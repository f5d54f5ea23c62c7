"""The benchmarks, one file each. To add one: write it, import it, register it here."""

from llava_uhd.eval.task import TASKS, Task
from llava_uhd.eval.tasks.ai2d import AI2D
from llava_uhd.eval.tasks.chartqa import ChartQA
from llava_uhd.eval.tasks.documents import ESTVQA, DeepForm, InfographicVQA
from llava_uhd.eval.tasks.docvqa import DocVQA, DocVQATest
from llava_uhd.eval.tasks.gqa import GQA
from llava_uhd.eval.tasks.hrbench import HRBench4K, HRBench8K
from llava_uhd.eval.tasks.judged import LlavaBench, MMVet
from llava_uhd.eval.tasks.mmbench import MMBench, MMBenchCN
from llava_uhd.eval.tasks.mme import MME
from llava_uhd.eval.tasks.mmmu import MMMU
from llava_uhd.eval.tasks.ocrbench import OCRBench
from llava_uhd.eval.tasks.pope import POPE
from llava_uhd.eval.tasks.position import Position
from llava_uhd.eval.tasks.qbench import QBench, QBenchChinese, QBenchChineseTest, QBenchTest
from llava_uhd.eval.tasks.realworldqa import RealWorldQA
from llava_uhd.eval.tasks.rec import REC
from llava_uhd.eval.tasks.scienceqa import ScienceQA
from llava_uhd.eval.tasks.seed_bench import SeedBench, SeedBenchImages
from llava_uhd.eval.tasks.synthetic import Synthetic
from llava_uhd.eval.tasks.textvqa import TextVQA, TextVQAWithoutOCR
from llava_uhd.eval.tasks.video_qa import MSRVTTQA, MSVDQA, ActivityNetQA
from llava_uhd.eval.tasks.vizwiz import VizWiz, VizWizVal
from llava_uhd.eval.tasks.vqav2 import VQAv2, VQAv2Val

# Further names that scripts and papers use.
ALIASES = {
    "sqa": "scienceqa",
    "scienceqa_img": "scienceqa",
    "textvqa_val": "textvqa",
    "vqav2_test": "vqav2",
    "vqav2_testdev": "vqav2",
    "vizwiz_test": "vizwiz",
    "seed": "seed_bench",
    "seedbench": "seed_bench",
    "seedbench_img": "seed_bench_img",
    "mmbench_dev": "mmbench",
    "mmbench_en_dev": "mmbench",
    "mmbench_dev_20230712": "mmbench",
    "mmbench_dev_cn_20231003": "mmbench_cn",
    "llavabench": "llava_bench",
    "llava_in_the_wild": "llava_bench",
    "llava_bench_in_the_wild": "llava_bench",
    "mm_vet": "mmvet",
    "docvqa_val": "docvqa",
    "infovqa": "infographicvqa",
    "infovqa_val": "infographicvqa",
    "infographicsvqa": "infographicvqa",
    "hrbench": "hrbench4k",
    "mmmu_val": "mmmu",
    "mmmu_dev_val": "mmmu",
}

_KINDS: tuple[type[Task], ...] = (
    Synthetic,
    Position,
    VQAv2,
    VQAv2Val,
    VizWiz,
    VizWizVal,
    TextVQA,
    TextVQAWithoutOCR,
    GQA,
    POPE,
    MME,
    ScienceQA,
    MMBench,
    MMBenchCN,
    SeedBench,
    SeedBenchImages,
    QBench,
    QBenchTest,
    QBenchChinese,
    QBenchChineseTest,
    LlavaBench,
    MMVet,
    DocVQA,
    DocVQATest,
    InfographicVQA,
    DeepForm,
    ESTVQA,
    ChartQA,
    AI2D,
    REC,
    OCRBench,
    MMMU,
    RealWorldQA,
    HRBench4K,
    HRBench8K,
    MSVDQA,
    MSRVTTQA,
    ActivityNetQA,
)
for _kind in _KINDS:
    TASKS.add(_kind.name, _kind())


def find_task(name: str) -> Task:
    """A task by its name or by a further name; capitals, "-" and "_" do not matter.

    Raises:
        UserError: unknown name.
    """
    plain = name.strip().lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    return TASKS.get(plain if plain in TASKS else name.strip())


__all__ = ["ALIASES", "TASKS", "find_task"]
