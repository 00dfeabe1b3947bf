"""Images that are moved: what stays, what goes where, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from bitbook.data import Moves, crop_images, move_images
from bitbook.errors import PlanError


def moved(x: Tensor, moves: Moves, background: float = 0.0, seed: int = 0) -> Tensor:
    return move_images(x, moves, background=background, generator=Generator().manual_seed(seed))


def centres(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Centre of mass, (down, right) from the middle."""
    images = x.reshape(-1, side, side)
    places = torch.arange(side) - (side - 1) / 2
    mass = images.sum((1, 2))
    return (images.sum(2) * places).sum(1) / mass, (images.sum(1) * places).sum(1) / mass


def spot(n: int, side: int, row: int, col: int) -> Tensor:
    x = torch.zeros(n, side, side)
    x[:, row - 1 : row + 2, col - 1 : col + 2] = 1
    return x.flatten(1)


def test_without_a_move_images_stay() -> None:
    x = torch.rand(5, 49, generator=Generator().manual_seed(0))
    torch.testing.assert_close(moved(x, Moves(0, 0, 0, 0), background=0.3), x)


def test_shifts_are_as_far_as_allowed_and_no_further() -> None:
    down, right = centres(moved(spot(400, 15, 7, 7), Moves(0, 0, 0, 2.0)), 15)
    for axis in (down, right):
        assert 1.8 < axis.abs().max() <= 2.001 and axis.min() < -1.8 and axis.max() > 1.8


def test_rotations_keep_the_distance_from_the_middle() -> None:
    down, right = centres(moved(spot(400, 29, 4, 14), Moves(20, 0, 0, 0)), 29)
    torch.testing.assert_close((down.square() + right.square()).sqrt(), torch.full((400,), 10.0), rtol=0, atol=0.2)
    angle = torch.atan2(right, -down).rad2deg()
    assert 18 < angle.abs().max() < 20.5 and angle.min() < -18


def test_scales_and_shears_keep_their_bounds() -> None:
    down, _ = centres(moved(spot(400, 29, 4, 14), Moves(0, 0.1, 0, 0)), 29)
    assert 8.9 < down.abs().min() < 9.3 and 10.7 < down.abs().max() < 11.1
    down, right = centres(moved(spot(400, 29, 4, 14), Moves(0, 0, 0.2, 0)), 29)
    torch.testing.assert_close(down, torch.full((400,), -10.0), rtol=0, atol=0.2)
    assert 1.7 < right.abs().max() < 2.1


def test_the_background_comes_in_from_outside() -> None:
    x = torch.full((8, 100), -1.0)
    torch.testing.assert_close(moved(x, Moves(shift=4.0), background=-1.0), x)


def test_the_same_generator_moves_the_same_way() -> None:
    x = torch.rand(6, 64, generator=Generator().manual_seed(0))
    assert torch.equal(moved(x, Moves()), moved(x, Moves()))
    assert not torch.equal(moved(x, Moves()), moved(x, Moves(), seed=1))


def test_what_cannot_be_moved_is_refused() -> None:
    with pytest.raises(PlanError, match="50 features are no square"):
        moved(torch.zeros(1, 50), Moves())
    with pytest.raises(PlanError, match="at least 0"):
        Moves(rotation=-1.0)
    with pytest.raises(PlanError, match="below 1"):
        Moves(scale=1.0)


def test_crops_are_whole_pixels_and_mirrors(generator: Generator) -> None:
    x = torch.arange(2 * 3 * 4).float().reshape(1, 2, 3, 4).expand(300, -1, -1, -1) + 1
    background = torch.tensor([-1.0, -2.0])
    found = crop_images(x.flatten(1), (2, 3, 4), 1, mirror=True, background=background, generator=generator)
    padded = torch.nn.functional.pad(x[0] - background[:, None, None], (1,) * 4) + background[:, None, None]
    crops = [padded[:, i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
    expected = {tuple(image.flatten().tolist()) for crop in crops for image in (crop, crop.flip(-1))}
    assert {tuple(row) for row in found.tolist()} == expected
    still = crop_images(x, (2, 3, 4), 0, generator=generator)
    assert torch.equal(still, x)
    with pytest.raises(PlanError, match=r"images of \(2, 3, 4\) are not 1 × 3 × 4"):
        crop_images(x, (1, 3, 4), generator=generator)
