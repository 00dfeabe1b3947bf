"""What every test may use: real data, a seeded generator, and hypothesis settings that suit tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from bitbook.data import Dataset, load_cifar10, load_digits, load_mnist

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


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
