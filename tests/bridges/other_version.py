"""The Hugging Face tests with the other major version of transformers, in an environment of its own, and across both.

    python -m tests.bridges.other_version

makes `.bench/transformers-N` (about 100 MB; it reuses the installed torch), runs `test_huggingface.py` there, and lets
each version load what the other one saved.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANGES = {4: "transformers>=4.57,<5", 5: "transformers>=5,<6"}
BESIDE = ("accelerate", "pytest>=9", "pytest-timeout", "hypothesis")
BITBOOK = ("numpy", "safetensors", "numba", "typer", "rich", "optuna>=5,<6", "jaxtyping", "scikit-learn")


def main() -> int:
    """Make the environment and run everything; returns 0, or the exit status of what failed."""
    from bench.peers.environments import environment
    from transformers import __version__

    other = 4 if int(__version__.split(".")[0]) >= 5 else 5
    python = environment(f"transformers-{other}", [RANGES[other], *BESIDE, *BITBOOK])
    if isinstance(python, str):
        print(python)
        return 1
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/bridges/test_huggingface.py"]
    status = _run(tests)
    for writer, reader in ((sys.executable, python), (python, sys.executable)):
        with tempfile.TemporaryDirectory() as folder:
            for interpreter, what in ((writer, "write"), (reader, "check")):
                status = status or _run([interpreter, "-m", "tests.bridges.other_version", what, folder])
    return status


def _run(command: list[str | Path]) -> int:
    own = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=own).returncode


def write(folder: Path) -> None:
    """Save each tiny model as this version does, with the logits that it gives."""
    import torch
    from tests.bridges import test_huggingface as tests
    from transformers import __version__

    from bitbook import Uniform, compress

    for kind, make in tests.MODELS.items():
        model = make()
        artifact = compress(model, tests.matrices(model, Uniform(4, (1, 16))))
        tests.huggingface.pack_(model, artifact, tests.QUICK).save_pretrained(folder / kind, max_shard_size="4KB")
        torch.save(tests.logits(model), folder / f"{kind}.pt")
    (folder / "version").write_text(__version__)


def check(folder: Path) -> None:
    """Load what another version saved, dense and packed, and compare the logits."""
    import torch
    from tests.bridges import test_huggingface as tests
    from transformers import __version__

    written = (folder / "version").read_text()
    for kind, (resident, load) in itertools.product(tests.MODELS, tests.LOADS.items()):
        want, got = torch.load(folder / f"{kind}.pt"), tests.logits(load(folder / kind))
        worst = float((got - want).abs().max() / want.abs().max())
        print(f"{kind}, {resident}: by transformers {written}, read by {__version__}, logits differ by {worst:.1g}")
        assert worst < 1e-5, f"{kind}: the logits are not those that were saved"


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["check"]:
        check(Path(sys.argv[2]))
    else:
        sys.exit(main())
