"""MME."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import grouped
from llava_uhd.eval.published import add_answer, iterate_rows
from llava_uhd.eval.scoring import mme
from llava_uhd.eval.task import Answers, Item, Scored
from llava_uhd.eval.tasks.question_file import SHORT, QuestionFileTask, image_path

_ENDING = "Please answer yes or no."
_RELEASE = "MME_Benchmark_release_version"


class MME(QuestionFileTask):
    """Two questions have the id of their image: ids are made of that and the prompt."""

    name = "mme"
    title = "MME"
    folder = "MME"
    source = (
        "ask for MME_Benchmark_release_version at the MME repository (BradyFU/Awesome-Multimodal-"
        "Large-Language-Models) and get llava_mme.jsonl from eval.zip of the LLaVA-1.5 evaluation "
        "guide"
    )
    questions = "llava_mme.jsonl"
    published_size = 2_374
    images = _RELEASE
    main_metric = "perception"

    def gold_files(self, root: Path) -> list[Path]:
        """Right answers lie beside the images."""
        return self.files(root)

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line, with the official spelling of its question and its right answer."""
        file = root / self.questions
        gold: dict[str, dict[tuple[str, str], str]] = {}
        for row in iterate_rows(file, "question_id", "image", "text"):
            category, stem = _place(row["question_id"], file)
            if category not in gold:
                gold[category] = read_gold(root / _RELEASE, category)
            official = official_question(row["text"], stem, gold[category])
            if official is None:
                raise UserError(
                    f"{file}: {row['text']!r} is no question of {category}/{stem}.txt under "
                    f"{root / _RELEASE}"
                )
            yield Item(
                _key(row["question_id"], row["text"]),
                row["text"],
                (image_path(root / self.images, row["image"], file),),
                gold[category][stem, official],
                groups={"category": category},
                published_id=row["question_id"],
                extra={"file": stem, "official": official},
            )

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """An answers file, joined by question id and prompt."""
        answers: dict[str | int, str] = {}
        for row in iterate_rows(file, "question_id", "prompt", "text"):
            add_answer(answers, _key(row["question_id"], row["prompt"]), row["text"], file)
        return answers

    def parse(self, item: Item, answer: str) -> str:
        """One of "yes", "no" and "other"."""
        return mme.read_answer(_one_line(answer))

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Right or wrong."""
        return {"accuracy": float(parsed == item.reference.lower())}

    def unit(self, item: Item) -> str:
        """The image, which is asked about twice."""
        return f"{item.groups['category']}/{item.extra['file']}"

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The two sums, then the categories."""
        scores = {name: table["score"] for name, table in self._tables(scored).items()}
        return {**mme.totals(scores), **scores}

    def breakdown(self, scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float]]]:
        """Accuracy by question and by image, of each category."""
        parts = grouped(scored, lambda each: each.item.groups["category"])
        tables = self._tables(scored)
        return {"category": {name: {**tables[name], "items": len(parts[name])} for name in tables}}

    def _tables(self, scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
        parts = grouped(scored, lambda each: each.item.groups["category"])
        known = [name for name in mme.CATEGORIES if name in parts]
        others = [name for name in parts if name not in mme.CATEGORIES]
        return {name: self._category(parts[name]) for name in (*known, *others)}

    def _category(self, scored: Sequence[Scored]) -> dict[str, float]:
        right = [each.metrics["accuracy"] == 1 for each in scored]
        if self.mode == "published":  # neighbours in the file are taken for a pair
            images: list[object] = [index // 2 for index in range(len(scored))]
        else:
            images = [each.item.extra["file"] for each in scored]
        return mme.category_scores(right, images)

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """A file of each category as the official scorer reads it, in the order of ``answers``."""
        known = {item.id: item for item in items}
        lines: dict[str, list[str]] = {}
        for key, text in answers.items():
            if key not in known:
                raise UserError(f"mme: the answer to {key!r} belongs to no question")
            item = known[key]
            cells = [f"{item.extra['file']}.txt", item.extra["official"], item.reference]
            line = "\t".join([*cells, _one_line(text)])
            lines.setdefault(item.groups["category"], []).append(line + "\n")
        return [(f"{name}.txt", "".join(rows).encode()) for name, rows in lines.items()]

    def check_submission(self, root: Path, file: Path) -> None:
        """Four cells a line, the questions and right answers of the release, two an image."""
        gold = read_gold(root / _RELEASE, file.stem)
        seen: dict[str, int] = {}
        lines = file.read_text("utf-8").removesuffix("\n").split("\n")
        for number, line in enumerate(lines, 1):
            cells = line.split("\t")
            stem = cells[0].removesuffix(".txt")
            if len(cells) != 4 or gold.get((stem, cells[1])) != cells[2]:
                raise UserError(
                    f"{file}, line {number}: must be file, question, right answer and answer of "
                    f"the release, between tabs"
                )
            seen[stem] = seen.get(stem, 0) + 1
        odd = [stem for stem, count in seen.items() if count != 2]
        if odd or not seen:
            raise UserError(f"{file}: two answers an image are wanted (see {odd[:3]})")


def _key(question_id: str, prompt: str) -> str:
    return f"{question_id} {prompt}"


def _one_line(answer: str) -> str:
    # A line break or a tab would make another line or cell of the official file.
    return answer.replace("\n", " ").replace("\r", " ").replace("\t", " ")


def _place(question_id: str, file: Path) -> tuple[str, str]:
    """Category and name of an image: ``artwork/images/7.jpg`` is (artwork, 7)."""
    parts = str(question_id).split("/")
    if len(parts) < 2 or ".." in parts:
        raise UserError(f"{file}: question id {question_id!r} must be CATEGORY/.../IMAGE")
    return parts[0], parts[-1].split(".")[0]


def official_question(prompt: str, stem: str, gold: dict[tuple[str, str], str]) -> str | None:
    """The question of the release that a published prompt asks, or None.

    The release has one or two spaces before its ending, prompts have none of it.
    """
    text = prompt.replace(SHORT.lstrip(), "").strip()
    if _ENDING not in text:
        text = f"{text} {_ENDING}"
    for spelling in (text, text.replace(f" {_ENDING}", f"  {_ENDING}")):
        if (stem, spelling) in gold:
            return spelling
    return None


def read_gold(release: Path, category: str) -> dict[tuple[str, str], str]:
    """(Image name, question) -> right answer, of a category in either layout of the release.

    Raises:
        UserError: no such category, or a damaged file.
    """
    folder = release / category
    inner = folder / "questions_answers_YN"
    files = sorted((inner if inner.is_dir() else folder).glob("*.txt"))
    if not files:
        raise UserError(
            f"{folder} holds no files of questions (*.txt): get it from the MME release"
        )
    gold = {}
    for file in files:
        # Not splitlines(): it also splits at rare characters that may stand in a question.
        for number, line in enumerate(file.read_text("utf-8-sig").split("\n"), 1):
            cells = line.strip().split("\t")
            if not line.strip():
                continue
            if len(cells) != 2 or cells[1].strip() not in ("Yes", "No"):
                raise UserError(f"{file}, line {number}: must be a question, a tab, Yes or No")
            gold[file.stem, cells[0]] = cells[1].strip()
    return gold
