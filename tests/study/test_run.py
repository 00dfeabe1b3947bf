import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from bitbook.errors import StudyError
from bitbook.study import run
from bitbook.study.storage import StudyStore, cell_id, open_storage, storage_url

TRIALS = "tests.study.trivial_trials"
FAST = {"heartbeat": 1, "grace": 3, "progress": False}

# What a user's own program does; it is killed below.
PROGRAM = f"""
import sys
from bitbook.study.run import run_study
if __name__ == "__main__":
    cells = [{{"x": x, "seconds": float(sys.argv[3]), "log": sys.argv[2]}} for x in range(int(sys.argv[4]))]
    print(len(run_study(cells, "{TRIALS}:square", sys.argv[1], workers=2, heartbeat=1, grace=3)))
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


@pytest.fixture
def program():
    """Start the program in a process group of its own; what is left of it ends with the test."""
    started = []

    def start(path, log, seconds, cells):
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(path), str(log), str(seconds), str(cells)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def lines(log):
    return log.read_text().split() if log.exists() else []


def table(results):
    return [(record["cell_id"], record["cell"], record["result"]) for record in results]


def workers_of(path):
    """Process ids of the workers that serve the storage at `path`."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with (
                open(f"/proc/{process}/environ", "rb") as environment,
                open(f"/proc/{process}/cmdline", "rb") as call,
            ):
                if str(path).encode() in environment.read() and b"bitbook.study.run" in call.read():
                    found.append(int(process))
        except OSError:
            pass  # it ended while we looked
    return found


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="looks processes up in /proc")


def test_four_workers_run_every_cell_once_and_keep_the_order(path, tmp_path, capfd):
    log = tmp_path / "log"
    cells = [{"x": x, "seconds": 0.05, "log": str(log)} for x in range(40)]
    random.Random(0).shuffle(cells)
    results = run.run_study(cells, f"{TRIALS}:square", path, workers=4)
    first, *_, last = capfd.readouterr().err.splitlines()
    assert first == "0/40 done" and last.startswith("40/40 done, ") and last.endswith(" a minute")
    assert [record["cell"] for record in results] == cells
    assert [record["result"]["square"] for record in results] == [cell["x"] ** 2 for cell in cells]
    assert Counter(lines(log)) == {str(x): 1 for x in range(40)}
    # Nothing is left to do: no process starts, and the cells asked for come back in the order asked for.
    began = time.monotonic()
    again = run.run_study(cells[5:2:-1], f"{TRIALS}:square", path, workers=4, **FAST)
    assert again == results[5:2:-1] and time.monotonic() - began < 2
    assert len(lines(log)) == 40


def test_failing_trials_do_not_stop_a_study(path):
    cells = [{"x": x} for x in range(8)]
    with pytest.raises(StudyError, match="failed cells: 3") as caught:
        run.run_study(cells, f"{TRIALS}:faulty", path, workers=1, **FAST)
    for text in ("ValueError: three is too much", "SystemExit: 5", "diverged", "retry_failed", "Traceback"):
        assert text in str(caught.value)
    results = run.run_study(cells, f"{TRIALS}:faulty", path, workers=2, keep_going=True, **FAST)
    assert [record["cell"]["x"] for record in results] == [0, 1, 2, 6, 7]
    # What else has failed in the study does not concern who asks for other cells.
    assert len(run.run_study(cells[:2], f"{TRIALS}:faulty", path, workers=2, **FAST)) == 2
    store = StudyStore(open_storage(path), "study")
    assert store.retry_failed() == 3
    store.close()


@needs_proc
def test_a_killed_worker_is_replaced_and_its_cell_run_again(path, tmp_path):
    cells = [{"x": x, "seconds": 0.05, **({"marker": str(tmp_path / "died")} if x == 2 else {})} for x in range(6)]
    # A grace of minutes: it is the parent who sees the death.
    results = run.run_study(cells, f"{TRIALS}:deadly_once", path, workers=1, heartbeat=60, grace=600, progress=False)
    assert (tmp_path / "died").exists()
    assert table(results) == [(cell_id(cell), cell, run.load_trial(f"{TRIALS}:square")(cell)) for cell in cells]


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_is_failed(path):
    cells = [{"x": x} for x in (3, 4, 5)]
    with pytest.raises(StudyError, match="failed cells: 1") as caught:
        run.run_study(cells, f"{TRIALS}:deadly", path, workers=1, **FAST)
    assert "killed 3 workers" in str(caught.value) and "these are my last words" in str(caught.value)


@needs_proc
def test_kill_the_whole_group_and_restart(program, path, tmp_path):
    log, count = tmp_path / "log", 12
    killed = program(path, log, 0.1, count)
    wait_for(lambda: len(lines(log)) >= 4)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    wait_for(lambda: not workers_of(path))
    assert 4 <= len(lines(log)) < count
    store = StudyStore(open_storage(path), "study")
    before = {record["cell_id"]: record for record in store.results()}
    lost = store.counts()["running"]

    cells = [{"x": x, "seconds": 0.1, "log": str(log)} for x in range(count)]
    after = run.run_study(cells, f"{TRIALS}:square", path, workers=1, **FAST)
    assert after == store.results()
    assert store.counts() == {"waiting": 0, "running": 0, "done": count, "failed": 0}
    assert [before.get(record["cell_id"], record) for record in after] == after  # what was done stayed as it was
    assert lost <= 2 and len(lines(log)) <= count + lost
    store.close()

    uninterrupted = StudyStore.create(open_storage(tmp_path / "plain.db"), "study", f"{TRIALS}:square")
    uninterrupted.enqueue(cells)
    run.work(uninterrupted, run.load_trial(uninterrupted.trial), "me")
    assert table(uninterrupted.results()) == table(after)
    uninterrupted.close()


@pytest.mark.slow
@needs_proc
def test_workers_of_a_killed_parent_stop_after_their_trial(program, path, tmp_path):
    log = tmp_path / "log"
    parent = program(path, log, 0.3, 60)
    wait_for(lambda: len(lines(log)) >= 2)
    parent.kill()
    parent.communicate()
    wait_for(lambda: not workers_of(path), seconds=30)
    store = StudyStore(open_storage(path), "study")
    counts = store.counts()
    assert counts["running"] == 0 and counts["failed"] == 0  # their last results were accepted
    assert counts["done"] == len(lines(log)) < 60
    store.close()


@pytest.mark.slow
@needs_proc
def test_interrupt_leaves_a_study_that_goes_on(program, path, tmp_path):
    log = tmp_path / "log"
    interrupted = program(path, log, 0.1, 60)
    wait_for(lambda: len(lines(log)) >= 3)
    os.killpg(interrupted.pid, signal.SIGINT)
    _, message = interrupted.communicate(timeout=60)
    assert "of 60 cells are done and stored; the same command goes on" in " ".join(message.split())
    assert interrupted.returncode != 0 and not workers_of(path)
    store = StudyStore(open_storage(path), "study")
    counts = store.counts()
    assert counts["running"] == 0 and counts["failed"] == 0 and counts["waiting"] + counts["done"] == 60
    store.close()


def test_what_cannot_start_says_so_at_once(path, monkeypatch):
    cells = [{"x": 1}]
    for trial, message in [
        ("no_such_module:f", "cannot be imported"),
        (f"{TRIALS}:no_such_function", "cannot be imported"),
        (f"{TRIALS}:not_a_function", "is a int, not a callable"),
        ("square", "'package.module:callable'"),
    ]:
        with pytest.raises(StudyError, match=message):
            run.run_study(cells, trial, path, **FAST)
    with pytest.raises(StudyError, match="at least one worker"):
        run.run_study(cells, f"{TRIALS}:square", path, workers=0, **FAST)
    assert not path.exists()
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    with pytest.raises(StudyError, match="3 workers died idle; the last: exit code 1"):
        run.run_study(cells, f"{TRIALS}:square", path, workers=2, **FAST)


def test_a_study_does_not_go_on_as_another_one(path):
    StudyStore.create(open_storage(path), "study", f"{TRIALS}:square").close()
    with pytest.raises(StudyError, match="made with settings"):
        run.run_study([{"x": 1}], f"{TRIALS}:square", path, settings={"epochs": 1}, **FAST)
    with pytest.raises(StudyError, match="made with trial"):
        run.run_study([{"x": 1}], f"{TRIALS}:faulty", path, **FAST)
    with pytest.raises(StudyError, match="runs the trial"):
        run.main([f"--storage={path}", f"--trial={TRIALS}:faulty", "--threads=1"])


def test_a_worker_started_by_hand_helps(path, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the worker sets its thread variables
    store = StudyStore.create(open_storage(path), "study", f"{TRIALS}:environment")
    store.enqueue([{"x": x} for x in range(3)])
    assert run.main([f"--storage={storage_url(path)}", f"--trial={TRIALS}:environment", "--threads=3"]) == 0
    assert [record["result"] for record in store.results()] == [{"threads": "3"}] * 3
    store.close()


def test_a_worker_waits_for_its_study_and_refuses_other_versions(path, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    StudyStore.create(open_storage(path), "study", f"{TRIALS}:square", {"optuna": "0.0", "bytes": 3}).close()
    with pytest.raises(StudyError, match=r"runs on optuna 0.0, and here is optuna .*; install optuna 0.0"):
        run.main([f"--storage={path}", f"--trial={TRIALS}:square", "--threads=1"])
    monkeypatch.setattr(run, "PATIENCE", 0.1)
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    with pytest.raises(StudyError, match="holds no bitbook study named 'later'"):
        run.main([f"--storage={path}", f"--trial={TRIALS}:square", "--study=later", "--threads=1"])
    assert "no study named 'later' yet; waiting for it" in capsys.readouterr().err


def test_a_worker_that_is_asked_to_stop_puts_its_cell_back(path):
    store = StudyStore.create(open_storage(path), "study", f"{TRIALS}:square")
    store.enqueue([{"x": 1, "seconds": 600}])
    worker = subprocess.Popen(
        [sys.executable, "-m", "bitbook.study.run", f"--storage={path}", f"--trial={TRIALS}:square", "--threads=1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)},
    )
    wait_for(lambda: store.counts()["running"])
    worker.terminate()
    assert worker.wait(timeout=60) == 130
    assert store.counts() == {"waiting": 1, "running": 0, "done": 0, "failed": 0}
    store.close()


def test_who_finds_the_queue_empty_proposes_more(path):
    store = StudyStore.create(open_storage(path), "study", f"{TRIALS}:square")
    store.enqueue([{"x": 0}])

    def propose():
        return store.enqueue([{"x": len(store.results())}], limit=5)

    assert run.work(store, run.load_trial(store.trial), "me", propose=propose) == 5
    assert [record["result"]["square"] for record in store.results()] == [0, 1, 4, 9, 16]
    store.close()


def test_a_worker_drops_its_late_result_and_goes_on(path, capsys):
    store = StudyStore.create(open_storage(path), "study", f"{TRIALS}:square")
    store.enqueue([{"x": x} for x in range(3)])
    calls = []

    def trial(cell):
        calls.append(cell["x"])
        if len(calls) == 1:
            store.release("me")  # as if another process had declared us dead
        return {"call": len(calls)}

    assert run.work(store, trial, "me") == 4
    assert calls == [0, 1, 2, 0]
    assert "late result" in capsys.readouterr().err
    assert [record["result"]["call"] for record in store.results()] == [4, 2, 3]
    store.close()


@pytest.mark.parametrize(
    ("counts", "done_now", "elapsed", "expected"),
    [
        ((5, 1, 0, 0), 0, 3.0, "0/6 done"),
        ((5, 1, 4, 2), 4, 60.0, "4/12 done, 2 failed, 4 a minute, 90 s left"),
        ((100, 0, 10, 0), 1, 60.0, "10/110 done, 1 a minute, 100 min left"),
        ((0, 0, 9, 0), 9, 540.0, "9/9 done, 1 a minute"),
    ],
)
def test_status_line(counts, done_now, elapsed, expected):
    named = dict(zip(("waiting", "running", "done", "failed"), counts, strict=True))
    assert run.status_line(named, done_now, elapsed) == expected


@pytest.mark.slow
@needs_proc
def test_many_kills_in_a_row_change_nothing_in_the_table(program, path, tmp_path):
    chance = random.Random(0)
    log, count = tmp_path / "log", 80
    for _ in range(6):
        process = program(path, log, 0.2, count)
        seen = len(lines(log))
        wait_for(lambda seen=seen: len(lines(log)) >= seen + 2)
        time.sleep(chance.random())
        victims = workers_of(path)
        if chance.random() < 0.5 and victims:
            os.kill(chance.choice(victims), signal.SIGKILL)  # the parent goes on
            time.sleep(1.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    last = program(path, log, 0.2, count)
    assert last.communicate(timeout=300)[0] == f"{count}\n"
    store = StudyStore(open_storage(path), "study")
    assert [record["result"]["square"] for record in store.results()] == [x * x for x in range(count)]
    assert store.counts()["done"] == count
    store.close()
