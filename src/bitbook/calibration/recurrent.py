"""What the weights of recurrent layers are multiplied with: inputs, and the hidden states before each step.

torch runs all layers and directions in one call, of which only the last layer's outputs come back.  So each layer is
run on its own, with the same weights; its outputs, shifted by one step, are the hidden states that it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

LAYERS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)


class _Weights(NamedTuple):
    """The weights of one direction of one layer."""

    of_inputs: Tensor
    of_hidden: Tensor
    biases: Sequence[Tensor]
    projection: Tensor | None


class _Layer(NamedTuple):
    """How one layer is run."""

    function: Callable[..., Any]
    lengths: Int[Tensor, " batch"] | None  # of the sequences, where they are packed

    def __call__(
        self,
        x: Float[Tensor, "time batch inputs"],
        initial: tuple[Float[Tensor, "directions batch _"], ...],
        weights: list[Tensor],
        biased: bool,
        directions: int,
    ) -> Float[Tensor, "time batch outputs"]:
        hidden = initial if self.function is torch.lstm else initial[0]
        rest = (hidden, weights, biased, 1, 0.0, False, directions == 2)
        if self.lengths is None:
            return self.function(x, *rest, False)[0]
        packed = pack_padded_sequence(x, self.lengths)
        data = self.function(packed.data, packed.batch_sizes, *rest)[0]
        return pad_packed_sequence(PackedSequence(data, packed.batch_sizes))[0]


def of_cell(
    x: Tensor, hidden: Tensor | tuple[Tensor, Tensor], of_inputs: Tensor, of_hidden: Tensor, *_: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight of one step with the vectors that it is multiplied with, `(…, cols)`."""
    yield of_inputs, x
    yield of_hidden, hidden if isinstance(hidden, Tensor) else hidden[0]


def of_layers(function: Callable[..., Any], *args: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight of a call of one of `LAYERS` with the vectors that it is multiplied with, `(places, cols)`.

    Padding of packed sequences counts nowhere.  A layer is run only when the one after it is asked for.
    """
    packed = isinstance(args[3], list | tuple)
    if packed:
        data, sizes, hidden, flat, biased, count, _, _, both = args
        x, lengths = pad_packed_sequence(PackedSequence(data, sizes))
    else:
        x, hidden, flat, biased, count, _, _, both, batch_first = args
        x, lengths = x.transpose(0, 1) if batch_first else x, None
    initial = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
    directions = 2 if both else 1
    layer = _Layer(function, lengths)
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if lengths is not None:
        valid = torch.arange(len(x))[:, None] < lengths[None]
        valid = valid.to(x.device)
    each = len(flat) // (count * directions)
    for i in range(count):
        own = list(flat[i * directions * each : (i + 1) * directions * each])
        ways = [_unpacked(own[d * each : (d + 1) * each], biased) for d in range(directions)]
        for weights in ways:
            yield weights.of_inputs, x[valid]
        states = tuple(state[i * directions : (i + 1) * directions] for state in initial)
        outputs = layer(x, states, own, biased, directions)
        for d, (weights, out) in enumerate(zip(ways, outputs.chunk(directions, 2), strict=True)):
            before = _before(out, states[0][d], valid, backwards=d == 1)
            yield weights.of_hidden, before[valid]
            if weights.projection is not None:
                yield weights.projection, _unprojected(x, before, states[1][d], weights, valid, backwards=d == 1)[valid]
        x = outputs


def _unpacked(weights: list[Tensor], biased: bool) -> _Weights:
    biases = weights[2:4] if biased else []
    left = weights[2 + len(biases) :]
    return _Weights(weights[0], weights[1], biases, left[0] if left else None)


def _before(
    outputs: Float[Tensor, "time batch hidden"],
    first: Float[Tensor, "batch hidden"],
    valid: Bool[Tensor, "time batch"],
    *,
    backwards: bool,
) -> Float[Tensor, "time batch hidden"]:
    """The hidden state before each step: the outputs of the step that was taken before it."""
    if not backwards:
        return torch.cat([first[None], outputs[:-1]])
    later = torch.cat([outputs[1:], first[None]])
    follows = torch.cat([valid[1:], torch.zeros_like(valid[:1])])
    return torch.where(follows[..., None], later, first[None])


def _unprojected(
    x: Tensor, before: Tensor, cell: Tensor, weights: _Weights, valid: Bool[Tensor, "time batch"], *, backwards: bool
) -> Float[Tensor, "time batch cells"]:
    """An LSTM's `o · tanh(c)`, which its projection makes hidden states of: all gates at once, then c step by step."""
    gates = x @ weights.of_inputs.mT + before @ weights.of_hidden.mT + sum(weights.biases)
    enters, stays, new, leaves = gates.chunk(4, 2)
    values = torch.empty_like(leaves)
    for t in reversed(range(len(x))) if backwards else range(len(x)):
        moved = stays[t].sigmoid() * cell + enters[t].sigmoid() * new[t].tanh()
        cell = torch.where(valid[t][:, None], moved, cell)
        values[t] = leaves[t].sigmoid() * cell.tanh()
    return values
