"""Past one machine: jobs as tasks of Dask, whose workers see the same disks (`pip install 'bitbook[dask]'`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bitbook.checkpoints.engines import J, R
from bitbook.errors import CheckpointError, optional_import


class Dask:
    """The workers of a Dask cluster; source and output are paths that all of them can open.

    How many jobs a machine takes at a time is up to its worker (`dask worker --nworkers N --nthreads 1`), so `limit`
    does not count here: a worker needs what one job takes.
    """

    def __init__(self, scheduler: str | Any):
        """Connect to a scheduler's address, or use a `distributed.Client`; raises `CheckpointError` without one."""
        distributed = optional_import("distributed", "dask")
        try:
            self.client = distributed.Client(scheduler, timeout=30) if isinstance(scheduler, str) else scheduler
        except (OSError, TimeoutError, ValueError) as error:
            raise CheckpointError(f"no Dask scheduler answers at {scheduler!r}: {error}") from error

    def run(self, function: Callable[[J], R], jobs: Sequence[J], memory: Sequence[int], limit: int) -> Iterator[R]:
        distributed = optional_import("distributed", "dask")
        order = sorted(range(len(jobs)), key=lambda i: -memory[i])
        futures = [self.client.submit(function, jobs[i], pure=False) for i in order]
        try:
            for _, result in distributed.as_completed(futures, with_results=True):
                yield result
        finally:
            self.client.cancel(futures)
