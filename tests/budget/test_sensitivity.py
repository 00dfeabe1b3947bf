"""What rows that inputs choose matter, also those that the calibration inputs do not choose."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitbook.budget.sensitivity import chosen_once_more, measure
from bitbook.calibration.fisher import fisher_diagonal


class Words(nn.Module):
    """Predicts from one word; the output layer is the embedding once more, if tied."""

    def __init__(self, words: int, tied: bool) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(words, 4), nn.Linear(4, words, bias=False)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(F.silu(self.words(tokens)))


@given(st.lists(st.integers(0, 100), min_size=2, max_size=20), st.integers(1, 4), st.integers(0, 1000))
def test_a_row_is_chosen_once_more_than_it_was(chosen: list[int], columns: int, seed: int) -> None:
    choices = torch.tensor(chosen).double()
    each = torch.rand(columns, generator=torch.Generator().manual_seed(seed)).double()
    found = chosen_once_more((choices[:, None] * each).float(), choices).double()
    expected = (choices[:, None] + 1) * each * (1 if any(chosen) else 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 1000))
def test_what_a_row_is_given_vanishes_as_choices_grow(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fisher = torch.rand(6, 3, generator=generator) + 0.1
    choices = torch.randint(1, 9, (6,), generator=generator).double()
    for many in (1.0, 1e2, 1e4):  # as many times the inputs, and the same information per prediction
        change = chosen_once_more(fisher, many * choices) - fisher
        torch.testing.assert_close(change, (fisher.sum(0) / choices.sum() / many).expand(6, 3), rtol=0.01, atol=1e-6)


def test_rows_of_an_embedding_that_no_input_chooses_matter_as_much_as_one_choice() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 10, (300, 5))  # of 20 words
    for tied in (False, True):
        model = Words(20, tied).eval()
        found, _ = measure(model, tokens, ["words.weight"])
        rows = found["words.weight"].fisher.sum(1)
        used = float(rows[:10].mean())
        assert float(rows[10:].min()) > 0.9 * used / 151  # as each of the ten is chosen 150 times
        if not tied:
            torch.testing.assert_close(rows[10:], rows[10:].mean().expand(10))
            assert float(rows[10:].mean()) < 1.1 * used / 151


def test_the_information_of_other_weights_stays_as_it_was_measured() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (300, 5))
    model = Words(20, tied=False).eval()
    measured = fisher_diagonal(model, tokens)
    found, _ = measure(model, tokens, ["words.weight", "out.weight"])
    assert torch.equal(found["out.weight"].fisher, measured["out.weight"])
    assert bool((found["words.weight"].fisher > measured["words.weight"]).all())
