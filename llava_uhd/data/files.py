"""Where data comes from, and image paths that must stay inside their folder."""

from __future__ import annotations

import enum
import os
import stat
from pathlib import Path

from llava_uhd.errors import UserError

_DOWNLOAD = "hf download --repo-type dataset"

# Published data files: what they are and how to get them.
DATA_SOURCES = {
    "blip_laion_cc_sbu_558k.json": (
        "the 558K captions of the first stage, on the hub as liuhaotian/LLaVA-Pretrain; fetch it "
        f"and unpack its images.zip: {_DOWNLOAD} liuhaotian/LLaVA-Pretrain "
        "--local-dir playground/data/LLaVA-Pretrain"
    ),
    "llava_v1_5_mix665k.json": (
        "the 665K instructions of the second stage, on the hub as liuhaotian/LLaVA-Instruct-150K; "
        f"fetch it: {_DOWNLOAD} liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json "
        "--local-dir playground/data (its images come from COCO, GQA, OCR-VQA, TextVQA and Visual "
        "Genome, see playground/README.md)"
    ),
}


class ImageStatus(enum.Enum):
    """What `ImageRoot.check` found."""

    PRESENT = "present"
    MISSING = "missing"
    UNCHECKED = "unchecked"


class ImageRoot:
    """An image folder that no path may leave, neither by its text nor by a link.

    Args:
        path: of the folder.
        follow_links: allow links inside the folder that lead out of it.

    Raises:
        UserError: the folder does not exist.
    """

    def __init__(self, path: Path, follow_links: bool = False) -> None:
        if not path.is_dir():
            raise UserError(
                f"image folder {path} does not exist: data.image_folder must name the folder that "
                "the image paths of the data file are relative to"
            )
        self.path = path
        self.follow_links = follow_links
        self._prefix = os.path.join(path, "")
        self._real = os.path.realpath(path)
        # Images share few folders: each is resolved once.
        self._folders: dict[str, bool] = {}

    def check(self, image: str, look: bool = True) -> ImageStatus:
        """Checks one relative image path.

        Args:
            image: as written in the data file.
            look: also look at the file system.

        Raises:
            UserError: the path leaves the folder.
        """
        # Both kinds of separators and drive letters: a data file may come from another system.
        plain = image.replace("\\", "/")
        if "\0" in image or plain.startswith("/") or plain[1:2] == ":" or ".." in plain.split("/"):
            raise UserError(f"image path {image!r} is refused: it must stay inside {self.path}")
        if not look:
            return ImageStatus.UNCHECKED
        return self._look(image)

    def _look(self, image: str) -> ImageStatus:
        file = f"{self._prefix}{image}"
        try:
            mode = os.lstat(file).st_mode
        except OSError:
            return ImageStatus.MISSING
        self._refuse_leaving_links(image, file, stat.S_ISLNK(mode))
        if stat.S_ISLNK(mode):
            return ImageStatus.PRESENT if os.path.isfile(file) else ImageStatus.MISSING
        return ImageStatus.PRESENT if stat.S_ISREG(mode) else ImageStatus.MISSING

    def _refuse_leaving_links(self, image: str, file: str, is_link: bool) -> None:
        if self.follow_links:
            return
        folder = os.path.dirname(file)
        if folder not in self._folders:
            self._folders[folder] = self._inside(folder)
        if not self._folders[folder] or (is_link and not self._inside(file)):
            raise UserError(
                f"image path {image!r} is refused: a link leads out of {self.path} "
                "(set data.follow_links: true if the link is yours)"
            )

    def _inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real or real.startswith(self._real.rstrip(os.sep) + os.sep)
