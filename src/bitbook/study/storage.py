"""Where a study's trials wait and their results stay: Optuna's tables as a queue.

    enqueue ─► waiting ─claim─► running ─finish─► done
                  ▲                │ └────fail──► failed ─retry_failed─┐
                  └── worker lost ─┘                                   │
                  └────────────────────────────────────────────────────┘

A *cell* is a JSON-able dict that describes one trial completely. A cell that is tried again gets a new Optuna
trial, in the same transaction that fails the old one, so two things always hold:

- of a cell's trials all but the newest have failed;
- a trial's id is a fencing token: who still works on a trial that was given up cannot finish it.

Every change below is one transaction that holds the study's row (`StudyStore._locked`). Optuna's own methods
take one transaction per attribute, which is why this module writes Optuna's tables through its models;
`optuna.load_study`, its Pareto front and its dashboard read them as usual. This module imports Optuna, so it
is imported on use.

A database that goes away for a while is waited for (`_patient`): what was being done is done again. That is safe
where a transaction was committed and only the answer got lost, too: handing in the same result twice changes nothing,
and a claim that nobody knows of has no heartbeat, so that its cell is queued again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy
import sqlalchemy.event
import sqlalchemy.exc
import sqlalchemy.pool
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.orm import Session

from bitbook.errors import MissingDependency, StudyError

FORMAT = 1  # of what this module writes into Optuna's tables
SQLITE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
MAX_KILLS = 3  # a cell that has killed this many workers is failed
PATIENCE = 600.0
"""Seconds for which a worker waits for a database that does not answer; a restart or a fail-over takes minutes."""
_OPEN_ATTEMPTS = 5
_LONGEST_PAUSE = 10.0  # seconds between two attempts to reach the database
_FROZEN = 10  # seconds without a sign of a client in a transaction, which takes milliseconds, that end it

# Optuna's tables. `Any`, because no checker follows the types of their columns.
StudyRow: Any = models.StudyModel
StudyAttributeRow: Any = models.StudyUserAttributeModel
TrialRow: Any = models.TrialModel
AttributeRow: Any = models.TrialUserAttributeModel
HeartbeatRow: Any = models.TrialHeartbeatModel
ValueRow: Any = models.TrialValueModel

Cell = Mapping[str, Any]
P = ParamSpec("P")
T = TypeVar("T")


class LateResult(StudyError):
    """A result came after its trial had been given up; another worker has the cell, or had it."""


def canonical_json(value: object) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII. Raises StudyError for NaN and non-JSON."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StudyError(f"a cell must be plain JSON (dict, list, str, finite number, bool, None): {error}") from error


def cell_id(cell: Cell) -> str:
    """Name a cell by its content: the first 16 hex digits of SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical_json(cell).encode()).hexdigest()[:16]


def storage_url(storage: str | Path) -> str:
    """The SQLAlchemy URL of a storage: a path ending in .db, .sqlite or .sqlite3, or a URL.

    Paths become absolute, so that workers started elsewhere open the same file. Raises StudyError for
    anything else.
    """
    if "://" in str(storage):
        return str(storage)
    path = Path(storage)
    if path.suffix not in SQLITE_SUFFIXES:
        raise StudyError(
            f"{str(storage)!r} is no storage: give a path ending in {', '.join(SQLITE_SUFFIXES)}, "
            f"or a URL such as postgresql://user@host/database"
        )
    return f"sqlite:///{path.absolute()}"


def open_storage(storage: str | Path, *, heartbeat: int = 15, grace: int = 60, patience: float = 0.0) -> RDBStorage:
    """Open Optuna's storage so that many processes can share it, making the tables if they are missing.

    SQLite files get write-ahead logging and start every transaction with BEGIN IMMEDIATE: Optuna reads, then
    writes, and with SQLite's default two processes may both read first. They must lie on a local disk. For
    PostgreSQL see `_server_options`.
    `heartbeat` is the seconds between a running trial's signs of life, `grace` the seconds without one after
    which its worker counts as dead, `patience` the seconds for which a database server that does not answer is
    tried again. Raises StudyError if the database cannot be opened, MissingDependency if its driver is not
    installed.
    """
    try:
        url = sqlalchemy.make_url(storage_url(storage))
        url.get_dialect()
    except sqlalchemy.exc.ArgumentError as error:
        raise StudyError(f"{str(storage)!r} is no database URL: {error}") from error
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite and url.database in (None, "", ":memory:"):
        raise StudyError("a storage in memory cannot be shared by processes; give a path ending in .db")
    if sqlite:
        assert url.database is not None
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite else _server_options(url)
    end = time.monotonic() + patience
    # Optuna formats the URL, to fill in a schema version.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    for attempt in itertools.count(1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # the heartbeat, since Optuna 2
                opened = RDBStorage(text, options, heartbeat_interval=heartbeat, grace_period=grace)
            if sqlite:
                _share_sqlite(opened.engine)
            return opened
        except ImportError as error:
            raise MissingDependency(
                f"no driver for {url.drivername} databases is installed ({error.__cause__ or error}); "
                "for PostgreSQL run: pip install 'bitbook[postgres]'"
            ) from error
        except (sqlalchemy.exc.DBAPIError, StorageInternalError) as error:
            # Two processes that open a new database at once trip over each other's tables, never twice.
            if attempt >= _OPEN_ATTEMPTS and (sqlite or time.monotonic() > end):
                raise StudyError(f"cannot open the storage {url}: {error.__cause__ or error}") from error
            time.sleep(min(0.1 * attempt, _LONGEST_PAUSE))
    raise AssertionError("the last attempt returns or raises")


def _server_options(url: sqlalchemy.URL) -> dict[str, Any]:
    """How a database server is connected to; what the URL says itself stays.

    No connection is kept between transactions: a hundred workers with two threads each would hold more than
    PostgreSQL's usual hundred, and none can be found broken after a restart. PostgreSQL ends a transaction whose
    client has frozen in the middle of it, which would hold the study's row until the client wakes up; its clock
    shows UTC, whatever the client's PGTZ; and a client gives up on a machine that has vanished.
    """
    options: dict[str, Any] = {"poolclass": sqlalchemy.pool.NullPool}
    if url.get_backend_name() == "postgresql" and url.get_dialect().driver in ("psycopg", "psycopg2"):
        arguments = {
            "connect_timeout": 10,
            "keepalives_idle": 30,
            "tcp_user_timeout": 30_000,  # milliseconds
            "options": f"-c idle_in_transaction_session_timeout={1000 * _FROZEN} -c timezone=UTC",
        }
        options["connect_args"] = {key: value for key, value in arguments.items() if key not in url.query}
    return options


def _patient(method: Callable[Concatenate[StudyStore, P], T]) -> Callable[Concatenate[StudyStore, P], T]:
    """Do a whole transaction again while the database server is away, for the storage's patience."""

    @functools.wraps(method)
    def repeated(self: StudyStore, *args: P.args, **kwargs: P.kwargs) -> T:
        end, pause = None, 0.1
        while True:
            try:
                return method(self, *args, **kwargs)
            except sqlalchemy.exc.DBAPIError as error:
                if not self._is_server or not _is_away(error):
                    raise
                end = end or time.monotonic() + PATIENCE
                if time.monotonic() > end:
                    raise StudyError(f"the database has not answered for {PATIENCE:.0f} s: {error.orig}") from error
                print(f"the database does not answer, trying again: {error.orig}", file=sys.stderr, flush=True)
            time.sleep(pause * random.uniform(0.5, 1.5))  # workers that lost it together come back apart
            pause = min(2 * pause, _LONGEST_PAUSE, self.grace.total_seconds() / 4)

    return repeated


def _is_away(error: sqlalchemy.exc.DBAPIError) -> bool:
    """Whether trying again may help: refused or broken connections, a server that starts or stops, deadlocks."""
    kinds = sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError
    frozen = getattr(error.orig, "sqlstate", None) == "25P03"  # the transaction that `_server_options` ended
    return error.connection_invalidated or frozen or isinstance(error, kinds)


def _share_sqlite(engine: sqlalchemy.Engine) -> None:
    @sqlalchemy.event.listens_for(engine, "connect")
    def _(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions: the hook below does
        connection.execute("PRAGMA journal_mode=WAL")

    @sqlalchemy.event.listens_for(engine, "begin")
    def _(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before the hooks
    with engine.begin():
        pass


def has_study(storage: RDBStorage, name: str) -> bool:
    """Whether the storage holds a study of this name."""
    with Session(storage.engine) as session:
        return StudyRow.find_by_name(name, session) is not None


@dataclass(frozen=True)
class Claim:
    """The right to run one cell. `trial_id` is the fencing token: void once the trial has been given up."""

    trial_id: int
    cell_id: str
    cell: dict[str, Any]
    started: str
    _clock: float = field(default_factory=time.perf_counter, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """Seconds since the claim."""
        return time.perf_counter() - self._clock


class StudyStore:
    """One study in a storage: a queue of cells and a growing record of their results.

    Safe to use from several processes and threads at once. An Optuna study of two objectives, bytes
    (minimize) and accuracy (maximize), lies under it; a result's `objectives: [bytes, accuracy]` are its
    values. A result without them is recorded with the worst values there are, (inf, -inf), so that it is on
    no Pareto front.
    """

    def __init__(self, storage: RDBStorage, name: str) -> None:
        """Open a study that exists; raises StudyError if it does not, or has another format version."""
        with Session(storage.engine) as session:
            study = StudyRow.find_by_name(name, session)
            row = study and StudyAttributeRow.find_by_study_and_key(study, "bitbook", session)
            if row is None:
                raise StudyError(f"the storage holds no bitbook study named {name!r}; run the study to make it")
            self._study_id: int = study.study_id
            found = json.loads(row.value_json)
        if found["format"] != FORMAT:
            raise StudyError(
                f"study {name!r} has format {found['format']}, this version reads format {FORMAT}: "
                "use the bitbook that wrote it, or start a study of another name"
            )
        assert storage.heartbeat_interval is not None
        assert storage.grace_period is not None
        self.storage = storage
        dialect = storage.engine.dialect.name
        self._is_server = dialect != "sqlite"
        self._is_postgresql = dialect == "postgresql"
        self.name = name
        self.trial: str = found["trial"]
        self.settings: dict[str, Any] = found["settings"]
        self.heartbeat_interval = storage.heartbeat_interval
        self.grace = timedelta(seconds=storage.grace_period)

    @classmethod
    def create(
        cls, storage: RDBStorage, name: str, trial: str, settings: Mapping[str, Any] | None = None
    ) -> StudyStore:
        """Make the study, or open it if it is the same one.

        `trial` is the trial function as "package.module:function", `settings` whatever else the results
        depend on and no cell says (JSON). Raises StudyError if a study of that name was made with others.
        """
        fingerprint = {
            "format": FORMAT,
            "trial": trial,
            "settings": json.loads(canonical_json(settings or {})),
        }
        try:
            with Session(storage.engine) as session, session.begin():
                study = StudyRow(study_name=name)
                session.add(study)
                session.flush()
                for i, direction in enumerate((StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE)):
                    session.add(models.StudyDirectionModel(study_id=study.study_id, objective=i, direction=direction))
                for table, key, value in (
                    (StudyAttributeRow, "bitbook", fingerprint),
                    (models.StudySystemAttributeModel, "study:metric_names", ["bytes", "accuracy"]),
                ):
                    session.add(table(study_id=study.study_id, key=key, value_json=json.dumps(value)))
        except sqlalchemy.exc.IntegrityError:
            pass  # the name is taken: checked below
        store = cls(storage, name)
        found = {"format": FORMAT, "trial": store.trial, "settings": store.settings}
        for key, value in fingerprint.items():
            if found[key] != value:
                raise StudyError(
                    f"study {name!r} was made with {key} {canonical_json(found[key])}, "
                    f"not {canonical_json(value)}: "
                    "results of both in one table would mislead; give the study another name or storage"
                )
        return store

    @_patient
    def enqueue(self, cells: Iterable[Cell], *, limit: int | None = None) -> int:
        """Put every cell that the study does not know yet into the queue; returns how many were new.

        With a `limit`, only the first that leave the study with so many cells at most.
        """
        wanted = {cell_id(cell): dict(cell) for cell in cells}
        with self._locked() as session:
            known = self._newest(session)
            new = {identity: cell for identity, cell in wanted.items() if identity not in known}
            if limit is not None:
                new = dict(itertools.islice(new.items(), max(limit - len(known), 0)))
            self._add_waiting(session, new, kills=0)
        return len(new)

    @_patient
    def claim(self, worker: str = "") -> Claim | None:
        """Take the cell that has waited longest, or None if none waits.

        `worker` names the taker, so that `release` can find what it was running.
        """
        with self._locked() as session:
            trial = session.scalars(self._trials(TrialState.WAITING).limit(1)).first()
            if trial is None:
                return None
            trial.state = TrialState.RUNNING
            trial.datetime_start = datetime.now(UTC)
            started = datetime.now(UTC).isoformat(timespec="seconds")
            # A trial without a heartbeat never goes stale, so the first one is part of the claim.
            session.add(HeartbeatRow(trial_id=trial.trial_id, heartbeat=self._now(session)))
            known = _attributes(session, trial.trial_id)
            _set(session, trial.trial_id, worker=worker, started=started)
            return Claim(trial.trial_id, known["cell_id"], known["cell"], started)

    def heartbeat(self, claim: Claim) -> None:
        """Say that the claim's worker lives; due every `heartbeat_interval` seconds."""
        self.storage.record_heartbeat(claim.trial_id)

    @_patient
    def finish(self, claim: Claim, result: Mapping[str, Any]) -> None:
        """Record the result of a claimed cell, for good; the same one again changes nothing.

        Raises LateResult (a StudyError) if the trial has been given up or has another result, StudyError if the
        result is not one (see `check_result`); the storage is unchanged then.
        """
        values = check_result(result)
        with self._locked() as session:
            trial = self._running(session, claim, TrialState.COMPLETE, result=dict(result))
            if trial is None:
                return
            _set(session, trial.trial_id, result=dict(result), seconds=round(claim.seconds, 3))
            for objective, value in enumerate(values):
                stored, kind = ValueRow.value_to_stored_repr(value)
                session.add(ValueRow(trial_id=trial.trial_id, objective=objective, value=stored, value_type=kind))
            _close(trial, TrialState.COMPLETE)

    @_patient
    def fail(self, claim: Claim, error: str) -> None:
        """Record that the trial raised; `error` is its traceback. Raises LateResult as `finish` does."""
        with self._locked() as session:
            trial = self._running(session, claim, TrialState.FAIL, error=error)
            if trial is None:
                return
            _set(session, trial.trial_id, error=error, seconds=round(claim.seconds, 3))
            _close(trial, TrialState.FAIL)

    @_patient
    def release(self, worker: str, *, killed_by: str | None = None) -> int:
        """Put the cells that a dead worker was running back into the queue; returns how many there were.

        `killed_by` says how the worker died, if the cell may be to blame: a cell that has killed three is
        failed.
        """
        with self._locked() as session:
            lost = [
                trial
                for trial in session.scalars(self._trials(TrialState.RUNNING))
                if _attributes(session, trial.trial_id)["worker"] == worker
            ]
            for trial in lost:
                self._give_up(session, trial, killed_by)
            return len(lost)

    @_patient
    def requeue_stale(self) -> int:
        """Put cells back into the queue whose workers gave no heartbeat for `grace`; returns how many."""
        with self._locked() as session:
            now, up = self._now(session), self._up_since(session)
            query = self._trials(TrialState.RUNNING).join(HeartbeatRow, HeartbeatRow.trial_id == TrialRow.trial_id)
            rows = session.execute(query.add_columns(HeartbeatRow.heartbeat))
            stale = [trial for trial, beat in rows if now - max(beat, up) > self.grace]
            for trial in stale:
                self._give_up(session, trial, killed_by=None)
            return len(stale)

    @_patient
    def retry_failed(self) -> int:
        """Put every failed cell back into the queue; returns how many there were."""
        with self._locked() as session:
            failed = [trial_id for trial_id, state in self._newest(session).values() if state == TrialState.FAIL]
            for trial_id in failed:
                known = _attributes(session, trial_id)
                self._add_waiting(session, {known["cell_id"]: known["cell"]}, kills=0)
            return len(failed)

    @_patient
    def busy(self) -> bool:
        """Whether any cell waits or runs; cheap, since every idle worker asks."""
        with Session(self.storage.engine) as session:
            states = TrialState.WAITING, TrialState.RUNNING
            chosen = TrialRow.study_id == self._study_id, TrialRow.state.in_(states)
            return session.scalars(sqlalchemy.select(TrialRow.trial_id).where(*chosen).limit(1)).first() is not None

    @_patient
    def counts(self) -> dict[str, int]:
        """How many cells are `waiting`, `running`, `done` and `failed`; they sum to the cells enqueued."""
        with Session(self.storage.engine) as session:
            states = Counter(state for _, state in self._newest(session).values())
        return {
            "waiting": states[TrialState.WAITING],
            "running": states[TrialState.RUNNING],
            "done": states[TrialState.COMPLETE],
            "failed": states[TrialState.FAIL],
        }

    def results(self) -> list[dict[str, Any]]:
        """The accepted results, one dict (cell_id, cell, result, started, seconds) a cell, as enqueued.

        `started` is UTC in ISO 8601, `seconds` the time from claim to result.
        """
        return self._records(TrialState.COMPLETE, ("cell_id", "cell", "result", "started", "seconds"))

    def failures(self) -> list[dict[str, Any]]:
        """The failed cells, one dict (cell_id, cell, error, started) a cell, as enqueued."""
        return self._records(TrialState.FAIL, ("cell_id", "cell", "error", "started"))

    def unfinished(self) -> list[dict[str, Any]]:
        """The cells that wait or run, as enqueued."""
        states = TrialState.WAITING, TrialState.RUNNING
        return [record["cell"] for state in states for record in self._records(state, ("cell",))]

    def close(self) -> None:
        """Close the storage's connections; the next use opens them again."""
        self.storage.engine.dispose()

    @contextmanager
    def _locked(self) -> Iterator[Session]:
        """A transaction that holds the study: what others do to it happens before or after, not between."""
        with Session(self.storage.engine) as session, session.begin():
            StudyRow.find_or_raise_by_id(self._study_id, session, for_update=True)
            yield session

    def _now(self, session: Session) -> datetime:
        """The database's time, in UTC; on PostgreSQL of this moment, not of before the wait for the study's row."""
        clock = sqlalchemy.func.clock_timestamp() if self._is_postgresql else sqlalchemy.func.now()
        now = session.scalar(sqlalchemy.select(clock))
        assert now is not None
        return now.replace(tzinfo=None)  # PostgreSQL's has a time zone, the column has none

    def _up_since(self, session: Session) -> datetime:
        """Since when heartbeats can be recorded: while PostgreSQL is down, nobody's silence tells of a death."""
        if not self._is_postgresql:
            return datetime.min
        started = session.scalar(sqlalchemy.select(sqlalchemy.func.pg_postmaster_start_time()))
        assert started is not None
        return started.replace(tzinfo=None)

    def _newest(self, session: Session) -> dict[str, tuple[int, TrialState]]:
        """Each cell's newest trial (id, state), the cells in order of enqueueing."""
        rows = session.execute(
            sqlalchemy.select(AttributeRow.value_json, TrialRow.trial_id, TrialRow.state)
            .join(TrialRow, TrialRow.trial_id == AttributeRow.trial_id)
            .where(TrialRow.study_id == self._study_id, AttributeRow.key == "cell_id")
            .order_by(TrialRow.trial_id)
        )
        return {json.loads(text): (trial_id, state) for text, trial_id, state in rows}

    @_patient
    def _records(self, state: TrialState, keys: tuple[str, ...]) -> list[dict[str, Any]]:
        with Session(self.storage.engine) as session:
            chosen = [trial_id for trial_id, found in self._newest(session).values() if found == state]
            records: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in chosen}
            rows = session.execute(
                sqlalchemy.select(AttributeRow.trial_id, AttributeRow.key, AttributeRow.value_json)
                .join(TrialRow, TrialRow.trial_id == AttributeRow.trial_id)
                .where(TrialRow.study_id == self._study_id, TrialRow.state == state)
                .where(AttributeRow.key.in_(keys))
            )
            for trial_id, key, text in rows:
                if trial_id in records:
                    records[trial_id][key] = json.loads(text)
        return [{key: record[key] for key in keys} for record in records.values()]

    def _add_waiting(self, session: Session, cells: Mapping[str, Cell], kills: int) -> None:
        count = sqlalchemy.select(sqlalchemy.func.count()).where(TrialRow.study_id == self._study_id)
        number = session.scalar(count) or 0  # Optuna numbers a study's trials from 0, without gaps
        trials = [
            TrialRow(study_id=self._study_id, number=number + i, state=TrialState.WAITING) for i in range(len(cells))
        ]
        session.add_all(trials)
        session.flush()
        for trial, (identity, cell) in zip(trials, cells.items(), strict=True):
            _set(session, trial.trial_id, cell_id=identity, cell=cell, kills=kills)

    def _trials(self, state: TrialState) -> sqlalchemy.Select[Any]:
        chosen = TrialRow.study_id == self._study_id, TrialRow.state == state
        return sqlalchemy.select(TrialRow).where(*chosen).order_by(TrialRow.trial_id)

    def _running(self, session: Session, claim: Claim, end: TrialState, **outcome: object) -> Any:
        """The claim's trial; None if it has ended so with this very outcome, which was handed in before."""
        trial = session.get(TrialRow, claim.trial_id)
        assert trial is not None
        if trial.state == end:
            known = _attributes(session, trial.trial_id)
            if all(json.dumps(known[key]) == json.dumps(value) for key, value in outcome.items()):
                return None
        if trial.state != TrialState.RUNNING:
            raise LateResult(
                f"late result of cell {claim.cell_id} refused: its trial {trial.number} in {self.name!r} is "
                f"{trial.state.name}, not RUNNING; the cell was given to another worker or is finished"
            )
        return trial

    def _give_up(self, session: Session, trial: Any, killed_by: str | None) -> None:
        """Fail a trial whose worker is gone; queue its cell again, unless it has killed too many."""
        known = _attributes(session, trial.trial_id)
        kills = known["kills"] + (killed_by is not None)
        if kills < MAX_KILLS:
            error = f"worker lost ({killed_by or 'no heartbeat, or stopped'}); the cell was queued again"
            self._add_waiting(session, {known["cell_id"]: known["cell"]}, kills)
        else:
            error = f"the cell killed {kills} workers; the last one: {killed_by}"
        _set(session, trial.trial_id, error=error)
        _close(trial, TrialState.FAIL)


def check_result(result: object) -> tuple[float, float]:
    """The two values (bytes, accuracy) of a trial's result; raises StudyError if it is not a JSON-able dict.

    A result's `objectives`, if there, are two finite numbers; NaN elsewhere is recorded as it is.
    """
    if not isinstance(result, Mapping):
        raise StudyError(f"a trial must return a JSON-able dict, not {type(result).__name__}")
    try:
        json.dumps(dict(result))
    except (TypeError, ValueError) as error:
        raise StudyError(f"a trial must return a JSON-able dict: {error}") from error
    objectives = result.get("objectives", (math.inf, -math.inf))
    well_formed = isinstance(objectives, list | tuple) and len(objectives) == 2
    if not well_formed or any(not isinstance(value, int | float) for value in objectives):
        raise StudyError(f"`objectives` must be two numbers, [bytes, accuracy], not {objectives!r}")
    if "objectives" in result and not all(map(math.isfinite, objectives)):
        raise StudyError(f"`objectives` must be finite, not {objectives!r}: has the training diverged?")
    return float(objectives[0]), float(objectives[1])


def _attributes(session: Session, trial_id: int) -> dict[str, Any]:
    rows = AttributeRow.where_trial_id(trial_id, session)
    return {row.key: json.loads(row.value_json) for row in rows}


def _set(session: Session, trial_id: int, **attributes: object) -> None:
    for key, value in attributes.items():
        session.add(AttributeRow(trial_id=trial_id, key=key, value_json=json.dumps(value)))


def _close(trial: Any, state: TrialState) -> None:
    trial.state = state
    trial.datetime_complete = datetime.now(UTC)
