"""What every test may use: real data, a seeded generator, and hypothesis settings that suit tensors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings

from bitbook.data import Dataset, load_cifar10, load_digits, load_mnist, load_stories

# Several test processes share the cores: more threads each make all of them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(1)

# No deadline: a first call compiles kernels. In CI, the same examples every time.
settings.register_profile(
    "bitbook", deadline=None, max_examples=30, derandomize=bool(os.environ.get("CI")), print_blob=True
)
settings.load_profile("bitbook")


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """Scikit-learn's digits; shared by all tests, so not to be written to."""
    return load_digits()


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    """Real MNIST; shared by all tests, so not to be written to."""
    if "BITBOOK_DATA" not in os.environ:
        pytest.skip("BITBOOK_DATA is unset: it names the folder with the files of MNIST")
    return load_mnist()


@pytest.fixture(scope="session")
def cifar10() -> Dataset:
    """Real CIFAR-10; shared by all tests, so not to be written to."""
    root = os.environ.get("BITBOOK_DATA")
    if root is None or not any(any(Path(root, folder).glob("data_batch_1.*")) for folder in (".", "cifar10")):
        pytest.skip("BITBOOK_DATA names no folder with batches of CIFAR-10")
    return load_cifar10()


class Server(NamedTuple):
    """A web server of this computer, and the folder whose files it gives."""

    url: str
    """Ends in a slash."""
    folder: Path


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output is its own."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Where downloads may come from in a test, whose cache is empty and whose BITBOOK_DATA is unset."""
    monkeypatch.delenv("BITBOOK_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield Server(f"http://127.0.0.1:{http.server_address[1]}/", folder)
        http.shutdown()
        thread.join()


@pytest.fixture
def pretrained_folder() -> Path:
    """The folder with public weights as safetensors."""
    folder = Path(os.environ.get("BITBOOK_DATA", ""), "models")
    if not (folder / "stories260K.safetensors").exists():
        pytest.skip("BITBOOK_DATA names no folder with models/stories260K.safetensors and its like")
    return folder


@pytest.fixture(scope="session")
def stories() -> Dataset:
    """Real TinyStories; shared by all tests, so not to be written to."""
    root = os.environ.get("BITBOOK_DATA")
    if root is None or not Path(root, "text", "tinystories_tokens.npz").exists():
        pytest.skip("BITBOOK_DATA names no folder with text/tinystories_tokens.npz")
    return load_stories()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
