import logging
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbook.errors import MissingDependency, StudyError
from bitbook.study.storage import (
    LateResult,
    StudyStore,
    canonical_json,
    cell_id,
    check_result,
    open_storage,
    storage_url,
)

CELLS = [{"x": x, "recipe": {"bits": 4}} for x in range(5)]
TRIAL = "package.module:function"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "study.db"


@pytest.fixture
def store(path):
    store = StudyStore.create(open_storage(path, heartbeat=1, grace=1), "test", TRIAL)
    yield store
    store.close()


def another(store, path):
    return StudyStore(open_storage(path, heartbeat=1, grace=1), store.name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_cell_id_depends_on_content_not_on_order(cell):
    turned = dict(reversed(cell.items()))
    assert cell_id(cell) == cell_id(turned)
    assert cell_id({**cell, "new key": 1}) != cell_id({**cell, "new key": 2})
    assert len(cell_id(cell)) == 16 and int(cell_id(cell), 16) >= 0


def test_cell_id_is_frozen():
    assert canonical_json({"b": [1, 2.5], "a": "µ"}) == r'{"a":"\u00b5","b":[1,2.5]}'
    assert cell_id({}) == "44136fa355b3678a"  # the start of SHA-256 of "{}"


@pytest.mark.parametrize("cell", [{"x": math.nan}, {"x": {1}}, {"x": object()}])
def test_cells_must_be_json(cell):
    with pytest.raises(StudyError, match="plain JSON"):
        cell_id(cell)


def test_queue(store):
    assert store.enqueue(CELLS) == 5
    assert store.counts() == {"waiting": 5, "running": 0, "done": 0, "failed": 0}
    claims = [store.claim("me") for _ in CELLS]
    assert [claim.cell for claim in claims] == CELLS
    assert [claim.cell_id for claim in claims] == [cell_id(cell) for cell in CELLS]
    assert store.claim("me") is None
    for claim in reversed(claims[1:]):
        store.finish(claim, {"y": claim.cell["x"], "big": "x" * 50_000})
    store.fail(claims[0], "Traceback: no")
    assert store.counts() == {"waiting": 0, "running": 0, "done": 4, "failed": 1}
    results = store.results()
    assert [record["cell"] for record in results] == CELLS[1:]  # as enqueued, not as finished
    assert [record["result"]["y"] for record in results] == [1, 2, 3, 4]
    assert all(record["seconds"] >= 0 and record["started"].endswith("+00:00") for record in results)
    assert [(failure["cell"], failure["error"]) for failure in store.failures()] == [(CELLS[0], "Traceback: no")]


def test_enqueue_again_adds_only_what_is_new(store, path):
    store.enqueue(CELLS[:3])
    store.finish(store.claim(), {})
    store.fail(store.claim(), "no")
    assert store.enqueue(CELLS[:3]) == 0
    assert store.enqueue([*CELLS, CELLS[4], {"recipe": {"bits": 4}, "x": 4}]) == 2
    assert store.counts() == {"waiting": 3, "running": 0, "done": 1, "failed": 1}
    reopened = another(store, path)
    assert reopened.enqueue(CELLS) == 0 and reopened.counts() == store.counts()
    reopened.close()


def test_a_limit_counts_what_is_there(store):
    assert store.enqueue(CELLS[:2], limit=3) == 2
    assert store.enqueue([CELLS[0], *CELLS[2:]], limit=3) == 1  # what is there already takes no room
    assert store.unfinished() == CELLS[:3] and store.busy()
    claims = [store.claim() for _ in range(3)]
    assert store.unfinished() == CELLS[:3]
    store.finish(claims[0], {})
    store.fail(claims[1], "no")
    assert store.enqueue(CELLS, limit=3) == 0 and store.unfinished() == CELLS[2:3] and store.busy()
    store.finish(claims[2], {})
    assert not store.busy() and store.unfinished() == []


def test_two_processes_open_and_enqueue_at_once(path):
    script = f"""
import sys
from bitbook.study.storage import StudyStore, open_storage
print("ready", flush=True)
sys.stdin.readline()
store = StudyStore.create(open_storage({str(path)!r}), "test", "a:b")
print(store.enqueue([{{"x": x}} for x in range(200)]))
"""
    command = [sys.executable, "-W", "error", "-c", script]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    added = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sum(added) == 200
    store = StudyStore(open_storage(path), "test")
    assert store.counts() == {"waiting": 200, "running": 0, "done": 0, "failed": 0}
    study = optuna.load_study(study_name="test", storage=storage_url(path))
    assert [trial.number for trial in study.trials] == list(range(200))
    store.close()


def test_claims_are_exclusive_between_threads(store):
    store.enqueue([{"x": x} for x in range(40)])

    def take_all(worker):
        taken = []
        while (claim := store.claim(worker)) is not None:
            store.finish(claim, {"worker": worker})
            taken.append(claim.cell["x"])
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(take_all, "abcd"))
    assert sorted(x for each in taken for x in each) == list(range(40))
    assert store.counts()["done"] == 40


def test_a_result_is_accepted_once(store):
    store.enqueue(CELLS[:1])
    claim = store.claim()
    store.finish(claim, {"first": 1, "loss": math.nan})
    store.finish(claim, {"first": 1, "loss": math.nan})  # handed in again, since the answer was lost
    for late in (lambda: store.finish(claim, {"second": 2}), lambda: store.fail(claim, "no")):
        with pytest.raises(LateResult, match="COMPLETE, not RUNNING"):
            late()
    assert [record["result"]["first"] for record in store.results()] == [1]


def test_a_late_result_is_refused_before_and_after_the_cell_is_done(store, path):
    store.enqueue(CELLS[:1])
    slow = store.claim("slow")
    assert store.requeue_stale() == 0
    time.sleep(2.2)  # one second of grace, and SQLite's clock counts whole seconds
    assert another(store, path).requeue_stale() == 1
    assert store.counts() == {"waiting": 1, "running": 0, "done": 0, "failed": 0}
    with pytest.raises(StudyError, match="late result"):
        store.finish(slow, {"by": "slow"})
    quick = store.claim("quick")
    assert quick.cell_id == slow.cell_id and quick.trial_id > slow.trial_id
    with pytest.raises(StudyError, match="late result"):
        store.finish(slow, {"by": "slow"})
    store.finish(quick, {"by": "quick"})
    with pytest.raises(StudyError, match="late result"):
        store.fail(slow, "slow")
    assert [record["result"] for record in store.results()] == [{"by": "quick"}]
    assert store.failures() == []


def test_a_heartbeat_keeps_a_claim(store):
    store.enqueue(CELLS[:1])
    claim = store.claim()
    stop = threading.Event()

    def beat():
        while not stop.wait(0.3):
            store.heartbeat(claim)

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(2.2)
    assert store.requeue_stale() == 0
    stop.set()
    thread.join()
    store.finish(claim, {})


def test_release_requeues_the_cells_of_one_worker(store):
    store.enqueue(CELLS)
    lost, kept = store.claim("dead"), store.claim("alive")
    assert store.release("dead") == 1 and store.release("dead") == 0
    with pytest.raises(LateResult):
        store.finish(lost, {})
    store.finish(kept, {})
    assert store.counts() == {"waiting": 4, "running": 0, "done": 1, "failed": 0}
    order = []
    while (claim := store.claim()) is not None:
        order.append(claim.cell)
        store.finish(claim, {})
    assert order == [*CELLS[2:], CELLS[0]]
    assert [record["cell"] for record in store.results()] == CELLS


def test_a_cell_that_kills_three_workers_fails(store):
    store.enqueue(CELLS[:1])
    for kill in range(3):
        for _ in range(4):  # stopped for other reasons, which are not held against the cell
            store.claim("stopped")
            store.release("stopped")
        assert store.claim("victim") is not None, kill
        store.release("victim", killed_by="SIGKILL")
    assert store.counts() == {"waiting": 0, "running": 0, "done": 0, "failed": 1}
    assert "killed 3 workers; the last one: SIGKILL" in store.failures()[0]["error"]
    assert store.retry_failed() == 1 and store.retry_failed() == 0
    store.finish(store.claim(), {})
    assert store.counts()["done"] == 1 and store.failures() == []


def test_a_study_remembers_what_it_is(path):
    storage = open_storage(path)
    StudyStore.create(storage, "test", TRIAL, {"epochs": 5, "start": (1, 2)})
    again = StudyStore.create(storage, "test", TRIAL, {"start": [1, 2], "epochs": 5})
    assert (again.trial, again.settings) == (TRIAL, {"epochs": 5, "start": [1, 2]})
    with pytest.raises(StudyError, match=r"made with settings .*5.*not .*6"):
        StudyStore.create(storage, "test", TRIAL, {"epochs": 6, "start": [1, 2]})
    with pytest.raises(StudyError, match="made with trial"):
        StudyStore.create(storage, "test", "another:function", {"epochs": 5, "start": [1, 2]})
    with pytest.raises(StudyError, match="no bitbook study named 'other'"):
        StudyStore(storage, "other")
    study = optuna.load_study(study_name="test", storage=storage)
    study.set_user_attr("bitbook", {**study.user_attrs["bitbook"], "format": 0})
    with pytest.raises(StudyError, match="has format 0"):
        StudyStore(storage, "test")
    optuna.create_study(study_name="foreign", storage=storage, load_if_exists=True)
    with pytest.raises(StudyError, match="no bitbook study"):
        StudyStore(storage, "foreign")
    storage.engine.dispose()


def test_studies_in_one_storage_are_apart(store):
    other = StudyStore.create(store.storage, "other", TRIAL)
    store.enqueue(CELLS[:2])
    other.enqueue(CELLS)
    store.claim("me")
    assert other.release("me") == 0
    assert (sum(store.counts().values()), sum(other.counts().values())) == (2, 5)


def test_optuna_reads_a_study(store, path):
    store.enqueue(CELLS)
    objectives = iter([[100, 90.0], [200, 95.0], [300, 94.0], [50, 10.0]])
    while (claim := store.claim("me")) is not None:
        value = next(objectives, None)
        store.finish(claim, {"objectives": value} if value else {"loss": math.nan})
    study = optuna.load_study(study_name="test", storage=storage_url(path))
    assert study.metric_names == ["bytes", "accuracy"]
    assert sorted(trial.values for trial in study.best_trials) == [[50, 10], [100, 90], [200, 95]]
    assert [trial.user_attrs["cell"] for trial in study.trials] == CELLS
    assert study.trials[-1].values == [math.inf, -math.inf]
    assert all(trial.duration.total_seconds() >= 0 for trial in study.trials)
    assert math.isnan(store.results()[-1]["result"]["loss"])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "not NoneType"),
        ({"x": object()}, "JSON-able"),
        ({"objectives": [1]}, "two numbers"),
        ({"objectives": ["1", 2]}, "two numbers"),
        ({"objectives": None}, "two numbers"),
        ({"objectives": [1, math.nan]}, "diverged"),
        ({"objectives": [math.inf, 1]}, "finite"),
    ],
)
def test_a_result_is_checked(store, result, message):
    with pytest.raises(StudyError, match=message):
        check_result(result)
    store.enqueue(CELLS[:1])
    claim = store.claim()
    with pytest.raises(StudyError, match=message):
        store.finish(claim, result)
    store.finish(claim, {"objectives": [1, 2.5]})


def test_storages_are_named_by_path_or_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage_url("a.db") == f"sqlite:///{tmp_path / 'a.db'}"
    assert storage_url("postgresql://host/b") == "postgresql://host/b"
    with pytest.raises(StudyError, match="give a path ending in .db"):
        storage_url("results.txt")
    with pytest.raises(StudyError, match="in memory"):
        open_storage("sqlite:///:memory:")
    with pytest.raises(MissingDependency, match="pip install"):
        open_storage("mysql+pymysql://host/b")
    with pytest.raises(StudyError, match="no database URL"):
        open_storage("mssql+nodriver://host/b")


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "study.db"
    path.write_text("this is a text file, not a database\n" * 100)
    with pytest.raises(StudyError, match="cannot open the storage"):
        open_storage(path)


def test_a_path_with_braces_is_a_path(tmp_path):
    open_storage(tmp_path / "{x}.db").engine.dispose()
    assert (tmp_path / "{x}.db").exists()


def test_opening_changes_no_global_setting(path, caplog, capfd):
    before = optuna.logging.get_verbosity(), logging.getLogger("optuna").handlers.copy()
    store = StudyStore.create(open_storage(path), "quiet", TRIAL)
    store.enqueue(CELLS)
    store.close()
    assert (optuna.logging.get_verbosity(), logging.getLogger("optuna").handlers) == before
    assert capfd.readouterr() == ("", "") and not caplog.records
