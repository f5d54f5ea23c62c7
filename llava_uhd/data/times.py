"""What a question says about the times of the frames of its videos."""

from __future__ import annotations

from collections.abc import Sequence

from llava_uhd.text.templates import VIDEO_MARKER, Turn


def tell_times(turns: Sequence[Turn], sentences: Sequence[str]) -> list[Turn]:
    r"""Adds what the model is told about the times of the frames of each video.

    Of a single video in the first turn, as published: the marker, the sentence, then the text
    without the marker. Of others: behind their markers.

    Args:
        turns: with one ``<video>`` per sentence.
        sentences: from `llava_uhd.images.video.time_instruction`; without any nothing is added.

    Example: ``"<video>\nWhy?"`` becomes ``"<video>\nThe video lasts ...\n\nWhy?"``.
    """
    if not sentences:
        return list(turns)
    if len(sentences) == 1 and VIDEO_MARKER in turns[0].text:
        rest = turns[0].text.replace(VIDEO_MARKER, "")
        first = f"{VIDEO_MARKER}\n{sentences[0]}\n{rest}"
        return [Turn(turns[0].role, first), *turns[1:]]
    remaining = iter(sentences)
    told = []
    for turn in turns:
        head, *pieces = turn.text.split(VIDEO_MARKER)
        pieces = [f"{VIDEO_MARKER}\n{next(remaining)}\n{piece}" for piece in pieces]
        told.append(Turn(turn.role, "".join([head, *pieces])))
    return told
