"""torchao: `torchao.quantization.quantize_(model, BitbookConfig(plan))`.

Importing this module registers the handler.  torchao chooses modules, by default all linear layers, and hands them over
one by one, without their names; so the plan's patterns name what is inside of each: "weight", "bias".  What comes out
is what `bitbook.quantize_` gives: it can be trained on, and `bitbook.freeze` makes an artifact of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bitbook.apply import quantize_
from bitbook.errors import needs
from bitbook.inputs import InputQuantizer, put_before
from bitbook.plan import Plan
from bitbook.quantizer import FitOptions, Quantizer

with needs("torchao", extra="torchao"):
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler


@dataclass
class BitbookConfig(AOBaseConfig):
    """How each module that torchao chooses is quantized.

    Args:
        plan: one quantizer, of the weight; or a plan whose patterns name a module's own tensors.  Its `inputs`, such as
            `{"*": Uniform(8)}`, are for the input of the module itself.
        options: how side tensors are found.

    A weight that is tied to another module's is quantized in the one that was chosen, and then no longer tied, as with
    any of torchao's configurations: for those, `bitbook.quantize_` sees the whole model.
    """

    plan: Plan | Quantizer
    options: FitOptions = FitOptions()


@register_quantize_module_handler(BitbookConfig)
def _quantize_module(module: nn.Module, config: BitbookConfig) -> nn.Module:
    plan = Plan({"weight": config.plan}) if isinstance(config.plan, Quantizer) else config.plan
    quantize_(module, Plan(plan.weights), options=config.options)
    activation = plan.activations([""])[""]
    if activation is not None:
        put_before(module, InputQuantizer(activation))
    return module
