"""Hugging Face transformers: quantized models that `save_pretrained` writes and `from_pretrained` reads.

    model, artifact ──pack_──► parameters, each with a buffer of bytes ──save_pretrained──► folder
    folder ──from_pretrained──► buffers of bytes ──decode──► parameters                       resident="dense"
                                                 ──hold────► codes, and layers that compute from them    "packed"

Importing this module registers the method "bitbook".  The uint8 buffer `weight_packed` is a whole bitbook file that
holds the one tensor `weight`, so that each carries its recipe, its coder and a checksum; the parameter itself is left
out of the state dict.  `config.json` says how long the buffers are, which a loader has to know beforehand.

Loaders map files, so that the buffers of a loaded model are pages of the folder's files, not memory of their own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from bitbook.apply import Place, dequantize_, freeze, quantize_, quantize_inputs, restore
from bitbook.artifact import Artifact, QuantizedInput, from_bytes, to_bytes
from bitbook.artifact.contents import CODERS, about
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.rans import Rans
from bitbook.errors import CorruptArtifact, ModelMismatch, PlanError, needs
from bitbook.inputs import CHILD
from bitbook.plan import Plan
from bitbook.quantizer import Quantized
from bitbook.runtime.layers import CHILDREN, packed_tensors
from bitbook.runtime.packed import Packed
from bitbook.runtime.restore import Held, Unpacked, decode_, hold, put, set_residence

with needs("transformers", extra="transformers"):
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import FbgemmFp8Config

M = TypeVar("M", bound=nn.Module)

METHOD = "bitbook"
PACKED = "_packed"
"""What a buffer's name has behind the name of what it holds: a parameter, or the quantizer of a module's input."""

Resident = Literal["dense", "packed"]
"""How quantized parameters are held in memory, as `bitbook.load` has it."""

_SMALL = 1_000_000  # weights up to which the adaptive coders take seconds, not minutes


def pack_(model: M, artifact: Artifact | None = None, coder: Coder | None = None, resident: Resident = "dense") -> M:
    """Give `model` the values of an artifact, in place, and the bytes that `model.save_pretrained` is to write.

    Packed parameters no longer require gradients: what is saved of them are their bytes.

    Args:
        model: a `PreTrainedModel`.
        artifact: what it was compressed to; None: `freeze(model)`, of a model that `quantize_` quantized.
        coder: of the bytes; None: "Smallest" for fewer than 10^6 quantized weights, else "Rans".
        resident: "packed" lets the model compute from codes, see `BitbookConfig`.

    Returns the model.  Raises `ModelMismatch` where names or shapes differ, and `PlanError` where a name is taken.
    """
    config = BitbookConfig(resident=resident)
    artifact = freeze(model) if artifact is None else artifact
    restore(artifact, dequantize_(unpack_(model)))
    quantized = {name: tensor for name, tensor in artifact.tensors.items() if isinstance(tensor, Quantized)}
    coder = coder or (Smallest() if sum(math.prod(t.shape) for t in quantized.values()) < _SMALL else Rans())
    contents = {name: Artifact({name.rpartition(".")[2]: tensor}) for name, tensor in quantized.items()}
    contents |= {f"{name}.{CHILD}": Artifact({}, {CHILD: how}) for name, how in artifact.inputs.items()}
    for name, content in contents.items():
        place = _place(model, name)
        if place is None:
            continue  # a buffer, such as a mean of batch normalisation: small, and saved as it decodes
        data = bytearray(to_bytes(content, coder)[0])
        _put(*place, torch.frombuffer(data, dtype=torch.uint8))
        config.tensors[name] = len(data)
    if resident == "packed":
        _hold(dequantize_(model))
    _leave_out(model)
    quantizer = BitbookQuantizer(config)
    quantizer.model = model
    # What from_pretrained sets, too.
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD  # type: ignore
    model.config.quantization_config = config  # type: ignore
    return model


def unpack_(model: M) -> M:
    """Undo `pack_`, or what `from_pretrained` did, keeping the values: a float model, which is saved as floats.

    How inputs are quantized stays.  Returns the model.
    """
    if any(packed_tensors(module) for module in model.modules()):
        decode_(model).requires_grad_(True)
        del model.num_parameters
        quantize_inputs(
            {n: how for n, how in _inputs(model).items() if not hasattr(model.get_submodule(n), CHILD)}, model
        )
    for module in model.modules():
        for name in [name for name in module._buffers if name.endswith(PACKED)]:
            del module._buffers[name]
        for key, hook in list(module._state_dict_hooks.items()):
            if isinstance(hook, _LeftOut):
                del module._state_dict_hooks[key]
                for name in hook.names & module._parameters.keys():
                    getattr(module, name).requires_grad_(True)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, BitbookQuantizer):
        quantizer.remove_quantization_config(model)  # type: ignore
    return model


def to_artifact(model: nn.Module) -> Artifact:
    """What a packed model stands for, such as one that `from_pretrained` gave; `bitbook.save` makes one file of it.

    Raises `ModelMismatch` where a parameter was changed after it was packed.
    """
    tensors: dict[str, Quantized | Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _dense(model):
        if first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor.detach().clone()
        else:
            aliases[name] = first[id(tensor)]
    places = _places(model)
    for name, module, attribute in _packed(model):
        if attribute != CHILD:
            own, *others = places[id(_holder(module, attribute))]
            tensors[own.name] = _unchanged(name, module, attribute)
            aliases |= {other.name: own.name for other in others}
    return Artifact(tensors, _inputs(model), aliases)


class BitbookConfig(FbgemmFp8Config):
    """What `config.json` says, and how `from_pretrained(…, quantization_config=BitbookConfig(plan))` quantizes floats.

    For a folder that is packed already, transformers takes `resident` from such an argument, and warns that it takes
    nothing else.  It does so for a closed list of classes and what derives from them only, hence the base, the one of
    them that adds nothing else to `QuantizationConfigMixin`.

    Args:
        plan: how a float model is quantized once it is loaded; None for one that is packed already.
        coder: its bytes' coder, by name, see `pack_`.
        tensors: the length of each buffer, by the name of what it holds.
        resident: "dense" decodes all tensors once; "packed" keeps them as codes in memory, from which linear layers and
            embeddings compute, while others decode their weights as they run.  Such a model is for inference;
            `bitbook.residence(model)` says how each of its tensors is held.  Not written to `config.json`.
    """

    def __init__(
        self,
        plan: Plan | Mapping[str, Any] | None = None,
        coder: str | None = None,
        tensors: Mapping[str, int] | None = None,
        resident: Resident = "dense",
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if coder is not None and coder not in CODERS:
            raise PlanError(f"no coder {coder!r}; there are {', '.join(CODERS)}")
        if unknown:
            raise CorruptArtifact(f"config.json: quantization_config has the unknown keys {', '.join(unknown)}")
        if resident not in get_args(Resident):
            raise PlanError(f"resident={resident!r}: use 'dense' or 'packed'")
        for name, size in (tensors or {}).items():
            if type(size) is not int or size < 0:
                raise CorruptArtifact(f"config.json: {name} is said to have {size!r:.80} bytes")
        self.quant_method = quant_method  # type: ignore
        self.plan = plan.to_json() if isinstance(plan, Plan) else plan
        self.coder = coder
        self.tensors = dict(tensors or {})
        self.resident: Resident = resident

    def __repr__(self) -> str:
        return f"BitbookConfig({self.plan!r}, {self.coder!r}, {len(self.tensors)} tensors, {self.resident!r})"

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a load chooses, whatever the folder says."""
        return {"resident": self.resident}

    def to_dict(self) -> dict[str, Any]:
        """What is not empty, as JSON, but for how this process holds the model."""
        return {name: value for name, value in super().to_dict().items() if value and name != "resident"}


class BitbookQuantizer(HfQuantizer):
    """Makes room for the buffers before weights are loaded, and decodes them afterwards."""

    model: nn.Module
    quantization_config: Any

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map by which weights would be decoded elsewhere than where they are used."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if self.quantization_config.resident == "packed":
            self._refuse_several(places)
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise PlanError(
                f"device_map={sorted(places)} offloads modules, but packed weights are decoded once, where they are "
                "used; take one device or several GPUs"
            )

    def _refuse_several(self, places: set[str]) -> None:
        if len(places) > 1:
            raise PlanError(
                f"device_map={sorted(places)}: a model that is to compute from codes is held on one device; name that "
                "one, or load with resident='dense'"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        for name, size in self.quantization_config.tensors.items():
            place = _place(model, name)
            if place is None and name.startswith(f"{getattr(model, 'base_model_prefix', '')}."):
                raise ModelMismatch(
                    f"{name} is packed in the folder, but {type(model).__name__} has no such parameter; another "
                    "version of transformers may call it otherwise: load the folder with the one that saved it"
                )
            if place is None:
                continue  # of a head that this class does not have; the loader reports its keys as unexpected
            module, attribute = place
            _put(module, attribute, torch.empty(size, dtype=torch.uint8))
            if attribute != CHILD:
                # Not on "meta", from where no loader can move it; memory that nobody writes to costs nothing.
                old = module._parameters[attribute]
                assert old is not None
                room = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                _replace(model, old, room)._is_hf_initialized = True  # type: ignore
        _leave_out(model)

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            config = self.quantization_config
            quantize_(model, Plan.from_json(config.plan or {}))
            return pack_(model, None, CODERS[config.coder] if config.coder else None, config.resident)
        if self.quantization_config.resident == "packed":
            self._refuse_several({str(place) for place in getattr(model, "hf_device_map", {}).values()})
            _hold(model)
        else:
            for name, module, attribute in _packed(model):
                if attribute != CHILD:
                    old, device = module.get_parameter(attribute), module.get_buffer(attribute + PACKED).device
                    _replace(model, old, _read(name, module, attribute).decode(attribute).to(old.dtype).to(device))
            quantize_inputs(_inputs(model), model)
        _leave_out(model)
        self.model = model
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the model can be saved; raises `ModelMismatch` where that would lose a change of a parameter."""
        for name, module, attribute in _packed(self.model):
            if attribute != CHILD:
                _unchanged(name, module, attribute)
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed parameters are not; train before packing."""
        return False


register_quantization_config(METHOD)(BitbookConfig)
register_quantizer(METHOD)(BitbookQuantizer)


@dataclass
class _LeftOut:
    """A hook by which a module's state dict lacks some names."""

    names: set[str] = field(default_factory=set)

    def __call__(self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
        for name in self.names:
            state.pop(prefix + name, None)


@torch.no_grad()
def _hold(model: nn.Module) -> None:
    """Keep codes instead of the parameters that buffers hold, and note so for `residence`."""
    places, inputs, held, why_dense = _places(model), _inputs(model), [], {}
    for name, module, attribute in list(_packed(model)):
        if attribute == CHILD:
            continue
        old, device = module.get_parameter(attribute), module.get_buffer(attribute + PACKED).device
        stored = _read(name, module, attribute).tensors[attribute]
        value = hold(stored) if isinstance(stored, Quantized) else Unpacked(stored, "stored as floats")
        if isinstance(value, Unpacked):
            _replace(model, old, value.values.to(old.dtype).to(device))
            why_dense[name] = value.why
            continue
        value.dtype = old.dtype
        for place in places[id(old)]:
            how, why = put(place, value.to(device), inputs)
            tied = place is not places[id(old)][0]
            held.append(Held(place.name, how, why, 0 if tied else value.nbytes, 0 if tied else old.nbytes))
    quantize_inputs(inputs, model)
    model.requires_grad_(False)
    _leave_out(model)
    counted = set()
    for name, tensor in _dense(model):
        size = 0 if id(tensor) in counted else tensor.nbytes
        counted.add(id(tensor))
        held.append(Held(name, "dense", why_dense.get(name, "not quantized"), size, size))
    size = sum(module.get_buffer(attribute + PACKED).nbytes for _, module, attribute in _packed(model))
    model.num_parameters = _Counted(model)  # type: ignore
    why = "what save_pretrained writes; pages of the folder's files, where a loader mapped these"
    set_residence(model, [*held, Held(f"*{PACKED}", "bytes", why, size, 0)])


@dataclass
class _Counted:
    """A model's `num_parameters`, which the index of a folder's shards has, with those of which it holds codes."""

    model: Any

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = type(self.model).num_parameters(self.model, only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        held: dict[Packed, bool] = {}
        for module in self.model.modules():
            for tensor in packed_tensors(module).values():
                held.setdefault(tensor, isinstance(module, nn.Embedding) and exclude_embeddings)
        return count + sum(math.prod(tensor.shape) for tensor, excluded in held.items() if not excluded)


def _leave_out(model: nn.Module) -> None:
    """Let the state dict lack what buffers hold, under every name of a tied parameter."""
    places = _places(model)
    for _, module, attribute in list(_packed(model)):
        if attribute == CHILD:
            child = module._modules.get(CHILD)
            left_out = [] if child is None else [(child, name) for name in child._buffers]
        else:
            holder = _holder(module, attribute).requires_grad_(False)
            left_out = [(place.module, name) for place in places[id(holder)] for name in _state(place)]
        for owner, name in left_out:
            hooks = [hook for hook in owner._state_dict_hooks.values() if isinstance(hook, _LeftOut)]
            if not hooks:
                hooks = [_LeftOut()]
                owner.register_state_dict_post_hook(hooks[0])
            hooks[0].names.add(name)


def _packed(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The name of everything that a buffer holds, with its module and its name there."""
    for prefix, module in model.named_modules():
        for buffer in module._buffers:
            if buffer.endswith(PACKED):
                attribute = buffer.removesuffix(PACKED)
                yield f"{prefix}.{attribute}" if prefix else attribute, module, attribute


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module and the attribute of a name, which may be that of a model with a head where this has none."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        path, _, attribute = candidate.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if attribute == CHILD or module._parameters.get(attribute) is not None:
            return module, attribute
    return None


def _places(model: nn.Module) -> Mapping[int, list[Place]]:
    """Every place of each parameter, and of each packed tensor that stands in for one, by its id."""
    places = defaultdict(list)
    for path, module in model.named_modules():
        for attribute, holder in {**module._parameters, **packed_tensors(module)}.items():
            places[id(holder)].append(Place(f"{path}.{attribute}" if path else attribute, module, attribute))
    return places


def _holder(module: nn.Module, attribute: str) -> nn.Parameter | Packed:
    """The parameter, or the packed tensor in its place."""
    parameter = module._parameters.get(attribute)
    return packed_tensors(module)[attribute] if parameter is None else parameter


def _state(place: Place) -> list[str]:
    """What a module's state dict has of a parameter, or of the packed tensor in its place."""
    if place.attribute in place.module._parameters:
        return [place.attribute]
    return [name for name in place.module.state_dict() if name.partition(".")[0] in CHILDREN]


def _dense(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the state dict has beside the buffers."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.endswith(PACKED):
            yield name, tensor


def _inputs(model: nn.Module) -> dict[str, QuantizedInput]:
    """How inputs are quantized, by the names of their modules."""
    return {
        name.removesuffix(CHILD).removesuffix("."): _read(name, module, attribute).inputs[CHILD]
        for name, module, attribute in _packed(model)
        if attribute == CHILD
    }


def _put(module: nn.Module, attribute: str, data: Tensor) -> None:
    if hasattr(module, attribute + PACKED):
        raise PlanError(f"{type(module).__name__} has an attribute {attribute + PACKED!r} already; rename it")
    module.register_buffer(attribute + PACKED, data)


def _replace(model: nn.Module, old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Put a value in all places of a parameter, which stays tied."""
    new = nn.Parameter(value, requires_grad=False)
    for place in _places(model)[id(old)]:
        place.module._parameters[place.attribute] = new
    return new


def _read(name: str, module: nn.Module, attribute: str) -> Artifact:
    """What a buffer holds; raises `CorruptArtifact`, and `ModelMismatch` where the parameter has another shape."""
    with about(name):
        content = from_bytes(module.get_buffer(attribute + PACKED).cpu().numpy().data)
        if attribute not in (content.inputs if attribute == CHILD else content.tensors):
            held = ", ".join((*content.tensors, *content.inputs))
            raise CorruptArtifact(f"its bytes hold {held or 'nothing'} instead")
    parameter = module._parameters.get(attribute)
    if parameter is not None and content.tensors[attribute].shape != parameter.shape:
        shapes = tuple(content.tensors[attribute].shape), tuple(parameter.shape)
        raise ModelMismatch(f"{name}: {shapes[0]} in the folder, {shapes[1]} in the model")
    return content


def _unchanged(name: str, module: nn.Module, attribute: str) -> Quantized | Tensor:
    """What a buffer holds, if the parameter beside it still is what it decodes to; raises `ModelMismatch`."""
    content = _read(name, module, attribute)
    parameter = module._parameters.get(attribute)  # none, where the model computes from codes, which nothing changes
    if parameter is not None and not torch.equal(
        content.decode(attribute).to(parameter.dtype), parameter.detach().cpu()
    ):
        raise ModelMismatch(
            f"{name} was changed after it was packed, so that saving its bytes would lose the change; "
            "call pack_ with a new artifact, or unpack_ to save floats"
        )
    return content.tensors[attribute]
