"""The checkpoint of a command that hands it to another program."""

from __future__ import annotations

from pathlib import Path

from llava_uhd.checkpoint.sources import find_checkpoint
from llava_uhd.errors import UserError


def existing_checkpoint(name: str) -> Path | str:
    """A folder as an absolute path, or a hub id as it is.

    Raises:
        UserError: there is no such checkpoint.
    """
    found = find_checkpoint(name)
    folder = Path(found).expanduser()
    if folder.is_file():
        raise UserError(f"checkpoint {name} is a file, expected a folder")
    return folder.absolute() if folder.is_dir() else str(found)
