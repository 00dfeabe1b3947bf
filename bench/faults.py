"""What becomes of a study on PostgreSQL while workers are killed and frozen and the database is restarted.

    python -m bench.faults --write docs/results

Starts PostgreSQL from the distribution's package on loopback, in a temporary folder. Each round: workers take cells;
some are killed with -9 in the middle of one, one is frozen for longer than the grace period and wakes up again, and the
database is restarted under load, once in order and once as if it had crashed, away for longer than the grace period.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.trial import TrialState

from bitbook.study.storage import StudyStore, cell_id, open_storage

ROOT = Path(__file__).parents[1]
GRACE = 10  # seconds without a sign of life after which a worker counts as dead
STUDY, TRIAL = "faults", "bench.faults:sleep"
PACKAGED = Path("/usr/lib/postgresql")
T = TypeVar("T")


def sleep(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A trial that takes as long as it says, or until a file is there, and leaves a line each time it is executed."""
    time.sleep(cell["seconds"])
    while "until" in cell and not os.path.exists(cell["until"]):
        time.sleep(0.05)
    with open(cell["log"], "a") as log:
        log.write(f"{cell['x']}\n")
    return {"square": cell["x"] ** 2, "objectives": [cell["x"] + 1, 50.0]}


# --- a server


class NoServer(Exception):
    """Why PostgreSQL cannot be started here."""


class Server:
    """PostgreSQL on a free port of loopback, with its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.owner = find_programs(), find_owner()
        self.folder, self.data = folder, folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        password = os.urandom(16).hex()
        (folder / "password").write_text(password)
        self.url = f"postgresql+psycopg://bitbook:{password}@127.0.0.1:{self.port}/postgres"
        if self.owner is not None:
            for path in (folder, folder / "password"):
                os.chown(path, self.owner.pw_uid, self.owner.pw_gid)
        self._run("initdb", "-D", self.data, "-U", "bitbook", "-A", "scram-sha-256", "--pwfile", folder / "password")
        settings = f"listen_addresses='127.0.0.1'\nport={self.port}\nunix_socket_directories=''\n"
        with open(self.data / "postgresql.conf", "a") as file:
            file.write(settings)
        self.start()

    def start(self) -> None:
        self._run("pg_ctl", "-D", self.data, "-l", self.folder / "log", "-w", "start")

    def stop(self, mode: str) -> None:
        """Stop it, "fast" (clients are cut off) or "immediate" (the same without a shutdown, as in a crash)."""
        self._run("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop")

    def _run(self, program: str, *arguments: object) -> None:
        user = {} if self.owner is None else {"user": self.owner.pw_uid, "group": self.owner.pw_gid, "extra_groups": []}
        with open(self.folder / "output", "w") as output:  # a pipe would stay open as long as the server
            done = subprocess.run(
                [self.programs / program, *map(str, arguments)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **user,  # type: ignore[arg-type]
            )
        if done.returncode:
            raise NoServer(f"{program}: {(self.folder / 'output').read_text().strip()[-500:]}")


def find_programs() -> Path:
    """The newest installed PostgreSQL's programs; raises `NoServer` where there are none."""
    packaged = sorted(PACKAGED.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    found = packaged[-1] if packaged else shutil.which("initdb")
    if found is None:
        raise NoServer("PostgreSQL's server is not installed; on Debian: apt-get install postgresql")
    return Path(found).resolve().parent


def find_owner() -> pwd.struct_passwd | None:
    """Who the server runs as: this user, or, since it refuses root, the package's, or nobody."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise NoServer("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")


@contextmanager
def server() -> Iterator[Server]:
    """A fresh server, stopped and removed at the end; raises `NoServer` where there can be none."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise NoServer("psycopg is not installed; run: pip install 'bitbook[postgres]'") from error
    with tempfile.TemporaryDirectory(prefix="bitbook-postgres-", ignore_cleanup_errors=True) as folder:
        running = Server(Path(folder))
        try:
            yield running
        finally:
            with contextlib.suppress(NoServer):  # it may be stopped
                running.stop("immediate")


# --- a round


@dataclass(frozen=True)
class Outcome:
    """What was done to a study, and what became of it."""

    cells: int
    workers: int
    killed: int
    frozen: int
    restarts: int
    away: float
    """Seconds in which there was no database."""
    unfinished: int
    """Cells that waited or ran when it went away, over all restarts."""
    executions: int
    """Trials that ran to their end, accepted or not."""
    accepted: int
    duplicates: int
    """Accepted results beyond the first of a cell."""
    lost: int
    """Cells without a result."""
    wrong: int
    """Results that are not those of their cells."""
    late: int
    """Results that were refused, because their trials had been given up."""


class Workers:
    """Worker processes by name."""

    def __init__(self, store: StudyStore, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.heartbeat, self.grace = store.heartbeat_interval, int(store.grace.total_seconds())
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        name = f"worker-{len(self.processes)}"
        options = {"study": STUDY, "trial": TRIAL, "worker": name, "threads": 1}
        options |= {"heartbeat": self.heartbeat, "grace": self.grace}
        path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        with open(self.folder / f"{name}.log", "wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "bitbook.study.run", *(f"--{key}={value}" for key, value in options.items())],
                env={**os.environ, "PYTHONPATH": path, "BITBOOK_STORAGE": self.url},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def faults(
    database: Server,
    *,
    cells: int,
    seconds: float,
    workers: int,
    kills: int = 1,
    modes: Sequence[str] = ("immediate",),
    grace: int = GRACE,
) -> Outcome:
    """One round: a study of `cells` cells of so many seconds, on a database that holds no other."""
    storage = open_storage(database.url, heartbeat=max(1, grace // 4), grace=grace)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = StudyStore.create(storage, STUDY, TRIAL)
        wanted = [{"x": x, "seconds": seconds, "log": str(folder / "executions")} for x in range(cells)]
        for cell in wanted[-workers:]:  # so that there is something to do, however slow this process is
            cell["until"] = str(folder / "done")
        store.enqueue(wanted)
        team = Workers(store, database.url, folder)
        try:
            for _ in range(workers):
                team.start()
            _wait_for(lambda: store.counts()["done"] >= workers)
            restarts = [_restart(store, database, modes[0], workers)]
            for _ in range(kills):
                victim, _ = _busy(store, team)
                team.processes[victim].kill()
                team.processes[victim].wait()
                team.start()
            restarts += [_restart(store, database, mode, workers) for mode in modes[1:]]
            frozen = _freeze(store, team)
            (folder / "done").touch()
            for name, process in team.processes.items():
                if process.wait(timeout=600) != 0 and process.returncode != -signal.SIGKILL:
                    raise RuntimeError(f"{name} ended with {process.returncode}:\n{team.log(name)[-3000:]}")
        finally:
            team.close()
        trials = _study(store).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        accepted = Counter(trial.user_attrs["cell_id"] for trial in trials)
        wrong = [t for t in trials if t.user_attrs["result"]["square"] != t.user_attrs["cell"]["x"] ** 2]
        outcome = Outcome(
            cells=cells,
            workers=len(team.processes),
            killed=kills,
            frozen=1,
            restarts=len(modes),
            away=sum(away for away, _ in restarts),
            unfinished=sum(unfinished for _, unfinished in restarts),
            executions=len((folder / "executions").read_text().split()),
            accepted=len(trials),
            duplicates=sum(accepted.values()) - len(accepted),
            lost=len({cell_id(cell) for cell in wanted} - accepted.keys()),
            wrong=len(wrong),
            late=sum(team.log(name).count("late result of cell") for name in team.processes),
        )
        if f"late result of cell {frozen} refused" not in "".join(map(team.log, team.processes)):
            raise RuntimeError(f"the frozen worker's result of cell {frozen} was not refused")
        optuna.delete_study(study_name=STUDY, storage=storage)
        store.close()
    return outcome


def _study(store: StudyStore) -> optuna.Study:
    return optuna.load_study(study_name=STUDY, storage=store.storage)


def _busy(store: StudyStore, team: Workers) -> tuple[str, int]:
    """A living worker in the middle of a trial, and the trial's number."""

    def found() -> tuple[str, int] | None:
        for trial in _study(store).get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            process = team.processes.get(trial.user_attrs["worker"])
            if process is not None and process.poll() is None:
                return trial.user_attrs["worker"], trial.number
        return None

    return _wait_for(found)


def _freeze(store: StudyStore, team: Workers) -> str:
    """Stop a worker until its trial has been given up, and let it go on; the cell's id."""
    while True:
        victim, number = _busy(store, team)
        process = team.processes[victim]
        process.send_signal(signal.SIGSTOP)
        try:
            trial = _wait_for(lambda number=number: _ended(store, number))
        finally:
            process.send_signal(signal.SIGCONT)
        if trial.state == TrialState.FAIL:  # otherwise its result was on the way already
            return trial.user_attrs["cell_id"]


def _ended(store: StudyStore, number: int) -> optuna.trial.FrozenTrial | None:
    store.requeue_stale()  # as an idle worker does
    trial = _study(store).get_trials(deepcopy=False)[number]
    return None if trial.state == TrialState.RUNNING else trial


def _restart(store: StudyStore, database: Server, mode: str, workers: int) -> tuple[float, int]:
    """Stop the database while workers are busy, and start it when all of them would count as dead.

    Returns the seconds without it, and how many cells were not finished before.
    """
    _wait_for(lambda: store.counts()["running"] >= min(2, workers))
    counts = store.counts()
    began = time.monotonic()
    database.stop(mode)
    time.sleep(store.grace.total_seconds() + 1)
    database.start()
    return time.monotonic() - began, counts["waiting"] + counts["running"]


def _wait_for(condition: Callable[[], T | None], seconds: float = 600.0) -> T:
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise RuntimeError("waited in vain")
        time.sleep(0.3)
    return found


# --- figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="folder for faults.md and faults.csv")
    given = parser.parse_args()
    outcomes = []
    with server() as database:
        for _ in range(given.rounds):
            modes = ("immediate", "fast")
            outcomes.append(faults(database, cells=150, seconds=0.5, workers=4, kills=2, modes=modes))
            print(outcomes[-1], flush=True)
    if given.write is not None:
        write(outcomes, given.write, f"python -m bench.faults --rounds {given.rounds} --write docs/results")


def write(outcomes: Sequence[Outcome], folder: Path, command: str) -> None:
    """faults.csv with a row for each round, faults.md with their sum."""
    from bitbook.study.tables import markdown_table  # which imports torch, and workers import this file

    folder.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Outcome)]
    rows = [[round(value, 1) for value in astuple(outcome)] for outcome in outcomes]
    with open(folder / "faults.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["round", *names], *([i, *row] for i, row in enumerate(rows, 1))]
        )
    said = {
        "cells": "cells",
        "workers": "workers started",
        "killed": "workers killed with -9 in the middle of a trial",
        "frozen": "workers frozen for longer than the grace period, then woken up",
        "restarts": "restarts of the database under load, half of them as if it had crashed",
        "away": "seconds without a database",
        "unfinished": "cells that waited or ran when it went away",
        "executions": "trials that ran to their end",
        "accepted": "results accepted",
        "duplicates": "results accepted beyond the first of a cell",
        "lost": "cells without a result",
        "wrong": "results that are not those of their cells",
        "late": "late results refused",
    }
    sums = [{"": said[name], "sum": sum(column)} for name, column in zip(names, zip(*rows, strict=True), strict=True)]
    (folder / "faults.md").write_text(
        "# Faults: a study on PostgreSQL while workers die and the database is restarted\n\n"
        f"Sums over {len(outcomes)} rounds ([each](faults.csv)), trials of half a second, {GRACE} s of "
        "grace; the database is away for longer than that. Late are the results of the frozen workers, and of any that "
        "got no processor for that long.\n\n"
        + markdown_table(sums, ["", "sum"])
        + f"\n```sh\n{command}\n```\n\nHow it is done: [many-machines.md](../many-machines.md).\n"
    )


if __name__ == "__main__":
    try:
        main()
    except NoServer as error:
        sys.exit(f"there is no PostgreSQL: {error}")
