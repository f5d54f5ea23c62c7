"""What every test gets: one thread, no network, the golden data where they are at hand."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before the libraries are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    GRADIO_ANALYTICS_ENABLED="False",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)
# A compile that was killed leaves a lock in this folder that later runs would wait on for ever.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp(prefix="llava_uhd_extensions_"))

import hypothesis
import pytest
import torch
from fixtures_model import questions, tiny_checkpoint  # noqa: F401  (fixtures)

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "llava_uhd",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("llava_uhd")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(autouse=True)
def tidy_logging() -> Iterator[None]:
    """Commands raise the level of the root logger; later tests want their own."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train in, with the embedded data drawn."""
    from llava_uhd.data.synthetic import embedded_split

    folder = tmp_path_factory.mktemp("workplace")
    embedded_split("debug", "pretrain", folder / "playground/data")
    return folder


@pytest.fixture
def train(workplace: Path) -> Callable[..., Path]:
    """One run in `workplace`: ``train(recipe, output, *words)`` gives its output folder."""
    from fixtures_runs import run_here

    return lambda *words: run_here(workplace, *words)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with inputs and outputs of the original systems, one sub-folder per system.

    ``LLAVA_UHD_GOLDEN`` names it; without it, ``shared/golden`` beside or inside the repository.
    """
    named = os.environ.get("LLAVA_UHD_GOLDEN")
    places = [Path(named)] if named else [ROOT.parent / "shared/golden", ROOT / "shared/golden"]
    for place in places:
        if place.is_dir():
            return place
    pytest.skip(f"no golden data at {places[0]}; LLAVA_UHD_GOLDEN can name the folder")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests reach this machine only."""
    connect = socket.socket.connect

    def local_connect(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if host not in ("", "localhost", "::1") and not str(host).startswith("127."):
            raise OSError(f"tests must not use the network (tried {address})")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    yield
