"""Hugging Face transformers: quantized models that `save_pretrained` writes and `from_pretrained` reads.

    model, artifact ──pack_──► parameters, each with a buffer of bytes ──save_pretrained──► folder
    folder ──from_pretrained──► buffers of bytes ──decode──► parameters

Importing this module registers the method "bitbook".  The uint8 buffer `weight_packed` is a whole bitbook file that
holds the one tensor `weight`, so that each carries its recipe, its coder and a checksum; the parameter itself is left
out of the state dict.  `config.json` says how long the buffers are, which a loader has to know beforehand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitbook.apply import dequantize_, freeze, quantize_, restore
from bitbook.artifact import Artifact, from_bytes, to_bytes
from bitbook.artifact.contents import CODERS, about
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.rans import Rans
from bitbook.errors import CorruptArtifact, ModelMismatch, PlanError, needs
from bitbook.inputs import CHILD, InputQuantizer, put_before
from bitbook.plan import Plan
from bitbook.quantizer import Quantized

with needs("transformers", extra="transformers"):
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

M = TypeVar("M", bound=nn.Module)

METHOD = "bitbook"
PACKED = "_packed"
"""What a buffer's name has behind the name of what it holds: a parameter, or the quantizer of a module's input."""

_SMALL = 1_000_000  # weights up to which the adaptive coders take seconds, not minutes


def pack_(model: M, artifact: Artifact | None = None, coder: Coder | None = None) -> M:
    """Give `model` the values of an artifact, in place, and the bytes that `model.save_pretrained` is to write.

    Packed parameters no longer require gradients: what is saved of them are their bytes.

    Args:
        model: a `PreTrainedModel`.
        artifact: what it was compressed to; None: `freeze(model)`, of a model that `quantize_` quantized.
        coder: of the bytes; None: "Smallest" for fewer than 10^6 quantized weights, else "Rans".

    Returns the model.  Raises `ModelMismatch` where names or shapes differ, and `PlanError` where a name is taken.
    """
    artifact = freeze(model) if artifact is None else artifact
    dequantize_(model)
    restore(artifact, unpack_(model))
    quantized = {name: tensor for name, tensor in artifact.tensors.items() if isinstance(tensor, Quantized)}
    coder = coder or (Smallest() if sum(math.prod(t.shape) for t in quantized.values()) < _SMALL else Rans())
    contents = {name: Artifact({name.rpartition(".")[2]: tensor}) for name, tensor in quantized.items()}
    contents |= {f"{name}.{CHILD}": Artifact({}, {CHILD: how}) for name, how in artifact.inputs.items()}
    config = BitbookConfig()
    for name, content in contents.items():
        place = _place(model, name)
        if place is None:
            continue  # a buffer, such as a mean of batch normalisation: small, and saved as it decodes
        data = bytearray(to_bytes(content, coder)[0])
        _put(*place, torch.frombuffer(data, dtype=torch.uint8))
        config.tensors[name] = len(data)
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
    stored = freeze(model)
    tensors = {name: tensor for name, tensor in stored.tensors.items() if not name.endswith(PACKED)}
    for name, module, attribute in _packed(model):
        if attribute != CHILD:
            tensors[stored.aliases.get(name, name)] = _unchanged(name, module, attribute)
    return Artifact(tensors, stored.inputs, stored.aliases)


class BitbookConfig(QuantizationConfigMixin):
    """What `config.json` says, and how `from_pretrained(…, quantization_config=BitbookConfig(plan))` quantizes floats.

    Args:
        plan: how a float model is quantized once it is loaded; None for one that is packed already.
        coder: its bytes' coder, by name, see `pack_`.
        tensors: the length of each buffer, by the name of what it holds.
    """

    def __init__(
        self,
        plan: Plan | Mapping[str, Any] | None = None,
        coder: str | None = None,
        tensors: Mapping[str, int] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if coder is not None and coder not in CODERS:
            raise PlanError(f"no coder {coder!r}; there are {', '.join(CODERS)}")
        if unknown:
            raise CorruptArtifact(f"config.json: quantization_config has the unknown keys {', '.join(unknown)}")
        for name, size in (tensors or {}).items():
            if type(size) is not int or size < 0:
                raise CorruptArtifact(f"config.json: {name} is said to have {size!r:.80} bytes")
        self.quant_method = quant_method  # type: ignore
        self.plan = plan.to_json() if isinstance(plan, Plan) else plan
        self.coder = coder
        self.tensors = dict(tensors or {})

    def to_dict(self) -> dict[str, Any]:
        """What is not empty, as JSON."""
        return {name: value for name, value in super().to_dict().items() if value}


class BitbookQuantizer(HfQuantizer):
    """Makes room for the buffers before weights are loaded, and decodes them afterwards."""

    model: nn.Module
    quantization_config: Any

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map by which weights would be decoded elsewhere than where they are used."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise PlanError(
                f"device_map={sorted(places)} offloads modules, but packed weights are decoded once, where they are "
                "used; take one device or several GPUs"
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
            return pack_(model, coder=CODERS[config.coder] if config.coder else None)
        for name, module, attribute in _packed(model):
            content = _read(name, module, attribute)
            if attribute == CHILD:
                quantizer = InputQuantizer(content.inputs[CHILD].activation)
                quantizer.stored = dict(content.inputs[CHILD].side)
                put_before(module, quantizer)
                continue
            old, data = module._parameters[attribute], module._buffers[attribute + PACKED]
            assert old is not None
            assert data is not None
            value = content.decode(attribute)
            if value.shape != old.shape:
                raise ModelMismatch(f"{name}: {tuple(value.shape)} in the folder, {tuple(old.shape)} in the model")
            _replace(model, old, value.to(old.dtype).to(data.device))
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


def _leave_out(model: nn.Module) -> None:
    """Let the state dict lack what buffers hold, under every name of a tied parameter."""
    places = _places(model)
    for _, module, attribute in list(_packed(model)):
        if attribute == CHILD:
            child = module._modules.get(CHILD)
            left_out = [] if child is None else [(child, name) for name in child._buffers]
        else:
            parameter = module._parameters[attribute]
            assert parameter is not None
            parameter.requires_grad_(False)
            left_out = places[id(parameter)]
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


def _places(model: nn.Module) -> Mapping[int, list[tuple[nn.Module, str]]]:
    """Every place of each parameter, by its id."""
    places = defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            places[id(parameter)].append((module, attribute))
    return places


def _put(module: nn.Module, attribute: str, data: Tensor) -> None:
    if hasattr(module, attribute + PACKED):
        raise PlanError(f"{type(module).__name__} has an attribute {attribute + PACKED!r} already; rename it")
    module.register_buffer(attribute + PACKED, data)


def _replace(model: nn.Module, old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Put a value in all places of a parameter, which stays tied."""
    new = nn.Parameter(value, requires_grad=False)
    for module, attribute in _places(model)[id(old)]:
        module._parameters[attribute] = new
    return new


def _read(name: str, module: nn.Module, attribute: str) -> Artifact:
    """What a buffer holds; raises `CorruptArtifact`."""
    data = module._buffers[attribute + PACKED]
    assert data is not None
    with about(name):
        content = from_bytes(data.cpu().numpy().data)
        if attribute not in (content.inputs if attribute == CHILD else content.tensors):
            held = ", ".join((*content.tensors, *content.inputs))
            raise CorruptArtifact(f"its bytes hold {held or 'nothing'} instead")
    return content


def _unchanged(name: str, module: nn.Module, attribute: str) -> Quantized | Tensor:
    """What a buffer holds, if the parameter beside it still is what it decodes to; raises `ModelMismatch`."""
    content = _read(name, module, attribute)
    parameter = module._parameters[attribute]
    assert parameter is not None
    if not torch.equal(content.decode(attribute).to(parameter.dtype), parameter.detach().cpu()):
        raise ModelMismatch(
            f"{name} was changed after it was packed, so that saving its bytes would lose the change; "
            "call pack_ with a new artifact, or unpack_ to save floats"
        )
    return content.tensors[attribute]
