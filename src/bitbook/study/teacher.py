"""Teachers: networks trained once per data set, whose answers others learn from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from bitbook.data import Split
from bitbook.models import build_model
from bitbook.study.storage import cell_id
from bitbook.study.trial import STARTS_FOLDER

SHIFT = 2
"""Pixels by which a teacher's training images are moved, at most, in each direction."""


def teacher_answers(spec: Mapping[str, Any], dataset: str, holdout: int, data: Split) -> Tensor:
    """Logits of the teacher for all training examples, `(examples, classes)`; trained once, then kept.

    spec: model, epochs, batch, lr and seed.  Images are moved by up to `SHIFT` pixels, one move for each batch; AdamW
    (Loshchilov & Hutter 2019) with a rate that rises and falls once (Smith & Topin 2019).
    """
    folder = os.environ.get(STARTS_FOLDER)
    name = f"teacher-{cell_id({**spec, 'dataset': dataset, 'holdout': holdout})}.safetensors"
    path = Path(folder) / name if folder else None
    if path is not None and path.exists():
        return load_file(path)["logits"]
    model = build_model(spec["model"], seed=spec["seed"])
    _train(model, data.train_x, data.train_y, spec)
    logits = torch.cat([_logits(model, part) for part in data.train_x.split(1000)])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
        save_file({"logits": logits}, temporary)
        temporary.replace(path)
    return logits


def _train(model: nn.Module, x: Tensor, y: Tensor, spec: Mapping[str, Any]) -> None:
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
