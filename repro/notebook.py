"""What the notebooks call: an exhibit by name, with the parameters of the notebook's own cell."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import pandas as pd
from IPython.display import Image, Markdown, display
from pandas.io.formats.style import Styler

from repro.engine.provenance import code_state, versions
from repro.errors import ReproError
from repro.report.published import load_published
from repro.report.site import quantity
from repro.results import ExhibitRun, provenance, store
from repro.studies import find

_IPYTHONS_OWN = ("In", "Out")
_PLAIN = (str, int, float, bool, list, tuple)  # exactly these: a named tuple or a NumPy number is an example's result


class NotebookExhibit:
    """An opened exhibit: `run()`, then `figure()`, `tables()`, `verdicts()`, `provenance()`."""

    def __init__(self, run: ExhibitRun):
        self._run = run
        self.results = None

    def plan(self) -> Styler:
        """The trials: recorded ("hit") or missing, with the estimated seconds of what is missing."""
        rows = self._run.plan().rows
        columns = {"trial": [r.trial.label() for r in rows], "state": [r.state for r in rows]}
        return _shown(pd.DataFrame(columns | {"estimated seconds": [round(r.seconds) for r in rows]}))

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
            display(Markdown(f"**{title}**"), _shown(table))

    def published(self) -> Styler:
        """The paper's numbers of this exhibit, each with how it is known."""
        rows = load_published(self._run.study.name).rename(columns={"value": "paper"})
        return _shown(rows[rows["exhibit"].str.startswith(self._run.exhibit.name)].drop(columns="exhibit"))

    def verdicts(self) -> Styler:
        """The claims that this exhibit decides."""
        rows = []
        for v in self._run.verdicts(self._finished()):
            ours = "" if v.n == 0 else quantity(v.value, v.claim.unit)
            interval = "" if v.low != v.low else f"{quantity(v.low)} to {quantity(v.high)}"
            rows.append(
                {"claim": v.claim.id, "text": v.claim.text, "paper": v.claim.paper, "ours": ours, "95 % interval": interval}
                | {"seeds": v.n or "", "verdict": v.verdict, "reason": v.reason}
            )
        return _shown(pd.DataFrame(rows))

    def provenance(self) -> Styler:
        """Commit, versions, machine and time of every record used; without records, of this very computation."""
        found = provenance(self._finished())
        return _shown(pd.DataFrame([code_state() | versions()]) if found.empty else found)


def open_exhibit(name: str, parameters: Mapping[str, Any]) -> NotebookExhibit:
    """The exhibit `name` ("narang2017/table3") with the parameters of a notebook: call it with `globals()`.

    Every plain value in there that does not begin with an underscore is taken as a parameter, so that a misspelt
    `papermill -p` is an error that lists what is allowed, not a warning; None stands for "as the profile has it". Raises
    ReproError for unknown names and values out of range.
    """
    study, exhibit = find(name)
    allowed = ("profile", *exhibit.parameters)
    given = {
        key: value
        for key, value in parameters.items()
        if value is not None
        and (key in allowed or not (type(value) not in _PLAIN or key.startswith("_") or key in _IPYTHONS_OWN))
    }
    if unknown := [key for key in given if key not in allowed]:
        raise ReproError(f"unknown parameter {', '.join(unknown)} of {name}: it takes {', '.join(allowed)}")
    profile = given.pop("profile", "laptop")
    if not isinstance(profile, str):
        raise ReproError(f"parameter profile is {profile!r}: it should be one of {', '.join(study.profiles)}")
    return NotebookExhibit(ExhibitRun(study, exhibit, study.profile(profile, **given), store()))


def _shown(table: pd.DataFrame) -> Styler:
    """A table with all of its text: three digits of what is ours, every digit of what the paper prints."""
    printed = [column for column in table if str(column).startswith(("paper", "printed"))]
    shown = Styler(table.reset_index(drop=True), cell_ids=False).hide(axis="index")
    shown = shown.format(_cell, na_rep="").format(_exactly, na_rep="", subset=printed)
    return shown.set_table_styles([{"selector": "td, th", "props": "text-align: left; vertical-align: top"}])


def _cell(value: Any) -> str:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return f"{value:,}"
    return quantity(value) if isinstance(value, float) else str(value)


def _exactly(value: Any) -> str:
    if not isinstance(value, Real):
        return str(value)
    text = f"{value:,.0f}" if value == int(value) else f"{value:,.6g}"
    return text.replace("-", "\N{MINUS SIGN}")
