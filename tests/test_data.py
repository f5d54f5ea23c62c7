from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_files import ROWS, draw_images, talk, write
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from llava_uhd.config.model import LlavaUHDConfig, VideoConfig
from llava_uhd.config.training import DataConfig
from llava_uhd.data.collator import Collator
from llava_uhd.data.dataset import (
    BrokenFileError,
    BrokenSample,
    ConversationDataset,
    build_dataset,
    tell_times,
)
from llava_uhd.data.sampler import SeededSampler
from llava_uhd.errors import UserError
from llava_uhd.images.video import frame_times, read_video, time_instruction
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import Turn


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def processor() -> LlavaUHDProcessor:
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?!':<>/\n"
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *characters])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    config = LlavaUHDConfig(
        image={"scale_resolution": 32, "patch_size": 8},
        projector={"num_queries": 4},
    )
    return LlavaUHDProcessor.from_parts(tokenizer, config)


def encoded(dataset: ConversationDataset, index: int) -> dict[str, Any]:
    sample = dataset[index]
    assert isinstance(sample, dict)
    return sample


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(
        path=str(write(tmp_path / "data.json", ROWS)), image_folder=str(folder), max_length=None
    )


def test_samples_are_what_the_processor_makes(
    data: DataConfig, processor: LlavaUHDProcessor
) -> None:
    dataset = build_dataset(data, processor)
    assert len(dataset) == 4
    assert dataset.modality_lengths == dataset.records.modality_lengths
    for index, views in ((0, 3), (1, None), (2, 3 + 7), (3, 7)):
        sample = encoded(dataset, index)
        assert len(sample["input_ids"]) == dataset.token_length(index)
        if views is None:
            assert "view_grids" not in sample
        else:
            assert len(sample["view_grids"]) == views
            assert sample["num_visual_tokens"] == 4 * views
            assert sample["pixel_values"].shape == (sample["view_grids"].prod(1).sum(), 3 * 8 * 8)
    text = processor.tokenizer.decode(encoded(dataset, 0)["input_ids"])
    assert "<image>" in text and text.index("<image>") < text.index("W")
    learned = encoded(dataset, 1)["labels"]
    assert (learned != -100).sum() == len(" Hi.") + 1
    assert dataset.counts["samples"] == 6 and dataset.counts["broken"] == 0
    data.image_first = False
    text = processor.tokenizer.decode(encoded(build_dataset(data, processor), 0)["input_ids"])
    assert text.index("W") < text.index("<image>")


def test_published_resizes(data: DataConfig, processor: LlavaUHDProcessor) -> None:
    plain = build_dataset(data, processor)
    changed = replace(data, textvqa_long_side=200, six_slice_probability=1.0)
    resized = build_dataset(changed, processor)

    def size(dataset: ConversationDataset, index: int) -> tuple[int, int]:
        return dataset._open(dataset.records[index].images[0], index).size

    assert size(plain, 0) == (60, 40) and size(plain, 3) == (90, 140)
    # sqrt(6 * 32 * 32 / 40 / 60) = 1.6; the TextVQA picture is pre-resized instead.
    assert size(resized, 0) == (96, 64)
    assert size(resized, 3) == (128, 200)
    assert len(encoded(resized, 0)["view_grids"]) == 7
    assert resized.token_length(0) == len(encoded(resized, 0)["input_ids"])
    single = encoded(build_dataset(replace(changed, overview_only=True), processor), 2)
    assert len(single["view_grids"]) == 2


def test_resizing_depends_on_seed_epoch_and_index(
    data: DataConfig, processor: LlavaUHDProcessor, folder: Path, tmp_path: Path
) -> None:
    rows = [{"image": "a.png", "conversations": talk()}] * 300
    data.path = str(write(tmp_path / "many.json", rows))
    data.six_slice_probability = 0.1

    def drawn(seed: int, epoch: int) -> list[int]:
        dataset = build_dataset(data, processor, seed)
        dataset.set_epoch(epoch)
        path = folder / "a.png"
        return [i for i in range(300) if dataset._target_size(path, (60, 40), i) != (60, 40)]

    assert drawn(0, 0) == drawn(0, 0)
    assert 10 <= len(drawn(0, 0)) <= 60
    assert len({tuple(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_broken_image_stops_or_is_left_out(
    data: DataConfig,
    processor: LlavaUHDProcessor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [*ROWS, *({"id": f"b{i}", "image": "broken.png", "conversations": talk()} for i in "12")]
    data.path = str(write(tmp_path / "broken.json", rows))
    with pytest.raises(UserError, match=r"broken.json, record 4 \(id 'b1'\): image .*broken.png"):
        build_dataset(data, processor)[4]
    data.on_broken_image, data.max_broken = "skip", 0.2
    dataset = build_dataset(data, processor)
    marker = dataset[4]
    assert isinstance(marker, BrokenSample) and "broken.png" in marker.reason
    assert "broken.png" in caplog.text and "1 of at most 1" in caplog.text
    with pytest.raises(UserError, match="2 broken samples in this epoch, more than the 1"):
        dataset[5]
    dataset.set_epoch(1)
    assert isinstance(dataset[5], BrokenSample), "the bound counts within an epoch"
    assert dataset.counts["broken"] == 3


def test_links_are_refused_without_the_up_front_check(
    processor: LlavaUHDProcessor, folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").symlink_to(folder / "a.png")
    rows = [{"image": "a.png", "conversations": talk()}]
    data = DataConfig(
        path=str(write(tmp_path / "data.json", rows)), image_folder=str(root), check_files=False
    )
    with pytest.raises(UserError, match="record 0 .* a link leads out"):
        build_dataset(data, processor)[0]


def test_overlong_samples(data: DataConfig, processor: LlavaUHDProcessor) -> None:
    whole = build_dataset(data, processor).token_length(1)
    data.max_length = whole - 2
    dataset = build_dataset(data, processor)
    sample = encoded(dataset, 1)
    assert sample["truncated_tokens"] == 2
    assert dataset.counts["truncated_tokens"] == 2 and dataset.counts["truncated_samples"] == 1
    with pytest.raises(UserError, match=r"record 3 \(id 'four'\): "):
        dataset[3]
    data.overlong = "drop"
    dropping = build_dataset(data, processor)
    sample = encoded(dropping, 3)
    assert "pixel_values" not in sample
    assert dropping.counts["dropped_images"] == 1


# --- videos ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A folder of seven frames, and one whose third frame is no picture."""
    root = tmp_path_factory.mktemp("films")
    for name, bad in (("good", None), ("bad", 2)):
        (root / name).mkdir()
        for number in range(7):
            content = b"nothing" if number == bad else (folder / "a.png").read_bytes()
            (root / name / f"{number}.png").write_bytes(content)
    return root


FILM_ROWS: list[dict[str, Any]] = [
    {"id": "film", "video": "good", "conversations": talk("What happens?\n<image>")},
    {
        "id": "mixed",
        "images": ["a.png", "sub/b.png"],
        "video": "good",
        "conversations": [*talk("<image> <video> <image>: same?"), *talk("Why?", "So.")],
    },
    {"id": "bad", "video": "bad", "conversations": talk("<video>\nWhat?")},
]


@pytest.fixture
def film_data(folder: Path, films: Path, tmp_path: Path) -> DataConfig:
    path = str(write(tmp_path / "films.json", FILM_ROWS))
    return DataConfig(path=path, image_folder=str(folder), video_folder=str(films), max_length=None)


def with_video(processor: LlavaUHDProcessor, several: str = "same", **video: Any) -> Any:
    config = LlavaUHDConfig(
        image={"scale_resolution": 32, "patch_size": 8, "several": several},
        projector={"num_queries": 4},
        video=video,
    )
    return LlavaUHDProcessor.from_parts(processor.tokenizer, config)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("several", ["same", "pad"])
def test_videos_become_samples(
    film_data: DataConfig, processor: LlavaUHDProcessor, told: bool, several: str
) -> None:
    reading = with_video(processor, several, max_frames=3, time_instruction=told)
    dataset = build_dataset(film_data, reading)
    # Slices of 32 x 32 where the picture is cut: 3 for 60 x 40, 7 for 200 x 120. A frame is one.
    for index, views in ((0, 3), (1, 3 + (2 if several == "pad" else 10))):
        sample = encoded(dataset, index)
        assert len(sample["view_grids"]) == views
        assert sample["num_visual_tokens"] == 4 * views
        assert len(sample["input_ids"]) == dataset.token_length(index)
        assert dataset.encoding(index).labels == sample["labels"].tolist()
    text = processor.tokenizer.decode(encoded(dataset, 0)["input_ids"])
    sentence = (
        "The video lasts for 3.50 seconds, and 3 frames are uniformly sampled from it. These frames"
        " are located at 0.00s,1.50s,3.00s.Please answer the following questions related to this "
        "video."
    )
    assert (sentence.replace(" ", "") in text.replace(" ", "").replace("\n", "")) == told
    assert dataset.modality_lengths == [5, 8, 4]


def test_times_are_told_as_published(films: Path) -> None:
    video = read_video(films / "good", VideoConfig())
    assert len(video.frames) == 7
    said = time_instruction(video)

    def published(value: str) -> str:
        return f"<image>\n{said}\n{value.replace('<image>', '')}".replace("<image>", "<video>")

    for value in ("<image>\nWhy?", "Why?\n<image>", "<image>"):
        turns = [Turn("human", value.replace("<image>", "<video>")), Turn("gpt", "So.")]
        assert tell_times(turns, [said]) == [Turn("human", published(value)), turns[1]]
    # What the published code does not know: several videos, or one that comes later.
    turns = [Turn("human", "a <video> b <video>"), Turn("gpt", "c")]
    assert tell_times(turns, ["S1", "S2"])[0].text == "a <video>\nS1\n b <video>\nS2\n"
    late = [Turn("human", "a"), Turn("gpt", "b"), Turn("human", "<video> c"), Turn("gpt", "d")]
    assert tell_times(late, ["S"])[2].text == "<video>\nS\n c"
    assert tell_times(late, []) == late


def test_times_without_decoding(films: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from fixtures_video import write_video

    film = write_video(tmp_path / "film.mp4", 25, 10)
    for source in (film, films / "good", read_video(film, VideoConfig()).frames):
        for config in (VideoConfig(), VideoConfig(max_frames=4, force_sample=True)):
            video = read_video(source, config)
            assert frame_times(source, config) == (video.times, video.duration)
            assert frame_times(video, config) == (video.times, video.duration)


def test_broken_videos(
    film_data: DataConfig, processor: LlavaUHDProcessor, films: Path, tmp_path: Path
) -> None:
    dataset = build_dataset(film_data, processor)
    with pytest.raises(UserError, match=r"films.json, record 2 \(id 'bad'\): image .*bad/2.png"):
        dataset[2]
    film_data.on_broken_image, film_data.max_broken = "skip", 0.4
    dataset = build_dataset(film_data, processor)
    marker = dataset[2]
    assert isinstance(marker, BrokenSample) and "bad/2.png" in marker.reason
    assert dataset.counts["broken"] == 1
    # What is no video is found without decoding, too.
    (films / "empty").mkdir(exist_ok=True)
    film_data.path = str(write(tmp_path / "empty.json", [{**FILM_ROWS[2], "video": "empty"}]))
    with pytest.raises(BrokenFileError, match=r"record 0 \(id 'bad'\): folder .* has no pictures"):
        build_dataset(film_data, processor).token_length(0)


def test_collator_pads_and_joins(data: DataConfig, processor: LlavaUHDProcessor) -> None:
    dataset = build_dataset(data, processor)
    samples = [encoded(dataset, i) for i in (1, 2, 0)]
    batch = Collator(pad_token_id=7)([*samples, BrokenSample("x", "y")])
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        assert torch.equal(batch["input_ids"][row, :length], sample["input_ids"])
        assert torch.equal(batch["labels"][row, :length], sample["labels"])
        assert (batch["input_ids"][row, length:] == 7).all()
        assert (batch["labels"][row, length:] == -100).all()
    assert torch.equal(
        batch["view_grids"],
        torch.cat([samples[1]["view_grids"], samples[2]["view_grids"]]),
    )
    assert batch["pixel_values"].shape[0] == batch["view_grids"].prod(1).sum()
    text_only = Collator(7)([samples[0]])
    assert set(text_only) == {"input_ids", "attention_mask", "labels"}


def test_batch_of_broken_samples_is_harmless() -> None:
    batch = Collator(pad_token_id=0)([BrokenSample("x", "y")] * 3)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (1, 2)
    assert (batch["labels"] == -100).all() and batch["attention_mask"].all()


def test_workers_change_nothing(data: DataConfig, processor: LlavaUHDProcessor) -> None:
    data.six_slice_probability = 0.5

    def run(workers: int) -> tuple[list[dict[str, torch.Tensor]], dict[str, int]]:
        dataset = build_dataset(data, processor, seed=1)
        sampler = SeededSampler(len(dataset), seed=1, on_epoch=dataset.set_epoch)
        loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=2,
            sampler=sampler,
            num_workers=workers,
            collate_fn=Collator(0),
            persistent_workers=workers > 0,
        )
        batches = []
        for epoch in range(4):
            sampler.set_epoch(epoch)
            batches += list(loader)
        return batches, dataset.counts

    alone, counts = run(0)
    together, same = run(2)
    assert len(alone) == len(together) == 8
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert counts == same and counts["samples"] == 16
    assert len({tuple(batch["view_grids"].flatten().tolist()) for batch in alone}) > 4
