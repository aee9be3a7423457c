"""Structural similarity as a loss: `1 - ssim(image, truth)`.

Wang et al., 2004: a Gaussian window of 11 pixels, 1.5 wide, C1 = 0.01^2, C2 = 0.03^2; beyond the
border is 0, as in 3D Gaussian Splatting. As a metric: training/evaluation/.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WINDOW, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2


def ssim(image: Float[Tensor, "b h w 3"], truth: Float[Tensor, "b h w 3"]) -> Float[Tensor, ""]:
    """Mean over pixels, channels and images; its five means in one pass of two narrow windows."""
    axis = torch.arange(WINDOW, device=image.device, dtype=image.dtype) - WINDOW // 2
    window = (-axis.square() / (2 * SIGMA**2)).exp()
    window = window / window.sum()
    x, y = (each.permute(0, 3, 1, 2).flatten(0, 1)[:, None] for each in (image, truth))
    stacked = torch.cat([x, y, x * x, y * y, x * y])  # [5 b 3, 1, h, w]
    means = F.conv2d(stacked, window.view(1, 1, -1, 1), padding=(WINDOW // 2, 0))
    means = F.conv2d(means, window.view(1, 1, 1, -1), padding=(0, WINDOW // 2))
    x, y, xx, yy, xy = means.chunk(5)
    xx, yy, xy = xx - x * x, yy - y * y, xy - x * y
    return ((2 * x * y + C1) * (2 * xy + C2) / ((x * x + y * y + C1) * (xx + yy + C2))).mean()
