"""The index of torch's distributed checkpoints: read without running what it names."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from llava_uhd.errors import UserError
from llava_uhd.train.share_reader import INDEX_FILE, ShareReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)
    return {f"x/{dtype}": torch.randn(4, 3).mul(9).abs().to(dtype) for dtype in dtypes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(state(), storage_writer=FileSystemWriter(tmp_path / "shares"), no_dist=True)
    return tmp_path / "shares"


def test_what_torch_wrote_is_read(folder: Path) -> None:
    assert ShareReader(folder).read_metadata().state_dict_metadata == (
        FileSystemReader(folder).read_metadata().state_dict_metadata
    )
    found = {name: torch.zeros_like(each) for name, each in state().items()}
    load(found, storage_reader=ShareReader(folder), no_dist=True)
    for name, each in state().items():
        assert torch.equal(found[name], each)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_an_index_runs_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX_FILE).write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    with pytest.raises(UserError, match=r"\.metadata cannot be read \(it names posix\.mkdir"):
        ShareReader(folder).read_metadata()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"text", pickle.dumps({"a": 1})])
def test_a_damaged_index_is_one_line(folder: Path, content: bytes) -> None:
    (folder / INDEX_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata .*go on from an earlier checkpoint"):
        ShareReader(folder).read_metadata()
