"""Two hundred mixed questions: a batch of eight answers as each question alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures_tiny import picture, tiny_parts

from llava_uhd.eval import metrics
from llava_uhd.eval.generate import Answerer, Limits
from llava_uhd.eval.task import Item, Task
from llava_uhd.text.templates import Turn

pytestmark = pytest.mark.slow


class Many(Task):
    """Questions of many lengths with none to three images, some in mid-conversation."""

    name, title, folder, source, main_metric = "many", "Many", "many", "made here", "exact"

    def files(self, root: Path) -> list[Path]:
        return [root]

    def items(self, root: Path) -> Iterator[Item]:
        draw = random.Random(0)
        words = "what colour shape sign red blue how many where".split()
        for index in range(200):
            images = tuple(
                picture(draw.randint(8, 160), draw.randint(8, 160), seed=4 * index + number)
                for number in range(draw.choice((0, 1, 1, 1, 2, 3)))
            )
            question = " ".join(draw.choices(words, k=draw.randint(1, 25)))
            earlier = (Turn("human", "Who?"), Turn("gpt", "red")) if draw.random() < 0.2 else ()
            yield Item(index, question, images, "x", earlier)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        return {"exact": metrics.exact_match(parsed, item.reference)}


@pytest.fixture(scope="module")
def tiny() -> Any:
    model, processor = tiny_parts()
    model.generation_config.eos_token_id = list(range(2, len(processor.tokenizer), 7))
    return model, processor


def answers(tiny: Any, task: Task, items: list[Item], limits: Limits) -> dict[Any, Any]:
    outcomes = list(Answerer(*tiny, task, limits).run(items))
    assert not [each for outcome in outcomes for each in outcome.failures]
    return {each.id: each for outcome in outcomes for each in outcome.answers}


@pytest.mark.parametrize("beams", [1, 3])
def test_eight_at_a_time(tiny: Any, beams: int, tmp_path: Path) -> None:
    task = Many()
    items = task.load(tmp_path)
    alone = answers(tiny, task, items, Limits(8, beams, 1))
    together = answers(tiny, task, items, Limits(8, beams, 8))
    assert alone.keys() == together.keys() and len(alone) == 200
    assert len({each.text for each in alone.values()}) > 100
    # Not one lies so close to a tie that the order of adding decides.
    assert [name for name in alone if alone[name] != together[name]] == []
