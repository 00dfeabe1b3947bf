"""Who does the jobs: this process, several processes, or another engine; each job is one tensor.

A job reads its own part of files and writes its own part of files, so an engine only has to call a function.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from typing import Protocol, TypeVar

from bitbook.errors import CheckpointError, PlanError

J = TypeVar("J")
R = TypeVar("R")

FREE = 300_000_000
"""Bytes that jobs may take beside three times the largest tensor."""


class Engine(Protocol):
    """What runs jobs."""

    def run(self, function: Callable[[J], R], jobs: Sequence[J], memory: Sequence[int], limit: int) -> Iterator[R]:
        """The results, in any order; `memory` are bytes that each job takes, of which `limit` may be in use at once.

        A job that takes more than `limit` runs alone.  Where a job raises, what is running is finished and the rest
        left alone.
        """
        ...


@dataclass(frozen=True)
class Here:
    """This process, one job after the other."""

    def run(self, function: Callable[[J], R], jobs: Sequence[J], memory: Sequence[int], limit: int) -> Iterator[R]:
        return map(function, jobs)


@dataclass(frozen=True)
class Processes:
    """`workers` processes of this machine, the large jobs first; what all of them hold together stays below a limit."""

    workers: int

    def __post_init__(self) -> None:
        if type(self.workers) is not int or self.workers < 1:
            raise PlanError(f"Processes({self.workers!r}): use a whole number of at least 1")

    def run(self, function: Callable[[J], R], jobs: Sequence[J], memory: Sequence[int], limit: int) -> Iterator[R]:
        waiting = sorted(zip(memory, range(len(jobs)), strict=True), reverse=True)
        running: dict[Future[R], int] = {}
        context = multiprocessing.get_context("spawn")  # a fork would copy locks of torch's threads
        pool = ProcessPoolExecutor(min(self.workers, max(len(jobs), 1)), context, initializer=_begin)
        try:
            while waiting or running:
                for size, i in list(waiting):
                    if len(running) < self.workers and (not running or sum(running.values()) + size <= limit):
                        waiting.remove((size, i))
                        running[pool.submit(function, jobs[i])] = size
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    del running[future]
                    yield future.result()
        except BrokenProcessPool as error:
            raise CheckpointError(
                "a worker process died, perhaps for lack of memory; the same command goes on from here, "
                "with fewer workers if need be"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    """What a worker does first: keep to one thread, and see to it that it ends with the process that started it."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """After a kill −9, nobody tells workers to stop: they would wait for jobs, in their memory, for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)
