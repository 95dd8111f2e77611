"""The look all figures share, ours and the paper's values in one axes, and files whose bytes depend on the data alone."""

import math
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from repro.errors import one_of
from repro.files import write_atomically
from repro.report.published import KNOWN

# Okabe and Ito (2008), told apart with every common colour blindness; black and grey are kept for the paper.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PAPER = "#444444"
SIZE = (6.4, 4.0)
WATERMARK = "smoke run, not evidence"

_STYLE = {
    "figure.figsize": SIZE,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same glyphs on every machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "svg.fonttype": "path",
    "svg.hashsalt": "repro",  # else the ids inside an SVG differ from run to run
}


@contextmanager
def shared_look():
    """Everything drawn inside has the project's look; the reader's own matplotlib settings come back afterwards.

    A `with` block, or a decorator of a drawing function: `@shared_look()`.
    """
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": matplotlib.rcParams["backend"], **_STYLE}):
        yield


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = SIZE, **subplots):
    """`(figure, axes)` in the shared look, without pyplot's global state; axes as `Figure.subplots` returns them.

    size in inches; further keywords go to `Figure.subplots`.
    """
    with shared_look():
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(rows, columns, **subplots)


def band(ax, x, mean, low, high, label: str, **line):
    """A line with its interval as a shade; returns the line. `low`, `high` of NaN (one seed) leave the line alone."""
    (drawn,) = ax.plot(x, mean, label=label, **line)
    if np.isfinite(np.asarray(low, dtype=float)).any():
        ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    return drawn


def points(ax, x, mean, low, high, label: str, **marker):
    """Filled markers with their intervals as bars (none where NaN); returns the container. For ours, beside `paper`."""
    mean = np.asarray(mean, dtype=float)
    errors = np.nan_to_num(np.vstack([mean - np.asarray(low, float), np.asarray(high, float) - mean]))
    # Rounding may put a bound a hair on the wrong side of the mean, which matplotlib refuses.
    style = {"fmt": "o", "capsize": 3, "linestyle": "none"} | marker
    return ax.errorbar(x, mean, yerr=np.maximum(errors, 0), label=label, **style)


def paper_label(known: str, label: str = "paper") -> str:
    """How the legend names a published value: `paper (image)`; a value from the paper's text is plain `paper`.

    Raises ReproError when `known` is none of read, image, remembered, derived.
    """
    one_of("known", known, KNOWN)
    return label if known == "read" else f"{label} ({known})"


def paper(ax, x, y, known: str, label: str = "paper", **line):
    """The paper's values: hollow grey markers, dashed if joined (`linestyle="--"`), how they are known in the label."""
    style = {
        "color": PAPER,
        "marker": "o",
        "markerfacecolor": "none",
        "markeredgewidth": 1.4,
        "linestyle": "none",
        "linewidth": 1.2,
        "zorder": 3,
    }
    (drawn,) = ax.plot(x, y, label=paper_label(known, label), **(style | line))
    return drawn


def ours_and_paper_legend(ax, columns: int = 3, **legend):
    """One legend below the axes, clear of the data, each label once, the paper's entries last; returns it."""
    handles = {}
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
        handles.setdefault(label, handle)
    ordered = sorted(handles, key=lambda label: label.startswith("paper"))
    style = {"loc": "outside lower center", "ncols": columns} | legend
    with shared_look():
        return ax.figure.legend([handles[label] for label in ordered], ordered, **style)


def say_if_empty(ax) -> None:
    """For a panel whose trainings nobody has run yet."""
    if not ax.lines:
        ax.text(0.5, 0.4, "no training recorded", transform=ax.transAxes, ha="center")


def note(figure: Figure, words: str) -> None:
    """What the numbers were measured on, above all panels."""
    figure.suptitle(words, fontsize=9, x=0.01, ha="left")


def legend_below(ax, columns: int = 2) -> None:
    """A panel's own legend, each label once."""
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(handles.values(), handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=8)


def plain_log(ax, axis: str) -> None:
    """A logarithmic axis "x" or "y" that is labelled with numbers, not powers; once everything is drawn."""
    ax.set(**{f"{axis}scale": "log"})
    low, high = getattr(ax, f"get_{axis}lim")()
    decades = abs(math.log10(high / low))
    steps = range(1, 10) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    ticks = getattr(ax, f"{axis}axis")
    ticks.set_major_locator(LogLocator(subs=steps))
    ticks.set_minor_locator(NullLocator())
    ticks.set_major_formatter(StrMethodFormatter("{x:,g}"))


def save_figure(figure: Figure, path: Path, profile: str) -> list[Path]:
    """Write `figure` as `<path>.svg` and `<path>.png` (150 dpi); the same figure gives the same bytes.

    path: without a suffix. A smoke figure is marked as no evidence. Returns the two paths. Raises ReproError when they
    cannot be written.
    """
    path = Path(path)
    written = []
    with shared_look():
        if profile == "smoke" and WATERMARK not in [text.get_text() for text in figure.texts]:
            figure.text(
                0.5, 0.5, WATERMARK, ha="center", va="center", rotation=20, fontsize=22, color="#B00020", alpha=0.25,
                zorder=10,
            )  # fmt: skip
        for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
            buffer = BytesIO()
            figure.savefig(buffer, format=suffix[1:], dpi=150, metadata=metadata)
            written.append(path.with_name(path.name + suffix))
            write_atomically(written[-1], buffer.getvalue())
    return written
