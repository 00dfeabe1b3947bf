"""Plans: which tensor is stored by which quantizer, and recipes as JSON.

What no pattern names stays dense, and is reported.  Patterns are shell-style (`fc*.weight`), tried in
order; the first that matches decides, and `None` says "dense, on purpose".
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

from bitbook.errors import PlanError
from bitbook.lattice.e8p import E8P
from bitbook.lattice.lattice import Lattice
from bitbook.quantizer import Quantizer, Range
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Float, Integer
from bitbook.scalar.levels import Binary, Ternary
from bitbook.scalar.pruned import Pruned
from bitbook.scalar.sign_magnitude import SignMagnitude
from bitbook.scalar.table import PowersOfTwo, Table
from bitbook.scalar.uniform import Uniform
from bitbook.transforms.balanced import Balanced
from bitbook.transforms.permuted import Permuted
from bitbook.transforms.rotated import Rotated
from bitbook.transforms.row_scaled import RowScaled
from bitbook.trellis.tcq import TCQ
from bitbook.trellis.trellis import Trellis
from bitbook.vector.codebook import Codebook
from bitbook.vector.gain_shape import GainShape
from bitbook.vector.residual import Residual

KINDS: Mapping[str, type[Quantizer]] = {
    kind.__name__: kind
    for kind in (
        *(Float, Integer, Uniform, Binary, Ternary, Table, PowersOfTwo, Pruned, ECSQ),
        *(Codebook, Residual, SignMagnitude, GainShape),
        *(Trellis, TCQ),
        *(Lattice, E8P),
        *(Rotated, Balanced, Permuted, RowScaled),
    )
}
"""Every quantizer that a plan or a file can name."""

InputRange = Literal["batch", "running", "calibrated"]


@dataclass(frozen=True)
class Activation:
    """How the input of a module is quantized: a scalar recipe with one scale, and where its range comes from.

    "batch": from each batch, as it comes.  "running": an exponential average over training batches.
    "calibrated": the extremes over calibration data, whatever its batch size.
    """

    recipe: Quantizer
    range: InputRange = "batch"
    rule: Range | None = None
    """How the scale follows from the extremes (see `FitOptions.range`); needed by the decoder, so it is kept."""

    def __post_init__(self) -> None:
        if not hasattr(self.recipe, "from_range") or getattr(self.recipe, "block", None) != (-1, -1):
            raise PlanError(
                f"{self.recipe!r} cannot quantize activations; use Uniform or Binary with one scale, block=(-1, -1)"
            )
        if self.range not in get_args(InputRange):
            raise PlanError(f"Activation(range={self.range!r}): use one of {', '.join(get_args(InputRange))}")
        if self.rule not in (None, "minmax", "absmax", "mean"):
            raise PlanError(f"Activation(rule={self.rule!r}): use minmax, absmax or (for Binary) mean")

    def to_json(self) -> Any:
        """The smallest JSON value that `from_json` reads back as an equal object."""
        named: dict[str, str] = {} if self.range == "batch" else {"range": self.range}
        if self.rule is not None:
            named["rule"] = self.rule
        return {"recipe": recipe_to_json(self.recipe), **named} if named else recipe_to_json(self.recipe)

    @classmethod
    def from_json(cls, value: Any) -> Activation:
        """Read `to_json`'s value; raises `PlanError` for anything else."""
        if not isinstance(value, dict):
            return cls(recipe_from_json(value))
        extra = value.keys() - {"recipe", "range", "rule"}
        if extra or "recipe" not in value:
            raise PlanError(f"{value!r} is not an activation: use a recipe, or {{recipe, range, rule}}")
        return cls(recipe_from_json(value["recipe"]), value.get("range", "batch"), value.get("rule"))


@dataclass(frozen=True)
class Plan:
    """Tensor-name patterns → quantizers, and module-name patterns → activations.

    `weights` maps patterns over names such as `fc1.weight` to a `Quantizer`, or to None for dense;
    `inputs` maps patterns over module names such as `fc1` to an `Activation`, a scalar quantizer (its
    range taken from each batch), or None.
    """

    weights: Mapping[str, Quantizer | None] = field(default_factory=dict)
    inputs: Mapping[str, Activation | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = {k: Activation(v) if isinstance(v, Quantizer) else v for k, v in self.inputs.items()}
        object.__setattr__(self, "inputs", inputs)
        for kind, table, allowed in (("weights", self.weights, Quantizer), ("inputs", inputs, Activation)):
            for pattern, value in table.items():
                if not isinstance(pattern, str) or not (value is None or isinstance(value, allowed)):
                    raise PlanError(f"{kind}[{pattern!r}] is {value!r}; use a {allowed.__name__} or None")

    def names(self, tensor: str) -> bool:
        """Whether any pattern names this tensor, be it to keep it dense."""
        return any(fnmatch.fnmatchcase(tensor, pattern) for pattern in self.weights)

    def recipes(self, names: Iterable[str]) -> dict[str, Quantizer | None]:
        """The recipe of each tensor name (None: dense); raises `PlanError` for a pattern that names nothing."""
        return _match(self.weights, list(names), "tensor")

    def activations(self, modules: Iterable[str]) -> dict[str, Activation | None]:
        """The activation of each module name (None: untouched)."""
        return _match(self.inputs, list(modules), "module")

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON; keys that hold nothing are left out."""
        weights = {k: None if v is None else recipe_to_json(v) for k, v in self.weights.items()}
        inputs = {k: None if v is None else v.to_json() for k, v in self.inputs.items()}
        return {key: table for key, table in (("weights", weights), ("inputs", inputs)) if table}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Read `to_json`'s value; raises `PlanError` for anything else."""
        if not isinstance(value, dict) or not value.keys() <= {"weights", "inputs"}:
            raise PlanError(f"a plan is an object with the keys 'weights' and 'inputs', not {value!r}")
        tables = [value.get(key, {}) for key in ("weights", "inputs")]
        if not all(isinstance(table, dict) for table in tables):
            raise PlanError("the plan's 'weights' and 'inputs' must be objects: pattern → recipe")
        return cls(
            {k: None if v is None else recipe_from_json(v) for k, v in tables[0].items()},
            {k: None if v is None else Activation.from_json(v) for k, v in tables[1].items()},
        )


def _hint(pattern: str, names: list[str]) -> str:
    """What to do where a pattern means a weight that a parametrization computes, which is no tensor of the model."""
    for name in names:
        owner, found, rest = name.partition("parametrizations.")
        computed = owner + rest.rpartition(".")[0]
        if found and fnmatch.fnmatchcase(computed, pattern):
            return (
                f". {computed} is computed by a parametrization: name {name} and the like, or call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
    return ""


def _match(patterns: Mapping[str, Any], names: list[str], what: str) -> dict[str, Any]:
    used: set[str] = set()
    found: dict[str, Any] = dict.fromkeys(names)
    for name in names:
        hit = next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)
        if hit is not None:
            used.add(hit)
            found[name] = patterns[hit]
    # A later pattern may be fully covered by earlier ones; only one that could match nothing is a mistake.
    for pattern in patterns.keys() - used:
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise PlanError(
                f"the pattern {pattern!r} names no {what}; there are {shown or 'none'}{_hint(pattern, names)}"
            )
    return found


def recipe_to_json(recipe: Quantizer) -> Any:
    """A recipe as JSON: `["Uniform", 4, {"block": [1, 32]}]`; fields at their defaults are left out.

    A recipe without arguments is its bare name: `"Binary"`.
    """
    kind = type(recipe).__name__
    if KINDS.get(kind) is not type(recipe):
        raise PlanError(f"{kind} is not in plan.KINDS, so it cannot be written")
    first, *rest = fields(recipe)
    positional, named = [], {}
    for f in (first, *rest):
        value = getattr(recipe, f.name)
        if value == f.default:
            continue
        if isinstance(value, Quantizer):
            value = recipe_to_json(value)
        elif isinstance(value, tuple):
            value = [recipe_to_json(v) if isinstance(v, Quantizer) else v for v in value]
        if f is first:
            positional.append(value)
        else:
            named[f.name] = value
    parts = [kind, *positional, *([named] if named else [])]
    return kind if len(parts) == 1 else parts


def recipe_from_json(value: Any, *, depth: int = 0) -> Quantizer:
    """Read `recipe_to_json`'s value; raises `PlanError` for unknown names, fields, types or deep nesting."""
    if depth > 8:
        raise PlanError("recipes are nested more than 8 deep")
    parts = list(value) if isinstance(value, list) else [value]
    if not parts or not isinstance(parts[0], str) or parts[0] not in KINDS or len(parts) > 3:
        names = ", ".join(KINDS)
        raise PlanError(f"{value!r} is not a recipe; use [name, argument, {{fields}}] with a name of {names}")
    kind = KINDS[parts[0]]
    types_of = _field_types(kind)
    named = parts.pop() if isinstance(parts[-1], dict) and len(parts) > 1 else {}
    arguments = dict(named)
    if len(parts) == 2:
        arguments = {next(iter(types_of)): parts[1], **named}
    for name, argument in arguments.items():
        if name not in types_of:
            raise PlanError(f"{kind.__name__} has no field {name!r}; it has {', '.join(types_of)}")
        arguments[name] = _read_field(kind, name, types_of[name], argument, depth)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise PlanError(f"{value!r} is not a complete {kind.__name__}: {error}") from None


def parse_recipe(text: str) -> Quantizer:
    """Read a recipe as `repr` writes it, `Codebook(256, (1, 4), centroids=Uniform(5))`; nothing is evaluated.

    Raises `PlanError` for anything but names of `KINDS`, called with literals and with other recipes.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call):
            raise PlanError(f"{text!r} is not a recipe; write a call such as Uniform(4) or Binary()")
        return recipe_from_json(_node_to_json(node))
    except PlanError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PlanError(f"{text[:80]!r} is not a recipe such as Uniform(4): {error}") from None


def _node_to_json(node: ast.expr) -> Any:
    """A call as `recipe_from_json` reads it, every argument by its name; a literal as what it stands for."""
    if isinstance(node, ast.Tuple | ast.List) and any(isinstance(part, ast.Call) for part in node.elts):
        return [_node_to_json(part) for part in node.elts]
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            written = ast.unparse(node)[:80]
            raise PlanError(f"{written} in a recipe is neither a literal nor a recipe") from None
    name = ast.unparse(node.func)
    if name not in KINDS:
        raise PlanError(f"there is no quantizer {name[:80]}; there are {', '.join(KINDS)}")
    known = list(_field_types(KINDS[name]))
    if len(node.args) > len(known):
        raise PlanError(f"{name} takes at most {len(known)} arguments: {', '.join(known)}")
    arguments = list(zip(known, node.args, strict=False))
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in dict(arguments):
            given = keyword.arg or "**"
            raise PlanError(f"{ast.unparse(node)[:80]}: {given} must be given once, by name or by place")
        arguments.append((keyword.arg, keyword.value))
    return [name, {field: _node_to_json(value) for field, value in arguments}]


@functools.cache
def _field_types(kind: type[Quantizer]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(cast(Any, kind))}


def _read_field(kind: type[Quantizer], name: str, expected: Any, value: Any, depth: int) -> Any:
    if expected is Quantizer:
        return recipe_from_json(value, depth=depth + 1)
    if expected == tuple[Quantizer, ...] and isinstance(value, list):
        return tuple(recipe_from_json(v, depth=depth + 1) for v in value)
    if typing.get_origin(expected) is tuple and isinstance(value, list):
        return tuple(value)  # the recipe checks its own tuples
    if typing.get_origin(expected) is Literal:
        allowed: tuple[type, ...] = tuple({type(choice) for choice in get_args(expected)})
    else:
        union = isinstance(expected, types.UnionType)
        allowed = tuple(get_args(expected)) if union else (typing.get_origin(expected) or expected,)
    if type(value) not in allowed:
        names = " or ".join(t.__name__ for t in allowed)
        raise PlanError(f"{kind.__name__}.{name} is {value!r}; use {names}")
    return value
