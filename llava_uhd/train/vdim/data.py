"""Pictures of a VDIM pre-training: COCO-Stuff as published, any folder, or drawn ones."""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from llava_uhd.config.vdim import PictureConfig
from llava_uhd.data.drawing import render
from llava_uhd.data.synthetic import EMBEDDED, TILE, tile_scene
from llava_uhd.errors import UserError
from llava_uhd.images.pixels import open_image
from llava_uhd.train.vdim.draws import seed_of
from llava_uhd.train.vdim.leaves import draw_leaves

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
# Published names of lists that differ from the names of their files.
SUBSETS = {"6": "Coco164kFew_Stuff_6", "7": "Coco164kFull_Stuff_Coarse_7"}
# Every such picture of a folder measures the result, if no other folder does.
HELD_OUT_EVERY = 20
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class Source:
    """Where a picture comes from.

    Attributes:
        name: for messages and captions.
        open: returns the RGB picture; raises UserError with its path.
    """

    name: str
    open: Callable[[], Image.Image]


@dataclass(frozen=True)
class PictureSet:
    """What a recipe reads.

    Attributes:
        train: pictures to learn from.
        held_out: groups of pictures to measure with, by name; never among `train`.
    """

    train: list[Source]
    held_out: dict[str, list[Source]]


def open_pictures(data: PictureConfig) -> PictureSet:
    """Finds all pictures; none is decoded yet.

    Raises:
        UserError: a missing folder or list, an empty one, or a picture that a list names and that
            is not there.
    """
    if data.embedded is not None:
        return _embedded(data)
    elif data.folder is not None:
        train, held_out = _folder(data)
    else:
        train = coco_sources(Path(str(data.root)), data.split, data.list)
        held_out = coco_sources(Path(str(data.root)), data.held_out_split, data.held_out_list)
    return PictureSet(train, {"held out": held_out[: data.held_out], **_photographs(data)})


def coco_sources(root: Path, split: str, name: str) -> list[Source]:
    """Pictures of a COCO-Stuff list.

    Args:
        root: folder that holds ``cocostuff``.
        split: ``train2017`` or ``val2017``.
        name: of the list, see `PictureConfig.list`.

    Raises:
        UserError: no such list, an empty one, or missing pictures.
    """
    base = root / "cocostuff"
    path = base / "curated" / split / f"{SUBSETS.get(name, name)}.txt"
    if not path.is_file():
        raise UserError(
            f"list {path} does not exist: data.root must hold cocostuff/curated/{split}/LIST.txt "
            f"and cocostuff/images/{split}/ID.jpg (or set data.folder to any folder of pictures)"
        )
    ids = path.read_text(encoding="utf-8", errors="replace").split()
    if not ids:
        raise UserError(f"list {path} is empty: it should have one picture id per line")
    folder = base / "images" / split
    files = [folder / f"{each}.jpg" for each in ids]
    here = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    missing = [file for file in files if file.name not in here]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(files)} pictures named in {path} are missing, for "
            f"instance {missing[0]}"
        )
    return [_file_source(file) for file in files]


def _file_source(path: Path) -> Source:
    return Source(path.name, partial(open_image, path))


def _folder(data: PictureConfig) -> tuple[list[Source], list[Source]]:
    """(training, held-out) pictures of folders."""
    files = folder_files(Path(str(data.folder)), "data.folder", data.follow_links)
    if data.held_out_folder is not None:
        where = Path(data.held_out_folder)
        other = folder_files(where, "data.held_out_folder", data.follow_links)
        return [_file_source(file) for file in files], [_file_source(file) for file in other]
    if len(files) < 2:
        raise UserError(
            f"data.folder {data.folder} has only one picture: none is left to measure with. Add "
            "pictures, or set data.held_out_folder"
        )
    every = min(HELD_OUT_EVERY, len(files))
    held_out = files[every - 1 :: every]
    kept = set(files) - set(held_out)
    return (
        [_file_source(file) for file in files if file in kept],
        [_file_source(file) for file in held_out],
    )


def folder_files(folder: Path, key: str, follow_links: bool = False) -> list[Path]:
    """All picture files below a folder, sorted.

    Args:
        folder: any folder.
        key: of the recipe, for messages.
        follow_links: see `PictureConfig.follow_links`.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{key} {folder} {what}")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not follow_links:
        root = folder.resolve()
        inside = [path for path in found if path.resolve().is_relative_to(root)]
        if len(inside) < len(found):
            outside = next(path for path in found if path not in set(inside))
            raise UserError(
                f"{key}: {outside} is a link out of the folder: allow it with "
                "--data.follow_links true"
            )
    if not found:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise UserError(f"{key} {folder} has no pictures (looked for {kinds})")
    return found


def _embedded(data: PictureConfig) -> PictureSet:
    """Tiles of an embedded data set and as many dead leaves; held out are those of another seed."""
    if data.embedded not in EMBEDDED:
        raise UserError(
            f"data.embedded '{data.embedded}' is not one of {', '.join(sorted(EMBEDDED))}"
        )
    config = EMBEDDED[data.embedded]

    def tile(seed: int, index: int) -> Source:
        return Source(f"tile {index} of seed {seed}", partial(_draw_tile, seed, index))

    def leaves(seed: int, index: int) -> Source:
        return Source(f"leaves {index} of seed {seed}", partial(draw_leaves, seed, index, TILE))

    indices = range(config.tiles)
    train = [kind(config.seed, index) for index in indices for kind in (tile, leaves)]
    apart = config.seed + 1
    held_out = {
        "tiles": [tile(apart, index) for index in range(data.held_out)],
        "leaves": [leaves(apart, index) for index in range(data.held_out)],
    }
    return PictureSet(train, {**held_out, **_photographs(data)})


def _draw_tile(seed: int, index: int) -> Image.Image:
    return Image.fromarray(render(tile_scene(seed, index)))


def _photographs(data: PictureConfig) -> dict[str, list[Source]]:
    found = photographs() if data.photographs else []
    return {"photographs": found} if found else {}


def photographs() -> list[Source]:
    """Parts of the two photographs of scikit-learn; empty where it is not installed.

    Each photograph of 640 x 427 pixels gives six squares of 213 pixels.
    """
    spec = importlib.util.find_spec("sklearn")
    folder = Path(str(spec.origin)).parent / "datasets" / "images" if spec else Path()
    files = sorted(folder.glob("*.jpg")) if spec else []
    if not files:
        logger.info("scikit-learn is not installed: its photographs are not measured")
    sources = []
    for file in files:
        picture = open_image(file)
        side = picture.height // 2
        for row in range(2):
            for column in range(3):
                box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
                name = f"{file.stem} {row + 1}/{column + 1}"
                sources.append(Source(name, picture.crop(box).copy))
    return sources


def square(
    picture: Image.Image, res: int, resize: str, coins: random.Random | None = None
) -> Image.Image:
    """Brings the shorter side to ``res`` and cuts a square.

    Args:
        picture: RGB.
        res: pixels.
        resize: key of `FILTERS`.
        coins: chooses the cut; None cuts the middle.
    """
    width, height = picture.size
    # The longer side is rounded down, as the published transform does.
    if width <= height:
        size = (res, max(res, int(res * height / width)))
    else:
        size = (max(res, int(res * width / height)), res)
    if size != picture.size:
        picture = picture.resize(size, FILTERS[resize])
    spare = (size[0] - res, size[1] - res)
    if coins is None:
        left, top = round(spare[0] / 2), round(spare[1] / 2)
    else:
        left, top = coins.randint(0, spare[0]), coins.randint(0, spare[1])
    return picture.crop((left, top, left + res, top + res))


@dataclass(frozen=True)
class Transform:
    """RGB picture to a normalised square.

    Attributes:
        data: of the recipe.
        mean: of the channels, in [0, 1].
        std: of the channels, in [0, 1].
    """

    data: PictureConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image, coins: random.Random | None = None) -> torch.Tensor:
        """float32 (3, res, res)."""
        cut = square(picture, self.data.res, self.data.resize, coins)
        pixels = torch.from_numpy(np.asarray(cut, dtype=np.float32).copy()).permute(2, 0, 1) / 255
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def picture(self, pixels: torch.Tensor) -> Image.Image:
        """The inverse of the normalisation, for people: (3, H, W) to RGB."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        values = pixels.detach().float().cpu() * std[:, None, None] + mean[:, None, None]
        array = (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        return Image.fromarray(array)


class Pictures(Dataset[dict[str, Any]]):
    """Training pictures; a sample depends on (seed, epoch, index) alone.

    Args:
        sources: of `open_pictures`.
        transform: of the recipe.
        seed: of the run.
    """

    def __init__(self, sources: Sequence[Source], transform: Transform, seed: int = 0) -> None:
        self.sources = sources
        self.transform = transform
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the cuts of an epoch; loader processes see it too."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        coins = None
        if self.transform.data.crop == "random":
            coins = random.Random(seed_of(self.seed, int(self.epoch), index))
        return {"pictures": self.transform(self._open(index), coins)}

    def _open(self, index: int) -> Image.Image:
        """The picture, or the next readable one where broken pictures are skipped.

        Raises:
            UserError: a broken picture; or none can be read.
        """
        for step in range(len(self.sources)):
            try:
                return self.sources[(index + step) % len(self.sources)].open()
            except UserError as error:
                if self.transform.data.on_broken_picture == "error":
                    raise UserError(
                        f"{error}; data.on_broken_picture: skip leaves it out"
                    ) from None
                logger.warning("left out: %s", error)
        raise UserError("none of the pictures can be read")


def stack_pictures(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Batch of samples: ``pictures`` (B, 3, H, W)."""
    return {"pictures": torch.stack([sample["pictures"] for sample in samples])}


def batches(sources: Sequence[Source], transform: Transform, size: int) -> Iterator[torch.Tensor]:
    """Held-out pictures in order, (at most size, 3, H, W) at a time, cut in the middle."""
    for start in range(0, len(sources), size):
        group = sources[start : start + size]
        yield torch.stack([transform(source.open()) for source in group])
