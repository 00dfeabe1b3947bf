"""What weights are multiplied with, of each kind of layer, against loops that are slow and obvious."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from bitbook import second_moments
from bitbook.calibration.importance import importance_of_rows, row_energies, survey
from bitbook.errors import PlanError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def assert_moments(found: Tensor, vectors: list[Tensor]) -> None:
    x = torch.stack(vectors).double()
    torch.testing.assert_close(found, (x.mT @ x / len(x))[None], rtol=1e-4, atol=1e-6)


# -- recurrent layers --------------------------------------------------------------------------
def cell_of(layer: nn.RNNBase) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """One step of a layer, by torch's cells where there is one, for a projected LSTM by hand."""

    def step(x: Tensor, state: list[Tensor], names: str) -> list[Tensor]:
        w_ih, w_hh, b_ih, b_hh = (
            getattr(layer, kind + names, None) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        if isinstance(layer, nn.GRU):
            return [torch.gru_cell(x[None], state[0][None], w_ih, w_hh, b_ih, b_hh)[0]]
        if isinstance(layer, nn.RNN):
            cell = torch.rnn_tanh_cell if layer.nonlinearity == "tanh" else torch.rnn_relu_cell
            return [cell(x[None], state[0][None], w_ih, w_hh, b_ih, b_hh)[0]]
        gates = w_ih @ x + w_hh @ state[0]
        if b_ih is not None:
            gates = gates + b_ih + b_hh
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        m = o.sigmoid() * c.tanh()
        projection = getattr(layer, "weight_hr" + names, None)
        return [m if projection is None else projection @ m, c, m]

    return step  # type: ignore[return-value]


def seen_by_loop(layer: nn.RNNBase, sequences: list[Tensor], initial: list[Tensor]) -> dict[str, list[Tensor]]:
    """Every vector that each weight is multiplied with, sequence by sequence, step by step.

    initial: of each state, (layers · directions, sequences, size).
    """
    seen: dict[str, list[Tensor]] = {}
    step, directions = cell_of(layer), 2 if layer.bidirectional else 1
    for n, x in enumerate(sequences):
        for i in range(layer.num_layers):
            outs = []
            for d in range(directions):
                names = f"_l{i}" + ("_reverse" if d else "")
                state = [value[i * directions + d, n] for value in initial]
                out = [Tensor()] * len(x)
                for t in reversed(range(len(x))) if d else range(len(x)):
                    seen.setdefault("weight_ih" + names, []).append(x[t])
                    seen.setdefault("weight_hh" + names, []).append(state[0])
                    state = step(x[t], state, names)  # type: ignore[assignment,arg-type]
                    if hasattr(layer, "weight_hr" + names):
                        seen.setdefault("weight_hr" + names, []).append(state[2])
                    out[t] = state[0]
                outs.append(torch.stack(out))
            x = torch.cat(outs, 1)
    return seen


RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "projected LSTM": lambda *a, **k: nn.LSTM(*a, **k, proj_size=2),
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, **k, nonlinearity="relu"),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", RECURRENT)
@given(
    layers=st.integers(1, 2),
    both=st.booleans(),
    first=st.booleans(),
    biased=st.booleans(),
    packed=st.booleans(),
    started=st.booleans(),
    seed=st.integers(0, 99),
)
def test_recurrent_layers(
    kind: str, layers: int, both: bool, first: bool, biased: bool, packed: bool, started: bool, seed: int
) -> None:
    make = RECURRENT[kind]
    layer = seeded(
        lambda: make(3, 4, layers, bidirectional=both, batch_first=first, bias=biased)  # type: ignore[return-value]
    )
    lengths = [5, 3, 3, 1] if packed else [4, 4]
    sequences = [noise(n, 3, seed=seed + i) for i, n in enumerate(lengths)]
    sizes = [layer.proj_size or 4] + ([4] if isinstance(layer, nn.LSTM) else [])
    many = layers * (2 if both else 1)
    initial = [noise(many, len(lengths), size, seed=i) * started for i, size in enumerate(sizes)]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: object) -> Tensor:
            return layer(x, tuple(initial) if len(initial) > 1 else initial[0])[0]

    x = pack_sequence(sequences) if packed else torch.stack(sequences, 0 if first else 1)
    found = second_moments(Whole(), [(x,)])
    with torch.no_grad():
        expected = seen_by_loop(layer, sequences, initial)  # type: ignore[arg-type]
    assert set(found) == {f"layer.{name}" for name in expected}
    for name, vectors in expected.items():
        assert_moments(found[f"layer.{name}"], vectors)


@pytest.mark.parametrize("make", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(make: type[nn.RNNCell]) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = make(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
                hidden.append(state[0] if isinstance(state, tuple) else state)
            return hidden[-1]

    hidden: list[Tensor] = []
    x = noise(6, 3, 3)
    found = second_moments(seeded(Loop), [x])
    before = [*torch.zeros(6, 4), *hidden[0], *hidden[1]]
    assert_moments(found["cell.weight_ih"], list(x.reshape(-1, 3)))
    assert_moments(found["cell.weight_hh"], before)


# -- attention ---------------------------------------------------------------------------------
class Attending(nn.Module):
    """Attention with the query, key and value that are asked for; also by explicit matrices."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        sizes = {"kdim": 3, "vdim": 5} if kind == "apart" else {}
        self.kind, self.attention = kind, nn.MultiheadAttention(4, 2, batch_first=True, **sizes)
        self.keys = noise(4, sizes.get("kdim", 4), seed=1)
        self.values = noise(4, sizes.get("vdim", 4), seed=2)

    def sees(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "self":
            return x, x, x
        x2 = x[:, :2]
        key, value = x2 @ self.keys, x2 @ self.values
        return (x, key, key) if self.kind == "cross" else (x, key, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(*self.sees(x), need_weights=False)[0]

    def heads(self, x: Tensor) -> Tensor:
        a, (q, k, v) = self.attention, self.sees(x)
        if a.in_proj_weight is None:
            ws = a.q_proj_weight, a.k_proj_weight, a.v_proj_weight
        else:
            ws = a.in_proj_weight.chunk(3)
        q, k, v = (x @ w.T for x, w in zip((q, k, v), ws, strict=True))
        out = [
            (qh @ kh.mT / 2**0.5).softmax(-1) @ vh
            for qh, kh, vh in zip(q.chunk(2, 2), k.chunk(2, 2), v.chunk(2, 2), strict=True)
        ]
        return torch.cat(out, 2)


@pytest.mark.parametrize("kind", ["self", "cross", "three", "apart"])
def test_attention(kind: str) -> None:
    model, x = seeded(lambda: Attending(kind)), noise(6, 3, 4)
    fast = torch.backends.mha.get_fastpath_enabled()
    found = second_moments(model, [x])
    assert torch.backends.mha.get_fastpath_enabled() == fast
    with torch.no_grad():
        assert_moments(found["attention.out_proj.weight"], list(model.heads(x).reshape(-1, 4)))
        sees = [part.reshape(-1, part.shape[-1]) for part in model.sees(x)]
    if kind == "self":
        assert_moments(found["attention.in_proj_weight"], list(sees[0]))
    elif kind == "apart":
        for name, part in zip("qkv", sees, strict=True):
            assert_moments(found[f"attention.{name}_proj_weight"], list(part))
    else:
        assert found["attention.in_proj_weight"].shape == (3, 4, 4)
        for share, part in zip(found["attention.in_proj_weight"], sees, strict=True):
            assert_moments(share[None], list(part))


def test_attention_shared_by_self_and_cross_attention() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            self.attention(x, x, x)
            self.attention(x, 2 * x, 3 * x)
            return self.attention(x, x, x)[0]

    x = noise(5, 3, 4)
    found = second_moments(seeded(Both), [x])["attention.in_proj_weight"]
    rows = x.reshape(-1, 4)
    for share, factor in zip(found, (1, 2, 3), strict=True):
        assert_moments(share[None], [*rows, *rows, *(factor * rows)])


def test_a_fused_encoder_is_seen_and_answers_as_before() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = noise(5, 3, 8)
    with torch.no_grad():
        before = model(x)
        found = second_moments(model, [x])
        assert torch.equal(model(x), before)
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert list(found) == [f"layers.{i}.{name}" for i in range(2) for name in names]


# -- inputs along the first axis ---------------------------------------------------------------
def test_rows_of_an_embedding_weigh_as_often_as_they_are_chosen() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    tokens = torch.tensor([[0, 1], [2, 1], [1, 1]])
    found = row_energies(model, tokens.split(1))["0.weight"]
    assert found.tolist() == pytest.approx([2 / 6, 5 / 6, 2 / 6, 1 / 6, 1 / 6])
    weights = importance_of_rows(found, (5, 4))
    assert weights.shape == (5, 4) and weights.mean() == pytest.approx(1) and weights.min() > 0
    assert torch.equal(row_energies(nn.EmbeddingBag(5, 4), [tokens])["weight"], found)
    with pytest.raises(PlanError, match="do not fit a weight"):
        importance_of_rows(found, (4, 5))
    rare = importance_of_rows(torch.tensor([1e9, 0.0], dtype=torch.float64), (2, 3))
    assert rare.min() == pytest.approx(1e-4)
    assert torch.equal(importance_of_rows(torch.zeros(2, dtype=torch.float64), (2, 3)), torch.ones(2, 3))


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_and_products_from_the_left(groups: int) -> None:
    x = noise(5, 4, 6, 6)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups)
    expected = x.double().square().mean((0, 2, 3))
    torch.testing.assert_close(row_energies(layer, [x])["weight"], expected)
    torch.testing.assert_close(row_energies(layer, [(x[0],)])["weight"], x[0].double().square().mean((1, 2)))
    with pytest.raises(PlanError, match="transposed convolution has its inputs along the first axis"):
        second_moments(layer, [x], ["weight"])

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(noise(3, 3, seed=i)) for i in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c @ torch.addmm(x[:3, :1], x, self.a).matmul(self.b)

    x = noise(3, 3)
    model = Product()
    found = row_energies(model, [x])
    torch.testing.assert_close(found["a"], x.double().square().mean(0))
    assert list(found) == ["a", "b"]
    with torch.no_grad():
        vectors = (torch.addmm(x[:3, :1], x, model.a) @ model.b).mT
    assert_moments(second_moments(model, [x])["c"], list(vectors))


# -- everything else is named ------------------------------------------------------------------
def test_reasons() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.Bilinear(4, 4, 3)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
            self.sliced = nn.Parameter(torch.randn(6, 4))
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert self.unused.weight.shape == (4, 4) and self.unused.weight.dtype == torch.float32
            return F.linear(self.normed(self.pairs(x, x)), self.sliced[:3])

    seen = survey(Odd(), [noise(5, 4)])
    assert seen.forwards == 1 and not seen.columns and not seen.rows
    assert "used by bilinear, where" in seen.others["pairs.weight"]
    assert "a vector" in seen.others["pairs.bias"]
    assert "remove_parametrizations" in seen.others["normed.parametrizations.weight.original1"]
    assert "used by __getitem__" in seen.others["sliced"]
    assert not any(name.startswith("unused") for name in seen.others)


def test_a_module_in_two_places_counts_both_uses() -> None:
    shared = nn.Linear(4, 4)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), noise(20, 4)
    with torch.no_grad():
        vectors = [*x, *shared(x).tanh()]
    found = second_moments(model, [x])
    assert list(found) == ["0.weight"]
    assert_moments(found["0.weight"], vectors)


def test_a_tied_embedding_is_measured_as_both() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens).tanh())

    model, tokens = seeded(Language), torch.arange(6)[None]
    seen = survey(model, [tokens])
    assert seen.columns == {"embedding.weight": 1} and list(seen.rows) == ["embedding.weight"]
    with torch.no_grad():
        assert_moments(second_moments(model, [tokens])["embedding.weight"], list(model.embedding.weight[:6].tanh()))


@pytest.mark.parametrize("flip", [lambda w: w.T, lambda w: w.mT, lambda w: w.t(), lambda w: w.transpose(0, 1)])
def test_a_product_with_the_transpose_is_that_of_a_linear_layer(flip: Callable[[Tensor], Tensor]) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.other = nn.Embedding(9, 4), nn.Parameter(noise(4, 4))

        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.addmm(tokens[:, :1].float(), self.embedding(tokens[:, 0]), flip(self.other))
            return x @ flip(self.embedding.weight)

    model, tokens = seeded(Head), torch.arange(6)[:, None]
    found = second_moments(model, [tokens])
    with torch.no_grad():
        x = model.embedding(tokens[:, 0])
        assert_moments(found["other"], list(x))
        assert_moments(found["embedding.weight"], list(tokens + x @ model.other.T))
