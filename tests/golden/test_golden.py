"""Files of every released format are read as they were meant, for ever."""

from __future__ import annotations

import pytest
import torch
from tests.golden.make import HERE, golden

from bitbook.artifact import from_bytes, read, read_ledger, to_bytes

FILES = sorted(path.name for path in HERE.glob("*.safetensors"))


def test_all_files_are_known() -> None:
    assert set(FILES) == set(golden())


@pytest.mark.parametrize("file", golden())
def test_the_content_is_read(file: str) -> None:
    expected, found = golden()[file].artifact, read(HERE / file)
    want, got = expected.state_dict(), found.state_dict()
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name].to(want[name].dtype), want[name], rtol=0, atol=0, equal_nan=True)
    assert found.aliases == expected.aliases
    assert {m: i.activation for m, i in found.inputs.items()} == {m: i.activation for m, i in expected.inputs.items()}
    for module, quantized in expected.inputs.items():
        for name, side in quantized.side.items():
            assert torch.equal(found.inputs[module].side[name].decode(), side.decode())


@pytest.mark.parametrize("file", golden())
def test_the_same_content_gives_the_same_bytes(file: str) -> None:
    stored = (HERE / file).read_bytes()
    _, coder, layout = golden()[file]
    data, ledger = to_bytes(*golden()[file])
    assert data == stored
    assert to_bytes(from_bytes(stored), coder, layout)[0] == stored
    assert ledger == read_ledger(HERE / file)


@pytest.mark.parametrize("number", [1, 2])
def test_values_written_out(number: int) -> None:
    """The decoders' formulas, by hand: neither the content's own code nor the file decides what is right."""
    scalar, vector = (read(HERE / f"format{number}-{kind}.safetensors") for kind in ("scalar", "vector"))
    codes = torch.tensor([3, 10, 2, 9, 1])  # 3 + 7 i mod 15
    assert torch.equal(scalar.decode("fc1.weight")[0], (codes - 7) / 8)
    assert torch.equal(scalar.decode("decoder.weight"), scalar.decode("fc1.weight"))
    assert torch.equal(scalar.decode("sign.weight")[0], torch.tensor([1, -1, 1, -1, 2]) / 8)
    assert scalar.decode("steps").item() == 1000
    assert torch.equal(vector.decode("rows.weight"), torch.tensor([[4, 5, 6], [1, 2, 3]] * 3)[:5] / 8)
    assert torch.equal(vector.decode("shared.weight"), torch.tensor([[1], [2], [3]]).expand(3, 7) / 8)
