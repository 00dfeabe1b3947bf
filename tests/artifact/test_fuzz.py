from __future__ import annotations

import pytest
from tests.artifact.fuzz import fuzz


def test_files_that_reach_new_lines_are_found() -> None:
    report = fuzz(seed=0, files=150)
    assert report.corpus > 20
    assert report.read > 5
    assert report.grown < 200_000_000


@pytest.mark.slow
def test_for_minutes() -> None:
    report = fuzz(seed=1, seconds=180)
    assert report.files > 2000
    assert report.grown < 400_000_000
