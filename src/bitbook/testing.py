"""Conformance suites: the laws that every quantizer, coder and weight source obeys.

A new implementation adds itself to a list of cases and inherits them; the functions need no test framework,
and a broken law is an `AssertionError` that names it and the recipe.

    check_quantizer(Uniform(4, (1, 32)))     everything about a recipe; check_tensor: one tensor of your own
    check_finer([Uniform(2), Uniform(3)])    more levels cost no accuracy
    check_coder(Fixed())                     bytes and back, and what damage does
    check_source(make_module, "weight", x)   a module whose weight comes from a source
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

import bitbook
from bitbook.artifact import Artifact, from_bytes, to_bytes
from bitbook.blocks import Grid, Shape, matrix_shape
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.fixed import Fixed, packed_size
from bitbook.errors import CorruptArtifact, NoFeedback, PlanError, WeightError
from bitbook.feedback.error_feedback import ErrorFeedback
from bitbook.plan import KINDS, recipe_from_json, recipe_to_json
from bitbook.qat import FakeQuantize, Regime
from bitbook.quantizer import (
    LARGEST_CODE,
    FitOptions,
    Quantized,
    Quantizer,
    Stream,
    StreamSpec,
    assemble,
    code_dtype,
    quantize,
    stream_specs,
)
from bitbook.scalar.uniform import Uniform
from bitbook.slot import attach, detach, slots
from bitbook.transforms.transform import Transform

REGIMES = (
    Regime(),
    Regime(side="learned"),
    Regime(codes="frozen"),
    Regime(codes="latent"),
    Regime(codes="latent", side="learned", reassign_every=2),
)
"""Every way of training that `check_quantizer` tries."""


# -- quantizers --------------------------------------------------------------------------------
def check_quantizer(
    recipe: Quantizer,
    *,
    options: FitOptions = FitOptions(),
    shape: Shape = (12, 16),
    doubles: bool = True,
    learns: bool = True,
) -> None:
    """Check every law of a quantizer.

    Args:
        recipe: fits `shape` without padding.
        options: passed to every fit.
        shape: of the ordinary random weights.
        doubles: whether twice the weights give exactly twice the result; false where a side tensor is not
            fitted to the weights.
        learns: whether side tensors may be learned, as under `Regime(side="learned")`.

    Raises `AssertionError` naming the recipe and the law.
    """
    w = torch.randn(shape, generator=Generator().manual_seed(1)) * 0.1
    check_recipe(recipe)
    check_tensor(recipe, w, options=options, doubles=doubles)
    _check_refusals(recipe, w, options)
    for name, edge in _edge_cases(shape):
        # One weight per block may leave nothing to scale by, so nothing doubles here.
        try:
            check_tensor(padded(recipe), edge, options=options, doubles=False)
        except Exception as error:
            raise AssertionError(f"{recipe!r}: the edge case “{name}” failed: {error}") from error
    for regime in REGIMES:
        if learns or regime.side != "learned":
            check_training(recipe, w, regime=regime, options=options)


def check_recipe(recipe: Quantizer) -> None:
    """Check that a recipe is plain data: equal after JSON, `repr`, pickle and copying, and hashable."""
    text = json.dumps(recipe_to_json(recipe))
    _law(recipe_from_json(json.loads(text)) == recipe, recipe, f"the JSON {text} reads back as another recipe")
    _law(eval(repr(recipe), {**vars(bitbook), **KINDS}) == recipe, recipe, "its repr does not make an equal recipe")
    for same in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        _law(same == recipe and hash(same) == hash(recipe), recipe, "a copy is not equal or hashes differently")


def check_tensor(
    recipe: Quantizer, w: Tensor, *, options: FitOptions = FitOptions(), doubles: bool = True
) -> Quantized:
    """Check the laws that hold for any one tensor, and return it quantized."""
    before = w.clone()
    q = _quantize(recipe, w, options)
    decoded = q.decode()
    _law(torch.equal(w, before), recipe, "quantizing changed the weights themselves")
    _law(decoded.shape == w.shape and decoded.dtype == torch.float32, recipe, "decode changed the shape or the type")
    _law(bool(decoded.isfinite().all()), recipe, "finite weights decode to NaN or infinity")
    _check_idempotent(q, decoded)
    _check_streams(q)
    _check_bytes(q, decoded)
    again = _quantize(recipe, w, options)
    _law(_same_streams(q, again), recipe, "the same generator gave other codes")
    ones = _quantize(recipe, w, options, importance=torch.ones_like(w))
    _law(_same_streams(q, ones), recipe, "an importance of one everywhere is not the same as none")
    if doubles:
        doubled = _quantize(recipe, 2 * w, options)
        _law(torch.equal(doubled.decode(), 2 * decoded), recipe, "twice the weights are not twice the result")
    _check_permutation(q, w)
    _check_feedback(q, w)
    return q


def check_training(
    recipe: Quantizer,
    w: Tensor,
    *,
    regime: Regime = Regime(),
    options: FitOptions = FitOptions(),
    steps: int = 3,
) -> None:
    """Check that training sees what the file gives back, bit for bit, and that everything learns."""
    source = FakeQuantize(
        recipe, nn.Parameter(w.clone()), regime=regime, options=options, generator=Generator().manual_seed(0)
    )
    who = f"{recipe!r} under {regime}"
    direction = torch.randn(w.shape, generator=Generator().manual_seed(2))
    parameters = list(source.named_parameters())
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=1e-3) if parameters else None
    reached = dict.fromkeys((name for name, _ in parameters), False)
    for _ in range(steps):
        value = source()
        _check_frozen(source, value.detach(), who)
        if optimizer is None:
            break
        optimizer.zero_grad()
        (value * direction).sum().backward()
        for name, parameter in parameters:
            _law(parameter.grad is not None, who, f"{name} gets no gradient")
            _law(bool(parameter.grad.isfinite().all()), who, f"the gradient of {name} is not finite")  # type: ignore[union-attr]
            reached[name] |= bool(parameter.grad.any())  # type: ignore[union-attr]
        optimizer.step()
    for name, hit in reached.items():
        _law(hit or _multiplies_zeros(source, name), who, f"the gradient of {name} is always zero")
    source.eval()
    value = source().detach()
    _check_frozen(source, value, who)
    loaded = pickle.loads(pickle.dumps(source))
    for same, how in ((copy.deepcopy(source), "deepcopy"), (loaded, "pickle")):
        _law(_same_bits(same().detach(), value), who, f"{how} changed the value")
    other = copy.deepcopy(source)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(source.state_dict())
    _law(_same_bits(other().detach(), value), who, "state_dict and load_state_dict changed the value")


def _multiplies_zeros(source: FakeQuantize, name: str) -> bool:
    """Whether a side tensor stands for zeros only, as the scales' step of `RowScaled` does without importance."""
    owner, _, _ = name.rpartition(".side.")
    if not owner:
        return False
    whole = cast(FakeQuantize, source.get_submodule(owner)).freeze()
    return not any(bool(codes.any()) for codes in whole.codes.values())


def check_finer(recipes: Sequence[Quantizer], *, options: FitOptions = FitOptions(), tolerance: float = 0.01) -> None:
    """Check on 10⁵ Gaussian and as many Laplacian samples that each recipe errs no more than the one before.

    `tolerance` is the relative rise in mean squared error that is let pass.
    """
    generator = Generator().manual_seed(3)
    gauss = torch.randn(250, 400, generator=generator)
    uniform = torch.rand(250, 400, generator=generator) - 0.5
    laplace = -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-7).log()
    for name, samples in (("Gauss", gauss), ("Laplace", laplace)):
        errors = [(_quantize(r, samples, options).decode() - samples).square().mean().item() for r in recipes]
        for coarse, fine, before, after in zip(recipes, recipes[1:], errors, errors[1:], strict=False):
            worse = f"errs by {after:g} on {name}, more than {coarse!r}, {before:g}"
            _law(after <= before * (1 + tolerance), fine, worse)


def fingerprint(recipe: Quantizer, *, options: FitOptions = FitOptions(), shape: Shape = (12, 16)) -> str:
    """A hash of the file that fixed weights and a fixed generator give: equal in every process."""
    w = torch.randn(shape, generator=Generator().manual_seed(1)) * 0.1
    data, _ = to_bytes(Artifact({"w": _quantize(recipe, w, options)}))
    return hashlib.sha256(data).hexdigest()


def padded(recipe: Quantizer) -> Quantizer:
    """The recipe, and those nested in it, with `pad=True` wherever there is such a field."""
    changes: dict[str, Any] = {}
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        if isinstance(value, Quantizer):
            changes[f.name] = padded(value)
        elif isinstance(value, tuple) and all(isinstance(v, Quantizer) for v in value):
            changes[f.name] = tuple(map(padded, value))
        elif f.name == "pad":
            changes["pad"] = True
    return replace(recipe, **changes)


def _quantize(recipe: Quantizer, w: Tensor, options: FitOptions, **fit: Any) -> Quantized:
    return quantize(recipe, w, options=options, generator=Generator().manual_seed(0), **fit)


def _check_idempotent(q: Quantized, decoded: Tensor) -> None:
    if not q.recipe.idempotent:
        return
    side = {name: stored.decode() for name, stored in q.side.items()}
    codes = q.recipe.encode(decoded, side)
    again = q.recipe.decode(codes, side, q.shape)
    _law(torch.equal(again, decoded), q.recipe, "quantizing its own result changes it")
    # Where a scale or a kept value is stored as zero, several codes mean the same.
    injective = all(side[name].all() for name in ("scale", "values") if name in side)
    same = all(torch.equal(codes[name], stream) for name, stream in q.codes.items())
    _law(same or not injective, q.recipe, "quantizing its own result gives other codes")


def _check_streams(q: Quantized) -> None:
    specs = list(stream_specs(q.recipe, q.shape))
    streams = list(q.streams())
    _law([s.spec for s in streams] == specs, q.recipe, "its streams are not those of stream_specs")
    for (name, grid, alphabet, _, _), codes in streams:
        _law(tuple(codes.shape) == grid, q.recipe, f"the codes of {name} do not lie on their grid {grid}")
        _law(codes.dtype == code_dtype(alphabet), q.recipe, f"the codes of {name} are {codes.dtype}")
        if alphabet is None:
            continue
        low, high = int(codes.min()), int(codes.max())
        _law(low >= 0 and high < alphabet, q.recipe, f"the codes of {name}, {low} to {high}, leave [0, {alphabet})")
    rebuilt = assemble(q.recipe, q.shape, iter([s.codes for s in streams]))
    _law(_same_bits(rebuilt.decode(), q.decode()), q.recipe, "assembled from its streams it decodes differently")


def _check_bytes(q: Quantized, decoded: Tensor) -> None:
    specs = list(stream_specs(q.recipe, q.shape))
    bounded = all(spec.alphabet is not None for spec in specs)
    coder = Fixed() if bounded else Smallest()
    data, ledger = to_bytes(Artifact({"w": q}), coder)
    _law(ledger.total == len(data), q.recipe, f"the ledger says {ledger.total} bytes, the file has {len(data)}")
    if bounded:
        promised = sum(packed_size(spec.alphabet or 1, math.prod(spec.grid)) for spec in specs)
        written = ledger.by_tensor().get("w", 0)
        _law(written == promised, q.recipe, f"the layout promises {promised} bytes, the file has {written}")
    _law(ledger.weights == math.prod(q.shape), q.recipe, f"the ledger counts {ledger.weights} weights")
    stored = from_bytes(data)
    _law(_same_bits(stored.decode("w").float(), decoded), q.recipe, "the file decodes to other weights")
    _law(to_bytes(stored, coder)[0] == data, q.recipe, "written again, the file has other bytes")


def _check_frozen(source: FakeQuantize, value: Tensor, who: str) -> None:
    frozen = source.freeze()
    decoded = frozen.decode()
    _law(_same_bits(decoded.to(value.dtype), value), who, "the frozen tensor is not what training saw")
    stored = from_bytes(to_bytes(Artifact({"w": frozen}))[0])
    _law(_same_bits(stored.decode("w").float(), decoded), who, "the file is not what training saw")


def _check_permutation(q: Quantized, w: Tensor) -> None:
    """Blocks are coded independently: permuted (with what belongs to each), they give permuted results."""
    block = getattr(q.recipe, "block", None)
    if block is None or not q.recipe.independent_blocks:
        return
    grid = Grid.of(q.shape, block, pad=getattr(q.recipe, "pad", False))
    if grid.padded:
        return
    single = q.recipe.columns(q.shape) == 1
    if grid.R == grid.C == 1 and single and q.recipe.layout(q.shape)[0].grid == (grid.rows, grid.cols):
        grid = Grid.of(q.shape, (1, 1))  # one scale for all: each weight is independent of the others
    order = torch.randperm(grid.R * grid.C, generator=Generator().manual_seed(4))
    side = {}
    for name, stored in q.side.items():
        value = stored.decode()
        # A codebook of as many codewords as rows of blocks has that shape, too, but belongs to no block.
        owned = name not in ("centroids", "points") and value.numel() > 1 and tuple(value.shape) == (grid.R, grid.C)
        side[name] = value.reshape(-1)[order].reshape(value.shape) if owned else value
        if name == "points" and len(value) == len(order):  # a row for each block
            side[name] = value[order]
    permuted = grid.join(grid.split(w.float())[order], q.shape)
    result = q.recipe.decode(q.recipe.encode(permuted, side), side, q.shape)
    expected = grid.join(grid.split(q.decode())[order], q.shape)
    _law(torch.equal(result, expected), q.recipe, "permuting blocks does not permute the result")


def _check_feedback(q: Quantized, w: Tensor) -> None:
    """Part by part, without an error that tells anything of the next part, codes are those of `encode`.

    Where codes depend on those before, as on a path, they err no less, and can be written as well.
    """
    side = {name: stored.decode() for name, stored in q.side.items()}
    w = w.float()
    independent = ErrorFeedback(torch.eye(matrix_shape(q.shape)[1]))
    try:
        codes = q.recipe.encode_fed_back(w, side, independent)
    except NoFeedback:
        return
    plain = q.recipe.encode(w, side)
    if not q.recipe.independent_blocks:
        found = replace(q, codes=codes)
        errors = [(x.decode() - w).double().square().sum() for x in (q, found)]
        _law(bool(errors[0] <= errors[1] * (1 + 1e-6) + 1e-30), q.recipe, "part by part it errs less than in one piece")
        _check_bytes(found, found.decode())
        return
    same = codes.keys() == plain.keys()
    for name in plain if same else ():
        other = int((codes[name] != plain[name]).sum())
        # A transform weighs errors in other units here, so that what is nearly tied may fall to the other side.
        same &= other <= (max(1, plain[name].numel() // 50) if isinstance(q.recipe, Transform) else 0)
    _law(same, q.recipe, "encoded part by part, it has other codes (see Quantizer.part)")
    types = all(codes[name].dtype == plain[name].dtype for name in plain)
    _law(types, q.recipe, "encoded part by part, its codes have another type")


def _check_refusals(recipe: Quantizer, w: Tensor, options: FitOptions) -> None:
    position = tuple(n - 1 for n in w.shape)
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = w.clone()
        spoiled[position] = bad
        _refuses(lambda s=spoiled: _quantize(recipe, s, options), WeightError, re.escape(str(position)), recipe)
    _refuses(lambda: _quantize(recipe, w[:0], options), WeightError, "no elements", recipe)
    _refuses(lambda: _quantize(recipe, w.int(), options), WeightError, "floating", recipe)
    block = getattr(recipe, "block", (1, 1))
    rows, cols = (13 if size > 1 else 1 for size in block)
    if rows == cols == 1:
        return
    awkward = torch.randn(rows * 4 if rows == 1 else rows, cols, generator=Generator().manual_seed(5))
    message = _refuses(lambda: _quantize(recipe, awkward, options), PlanError, "pad=True", recipe)
    extent = int(message.split()[0])
    sizes = [int(n) for n in re.findall(r"\d+", message.partition("use ")[2])]
    _law(bool(sizes) and all(extent % n == 0 for n in sizes), recipe, f"the sizes do not work either: {message}")
    check_tensor(padded(recipe), awkward, options=options, doubles=False)


def _edge_cases(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    outlier = torch.full(shape, 1e-3)
    outlier[(-1,) * len(shape)] = 1e3
    yield "all zero", torch.zeros(shape)
    yield "constant", torch.full(shape, 0.25)
    yield "one outlier", outlier
    generator = Generator().manual_seed(6)
    for name, odd in (("one weight", (1, 1)), ("a vector", (7,)), ("four axes", (6, 4, 3, 3)), ("no axis", ())):
        yield name, torch.randn(odd, generator=generator)


def _same_streams(a: Quantized, b: Quantized) -> bool:
    pairs = zip(a.streams(), b.streams(), strict=True)
    return a.recipe == b.recipe and all(x.spec == y.spec and torch.equal(x.codes, y.codes) for x, y in pairs)


# -- coders ------------------------------------------------------------------------------------
def check_coder(
    coder: Coder,
    *,
    alphabets: Sequence[int | None] = (1, 2, 3, 5, 15, 16, 17, 255, 256, 257, 4095, 65_535, 65_536, 1 << 32),
    lengths: Sequence[int] = (0, 1, 2, 7, 300),
    most_bytes: Callable[[Stream], float] | None = None,
) -> None:
    """Check every law of a coder, over alphabets, lengths and skews.

    Args:
        coder: the one to check.
        alphabets: sizes to try; a coder that does not do the largest leaves them out.
        lengths: symbols per stream to try.
        most_bytes: the bytes that the coder promises not to exceed for a stream coded alone.
    """
    generator = Generator().manual_seed(7)
    everything: list[Stream] = []
    for alphabet in alphabets:
        for length in lengths:
            for skew in ("first", "last", "uniform", "skewed"):
                stream = _stream(alphabet, length, skew, generator)
                data = _round_trip(coder, [stream])
                bits, entropy = 8 * len(data), _entropy(stream.codes)
                # The lengths of streams and bytes are known, which says a little; saving n bits is luck of 2^-n.
                _law(bits >= entropy - 24, coder, f"{stream.spec} took {bits} bits, below its entropy {entropy:.1f}")
                if most_bytes is not None:
                    most = most_bytes(stream)
                    _law(len(data) <= most, coder, f"{stream.spec} ({skew}) took {len(data)} bytes, more than {most}")
            everything.append(stream)
    _round_trip(coder, everything)
    _law(coder.encode([]) == b"" and coder.decode(b"", []) == [], coder, "no streams are not no bytes")
    _check_damage(coder, [_stream(alphabet, 20, "uniform", generator) for alphabet in alphabets])
    for alphabet in alphabets:
        if alphabet is None or alphabet < 1 << 32:
            over = _stream(alphabet, 3, "last", generator)
            over = Stream(over.spec, (over.codes.long() + 1))
            _refuses(lambda s=over: coder.encode([s]), PlanError, "", coder)
    short = Stream(StreamSpec("codes", (2, 2), 4), torch.zeros(3, dtype=torch.uint8))
    _refuses(lambda: coder.encode([short]), PlanError, "grid", coder)


def _round_trip(coder: Coder, streams: Sequence[Stream]) -> bytes:
    data = coder.encode(streams)
    specs = [stream.spec for stream in streams]
    _law(coder.encode(streams) == data, coder, "the same codes gave other bytes")
    sizes = coder.sizes(data, specs)
    _law(len(sizes) == len(specs) and min(sizes) >= 0, coder, f"sizes {sizes} are not one per stream")
    _law(sum(sizes) == len(data), coder, f"sizes add up to {sum(sizes)} of {len(data)} bytes")
    for source in (data, memoryview(data)):
        for stream, codes in zip(streams, coder.decode(source, specs), strict=True):
            same = codes.dtype == code_dtype(stream.spec.alphabet) and torch.equal(codes, stream.codes)
            _law(same, coder, f"{stream.spec} does not come back")
    return data


def _check_damage(coder: Coder, streams: Sequence[Stream]) -> None:
    data = coder.encode(streams)
    specs = [stream.spec for stream in streams]
    _refuses(lambda: coder.decode(data + b"\0", specs), CorruptArtifact, "", coder)
    places = range(0, len(data), -(-len(data) // 100))
    flips = (data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in places)
    for broken in (data[:-1], data[1:], b"", *flips):
        try:
            codes = coder.decode(broken, specs)
        except CorruptArtifact:
            continue
        # Other codes then, for dense coders of any bytes; the file's checksum is what finds those.
        _law(not all(torch.equal(a, b.codes) for a, b in zip(codes, streams, strict=True)), coder, "damage is not seen")
        again = coder.decode(coder.encode([Stream(*pair) for pair in zip(specs, codes, strict=True)]), specs)
        _law(all(map(torch.equal, again, codes)), coder, "what damaged bytes decode to does not come back")


def _stream(alphabet: int | None, length: int, skew: str, generator: Generator) -> Stream:
    """A stream of two rows where the length is even; an odd alphabet has its zero in the middle."""
    size = 2 * LARGEST_CODE + 1 if alphabet is None else alphabet
    if skew in ("first", "last"):
        codes = torch.full((length,), 0 if skew == "first" else size - 1, dtype=torch.int64)
    else:
        share = torch.rand(length, generator=generator, dtype=torch.float64)
        codes = ((share**8 if skew == "skewed" else share) * size).long().clamp_max(size - 1)
    if alphabet is None:
        codes -= LARGEST_CODE
    rows = 2 if length % 2 == 0 else 1
    grid = (rows, length // rows)
    centre = 0 if alphabet is None or alphabet % 2 == 0 or alphabet > 255 else alphabet // 2
    spec = StreamSpec("codes", grid, alphabet, centre)
    return Stream(spec, codes.to(code_dtype(alphabet)).reshape(grid))


def _entropy(codes: Tensor) -> float:
    """Bits of all codes at their own frequencies."""
    counts = codes.flatten().unique(return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum()) if codes.numel() else 0.0


# -- sources -----------------------------------------------------------------------------------
def check_source(
    make_module: Callable[[], nn.Module],
    attribute: str,
    inputs: Sequence[Any],
    *,
    make_source: Callable[[Tensor], nn.Module] | None = None,
    once: bool = True,
) -> None:
    """Check that a module works as ever when one of its tensors comes from a source.

    Args:
        make_module: a fresh module, with the same weights at each call.
        attribute: the tensor, as `weight` or `out_proj.weight`.
        inputs: arguments of the module's forward.
        make_source: from the tensor to its source; by default `FakeQuantize(Uniform(4), ·)`.
        once: whether one forward is to compute the source once; false where the module inside runs several times.
    """
    make_source = make_source or (lambda tensor: FakeQuantize(Uniform(4), tensor))
    module = make_module()
    owner, name = _owner(module, attribute)
    who = f"{type(owner).__name__}.{name}"
    kind, names_before = type(owner), {n for n, _ in module.named_parameters()}
    source = make_source(getattr(owner, name))
    attach(owner, name, source)

    _law(isinstance(owner, kind) and type(owner).__name__ == kind.__name__, who, "isinstance or the name is lost")
    _law(kind.__name__ in repr(module) and type(source).__name__ in repr(module), who, "the repr hides the source")
    _law(_same_bits(getattr(owner, name), source()), who, f".{name} is not what the source gives")
    _refuses(lambda: attach(owner, name, source), PlanError, "already", who)
    _refuses(lambda: attach(owner, "no_such_tensor", source), PlanError, "no_such_tensor", who)
    _refuses(lambda: detach(owner, "no_such_tensor"), PlanError, "no source", who)

    plain = make_module()
    with torch.no_grad():
        getattr(_owner(plain, attribute)[0], name).copy_(source())
    for training in (True, False):
        module.train(training)
        plain.train(training)
        for grad in (True, False):
            # Torch chooses kernels by requires_grad, even where no gradient is recorded.
            getattr(_owner(plain, attribute)[0], name).requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                how = f"train={training}, grad={grad}"
                _law(_equal_outputs(module(*inputs), plain(*inputs)), who, f"the forward value differs ({how})")
    module.train()

    calls: list[int] = []
    handle = source.register_forward_hook(lambda *_: calls.append(1))
    _total(module(*inputs)).backward()
    handle.remove()
    _law(len(calls) == 1 or not once, who, f"one forward computed the source {len(calls)} times")
    for parameter_name, parameter in module.named_parameters():
        _law(parameter.grad is not None, who, f"{parameter_name} gets no gradient")
    before = getattr(owner, name).detach().clone()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    _law(not torch.equal(getattr(owner, name), before), who, "an optimizer step changed nothing")

    _check_copies(module, make_module, attribute, make_source, inputs, who)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        converted = copy.deepcopy(module).to(dtype)
        given = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        outputs = _tensors(converted(*given))
        _law(all(x.dtype == dtype for x in outputs), who, f".to({dtype}) gives {outputs[0].dtype}")

    value = getattr(owner, name).detach().clone()
    _law(detach(owner, name) is source, who, "detach did not return the source")
    _law(type(owner) is kind and not slots(owner), who, "detach did not restore the class")
    _law(_same_bits(owner._parameters[name].detach(), value), who, "detach did not keep the value")  # type: ignore[union-attr]
    _law({n for n, _ in module.named_parameters()} == names_before, who, "detach left other parameters behind")
    attach(owner, name, source)  # and again
    detach(owner, name, value + 1)
    _law(torch.equal(owner._parameters[name].detach(), value + 1), who, "detach ignored the value")  # type: ignore[union-attr]
    module(*inputs)


def _check_copies(
    module: nn.Module,
    make_module: Callable[[], nn.Module],
    attribute: str,
    make_source: Callable[[Tensor], nn.Module],
    inputs: Sequence[Any],
    who: str,
) -> None:
    module.eval()
    expected = module(*inputs)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    fresh = make_module()
    owner, name = _owner(fresh, attribute)
    attach(owner, name, make_source(getattr(owner, name)))
    fresh.load_state_dict(module.state_dict())
    fresh.eval()
    for same, how in ((copy.deepcopy(module), "deepcopy"), (loaded, "pickle"), (fresh, "load_state_dict")):
        _law(_equal_outputs(same(*inputs), expected), who, f"{how} changed the outputs")
        _law(type(same) is type(module), who, f"{how} changed the class")
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    _law(_equal_outputs(module(*inputs), expected), who, "a deepcopy shares memory with the original")
    module.train()


def _owner(module: nn.Module, attribute: str) -> tuple[nn.Module, str]:
    path, _, name = attribute.rpartition(".")
    return module.get_submodule(path), name


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output if part is not None for tensor in _tensors(part)]


def _equal_outputs(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _total(output: Any) -> Tensor:
    return torch.stack([(x * torch.arange(1, x.numel() + 1).reshape(x.shape)).sum() for x in _tensors(output)]).sum()


# -- all ---------------------------------------------------------------------------------------
def _law(holds: bool, who: object, broken: str) -> None:
    if not holds:
        raise AssertionError(f"{who}: {broken}")


def _refuses(call: Callable[[], object], kind: type[Exception], message: str, who: object) -> str:
    try:
        call()
    except kind as error:
        _law(re.search(message, str(error)) is not None, who, f"the error does not say {message!r}: {error}")
        return str(error)
    raise AssertionError(f"{who}: expected {kind.__name__} saying {message!r}, but nothing was raised")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, so that -0.0 is not 0.0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))
