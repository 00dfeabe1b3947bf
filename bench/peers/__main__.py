"""Peers side by side: the same public networks, the same test sets, real files.

    python -m bench.peers [--networks ResNet-20 …] [--peers NNCodec …] [--write docs/results] [--recorded]

    checkpoint ─► by_NAME.py, in .bench/NAME ─► files of the tool     ─► bytes
                                             └► dense.safetensors     ─► bitbook's evaluation

Each peer gets an environment of its own, which this program makes; one that does not install is a row that says why.
What was measured is kept in .bench/results.jsonl and not measured again.  BITBOOK_DATA names the folder of the data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench.peers import report
from bench.peers.catalogue import OWN, PEERS, Peer, Setting
from bench.peers.environments import ENVIRONMENTS, environment, last_line, own_variables, shown
from bench.peers.networks import NETWORKS, Network, checkpoint, put
from safetensors.torch import load_file, save_file

from bitbook.errors import BitbookError

HERE = Path(__file__).parent
FLOAT = "float32"


@dataclass(frozen=True)
class Row:
    """One setting of one tool on one network: what came out, or why nothing did."""

    network: str
    tool: str
    version: str
    setting: Setting
    bytes: int | None = None
    share: float | None = None
    """Of all numbers, those that the tool quantized."""
    figure: float | None = None
    """Percent of test images, or nats a token."""
    reason: str = ""

    @property
    def key(self) -> str:
        return json.dumps([self.network, self.tool, self.version, self.setting], sort_keys=True)


class Records:
    """The rows measured so far, a line of JSON each; failures are not kept, so that they are tried again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {row.key: row for row in (Row(**json.loads(line)) for line in lines)}

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def recorded(network: Network, peers: Sequence[Peer], records: Records) -> list[Row]:
    """All rows of a network, the float one first, as far as they are recorded."""
    return [records.rows.get(row.key) or _failed(row, "not measured yet") for row in _wanted(network, peers)]


def measure(network: Network, peers: Sequence[Peer], records: Records, timeout: float) -> list[Row]:
    """All rows of a network, the float one first; what is recorded is taken from there."""
    wanted = _wanted(network, peers)
    float_row = wanted[0]
    if all(row.key in records.rows for row in wanted):
        return [records.rows[row.key] for row in wanted]
    try:
        model = network.load()
        if float_row.key not in records.rows:
            weights = checkpoint(model)
            size = 4 * sum(w.numel() for w in weights.values())
            records.add(Row(network.name, FLOAT, "", {}, size, 0.0, network.measure(model)))
    except (BitbookError, AttributeError) as error:
        return [records.rows.get(row.key) or _failed(row, f"no network: {error}") for row in wanted]
    weights = {name: w.clone() for name, w in checkpoint(model).items()}
    found = [records.rows[float_row.key]]
    for peer in peers:
        rows = _rows(network, peer)
        missing = [row for row in rows if row.key not in records.rows]
        failures = {}
        for row, size, share, dense in _compressed(peer, network, weights, missing, timeout):
            if isinstance(dense, str):
                failures[row.key] = _failed(row, dense)
                print(f"{network.name}, {peer.name}, {report.setting_text(row.setting)}: {dense}", flush=True)
                continue
            figure = network.measure(put(model, dense))
            made = Row(row.network, row.tool, row.version, row.setting, size, share, figure)
            records.add(made)
            print(
                f"{network.name}, {peer.name}, {report.setting_text(row.setting)}: {size:,} bytes, "
                f"{figure:.4f} {network.unit}",
                flush=True,
            )
        found += [failures.get(row.key) or records.rows[row.key] for row in rows]
    return found


def _wanted(network: Network, peers: Sequence[Peer]) -> list[Row]:
    return [Row(network.name, FLOAT, "", {}), *(row for peer in peers for row in _rows(network, peer))]


def _rows(network: Network, peer: Peer) -> list[Row]:
    return [Row(network.name, peer.name, peer.version, setting) for setting in peer.settings[network.name]]


def _failed(row: Row, reason: str) -> Row:
    return Row(row.network, row.tool, row.version, row.setting, reason=shown(reason))


def _compressed(
    peer: Peer, network: Network, weights: Mapping[str, torch.Tensor], rows: Sequence[Row], timeout: float
) -> Iterator[tuple[Row, int, float, dict[str, torch.Tensor] | str]]:
    """For each row its bytes, the share of numbers quantized, and weights, or why there are none."""
    if not rows:
        return
    ours = peer.program == OWN
    python = Path(sys.executable) if ours else environment(peer.program, peer.requirements)
    if isinstance(python, str):
        yield from ((row, 0, 0.0, python) for row in rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        save_file(dict(weights), out / "checkpoint.safetensors")
        job: dict[str, Any] = {"checkpoint": str(out / "checkpoint.safetensors"), "out": folder}
        job |= {"network": network.name, "ends": network.ends, "settings": [row.setting for row in rows]}
        (out / "job.json").write_text(json.dumps(job))
        end = run_program(
            python, HERE / f"by_{peer.program}.py", out / "job.json", timeout, None if ours else own_variables()
        )
        for i, row in enumerate(rows):
            one = out / str(i)
            if (one / "done.json").exists():
                size = sum(path.stat().st_size for path in (one / "file").rglob("*") if path.is_file())
                share = json.loads((one / "done.json").read_text())["share"]
                yield row, size, share, load_file(one / "dense.safetensors")
            else:
                error = one / "error.txt"
                yield row, 0, 0.0, error.read_text() if error.exists() else end


def run_program(python: Path, program: Path, job: Path, timeout: float, variables: dict[str, str] | None) -> str:
    """Run a peer's program; returns why a setting without a result has none."""
    try:
        result = subprocess.run([python, program, job], capture_output=True, text=True, env=variables, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not done after {timeout:g} seconds"
    said = last_line(result.stderr) if result.returncode > 0 else ""  # what a signal ends says nothing of it
    return said or f"it ended with exit status {result.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="peers.md, peers.csv and figures")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for all settings of a peer on a network")
    parser.add_argument("--recorded", action="store_true", help="measure nothing, write what is recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = Records(ENVIRONMENTS / "results.jsonl")
    peers = [PEERS[name] for name in options.peers]
    rows = {
        name: recorded(NETWORKS[name], peers, records)
        if options.recorded
        else measure(NETWORKS[name], peers, records, options.timeout)
        for name in options.networks
    }
    for name, own in rows.items():
        print("\n".join([f"\n{name}", *report.table(NETWORKS[name], own)]))
    if options.write:
        report.write(rows, options.write)


if __name__ == "__main__":
    main()
