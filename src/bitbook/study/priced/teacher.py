"""Teachers: networks trained once per data set, whose answers others learn from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from bitbook.data import Moves, Split, move_images
from bitbook.models import build_model
from bitbook.study.storage import cell_id
from bitbook.study.trial import STARTS_FOLDER, keep

SHIFT = 2
"""Pixels by which a teacher's training images are moved, at most, in each direction."""

_LEVELS = 255  # of a pixel in what is kept
_PART = 1000  # images that are moved and looked at together


class Lessons(NamedTuple):
    """What a teacher's pupil learns from."""

    x: Float[Tensor, "examples features"]
    y: Int[Tensor, " examples"]
    logits: Float[Tensor, "examples classes"] | None
    """The teacher's; None without one."""


def lessons(spec: Mapping[str, Any], dataset: str, holdout: int, data: Split) -> Lessons:
    """Training images, labels and the teacher's logits; made once, then kept.

    spec: model, epochs, batch, lr and seed of the teacher, and `copies`: 0 leaves the images as they are; with more,
    each is there so many times, moved within `Moves()` and rounded to 8 bits, with the teacher's answers to what came
    out.  A teacher knows its own training images by heart; on moved ones its doubts are honest.
    """
    kept = _kept({**spec, "dataset": dataset, "holdout": holdout})
    if kept is not None and kept.exists():
        stored = load_file(kept)
    else:
        stored = _make(spec, data)
        if kept is not None:
            keep(stored, kept)
    if not spec["copies"]:
        return Lessons(data.train_x, data.train_y, stored["logits"])
    low, high = _range(data)
    x = stored["x"].float().mul_((high - low) / _LEVELS).add_(low)
    return Lessons(x, data.train_y.repeat(spec["copies"]), stored["logits"])


def _kept(spec: Mapping[str, Any]) -> Path | None:
    folder = os.environ.get(STARTS_FOLDER)
    return Path(folder) / f"lessons-{cell_id(dict(spec))}.safetensors" if folder else None


def _make(spec: Mapping[str, Any], data: Split) -> dict[str, Tensor]:
    model = build_model(spec["model"], seed=spec["seed"])
    _train(model, data.train_x, data.train_y, spec)
    if not spec["copies"]:
        return {"logits": torch.cat([_logits(model, part) for part in data.train_x.split(_PART)])}
    low, high = _range(data)
    images, logits = [], []
    generator = Generator().manual_seed(spec["seed"])
    for _ in range(spec["copies"]):
        for part in data.train_x.split(_PART):
            moved = move_images(part, Moves(), background=low, generator=generator)
            images.append(((moved - low) / (high - low) * _LEVELS).round_().to(torch.uint8))
            logits.append(_logits(model, images[-1] * ((high - low) / _LEVELS) + low))
    return {"x": torch.cat(images), "logits": torch.cat(logits)}


def _range(data: Split) -> tuple[float, float]:
    """The least pixel, which is the background, and the largest."""
    return float(data.train_x.min()), float(data.train_x.max())


def _train(model: nn.Module, x: Tensor, y: Tensor, spec: Mapping[str, Any]) -> None:
    """Images are moved by up to `SHIFT` pixels, one move for each batch; AdamW (Loshchilov & Hutter 2019).

    Its rate rises and falls once (Smith & Topin 2019).
    """
    side = round(x.shape[1] ** 0.5)
    batches = len(x) // spec["batch"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec["lr"], weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, spec["lr"], total_steps=spec["epochs"] * batches, pct_start=0.2
    )
    generator = Generator().manual_seed(spec["seed"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(spec["seed"])  # dropout draws from it
        model.train()
        for _ in range(spec["epochs"]):
            for batch in torch.randperm(len(x), generator=generator).split(spec["batch"])[:batches]:
                down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
                images = x.index_select(0, batch).reshape(-1, side, side).roll((down, right), (1, 2))
                loss = F.cross_entropy(model(images.flatten(1)), y.index_select(0, batch))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)
