"""From a map in picture resolution down to the tower's grid, by learned weights.

Windows are as large as the tower's patches and do not overlap, so a window is a block of the map:
nothing is ever unfolded.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from llava_uhd.train.vdim.resample import Resampling

KEEP = 0.2  # windows whose draw is above this keep their logits


def gaussian_blur(maps: torch.Tensor) -> torch.Tensor:
    """Separable Gaussian of 5 taps and sigma 1 with reflected borders.

    Args:
        maps: (B, C, H, W), H and W above 2.
    """
    return Resampling((int(maps.shape[-2]), int(maps.shape[-1])), blur=True)(maps)


def sum_windows(maps: torch.Tensor, window: int) -> torch.Tensor:
    """(B, C, H, W) to (B, C, H / window, W / window)."""
    return F.avg_pool2d(maps, window) * (window * window)


def sum_resampled(
    maps: torch.Tensor, weights: torch.Tensor, resampling: Resampling, window: int
) -> torch.Tensor:
    """`sum_windows` of weighted resampled maps, without ever making these.

    Weights and resampling together are one matrix from the small map to the windows.

    Args:
        maps: (B, C, h, w), small.
        weights: (B or 1, H, W) of the pixels of the resampled map.
        resampling: makes (B, C, H, W) of ``maps``.
        window: side of a window.

    Returns:
        (B, C, H / window, W / window).
    """
    rows = resampling.matrix(0, maps.shape[-2], maps.device).unflatten(0, (-1, window))
    columns = resampling.matrix(1, maps.shape[-1], maps.device).unflatten(0, (-1, window))
    cells = weights.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    matrix = torch.einsum("biujv,jvq->biujq", cells, columns)
    matrix = torch.einsum("biujq,iup->bpqij", matrix, rows)
    small = maps.flatten(2) @ matrix.flatten(3).flatten(1, 2)
    return small.unflatten(2, (len(rows), len(columns)))


def check_windows(maps: torch.Tensor, window: int) -> tuple[int, int]:
    """(rows, columns) of windows in a map.

    Raises:
        ValueError: windows do not fill the map.
    """
    height, width = maps.shape[-2:]
    if height % window or width % window:
        raise ValueError(f"a map of {height} x {width} has no whole windows of {window}")
    return height // window, width // window


class AttentionDownsampler(nn.Module):
    """Softmax attention inside each window: the published downsampler.

    Args:
        width: channels.
        window: side of a window in pixels of the map.
        blur: blur the map first.
        dropout: of the channels that the logits are made of.
    """

    def __init__(self, width: int, window: int, blur: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        self.window = window
        self.blur = blur
        self.attention_net = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, 1))
        self.w = nn.Parameter(torch.empty(window, window))
        self.b = nn.Parameter(torch.empty(window, window))

    def reset_weights(self) -> None:
        """Almost equal weights in a window."""
        init.normal_(self.w, mean=1.0, std=0.01)
        init.normal_(self.b, std=0.01)
        self.linear.reset_parameters()

    @property
    def linear(self) -> nn.Linear:
        """Makes the logits."""
        found = self.attention_net[1]
        assert isinstance(found, nn.Linear)
        return found

    def pixel_logits(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, 1, H, W): how much each pixel asks to be looked at."""
        linear = self.linear
        dropped = self.attention_net[0](maps)
        return torch.einsum("bchw,oc->bohw", dropped, linear.weight) + linear.bias

    def forward(self, maps: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Shrinks maps by the window.

        Args:
            maps: (B, C, H, W), H and W multiples of the window.
            keep: (B, H / window, W / window, 1) uniform draws; logits of windows whose draw is at
                most `KEEP` are dropped, so that they are averaged by place alone. None keeps all.

        Returns:
            (B, C, H / window, W / window).
        """
        return self.pool(gaussian_blur(maps) if self.blur else maps, keep)

    def pool(self, maps: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The same for maps that are blurred already."""
        check_windows(maps, self.window)
        weights = self.weights(self.pixel_logits(maps), keep)
        return sum_windows(maps * weights[:, None].to(maps.dtype), self.window)

    def pool_resampled(
        self, maps: torch.Tensor, resampling: Resampling, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`pool` of a resampled map, from the small one.

        Dropout of single channels at single pixels is the one thing that needs the large map.
        """
        dropout = self.attention_net[0]
        if self.training and getattr(dropout, "p", 0.0) > 0:
            return self.pool(resampling(maps), keep)
        linear = self.linear
        small = torch.einsum("bchw,oc->bohw", maps, linear.weight)
        weights = self.weights(resampling(small) + linear.bias, keep)
        return sum_resampled(maps, weights, resampling, self.window)

    def weights(self, logits: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """Softmax inside each window: (B, 1, H, W) to (B, H, W)."""
        rows, columns = check_windows(logits, self.window)
        k = self.window
        logits = logits.float().view(-1, rows, k, columns, k).transpose(2, 3)
        if keep is not None:
            mask = (keep > KEEP).to(logits.dtype)
            logits = logits * mask.reshape(-1, rows, columns, 1, 1)
        weights = (logits * self.w + self.b).flatten(-2).softmax(-1)
        weights = weights.view(-1, rows, columns, k, k).transpose(2, 3)
        return weights.reshape(-1, rows * k, columns * k)


class SimpleDownsampler(nn.Module):
    """One kernel for every window and channel: absolute values that add up to 1.

    Args:
        window: side of a window in pixels of the map.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.blur = False
        self.kernel_params = nn.Parameter(torch.empty(window, window))

    def reset_weights(self) -> None:
        """The plain average."""
        init.ones_(self.kernel_params)

    def kernel(self) -> torch.Tensor:
        """(1, 1, window, window)."""
        positive = self.kernel_params.abs()
        return (positive / positive.sum())[None, None]

    def pool_resampled(
        self, maps: torch.Tensor, resampling: Resampling, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`forward` of a resampled map, from the small one."""
        rows, columns = (side // self.window for side in resampling.size)
        weights = self.kernel()[0].tile(1, rows, columns)
        return sum_resampled(maps, weights, resampling, self.window)

    def forward(self, maps: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Shrinks maps by the window; ``keep`` is for the other downsampler and unused.

        Args:
            maps: (B, C, H, W), H and W multiples of the window.
            keep: unused.

        Returns:
            (B, C, H / window, W / window).
        """
        rows, columns = check_windows(maps, self.window)
        return sum_windows(maps * self.kernel().to(maps.dtype).tile(rows, columns), self.window)
