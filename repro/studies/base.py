"""What a study is made of: profiles, exhibits, quantities. A new paper brings these three and its published numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.engine import Record, Store, Trial, frame
from repro.engine.trial import canonical
from repro.errors import ReproError, one_of
from repro.report.statistics import bootstrap_interval
from repro.report.verdicts import Claim, Verdict, decide, load_claims

PROFILES = ("smoke", "laptop", "paper")

Arms = dict[str, list[Trial]]


@dataclass(frozen=True)
class Results:
    """Records of an exhibit's trials, asked for by arm: `metric("sparse 2560", "test_cer")` has one value a seed.

    Replicates whose record is missing (a paper profile still being computed) are NaN, those that diverged infinite.
    `timings`: of each timing trial the records of all machines, by the same keys, where these were asked for.
    """

    profile: Any
    arms: Arms
    records: Mapping[str, Record]
    timings: Mapping[str, Sequence[Record]] = field(default_factory=dict)

    def record(self, arm: str, replicate: int) -> Record | None:
        one_of("arm", arm, self.arms)
        return self.records.get(self.arms[arm][replicate].key())

    def seeds(self, arm: str) -> list[Record]:
        """The finished, converged records of an arm."""
        found = [self.record(arm, i) for i in range(len(self.arms[arm]))]
        return [record for record in found if record is not None and not record.diverged]

    def has(self, *arms: str) -> bool:
        """Whether each arm has at least one finished record."""
        return all(arm in self.arms and self.seeds(arm) for arm in arms)

    def metric(self, arm: str, name: str) -> np.ndarray:
        """(seeds,) values of a metric; NaN where there is no record, infinity where the run diverged."""
        values = []
        for replicate in range(len(self.arms[arm])):
            record = self.record(arm, replicate)
            if record is None:
                values.append(np.nan)
            elif record.diverged:
                values.append(np.inf)
            else:
                values.append(float(record.metrics[name]))
        return np.array(values)

    def curve(self, arm: str, name: str, column: str) -> np.ndarray:
        """(seeds, points) of one column of a curve, of the seeds that finished."""
        return np.array([record.curves[name][column] for record in self.seeds(arm)])

    def machine(self) -> str:
        """The processors and GPUs behind the timings, or behind all records where nothing was timed."""
        timings = [trial.key() for trials in self.arms.values() for trial in trials if trial.timing]
        records = [self.records[key] for key in timings if key in self.records] or self.used()
        made = [(gpu_of(record), record.provenance) for record in records if "cpu" in record.provenance]
        found = dict.fromkeys(gpu or f"{where['cpu']}, {where['threads']} threads" for gpu, where in made)
        return " and ".join(found) or "no machine yet"

    def used(self) -> list[Record]:
        """Records of this exhibit, each once, in the order of its arms."""
        keys = dict.fromkeys(trial.key() for trials in self.arms.values() for trial in trials)
        return [self.records[key] for key in keys if key in self.records]

    def frame(self) -> pd.DataFrame:
        """One row a trial: arm, spec, metrics."""
        arm_of = {trial.key(): arm for arm, trials in self.arms.items() for trial in trials}
        rows = frame(self.used())
        if not rows.empty:
            rows.insert(0, "arm", rows["key"].map(arm_of))
        return rows


def gpu_of(record: Record) -> str | None:
    """The GPU of a trial that ran on one; a trial on the CPU may have been made where there is one, too."""
    return record.provenance.get("gpu") if record.spec.get("device") == "cuda" else None


@dataclass(frozen=True)
class _Reading(Results):
    """Results that keep in `seen` what was read: a claim names the machines of its own records, not all of its exhibit's."""

    seen: dict[str, Record] = field(default_factory=dict)

    def record(self, arm: str, replicate: int) -> Record | None:
        found = super().record(arm, replicate)
        if found is not None:
            self.seen[self.arms[arm][replicate].key()] = found
        return found


Quantity = Callable[[Results], Any]


@dataclass(frozen=True)
class Exhibit:
    """One table or figure.

    `arms(profile)`: the trials, by arm; `tables(results)`: title -> frame, paper and ours side by side; `draw(results)`: the
    figure, or None where a table says it all; `parameters`: fields of the profile that its notebook may change;
    `corpus_note(profile)`: what it was measured on, if not on what the study is.
    """

    name: str
    title: str
    caption: str
    arms: Callable[[Any], Arms]
    tables: Callable[[Results], dict[str, pd.DataFrame]]
    draw: Callable[[Results], Figure] | None = None
    parameters: tuple[str, ...] = ("seeds",)
    corpus_note: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Study:
    """One paper's reproduction. `quantities`: name -> function of an exhibit's results, for the claims of `<name>.toml`.

    `corpus_note(profile)`: the words that say what the numbers were measured on.
    """

    name: str
    title: str
    citation: str
    profiles: Mapping[str, Any]
    exhibits: Mapping[str, Exhibit]
    quantities: Mapping[str, Quantity]
    corpus_note: Callable[[Any], str]
    _claims: list[Claim] = field(default_factory=list, repr=False, compare=False)

    def profile(self, name: str, **changes) -> Any:
        """The profile `name`, with fields replaced. Raises ReproError for unknown names, ill-typed or out-of-range values."""
        one_of("profile", name, self.profiles)
        return changed(self.profiles[name], changes)

    def exhibit(self, name: str) -> Exhibit:
        one_of(f"exhibit of {self.name}", name, self.exhibits)
        return self.exhibits[name]

    def measured_on(self, exhibit: str, profile: Any) -> str:
        """The words of the exhibit's corpus."""
        return (self.exhibits[exhibit].corpus_note or self.corpus_note)(profile)

    def claims(self) -> list[Claim]:
        """All claims, each with an exhibit and a quantity that exist (ReproError otherwise)."""
        if not self._claims:
            claims = load_claims(self.name)
            for claim in claims:
                one_of(f"exhibit in claim {claim.id} of {self.name}.toml", claim.exhibit, self.exhibits)
                if claim.kind != "untestable":
                    one_of(f"quantity in claim {claim.id} of {self.name}.toml", claim.quantity, self.quantities)
            self._claims.extend(claims)
        return self._claims

    def verdicts(self, exhibit: str, results: Results) -> list[Verdict]:
        """The verdicts on the claims that `exhibit` decides."""
        found = []
        for claim in self.claims():
            if claim.exhibit == exhibit:
                read = _Reading(results.profile, results.arms, results.records)
                values = None if claim.kind == "untestable" else self._values(claim, read)
                source = self.measured_on(exhibit, results.profile)
                if claim.kind == "machine":
                    source = dataclasses.replace(results, records=read.seen or results.records).machine()
                found.append(decide(claim, values, source))
        return found

    def _values(self, claim: Claim, results: Results):
        """The claim's values, without the seeds that have not been run."""
        values = np.atleast_1d(np.asarray(self.quantities[claim.quantity](results), dtype=float))
        return values[~np.isnan(values)]


def changed(profile: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a profile with some fields replaced, each by a value of its type; the name says what was changed."""
    fields = {f.name: getattr(profile, f.name) for f in dataclasses.fields(profile)}
    new = {}
    for name, value in changes.items():
        one_of("parameter", name, fields)
        if isinstance(fields[name], float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(fields[name]):
            wanted = type(fields[name]).__name__
            raise ReproError(f"parameter {name} is {value!r}: it should be of type {wanted}, such as {fields[name]!r}")
        if value != fields[name]:
            new[name] = value
    title = ", ".join([profile.name, *(f"{name}={new[name]:g}" for name in fields if name in new)])
    return dataclasses.replace(profile, **new, name=title)


def check_ranges(profile: Any, ranges: Iterable[tuple[str, float, float]]) -> None:
    """Raise ReproError for the first field, of (name, low, high), that is outside its range."""
    for name, low, high in ranges:
        value = getattr(profile, name)
        if not low <= value <= high:
            raise ReproError(f"parameter {name} is {value!r}: it should lie between {low} and {high}")


def recorded(trials: Sequence[Trial], store: Store) -> dict[str, Record]:
    """What the store has of these trials, by key, without running anything.

    A timing trial's key holds the machine; for showing published timings, the newest record of the same trial from other
    machines counts (its provenance names that machine).
    """
    found = {}
    elsewhere: dict[str, list[Record]] | None = None
    for trial in trials:
        record = store.get(trial)
        if record is None and trial.timing:
            elsewhere = timings(trials, store) if elsewhere is None else elsewhere
            record = next(reversed(elsewhere[trial.key()]), None)
        if record is not None:
            found[trial.key()] = record
    return found


def timings(trials: Sequence[Trial], store: Store) -> dict[str, list[Record]]:
    """The store's records of each timing trial, whatever machine they are of, the oldest first; by the trial's key here.

    Trials are compared as their keys are, but for the machine: a record may be older than a field that has its default.
    """
    wanted = {trial.key(): _timed(trial.identity()) for trial in trials if trial.timing}
    studies = {trial.study for trial in trials if trial.timing}
    by_trial: dict[str, list[Record]] = {}
    for record in sorted((r for study in studies for r in store.records(study)), key=_started):
        by_trial.setdefault(_timed(record.identity), []).append(record)
    return {key: by_trial.get(trial, []) for key, trial in wanted.items()}


def _timed(identity: Mapping[str, Any]) -> str:
    """What was timed, whatever the machine was or lacked."""
    return canonical([identity[name] for name in ("kind", "code_version", "fields")])


def _started(record: Record) -> str:
    return record.provenance.get("started", "")


def summary(values: Iterable[float]) -> dict[str, float]:
    """mean, low, high (95 % bootstrap) and n of finite values; NaN and 0 when there are none."""
    finite = np.asarray(list(values), dtype=float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return {"ours": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    mean, low, high = bootstrap_interval(finite)
    return {"ours": mean, "low": low, "high": high, "n": len(finite)}
