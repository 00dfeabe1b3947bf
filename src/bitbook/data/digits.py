"""The 8 x 8 handwritten digits that scikit-learn carries: a data set that needs no network."""

from __future__ import annotations

import torch

from bitbook.data.dataset import Dataset
from bitbook.errors import optional_import

TEST_EXAMPLES = 360
SPLIT_SEED = 0


def load_digits() -> Dataset:
    """Load scikit-learn's digits: 1,437 training and 360 test images, 64 features, 10 classes.

    Pixels 0 … 16 become [-1, 1]. The source has no test set of its own: the first 360 examples of the
    permutation `torch.randperm` with seed 0 are the test set, always. Raises `MissingDependency` without
    scikit-learn.

    Source: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI, 1998 (its test part).
    """
    bunch = optional_import("sklearn.datasets", extra="study").load_digits()
    x = torch.from_numpy(bunch.data).float().div_(8).sub_(1)
    y = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order[:TEST_EXAMPLES], order[TEST_EXAMPLES:]
    return Dataset("digits", x[train], y[train], x[test], y[test], classes=10, input_shape=(1, 8, 8))
