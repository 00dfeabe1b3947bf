"""Plans meet models: quantize in place, freeze into an artifact, load an artifact back.

model ──quantize_(plan)──► model with slots ──(training)──► freeze ──► Artifact ──save──► file
file ──read──► Artifact ──restore──► plain model
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from bitbook.artifact import Artifact, QuantizedInput, read
from bitbook.calibration.calls import repeatable
from bitbook.errors import ModelMismatch, PlanError, WeightError
from bitbook.feedback.calibrate import encode_calibrated_
from bitbook.feedback.error_feedback import FeedbackOptions, FeedbackReport
from bitbook.inputs import CALIBRATION_EXAMPLES, CHILD, InputQuantizer, calibrate, put_before, take_away
from bitbook.loop import Training, run_epochs
from bitbook.plan import Plan
from bitbook.qat import FakeQuantize, Regime
from bitbook.quantizer import FitOptions, Quantized, Quantizer, quantize
from bitbook.slot import SLOTS, attach, detach, slots


@dataclass(frozen=True)
class Coverage:
    """What `quantize_` did: the recipe of each tensor it took, and what stayed dense and why."""

    quantized: Mapping[str, Quantizer]
    dense: Mapping[str, str]

    def __str__(self) -> str:
        rows = [f"{name}: {recipe!r}" for name, recipe in self.quantized.items()]
        rows += [f"{name}: dense, {reason}" for name, reason in self.dense.items()]
        return "\n".join(rows)


class Place(NamedTuple):
    """Where a tensor sits: its full name, the module that owns it, the attribute."""

    name: str
    module: nn.Module
    attribute: str


def quantize_(
    model: nn.Module,
    plan: Plan,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    options: FitOptions = FitOptions(),
    regime: Regime = Regime(),
    importance: Mapping[str, Tensor] | None = None,
    generator: Generator | None = None,
) -> Coverage:
    """Quantize `model` in place by `plan`; it can then be evaluated, trained on, and frozen.

    Args:
        model: any module; layers keep their classes, quantized tensors become slots.
        plan: which tensors and inputs, and how.
        filter_fn: `(module, tensor name) → bool`; tensors it refuses stay dense.
        options: how side tensors are found.
        regime: what moves during training.
        importance: per tensor name, weights of squared errors.
        generator: drives k-means seeding.

    Raises:
        PlanError: a pattern names nothing, a recipe does not fit its tensor, two names of one tied
            tensor ask for different recipes, or the model computes from packed codes.
        WeightError: a tensor holds NaN or infinity.
    """
    _refuse_packed(model)
    shared = list(_parameters(model))
    recipes = plan.recipes([place.name for places in shared for place in places])
    modules = {name: module for name, module in model.named_modules() if name and not _is_ours(name)}
    activations = plan.activations(modules)
    sources: list[tuple[list[Place], FakeQuantize]] = []
    dense: dict[str, str] = {}
    for places in shared:
        name = places[0].name
        recipe = one_recipe({place.name: recipes[place.name] for place in places if plan.names(place.name)})
        if recipe is None:
            dense[name] = "by plan" if plan.names(name) else "no pattern names it"
            continue
        if filter_fn is not None and not all(filter_fn(place.module, place.name) for place in places):
            dense[name] = "refused by filter_fn"
            continue
        weight = places[0].module._parameters[places[0].attribute]
        try:
            source = FakeQuantize(
                recipe,
                cast(Tensor, weight),
                regime=regime,
                options=options,
                importance=(importance or {}).get(name),
                generator=generator,
            )
        except (PlanError, WeightError) as error:
            raise type(error)(f"{name}: {error}") from error
        sources.append((places, source))
    # Everything that depends on the weights has worked out; only now the model changes.
    for name, activation in activations.items():
        if activation is not None:
            put_before(modules[name], InputQuantizer(activation))
    for places, source in sources:
        for place in places:
            attach(place.module, place.attribute, source)
    return Coverage({places[0].name: source.recipe for places, source in sources}, dense)


@torch.no_grad()
def dequantize_(model: nn.Module) -> nn.Module:
    """Undo `quantize_` in place, keeping the quantized values: every slot becomes a plain parameter again.

    Tied tensors stay tied.  Returns the model.  Raises `PlanError` where it computes from packed codes.
    """
    _refuse_packed(model)
    parameters: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for attribute, source in slots(module).items():
            detach(module, attribute)
            parameter = parameters.setdefault(id(source), module._parameters[attribute])  # type: ignore[arg-type]
            module._parameters[attribute] = parameter
    for module in model.modules():
        take_away(module)
    return model


@torch.no_grad()
def freeze(model: nn.Module) -> Artifact:
    """Everything `model` needs to be restored: quantized tensors, dense ones, buffers, input ranges.

    Raises `PlanError` where it computes from packed codes.
    """
    _refuse_packed(model)
    tensors: dict[str, Quantized | Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for place, tensor in _contents(model):
        key = id(tensor)
        if key in first_name:
            aliases[place.name] = first_name[key]
            continue
        first_name[key] = place.name
        # A copy: the model may train on.
        tensors[place.name] = tensor.freeze() if isinstance(tensor, FakeQuantize) else tensor.detach().clone()
    inputs = {
        name.removesuffix(f".{CHILD}"): QuantizedInput(module.activation, module.freeze())
        for name, module in model.named_modules()
        if isinstance(module, InputQuantizer)
    }
    return Artifact(tensors, inputs, aliases)


def quantize_dense(artifact: Artifact, plan: Plan) -> Artifact:
    """The artifact with its dense tensors stored by `plan`, too.

    For what no slot holds: buffers, such as the statistics of batch normalisation, which training goes on changing, and
    parameters that changed after the fit.  Patterns name dense tensors only.  Raises `PlanError` where one names none
    or the recipe does not fit, and `WeightError` for what is not finite.
    """
    dense = {name: tensor for name, tensor in artifact.tensors.items() if isinstance(tensor, Tensor)}
    tensors = dict(artifact.tensors)
    for name, recipe in plan.recipes(dense).items():
        if recipe is not None:
            try:
                tensors[name] = quantize(recipe, dense[name].float())
            except (PlanError, WeightError) as error:
                raise type(error)(f"{name}: {error}") from error
    return Artifact(tensors, artifact.inputs, artifact.aliases)


def with_dense(artifact: Artifact, model: nn.Module) -> Artifact:
    """The artifact with everything that is not quantized as a plain `model`, restored from it, has it by now."""
    quantized = {name: tensor for name, tensor in artifact.tensors.items() if isinstance(tensor, Quantized)}
    return Artifact({**freeze(model).tensors, **quantized}, artifact.inputs, artifact.aliases)


@torch.no_grad()
def restore(artifact: Artifact, model: nn.Module) -> nn.Module:
    """Copy an artifact's tensors into a plain `model` and quantize its inputs as the artifact says.

    Raises `ModelMismatch` where names or shapes differ; the model is then untouched.
    """
    stored = artifact.state_dict()
    places = match(stored, artifact.inputs, model)
    for name, value in stored.items():
        places[name][1].copy_(value)
    quantize_inputs(artifact.inputs, model)
    return model


def match(
    stored: Mapping[str, Any],
    inputs: Mapping[str, QuantizedInput],
    model: nn.Module,
    equal: Callable[[Any, Any], bool] = torch.equal,
) -> dict[str, tuple[Place, Tensor]]:
    """The place in a plain `model` of each stored tensor, which has a shape, and what is there.

    Raises `ModelMismatch` where names or shapes differ, or where what is one tied tensor in the model is not `equal`.
    """
    contents = {place.name: (place, tensor) for place, tensor in _contents(model)}
    places = {name: (p, t) for name, (p, t) in contents.items() if not isinstance(t, FakeQuantize)}
    if len(places) < len(contents):
        raise ModelMismatch("the model is quantized already; load into a fresh one")
    missing, extra = sorted(places.keys() - stored.keys()), sorted(stored.keys() - places.keys())
    if missing or extra:
        raise ModelMismatch(f"the file lacks {missing or 'nothing'} of the model, and has {extra or 'nothing'} else")
    for name, value in stored.items():
        shapes = tuple(value.shape), tuple(places[name][1].shape)
        if shapes[0] != shapes[1]:
            raise ModelMismatch(f"{name}: {shapes[0]} in the file, {shapes[1]} in the model")
    tied: dict[int, str] = {}
    for name, value in stored.items():
        other = tied.setdefault(id(places[name][1]), name)
        if stored[other] is not value and not equal(stored[other], value):
            raise ModelMismatch(f"{other} and {name} are one tied tensor in the model, two different ones in the file")
    modules = dict(model.named_modules())
    unknown = inputs.keys() - modules.keys()
    if unknown:
        raise ModelMismatch(f"the file quantizes the inputs of {sorted(unknown)}, which the model does not have")
    if any(isinstance(module, InputQuantizer) for module in modules.values()):
        raise ModelMismatch("the inputs of the model are quantized already; load into a fresh one")
    return places


def quantize_inputs(inputs: Mapping[str, QuantizedInput], model: nn.Module) -> None:
    """Put what quantizes inputs, as a file says, before the modules that it names."""
    modules = dict(model.named_modules())
    for name, quantized in inputs.items():
        quantizer = InputQuantizer(quantized.activation)
        quantizer.stored = dict(quantized.side)
        put_before(modules[name], quantizer)


def compress_by_plan(
    model: nn.Module,
    plan: Plan,
    *,
    data: tuple[Tensor, Tensor] | None = None,
    training: Training | None = None,
    options: FitOptions = FitOptions(),
    regime: Regime = Regime(),
    calibration: Tensor | Iterable[Any] | None = None,
    lam: float = 0.0,
    feedback: FeedbackOptions = FeedbackOptions(),
    after_tensor: Callable[[str, FeedbackReport | str], None] | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
    seed: int = 0,
) -> Artifact:
    """Compress a copy of `model` by `plan`; `save` writes the result, and `model` stays as it is.

    Args:
        model: any trained module.
        plan: which tensors and inputs, and how.
        data: inputs and labels; calibrates input ranges where the plan asks for it.
        training: quantization-aware training on `data` after the fit; None: none.
        options: how side tensors are found.
        regime: what moves during training.
        calibration: inputs of the model, a few hundred, as a tensor or as batches of any kind that `calls` takes, such
            as a data loader; weights are then encoded with error feedback, which lowers the error of each layer's
            outputs on such inputs.  Not together with training.
        lam: with calibration, the price of a bit in squared error of a weight (see `encode_calibrated_`).
        feedback: how errors are fed back.
        after_tensor: called with each tensor's name and what error feedback did for it, or why it did not.
        after_epoch: called with each epoch of training and its loss.
        seed: of k-means seeding and of the order of training examples.

    Raises `PlanError` where plan and model do not fit, or data are needed and missing.
    """
    model = copy.deepcopy(model)
    generator = Generator().manual_seed(seed)
    if calibration is not None:
        if training is not None:
            raise PlanError("training learns to live with rounding as it is; pass calibration or training, not both")
        return _compress_calibrated(model, plan, calibration, data, lam, feedback, options, after_tensor, generator)
    if lam:
        raise PlanError(
            "lam prices bits where weights are encoded for calibration inputs; pass calibration, or use train"
        )
    quantize_(model, plan, options=options, regime=regime, generator=generator)
    needs_ranges = [a for a in plan.inputs.values() if a is not None and a.range == "calibrated"]
    if data is None and (training is not None or needs_ranges):
        what = "training" if training else "a calibrated input range"
        raise PlanError(f"{what} needs data; pass data=(inputs, labels)")
    if needs_ranges and data is not None:
        calibrate(model, [data[0][:CALIBRATION_EXAMPLES]])
    if training is not None and data is not None:
        run_epochs(model, *data, training, generator=generator, after_epoch=after_epoch)
    return freeze(model)


def _compress_calibrated(
    model: nn.Module,
    plan: Plan,
    calibration: Tensor | Iterable[Any],
    data: tuple[Tensor, Tensor] | None,
    lam: float,
    feedback: FeedbackOptions,
    options: FitOptions,
    after_tensor: Callable[[str, FeedbackReport | str], None] | None,
    generator: Generator,
) -> Artifact:
    """Input ranges first, so that weights are encoded for inputs as they will be."""
    batches = repeatable(calibration)
    shared = list(_parameters(model))
    asked = plan.recipes([place.name for places in shared for place in places])
    recipes = {}
    for places in shared:
        recipe = one_recipe({place.name: asked[place.name] for place in places if plan.names(place.name)})
        if recipe is not None:
            recipes[places[0].name] = recipe
    quantize_(model, Plan(inputs=plan.inputs))
    if any(a is not None and a.range == "calibrated" for a in plan.inputs.values()):
        calibrate(model, batches if data is None else data[0][:CALIBRATION_EXAMPLES])
    encoded = encode_calibrated_(
        model,
        recipes,
        batches,
        lam=lam,
        feedback=feedback,
        options=options,
        generator=generator,
        after_tensor=after_tensor,
    )
    artifact = freeze(model)
    return replace(artifact, tensors={name: encoded.get(name, tensor) for name, tensor in artifact.tensors.items()})


def load(path: str | os.PathLike[str], model: nn.Module, resident: Literal["dense", "packed"] = "dense") -> nn.Module:
    """Read a bitbook file into `model` (a fresh one of the right architecture) and return it.

    Args:
        path: the file.
        model: is changed in place.
        resident: "dense" decodes all tensors once, into the model's own; "packed" keeps them as codes in memory, of as
            many bits as they need, and linear layers and embeddings compute from those (`bitbook.runtime`).  A packed
            model is for inference; `bitbook.residence(model)` says how each of its tensors is held, and why.

    Raises `CorruptArtifact` for a damaged file and `ModelMismatch` for another model's.
    """
    if resident == "packed":
        from bitbook.runtime import load_packed  # which builds on this file

        return load_packed(path, model)
    if resident != "dense":
        raise PlanError(f"resident={resident!r}: use 'dense' or 'packed'")
    return restore(read(path), model)


def _is_ours(name: str) -> bool:
    return not {SLOTS, CHILD}.isdisjoint(name.split("."))


def _parameters(model: nn.Module) -> Iterator[list[Place]]:
    """All parameters that are not quantized yet, each with every place it is tied to."""
    places: dict[int, list[Place]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if _is_ours(prefix):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(id(parameter), []).append(Place(name, module, attribute))
    for same in places.values():
        distinct = {(id(place.module), place.attribute): place for place in reversed(same)}
        yield list(reversed(distinct.values()))


def _refuse_packed(model: nn.Module) -> None:
    """Raise `PlanError` where tensors are neither parameters nor slots that train: they would be lost in silence."""
    from bitbook.runtime.layers import packed_tensors  # which imports what this module does

    for prefix, module in model.named_modules():
        for attribute in packed_tensors(module):
            name = f"{prefix}.{attribute}".removeprefix(".")
            raise PlanError(
                f"{name}: computes from packed codes, which are for inference; load the file with resident='dense' to "
                "quantize, train or freeze the model"
            )


def _contents(model: nn.Module) -> Iterator[tuple[Place, FakeQuantize | Tensor]]:
    """Every stored tensor of a model with its source: slots, parameters, persistent buffers."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if _is_ours(prefix):
            continue
        kept = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for attribute, tensor in {**slots(module), **module._parameters, **kept}.items():
            if tensor is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                yield Place(name, module, attribute), cast(FakeQuantize | Tensor, tensor)


def one_recipe(asked: Mapping[str, Quantizer | None]) -> Quantizer | None:
    """What the plan says of the names of one tensor."""
    if len(set(asked.values())) > 1:
        listed = ", ".join(f"{name}: {recipe!r}" for name, recipe in asked.items())
        raise PlanError(f"{listed} — these names are one tied tensor; give them one recipe")
    return next(iter(asked.values()), None)
