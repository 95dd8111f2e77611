"""What the notebooks call: an exhibit by name, with the parameters of the notebook's own cell."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.display import Image, Markdown, display

from repro.errors import ReproError
from repro.report.published import load_published
from repro.report.site import quantity
from repro.results import ExhibitRun, provenance, store
from repro.studies import find

_IPYTHONS_OWN = ("In", "Out")


class NotebookExhibit:
    """An opened exhibit: `run()`, then `figure()`, `tables()`, `verdicts()`, `provenance()`."""

    def __init__(self, run: ExhibitRun):
        self._run = run
        self.results = None

    def plan(self) -> pd.DataFrame:
        """The trials: recorded or missing, with the estimated seconds of what is missing."""
        rows = self._run.plan().rows
        return pd.DataFrame([{"trial": r.trial.label(), "state": r.state, "seconds": round(r.seconds)} for r in rows])

    def run(self) -> NotebookExhibit:
        """Run what is missing (processes: the variable REPRO_JOBS, else the number of cores), keep tables as CSV."""
        jobs = int(os.environ.get("REPRO_JOBS") or os.cpu_count() or 1)
        self.results = self._run.run(jobs=jobs, progress=sys.stdout)
        self._run.save_tables(self.results)
        return self

    def _finished(self):
        if self.results is None:
            raise ReproError("call run() first: there are no records to show yet")
        return self.results

    def figure(self) -> Image:
        """The exhibit's figure, also saved as SVG and PNG beside the records."""
        written = self._run.save_figure(self._finished())
        return Image(filename=str(written[1]), alt=self._run.exhibit.title)

    def tables(self) -> None:
        """Every table of the exhibit, the paper's numbers beside ours."""
        for title, table in self._run.exhibit.tables(self._finished()).items():
            display(Markdown(f"**{title}**"), table.style.format(_cell, na_rep="").hide(axis="index"))

    def published(self) -> pd.DataFrame:
        """The paper's numbers of this exhibit, each with how it is known."""
        rows = load_published(self._run.study.name)
        return rows[rows["exhibit"].str.startswith(self._run.exhibit.name)].drop(columns="exhibit").reset_index(drop=True)

    def verdicts(self) -> pd.DataFrame:
        """The claims that this exhibit decides."""
        rows = []
        for v in self._run.verdicts(self._finished()):
            ours = "" if v.n == 0 else quantity(v.value, v.claim.unit)
            interval = "" if v.low != v.low else f"{quantity(v.low)} to {quantity(v.high)}"
            rows.append(
                {"claim": v.claim.id, "text": v.claim.text, "paper": v.claim.paper, "ours": ours, "95 % interval": interval}
                | {"seeds": v.n or "", "verdict": v.verdict, "reason": v.reason}
            )
        return pd.DataFrame(rows)

    def provenance(self) -> pd.DataFrame:
        """Commit, versions, machine and time of every record used."""
        return provenance(self._finished())


def open_exhibit(name: str, parameters: Mapping[str, Any]) -> NotebookExhibit:
    """The exhibit `name` ("narang2017/table3") with the parameters of a notebook: call it with `globals()`.

    Every plain value in there that does not begin with an underscore is taken as a parameter, so that a misspelt
    `papermill -p` is an error that lists what is allowed, not a warning. Raises ReproError for unknown names and values out of range.
    """
    study, exhibit = find(name)
    given = {
        key: value
        for key, value in parameters.items()
        if not key.startswith("_") and key not in _IPYTHONS_OWN and isinstance(value, str | int | float | bool | list | tuple)
    }
    allowed = ("profile", *exhibit.parameters)
    if unknown := [key for key in given if key not in allowed]:
        raise ReproError(f"unknown parameter {', '.join(unknown)} of {name}: it takes {', '.join(allowed)}")
    profile = given.pop("profile", "laptop")
    if not isinstance(profile, str):
        raise ReproError(f"parameter profile is {profile!r}: it should be one of {', '.join(study.profiles)}")
    # None stands for "as the profile has it", so a notebook can show every parameter without fixing it.
    return NotebookExhibit(ExhibitRun(study, exhibit, study.profile(profile, **given), store()))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return quantity(value)
    return str(value)
