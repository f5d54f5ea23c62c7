"""InfographicVQA, DeepForm and ESTVQA in the layout of LLaVA-UHD v2, scored like DocVQA."""

from __future__ import annotations

from llava_uhd.eval.tasks.joined import UREADER, DocumentTask

_FILES = "and the two JSONL files of the LLaVA-UHD v2 evaluation"


class InfographicVQA(DocumentTask):
    """Questions on infographics, validation split."""

    name = "infographicvqa"
    title = "InfographicVQA val"
    folder = "InfographicsVQA"
    source = (
        "get DUE_Benchmark/InfographicsVQA of UReader's data (to playground/data/ureader; the "
        f"images are those of rrc.cvc.uab.es, challenge 17) {_FILES}"
    )
    questions = "info_questions.jsonl"
    annotations = "info_annotations.jsonl"
    images = "pngs"
    image_places = (f"{UREADER}/DUE_Benchmark/InfographicsVQA/pngs",)


class DeepForm(DocumentTask):
    """Fields of scanned forms."""

    name = "deepform"
    title = "DeepForm"
    folder = "DeepForm"
    source = f"get DUE_Benchmark/DeepForm of UReader's data (to playground/data/ureader) {_FILES}"
    questions = "deep_questions.jsonl"
    annotations = "deep_annotations.jsonl"
    images = "page_pngs"
    image_places = (f"{UREADER}/DUE_Benchmark/DeepForm/page_pngs",)


class ESTVQA(DocumentTask):
    """Text in natural scenes, with evidence."""

    name = "estvqa"
    title = "ESTVQA"
    folder = "ESTVQA"
    source = f"get the images of EST-VQA from its authors {_FILES}"
    questions = "est_questions.jsonl"
    annotations = "est_annotations.jsonl"
    images = "test"
