"""Pictures of the feature pyramid."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_tiny import picture
from PIL import Image

from llava_uhd import inspect
from llava_uhd.checkpoint.parts import open_tower
from llava_uhd.checkpoint.pyramid import _join, open_pyramid
from llava_uhd.checkpoint.vdim import write_vdim
from llava_uhd.errors import UserError
from llava_uhd.images.feature_pictures import GAP, principal_colours
from llava_uhd.images.pixels import cut_views, pack_views
from llava_uhd.images.strategies import plan_image
from llava_uhd.vision.upsampler import UpsamplerStack


@pytest.fixture(scope="module")
def upsampler(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an upsampler with random weights for the demo tower."""
    folder = tmp_path_factory.mktemp("vdim")
    torch.manual_seed(0)
    stack = UpsamplerStack(96, 4)
    for module in stack.modules():
        reset = getattr(module, "reset_weights", None)
        if callable(reset):
            reset()
    facts = {
        "width": "96",
        "scale": "4",
        "tower": "llava_uhd/assets/demo_tower",  # counts from the repository, wherever one stands
        "select_layer": "-2",
        "mean": json.dumps([0.5, 0.5, 0.5]),
        "std": json.dumps([0.5, 0.25, 0.5]),
    }
    write_vdim(folder, stack.state_dict(), facts)
    return folder


def test_maps_are_those_of_the_tower_and_the_stack(root: Path, upsampler: Path) -> None:
    pyramid = open_pyramid(upsampler)
    assert pyramid.image.normalisation == ((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    image = picture(150, 100)
    plan = plan_image(pyramid.image, 150, 100)
    assert plan.grid is not None
    with torch.inference_mode():
        maps = pyramid._view_maps(image, plan)
        for view, grid, found in zip(cut_views(image, plan), plan.view_grids, maps, strict=True):
            # The slow way: one view as a picture of its own, guidance straight from its pixels.
            plain = plan_image(pyramid.image, *view.size, overview_only=True)
            pixels, grids = pack_views(view, plain, *pyramid.image.normalisation)
            tower = open_tower(root / "llava_uhd/assets/demo_tower", -2)
            source = tower(pixels, grids).T.reshape(1, 96, *grid)
            mean, std = (torch.tensor(v)[:, None, None] for v in pyramid.image.normalisation)
            values = torch.from_numpy(np.array(view))
            guidance = (values.permute(2, 0, 1) / 255 - mean) / std
            expected = pyramid.stack(source, guidance.unsqueeze(0))
            torch.testing.assert_close(found[1], source[0], rtol=1e-4, atol=1e-5)
            for scale in (2, 4):
                torch.testing.assert_close(found[scale], expected[scale][0], rtol=1e-3, atol=1e-4)


def test_slices_are_joined_in_reading_order() -> None:
    maps = [{1: torch.full((1, 2, 3), float(index))} for index in range(6)]
    joined = _join(maps, 3)[1]
    assert joined.shape == (1, 4, 9)
    assert joined[0, ::2, ::3].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_colours_follow_the_strongest_direction() -> None:
    ramp = torch.linspace(-1, 1, 40).expand(10, 40)
    noise = 0.01 * torch.randn(3, 10, 40, generator=torch.Generator().manual_seed(0))
    colours = principal_colours([torch.stack([ramp, torch.zeros(10, 40), -2 * ramp]) + noise])[0]
    red = colours[..., 0].float().mean(0)
    steps = red.diff()
    assert (steps > 0).float().mean() > 0.9 or (steps < 0).float().mean() > 0.9
    assert red.max() - red.min() > 200


def test_the_command(
    upsampler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    picture(200, 130).save(tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["inspect", "p.png", "--pyramid", str(upsampler)])
    inspect.main()
    assert "p_pyramid.png" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "p_pyramid.png")
    # Two rows (overview, slices) of four panels.
    assert sheet.height > 2 * 224
    assert sheet.width > 4 * 224 + 3 * GAP


def test_checkpoints_without_a_pyramid(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"spatial_resampler.*has no upsampler"):
        open_pyramid(tiny_checkpoint)
    with pytest.raises(UserError, match="has no upsampler"):
        open_pyramid(tmp_path)
    write_vdim(tmp_path, _zeros(), {"width": "8", "scale": "2"})
    with pytest.raises(UserError, match="does not say which tower"):
        open_pyramid(tmp_path)


def test_files_that_cannot_be_drawn(tmp_path: Path) -> None:
    facts = {"width": "8", "scale": "2", "mean": "[0, 0, 0]", "std": "[1, 1, 1]"}
    file = tmp_path / "vdim.safetensors"
    write_vdim(file, _zeros(), {**facts, "tower": "new clip_vision_model"})
    with pytest.raises(UserError, match="belongs to a new clip_vision_model.* not kept"):
        open_pyramid(tmp_path)
    for broken in ({"mean": "grey"}, {"std": "1"}, {"select_layer": "last"}):
        write_vdim(file, _zeros(), {**facts, **broken, "tower": "tower"})
        with pytest.raises(UserError, match="its metadata .* are incomplete or broken"):
            open_pyramid(file)
    whole = file.read_bytes()
    for length in (3, 2000, len(whole) - 4):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot be read as weights"):
            open_pyramid(file)


def _zeros() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = UpsamplerStack(8, 2).state_dict()
    return {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
