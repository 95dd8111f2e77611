"""A run does each trial once, whatever happens to it: kills, second runs, failures, Ctrl-C."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from toys import AfterFaulty, Clock, Faulty, Sum, Toy, Walk, logged

from repro.engine import Store, duration, plan, run_trials
from repro.engine.progress import Progress
from repro.engine.provenance import available_cores
from repro.errors import ReproError

HERE = Path(__file__).parent


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """The folder where executions leave their lines."""
    folder = tmp_path / "log"
    folder.mkdir()
    monkeypatch.setenv("TOYS_LOG", str(folder))
    return folder


def coordinator(store, what):
    """A run in a process of its own."""
    code = f"import toys; toys.coordinate({str(store.root)!r}, {what!r})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stderr=subprocess.PIPE, text=True)


def until(condition, seconds=20.0):
    """Wait for something to happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_what_is_missing_is_run_once_and_needs_come_first(store, log):
    """Shared needs are run once, equal trials once; a second call runs nothing and gives the same, in the order asked."""
    trials = [Sum(values=(3, 2)), Toy(value=7), Sum(values=(2, 3)), Toy(value=7)]
    records = run_trials(trials, store, jobs=2)
    assert list(records) == [trials[0].key(), trials[1].key(), trials[2].key()]
    assert [r.metrics.get("sum") for r in records.values()] == [13, None, 13]
    assert [r.metrics.get("first") for r in records.values()] == [9, None, 4]  # needed records come in the order of needs()
    assert sorted(logged(log, "toy")) == ["2", "3", "7"] and len(logged(log, "sum")) == 2
    again = run_trials(trials, store)
    assert again == records and len(logged(log, "toy")) == 3
    assert {r.provenance["executor"] for r in records.values()} == {"local"}
    assert list((store.root / "toys" / "locks").iterdir()) == []


def test_needs_of_a_recorded_trial_are_not_run(store, log):
    """Published results can be drawn without what they were built on."""
    first = run_trials([Sum(values=(1, 2))], store)
    for value in (1, 2):
        (store.root / "toys" / "records" / f"{Toy(value=value).key()}.json").unlink()
    assert run_trials([Sum(values=(1, 2))], store) == first
    assert len(logged(log, "toy")) == 2


def test_threads_are_pinned(store):
    """One per process when several work, all cores for one alone."""
    two = run_trials([Toy(value=1), Toy(value=2)], store, jobs=2)
    assert [r.metrics["threads"] for r in two.values()] == [1, 1]
    (one,) = run_trials([Toy(value=3)], store, jobs=1).values()
    assert one.metrics["threads"] == one.provenance["threads"] == available_cores()


def test_timing_trials_run_alone_at_the_end_in_fresh_processes(store):
    """No two of them overlap, all other trials have ended before, each has its own process and all cores."""
    toys = [Toy(value=i, sleep=0.3) for i in range(3)]
    clocks = [Clock(number=i, after=i) for i in range(3)]
    records = run_trials([*clocks, *toys], store, jobs=2)
    timings = sorted((records[c.key()].metrics for c in clocks), key=lambda metrics: metrics["begin"])
    last = max((store.root / "toys" / "records" / f"{toy.key()}.json").stat().st_mtime for toy in toys)
    assert last <= timings[0]["begin"]
    assert all(one["end"] <= two["begin"] for one, two in pairwise(timings))
    assert len({metrics["pid"] for metrics in timings}) == 3
    assert {metrics["threads"] for metrics in timings} == {available_cores()}


def test_failures_do_not_sink_the_others(store, log):
    """Each is told at the end with its reason and none is stored; an unexpected one leaves its traceback; what needs a failed
    one is not run."""
    faulty = [Faulty(how=how) for how in ("user", "bug", "exit", "nothing")]
    with pytest.raises(ReproError) as told:
        run_trials([*faulty, AfterFaulty(), *(Toy(value=i) for i in range(4))], store, jobs=2)
    text = str(told.value)
    assert "4 of 9 trials failed, 1 that need them were not run, all others are recorded" in text
    # A whole line: the user's own sentence, without a traceback behind it. The lines come in the order of the failures.
    assert "  faulty how=user: the corpus is missing in /nowhere: run `repro data`" in text.splitlines()
    assert "UnpicklableError: weights do not fit biases (traceback in" in text
    assert "SystemExit: 3" in text and "returned a NoneType, not an Outcome" in text
    traceback = store.failure(Faulty(how="bug")).read_text()
    assert "toys.py" in traceback and "UnpicklableError" in traceback
    assert not store.failure(Faulty(how="user")).exists()
    assert {record.kind for record in store.records("toys")} == {"toy"} and len(store.records("toys")) == 4
    with pytest.raises(ReproError, match="1 of 1 trials failed"):
        run_trials([Faulty(how="user")], store)
    assert logged(log, "faulty").count("user") == 2  # a failed trial is tried again by the next run


def test_a_killed_worker_is_replaced(store, log):
    """The system kills a process (out of memory): its trial is tried again; three times in vain, and it alone has failed."""
    once = run_trials([Faulty(how="killed once"), *(Toy(value=i, sleep=0.1) for i in range(3))], store, jobs=2)
    assert once[Faulty(how="killed once").key()].metrics["survived"] is True
    with pytest.raises(ReproError, match=r"1 of 4 trials failed.*\n  faulty how=killed: its process was killed 3 times"):
        run_trials([Faulty(how="killed"), *(Toy(value=i, sleep=0.1) for i in range(3, 6))], store, jobs=2)
    assert Counter(logged(log, "toy")) == Counter("012345")
    assert Counter(logged(log, "faulty")) == {"killed once": 2, "killed": 3}


@pytest.mark.parametrize("moment", [0.0, 0.4, 0.9])
def test_sigkill_and_start_again(store, log, moment):
    """Killed at any moment: finished trials are not repeated, records are whole, the long trial goes on from its checkpoint and
    ends bit for bit where an uninterrupted one ends, the workers die with their coordinator."""
    killed = coordinator(store, "mixed")
    until(lambda: logged(log, "walk1"))
    time.sleep(moment)
    killed.kill()
    killed.wait()
    time.sleep(0.5)  # orphans would still be walking
    steps, finished = len(logged(log, "walk1")), {record.key for record in store.records("toys")}
    toys_run = Counter(logged(log, "toy"))
    time.sleep(0.3)
    assert len(logged(log, "walk1")) == steps

    again = coordinator(store, "mixed")
    assert again.communicate()[1].count("damaged") == 0 and again.returncode == 0
    rerun = Counter(logged(log, "toy")) - toys_run
    assert {Toy(value=int(value), sleep=0.1).key() for value in rerun}.isdisjoint(finished)
    assert max(rerun.values(), default=1) == 1
    assert len(logged(log, "walk1")) <= 25 + 1  # at most the step in flight was walked twice
    generator = random.Random(1)
    path = [generator.gauss(0, 1) for _ in range(25)]
    resumed = store.get(Walk(steps=25, seed=1))
    assert (resumed.metrics["end"], resumed.curves["path"]["at"]) == (sum(path), path)
    assert len(store.records("toys")) == 7
    assert list((store.root / "toys" / "checkpoints").iterdir()) == []
    assert not [path for path in store.root.rglob(".*")]


def test_two_runs_on_one_store_do_each_trial_once(store, log):
    """Neither repeats what the other does or has done, both end with all the records."""
    both = [coordinator(store, "toys") for _ in range(2)]
    for run in both:
        assert "damaged" not in run.communicate(timeout=30)[1]
        assert run.returncode == 0
    assert Counter(logged(log, "toy")) == Counter("01234567")
    assert len(store.records("toys")) == 8


def test_two_runs_do_not_disturb_each_others_timings(store):
    """Timing trials of one store never overlap, whichever run they belong to."""
    both = [coordinator(store, "clocks") for _ in range(2)]
    assert [run.communicate(timeout=30) and run.returncode for run in both] == [0, 0]
    times = sorted((r.metrics["begin"], r.metrics["end"]) for r in store.records("toys"))
    assert len(times) == 4 and all(one[1] <= two[0] for one, two in pairwise(times))


def test_a_dead_runs_trial_is_taken_over(store, log):
    """While another run holds a trial it is left alone; when that run dies without a record, it is ours."""
    other = coordinator(store, "endless")
    until(lambda: len(logged(log, "walk0")) > 2)
    waiting = subprocess.Popen(
        [sys.executable, "-c", f"import toys; toys.run_trials([toys.Walk(steps=10_000)], toys.Store({str(store.root)!r}))"],
        cwd=HERE,
    )
    time.sleep(1.0)
    assert waiting.poll() is None
    steps = logged(log, "walk0")
    assert len(steps) == len(set(steps))  # only one of them is walking
    other.kill()
    other.communicate()
    before = len(logged(log, "walk0"))
    until(lambda: len(logged(log, "walk0")) > before + 3)
    waiting.kill()
    waiting.wait()


def test_ctrl_c_keeps_what_is_finished(store, log):
    """The run stops at once, says what it has kept and how to go on; the long trial's checkpoint stays."""
    run = coordinator(store, "endless")
    until(lambda: store.get(Toy(value=0)) and len(logged(log, "walk0")) > 2)
    pressed = time.monotonic()
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=10)
    assert time.monotonic() - pressed < 5
    assert run.returncode == 1
    assert errors.splitlines()[-1] == (
        "interrupted: 1 of 2 missing trials were recorded and kept; the same command goes on from there"
    )
    assert store.checkpoint(Walk(steps=10_000)).exists()
    steps = len(logged(log, "walk0"))
    time.sleep(0.3)
    assert len(logged(log, "walk0")) == steps


def test_a_full_disk_stops_the_run_with_its_sentence(store, monkeypatch):
    """What was recorded before stays; going on would only lose more."""
    run_trials([Toy(value=1)], store)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReproError, match=r"^cannot write .*No space left on device; free space or choose another folder$"):
        run_trials([Toy(value=1), Toy(value=2)], store)
    monkeypatch.undo()
    assert [record.metrics["square"] for record in store.records("toys")] == [1]


def test_plan_tells_hits_misses_checkpoints_and_time(store, log):
    """What would be run, in an order that can be run, and how long it takes: computed by hand for one and two workers."""
    store.checkpoint(Walk(steps=100)).parent.mkdir(parents=True)
    store.checkpoint(Walk(steps=100)).write_text("half way")
    run_trials([Toy(value=1)], store)
    planned = plan(
        [Sum(values=(1, 2)), Walk(steps=100), Toy(value=9, sleep=3.0), Toy(value=8, sleep=3.0), Clock(number=1)], store
    )
    states = {row.trial.label(): row.state for row in planned.rows}
    assert states == {
        "toy 1": "hit",
        "toy 2": "miss",
        "sum values=1x2": "miss",
        "walk steps=100": "resumable",
        "toy 9": "miss",
        "toy 8": "miss",
        "clock number=1": "miss",
    }
    assert list(states).index("toy 2") < list(states).index("sum values=1x2")
    assert len(planned.missing) == 6
    assert planned.seconds(jobs=1) == pytest.approx(5 + 3 + 3 + 0.01 + 1 + 1)
    # Two at once: 5 s | 3 s; then 3 s after the 3 s, and 0.01 s + 1 s after the 5 s; the clock alone after the later, 6.01 s.
    assert planned.seconds(jobs=2) == pytest.approx(max(5 + 0.01 + 1, 3 + 3) + 1)
    assert logged(log, "toy") == ["1"]


def test_trials_that_need_each_other_are_refused(store):
    class Circle(Toy):
        def needs(self):
            return (Circle(value=1 - self.value),)

    with pytest.raises(ReproError, match="need each other in a circle"):
        plan([Circle(value=0)], store)


def test_a_read_only_store_runs_nothing(store, log):
    """Its records can be had; for anything else the sentence says what is missing, and nothing is written."""
    first = run_trials([Toy(value=1)], store)
    before = sorted(store.root.rglob("*"))
    published = Store(store.root, read_only=True)
    assert run_trials([Toy(value=1)], published) == first
    with pytest.raises(ReproError, match=r"2 trials have no record in .* read-only.*toy 2"):
        run_trials([Toy(value=1), Toy(value=2), Toy(value=3)], published)
    assert logged(log, "toy") == ["1"] and sorted(store.root.rglob("*")) == before


def test_jobs_must_be_positive(store):
    with pytest.raises(ReproError, match="jobs is 0"):
        run_trials([Toy(value=1)], store, jobs=0)


def test_progress_lines_off_a_terminal(store):
    """One line per finished trial with bar, count, time left and name; none for what was there."""
    run_trials([Toy(value=1)], store)
    stream = io.StringIO()
    run_trials([Toy(value=1), Toy(value=2)], store, progress=stream)
    assert stream.getvalue().splitlines() == ["1 of 2 trials are already recorded", "[##########] 1/1  done  toy 2"]


def test_progress_on_a_terminal_rewrites_one_line():
    """Only carriage returns until it is closed, and a shorter line leaves nothing of a longer one."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(stream, {"a": 1.0, "b": 1.0}, slots=1)
    progress.start("a")
    progress.finish("a", "a rather long label")
    progress.finish("b", "short")
    progress.close()
    lines = stream.getvalue().split("\r")
    assert lines[-1].rstrip(" \n") == "[##########] 2/2  done  short" and stream.getvalue().count("\n") == 1
    assert len(lines[-1].rstrip("\n")) == len(lines[-2])


def test_time_left_follows_the_pace(monkeypatch):
    """Twice as slow as estimated so far: twice the estimate is left, shared by two workers, less what is already done."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(None, {"a": 10.0, "b": 10.0, "c": 10.0}, slots=2)
    assert progress.seconds_left() == 15.0
    progress.start("a")
    now[0] += 20.0
    progress.finish("a", "a")
    assert progress.seconds_left() == 20.0
    progress.start("b")
    now[0] += 5.0
    assert progress.seconds_left() == 20.0  # c alone takes that long
    assert [duration(s) for s in (0.4, 59.6, 200, 7500)] == ["0 s", "1 m 00 s", "3 m 20 s", "2 h 05 m"]


def test_records_are_written_the_moment_a_trial_ends(store, log):
    """Not when the run ends: what is on disk can be read while the rest goes on."""
    run = coordinator(store, "endless")
    until(lambda: store.get(Toy(value=0)))
    assert run.poll() is None
    body = json.loads((store.root / "toys" / "records" / f"{Toy(value=0).key()}.json").read_text())
    assert body["metrics"]["square"] == 0
    run.kill()
    run.communicate()
