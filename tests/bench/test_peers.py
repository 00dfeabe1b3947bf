from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from bench.peers import __main__ as bench
from bench.peers import environments, report
from bench.peers.__main__ import Records, Row, measure, recorded
from bench.peers.catalogue import PEERS, Peer
from bench.peers.environments import shown
from bench.peers.job import Layers
from bench.peers.networks import NETWORKS, Network, checkpoint, put
from torch import nn

from bitbook.errors import DataError

FAKE = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {peers!r})
from job import Made, run

def compress(task):
    if task.setting.get("sleep"):
        time.sleep(60)
    if task.setting["bits"] == 1:
        raise ValueError("first line\\nno single bits in {root}/x")
    name = task.names(2)[0]
    assert task.network == "fake" and task.bits(name) == task.setting.get("ends", task.setting["bits"])
    (task.folder / "a").write_bytes(bytes(100 * task.setting["bits"]))
    (task.folder / "deep").mkdir()
    (task.folder / "deep" / "b").write_bytes(bytes(5))
    return Made({{n: w + 1 / task.setting["bits"] for n, w in task.weights.items()}}, [name])

run(compress)
"""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
        self.last.weight = self.first.weight
        nn.init.zeros_(self.first.weight)


def mean(model: nn.Module) -> float:
    return 100 - model.get_parameter("first.weight").mean().item()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network("fake", "%", (0.2, 0.3), ("first.weight",), Tied, mean)
    monkeypatch.setitem(NETWORKS, "fake", network)
    return network


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A tool that needs no environment."""
    text = FAKE.format(peers=str(Path(bench.__file__).parent), root=environments.ROOT)
    (tmp_path / "by_fake.py").write_text(text)
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "environment", lambda name, requirements: Path(sys.executable))
    return Peer("Fake", "fake", "1.0", (), {"fake": [{"bits": 8, "ends": 16}, {"bits": 4}, {"bits": 1}]})


def test_peers_are_measured_once(network: Network, peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept" / "results.jsonl"
    float_row, *rows = measure(network, [peer], Records(path), timeout=60)
    assert (float_row.tool, float_row.bytes, float_row.figure) == ("float32", 4 * 32, 100)
    assert [row.bytes for row in rows] == [805, 405, None]
    assert [row.figure for row in rows[:2]] == [100 - 1 / 8, 100 - 1 / 4]
    assert rows[0].share == 16 / 32
    assert rows[2].reason == "ValueError: no single bits in ./x"

    kept = Records(path)
    assert len(path.read_text().splitlines()) == len(kept.rows) == 3  # failures are tried again
    asked = []
    monkeypatch.setattr(bench, "run_program", lambda python, program, job, *_: asked.append(job.read_text()) or "gone")
    again = measure(network, [peer], kept, timeout=60)
    assert again[:3] == [float_row, *rows[:2]]
    assert again[3].reason == "gone"
    assert json.loads(asked[0])["settings"] == [{"bits": 1}]

    assert [row.reason for row in recorded(network, [peer], kept)] == ["", "", "", "not measured yet"]

    newer = peer._replace(version="1.1", settings={"fake": [{"bits": 4}]})
    assert measure(network, [newer], kept, timeout=60)[1].reason == "gone"  # another version is another tool
    assert measure(network, [peer._replace(settings={"fake": [{"bits": 4}]})], kept, timeout=60)[1].bytes == 405


def test_what_does_not_run_says_why(
    network: Network, peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "results.jsonl")
    slow = peer._replace(settings={"fake": [{"bits": 4, "sleep": True}]})
    assert measure(network, [slow], records, timeout=0.01)[1].reason == "not done after 0.01 seconds"
    monkeypatch.setattr(bench, "environment", lambda name, requirements: "it does not install: no wheel")
    assert measure(network, [peer], records, timeout=60)[1].reason == "it does not install: no wheel"

    def missing() -> nn.Module:
        raise DataError("set BITBOOK_DATA")

    rows = measure(network._replace(name="other", load=missing), [peer._replace(settings={"other": [{}]})], records, 60)
    assert [row.reason for row in rows] == ["no network: set BITBOOK_DATA"] * 2


def test_an_environment_shares_torch_and_says_what_pip_said(tmp_path: Path) -> None:
    found = environments.environment("none", ["--no-index", "no-such-tool==1"], tmp_path)
    assert isinstance(found, str)
    assert found.startswith("it does not install: ")
    assert "no-such-tool" in found
    (named,) = tmp_path.glob("none/lib/python*/site-packages/reused-torch.pth")
    assert Path(named.read_text().strip()) == Path(torch.__file__).parents[1]
    assert not (tmp_path / "none" / "installed").exists()


def test_errors_fit_into_a_document() -> None:
    assert shown(f"in {environments.ROOT}/bench:\n  {'x' * 300}") == f"in ./bench: {'x' * 188}"


def rows_of(*points: tuple[int, float]) -> list[Row]:
    return [Row("fake", "Fake", "1.0", {"bits": i}, size, 0.5, figure) for i, (size, figure) in enumerate(points)]


def test_the_smallest_file_that_loses_little_is_chosen(network: Network) -> None:
    rows = rows_of((500, 90.0), (300, 89.8), (200, 89.7), (100, 80.0))
    best = [report.smallest(network, rows, 90, loss) for loss in (0.1, 0.2, 0.3, 20)]
    assert [row and row.bytes for row in best] == [500, 300, 200, 100]
    assert report.smallest(network, rows[3:], 90, 1) is None
    nats = network._replace(unit="nats")
    best = report.smallest(nats, rows_of((500, 1.5), (300, 1.52), (200, 1.6)), 1.5, 0.02)
    assert best is not None
    assert best.bytes == 300


def test_documents(network: Network, tmp_path: Path) -> None:
    float_row = Row("fake", "float32", "", {}, 1000, 0.0, 90.0)
    absent = [Row("fake", "Absent", "2", {"bits": 3}, reason="it does not install: no wheel")]
    partly = [Row("fake", "Fake", "1.0", {"bits": 9}, reason="it broke")]
    rows = [float_row, *rows_of((500, 90.0), (300, 89.75)), *partly, *absent]
    newer = Row("fake", "Fake", "1.1", {"bits": 7}, 450, 0.5, 80.0)
    report.write({"fake": [*rows, newer]}, tmp_path)
    text = (tmp_path / "peers.md").read_text()
    assert "| Fake | 50.0 % | 500 (90.00) | 300 (89.75) |" in text
    assert "| Absent | – | not run: it does not install: no wheel | |" in text
    assert "- Fake, bits 9: not run: it broke" in text
    assert "Tools: Fake 1.0 and 1.1, Absent 2." in text
    assert "](peers-fake.svg)" in text
    assert (tmp_path / "peers-fake.svg").exists()
    with (tmp_path / "peers.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["bytes"] for line in lines] == ["1000", "500", "300", "", "", "450"]
    assert lines[2]["loss"] == "0.2500"
    assert lines[4]["reason"] == "it does not install: no wheel"


def test_tied_weights_travel_once_and_come_back() -> None:
    weights = checkpoint(Tied())
    assert list(weights) == ["first.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    model = put(Tied(), {name: w + 1 for name, w in weights.items()})
    assert torch.equal(model.get_parameter("last.weight"), torch.ones(4, 4))
    assert torch.equal(model.get_buffer("norm.running_var"), torch.full((4,), 2.0))


def test_tools_get_layers_with_the_names_of_the_weights() -> None:
    shapes = {"conv.weight": (2, 3, 1, 1), "a.b.weight": (4, 5), "a.b.bias": (4,), "a.norm.weight": (7,), "mean": (2,)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    layers = Layers(weights)
    state = layers.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], w) for name, w in weights.items())
    assert [list(y.shape) for y in layers(*layers.examples())] == [[1, 2, 1, 1], [1, 4]]


def test_grids_are_small_and_programs_exist() -> None:
    for peer in PEERS.values():
        assert (Path(bench.__file__).parent / f"by_{peer.program}.py").exists()
        assert set(peer.settings) == set(NETWORKS)
        assert all(0 < len(grid) <= (3 if name == "ResNet-44" else 6) for name, grid in peer.settings.items())
        assert peer.program == "bitbook" or any("==" in need for need in peer.requirements)
