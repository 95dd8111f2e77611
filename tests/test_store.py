"""A store gives back exactly what was put in, or says that it cannot; it never loses and never invents."""

import errno
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Clock, Toy, Walk

from repro.engine import Outcome, Store, curves, frame
from repro.engine import trial as trial_module
from repro.engine.provenance import measured
from repro.engine.trial import digest
from repro.errors import ReproError
from repro.studies.base import Results, recorded, timings

TRIAL = Toy(value=3)
OUTCOME = Outcome({"square": 9, "loss": 0.1 + 0.2, "note": "ü", "none": None}, {"loss": {"step": [0, 1], "value": [2.5, 0.1]}})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "local")


def record_file(store, trial=TRIAL):
    return store.root / trial.study / "records" / f"{trial.key()}.json"


def test_a_record_comes_back_as_it_was(store):
    """Bit for bit, provenance included, through another Store object; what is not there is None."""
    assert store.get(TRIAL) is None
    put = store.put(TRIAL, OUTCOME, {"commit": "abc", "threads": 1})
    got = Store(store.root).get(TRIAL)
    assert got == put
    assert (got.metrics, got.curves, got.diverged) == (OUTCOME.metrics, OUTCOME.curves, False)
    assert got.spec == {"value": 3, "sleep": 0.0} and got.key == TRIAL.key()
    assert store.get(Toy(value=4)) is None


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text()


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), scalars), st.lists(scalars))
def test_any_outcome_survives(tmp_path_factory, metrics, column):
    """Infinity, NaN, odd names, the order of names, and strings like "nan" too."""
    store = Store(tmp_path_factory.mktemp("store"))
    outcome = Outcome(metrics, {"curve": {"x": column}, "float": {"float": ["nan"]}}, diverged=True)
    store.put(TRIAL, outcome, {})
    got = Store(store.root).get(TRIAL)
    assert repr((got.metrics, got.curves)) == repr((outcome.metrics, outcome.curves))
    assert got.diverged is True


def test_the_file_is_strict_json(store):
    """A diverged trial's NaN is written so that other languages can read the file."""
    store.put(TRIAL, Outcome({"loss": math.nan, "norm": -math.inf}, diverged=True), {})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    body = json.loads(record_file(store).read_text(), parse_constant=refuse)
    assert body["metrics"] == {"loss": {"float": "nan"}, "norm": {"float": "-inf"}}


def resealed(data, **changes):
    """A record with other content and a checksum that fits it."""
    body = {**json.loads(data), **changes}
    body.pop("checksum")
    return json.dumps({**body, "checksum": digest(body)}).encode()


DAMAGE = {
    "truncated": (lambda data: data[: len(data) // 2], "not a whole JSON file"),
    "empty": (lambda data: b"", "not a whole JSON file"),
    "binary": (lambda data: b"\xff\x00" * 40, "not a whole JSON file"),
    "another file": (lambda data: b"[1, 2]", "not a record of format 1"),
    "hand-edited": (lambda data: data.replace(b'"square": 9', b'"square": 8'), "its checksum does not fit its content"),
    "checksum gone": (lambda data: data.replace(b'"checksum"', b'"sum"'), "its checksum does not fit its content"),
    "newer format": (lambda data: resealed(data, format=2), "not a record of format 1"),
    "other spec": (
        lambda data: resealed(data, identity={**json.loads(data)["identity"], "fields": {"value": 4}}),
        "its spec does not hash to its file name",
    ),
    "other study": (lambda data: resealed(data, study="other"), "it belongs to another study or kind"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_record_is_named_set_aside_and_missing(store, capsys, how):
    """One sentence on stderr, the bytes kept beside, the trial counts as not run; a second one does not replace the first."""
    damage, reason = DAMAGE[how]
    path = record_file(store)
    for n in (1, 2):
        store.put(TRIAL, OUTCOME, {})
        damaged = damage(path.read_bytes())
        path.write_bytes(damaged)
        assert store.get(TRIAL) is None
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error and reason in error
        assert path.with_name(f"{path.name}.damaged-{n}").read_bytes() == damaged
        assert not path.exists()
        assert store.get(TRIAL) is None and store.records("toys") == [] and capsys.readouterr().err == ""


def test_a_disk_that_fails_says_nothing_about_a_record(store, monkeypatch):
    store.put(TRIAL, OUTCOME, {})

    def fails(path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        with pytest.raises(ReproError, match=r"cannot read the record .*: Too many open files"):
            store.get(TRIAL)
    assert store.get(TRIAL) is not None


def test_a_misnamed_record_is_refused(store, capsys):
    """A record copied to another trial's name is not that trial's."""
    store.put(TRIAL, OUTCOME, {})
    other = record_file(store, Toy(value=4))
    other.write_bytes(record_file(store).read_bytes())
    assert store.get(Toy(value=4)) is None
    assert "does not hash to its file name" in capsys.readouterr().err
    assert store.get(TRIAL) is not None


def test_a_read_only_store_reports_and_moves_nothing(store, capsys):
    store.put(TRIAL, OUTCOME, {})
    path = record_file(store)
    path.write_bytes(path.read_bytes()[:50])
    published = Store(store.root, read_only=True)
    assert published.get(TRIAL) is None and published.get(TRIAL) is None
    assert capsys.readouterr().err.count("is damaged") == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(ReproError, match="read-only"):
        published.put(TRIAL, OUTCOME, {})


def test_fallbacks_are_read_and_never_written(store, tmp_path):
    """The user's own records come first, the published ones fill the gaps."""
    published = Store(tmp_path / "published")
    published.put(TRIAL, OUTCOME, {"from": "published"})
    published.put(Toy(value=4), Outcome({"square": 16}), {"from": "published"})
    before = sorted(published.root.rglob("*"))
    both = Store(store.root, fallbacks=[published.root])
    both.put(TRIAL, OUTCOME, {"from": "local"})
    assert both.get(TRIAL).provenance == {"from": "local"}
    assert both.get(Toy(value=4)).provenance == {"from": "published"}
    assert {r.metrics["square"]: r.provenance["from"] for r in both.records("toys")} == {9: "local", 16: "published"}
    assert sorted(published.root.rglob("*")) == before


def test_records_of_one_study_only(store):
    store.put(TRIAL, OUTCOME, {})
    store.put(Walk(steps=1), Outcome({"end": 1.0}), {})
    assert {record.kind for record in store.records("toys")} == {"toy", "walk"}
    assert store.records("narang2017") == []


def test_a_record_older_than_a_field_has_its_default(store):
    """Adding a field loses no record, and a frame of old and new records has no holes."""

    @dataclass(frozen=True, kw_only=True)
    class LongerToy(Toy):
        noise: float = 0.5

    store.put(TRIAL, OUTCOME, {})
    assert store.get(LongerToy(value=3)).spec == {"value": 3, "sleep": 0.0, "noise": 0.5}


def test_a_changed_default_is_noticed(store):
    """Keys leave defaults out, so the old record would pass for a trial that was never run."""

    @dataclass(frozen=True, kw_only=True)
    class OtherToy(Toy):
        sleep: float = 1.0

    store.put(TRIAL, OUTCOME, {})
    assert OtherToy(value=3).key() == TRIAL.key()
    with pytest.raises(ReproError, match=r"when sleep was 0.0 \(now 1.0\).*raise code_version of OtherToy"):
        store.get(OtherToy(value=3))


def test_export_copies_verified_records(store, tmp_path, capsys):
    """By trial or by key, byte for byte, again without harm; a damaged or missing one stops it with a sentence."""
    published = tmp_path / "published"
    store.put(TRIAL, OUTCOME, {})
    store.put(Toy(value=4), OUTCOME, {})
    for _ in range(2):
        paths = store.export([TRIAL, Toy(value=4).key()], published)
        assert [path.read_bytes() for path in paths] == [record_file(store, t).read_bytes() for t in (TRIAL, Toy(value=4))]
    assert Store(published, read_only=True).get(TRIAL) == store.get(TRIAL)
    assert len(list(published.rglob("*.*"))) == 2
    record_file(store).unlink()
    assert store.export([TRIAL], published) == paths[:1]
    record_file(store, Toy(value=4)).write_text("{")
    with pytest.raises(ReproError, match="toy 5 has no sound record"):
        store.export([Toy(value=5)], published)


def test_a_full_disk_keeps_the_old_record(store, monkeypatch):
    """ENOSPC while flushing: one sentence, the record that was there is still there, nothing half-written lies about."""
    store.put(TRIAL, OUTCOME, {"run": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReproError, match=r"cannot write .*No space left on device; free space or choose another folder$"):
        store.put(TRIAL, OUTCOME, {"run": 2})
    assert store.get(TRIAL).provenance == {"run": 1}
    assert len(list(record_file(store).parent.iterdir())) == 1


def test_a_file_size_limit_keeps_the_old_record(store):
    """The same against the kernel: a process that may not write more than 100 bytes into a file."""
    store.put(TRIAL, OUTCOME, {"run": 1})
    code = (
        "import resource, signal, sys; from toys import Toy; from repro.engine import Outcome, Store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "Store(sys.argv[1]).put(Toy(value=3), Outcome({'square': 9}), {'run': 2})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, store.root], capture_output=True, text=True, cwd=os.path.dirname(__file__)
    )
    assert run.returncode == 1 and "ReproError: cannot write" in run.stderr and "File too large" in run.stderr
    assert store.get(TRIAL).provenance == {"run": 1}
    assert len(list(record_file(store).parent.iterdir())) == 1


def test_killed_writers_leftovers_are_tidied(store):
    """What SIGKILL leaves of a temporary file goes when the trial is run again, its checkpoint only once it is finished."""
    store.put(Toy(value=4), OUTCOME, {})
    checkpoint = store.checkpoint(TRIAL)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("state")
    leftovers = [checkpoint.with_name(f".{checkpoint.name}.x1"), record_file(store).with_name(f".{TRIAL.key()}.json.x2")]
    for path in leftovers:
        path.write_text("half")
    store.tidy(TRIAL, finished=False)
    assert checkpoint.exists() and not any(path.exists() for path in leftovers)
    store.tidy(TRIAL, finished=True)
    assert not checkpoint.exists() and store.get(Toy(value=4)) is not None


def test_provenance_names_code_and_machine_but_not_the_host():
    """Versions of what computes, commit, processor, time, threads."""
    from datetime import UTC, datetime

    made = measured(started=datetime.now(UTC), seconds=1.5, threads=2, executor="local")
    assert {"commit", "dirty", "cpu", "cores", "platform", "gpu", "peak_memory_mb"} <= made.keys()
    assert set(made["versions"]) == {"python", "repro", "torch", "numpy", "scipy"} and all(made["versions"].values())
    assert (made["threads"], made["executor"], made["seconds"]) == (2, "local", 1.5)
    assert made["started"].endswith("+00:00")
    assert made["peak_memory_mb"] == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rel=0.1)
    assert os.uname().nodename not in json.dumps(made)


def test_frames(store):
    """One row per trial with spec, metrics, key, diverged; one per point of a curve; clashes and unknown curves are refused."""
    records = [
        store.put(Toy(value=v), Outcome({"square": v * v}, {"loss": {"step": [0, 1], "at": [v, 0]}}), {}) for v in (2, 3)
    ]
    table = frame(records)
    assert table[["value", "square", "diverged"]].values.tolist() == [[2, 4, False], [3, 9, False]]
    assert table["key"].tolist() == [Toy(value=2).key(), Toy(value=3).key()]
    nested = replace(records[0], spec={"pruning": {"class": "Ramp", "theta": 0.5}, "widths": [1, 2]})
    assert frame([nested]).loc[0, ["pruning.class", "pruning.theta", "widths"]].tolist() == ["Ramp", 0.5, (1, 2)]
    points = curves(records, "loss")
    assert points[["value", "step", "at"]].values.tolist() == [[2, 0, 2], [2, 1, 0], [3, 0, 3], [3, 1, 0]]
    with pytest.raises(ReproError, match="no record has a curve 'los': these have loss"):
        curves(records, "los")
    with pytest.raises(ReproError, match="metric 'value' has the name of another column"):
        frame([replace(records[0], metrics={"value": 1})])


def test_a_timing_from_elsewhere_is_shown_unless_its_code_meant_something_else(tmp_path, monkeypatch):
    """The committed times of another machine count, of several the newest; those of an older `code_version` may lack what is
    read of them now."""
    trial, store = Clock(number=1), Store(tmp_path)
    written = {}
    for cpu, day in (("abacus", 1), ("difference engine", 3), ("slide rule", 2)):
        monkeypatch.setattr(trial_module, "machine_fingerprint", lambda cpu=cpu: {"cpu": cpu, "cores": 10})
        written[cpu] = store.put(trial, OUTCOME, {"cpu": cpu, "threads": 2, "started": f"2026-01-0{day}T00:00:00+00:00"})
    monkeypatch.undo()
    assert store.get(trial) is None
    found = recorded([trial], store)
    assert found == {trial.key(): written["difference engine"]}
    assert timings([trial], store) == {trial.key(): [written[cpu] for cpu in ("abacus", "slide rule", "difference engine")]}
    assert Results(None, {"arm": [trial]}, found).machine() == "difference engine, 2 threads"
    other = Clock(number=2)
    found[other.key()] = written["abacus"]
    two = Results(None, {"arm": [trial], "other": [other]}, found)
    assert two.machine() == "difference engine, 2 threads and abacus, 2 threads"
    path = store.root / Clock.study / "records" / f"{written['difference engine'].key}.json"
    body = json.loads(path.read_text())
    del body["spec"]["after"], body["checksum"]
    path.write_text(json.dumps(body | {"checksum": digest(body)}))
    assert len(timings([trial], store)[trial.key()]) == 3, "a record may be older than a field that has its default"
    monkeypatch.setattr(Clock, "code_version", 2)
    assert recorded([trial], store) == {}
    assert timings([trial], store) == {trial.key(): []}
