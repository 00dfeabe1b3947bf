"""What a byte budget costs on public networks, without training.

    bitbook study --dataset networks
    python -m bitbook.study.networks.document runs/networks docs/results

    public network ──► `Fit` on a few hundred training examples ──► file of so many bytes ──► evaluate the file

A cell is JSON: dataset, holdout, model, method, calibration (examples, the length of sequences or how images are
moved), trust (`FitSettings`), seed, and what its method asks for:

    float        nothing: the network as it is
    allocated    budget (bytes of the whole file) and rounds: `Fit.to_size`
    equal bits   bits (per weight of each matrix): `Fit.evenly`
    one tensor   bits, trusts: each matrix alone is quantized, and the loss that each trust predicts is set beside the
                 divergence that is measured
    trust        budget: which trust gives the file of least divergence on the calibration examples

Test and validation data are read by the evaluation of the finished file alone.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bitbook.apply import freeze
from bitbook.budget.candidates import MATRIX_KINDS, coded_size, encode
from bitbook.budget.fit import Fit, FitSettings
from bitbook.budget.report import Report
from bitbook.budget.sensitivity import weighted
from bitbook.calibration.outputs import Categorical, mean_divergence
from bitbook.data import IGNORED, Split, crop_images
from bitbook.data.cifar import BLACK
from bitbook.errors import PlanError
from bitbook.models import build_model
from bitbook.rate.finetuning import Augment
from bitbook.study.storage import canonical_json
from bitbook.study.trial import load_parts, measure_file

Cell = Mapping[str, Any]
FLOAT, ALLOCATED, EQUAL, PROBE, TRUST = "float", "allocated", "equal bits", "one tensor", "trust"
_BATCH = 250  # examples that are evaluated at once
_ROUNDS = 2  # files that are made to fill a budget; the last percent is not worth as much time again
_TOGETHER = 50  # sequences, for their predictions are many
_PROBED_KIND = "trellis"


@dataclass(frozen=True)
class Network:
    """A public network, and what is asked of it."""

    title: str
    model: str
    dataset: str
    holdout: int
    calibration: Mapping[str, Any]
    trust: float
    """Of the three that `Fit` tries, the one with the least divergence on calibration examples; see `TRUST`."""
    budgets: Sequence[int]
    """Bytes of the whole file."""
    bits: Sequence[float]
    """Per weight, where all matrices have the same."""
    middle: int
    """The budget at which trusts are compared."""


_CROPPED = {"examples": 500, "crop": {"margin": 4, "mirror": True, "background": list(BLACK)}}
_STORIES = {"examples": 100, "length": 256}
NETWORKS = (
    Network("CIFAR-10, ResNet-20", "resnet-20-cifar10", "cifar10", 2000, _CROPPED, 0.0,
            (92_000, 80_000, 66_000, 54_000, 40_000), (2.6, 2.1, 1.7, 1.3), 66_000),
    Network("TinyStories, stories260K", "stories260k", "stories", 200, _STORIES, 1.0,
            (170_000, 152_000, 135_000, 120_000, 108_000, 90_000), (5.0, 4.3, 3.7, 3.1), 135_000),
    Network("CIFAR-10, ResNet-8", "resnet-8-cifar10", "cifar10", 2000, _CROPPED, 0.0,
            (40_000, 33_000, 27_000, 22_000, 17_000), (3.7, 2.8, 2.0), 27_000),
    Network("CIFAR-10, ResNet-44", "resnet-44-cifar10", "cifar10", 2000, _CROPPED, 0.0,
            (200_000, 160_000, 130_000, 105_000), (2.1, 1.5), 130_000),
)  # fmt: skip
PROBED_BITS = (1.5, 2.5, 4.0)


# --- the cells


def networks_cells(seeds: Sequence[int], networks: Sequence[Network] = NETWORKS) -> list[dict[str, Any]]:
    """Everything, seed by seed, so that an interrupted study is a study of fewer seeds, and of fewer networks.

    Seeds decide which examples calibrate, and k-means; float networks need no more than one, nor do probes and trusts.
    Budgets of the two networks that have goals come first.
    """
    return [cell for i, seed in enumerate(seeds) for cell in _in_order(networks, seed, once=i == 0)]


def _in_order(networks: Sequence[Network], seed: int, *, once: bool) -> Iterator[dict[str, Any]]:
    if once:
        yield from (_cell(n, FLOAT, seed) for n in networks)
    first, rest = networks[:2], networks[2:]
    for n in first:
        yield from _budgets(n, seed)
    for n in first:
        yield from _compared(n, seed, once=once)
    for n in rest:
        yield from _budgets(n, seed)
        yield from _compared(n, seed, once=once)
    if once:
        yield from (_cell(n, TRUST, seed, budget=n.middle, trust=None) for n in networks)


def _budgets(network: Network, seed: int) -> Iterator[dict[str, Any]]:
    for budget in network.budgets:
        yield _cell(network, ALLOCATED, seed, budget=budget, rounds=_ROUNDS)


def _compared(network: Network, seed: int, *, once: bool) -> Iterator[dict[str, Any]]:
    for bits in network.bits:
        yield _cell(network, EQUAL, seed, bits=bits)
    if once:
        yield _cell(network, PROBE, seed, bits=list(PROBED_BITS), trusts=[1.0, 0.0])


def _cell(network: Network, method: str, seed: int, **more: Any) -> dict[str, Any]:
    cell = {
        "dataset": network.dataset,
        "holdout": network.holdout,
        "model": network.model,
        "method": method,
        "seed": seed,
    }
    if method == FLOAT:
        return cell
    return {**cell, "calibration": dict(network.calibration), "trust": network.trust, **more}


# --- one trial


def run_trial(cell: Cell) -> dict[str, Any]:
    """Run one cell.

    The result is that of `trial.run_trial`, with a `report` of what was chosen and the `divergence` of the file on the
    examples held out; of probes and trusts it is what was found, without a file.
    """
    clock = time.perf_counter
    began = clock()
    method = cell["method"]
    dataset, data = load_parts(cell["dataset"], cell["holdout"])
    if method == PROBE:
        return {"probes": probes(cell), "seconds": {"start": 0.0, "fit": clock() - began, "evaluate": 0.0}}
    if method == TRUST:
        return {**compared_trusts(cell, data), "seconds": {"start": 0.0, "fit": clock() - began, "evaluate": 0.0}}
    report: dict[str, Any] = {}
    held_out = 0.0
    if method == FLOAT:
        artifact, started = freeze(build_model(cell["model"], seed=0)), clock()
    else:
        fit = fitted_to(cell)
        started = clock()
        found = fit.to_size(cell["budget"], cell["rounds"]) if method == ALLOCATED else fit.evenly(cell["bits"])
        artifact, report = found.artifact, {"trust": fit.trust, **summary(found.report)}
        held_out = divergence(fit.restored(artifact), fit.reference, data.val_x)
    ended = clock()
    return {
        **measure_file(artifact, cell["model"], dataset, data, batch=_BATCH),
        "divergence": held_out,
        "report": report,
        "seconds": {"start": started - began, "fit": ended - started, "evaluate": clock() - ended},
    }


def summary(report: Report) -> dict[str, Any]:
    """What of a report does not depend on what else the same `Fit` was asked for."""
    return {
        "reached": report.reached,
        "predicted": report.predicted,
        "divergence": report.divergence,
        "lam": report.lam,
        "rounds": report.rounds,
        "repairs": [{**repair._asdict(), "kept": repair.kept} for repair in report.repairs],
        "choices": [
            {"tensor": c.name, "kind": c.kind, "bytes": c.size, "weights": c.weights, "bits": c.bits, "loss": c.loss}
            for c in report.choices
        ],
        "dense": dict(report.dense),
    }


def divergence(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    """Kullback–Leibler divergence from the reference's predictions, per prediction, in nats."""
    return mean_divergence(Categorical(), ((model(part), reference(part)) for part in x.split(_TOGETHER)))


def calibration_inputs(how: Mapping[str, Any], data: Split, shape: tuple[int, ...], seed: int) -> Tensor:
    """Training examples drawn by a seed, none of them held out.

    Images are moved by `crop`. Sequences are cut to `length`, and shorter ones are not taken: there is no padding.

    Raises `PlanError` where there are too few.
    """
    generator = Generator().manual_seed(seed)
    x = data.train_x
    if "length" in how:
        long_enough = (data.train_y[:, : how["length"]] != IGNORED).all(1)
        x = x[long_enough, : how["length"]]
    if len(x) < how["examples"]:
        raise PlanError(f"{how['examples']} calibration examples were asked for, but only {len(x)} are there")
    x = x[torch.randperm(len(x), generator=generator)[: how["examples"]]]
    return cropping(how["crop"], shape)(x, generator) if "crop" in how else x


def cropping(how: Mapping[str, Any], shape: tuple[int, ...]) -> Augment:
    """What moves images of this shape as in training; `how` has the fields of `crop_images` as JSON."""
    channels, rows, cols = shape
    fields = {**how, "background": torch.tensor(how["background"])}
    return lambda x, generator: crop_images(x, (channels, rows, cols), generator=generator, **fields)


def fitted_to(cell: Cell) -> Fit:
    """The measured network of a cell.

    The last two are kept, as the budgets of a network share it; what they give does not depend on their order.
    """
    shared = ("dataset", "holdout", "model", "calibration", "trust", "seed")
    return _measured(canonical_json({key: cell[key] for key in shared}))


@lru_cache(maxsize=2)
def _measured(text: str) -> Fit:
    cell = json.loads(text)
    dataset, data = load_parts(cell["dataset"], cell["holdout"])
    model = build_model(cell["model"], seed=0).eval()
    inputs = calibration_inputs(cell["calibration"], data, dataset.input_shape, cell["seed"])
    return Fit(model, inputs, FitSettings(trust=cell["trust"]), seed=cell["seed"])


# --- probes


def probes(cell: Cell) -> list[dict[str, Any]]:
    """Quantize one matrix at a time, at about `bits` per weight each, and measure what that costs.

    The prediction is that of `Sensitivity.loss` under each of `trusts`; the codes are those of the cell's own trust.
    """
    fit = fitted_to({**cell, "trust": 1.0})
    found = {name: tensors.sensitivity for name, tensors in fit.tensors.items()}
    views = {trust: weighted(found, trust) for trust in {*cell["trusts"], cell["trust"]}}
    rows = []
    for name, tensors in fit.tensors.items():
        if tensors.weight.dim() < 2:
            continue
        own = views[cell["trust"]][name]
        whole = own.left_out(tensors.weight)
        for bits in cell["bits"]:
            # A bit less is a factor of four in squared error, so this is the slope of loss against bits.
            price = 2 * math.log(2) * whole * 4.0**-bits / tensors.weight.numel()
            stored = encode(MATRIX_KINDS[_PROBED_KIND], tensors.weight, own, own.encoder(), price, fit.generator)
            model = copy.deepcopy(fit.absorbed)
            with torch.no_grad():
                dict(model.named_parameters())[name].copy_(stored.decode())
            rows.append({
                "tensor": name,
                "kind": _PROBED_KIND,
                "bits": 8 * coded_size(stored) / tensors.weight.numel(),
                "predicted": {str(trust): views[trust][name].loss(tensors.weight, stored) for trust in cell["trusts"]},
                "divergence": fit.divergence(model),
            })  # fmt: skip
    return rows


def compared_trusts(cell: Cell, data: Split) -> dict[str, Any]:
    """The trust that `Fit` chooses at the cell's budget, and what it says of each."""
    said: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("trust"):
            said.append(what)

    model = build_model(cell["model"], seed=0).eval()
    dataset, _ = load_parts(cell["dataset"], cell["holdout"])
    inputs = calibration_inputs(cell["calibration"], data, dataset.input_shape, cell["seed"])
    fit = Fit(model, inputs, FitSettings(), seed=cell["seed"], progress=progress)
    found = fit.to_size(cell["budget"], rounds=1)
    return {"trust": fit.trust, "said": said, "report": summary(found.report)}
