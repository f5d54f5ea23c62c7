"""How each published system was measured, as data: a score is only compared with one of its kind.

Sources: the evaluation scripts of LLaVA-1.5, LLaVA-UHD (v1 and v2 branches) and LLaVolta. Where the
scripts do something else than they say, what they did is written here: the test for "mme" in the
name of a folder spelled "MME" never holds, so LLaVA-UHD v2 resized the images of MME after all.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_uhd.config.model import ImageConfig
from llava_uhd.eval.task import Task
from llava_uhd.registry import Registry
from llava_uhd.text.processor import LlavaUHDProcessor

OWN = "ours"
"""The protocol of a run that asks for none: the model's own images, the task's own decoding."""


@dataclass(frozen=True)
class Measure:
    """How one benchmark is answered.

    Attributes:
        image: changes to the model's image configuration. ``long_side`` enlarges too: the long side
            becomes so many pixels by bicubic resampling before anything is cut; None leaves images
            as they are. ``max_slices`` is for models that cut slices.
        beams: of beam search; None: the task's own.
        max_new_tokens: most tokens of an answer; None: the task's own.
        style: form of the prompts of a task that has several, see `tasks.kit`; None: its own.
    """

    image: Mapping[str, Any] = field(default_factory=dict)
    beams: int | None = None
    max_new_tokens: int | None = None
    style: str | None = None


@dataclass(frozen=True)
class Protocol:
    """A system's way to measure.

    Attributes:
        name: registered name.
        title: of the system.
        usual: of benchmarks that the system was not measured on.
        tasks: task -> how it was measured.
    """

    name: str
    title: str
    usual: Measure = Measure()
    tasks: Mapping[str, Measure] = field(default_factory=dict)

    def measure(self, task: str) -> Measure:
        """How a task is answered."""
        return self.tasks.get(_ALIKE.get(task, task), self.usual)

    def covers(self, task: str) -> bool:
        """Whether the system was measured on a task; "ours" covers all."""
        return self.name == OWN or _ALIKE.get(task, task) in self.tasks

    def apply(self, task: Task) -> Task:
        """A copy of the task with this protocol's decoding and prompts."""
        measure = self.measure(task.name)
        other = copy.copy(task)
        if measure.beams is not None:
            other.beams = measure.beams
        if measure.max_new_tokens is not None:
            other.max_new_tokens = measure.max_new_tokens
        if measure.style is not None and hasattr(other, "style"):
            other.style = measure.style
        return other

    def images(self, task: str, own: ImageConfig) -> ImageConfig:
        """The model's image configuration as a task wants it."""
        return dataclasses.replace(own, **self.measure(task).image)

    def settings(self, task: Task, own: ImageConfig) -> dict[str, Any]:
        """What belongs into the settings of a run, and so into its row and its hash.

        Args:
            task: as `apply` made it.
            own: image configuration of the model.
        """
        image = dataclasses.asdict(self.images(task.name, own))
        found: dict[str, Any] = {f"image.{key}": value for key, value in image.items()}
        found["protocol"] = self.name
        if not self.covers(task.name):
            found["protocol"] += " (not measured by it)"
        style = getattr(task, "style", None)
        return found if style is None else {**found, "prompt_style": style}


def processor_for(processor: LlavaUHDProcessor, image: ImageConfig) -> LlavaUHDProcessor:
    """The processor with another image configuration; itself if that is the same."""
    if image == processor.image_config:
        return processor
    return LlavaUHDProcessor(
        processor.tokenizer,
        dataclasses.asdict(image),
        dataclasses.asdict(processor.projector_config),
        processor.template_name,
        processor.chat_template,
        processor.template_mode,
        dataclasses.asdict(processor.video_config),
    )


LOADER_TOKENS = 128
LONG_TOKENS = 1024  # of the drivers for MMBench, ScienceQA and open questions, and of VLMEvalKit

# Benchmarks by driver of the LLaVA-1.5 scripts.
_LOADER = ("vqav2", "gqa", "vizwiz", "textvqa", "pope", "mme", "seed_bench")
# Other splits and forms of the same benchmark, from the same folder and by the same script.
_ALIKE = {"vqav2_val": "vqav2", "vizwiz_val": "vizwiz", "textvqa_no_ocr": "textvqa"}
_LONG = (
    *("scienceqa", "mmbench", "mmbench_cn", "llava_bench", "mmvet"),
    *("qbench", "qbench_test", "qbench_zh", "qbench_zh_test"),
)


def _uhd(slices: int, long_side: int | None) -> dict[str, Any]:
    # Without bounds on the shape of a view, as published.
    return {"max_slices": slices, "long_side": long_side, "bounded": False}


def _llava() -> dict[str, Measure]:
    tasks = {name: Measure(beams=1, max_new_tokens=LOADER_TOKENS) for name in _LOADER}
    return tasks | {name: Measure(beams=1, max_new_tokens=LONG_TOKENS) for name in _LONG}


def _uhd_v1() -> dict[str, Measure]:
    beams = {"gqa": 3, "mme": 5, "textvqa": 3, "vizwiz": 3, "vqav2": 3, "pope": 1}
    resized, plain = _uhd(7, 1024), _uhd(7, None)
    return {
        **{name: Measure(resized, count, LOADER_TOKENS) for name, count in beams.items()},
        "scienceqa": Measure(resized, 3, LONG_TOKENS),
        "mmbench": Measure(plain, 1, LONG_TOKENS),
        "mmbench_cn": Measure(plain, 1, LONG_TOKENS),
    }


def _uhd_v2() -> dict[str, Measure]:
    beams = {"gqa": 3, "mme": 5, "vizwiz": 3, "vqav2": 3, "pope": 1, "rec": 3}
    beams |= dict.fromkeys(("docvqa", "chartqa", "infographicvqa", "deepform", "estvqa"), 1)
    kit = ("ocrbench", "mmmu", "seed_bench_img", "realworldqa", "hrbench4k")
    resized, plain = _uhd(9, 1024), _uhd(9, None)
    return {
        **{name: Measure(resized, count, LOADER_TOKENS) for name, count in beams.items()},
        "textvqa": Measure(_uhd(9, 1536), 3, LOADER_TOKENS),
        "ai2d": Measure(plain, 1, LOADER_TOKENS),
        "scienceqa": Measure(resized, 3, LONG_TOKENS),
        "mmbench": Measure(plain, 1, LONG_TOKENS),
        "mmbench_cn": Measure(plain, 1, LONG_TOKENS),
        **{name: Measure(resized, 3, LONG_TOKENS, "kit") for name in kit},
    }


PROTOCOLS: Registry[Protocol] = Registry("protocol")
for _protocol in (
    Protocol(OWN, "the model's own settings"),
    Protocol("llava", "LLaVA-1.5", Measure(beams=1, max_new_tokens=LOADER_TOKENS), _llava()),
    # Its question file of SEED-Bench holds the images only, whose accuracy it reports.
    Protocol(
        "llavolta",
        "LLaVolta",
        Measure(beams=1, max_new_tokens=LOADER_TOKENS),
        _llava() | {"seed_bench_img": Measure(beams=1, max_new_tokens=LOADER_TOKENS)},
    ),
    Protocol("uhd_v1", "LLaVA-UHD", Measure(_uhd(7, 1024), 1, LOADER_TOKENS), _uhd_v1()),
    Protocol("uhd_v2", "LLaVA-UHD v2", Measure(_uhd(9, 1024), 1, LOADER_TOKENS), _uhd_v2()),
):
    PROTOCOLS.add(_protocol.name, _protocol)
