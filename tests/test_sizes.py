"""A dry run's sizes are the bytes that are written, for every quantizer that has a fixed width."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.laws.cases import QUANTIZERS, Case
from torch import nn

from bitbook import ECSQ, Activation, Artifact, Binary, Codebook, Float, Plan, Pruned, Uniform, compress, quantize
from bitbook.artifact import to_bytes
from bitbook.checkpoints import compress_checkpoint, plan_checkpoint
from bitbook.coding.choose import Smallest
from bitbook.coding.fixed import Fixed
from bitbook.errors import PlanError
from bitbook.models import build_model
from bitbook.quantizer import stream_specs
from bitbook.sizes import blank, fixed_width, most_bytes


def bounded(case: Case) -> bool:
    recipe = case.recipe.resolve((12, 16))
    return all(spec.alphabet is not None for spec in stream_specs(recipe, (12, 16)))


@pytest.mark.parametrize("case", [case for case in QUANTIZERS if bounded(case)], ids=str)
def test_zeros_take_as_many_bytes_as_weights(case: Case) -> None:
    w = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    stored = quantize(case.recipe, w, options=case.options, generator=torch.Generator().manual_seed(0))
    stand_in = blank(case.recipe, (12, 16))
    assert stand_in.recipe == stored.recipe and stand_in.shape == stored.shape
    for layout in ("one", "per-tensor"):
        real, planned = (to_bytes(Artifact({"w": tensor}), Fixed(), layout) for tensor in (stored, stand_in))
        assert planned[1] == real[1]


def test_codes_without_a_bound_have_no_fixed_width() -> None:
    with pytest.raises(PlanError, match=r"fc1.weight: ECSQ\(\) has codes without a bound"):
        fixed_width(build_model("mlp-8-4-2", seed=0), Plan({"fc1.weight": ECSQ()}))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.b.weight = self.a.weight


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        (build_model("mlp-64-32-16-10", 0), Plan({"fc*.weight": Codebook(0.25, (1, -1), centroids=Uniform(4))})),
        (build_model("mlp-64-32-16-10", 0), Plan({"fc?.weight": Pruned(0.1, Uniform(4)), "*": Float("float16")})),
        (build_model("mlp-64-32-16-10", 0), Plan({"fc1.weight": Uniform(3)}, {"fc*": Activation(Uniform(8))})),
        (build_model("mlp-64-32-16-10", 0), Plan({"fc1.*": Binary()}, {"fc*": Activation(Uniform(8), "calibrated")})),
        (Tied(), Plan({"a.weight": Uniform(4), "norm.weight": None})),
    ],
    ids=["rows", "pruned", "inputs", "ranges", "tied"],
)
def test_a_model_s_ledger_before_anything_is_compressed(model: nn.Module, plan: Plan) -> None:
    data = (torch.randn(20, 64), torch.zeros(20, dtype=torch.long))
    artifact = compress(model, plan, data=data if any(plan.inputs) else None)
    ledger = fixed_width(model, plan)
    assert ledger == to_bytes(artifact, Fixed())[1]
    assert len(to_bytes(artifact, Smallest())[0]) <= most_bytes(ledger, Smallest())
    assert most_bytes(ledger, Fixed()) == ledger.total


def test_what_coding_cannot_shrink_stays_within_the_bound() -> None:
    """Codes drawn evenly: an entropy coder only adds the bytes that say that it gave up."""
    generator = torch.Generator().manual_seed(0)
    stored = blank(Uniform(8, symmetric=False), (100, 100))
    codes = {name: torch.randint(0, 256, c.shape, generator=generator).to(c.dtype) for name, c in stored.codes.items()}
    noise = dataclasses.replace(stored, codes=codes)
    for layout in ("one", "per-tensor"):
        artifact = Artifact({f"layer{i}": noise for i in range(12)})
        ledger = to_bytes(artifact, Fixed(), layout)[1]
        coded = len(to_bytes(artifact, Smallest(), layout)[0])
        assert ledger.total - 200 < coded <= most_bytes(ledger, Smallest())


def test_two_names_of_one_tensor_need_one_recipe() -> None:
    with pytest.raises(PlanError, match="one tied tensor"):
        fixed_width(Tied(), Plan({"a.weight": Uniform(4), "b.weight": Uniform(3)}))


@pytest.mark.parametrize("folder", [False, True], ids=["file", "shards"])
def test_a_checkpoint_s_sizes_from_its_headers(tmp_path: Path, folder: bool) -> None:
    g = torch.Generator().manual_seed(0)
    held = {
        "a.weight": torch.randn(60, 100, generator=g),
        "b.weight": torch.randn(8, 30, 20, generator=g).bfloat16(),
        "norm": torch.ones(100, dtype=torch.bfloat16),
        "steps": torch.arange(6).reshape(2, 3),
    }
    source = tmp_path / ("model" if folder else "model.safetensors")
    if folder:
        source.mkdir()
        names = list(held)
        for i, part in enumerate((names[:2], names[2:])):
            save_file({name: held[name] for name in part}, source / f"m-{i}.safetensors")
        places = {name: f"m-{i}.safetensors" for i, part in enumerate((names[:2], names[2:])) for name in part}
        index = '{"metadata": {}, "weight_map": ' + repr(places).replace("'", '"') + "}"
        (source / "model.safetensors.index.json").write_text(index)
    else:
        save_file(held, source)
    plan = Plan(
        {"a.*": Codebook(16, (1, 4), centroids=Uniform(5)), "b.*": Uniform(4, (1, 20)), "norm": Float("float16")}
    )
    planned = plan_checkpoint(source, tmp_path / "small", plan=plan)
    assert not (tmp_path / "small").exists() and not (tmp_path / "small.parts").exists()
    done = compress_checkpoint(source, tmp_path / "small", plan=plan, coder="Fixed")
    assert planned.bytes == done.bytes and planned.source_bytes == done.source_bytes
    sizes = [
        {(row.file, row.tensor): (row.bytes, row.stored_as, row.dense) for row in of.rows} for of in (planned, done)
    ]
    assert sizes[0] == sizes[1]
    with pytest.raises(PlanError, match=r"a.weight: ECSQ\(\) has codes without a bound"):
        plan_checkpoint(source, tmp_path / "other", plan=ECSQ())
    about = plan_checkpoint(source, tmp_path / "other", bits=3).bytes
    written = compress_checkpoint(source, tmp_path / "other", bits=3).bytes
    assert about == pytest.approx(written, rel=0.1)
