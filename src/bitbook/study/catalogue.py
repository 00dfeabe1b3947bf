"""Every study by name: its cells, the function that runs one, and whether the size–accuracy report shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bitbook.errors import PlanError
from bitbook.study.family.methods import family_cells, mnist_family_cells
from bitbook.study.grid import GRIDS
from bitbook.study.networks.trial import networks_cells
from bitbook.study.networks.tuned import tuned_cells
from bitbook.study.priced.entropy import entropy_cells
from bitbook.study.priced.headline import TUNING_SEEDS, headline_cells, tuning_cells


class Study(NamedTuple):
    """What a name on the command line stands for."""

    cells: Callable[[Sequence[int]], list[dict[str, Any]]]
    seeds: int
    """With which it is run where none are given."""
    trial: str = "bitbook.study.trial:run_trial"
    reported: bool = True
    """Whether its trials are points on a curve of size and accuracy; others have a document of their own."""


_PRICED = "bitbook.study.priced.trial:run_trial"
_FAMILY = "bitbook.study.family.trial:run_trial"
STUDIES: Mapping[str, Study] = {
    **{name: Study(cells, seeds) for name, (cells, seeds) in GRIDS.items()},
    "entropy": Study(entropy_cells, 3, reported=False),
    "family": Study(family_cells, 2, _FAMILY, reported=False),
    "family-mnist": Study(mnist_family_cells, 3, _FAMILY, reported=False),
    "headline-tuning": Study(tuning_cells, len(TUNING_SEEDS), _PRICED, reported=False),
    "networks": Study(networks_cells, 1, "bitbook.study.networks.trial:run_trial", reported=False),
    "tuned": Study(tuned_cells, 1, "bitbook.study.networks.tuned:run_trial", reported=False),
    "headline": Study(headline_cells, 5, _PRICED, reported=False),
}


def find_study(name: str) -> Study:
    """The study of this name; raises `PlanError` where there is none."""
    if name not in STUDIES:
        raise PlanError(f"there is no grid {name!r}; use one of {', '.join(STUDIES)}")
    return STUDIES[name]
