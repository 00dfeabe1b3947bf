"""Whether a convolution should compute from packed codes, or decode its weights in each call, as it does.

    python -m bench.convolutions [--bits 2 3 4] [--batches 1 64] [--seconds 0.5] [--threads 1]

The public ResNet-20, weights in `Uniform(bits, (1, -1))`: the whole network, and each different convolution alone, at
its own size of image.  Ways:

    floats     the convolution of weights that were decoded once, and fill memory
    decoded    what `load(…, resident="packed")` does: decoded in each call, then the same convolution
    unfolded   patches of the input as rows of a matrix, times the packed tensor as a linear layer has it

Times are medians of rounds in which all ways take turns, of the processor with one thread.  Data: BITBOOK_DATA with
models/.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from functools import partial

import torch
from bench.runtime import clock, interleaved
from torch import Tensor, nn
from torch.nn import functional as F

from bitbook import Plan, Uniform, compress
from bitbook.models import pretrained_resnet
from bitbook.runtime import restore_packed
from bitbook.runtime.layers import packed_tensors
from bitbook.runtime.packed import Packed


class Unfolded(nn.Module):
    """A convolution as a product with the packed weight."""

    def __init__(self, conv: nn.Conv2d, packed: Packed) -> None:
        super().__init__()
        self.packed, self.bias = packed, conv.bias
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        patches = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)  # (n, cols, places)
        n, cols, places = patches.shape
        y = self.packed.linear(patches.transpose(1, 2).reshape(n * places, cols), self.bias)
        height = (x.shape[2] + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        return y.reshape(n, places, -1).transpose(1, 2).reshape(n, -1, height, places // height)


def ways(bits: int) -> dict[str, nn.Module]:
    """The network in each way, all of the same weights."""
    model = pretrained_resnet(20)
    artifact = compress(model, Plan({"*conv*.weight": Uniform(bits, (1, -1))}))
    decoded = restore_packed(artifact, copy.deepcopy(model))
    unfolded = copy.deepcopy(decoded)
    for module in list(unfolded.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, Unfolded(child, packed_tensors(child)["weight"]))
    floats = copy.deepcopy(model)
    floats.load_state_dict(artifact.state_dict())
    return {"floats": floats, "decoded": decoded, "unfolded": unfolded}


def inputs(model: nn.Module, images: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Each convolution of another shape: its name, what it is, and its input."""
    seen: dict[str, tuple[str, Tensor]] = {}
    names = {module: name for name, module in model.named_modules()}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        (x,) = args
        size = " × ".join(map(str, x.shape[2:]))
        what = f"{module.in_channels} → {module.out_channels} channels, {size}, stride {module.stride[0]}"
        seen.setdefault(what, (names[module], x))

    hooks = [m.register_forward_pre_hook(see) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model(images)
    for hook in hooks:
        hook.remove()
    yield from ((name, what, x) for what, (name, x) in seen.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way of a layer and of the network")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {clock().__name__}; ms, and in units of floats\n")
    print("| bits | batch | convolution | floats | decoded | unfolded |\n|---:|---:|---|---:|---:|---:|")
    with torch.inference_mode():
        for bits in options.bits:
            models = ways(bits)
            for batch in options.batches:
                images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
                cases = [("", "the whole network", images), *inputs(models["floats"], images)]
                for name, what, x in cases:
                    modules = {way: model.get_submodule(name) for way, model in models.items()}
                    want = modules["floats"](x)
                    for way, module in modules.items():
                        gap = float((module(x) - want).abs().max() / want.abs().max())
                        assert gap < 1e-4, f"{way}, {what}: off by {gap:.1e}"
                    times = interleaved({way: partial(module, x) for way, module in modules.items()}, options.seconds)
                    taken = {way: 1e3 * statistics.median(own) for way, own in times.items()}
                    cells = (f"{own:.3f} ({own / taken['floats']:.2f})" for own in taken.values())
                    print(f"| {bits} | {batch} | {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
