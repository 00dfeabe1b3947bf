"""Studies on PostgreSQL, started here from the distribution's package on loopback."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import optuna
import pytest

from bench import faults
from bitbook.study import storage
from bitbook.study.storage import LateResult, StudyStore, cell_id, open_storage

pytestmark = pytest.mark.timeout(300)  # little work, but many pauses
CELLS = [{"x": x} for x in range(40)]


@pytest.fixture(scope="module")
def database():
    try:
        with faults.server() as running:
            yield running
    except faults.NoServer as reason:
        pytest.skip(str(reason))


@pytest.fixture
def connect(database):
    """Stores of one study that exists for this test."""
    opened = []

    def another(grace=60):
        opened.append(StudyStore.create(open_storage(database.url, heartbeat=1, grace=grace), "test", "a:b"))
        return opened[-1]

    yield another
    with suppress(KeyError):
        optuna.delete_study(study_name="test", storage=opened[0].storage)
    for store in opened:
        store.close()


def test_every_cell_has_one_result_whoever_is_killed_or_frozen_and_while_the_database_is_away(database):
    outcome = faults.faults(database, cells=40, seconds=0.3, workers=3, grace=3)
    assert (outcome.accepted, outcome.duplicates, outcome.lost, outcome.wrong) == (40, 0, 0, 0)
    # The frozen one's is late; on a machine that is busy enough, heartbeats of others may be, too.
    assert outcome.late >= 1 and outcome.away > 3
    # What was ready when its worker was killed has been executed, and is neither accepted nor refused.
    assert outcome.accepted + outcome.late <= outcome.executions <= outcome.accepted + outcome.late + outcome.killed


def test_claims_are_exclusive(connect):
    stores = [connect() for _ in range(3)]
    assert sum(store.enqueue(CELLS) for store in stores) == len(CELLS)

    def take_all(store):
        taken = []
        while (claim := store.claim()) is not None:
            store.finish(claim, {"x": claim.cell["x"]})
            taken.append(claim.cell["x"])
        return taken

    with ThreadPoolExecutor(len(stores)) as pool:
        taken = list(pool.map(take_all, stores))
    assert sorted(x for each in taken for x in each) == list(range(40))
    assert [record["cell_id"] for record in stores[0].results()] == list(map(cell_id, CELLS))


def test_who_freezes_in_a_transaction_does_not_stop_the_others(connect, monkeypatch):
    monkeypatch.setattr(storage, "_FROZEN", 2)
    frozen, other = connect(), connect()
    frozen.enqueue(CELLS[:2])
    claim = frozen.claim()

    def freeze():
        with frozen._locked() as session:
            began = time.monotonic()
            assert other.claim().cell == CELLS[1]
            assert time.monotonic() - began > 1.5  # it waited for the study's row
            session.scalar(storage.sqlalchemy.text("SELECT 1"))

    with pytest.raises(storage.sqlalchemy.exc.DBAPIError) as raised:
        freeze()
    assert storage._is_away(raised.value)  # so that the frozen one, awake, does its change again
    frozen.finish(claim, {})


def test_a_claim_that_waited_is_not_stale(connect):
    """Its heartbeat is of when it was made, not of when its transaction began."""
    waiting, other = connect(grace=1), connect(grace=1)
    waiting.enqueue(CELLS[:1])
    with ThreadPoolExecutor(1) as pool:
        with other._locked():
            claim = pool.submit(waiting.claim)
            time.sleep(2)
        assert claim.result().cell == CELLS[0]
    assert other.requeue_stale() == 0


def test_a_database_that_is_away_is_waited_for(database, connect, capsys):
    store = connect()
    store.enqueue(CELLS[:3])
    claim = store.claim()
    database.stop("immediate")
    returned = threading.Timer(1.0, database.start)
    returned.start()
    store.finish(claim, {"x": 0})
    assert "does not answer, trying again" in capsys.readouterr().err
    assert store.counts() == {"waiting": 2, "running": 0, "done": 1, "failed": 0}
    returned.join()


def test_patience_ends(database, connect, monkeypatch):
    store = connect()
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    database.stop("fast")
    try:
        with pytest.raises(storage.StudyError, match="not answered for 0 s|not answered for 1 s"):
            store.enqueue(CELLS)
        with pytest.raises(storage.StudyError, match="cannot open the storage"):
            open_storage(database.url)
    finally:
        database.start()


def test_a_lost_answer_is_asked_for_again(connect, monkeypatch):
    """The transaction is committed, the connection breaks before its answer: doing it again changes nothing."""
    store = connect()
    store.enqueue(CELLS[:2])
    locked, lost = store._locked, []

    @contextmanager
    def lossy():
        with locked() as session:
            yield session
        if not lost:
            lost.append(True)
            raise storage.sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("connection reset"))

    monkeypatch.setattr(store, "_locked", lossy)
    claim = store.claim()
    assert claim.cell == CELLS[1] and store.counts()["running"] == 2  # the first claim goes stale
    lost.clear()
    store.finish(claim, {"loss": float("nan")})
    assert lost and len(store.results()) == 1
    with pytest.raises(LateResult):
        store.finish(claim, {"loss": 1.0})
