"""Our models in VLMEvalKit: prompts of the published data sets, and answers one by one.

`register` puts them into the table of a checkout (version 0.2rc1), which has no place for plug-ins:
it must happen before its ``run.py`` starts, in the same process (`vlmevalkit_run`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.adapters.conversation import Message, Part, make_item
from llava_uhd.eval.adapters.engine import NEW_TOKENS, Decoding, Engine, Settings
from llava_uhd.eval.protocols import OWN
from llava_uhd.eval.scoring.choice import read_options
from llava_uhd.eval.tasks.kit import LETTER_ZH, choice_prompt
from llava_uhd.eval.tasks.question_file import LETTER, SHORT

# Names in the kit's table -> protocol. The second is the published one: 3 beams, images resized.
MODELS = {"llava_uhd": OWN, "llava_uhd2": "uhd_v2"}
# What LLaVA-UHD v2 was measured on, with the kind of its questions.
PUBLISHED = {
    "OCRBench": "VQA",
    "MMMU_DEV_VAL": "MCQ",
    "SEEDBench_IMG": "MCQ",
    "MMBench_TEST_EN": "MCQ",
    "RealWorldQA": "MCQ",
    "HRBench4K": "MCQ",
}
SHORT_ZH = "\n请用简单字母或短语回答问题"
_CHINESE = re.compile("[一-鿿]")
_PLACE = re.compile(r"<image (\d+)>")

Content = list[dict[str, str]]


def with_request(text: str, kind: str) -> str:
    r"""A question with the published request for the form of its answer; twice is as once.

    Args:
        text: the question.
        kind: "MCQ", "Y/N", or another, which asks for nothing.

    Example: ``with_request("Is it red?", "Y/N")`` ends in "\nAnswer the question using a single
    word or phrase.".
    """
    requests = {"MCQ": (LETTER, LETTER_ZH), "Y/N": (SHORT, SHORT_ZH)}.get(kind)
    if requests is None or text.endswith(requests):
        return text
    return text + requests[bool(_CHINESE.search(text))]


def published_content(line: Mapping[str, Any], dataset: str, images: Sequence[str]) -> Content:
    """The question of a row of a published data set as the kit hands it to a model.

    Images stand in front, in MMMU where ``<image 1>`` names them.

    Args:
        line: row of the table; empty cells may be NaN.
        dataset: one of `PUBLISHED`.
        images: paths.

    Raises:
        UserError: a text names an image that the row does not have.
    """
    row = {name: _cell(value) for name, value in line.items()}
    if PUBLISHED[dataset] == "MCQ":
        text = choice_prompt(row, read_options(row), "kit")
    else:
        text = str(row["question"])
    pieces = _PLACE.split(text) if dataset.startswith("MMMU") else [text]
    shown = [{"type": "image", "value": image} for image in images]
    if len(pieces) == 1:
        return [*shown, {"type": "text", "value": text}]
    content = [{"type": "text", "value": pieces[0]}]
    for number, following in zip(pieces[1::2], pieces[2::2], strict=True):
        if not 1 <= int(number) <= len(images):
            raise UserError(
                f"{dataset} {row.get('index')}: names <image {number}> of {len(images)}"
            )
        content += [shown[int(number) - 1], {"type": "text", "value": following}]
    return content


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def first_image_only(content: Sequence[Mapping[str, str]]) -> Content:
    """All texts behind the first image: so LLaVA-UHD v2 was asked."""
    text = "".join(each["value"] for each in content if each["type"] == "text")
    images = [dict(each) for each in content if each["type"] == "image"]
    return [*images[:1], {"type": "text", "value": text}]


class KitModel:
    """A model of the kit; its ``BaseModel`` is the other base, see `model_class`.

    Args:
        model_path: the checkpoint.
        protocol: images, beams and number of images as a published system was measured.
        **options: see `Settings`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = True
    allowed_types = ["text", "image", "video"]

    def __init__(self, model_path: str, protocol: str = OWN, **options: Any) -> None:
        super().__init__()
        settings = Settings(model_path, protocol=protocol, **options)
        self.engine = Engine(settings)
        measure = settings.measure
        self.one_image = measure.style == "kit"
        self.decoding = Decoding(measure.max_new_tokens or NEW_TOKENS, measure.beams or 1)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether `build_prompt` writes the questions; else the kit does."""
        return dataset in PUBLISHED

    def build_prompt(self, line: Mapping[str, Any], dataset: str) -> Content:
        """The question of a row of a published data set.

        Args:
            line: row of the kit's table.
            dataset: one of `PUBLISHED`.
        """
        dumped = self.dump_image(line, dataset)  # type: ignore[attr-defined]
        images = [dumped] if isinstance(dumped, str) else list(dumped)
        return published_content(line, dataset, images)

    def content(self, message: Sequence[Mapping[str, str]], dataset: str | None) -> Content:
        """What is asked: the message, with the request for the form of the answer."""
        content = first_image_only(message) if self.one_image else [dict(part) for part in message]
        kind = question_kind(dataset) if dataset else "VQA"
        texts = [part for part in content if part["type"] == "text"]
        if texts:
            # Chinese anywhere in the question asks for the Chinese request.
            whole = "".join(part["value"] for part in texts)
            added = with_request(whole, kind)[len(whole) :]
            texts[-1]["value"] += added
        return content

    def generate_inner(
        self, message: Sequence[Mapping[str, str]], dataset: str | None = None
    ) -> str:
        """The answer.

        Args:
            message: parts with ``type`` "text", "image" or "video" and ``value``, text or path.
            dataset: name of the data set.

        Raises:
            UserError: it could not be answered.
        """
        parts = [Part(part["type"], part["value"]) for part in self.content(message, dataset)]  # type: ignore[arg-type]
        item = make_item(0, [Message("user", parts)])
        outcome = next(self.engine.answer([item], self.decoding))
        if outcome.failures:
            raise UserError(f"{dataset}: {outcome.failures[0].reason}")
        return outcome.answers[0].text


def question_kind(dataset: str) -> str:
    """Kind of the questions of a data set: "MCQ", "Y/N", "VQA", ..."""
    if dataset in PUBLISHED:
        return PUBLISHED[dataset]
    from vlmeval.dataset import DATASET_TYPE

    return str(DATASET_TYPE(dataset))


def model_class() -> type:
    """The class for the kit, made when its ``BaseModel`` can be imported."""
    from vlmeval.vlm.base import BaseModel

    return type("LlavaUHD", (KitModel, BaseModel), {"__doc__": KitModel.__doc__})


def register(checkpoint: str, **options: Any) -> list[str]:
    """Puts our models into the kit's table.

    Args:
        checkpoint: that they all load.
        **options: see `Settings`; ``protocol`` overrides that of `MODELS`.

    Returns:
        Their names.
    """
    from vlmeval.config import supported_VLM

    made = model_class()
    for name, protocol in MODELS.items():
        supported_VLM[name] = functools.partial(
            made, model_path=checkpoint, **{"protocol": protocol, **options}
        )
    return list(MODELS)
