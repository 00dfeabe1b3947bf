"""What a file will be, without data: sizes at fixed width follow from recipes and shapes alone.

    model, plan ──► artifact of zeros ──to_bytes(Fixed())──► ledger: the real file's, byte for byte in size

An entropy coder can only be smaller, by its own choice of `Fixed`, except for the bytes that say so.
"""

from __future__ import annotations

import torch
from torch import nn

from bitbook.apply import freeze, one_recipe
from bitbook.artifact import Artifact, Ledger, QuantizedInput
from bitbook.artifact.artifact import input_children
from bitbook.artifact.contents import Coder
from bitbook.artifact.write import to_bytes
from bitbook.blocks import Shape
from bitbook.coding.fixed import Fixed
from bitbook.errors import PlanError
from bitbook.plan import Plan
from bitbook.quantizer import Quantized, Quantizer, code_dtype

_CHOICE = 3
"""Bytes by which a group of `Smallest` may exceed one of `Fixed`: its mark, and a digit in each of two places."""


def blank(recipe: Quantizer, shape: Shape) -> Quantized:
    """A tensor of `shape` stored by `recipe`, all of whose codes are zero.

    Raises `PlanError` where the recipe does not fit the shape, or codes have no bound and so no fixed width.
    """
    recipe = recipe.resolve(shape)
    side = {name: blank(child.recipe, child.shape) for name, child in recipe.children(shape).items()}
    specs = recipe.layout(shape)
    for spec in specs:
        if spec.alphabet is None:
            raise PlanError(f"{recipe!r} has codes without a bound; how many bytes they take depends on the weights")
    codes = {spec.name: torch.zeros(spec.grid, dtype=code_dtype(spec.alphabet)) for spec in specs}
    return Quantized(recipe.decoder().with_children({name: q.recipe for name, q in side.items()}), shape, codes, side)


def blank_artifact(model: nn.Module, plan: Plan) -> Artifact:
    """What `compress(model, plan)` would give, with zeros for all codes; errors as there, but none of weights."""
    plain = freeze(model)
    tied = {name: [name, *(a for a, n in plain.aliases.items() if n == name)] for name in plain.tensors}
    recipes = plan.recipes([name for name, _ in model.named_parameters(remove_duplicate=False)])
    tensors = dict(plain.tensors)
    for name, tensor in plain.tensors.items():
        recipe = one_recipe({n: recipes[n] for n in tied[name] if n in recipes and plan.names(n)})
        if recipe is not None:
            try:
                tensors[name] = blank(recipe, tuple(tensor.shape))
            except PlanError as error:
                raise PlanError(f"{name}: {error}") from None
    modules = [name for name, _ in model.named_modules() if name]
    inputs = {
        name: QuantizedInput(a, {n: blank(child.recipe, child.shape) for n, child in input_children(a).items()})
        for name, a in plan.activations(modules).items()
        if a is not None
    }
    return Artifact(tensors, inputs, plain.aliases)


def fixed_width(model: nn.Module, plan: Plan) -> Ledger:
    """The ledger of the file that `save(compress(model, plan), path, Fixed())` writes, without compressing anything.

    Sizes are exact, but for codebooks: where fewer different blocks than codewords are found, the file has fewer.
    Raises `PlanError` where the plan does not fit the model, or codes have no fixed width.
    """
    return to_bytes(blank_artifact(model, plan), Fixed())[1]


def most_bytes(ledger: Ledger, coder: Coder) -> int:
    """The bytes that the file of the same content by `coder` has at most; `ledger`: that of `fixed_width`."""
    if isinstance(coder, Fixed):
        return ledger.total
    return ledger.total + _CHOICE * len(ledger.by_tensor())
