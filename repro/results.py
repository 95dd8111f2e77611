"""One exhibit at one profile: its trials, records, tables, figure and verdicts, and the files they are kept in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from repro.engine import Plan, Store, plan, run_trials
from repro.files import repository_root, write_atomically
from repro.report.plots import save_figure, shared_look
from repro.report.verdicts import Verdict
from repro.studies import Exhibit, Results, Study
from repro.studies.base import recorded, timings


def results_folder() -> Path:
    """`results/` of the checkout, or the folder that the variable REPRO_RESULTS names."""
    return Path(os.environ.get("REPRO_RESULTS") or repository_root() / "results")


def store(name: str = "local") -> Store:
    """The store "local" (the user's own) or "published" (committed records, of this checkout, only read)."""
    if name == "published":
        return Store(repository_root() / "results" / "published", read_only=True)
    return Store(results_folder() / name)


class ExhibitRun:
    """An exhibit with a profile, and the store its records come from."""

    def __init__(self, study: Study, exhibit: Exhibit, profile: Any, records: Store):
        self.study, self.exhibit, self.profile, self.store = study, exhibit, profile, records
        self.arms = exhibit.arms(profile)
        self.trials = [trial for arm in self.arms.values() for trial in arm]

    @property
    def name(self) -> str:
        return f"{self.study.name}/{self.exhibit.name}"

    def plan(self) -> Plan:
        return plan(self.trials, self.store)

    def run(self, jobs: int = 1, executor=None, progress: TextIO | None = None) -> Results:
        """Run what the store lacks, and return all."""
        records = run_trials(self.trials, self.store, jobs=jobs, executor=executor, progress=progress)
        return Results(self.profile, self.arms, records)

    def recorded(self) -> Results:
        """What the store has, without running anything."""
        return Results(self.profile, self.arms, recorded(self.trials, self.store), timings(self.trials, self.store))

    def verdicts(self, results: Results) -> list[Verdict]:
        return self.study.verdicts(self.exhibit.name, results)

    def folder(self) -> Path:
        """Where this profile's tables, figures and executed notebooks lie."""
        return self.store.root / self.study.name / re.sub(r"[^\w.=-]+", "_", self.profile.name)

    def save_tables(self, results: Results) -> list[Path]:
        """One CSV a table: `<exhibit>.csv` for the first, `<exhibit>-2.csv` and so on."""
        written = []
        for number, table in enumerate(self.exhibit.tables(results).values(), start=1):
            path = self.folder() / f"{self.exhibit.name}{'' if number == 1 else f'-{number}'}.csv"
            write_atomically(path, table.to_csv(index=False, float_format="%.6g"))
            written.append(path)
        return written

    def save_figure(self, results: Results) -> list[Path]:
        """`<exhibit>.svg` and `.png`; nothing where there is no figure yet."""
        if self.exhibit.draw is None:
            return []
        with shared_look():
            figure = self.exhibit.draw(results)
        return [] if figure is None else save_figure(figure, self.folder() / self.exhibit.name, self.profile.name.split(",")[0])


def provenance(results: Results) -> pd.DataFrame:
    """One row a record: its arm, key, and where, when and by what it was made."""
    rows = []
    for arm, trials in results.arms.items():
        for trial in trials:
            if (record := results.records.get(trial.key())) is not None:
                rows.append(
                    {
                        "arm": arm,
                        "trial": trial.label(),
                        "key": record.key[:12],
                        "diverged": record.diverged,
                        **record.provenance,
                    }
                )
    return pd.DataFrame(rows)
