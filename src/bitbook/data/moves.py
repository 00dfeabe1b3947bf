"""Images moved a little, by affine maps: more of what a network may meet, without a label of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional as F

from bitbook.errors import PlanError


@dataclass(frozen=True)
class Moves:
    """How far a copy may be from its image; each image draws its own map, uniformly within these."""

    rotation: float = 10.0
    """Degrees, either way."""
    scale: float = 0.08
    """Share by which it grows or shrinks."""
    shear: float = 0.08
    """Columns per row."""
    shift: float = 1.0
    """Pixels, in each direction."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v >= 0 for v in (self.rotation, self.scale, self.shear, self.shift)):
            raise PlanError(f"{self}: use finite numbers of at least 0")
        if self.scale >= 1:
            raise PlanError(f"{self}: an image that shrinks by all of its size is none; use a scale below 1")


def move_images(
    x: Float[Tensor, "n features"], moves: Moves, *, background: float, generator: Generator
) -> Float[Tensor, "n features"]:
    """Move square images, each row of `x` one, interpolating between pixels; `background` comes in from outside.

    Raises `PlanError` where rows are no squares.
    """
    n, features = x.shape
    side = math.isqrt(features)
    if side * side != features:
        raise PlanError(f"{features} features are no square image, which could be moved")

    def draw(most: float) -> Float[Tensor, " n"]:
        return (2 * torch.rand(n, generator=generator) - 1) * most

    angle, size, shear = draw(math.radians(moves.rotation)), 1 + draw(moves.scale), draw(moves.shear)
    right, down = draw(2 * moves.shift / side), draw(2 * moves.shift / side)  # an image reaches from -1 to 1
    cos, sin = angle.cos() / size, angle.sin() / size
    maps = torch.stack([torch.stack([cos, shear - sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
    images = x.reshape(n, 1, side, side) - background  # outside are zeros
    grid = F.affine_grid(maps, [n, 1, side, side], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).reshape(n, features) + background


def crop_images(
    x: Float[Tensor, "n *image"],
    shape: tuple[int, int, int],
    margin: int = 4,
    *,
    mirror: bool = False,
    background: float | Float[Tensor, " channels"] = 0.0,
    generator: Generator,
) -> Float[Tensor, "n *image"]:
    """Move images by whole pixels, as networks for CIFAR-10 are trained (He et al. 2016, section 4.2).

    Args:
        x: images, flattened or not.
        shape: channels, rows and columns of one.
        margin: pixels by which it moves at most, each way.
        mirror: whether every other image, by chance, is mirrored left to right.
        background: what comes in from outside, of all channels or of each.
        generator: of where each image goes.

    Raises `PlanError` where the images have another size.
    """
    n, (channels, rows, cols) = len(x), shape
    if math.prod(x.shape[1:]) != channels * rows * cols:
        raise PlanError(f"images of {tuple(x.shape[1:])} are not {channels} × {rows} × {cols}")
    outside = torch.as_tensor(background, dtype=x.dtype).reshape(-1, 1, 1)
    padded = F.pad(x.reshape(n, *shape) - outside, (margin,) * 4) + outside
    down, right = torch.randint(2 * margin + 1, (2, n, 1), generator=generator)
    across = torch.arange(cols).expand(n, cols)
    if mirror:
        across = torch.where(torch.rand(n, 1, generator=generator) < 0.5, cols - 1 - across, across)
    i, j = torch.arange(rows) + down, across + right  # (n, rows), (n, cols)
    images = padded[torch.arange(n)[:, None, None], :, i[:, :, None], j[:, None, :]]  # (n, rows, cols, channels)
    return images.permute(0, 3, 1, 2).reshape(x.shape)
