"""What a file says it holds: the plan as JSON, and the code streams that follow from it, each claim checked.

Both formats share what is here; `per_tensor` and `one` say where the bytes lie.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bitbook.artifact.artifact import INPUTS, METADATA, Artifact, input_children
from bitbook.artifact.span import Span
from bitbook.blocks import Shape
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.context import Context
from bitbook.coding.fixed import Fixed
from bitbook.coding.rans import Rans
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.plan import Activation, recipe_from_json, recipe_to_json
from bitbook.quantizer import Quantized, Quantizer, Stream, StreamSpec, stream_specs
from bitbook.scalar.leaves import Float

NEWEST = 2
"""The newest format that is read."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dense types, by the names that safetensors gives them."""

CODERS: Mapping[str, Coder] = {"Fixed": Fixed(), "Rans": Rans(), "Context": Context(), "Smallest": Smallest()}
"""Every coder that a file can name."""

_MOST_AXES = 64  # the limit of numpy
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_T = TypeVar("_T")


class Part(NamedTuple):
    """One code stream: whose it is, and the recipe and shape of what it belongs to."""

    owner: str
    spec: StreamSpec
    recipe: Quantizer
    shape: Shape


class Coded(NamedTuple):
    """A tensor that is stored as code streams."""

    name: str
    shape: Shape
    recipe: Quantizer
    parts: Sequence[Part]


class Group(NamedTuple):
    """Code streams that one call of the coder wrote: those of some tensors, then those of some inputs."""

    name: str  # for messages
    data: Span
    tensors: Sequence[Coded]
    inputs: Sequence[Part] = ()

    @property
    def parts(self) -> list[Part]:
        """All streams, in the order in which they are coded."""
        return [part for tensor in self.tensors for part in tensor.parts] + list(self.inputs)


class Dense(NamedTuple):
    """A tensor that is stored as it is."""

    name: str
    dtype: str
    shape: Shape
    data: Span


class Claim(NamedTuple):
    """What a header says of one of its tensors, its data not yet looked for."""

    dtype: str
    shape: Shape
    offsets: Any


class Plan(NamedTuple):
    """The plan in a file: its recipes are checked by themselves, not yet against any bytes."""

    coded: Mapping[str, tuple[Shape, Quantizer]]
    dense: Mapping[str, tuple[Shape, str]]  # empty in format 1, whose index has them
    activations: Mapping[str, Activation]
    aliases: Mapping[str, str]
    coder: Coder


class File(NamedTuple):
    """A file whose every claim has been checked against its length; no code is decoded yet."""

    header: Mapping[str, int]  # bytes of each of its parts
    plan: Plan
    entries: Sequence[Dense | Group]  # in file order


# -- the plan ----------------------------------------------------------------------------------


def plan_json(artifact: Artifact, coder: Coder, default_coder: str, *, dense: bool) -> dict[str, Any]:
    """The plan as JSON, without what is empty or the default; with dense tensors where `dense`.

    Raises `PlanError` for a coder that no file can name, and for a recipe that no file can hold.
    """
    coded = {name: t for name, t in artifact.tensors.items() if isinstance(t, Quantized) and is_coded(t)}
    others = {name: t for name, t in artifact.tensors.items() if name not in coded}
    return plan_of(
        {name: (tuple(t.shape), t.recipe) for name, t in coded.items()},
        {name: (tuple(t.shape), dense_type(name, t)) for name, t in others.items()} if dense else {},
        {module: i.activation for module, i in artifact.inputs.items()},
        artifact.aliases,
        coder,
        default_coder,
    )


def plan_of(
    coded: Mapping[str, tuple[Shape, Quantizer]],
    dense: Mapping[str, tuple[Shape, str]],
    activations: Mapping[str, Activation],
    aliases: Mapping[str, str],
    coder: Coder,
    default_coder: str,
) -> dict[str, Any]:
    """`plan_json`, of tensors by what is said of them; `dense` is empty where the plan does not name them."""
    recipes, recipe_of = _numbered({name: recipe for name, (_, recipe) in sorted(coded.items())}, recipe_to_json)
    kinds, inputs = _numbered(dict(sorted(activations.items())), lambda a: a.to_json())
    named = next((name for name, known in CODERS.items() if type(known) is type(coder)), None)
    if named is None:
        raise PlanError(f"a file cannot name the coder {coder!r}; use one of {', '.join(CODERS)}")
    tensors: dict[str, Any] = {name: [list(shape), recipe_of[name]] for name, (shape, _) in coded.items()}
    tensors |= {name: [list(shape), dtype] for name, (shape, dtype) in dense.items()}
    plan = {
        "activations": kinds,
        "aliases": dict(aliases),
        "coder": "" if named == default_coder else named,
        "inputs": inputs,
        "recipes": recipes,
        "tensors": tensors,
    }
    return {key: value for key, value in plan.items() if value}


def read_plan(text: bytes, default_coder: str, *, dense: bool) -> Plan:
    """Read the text of `plan_json`; raises `CorruptArtifact` for any other."""
    with about("plan"):
        return _read_plan(text, default_coder, dense)


def _read_plan(text: bytes, default_coder: str, dense: bool) -> Plan:
    plan = as_object(parse_json(text, "it"), "it")
    check_canonical(text, plan, "it")
    unknown = plan.keys() - {"activations", "aliases", "coder", "inputs", "recipes", "tensors"}
    if unknown or not all(plan.values()):
        raise CorruptArtifact(f"it has unknown or empty keys; found {', '.join(plan)}")
    coder = plan.get("coder", default_coder)
    if not isinstance(coder, str) or coder not in CODERS or plan.get("coder") == default_coder:
        raise CorruptArtifact(f"the coder {coder!r} is unknown, or the default one, which is never named")
    tensors = as_object(plan.get("tensors", {}), "tensors")
    if not all(isinstance(claim, list) and len(claim) == 2 for claim in tensors.values()):
        raise CorruptArtifact("a tensor is not [shape, recipe number]")
    if {INPUTS, METADATA} & tensors.keys():
        raise CorruptArtifact(f"{INPUTS} can only hold the side tensors of inputs, {METADATA} no tensor at all")
    types = {name: claim[1] for name, claim in tensors.items() if dense and isinstance(claim[1], str)}
    if unknown := sorted(set(types.values()) - DTYPES.keys()):
        raise CorruptArtifact(f"the type {unknown[0][:80]!r} is none of {', '.join(DTYPES)}")
    recipe_numbers = {name: claim[1] for name, claim in tensors.items() if name not in types}
    recipes = _look_up(plan.get("recipes", []), recipe_from_json, recipe_to_json, recipe_numbers)
    inputs = as_object(plan.get("inputs", {}), "inputs")
    aliases = as_object(plan.get("aliases", {}), "aliases")
    if not all(isinstance(name, str) for name in aliases.values()):
        raise CorruptArtifact("an alias is not a name")
    return Plan(
        {name: (as_shape(tensors[name][0]), recipe) for name, recipe in recipes.items()},
        {name: (as_shape(tensors[name][0]), dtype) for name, dtype in types.items()},
        _look_up(plan.get("activations", []), Activation.from_json, Activation.to_json, inputs),
        aliases,
        CODERS[coder],
    )


def check_aliases(plan: Plan, stored: Mapping[str, object]) -> None:
    """Raise `CorruptArtifact` unless aliases name stored tensors and hide none."""
    for alias, name in plan.aliases.items():
        if alias in stored or name not in stored or INPUTS in (alias, name) or alias == METADATA:
            raise CorruptArtifact(f"the alias {alias!r} of {name!r} is not a new name for a stored tensor")


def _numbered(values: Mapping[str, _T], to_json: Callable[[_T], Any]) -> tuple[list[Any], dict[str, int]]:
    """The different values in the order of their first use, and each name's place among them."""
    numbers: dict[_T, int] = {}
    places = {name: numbers.setdefault(value, len(numbers)) for name, value in values.items()}
    return [to_json(value) for value in numbers], places


def _look_up(
    table: Any, parse: Callable[[Any], _T], to_json: Callable[[_T], Any], numbers: Mapping[str, Any]
) -> dict[str, _T]:
    """What each name's number stands for in a table of recipes or activations."""
    if not isinstance(table, list) or any(type(number) is not int for number in numbers.values()):
        raise CorruptArtifact("recipes and activations are not lists that names refer to by number")
    text = canonical(table)
    parsed = [parse(value) for value in table]
    if canonical([to_json(value) for value in parsed]) != text:
        raise CorruptArtifact("a recipe or activation is not in its shortest form")
    if list(dict.fromkeys(numbers.values())) != list(range(len(table))) or len(set(parsed)) != len(parsed):
        raise CorruptArtifact("recipes and activations are not listed once each, in the order of first use")
    return {name: parsed[number] for name, number in numbers.items()}


# -- tensors and streams -----------------------------------------------------------------------


def is_coded(tensor: Quantized | Tensor) -> bool:
    """Whether a tensor becomes code streams; a float type's bit patterns are the dense tensor itself."""
    return isinstance(tensor, Quantized) and not isinstance(tensor.recipe, Float)


def float_type(recipe: Float) -> str:
    """The type under which a tensor stored by a float recipe is an entry."""
    return _NAMES[recipe.torch_dtype]


def dense_type(name: str, tensor: Quantized | Tensor) -> str:
    """The type under which a tensor that is not coded is stored; raises `PlanError` where there is none."""
    if isinstance(tensor, Quantized):
        assert isinstance(tensor.recipe, Float)
        return float_type(tensor.recipe)
    if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
        raise PlanError(f"{name}: {tensor.dtype}, {tensor.layout} cannot be stored; use strided {known}")
    return _NAMES[tensor.dtype]


def dense_bytes(tensor: Quantized | Tensor) -> bytes:
    """The bytes of a tensor that is not coded, in reading order, little-endian."""
    if isinstance(tensor, Quantized):
        return Fixed().encode(list(tensor.streams()))  # 16 and 32 bits pack to what the float type itself is
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def streams_of(name: str, tensor: Quantized) -> list[Stream]:
    """All code streams of a tensor; raises `PlanError` where its recipe does not describe them."""
    streams = list(tensor.streams())
    if [stream.spec for stream in streams] != list(stream_specs(tensor.recipe, tensor.shape)):
        raise PlanError(f"{name}: {tensor.recipe!r} does not describe its side tensors as they are stored")
    return streams


def input_streams(artifact: Artifact) -> list[Stream]:
    """The code streams of all inputs, by module name."""
    inputs = [quantized for _, quantized in sorted(artifact.inputs.items())]
    return [stream for i in inputs for side in i.side.values() for stream in side.streams()]


class Room:
    """How many elements a file may still claim."""

    def __init__(self, limit: int):
        self.limit = self.left = limit

    def take(self, shape: Sequence[int]) -> None:
        """Count a tensor of `shape`; an empty one counts its other axes, which work may loop over."""
        self.left -= math.prod(max(n, 1) for n in shape)
        if self.left < 0:
            raise CorruptArtifact(
                f"the file claims more than {self.limit} elements; if you trust it, raise max_elements"
            )


def coded_tensors(plan: Plan, room: Room) -> list[Coded]:
    """All coded tensors with their streams, by name."""
    return [
        Coded(name, shape, recipe, list(_parts(name, recipe, shape, room)))
        for name, (shape, recipe) in plan.coded.items()
    ]


def input_parts(plan: Plan, room: Room) -> list[Part]:
    """The streams of all inputs, by module name."""
    return [
        part
        for module, activation in plan.activations.items()
        for name, child in input_children(activation).items()
        for part in _parts(module, child.recipe, child.shape, room, f"input.{name}.")
    ]


def _parts(owner: str, recipe: Quantizer, shape: Shape, room: Room, prefix: str = "") -> Iterator[Part]:
    """The code streams of a tensor, as in `stream_specs`; counts what decoding them will allocate."""
    with about(owner):
        if isinstance(recipe, Float) and not prefix:
            raise CorruptArtifact("a float tensor is stored as such, never as codes")
        room.take(shape)
        for grid in recipe.grids(shape):
            room.take((grid.R, grid.r, grid.C, grid.c))
        children = recipe.children(shape)
    for name, child in children.items():
        yield from _parts(owner, child.recipe, child.shape, room, f"{prefix}{name}.")
    with about(owner):
        for spec in recipe.layout(shape):
            room.take(spec.grid)
            yield Part(owner, spec._replace(name=prefix + spec.name), recipe, shape)


# -- JSON --------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """The one JSON text of a value."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return text.encode()


def check_canonical(text: bytes, value: Any, what: str) -> None:
    """Raise `CorruptArtifact` unless `text` is the one text of `value`."""
    try:
        same = canonical(value) == text
    except (ValueError, RecursionError):  # half a surrogate pair, infinity; nested almost too deeply
        same = False
    if not same:
        raise CorruptArtifact(f"{what} is not canonical JSON: keys sorted, no spaces, no needless escapes")


def parse_json(text: bytes, what: str) -> Any:
    """The value of a JSON text; raises `CorruptArtifact` for what is none, and for claims of any size in it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise CorruptArtifact(f"{what} has a key twice")
        return value

    def whole(digits: str) -> int:
        if len(digits) > 18:  # so that no product or message has to cope with numbers of any size
            raise CorruptArtifact(f"{what} has a number of {len(digits)} digits; 18 are allowed")
        return int(digits)

    try:
        return json.loads(text.decode(), object_pairs_hook=unique, parse_int=whole)
    except CorruptArtifact:
        raise
    except RecursionError:
        raise CorruptArtifact(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise CorruptArtifact(f"{what} is not JSON in UTF-8: {error}") from None


def as_object(value: Any, what: str) -> dict[str, Any]:
    """`value`, if it is a JSON object."""
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{what} is not a JSON object")
    return value


def as_shape(value: Any) -> Shape:
    """`value` as a shape, if it is a list of a few whole numbers."""
    if not isinstance(value, list) or len(value) > _MOST_AXES or any(type(n) is not int or n < 0 for n in value):
        raise CorruptArtifact(f"{str(value)[:80]} is not a shape: at most {_MOST_AXES} whole numbers in a list")
    return tuple(value)


def read_claims(index: Mapping[str, Any]) -> dict[str, Claim]:
    """What a safetensors header says of each tensor; raises `CorruptArtifact` for what is no such thing."""
    claims = {}
    for name, claim in index.items():
        with about(name):
            if not isinstance(claim, dict) or claim.keys() != {"data_offsets", "dtype", "shape"}:
                raise CorruptArtifact("its entry does not have 'data_offsets', 'dtype', 'shape' and no others")
            if not isinstance(claim["dtype"], str) or claim["dtype"] not in DTYPES:
                raise CorruptArtifact(f"its type {str(claim['dtype'])[:80]!r} is none of {', '.join(DTYPES)}")
            claims[name] = Claim(claim["dtype"], as_shape(claim["shape"]), claim["data_offsets"])
    return claims


@contextmanager
def about(name: object) -> Iterator[None]:
    """Say what an error is about; a recipe that does not fit its tensor is the file's fault here."""
    try:
        yield
    except (CorruptArtifact, PlanError) as error:
        raise CorruptArtifact(f"{name}: {error}") from None
