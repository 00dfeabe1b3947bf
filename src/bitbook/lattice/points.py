"""Nearest points of the lattices D and E8 (Conway & Sloane 1982, "Fast quantizing and decoding algorithms").

All arithmetic is in float64, where half integers and their differences are exact as far as codes reach.
"""

from __future__ import annotations

import torch
from jaxtyping import Float as F64
from torch import Tensor

_LARGEST = float(1 << 29)  # of a coordinate: parities are exact, and codes fit 32 bits
_CHUNK = 1 << 16  # vectors at once


def nearest_d(x: F64[Tensor, "n d"]) -> F64[Tensor, "n d"]:
    """The nearest integers whose sum is even (sections IV and V).

    Each coordinate is rounded, halves to the even integer.  Where the sum is odd, the coordinate that was furthest from
    an integer, the first of equals, goes to the integer on its other side, upwards where it was an integer.
    """
    x = x.clamp(-_LARGEST, _LARGEST)
    point = x.round()
    off = x - point
    worst = off.abs().argmax(1, keepdim=True)  # the first of equals on every device
    odd = point.sum(1, keepdim=True).remainder(2)
    turn = torch.where(off.gather(1, worst) < 0, -odd, odd)
    return point.scatter_add(1, worst, turn)


def nearest_e8(x: F64[Tensor, "n 8"]) -> F64[Tensor, "n 8"]:
    """The nearest point of D8 or of D8 + ½ (section VI); of equally near ones the integers."""
    whole, half = nearest_d(x), nearest_d(x - 0.5) + 0.5
    nearer = (x - half).square().sum(1) < (x - whole).square().sum(1)
    return torch.where(nearer[:, None], half, whole)


def nearest(kind: str, x: F64[Tensor, "n d"]) -> F64[Tensor, "n d"]:
    """The nearest points of "D4" or "E8", some vectors at a time so that memory stays bounded."""
    search = nearest_e8 if kind == "E8" else nearest_d
    return torch.cat([search(part) for part in x.split(_CHUNK)]) if len(x) else x
