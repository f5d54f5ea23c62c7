"""From a map in picture resolution down to the tower's grid, by learned weights.

Windows are as large as the tower's patches and do not overlap, so a window is a block of the map:
nothing is ever unfolded.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

KEEP = 0.2  # windows whose draw is above this keep their logits


def gaussian_blur(maps: torch.Tensor, taps: int = 5, sigma: float = 1.0) -> torch.Tensor:
    """Separable Gaussian with reflected borders.

    Args:
        maps: (B, C, H, W), H and W above ``taps // 2``.
        taps: odd width of the filter in pixels.
        sigma: in pixels.
    """
    offsets = torch.arange(taps, device=maps.device, dtype=torch.float32) - taps // 2
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).to(maps.dtype)
    batch, channels, height, width = maps.shape
    flat = maps.reshape(batch * channels, 1, height, width)
    flat = F.pad(flat, [taps // 2] * 4, mode="reflect")
    flat = F.conv2d(flat, weights.view(1, 1, 1, taps))
    flat = F.conv2d(flat, weights.view(1, 1, taps, 1))
    return flat.reshape(batch, channels, height, width)


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
    """

    def __init__(self, width: int, window: int, blur: bool = True) -> None:
        super().__init__()
        self.window = window
        self.blur = blur
        self.attention_net = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, 1))
        self.w = nn.Parameter(torch.empty(window, window))
        self.b = nn.Parameter(torch.empty(window, window))

    def reset_weights(self) -> None:
        """Almost equal weights in a window."""
        init.normal_(self.w, mean=1.0, std=0.01)
        init.normal_(self.b, std=0.01)
        self.attention_net[1].reset_parameters()

    def pixel_logits(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, 1, H, W): how much each pixel asks to be looked at."""
        dropout, linear = self.attention_net
        rows = dropout(maps).movedim(1, -1)
        return linear(rows).movedim(-1, 1)

    def forward(self, maps: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Shrinks maps by the window.

        Args:
            maps: (B, C, H, W), H and W multiples of the window.
            keep: (B, H / window, W / window, 1) uniform draws; logits of windows whose draw is at
                most `KEEP` are dropped, so that they are averaged by place alone. None keeps all.

        Returns:
            (B, C, H / window, W / window).
        """
        rows, columns = check_windows(maps, self.window)
        if self.blur:
            maps = gaussian_blur(maps)
        k = self.window
        logits = self.pixel_logits(maps).view(-1, rows, k, columns, k).transpose(2, 3)
        if keep is not None:
            mask = (keep > KEEP).to(logits.dtype)
            logits = logits * mask.reshape(-1, rows, columns, 1, 1)
        weights = (logits.float() * self.w + self.b).flatten(-2).softmax(-1)
        weights = weights.view(-1, rows, columns, k, k).transpose(2, 3)
        weights = weights.reshape(-1, 1, rows * k, columns * k).to(maps.dtype)
        return F.avg_pool2d(maps * weights, k) * (k * k)


class SimpleDownsampler(nn.Module):
    """One kernel for every window and channel: absolute values that add up to 1.

    Args:
        window: side of a window in pixels of the map.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.kernel_params = nn.Parameter(torch.empty(window, window))

    def reset_weights(self) -> None:
        """The plain average."""
        init.ones_(self.kernel_params)

    def kernel(self) -> torch.Tensor:
        """(1, 1, window, window)."""
        positive = self.kernel_params.abs()
        return (positive / positive.sum())[None, None]

    def forward(self, maps: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Shrinks maps by the window; ``keep`` is for the other downsampler and unused.

        Args:
            maps: (B, C, H, W), H and W multiples of the window.
            keep: unused.

        Returns:
            (B, C, H / window, W / window).
        """
        rows, columns = check_windows(maps, self.window)
        batch, channels = maps.shape[:2]
        flat = maps.reshape(batch * channels, 1, *maps.shape[-2:])
        small = F.conv2d(flat, self.kernel().to(maps.dtype), stride=self.window)
        return small.view(batch, channels, rows, columns)
