"""Whether batch normalisations should be folded before weights are quantized, at equal bytes of whole files.

    python -m bench.fold [--steps 1.4 1 0.7 0.5] [--calibration 256] [--test 2000]

The public ResNet-20, `ECSQ()` with one step for all convolutions and the linear layer, error feedback, everything else
in bfloat16.  A variant is how the rows of a convolution share their scale with what follows it:

    apart      weights as they are, two vectors a normalisation (`absorb_statistics`)
    folded     `fold_`: one vector, the bias
    by layer   rows as folded, but each layer divided by the root mean square of its row scales
    by size    rows as folded, but each layer divided by the root mean square of its weights: steps relative to these
    taken out  rows divided by their root mean squares, which are stored: what a folded network could be un-folded to

The error is that of the logits on test images, over their variance.  Data: BITBOOK_DATA with cifar10/ and models/.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from bitbook import ECSQ, FitOptions, Float, Integer, Plan, compress, quantize_dense
from bitbook.apply import restore
from bitbook.artifact import to_bytes
from bitbook.data import load_cifar10
from bitbook.models import pretrained_resnet
from bitbook.surgery.batchnorm import absorb_statistics, fold_

DENSE = {"*.bias": Float("bfloat16")}
NORMS = {"*bn?.weight": Float("bfloat16"), "*.running_mean": Integer(1), "*.running_var": Integer(2)}


@torch.no_grad()
def scaled(model: nn.Module, by: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """Each row of a convolution multiplied by a number, and the normalisation after it divided by it."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.BatchNorm2d):
            weight = modules[name.replace("bn", "conv")].get_parameter("weight")
            factor = by(weight, module.weight)
            weight *= factor.reshape(-1, 1, 1, 1)
            module.weight.div_(factor)
    return model


VARIANTS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "apart": lambda model, _: model,
    "folded": lambda model, x: (fold_(model, x), model)[1],
    "by layer": lambda model, _: scaled(model, lambda w, scale: scale / scale.square().mean().sqrt()),
    "by size": lambda model, _: scaled(
        model, lambda w, scale: scale / (w * scale.reshape(-1, 1, 1, 1)).square().mean().sqrt()
    ),
    "taken out": lambda model, _: scaled(model, lambda w, scale: 1 / w.square().mean((1, 2, 3)).sqrt()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=float, nargs="+", default=[1.4, 1.0, 0.7, 0.5])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--test", type=int, default=2000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data, reference = load_cifar10(), pretrained_resnet(20).eval()
    chosen = torch.randperm(len(data.train_x), generator=Generator().manual_seed(0))[: asked.calibration]
    x, test, labels = data.train_x[chosen], data.test_x[: asked.test], data.test_y[: asked.test]
    with torch.no_grad():
        expected = reference(test)
    print(f"float: {float((expected.argmax(1) == labels).double().mean()):.4f}", flush=True)
    for name in asked.variants:
        absorb_statistics(model := copy.deepcopy(reference))
        model = VARIANTS[name](model, x)
        norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
        # Of the convolutions: the linear layer is the same in all variants.
        size = torch.cat([w.detach().flatten() for w in weights.values() if w.dim() > 2]).square().mean().sqrt()
        for step in asked.steps:
            began = time.time()
            artifact = compress(
                model,
                Plan(dict.fromkeys(weights, ECSQ())),
                options=FitOptions(step=step * float(size)),
                calibration=x,
            )
            artifact = quantize_dense(artifact, Plan({**DENSE, **(NORMS if norms else {})}))
            loaded = restore(artifact, copy.deepcopy(model)).eval()
            with torch.no_grad():
                found = loaded(test)
            error = float((found - expected).square().mean() / expected.var())
            right = float((found.argmax(1) == labels).double().mean())
            total = len(to_bytes(artifact)[0])
            print(
                f"{name:10} {step:5.2f} {total:7,} bytes  {error:.5f}  {right:.4f}  {time.time() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
