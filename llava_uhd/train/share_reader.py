"""A reader of torch's distributed checkpoints whose index cannot run code.

The index ``.metadata`` is a pickle, which torch reads with all that a pickle can do. Tensors
themselves are read with ``weights_only``.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from llava_uhd.errors import UserError

INDEX_FILE = ".metadata"
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
        *("TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata"),
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}
_PATHS = {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


class ForeignError(ValueError):
    """An index names what does not belong there."""


class IndexUnpickler(pickle.Unpickler):
    """Knows what torch writes into an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """A class or function that the index names."""
        if module.partition(".")[0] == "pathlib" and name in _PATHS:
            return Path
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise ForeignError(f"it names {module}.{name}, which no index of tensors holds")


class ShareReader(FileSystemReader):
    """torch's reader of a folder.

    Args:
        folder: with the shares.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index = folder / INDEX_FILE

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder holds.

        Raises:
            UserError: the index is damaged, or holds something else than an index.
        """
        try:
            with self.index.open("rb") as stream:
                metadata = IndexUnpickler(stream).load()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError) as error:
            raise UserError(
                f"{self.index} cannot be read ({error}): go on from an earlier checkpoint"
            ) from error
        if not isinstance(metadata, Metadata):
            raise UserError(
                f"{self.index} is no index of a checkpoint: go on from an earlier checkpoint"
            )
        storage = metadata.storage_meta or StorageMeta()
        storage.load_id = self.load_id
        metadata.storage_meta = storage
        return metadata
