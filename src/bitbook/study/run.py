"""Run a study: worker processes that take cells from the storage until none is left.

    run_study ── starts ─► python -m bitbook.study.run   (one process per worker)
        │                        │ claim, run the trial function, finish
        └──── reads counts ──── storage ◄┘

The same command, given by hand on another machine with the same `--storage`, helps with a running study.
Whoever is killed, and however, loses the trials that were running and nothing else: calling `run_study` again
goes on.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol
from uuid import uuid4

from optuna.storages import RDBStorage

from bitbook.errors import BitbookError, StudyError
from bitbook.importing import import_callable
from bitbook.study.storage import (
    PATIENCE,
    Cell,
    Claim,
    LateResult,
    StudyStore,
    cell_id,
    check_result,
    has_study,
    open_storage,
    storage_url,
)

TrialFunction = Callable[[dict[str, Any]], Mapping[str, Any]]
Propose = Callable[[], int]
"""Puts more cells into the queue and says how many; 0: there are no more."""

STORAGE_VARIABLE = "BITBOOK_STORAGE"  # so that a URL's password is in no process list
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_MAX_IDLE_DEATHS = 3  # workers that die without having a cell: something is wrong with all of them
_LOOK = 1.0  # seconds between looks of the parent at the storage
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds between looks of a worker at an empty queue; of a hundred, too


def usable_cores() -> int:
    """The cores this process may run on, which in a container are often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_trial(name: str) -> TrialFunction:
    """The trial function that "package.module:function" names. Raises StudyError if there is none."""
    return import_callable(name, StudyError)


def run_study(
    cells: Iterable[Cell],
    trial: str,
    storage: str | Path,
    *,
    name: str = "study",
    settings: Mapping[str, Any] | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    keep_going: bool = False,
    progress: bool = True,
    propose: str | None = None,
    limit: int | None = None,
    heartbeat: int = 15,
    grace: int = 60,
) -> list[dict[str, Any]]:
    """Run every cell that has no result yet and return the results of all of them, in the order of `cells`.

    Each result is a dict (cell_id, cell, result, started, seconds), see `StudyStore.results`. Cells that an
    earlier call put into this study and that are still waiting are run too.

    trial: "package.module:function", taking a cell and returning a JSON-able dict, with `objectives: [bytes,
        accuracy]` if it has them; workers import it, with this process's `sys.path`.
    storage: a path ending in .db or .sqlite, or a database URL; `name` is the study's in it.
    settings: what else the results depend on; a study goes on only under the same trial and settings.
    workers: processes, by default one per usable core; they share the cores evenly.
    retry_failed: run cells again that failed before.
    keep_going: return the results there are although cells have failed.
    propose, limit: "package.module:callable", called with the store and the limit, for a `Propose`, which whoever finds
        the queue empty calls for more cells; `limit` of them in the study at most, which is up to it.
    heartbeat, grace: seconds, see `open_storage`.

    A trial that raises is recorded with its traceback and the study goes on; so is a cell whose worker died
    three times. Raises StudyError at the end if cells have failed, at once if the workers cannot start, or if
    the storage holds another study of that name. On Ctrl-C the workers stop, and their cells wait for the
    next call.
    """
    cells = [dict(cell) for cell in cells]
    if workers is not None and workers < 1:
        raise StudyError(f"a study needs at least one worker, not {workers}")
    load_trial(trial)
    url = storage_url(storage)
    store = StudyStore.create(open_storage(url, heartbeat=heartbeat, grace=grace), name, trial, settings)
    try:
        store.enqueue(cells)
        if retry_failed:
            store.retry_failed()
        store.requeue_stale()
        team = _Team(store, url, workers or usable_cores(), propose, limit)
        more = load_propose(propose, store, limit)
        _fill(store, more, team.count)
        _run_workers(team, progress)
        while _fill(store, more, team.count):  # whoever proposes may have died
            _run_workers(team, progress)
        wanted = {cell_id(cell): None for cell in cells}
        failures = [failure for failure in store.failures() if failure["cell_id"] in wanted]
        if failures and not keep_going:
            raise StudyError(_describe(failures))
        results = {record["cell_id"]: record for record in store.results()}
        return [results[identity] for identity in wanted if identity in results]
    finally:
        store.close()


def load_propose(name: str | None, store: StudyStore, limit: int | None) -> Propose:
    """What `run_study` calls `propose`; without one, there is nothing more. Raises StudyError if it is not there."""
    return (lambda: 0) if name is None else import_callable(name, StudyError)(store, limit)


def _fill(store: StudyStore, propose: Propose, count: int) -> int:
    """Propose cells until `count` wait, so that as many workers have something to start with; returns how many."""
    waiting, added = store.counts()["waiting"], 0
    while waiting + added < count and (more := propose()):
        added += more
    return added


@dataclass(frozen=True)
class _Team:
    """The workers of this process: how many, and what they do."""

    store: StudyStore
    url: str
    count: int
    propose: str | None
    limit: int | None


@dataclass
class _Worker:
    """A worker process and what it prints, which is shown if it dies."""

    name: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def last_words(self) -> str:
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 2000))
        return self.log.read().decode(errors="replace").strip()

    def how_it_died(self) -> str:
        code = self.process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}\n{self.last_words()}".strip()


def _start_worker(team: _Team) -> _Worker:
    store = team.store
    name = f"{socket.gethostname()}-{uuid4().hex[:12]}"
    options = {
        "study": store.name,
        "trial": store.trial,
        "worker": name,
        "parent": os.getpid(),
        "threads": (threads := max(1, usable_cores() // team.count)),
        "heartbeat": store.heartbeat_interval,
        "grace": int(store.grace.total_seconds()),
        **({"propose": team.propose, "limit": team.limit} if team.propose is not None else {}),
    }
    command = [
        sys.executable,
        "-m",
        "bitbook.study.run",
        *(f"--{key}={value}" for key, value in options.items()),
    ]
    environment = {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        STORAGE_VARIABLE: team.url,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    return _Worker(name, process, log)


def _run_workers(team: _Team, progress: bool) -> None:
    """Keep the workers running until every cell is done or failed."""
    store = team.store
    running: list[_Worker] = []
    idle_deaths = 0
    counts = store.counts()
    try:
        with _progress(counts, progress) as show:
            while True:
                counts = store.counts()
                show({**counts, "waiting": max((team.limit or 0) - sum(counts.values()), 0) + counts["waiting"]})
                useful = min(team.count, counts["waiting"] + counts["running"])
                while counts["waiting"] and len(running) < useful:
                    running.append(_start_worker(team))
                if not running and not counts["waiting"] and not counts["running"]:
                    return
                if not running:
                    store.requeue_stale()  # what is running belongs to other machines, or to the dead
                for worker in _wait_for_exits(running, _LOOK):
                    running.remove(worker)
                    with worker.log:
                        if worker.process.returncode == 0:
                            continue
                        if not store.release(worker.name, killed_by=worker.how_it_died()):
                            idle_deaths += 1
                        if idle_deaths >= _MAX_IDLE_DEATHS:
                            raise StudyError(f"{idle_deaths} workers died idle; the last: {worker.how_it_died()}")
    except KeyboardInterrupt:
        print(
            f"stopped: {store.counts()['done']} of {sum(counts.values())} cells are done and stored; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        raise
    finally:
        _stop(store, running)


def _wait_for_exits(workers: list[_Worker], seconds: float) -> list[_Worker]:
    """The workers that have ended, as soon as there are any; an empty list after so many seconds."""
    end = time.monotonic() + seconds
    while not (ended := [worker for worker in workers if worker.process.poll() is not None]):
        if time.monotonic() >= end:
            break
        time.sleep(0.05)
    return ended


def _stop(store: StudyStore, workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()  # safe at any moment: the storage sees whole transactions or none
    for worker in workers:
        worker.process.wait()
        worker.log.close()
        store.release(worker.name)


class _Show(Protocol):
    def __call__(self, counts: Mapping[str, int]) -> None: ...


@contextmanager
def _progress(before: Mapping[str, int], enabled: bool, every: float = 30.0) -> Iterator[_Show]:
    """Show counts as they come: a bar on a terminal, elsewhere a plain line now and then and a last one."""
    from rich.console import Console  # only the parent shows anything, and workers should start quickly
    from rich.progress import BarColumn, Progress, TextColumn

    began = time.monotonic()
    latest = before

    def text() -> str:
        return status_line(latest, latest["done"] - before["done"], time.monotonic() - began)

    if not enabled:
        yield lambda counts: None
        return
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(TextColumn("study"), BarColumn(), TextColumn("{task.description}"), console=console) as bar:
            task = bar.add_task("")

            def draw(counts: Mapping[str, int]) -> None:
                nonlocal latest
                latest = counts
                finished = counts["done"] + counts["failed"]
                bar.update(task, description=text(), completed=finished, total=sum(counts.values()))

            yield draw
        return
    printed = -every

    def line(counts: Mapping[str, int]) -> None:
        nonlocal latest, printed
        latest = counts
        if time.monotonic() - began - printed >= every:
            printed = time.monotonic() - began
            print(text(), file=sys.stderr, flush=True)

    yield line
    print(text(), file=sys.stderr, flush=True)


def status_line(counts: Mapping[str, int], done_now: int, elapsed: float) -> str:
    """One line of progress: what is done of what, the rate of this run, and the time left at that rate.

    >>> status_line({"waiting": 20, "running": 2, "done": 18, "failed": 1}, done_now=6, elapsed=120.0)
    '18/41 done, 1 failed, 3 a minute, 7 min left'
    """
    parts = [f"{counts['done']}/{sum(counts.values())} done"]
    if counts["failed"]:
        parts.append(f"{counts['failed']} failed")
    left = counts["waiting"] + counts["running"]
    if done_now and elapsed > 0:
        rate = done_now / elapsed
        parts.append(f"{60 * rate:.3g} a minute")
        if left:
            seconds = left / rate
            parts.append(f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left")
    return ", ".join(parts)


def _describe(failures: list[dict[str, Any]], shown: int = 10) -> str:
    lines = [f"failed cells: {len(failures)}; the others are done, retry_failed=True runs these again"]
    for failure in failures[:shown]:
        reason = failure["error"].strip().splitlines()[-1]
        lines.append(f"  {failure['cell_id']} {failure['cell']}: {reason}")
    if len(failures) > shown:
        lines.append(f"  and {len(failures) - shown} more")
    lines.append(f"the first one:\n{failures[0]['error'].strip()}")
    return "\n".join(lines)


def work(
    store: StudyStore,
    function: TrialFunction,
    worker: str,
    *,
    propose: Propose = lambda: 0,
    alive: Callable[[], bool] = lambda: True,
) -> int:
    """Run cells until none is waiting or running, or until `alive()` is false; returns how many were run.

    `alive` is asked between two cells, `propose` for more of them when none waits. Cells that others run are waited
    for, since their workers may die.
    """
    ran, idle = 0, 0.0
    while alive():
        claim = store.claim(worker)
        if claim is None:
            if store.requeue_stale() or propose():
                continue
            if not store.busy():
                break
            pause = min(max(_SHORTEST_PAUSE, idle / 10), _LONGEST_PAUSE) * random.uniform(0.8, 1.2)
            time.sleep(pause)
            idle += pause
            continue
        idle, error = 0.0, ""
        with _heartbeats(store, claim):
            try:
                result = function(claim.cell)
                check_result(result)
            except (Exception, SystemExit):
                error = traceback.format_exc()
        try:
            if error:
                store.fail(claim, error)
            else:
                store.finish(claim, result)
        except LateResult as late:
            print(late, file=sys.stderr)
        ran += 1
    return ran


def check_versions(store: StudyStore) -> None:
    """Raise StudyError if a package that is imported here has another version than the study's settings name."""
    for name, wanted in store.settings.items():
        found = getattr(sys.modules.get(name), "__version__", wanted)
        if found != wanted:
            raise StudyError(
                f"study {store.name!r} runs on {name} {wanted}, and here is {name} {found}: results of both in one "
                f"table would mislead; install {name} {wanted} on this machine"
            )


@contextmanager
def _heartbeats(store: StudyStore, claim: Claim) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(store.heartbeat_interval):
            try:
                store.heartbeat(claim)
            except Exception as error:  # a database that is away for a moment must not end the heartbeats
                print(f"no heartbeat recorded: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def main(arguments: list[str] | None = None) -> int:
    """The worker's command line: help with a study that `run_study` has made, until nothing is left to do."""
    parser = argparse.ArgumentParser(prog="python -m bitbook.study.run", description=main.__doc__)
    parser.add_argument(
        "--storage",
        default=os.environ.get(STORAGE_VARIABLE),
        help=f"path or database URL (default: the variable {STORAGE_VARIABLE})",
    )
    parser.add_argument("--study", default="study", help="name of the study in the storage")
    parser.add_argument("--trial", required=True, help="its trial function, package.module:function")
    parser.add_argument("--threads", type=int, help="threads of each trial (default: all cores of this process)")
    parser.add_argument("--heartbeat", type=int, default=15, help="seconds between signs of life")
    parser.add_argument("--grace", type=int, default=60, help="seconds without one after which a worker is dead")
    parser.add_argument("--worker", default="", help="name under which to take cells")
    parser.add_argument("--parent", type=int, help="stop after the current trial once this is not our parent process")
    parser.add_argument("--propose", help="what puts more cells into an empty queue, package.module:callable")
    parser.add_argument("--limit", type=int, help="with --propose: cells of the study at most")
    given = parser.parse_args(arguments)
    if given.storage is None:
        parser.error(f"--storage or the variable {STORAGE_VARIABLE} must say where the study is")
    if given.parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops us

    def alive() -> bool:
        return given.parent is None or os.getppid() == given.parent

    return join(
        given.storage, given.study, given.trial, propose=given.propose, limit=given.limit, threads=given.threads,
        heartbeat=given.heartbeat, grace=given.grace, worker=given.worker, alive=alive,
    )  # fmt: skip


def join(
    storage: str | Path,
    study: str,
    trial: str,
    *,
    propose: str | None = None,
    limit: int | None = None,
    threads: int | None = None,
    heartbeat: int = 15,
    grace: int = 60,
    worker: str = "",
    alive: Callable[[], bool] = lambda: True,
) -> int:
    """Be one worker of a study that `run_study` has made, until nothing is left to do; returns an exit code.

    threads: of each trial, by default all cores of this process; the others as for `run_study` and `work`. A study
    that is not there yet is waited for. SIGTERM, which Slurm and Kubernetes send, stops as Ctrl-C does, and the cell
    that was running is queued again at once. Raises StudyError if trial or versions are others, or if no such study
    appears.
    """
    threads = threads or usable_cores()
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    worker = worker or f"{socket.gethostname()}-{uuid4().hex[:12]}"
    opened = open_storage(storage, heartbeat=heartbeat, grace=grace, patience=PATIENCE)
    _wait_for_study(opened, study)
    store = StudyStore(opened, study)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if store.trial != trial:
            raise StudyError(f"study {study!r} runs the trial {store.trial!r}, not {trial!r}")
        function = load_trial(trial)
        check_versions(store)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        work(store, function, worker, propose=load_propose(propose, store, limit), alive=alive)
    except KeyboardInterrupt:
        store.release(worker)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        store.close()
    return 0


def _wait_for_study(storage: RDBStorage, name: str) -> None:
    end = time.monotonic() + PATIENCE
    while not has_study(storage, name) and time.monotonic() < end:
        print(f"the storage holds no study named {name!r} yet; waiting for it", file=sys.stderr, flush=True)
        time.sleep(5)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BitbookError as error:
        sys.exit(str(error))
