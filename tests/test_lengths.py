"""Token counts before training: those of the samples, kept in a file, by several processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_tiny import QWEN2, tiny_parts
from test_anyres import SIGLIP, TILES

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.config.training import DataConfig
from llava_uhd.data import lengths
from llava_uhd.data.costs import TrainingCost, VisionCost
from llava_uhd.data.dataset import ConversationDataset, build_dataset
from llava_uhd.data.lengths import (
    CountedEpochs,
    count_tokens,
    counted_from,
    load_counts,
    save_counts,
    stored_counts,
)
from llava_uhd.data.synthetic import SyntheticConfig, embedded_split, generate
from llava_uhd.errors import UserError
from llava_uhd.images.cost import image_cost, tower_flops
from llava_uhd.images.cost_projectors import PROJECTOR_COSTS, Convention
from llava_uhd.images.strategies import plan_image

MODELS: dict[str, dict[str, Any]] = {
    "uhd": {"image": {"scale_resolution": 64}},
    "onevision": {
        "text": QWEN2,
        "vision": SIGLIP,
        "projector": {"type": "mlp2x_gelu"},
        "image": TILES,
        "video": {"pool_stride": 2, "strategy": "squeeze", "time_instruction": True},
    },
}
Counted = tuple[ConversationDataset, LlavaUHDConfig]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Records with an image, two images, a video and none."""
    split = embedded_split("debug_mixed", "finetune", tmp_path_factory.mktemp("data"))
    return DataConfig(str(split.file), str(split.image_folder), str(split.video_folder))


def counted(data: DataConfig, kind: str = "uhd", **changes: Any) -> Counted:
    model, processor = tiny_parts(**{k: dict(v) for k, v in MODELS[kind].items()})
    return build_dataset(dataclasses.replace(data, **changes), processor, 3), model.config


def true_figures(dataset: ConversationDataset, config: LlavaUHDConfig) -> np.ndarray:
    """(N, 2) tokens and operations of the tower, of the samples themselves."""
    rows = []
    for index in range(len(dataset)):
        sample = dataset[index]
        assert isinstance(sample, dict)
        grids = sample.get("view_grids")
        views = [] if grids is None else [tuple(grid) for grid in grids.tolist()]
        rows.append((len(sample["input_ids"]), tower_flops(config, views)))
    return np.array(rows, float)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("most", [None, 110])
def test_counts_are_those_of_the_samples(mixed: DataConfig, kind: str, most: int | None) -> None:
    dataset, config = counted(mixed, kind, max_length=most, overlong="drop")
    counts = count_tokens(dataset, config)
    true = true_figures(dataset, config)
    assert counts.tokens.tolist() == true[:, 0].tolist()
    if most is None:
        assert counts.tower.tolist() == true[:, 1].tolist()
        assert (counts.uncut == counts.tokens).all()
        assert ((counts.projector > 0) == (counts.tower > 0)).all()
        assert len(set(counts.tokens.tolist())) > 3
    else:
        assert (counts.uncut > counts.tokens).any() and (counts.tokens <= most).all()
    assert not counts.broken.any() and not len(counts.redrawn_of)
    assert counts.longest(dataset) == counts.tokens.max()


def test_drawn_resizes_are_counted_epoch_by_epoch(mixed: DataConfig) -> None:
    dataset, config = counted(mixed, six_slice_probability=0.5)
    counts = count_tokens(dataset, config)
    assert 0 < len(counts.redrawn_of) <= 3 * len(dataset)
    seen = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        tokens, tower, projector = counts.at(dataset, epoch)
        true = true_figures(dataset, config)
        assert tokens.tolist() == true[:, 0].tolist()
        assert tower.tolist() == true[:, 1].tolist()
        assert tokens.max() <= counts.longest(dataset)
        assert not (tokens == counts.tokens).all() and (projector >= 0).all()
        seen.append(tokens.tolist())
    assert len({str(each) for each in seen}) == 4
    # Of a cut sample they are an upper bound.
    dataset, config = counted(mixed, six_slice_probability=0.5, max_length=115, overlong="drop")
    counts = count_tokens(dataset, config)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        tokens, true = counts.at(dataset, epoch)[0], true_figures(dataset, config)[:, 0]
        assert (tokens >= true).all() and (tokens <= 115).all()


def test_broken_files(mixed: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(Path(str(mixed.path)).parent, folder)
    (folder / "images/mixed/4.png").write_bytes(b"no picture")
    data = dataclasses.replace(
        mixed,
        path=str(folder / "finetune.json"),
        image_folder=str(folder / "images"),
        video_folder=str(folder / "videos"),
    )
    with pytest.raises(UserError, match=r"finetune\.json, record 4 .*4\.png cannot be read"):
        count_tokens(*counted(data))
    counts = count_tokens(*counted(data, on_broken_image="skip", max_broken=0.5))
    whole = count_tokens(*counted(mixed))
    assert counts.broken.nonzero()[0].tolist() == [4]
    assert 0 < counts.tokens[4] < whole.tokens[4] and counts.tower[4] == 0
    others = np.arange(len(counts)) != 4
    assert (counts.tokens[others] == whole.tokens[others]).all()


def test_a_sample_that_does_not_fit_is_told(mixed: DataConfig) -> None:
    with pytest.raises(UserError, match=r"finetune\.json, record 0 .*would lose 1 of 1 images"):
        count_tokens(*counted(mixed, max_length=40))


def test_processes_count_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path, SyntheticConfig(tiles=1, train=23, eval=1))
    monkeypatch.setattr(lengths, "CHUNK", 5)
    data = DataConfig(str(tmp_path / "finetune.json"), str(tmp_path / "images"))
    dataset, config = counted(data)
    told: list[int] = []
    alone = count_tokens(dataset, config, 0, told.append)
    assert told == [5, 5, 5, 5, 3]
    helped = count_tokens(dataset, config, 2)
    for name, values in vars(alone).items():
        assert np.array_equal(values, getattr(helped, name)), name
    record = json.loads((tmp_path / "finetune.json").read_text())[7]
    (tmp_path / "images" / record["image"]).write_bytes(b"")
    with pytest.raises(UserError, match=r"^\S+finetune\.json, record 7 "):
        count_tokens(dataset, config, 2)


def test_counts_are_kept(
    mixed: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token_counts.npz"
    dataset, config = counted(mixed, six_slice_probability=0.5)
    first = stored_counts(dataset, config, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with monkeypatch.context() as patched:
        patched.setattr(lengths, "count_tokens", lambda *given, **named: pytest.fail("again"))
        again = stored_counts(*counted(mixed, six_slice_probability=0.3), file)
    for name, values in vars(first).items():
        assert np.array_equal(values, getattr(again, name)), name
    # Half a file, or one of other data, is counted anew.
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert load_counts(file, counted_from(dataset, config)) is None
    assert (stored_counts(dataset, config, file).tokens == first.tokens).all()
    other, _ = counted(mixed, max_length=110, overlong="drop")
    assert stored_counts(other, config, file).tokens.max() <= 110
    with pytest.raises(UserError, match=r"missing/token_counts\.npz cannot be written"):
        stored_counts(other, config, tmp_path / "missing/token_counts.npz")


def test_what_counts_follow_from(mixed: DataConfig, tmp_path: Path) -> None:
    base = counted_from(*counted(mixed))
    assert base == counted_from(*counted(mixed, preview=0, six_slice_probability=0.0))
    copied = tmp_path / "other.json"
    text = Path(str(mixed.path)).read_text()
    copied.write_text(text.replace("Repeat", "Say"))
    dataset, config = counted(mixed)
    found = {base, counted_from(*counted(mixed, path=str(copied)))}
    for changes in ({"max_length": 9}, {"overview_only": True}, {"six_slice_probability": 0.1}):
        found.add(counted_from(*counted(mixed, **changes)))
    dataset.processor.template_name = "plain"
    found.add(counted_from(dataset, config))
    found.add(counted_from(*counted(mixed, "onevision")))
    assert len(found) == 7
    save_counts(copied.with_suffix(".npz"), "x", count_tokens(*counted(mixed)))
    assert load_counts(copied.with_suffix(".npz"), "y") is None


def test_costs_are_those_of_the_cost_model(mixed: DataConfig) -> None:
    _, config = counted(mixed, "onevision")
    plan = plan_image(config.image, 90, 50)
    grids = tuple(plan.view_grids)
    expected = image_cost(config, plan, 33)
    tower, projector = VisionCost(config)(grids)
    assert (tower, projector) == (expected.tower, expected.projector)
    assert projector == PROJECTOR_COSTS.get("mlp2x_gelu").flops(config, grids, Convention())
    text = config.text_config
    cost = TrainingCost.of(text, ["projector"])
    head = 2 * text.vocab_size * text.hidden_size
    one = cost(np.array([expected.positions]), np.array([tower]), np.array([projector]))
    assert one[0] == pytest.approx(tower + 3 * projector + 2 * (expected.language - head))


def test_passes_of_a_stage(mixed: DataConfig) -> None:
    text = counted(mixed)[1].text_config

    def passes(*learn: str, **options: bool) -> tuple[int, int, int]:
        cost = TrainingCost.of(text, learn, **options)
        return cost.tower, cost.projector, cost.language

    assert passes("projector") == (1, 3, 2)
    assert passes("projector", "language_model") == (1, 3, 3)
    assert passes("language_model") == (1, 1, 3)
    assert passes("vision_tower", "projector", "language_model", recomputes=True) == (3, 3, 4)
    assert passes("vision_tower") == (3, 2, 2)
    assert passes("projector", "language_model", adapters=True) == (1, 3, 2)
    # Without a formula of its own: a decoder of that width and depth.
    text.model_type = "mixtral"
    assert TrainingCost.of(text, ["projector"]).linear == 24 * 2 * 64**2


def test_epochs_are_counted_once(mixed: DataConfig) -> None:
    dataset, config = counted(mixed, six_slice_probability=0.5)
    cost = TrainingCost.of(config.text_config, ["projector"])
    epochs = CountedEpochs(count_tokens(dataset, config), dataset, cost)
    assert epochs(1) is epochs(1)
    (tokens, costs), (others, _) = epochs(1), epochs(2)
    assert tokens.shape == costs.shape and (costs > 0).all()
    assert not (tokens == others).all()
