"""MSVD-QA, MSRVTT-QA and ActivityNet-QA: open questions on videos, which a judge scores.

Files as Video-ChatGPT and Video-LLaVA lay them out: ``test_q.json``, ``test_a.json``, videos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import mean_of_each
from llava_uhd.eval.published import add_answer, iterate_rows, json_lines, read_rows
from llava_uhd.eval.scoring.vqa import normalise
from llava_uhd.eval.task import Answers, Item, Scored, Task
from llava_uhd.eval.tasks.question_file import first_of, image_path

_ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".gif")
_HELP = "test_q.json and test_a.json of Video-LLaVA's evaluation"


class VideoQA(Task):
    """Questions ``{"video_name", "question", "question_id"}``, answers by the same id.

    A name without an ending means a video of any kind, or a folder of frames. Names of some lists
    lack the "v_" that their files begin with.

    Attributes:
        places: folders of the videos, below the task's folder; the first that exists.
    """

    places: tuple[str, ...] = ("videos",)
    main_metric = "judged_accuracy"
    local = False

    def files(self, root: Path) -> list[Path]:
        """Questions, answers, videos."""
        return [*self.gold_files(root), first_of(*(root / place for place in self.places))]

    def gold_files(self, root: Path) -> list[Path]:
        """What a judge needs."""
        return [root / "test_q.json", root / "test_a.json"]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per question, with its video."""
        folder = self.files(root)[-1]
        stems: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.is_dir() or path.suffix.lower() in _ENDINGS:
                stems.setdefault(path.name if path.is_dir() else path.stem, path)
        for item in self.gold_items(root):
            name = item.extra["video"]
            path = image_path(folder, name, root / "test_q.json")
            stem = path.stem if path.suffix.lower() in _ENDINGS else path.name
            found = path if path.is_file() else stems.get(stem, stems.get(f"v_{stem}", path))
            yield Item(
                item.id, item.question, (), item.reference, extra=item.extra, videos=(found,)
            )

    def gold_items(self, root: Path) -> Iterator[Item]:
        """The same without videos."""
        file = root / "test_a.json"
        answers = {row["question_id"]: row for row in iterate_rows(file, "question_id", "answer")}
        for row in iterate_rows(root / "test_q.json", "question_id", "question", "video_name"):
            key = row["question_id"]
            if key not in answers:
                raise UserError(f"{file} has no answer to question {key!r}")
            yield Item(
                key,
                str(row["question"]),
                (),
                str(answers[key]["answer"]),
                extra={"video": str(row["video_name"])},
            )

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Equality after the normalisation of VQA: a lower bound, no substitute for the judge."""
        return {"exact_match": float(normalise(parsed) == normalise(item.reference))}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Means; the accuracy that a judge gives is in percent, its score from 0 to 5."""
        scores = mean_of_each([each.metrics for each in scored])
        if self.main_metric in scores:
            scores[self.main_metric] *= 100
        return scores

    def published_row(self, item: Item, answer: str, model: str) -> dict[str, Any]:
        """A line of the predictions that the published judges read."""
        return {
            "id": item.question_id,
            "question": item.question,
            "answer": item.reference,
            "pred": answer,
        }

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """Predictions: JSON lines or a list of ``{"id", "pred"}``."""
        answers: dict[str | int, str] = {}
        for row in read_rows(file, "id", "pred"):
            add_answer(answers, row["id"], row["pred"], file)
        return answers

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """The predictions for the judge."""
        rows = [
            self.published_row(item, answers[item.id], "") for item in items if item.id in answers
        ]
        return [(f"{self.name}_predictions.jsonl", json_lines(rows))]

    def check_submission(self, root: Path, file: Path) -> None:
        """Every question once, with its right answer and a text."""
        found = self.read_published(root, file)
        wanted = {item.id for item in self.gold_items(root)}
        absent, foreign = wanted - set(found), set(found) - wanted
        if absent or foreign:
            raise UserError(f"{file}: {len(absent)} questions are missing, {len(foreign)} foreign")


class MSVDQA(VideoQA):
    """Short clips from the web."""

    name = "msvd_qa"
    title = "MSVD-QA"
    published_size = 13_157
    folder = "GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA"
    source = f"get the clips of MSVD (cs.utexas.edu/users/ml/clamp/videoDescription) and {_HELP}"


class MSRVTTQA(VideoQA):
    """Clips of twenty kinds."""

    name = "msrvtt_qa"
    title = "MSRVTT-QA"
    published_size = 72_821
    folder = "GPT_Zero_Shot_QA/MSRVTT_Zero_Shot_QA"
    places = ("videos/all", "videos")
    source = f"get the test videos of MSR-VTT, to videos/all, and {_HELP}"


class ActivityNetQA(VideoQA):
    """Long videos of activities; files begin with "v_"."""

    name = "activitynet_qa"
    title = "ActivityNet-QA"
    published_size = 8_000
    folder = "GPT_Zero_Shot_QA/Activitynet_Zero_Shot_QA"
    places = ("all_test",)
    source = f"get the test videos of ActivityNet-QA, to all_test, and {_HELP}"
