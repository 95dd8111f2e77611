"""The report: static pages that open on the claims and need neither scripts nor the network."""

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jinja2
import pandas as pd

from repro.errors import ReproError
from repro.files import write_atomically
from repro.report.notebooks import html_body
from repro.report.verdicts import FAILS, HOLDS, NOT_TESTABLE, TREND, UNDECIDED, VERDICTS, Verdict, span

CSS = {HOLDS: "holds", TREND: "trend", FAILS: "fails", UNDECIDED: "undecided", NOT_TESTABLE: "not"}
TITLE = "Sparse recurrent networks, reproduced"
LEAD = (
    "Three papers say that recurrent networks can be made sparse, or their training cheaper, almost for free. "
    "Claim by claim: what they say, what we measured, and whether it holds."
)


@dataclass(frozen=True, kw_only=True)
class ExhibitPage:
    """What one exhibit shows: its executed notebook, its figures and its tables as files.

    figures: PNG or SVG files, the first one is the thumbnail; csv: the numbers behind them; both can be downloaded from
    the page. Without a notebook the page shows the figures.
    """

    study: str
    name: str
    title: str
    caption: str = ""
    notebook: Path | None = None
    figures: tuple[Path, ...] = ()
    csv: tuple[Path, ...] = ()

    @property
    def thumbnail(self) -> str:
        return Path(self.figures[0]).name if self.figures else ""


def build_site(
    output: Path,
    ledger: Iterable[Verdict],
    exhibits: Iterable[ExhibitPage],
    *,
    titles: Mapping[str, str],
    provenance: Mapping[str, object],
    records: pd.DataFrame,
    profile: str,
    source: str,
) -> Path:
    """Write the report into the folder `output`; returns its `index.html`. The same input gives the same bytes.

    ledger: the verdicts, each study's together, in reading order. titles: the paper's title for each study. provenance:
    facts such as commit and machine, in reading order. records: one row per trial, shown as it is. source: the corpora and
    machine behind the numbers, in a few words.

    Raises ReproError for a study without a title, two exhibits of one name, or a file that is missing.
    """
    output, ledger, exhibits = Path(output), list(ledger), list(exhibits)
    pages = {(page.study, page.name) for page in exhibits}
    if len(pages) < len(exhibits):
        repeated = [name for name, count in Counter((p.study, p.name) for p in exhibits).items() if count > 1]
        raise ReproError(f"exhibit {'/'.join(repeated[0])} is given twice: each needs its own page")
    for study in [v.claim.study for v in ledger] + [page.study for page in exhibits]:
        if study not in titles:
            raise ReproError(f"no title for study {study!r}: there are titles for {', '.join(titles)}")

    templates = _templates()
    site = {"title": TITLE, "lead": LEAD, "profile": profile, "source": source}

    def write(path: str, template: str, **values):
        values |= {"site": site, "css": CSS, "root": "../" * path.count("/")}
        write_atomically(output / path, templates.get_template(template).render(**values))

    for page in exhibits:
        files = [Path(file) for file in (*page.figures, *page.csv, *([page.notebook] if page.notebook else []))]
        names = [f"{page.name}.ipynb" if file == page.notebook else file.name for file in files]
        for file, name in zip(files, names, strict=True):
            _copy(file, output / page.study / name)
        write(
            f"{page.study}/{page.name}.html",
            "exhibit.html",
            page=page,
            # The page has the exhibit's title; the notebook's first heading would only repeat it.
            body=re.sub(r"<h1.*?</h1>", "", html_body(page.notebook), count=1, flags=re.DOTALL) if page.notebook else "",
            figures=[Path(figure).name for figure in page.figures],
            files=names,
            verdicts=[v for v in ledger if (v.claim.study, v.claim.exhibit) == (page.study, page.name)],
        )
    write(
        "provenance.html",
        "provenance.html",
        facts=provenance,
        columns=list(records.columns),
        records=records.astype(object).where(records.notna(), "").to_numpy().tolist(),
    )
    write(
        "index.html",
        "index.html",
        counts=count_verdicts(ledger),
        pages=pages,
        studies=[
            {"name": name, "title": titles[name], "topics": _by(verdicts, lambda v: v.claim.topic)}
            for name, verdicts in _by(ledger, lambda v: v.claim.study)
        ],
        galleries=[{"title": titles[name], "pages": group} for name, group in _by(exhibits, lambda page: page.study)],
    )
    return output / "index.html"


def count_verdicts(ledger: Iterable[Verdict]) -> dict[str, int]:
    """How many claims have each verdict, in the order of `VERDICTS`, zeros included."""
    counts = Counter(v.verdict for v in ledger)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def scoreboard_markdown(ledger: Iterable[Verdict], titles: Mapping[str, str]) -> str:
    """The README's scoreboard: claims per verdict for each study, then its headline claims, ours beside the paper's."""
    lines = ["| study | " + " | ".join(VERDICTS) + " |", "| --- |" + " --: |" * len(VERDICTS)]
    studies = _by(ledger, lambda v: v.claim.study)
    for name, verdicts in studies:
        lines.append(f"| {_cell(titles[name])} | " + " | ".join(map(str, count_verdicts(verdicts).values())) + " |")
    lines += ["", "| headline claim | paper | ours | verdict |", "| --- | --- | --- | --- |"]
    for _, verdicts in studies:
        for v in verdicts:
            if v.claim.headline:
                ours = ", ".join(filter(None, (_ours(v), v.source)))
                lines.append(f"| {_cell(v.claim.text)} | {_cell(v.claim.paper)} | {_cell(ours)} | **{v.verdict}** |")
    return "\n".join(lines)


def replace_between_markers(text: str, name: str, markdown: str) -> str:
    """`text` with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced; the markers stay.

    Raises ReproError unless each marker occurs once, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReproError(f"the text should hold {begin} and then {end}, each once, to take the {name}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{markdown.strip()}\n{end}{rest.split(end)[1]}"


def quantity(value: float, unit: str = "") -> str:
    """A number for reading: three significant digits, whole thousands grouped, a real minus sign, the unit attached."""
    if not math.isfinite(value):
        text = {math.inf: "∞", -math.inf: "\N{MINUS SIGN}∞"}.get(value, "none")
    elif value == int(value) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 0.001 else f"{value:.1e}"
    text = text.replace("-", "\N{MINUS SIGN}")
    shown = _unit(unit)
    return f"{text}{shown}" if shown in ("%", "×") else f"{text} {shown}".strip()


def _unit(unit: str) -> str:
    return {"1": "", "x": "×"}.get(unit, unit)


def _ours(v: Verdict) -> str:
    if v.n == 0:
        return "no value"
    if v.claim.kind == "exact":
        return f"{quantity(v.value, v.claim.unit)} (exact)"
    seeds = f"{v.n} seed{'' if v.n == 1 else 's'}"
    interval = "" if math.isnan(v.low) else f"[{quantity(v.low)}, {quantity(v.high)}], "
    return f"{quantity(v.value, v.claim.unit)} {interval}{seeds}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _by(items: Iterable, key) -> list[tuple]:
    return [(name, list(group)) for name, group in groupby(items, key)]


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("repro.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"quantity": quantity, "span": span, "unit": _unit}
    style, _, _ = environment.loader.get_source(environment, "style.css")
    environment.globals["style"] = jinja2.utils.markupsafe.Markup(style)
    return environment


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ReproError(f"no file {source} for the report: run its exhibit again")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise ReproError(f"cannot write {target}: {error.strerror}; free space or choose another folder") from error
