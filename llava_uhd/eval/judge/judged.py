"""What a judge is asked about each judged task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.judge.asking import Question
from llava_uhd.eval.judge.prompts import (
    OWN,
    Prompt,
    find_prompt_file,
    published_messages,
    published_text,
    source_of,
)
from llava_uhd.eval.judge.review import PARAMETERS, Comparison, Rows, comparisons, read_file
from llava_uhd.eval.published import read_object
from llava_uhd.eval.scoring.reviews import read_grade, read_verdict
from llava_uhd.eval.task import Answers, Item, Task
from llava_uhd.registry import Registry


@dataclass(frozen=True)
class Given:
    """What there is to judge.

    Attributes:
        task: that was answered.
        root: folder of its data.
        items: those that were answered.
        answers: by item id.
        model: name of the model that answered.
        rule: of reviews; None takes ``rule.json`` with the data.
        prompt_file: published evaluator to take the prompt from; None looks for it with the data.
        parameters: of the requests, over those of the task.
    """

    task: Task
    root: Path
    items: Sequence[Item]
    answers: Answers
    model: str = "model"
    rule: Path | None = None
    prompt_file: Path | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What will be asked.

    Attributes:
        questions: of the first run, one per item.
        prompt: where the words come from; "own" scores compare with no published ones.
        review: for tasks with a published review file: the head of each line.
    """

    questions: Sequence[Question]
    prompt: str
    review: Sequence[Comparison] = ()


JUDGED: Registry[Callable[[Given], Plan]] = Registry("judged task")


@JUDGED.register("llava_bench")
def llava_bench(given: Given) -> Plan:
    """The published review against GPT-4's answers."""
    rule = given.rule or given.root / "rule.json"
    if not rule.is_file():
        raise UserError(
            f"llava_bench: {rule} is missing; name rule.json of LLaVA's repository "
            "(llava/eval/table/rule.json) with --rule, or copy it there"
        )
    wanted = {str(item.id) for item in given.items}
    questions = read_file(given.root / "questions.jsonl", "question_id", "text", "image")
    references = read_file(given.root / "answers_gpt4.jsonl", "question_id", "text")
    answers = [
        given.task.published_row(item, given.answers[item.id], given.model) for item in given.items
    ]
    made = comparisons(
        _only(questions, wanted),
        read_file(given.root / "context.jsonl", "image"),
        _only(references, wanted),
        Rows(given.root / "answers", answers),
        rule,
    )
    parameters = {**PARAMETERS, **given.parameters}
    return Plan([each.question(parameters) for each in made], source_of(rule), made)


def _only(rows: Rows, wanted: set[str]) -> Rows:
    return Rows(rows.file, [row for row in rows.rows if str(row["question_id"]) in wanted])


# MM-Vet's evaluator gives a table with examples, whose last line the judge completes.
_GRADES = """\
You grade answers. Each line of the table below has a question, the true answer, an answer that was
given, and a grade from 0.0 (wrong) over 0.1, 0.2 and so on to 1.0 (right). Where the true answer
joins parts by <AND>, the grade is the share of them that the given answer has; where it joins parts
by <OR>, one of them is enough. Write only the grade that the last line lacks.

Question | True answer | Given answer | Grade
--- | --- | --- | ---
Which two animals are there? | cat <AND> dog | a horse | 0.0
Which two animals are there? | cat <AND> dog | A cat. | 0.5
Which two animals are there? | cat <AND> dog | A dog beside a cat. | 1.0
What is the boy holding? | kite <OR> paper kite | He holds a kite. | 1.0
Why is the street wet? | It has rained, and the drain is blocked by leaves. | It has rained. | 0.6
"""


@JUDGED.register("mmvet")
def mmvet(given: Given) -> Plan:
    """A grade for each answer, in all and for each ability that its question asks for."""
    file = given.root / "mm-vet.json"
    if not file.is_file():
        raise UserError(
            f"mmvet: {file} with the true answers is missing; it lies in mm-vet.zip of the MM-Vet "
            "repository"
        )
    known = read_object(file)
    names = ("mm-vet_evaluator.py", "mm-vet_evaluator.ipynb")
    found = find_prompt_file(given.prompt_file, given.root, names)
    text = _GRADES if found is None else published_text(found)
    parameters = {"max_tokens": 3, "temperature": 0.0, **given.parameters}
    questions = []
    for item in given.items:
        row = known.get(f"v1_{item.id}")
        if not isinstance(row, dict) or not {"question", "answer", "capability"} <= set(row):
            raise UserError(f"{file}: 'v1_{item.id}' has no question, answer and capability")
        truth = str(row["answer"]).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        line = " | ".join([str(row["question"]), truth, given.answers[item.id], ""])
        questions.append(
            Question(
                item.id,
                [{"role": "user", "content": f"{text}\n{line}"}],
                parameters,
                _grade_reader(sorted(set(row["capability"]))),
                reminder="\nThe grade as a number: ",
                fallback=_grades(0.0, row["capability"]),
            )
        )
    return Plan(questions, OWN if found is None else source_of(found))


def _grades(grade: float, abilities: Sequence[str]) -> dict[str, float]:
    return {"total": grade, **dict.fromkeys(abilities, grade)}


def _grade_reader(abilities: Sequence[str]) -> Callable[[str], dict[str, float] | None]:
    def read(reply: str) -> dict[str, float] | None:
        grade = read_grade(reply)
        return None if grade is None else _grades(grade, abilities)

    return read


# The published evaluators ask for the same dictionary.
_VERDICT = Prompt(
    (
        (
            "system",
            "You check answers to questions about videos. An answer is right if it means the same "
            "as the true answer; other words for the same thing are fine.",
        ),
        (
            "user",
            "Question: ${question}\nTrue answer: ${answer}\nGiven answer: ${pred}\n\nIs the given "
            "answer right? Reply with nothing but a Python dictionary that has the keys 'pred', "
            "'yes' or 'no', and 'score', a whole number from 0 (nothing in common) to 5 (the same "
            "meaning). For example: {'pred': 'no', 'score': 1}",
        ),
    )
)


def video_qa(given: Given) -> Plan:
    """Right or wrong, and a score from 0 to 5, for the answer to a question about a video."""
    names = ("eval_video_qa.py", "evaluate_activitynet_qa.py")
    found = find_prompt_file(given.prompt_file, given.root, names)
    prompt = _VERDICT
    if found is not None:
        places = ("question", "answer", "pred")
        prompt = Prompt(published_messages(found, places), source_of(found))
    questions = []
    for item in given.items:
        texts = {"question": item.question, "answer": str(item.reference)}
        messages = prompt.fill(**texts, pred=given.answers[item.id])
        questions.append(Question(item.id, messages, dict(given.parameters), _read_verdict))
    return Plan(questions, prompt.source)


def _read_verdict(reply: str) -> dict[str, float] | None:
    verdict = read_verdict(reply)
    if verdict is None:
        return None
    return {"judged_accuracy": float(verdict[0]), "judged_score": float(verdict[1])}


for _name in ("msvd_qa", "msrvtt_qa", "activitynet_qa"):
    JUDGED.add(_name, video_qa)
