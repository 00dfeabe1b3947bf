"""A made-up checkpoint compressed and decompressed: wall time, bytes, and memory of all processes together.

    python -m bench.checkpoint [--gigabytes 5] [--bits 3] [--workers 2] [--folder FOLDER] [--keep]

Shapes are those of a Llama, weights are bfloat16, Student-t with 5 degrees of freedom and a scale per row.  They come
from a pool of 2^22 values, which no coder here can notice.  Memory is the resident set of the command and its workers,
added up 50 times a second, above a process after `import bitbook`; what workers share counts in each of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file

COMMAND = "import sys; from bitbook.cli import main; sys.exit(main())"
BASE = "import bitbook, psutil; print(psutil.Process().memory_info().rss)"
SHARD = 2_000_000_000  # bytes at most


def shapes(total: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of about `total` bytes in bfloat16."""
    hidden = 4096 if total >= 2e9 else 1024 if total >= 2e8 else 256
    inner, words = hidden * 11 // 4, hidden * 8
    yield "model.embed_tokens.weight", (words, hidden)
    layer = 4 * hidden**2 + 3 * hidden * inner
    for i in range(max(round((total / 2 - 2 * words * hidden) / layer), 1)):
        prefix = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            yield f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)
        for name in ("gate", "up"):
            yield f"{prefix}mlp.{name}_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (words, hidden)


def make(folder: Path, total: int) -> None:
    """Write shards and their index."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 22, generator=g) / torch.randn(5, 1 << 22, generator=g).square().mean(0).sqrt()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(total):
        count = 2 * torch.Size(shape).numel()
        if size + count > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += count
    places = {}
    for i, held in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: weights(shape, pool, g) for name, shape in held.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weights(shape: tuple[int, ...], pool: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    w = torch.empty(shape, dtype=torch.bfloat16)
    rows = max((1 << 20) // shape[1], 1)
    for row in range(0, shape[0], rows):
        part = w[row : row + rows]
        first = int(torch.randint(len(pool) - part.numel(), (), generator=g))
        values = pool[first : first + part.numel()].reshape(part.shape)
        part.copy_(values * 0.02 * torch.randn(len(part), 1, generator=g).mul_(0.2).exp_())
    return w


def measured(arguments: Sequence[str]) -> tuple[float, float, int, int, str]:
    """Seconds by the clock and of processors; the most that all processes held, and one; what the command said."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = most = 0
    with subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, text=True) as command:
        root = psutil.Process(command.pid)
        while command.poll() is None:
            held = []
            try:
                for process in (root, *root.children(recursive=True)):
                    held.append(process.memory_info().rss)
            except psutil.Error:
                pass
            whole, most = max(whole, sum(held)), max([most, *held])
            time.sleep(0.02)
        said = command.stdout.read() if command.stdout else ""
    if command.returncode:
        raise SystemExit(f"{arguments[0]} failed")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, spent, whole, most, said


def check(source: Path, plain: Path) -> None:
    """Every tensor is there again, in its type, near what it was; in stock safetensors."""
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as one, safe_open(plain / path.name, "pt") as other:
            assert set(one.keys()) == set(other.keys())
            for name in one.keys():  # noqa: SIM118 - not a dict
                w, found = (file.get_slice(name)[:256].float() for file in (one, other))
                assert other.get_slice(name).get_shape() == one.get_slice(name).get_shape()
                assert other.get_slice(name).get_dtype() == one.get_slice(name).get_dtype()
                assert (w - found).square().sum() <= 0.2 * w.square().sum(), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.1)
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to put it all; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    total = int(options.gigabytes * 1e9)
    if shutil.disk_usage(folder).free < 3 * total:
        raise SystemExit(f"{3 * total:,} bytes are needed in {folder}, and are not free")
    try:
        source, small, plain = folder / "source", folder / "small", folder / "plain"
        make(source, total)
        size = sum(path.stat().st_size for path in source.iterdir())
        largest = max(4 * torch.Size(shape).numel() for _, shape in shapes(total))
        base = int(subprocess.run([sys.executable, "-c", BASE], capture_output=True, text=True, check=True).stdout)
        workers = ["--workers", str(options.workers)]
        print(f"{size:,} bytes, largest tensor as float32 {largest:,}, import bitbook {base / 1e6:.0f} MB")
        print(f"bound above it: {(3 * largest + 300e6) / 1e6:,.0f} MB, and an interpreter for each worker")
        row = "{:12} {:>8} {:>12} {:>6} {:>22} {:>22} {:>14}"
        print(row.format("", "seconds", "CPU seconds", "MB/s", "all above import, MB", "one above import, MB", "bits"))
        commands = {
            "compress": ["compress", str(source), "--bits", str(options.bits), "-o", str(small), "--json", *workers],
            "decompress": ["decompress", str(small), "-o", str(plain), *workers],
        }
        for name, arguments in commands.items():
            seconds, spent, whole, most, said = measured(arguments)
            bits = f"{json.loads(said)['bits_per_quantized_weight']:.4f}" if name == "compress" else ""
            rate, above, one = (
                f"{size / seconds / 1e6:.0f}",
                f"{(whole - base) / 1e6:.0f}",
                f"{(most - base) / 1e6:.0f}",
            )
            print(row.format(name, f"{seconds:.1f}", f"{spent:.1f}", rate, above, one, bits), flush=True)
        check(source, plain)
        written = sum(path.stat().st_size for path in small.iterdir())
        print(f"{written:,} bytes, {size / written:.2f} times smaller; decompressed and checked")
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
