"""A folder of records, one JSON file per trial: `<root>/<study>/records/<key>.json`.

A record is written to a temporary name, flushed and renamed, and carries a checksum of its content; its file name is
the hash of the trial's identity. So a reader meets a whole record or none, and a damaged, edited or misnamed file is
noticed, named and set aside.

JSON has no NaN or infinity, yet a diverged trial's NaN is a result: in metrics and curves they are written as
`{"float": "nan"}`, `{"float": "inf"}` and `{"float": "-inf"}` (a metric is never a mapping, so nothing else looks like
that).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repro.engine.trial import Outcome, Trial, digest
from repro.errors import ReproError
from repro.files import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """What a trial left. `spec`: all its fields; `metrics`, `curves`, `diverged`: its outcome; `provenance`: code,
    machine, time; `identity`: what its key hashes.
    """

    key: str
    study: str
    kind: str
    spec: dict[str, Any]
    metrics: dict[str, Any]
    curves: dict[str, dict[str, list]]
    diverged: bool
    provenance: dict[str, Any]
    identity: dict[str, Any] = field(default_factory=dict)


class Store:
    """Records under `root`; those missing there are looked for in the `fallbacks`, which are only ever read.

    `read_only`: nothing is written or moved under `root` (published records, a read-only disk); damaged files are still
    named.
    """

    def __init__(self, root: str | Path, *, fallbacks: Sequence[str | Path] = (), read_only: bool = False):
        self.root = Path(root).absolute()
        self.read_only = read_only
        self.fallbacks = tuple(Store(path, read_only=True) for path in fallbacks)
        self._named: set[Path] = set()

    def get(self, trial: Trial) -> Record | None:
        """The trial's record, or None. Its `spec` is complete: fields that came after the record was written have their
        defaults.

        Raises ReproError when a field's default has changed since: the key cannot tell, so the record may mean another
        trial.
        """
        key = trial.key()
        for store in (self, *self.fallbacks):
            if (record := store._read(store._path(trial.study, key))) is not None:
                spec = trial.describe()
                if difference := _difference(record.spec, spec):
                    raise ReproError(
                        f"{store._path(trial.study, key)} was made when {difference}: a default has changed, "
                        f"raise code_version of {type(trial).__name__}"
                    )
                return replace(record, spec=spec)
        return None

    def put(self, trial: Trial, outcome: Outcome, provenance: dict[str, Any]) -> Record:
        """Write the trial's record and return it. Raises ReproError when the disk is full or the store is read-only."""
        if self.read_only:
            raise ReproError(f"cannot write into {self.root}: this store is opened read-only, use another folder")
        identity = trial.identity()
        key = digest(identity)
        body = {
            "format": FORMAT,
            "key": key,
            "study": trial.study,
            "kind": trial.kind,
            "identity": identity,
            "spec": trial.describe(),
            **_each_value(_encoded, vars(outcome)),
            "provenance": provenance,
        }
        body["checksum"] = digest(body)
        # The order of metrics is the trial's own: a frame of fresh records and one of old records have the same columns.
        lines = ",\n".join(f'"{name}": {json.dumps(value, allow_nan=False)}' for name, value in body.items())
        write_atomically(self._path(trial.study, key), f"{{\n{lines}\n}}\n")
        return Record(
            key,
            trial.study,
            trial.kind,
            trial.describe(),
            **vars(outcome),
            provenance=provenance,
            identity=identity,
        )

    def records(self, study: str) -> list[Record]:
        """All sound records of a study, this folder's before the fallbacks', one per key, ordered by key."""
        found: dict[str, Record] = {}
        for store in (self, *self.fallbacks):
            for path in sorted((store.root / study / "records").glob("*.json")):
                if path.stem not in found and (record := store._read(path)) is not None:
                    found[path.stem] = record
        return [found[key] for key in sorted(found)]

    def export(self, trials: Iterable[Trial | str], other: str | Path) -> list[Path]:
        """Copy finished records, named by trial or key, into the store at `other`, byte for byte; each is verified
        first.

        A record that is not here but already there stays. Raises ReproError naming a trial that has no sound record in
        either.
        """
        target, written = Store(other, read_only=True), []
        for trial in trials:
            key, label = (trial, trial) if isinstance(trial, str) else (trial.key(), trial.label())
            places = ((store, path) for store in (self, target) for path in store.root.glob(f"*/records/{key}.json"))
            source = next((path for store, path in places if store._read(path) is not None), None)
            if source is None:
                raise ReproError(f"{label} has no sound record in {self.root}: run it before exporting it")
            path = target._path(source.parent.parent.name, key)
            if source != path:
                write_atomically(path, source.read_bytes())
                if target._read(path) is None:
                    raise ReproError(f"the copy {path} of {label} is damaged: check the disk and export it again")
            written.append(path)
        return written

    def checkpoint(self, trial: Trial) -> Path:
        """Where the trial may keep its checkpoint until its record is stored."""
        return self.root / trial.study / "checkpoints" / trial.key()

    def failure(self, trial: Trial) -> Path:
        """Where the traceback of the trial's unexpected failure is left; removed when the trial succeeds."""
        return self.root / trial.study / "failures" / f"{trial.key()}.txt"

    def tidy(self, trial: Trial, *, finished: bool) -> None:
        """Remove what killed writers left of the trial; once it is `finished`, its checkpoint and old traceback too.

        Only for the run that holds the trial's lock: nobody else is writing then.
        """
        checkpoint, failure, record = self.checkpoint(trial), self.failure(trial), self._path(trial.study, trial.key())
        for path in (checkpoint, failure, record):
            for leftover in path.parent.glob(f".{path.name}.*"):
                leftover.unlink(missing_ok=True)
        if finished:
            checkpoint.unlink(missing_ok=True)
            failure.unlink(missing_ok=True)

    def _path(self, study: str, key: str) -> Path:
        return self.root / study / "records" / f"{key}.json"

    def _read(self, path: Path) -> Record | None:
        """The record in `path` if there is a sound one; a damaged file is named once on stderr and moved aside."""
        try:
            return _decode(path.read_bytes(), path)
        except FileNotFoundError:
            return None
        except OSError as error:  # it says nothing about the record, which stays where it is
            raise ReproError(f"cannot read the record {path}: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            if path not in self._named:
                self._named.add(path)
                self._set_aside(path, str(error))
            return None

    def _set_aside(self, path: Path, reason: str) -> None:
        if self.read_only:
            fate = "it is ignored"
        else:
            aside = (path.with_name(f"{path.name}.damaged-{n}") for n in itertools.count(1))
            new = next(name for name in aside if not name.exists())
            try:
                os.rename(path, new)
                fate = f"it is kept as {new.name} and its trial counts as not run"
                self._named.discard(path)
            except OSError as error:
                fate = f"it is ignored (and could not be set aside: {error.strerror})"
        print(f"warning: record {path} is damaged ({reason}); {fate}", file=sys.stderr)


def _decode(data: bytes, path: Path) -> Record:
    """The record in `data`; raises ValueError (or KeyError, TypeError, AttributeError for odd JSON) saying what is
    wrong with it.
    """
    try:
        body = json.loads(data)
    except ValueError as error:
        raise ValueError("not a whole JSON file") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"not a record of format {FORMAT}")
    checksum = body.pop("checksum", None)
    if checksum != digest(body):
        raise ValueError("its checksum does not fit its content")
    identity = body["identity"]
    if not digest(identity) == body["key"] == path.stem:
        raise ValueError("its spec does not hash to its file name")
    if not identity["study"] == body["study"] == path.parent.parent.name or identity["kind"] != body["kind"]:
        raise ValueError("it belongs to another study or kind")
    outcome = _each_value(_decoded, body)
    return Record(
        body["key"],
        body["study"],
        body["kind"],
        body["spec"],
        **outcome,
        provenance=body["provenance"],
        identity=identity,
    )


def _each_value(change, outcome: dict[str, Any]) -> dict[str, Any]:
    """An outcome with `change` applied to every metric and every entry of every curve."""
    return {
        "metrics": {name: change(value) for name, value in outcome["metrics"].items()},
        "curves": {
            name: {column: [change(value) for value in values] for column, values in columns.items()}
            for name, columns in outcome["curves"].items()
        },
        "diverged": outcome["diverged"],
    }


def _encoded(value: Any) -> Any:
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value


def _difference(old: Any, new: Any, name: str = "") -> str | None:
    """Where two specs disagree on what both of them state, in words; fields only one of them has do not count."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(old[field], new[field], f"{name}.{field}".lstrip(".")) for field in old if field in new]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else f"{name} was {old!r} (now {new!r})"
    return next(filter(None, (_difference(*pair) for pair in pairs)), None)
