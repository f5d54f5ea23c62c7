"""RealWorldQA: 765 questions on scenes of everyday life, with options."""

from __future__ import annotations

from llava_uhd.eval.tasks.kit import ChoiceTask


class RealWorldQA(ChoiceTask):
    """Plain accuracy by exact matching."""

    name = "realworldqa"
    title = "RealWorldQA"
    folder = "realworldqa"
    source = (
        "get RealWorldQA.tsv of VLMEvalKit (opencompass.openxlab.space/utils/VLMEval/"
        "RealWorldQA.tsv)"
    )
    table = "RealWorldQA"
    published_size = 765
