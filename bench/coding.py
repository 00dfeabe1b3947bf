"""The same codes through every coder: bytes, and symbols decoded per second.

    python -m bench.coding [FILES.npz ...] [--json PATH] [--write docs/results] [--epochs 3]

Each file holds integer matrices; all of a file's matrices are one group.  Without files, groups are made: the MLP
trained on MNIST for a few epochs at three prices of a bit (it needs BITBOOK_DATA), and a made-up sparse layer.

Peers get environments of their own in `.bench/`, which this program creates; one that does not install is left out, and
the table says why.  Speeds are symbols per second of processor time, decoding, one thread, after a call for warming up.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench.peers.environments import environment, last_line, own_variables
from bench.peers.timing import seconds

import bitbook
from bitbook import ECSQ, Plan, RateTraining
from bitbook.coding import fast
from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.context import Context
from bitbook.coding.rans import Rans
from bitbook.data import load_mnist
from bitbook.errors import DataError
from bitbook.models import build_model
from bitbook.quantizer import Quantized, Stream, StreamSpec

HERE = Path(__file__).parent
CODERS: Mapping[str, Coder] = {
    "Smallest": Smallest(),
    "Context small": Context("small"),
    "Context fast": Context("fast"),
    "Rans": Rans(),
}
PEERS: Mapping[str, Sequence[str]] = {
    "general": ("numpy==2.4.6", "constriction==0.5.0", "zstandard==0.25.0"),
    # The arithmetic coder wants numpy alone; the rest of NNCodec would bring torch and data sets.
    "deepcabac": ("numpy==1.26.4", "--no-deps", "nncodec==2.1.3"),
}
PRICES = (3e-6, 8e-6, 1.3e-5)
ENTROPY = "entropy, order 0"
CONDITIONAL = "entropy, fast's contexts"


class Result(NamedTuple):
    """One coder on one group."""

    group: str
    coder: str
    bytes: float
    symbols: int
    decode_symbols_per_second: float | None


# -- groups ------------------------------------------------------------------------------------


def made_up(rows: int = 128, side: int = 28, seed: int = 0) -> list[np.ndarray]:
    """A layer over an image: few non-zeros, most of them at the centre, magnitudes geometric."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    density = 0.12 * np.exp(-(x**2 + y**2) / (side / 4) ** 2).reshape(-1) * rng.gamma(1, 1, (rows, 1))
    nonzero = rng.random((rows, side * side)) < density
    size = rng.geometric(0.6, nonzero.shape)
    return [(nonzero * size * rng.choice([-1, 1], nonzero.shape)).astype(np.int32)]


def trained(lam: float, epochs: int) -> list[np.ndarray]:
    """The weight matrices of the MLP after a training with a price on bits, as integers."""
    mnist = load_mnist()
    plan = Plan({"*.weight": ECSQ(3)})
    data, training = (mnist.train_x, mnist.train_y), RateTraining(epochs=epochs)
    result = bitbook.train(build_model("mlp-784-128-64-10", seed=0), data, plan, lam=lam, training=training)
    coded = [q for _, q in sorted(result.artifact.tensors.items()) if isinstance(q, Quantized)]
    return [q.codes["codes"].numpy() for q in coded]


def groups(epochs: int) -> dict[str, list[np.ndarray]]:
    """What is measured where no files are named."""
    made = {"made up": made_up()}
    if "BITBOOK_DATA" not in os.environ:
        print("BITBOOK_DATA is not set: the made-up layer only, no trained ones")
        return made
    try:
        return {f"MLP, λ = {lam:g}": trained(lam, epochs) for lam in PRICES} | made
    except DataError as error:
        print(f"the made-up layer only, no trained ones: {error}")
        return made


# -- entropies ---------------------------------------------------------------------------------


def entropy(symbols: Counter) -> float:
    """Bytes of all symbols at their own frequencies."""
    counts = np.array(list(symbols.values()))
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def conditional_entropy(matrix: np.ndarray) -> float:
    """Bytes of the bits of `fast` (zero flag, sign, unary magnitude) at their own frequencies in each of its contexts.

    Contexts: of the zero flag, the classes of activity of row and column and whether the left and the upper neighbour
    are zero; of the sign, both neighbours' signs; of each unary bit, its place and the neighbours' mean magnitude, up
    to 3.  What is beyond 14 counts as plain Exp-Golomb.  Frequencies are free, which no coder's are.
    """
    contexts: dict[tuple[object, ...], Counter] = {}
    beyond = 0

    def count(bit: bool, *context: object) -> None:
        contexts.setdefault(context, Counter())[bit] += 1

    above, columns = [0] * matrix.shape[1], [512] * matrix.shape[1]
    for line in matrix.tolist():
        row, left = 512, 0
        for j, value in enumerate(line):
            up, column = above[j], columns[j]
            count(value != 0, "zero", fast._class(row), fast._class(column), left != 0, up != 0)
            row += (4096 - row) >> 5 if value else -(row >> 5)
            columns[j] += (4096 - column) >> 4 if value else -(column >> 4)
            if value:
                count(value < 0, "sign", np.sign(left), np.sign(up))
                near = min((abs(left) + abs(up) + 1) >> 1, 3)
                for k in range(1, min(abs(value) + 1, fast.UNARY)):
                    count(abs(value) > k, "size", k, near)
                if abs(value) >= fast.UNARY:
                    beyond += 2 * (abs(value) - fast.UNARY + 1).bit_length() - 1
            left = value
        above = line
    return sum(map(entropy, contexts.values())) + beyond / 8


# -- peers -------------------------------------------------------------------------------------


def by_peer(name: str, matrices: Sequence[np.ndarray]) -> dict[str, dict[str, float]] | str:
    """Bytes and seconds of decoding of each of a peer's coders, or why there are none."""
    python = environment(name, PEERS[name])
    if isinstance(python, str):
        return python
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "group.npz"
        np.savez(path, *matrices)
        command = [python, HERE / "peers" / f"{name}.py", path]
        result = subprocess.run(command, capture_output=True, text=True, env=own_variables())
    return last_line(result.stderr) or "it failed" if result.returncode else json.loads(result.stdout)


# -- measuring ---------------------------------------------------------------------------------


def measure(group: str, matrices: Sequence[np.ndarray]) -> list[Result]:
    matrices = [m.reshape(len(m), -1).astype(np.int32) for m in matrices]
    streams = [
        Stream(StreamSpec(f"codes{i}", (m.shape[0], m.shape[1]), None), torch.from_numpy(m))
        for i, m in enumerate(matrices)
    ]
    specs = [stream.spec for stream in streams]
    symbols = sum(m.size for m in matrices)

    def result(coder: str, size: float, took: float | None = None) -> Result:
        return Result(group, coder, round(size, 1), symbols, symbols / took if took else None)

    results = []
    for name, coder in CODERS.items():
        data = coder.encode(streams)
        results.append(result(name, len(data), seconds(lambda c=coder, d=data: c.decode(d, specs))))
    results.append(result(CONDITIONAL, sum(map(conditional_entropy, matrices))))
    results.append(result(ENTROPY, sum(entropy(Counter(m.reshape(-1).tolist())) for m in matrices)))
    for name in PEERS:
        found = by_peer(name, matrices)
        if isinstance(found, str):
            print(f"{name} is left out: {found}")
        else:
            results += [result(coder, one["bytes"], one["seconds"]) for coder, one in found.items()]
    raw = b"".join(m.astype(np.int8 if abs(m).max() < 128 else "<i4").tobytes() for m in matrices)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    data = lzma.compress(raw, lzma.FORMAT_RAW, filters=filters)
    unpack = seconds(lambda: lzma.decompress(data, lzma.FORMAT_RAW, filters=filters))
    return [*results, result("xz", len(data), unpack)]


# -- reporting ---------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> list[str]:
    """Markdown: bytes of each group by each coder, all of them, and the slowest and fastest decoding, M symbols/s."""
    names = list(dict.fromkeys(r.group for r in results))
    lines = [
        f"| coder | {' | '.join(names)} | all | decoding, M symbols/s |",
        "| --- |" + " --: |" * (len(names) + 2),
    ]
    for coder in dict.fromkeys(r.coder for r in results):
        own = {r.group: r for r in results if r.coder == coder}
        cells = [f"{own[name].bytes:,.0f}" if name in own else "" for name in names]
        total = f"{sum(r.bytes for r in own.values()):,.0f}" if len(own) == len(names) else ""
        speeds = [r.decode_symbols_per_second / 1e6 for r in own.values() if r.decode_symbols_per_second]
        speed = f"{min(speeds):,.1f}–{max(speeds):,.1f}" if speeds else ""
        lines.append(f"| {coder} | {' | '.join(cells)} | {total} | {speed} |")
    return lines


def targets(results: Sequence[Result]) -> list[str]:
    """What the coders are meant to reach, on trained layers where there are any, and what they do."""
    chosen = [r for r in results if r.group.startswith("MLP")] or list(results)

    def size(coder: str) -> float:
        return sum(r.bytes for r in chosen if r.coder == coder)

    def slowest(coder: str) -> float:
        return min((r.decode_symbols_per_second or 0) / 1e6 for r in chosen if r.coder == coder)

    lines = []
    for coder, speed, saving in (("Context small", 1, 5), ("Context fast", 8, 0), ("Rans", 100, None)):
        found = slowest(coder)
        lines.append(f"- {coder}: {found:.1f} M symbols/s, aim {speed}: {'reached' if found >= speed else 'missed'}.")
        if saving is not None and size("DeepCABAC"):
            less = 100 * (1 - size(coder) / size("DeepCABAC"))
            reached = "reached" if less >= saving else "missed"
            lines.append(f"- {coder}: {less:.1f} % fewer bytes than DeepCABAC, aim {saving} %: {reached}.")
    return lines


def write(results: Sequence[Result], folder: Path, epochs: int) -> None:
    """`coding.md` and `coding.csv`."""
    with (folder / "coding.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(Result._fields)
        rows.writerows(results)
    entropies = " ".join(line.strip() for line in (conditional_entropy.__doc__ or "").strip().splitlines()[1:])
    text = [
        "# The same codes through every coder",
        "",
        f"Made by `python -m bench.coding --write docs/results`, torch {torch.__version__}, one thread; every",
        "number is a row of [coding.csv](coding.csv) or follows from it. A group is the three weight matrices of",
        f"mlp-784-128-64-10, trained on MNIST for {epochs} epochs with `ECSQ(3)` at the price λ, seed 0; *made up* is",
        "one sparse layer. Bytes are those of the codes alone: no coder is charged for shapes, and constriction not",
        "for its frequencies. DeepCABAC is NNCodec 2.1.3's, on the same integers, its smallest of four settings.",
        "Speeds are per second of processor time, of the slowest and the fastest group.",
        "",
        *table(results),
        "",
        f"*{CONDITIONAL}*:{entropies}",
        "",
        "## Aims, on the trained layers; speeds of the slowest group",
        "",
        *targets(results),
    ]
    (folder / "coding.md").write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--json", type=Path, help="every result, as a list of objects")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="coding.md and coding.csv of groups made here")
    parser.add_argument("--epochs", type=int, default=3, help="of the trainings that make groups")
    options = parser.parse_args()
    if options.files and options.write:
        parser.error("--write describes the groups that are made here; leave out the files")
    torch.set_num_threads(1)
    named = {path.stem: list(np.load(path).values()) for path in options.files} or groups(options.epochs)
    results = [result for name, matrices in named.items() for result in measure(name, matrices)]
    print("\n".join([*table(results), "", *targets(results)]))
    if options.json:
        options.json.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")
    if options.write:
        write(results, options.write, options.epochs)


if __name__ == "__main__":
    main()
