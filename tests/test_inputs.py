"""Activation quantization: the source material's rule per batch, and ranges that are stored."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitbook import Activation, Binary, Codebook, Plan, Uniform, calibrate, dequantize_, freeze, quantize_
from bitbook.artifact import to_bytes
from bitbook.errors import PlanError
from bitbook.inputs import InputQuantizer, put_before, take_away
from bitbook.quantizer import Quantizer

f32 = np.float32


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def literal(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The source material's rule for a layer's input: value, and where the gradient passes."""
    values = [f32(v) for v in x.flatten().tolist()]
    if bits == 1:
        s = f32(x.abs().mean().item())
        return torch.tensor([float(s if v > 0 else -s) for v in values]).reshape(x.shape), torch.ones_like(x)
    q = 2 ** (bits - 1) - 1
    s = max(f32(f32(max(values) - min(values)) / f32(2 * q)), f32(1e-8))
    rounded = [float(f32(s * f32(min(max(round(float(f32(v / s))), -q), q)))) for v in values]
    passes = [0.0 if abs(v) > f32(f32(q) * s) else 1.0 for v in values]
    return torch.tensor(rounded).reshape(x.shape), torch.tensor(passes).reshape(x.shape)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4, 4), (9,)])
def test_each_batch_is_quantized_by_the_source_materials_rule(bits: int, shape: tuple[int, ...]) -> None:
    x = (noise(*shape) + 0.3).requires_grad_()
    quantizer = InputQuantizer(Activation(Binary() if bits == 1 else Uniform(bits)))
    value = quantizer(x)
    expected, passes = literal(x.detach(), bits)
    assert torch.equal(value, expected)
    direction = 2 * noise(*shape, seed=1)
    (value * direction).sum().backward()
    assert torch.equal(x.grad, direction.clamp(-1, 1) if bits == 1 else direction * passes)
    assert quantizer.freeze() == {}


def test_a_batch_range_depends_on_the_batch_and_a_calibrated_one_does_not() -> None:
    x = noise(8, 6)
    x[0] *= 10
    for kind, same in (("batch", False), ("calibrated", True)):
        net = model()
        quantize_(net, Plan({}, {"0": Activation(Uniform(4), kind)}))  # type: ignore[arg-type]
        if same:
            calibrate(net, [x])
        together = net(x)
        apart = torch.cat([net(row) for row in x.split(1)])
        assert torch.allclose(together, apart, atol=1e-6) is same


@pytest.mark.parametrize(
    "recipe", [Uniform(4), Uniform(8, symmetric=False), Binary(), Uniform(4, scale=Uniform(8))], ids=repr
)
def test_calibration_does_not_depend_on_the_batch_size(recipe: Quantizer) -> None:
    x = noise(700, 6) + 0.1
    files = []
    for size in (1, 7, 64):
        net = model()
        quantize_(net, Plan({"*.weight": Uniform(4)}, {"*": Activation(recipe, "calibrated")}))
        calibrate(net, x.split(size))
        files.append(to_bytes(freeze(net))[0])
    assert files[0] == files[1] == files[2]


def test_calibration_measures_the_extremes_of_the_float_input() -> None:
    net, x = model(), noise(50, 6)
    quantize_(net, Plan({}, {"0": Activation(Uniform(8), "calibrated"), "2": Activation(Binary(), "calibrated")}))
    net.train()
    calibrate(net, [x])
    assert net.training
    lo, hi = x.aminmax()
    assert net[0].input_quantizer.freeze()["scale"].decode().item() == f32(f32(hi - lo) / f32(254))
    hidden = torch.relu(nn.functional.linear(x, net[0].weight, net[0].bias))
    assert net[2].input_quantizer.freeze()["scale"].decode().item() == pytest.approx(hidden.mean().item(), rel=1e-5)
    calibrate(net, [x * 2])  # anew, not in addition
    assert net[0].input_quantizer.freeze()["scale"].decode().item() == f32(f32(2 * hi - 2 * lo) / f32(254))


def test_running_ranges_follow_training_and_stand_still_in_evaluation() -> None:
    quantizer = InputQuantizer(Activation(Uniform(8), "running"))
    lo = hi = None
    for step in range(5):
        x = noise(4, 6, seed=step)
        quantizer(x)
        new_lo, new_hi = x.min().item(), x.max().item()
        lo = new_lo if lo is None else 0.9 * lo + 0.1 * new_lo
        hi = new_hi if hi is None else 0.9 * hi + 0.1 * new_hi
    assert quantizer.lo.item() == pytest.approx(lo) and quantizer.hi.item() == pytest.approx(hi)
    quantizer.eval()
    scale = quantizer.freeze()["scale"].decode()
    x = 100 * noise(4, 6)
    assert torch.equal(quantizer(x), (x / scale).round().clamp(-127, 127) * scale)
    assert torch.equal(quantizer.freeze()["scale"].decode(), scale)


def test_an_unknown_range_is_said_to_be_unknown() -> None:
    for kind, cure in (("running", "train the model"), ("calibrated", "bitbook.calibrate")):
        quantizer = InputQuantizer(Activation(Uniform(8), kind)).eval()  # type: ignore[arg-type]
        with pytest.raises(PlanError, match=cure):
            quantizer(noise(2, 3))
        with pytest.raises(PlanError, match=cure):
            quantizer.freeze()


def test_only_the_first_argument_is_quantized() -> None:
    bilinear = nn.Bilinear(3, 4, 2)
    a, b = noise(5, 3), noise(5, 4)
    expected = bilinear(literal(a, 2)[0], b)
    put_before(bilinear, InputQuantizer(Activation(Uniform(2))))
    assert torch.equal(bilinear(a, b), expected)


def test_state_copies_and_types() -> None:
    net, x = model(), noise(20, 6)
    quantize_(net, Plan({}, {"*[02]": Activation(Uniform(4), "calibrated")}))
    calibrate(net, [x])
    other = model()
    quantize_(other, Plan({}, {"*[02]": Activation(Uniform(4), "calibrated")}))
    other.load_state_dict(net.state_dict())
    twin = copy.deepcopy(net)
    assert torch.equal(other(x), net(x)) and torch.equal(twin(x), net(x))
    twin[0].input_quantizer.hi.mul_(100)
    assert not torch.equal(twin(x), net(x)) and torch.equal(other(x), net(x))
    for dtype in (torch.float64, torch.bfloat16):
        assert copy.deepcopy(net).to(dtype)(x.to(dtype)).dtype == dtype


def test_take_away_restores_the_module() -> None:
    net, x = model(), noise(4, 6)
    expected = net(x)
    quantize_(net, Plan({}, {"0": Uniform(2), "2": Uniform(2)}))
    assert not torch.equal(net(x), expected)
    dequantize_(net)
    assert torch.equal(net(x), expected)
    assert not net[0]._forward_pre_hooks and not list(net[0].children())
    take_away(net[0])  # nothing to do


def test_refusals() -> None:
    net = model()
    with pytest.raises(PlanError, match="container"):
        put_before(net, InputQuantizer(Activation(Uniform(8))))
    put_before(net[0], InputQuantizer(Activation(Uniform(8))))
    with pytest.raises(PlanError, match="quantized already"):
        put_before(net[0], InputQuantizer(Activation(Uniform(8))))
    with pytest.raises(PlanError, match="no calibrated input"):
        calibrate(net, [noise(2, 6)])
    with pytest.raises(PlanError, match="by position"):
        net[0](input=noise(2, 6))
    embedding = nn.Embedding(4, 2)
    put_before(embedding, InputQuantizer(Activation(Uniform(8))))
    with pytest.raises(PlanError, match="torch.int64 is not a floating-point tensor"):
        embedding(torch.tensor([1]))
    packed = nn.utils.rnn.pack_sequence([noise(3, 5), noise(2, 5)])
    lstm = nn.LSTM(5, 4)
    put_before(lstm, InputQuantizer(Activation(Uniform(8))))
    with pytest.raises(PlanError, match="PackedSequence is not"):
        lstm(packed)
    with pytest.raises(PlanError, match="cannot quantize activations"):
        Activation(Codebook(4))
    empty = model()
    quantize_(empty, Plan({}, {"0": Activation(Uniform(8), "calibrated")}))
    with pytest.raises(PlanError, match="not known yet"):
        calibrate(empty, [])
