"""Table 6: the time of y = W x, dense and sparse, by every library and by this package's kernels. Tables and figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.report import plots
from repro.studies.base import Results, summary
from repro.studies.comparing import beside, interval
from repro.studies.narang2017 import quantities as q
from repro.studies.narang2017.comparisons import paper
from repro.studies.narang2017.figures import BLUE, GREEN, ORANGE, RED, SKY

ROWS = ((q.RNN, 1760, 1760), (q.RNN, 2560, 1760), (q.RNN, 3072, 1760), (q.GRU, 2560, 2560), (q.GRU, 3568, 2560))
OURS, INT8 = "repro sparse", "int8 dynamic"
_CELL = ["rows", "columns", "batch", "sparsity"]
_STYLES = {
    "torch dense": ("o", BLUE),
    "oneDNN packed": ("s", BLUE),
    "OpenBLAS dense": ("^", BLUE),
    "onnxruntime dense": ("v", BLUE),
    "repro dense": ("D", BLUE),
    "int8 dynamic": ("o", ORANGE),
    "torch CSR": ("o", RED),
    "scipy CSR": ("s", RED),
    "MKL CSR": ("^", RED),
    "repro sparse": ("*", GREEN),
    "repro exact": ("P", GREEN),
    "repro 16-bit": ("X", SKY),
}
_GRID_HEADERS = {
    "backend": "library",
    "median_us": "median",
    "lower_us": "lower",
    "upper_us": "upper",
    "bound_us": "bound",
    "dropped": "turns dropped",
}


def product_grid(results: Results) -> pd.DataFrame:
    """Median over repeats of each library's median and quartiles, and the time that reading the fewest possible bytes takes."""
    rows = _products(results)
    columns = ["median_us", "lower_us", "upper_us", "bound_us", "dropped", "error"]
    return rows.groupby([*_CELL, "backend"])[columns].median().reset_index()


def _products(results: Results) -> pd.DataFrame:
    """All timings, one row a (repeat, shape, sparsity, batch, library)."""
    frames = [
        pd.DataFrame(record.curves["products"]).assign(repeat=record.spec["replicate"])
        for arm in ("products", "half sparse")
        for record in results.seeds(arm)
    ]
    rows = pd.concat(frames, ignore_index=True)
    return rows.assign(bound_us=rows["bytes"] / rows["gbps"] / 1e3)


def ratios(results: Results) -> pd.DataFrame:
    """Our kernels in every cell, over the best of each kind of opponent, one row a repeat and cell; NaN where there is none.

    `dense`, `library`: the fastest float32 dense product and sparse library; `int8` with its `error`; `onednn`: dense with
    packed weights, the best ready-made one at larger batches; `bound`: share of the time that reading the bytes takes at least
    (batch 1 only: larger ones are bound by arithmetic).
    """
    rows = _products(results)
    found = []
    for (repeat, height, width, batch), cell in rows.groupby(["repeat", "rows", "columns", "batch"]):
        dense = cell[~cell["sparse"]]
        best_dense = dense.loc[~dense["reduced"], "median_us"].min()
        int8 = dense[dense["backend"] == INT8]
        for _, ours in cell[cell["backend"] == OURS].iterrows():
            same = cell[cell["sparse"] & (cell["sparsity"] == ours["sparsity"]) & (cell["runtime"] != "repro")]
            found.append(
                {
                    "repeat": repeat,
                    "rows": height,
                    "columns": width,
                    "batch": batch,
                    "sparsity": ours["sparsity"],
                    "median_us": ours["median_us"],
                    "dense": best_dense / ours["median_us"],
                    "library": same["median_us"].min() / ours["median_us"],
                    "onednn": dense.loc[dense["backend"] == "oneDNN packed", "median_us"].min() / ours["median_us"],
                    "int8": int8["median_us"].min() / ours["median_us"],
                    "int8_error": int8["error"].max(),
                    "bound": ours["bound_us"] / ours["median_us"] if batch == 1 else np.nan,
                }
            )
    return pd.DataFrame(found)


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """The seven rows of Table 6, speed-ups at the same size, ours against the best opponents, cross-overs, the whole grid."""
    if not results.has("products"):
        return {"Times": pd.DataFrame()}
    return {
        "Rows of Table 6": beside(_printed_rows(results)),
        "Speed-ups over dense of the same size": beside(_same_size_rows(results)),
        "This package's kernels over the best opponent (median over repeats)": _ratio_table(results),
        "Cross-over density, % (blank: sparse wins, or loses, throughout)": _crossings(results),
        "Not measured": _missing(results),
        "Whole grid, microseconds (median, quartiles, bound by bytes)": product_grid(results).rename(columns=_GRID_HEADERS),
    }


def _printed_rows(results: Results):
    records = results.seeds("products")
    for cell, width, base in ROWS:
        name = f"{cell} {width} 95 % sparse"
        if width == base:
            dense = [q.median_us(record, q.matrix_shape(cell, base), 0.0) for record in records]
            yield f"{cell} {base} dense", "time, us", paper("table6", f"{cell} dense", "time_us", base), dense
        for own, who in ((False, "best library"), (True, "our kernels")):
            times = [q.median_us(record, q.matrix_shape(cell, width), 0.95, own=own) for record in records]
            yield name, f"time, us, {who}", paper("table6", f"{cell} sparse", "time_us", width), times
            gains = [q.speedup(record, cell, width, own=own) for record in records]
            printed = paper("table6", f"{cell} sparse", "speedup", width)
            yield name, f"speed-up over dense {base}, {who}", printed, gains


def _same_size_rows(results: Results):
    for cell, width, _ in ROWS:
        for own, who in ((False, "best library"), (True, "our kernels")):
            gains = [q.speedup(record, cell, width, base=width, own=own) for record in results.seeds("products")]
            yield f"{cell} {width} 95 % sparse", who, None, gains


def _ratio_table(results: Results) -> pd.DataFrame:
    table = ratios(results).groupby(_CELL).median().drop(columns="repeat").reset_index()
    names = {
        "median_us": "ours, us",
        "dense": "over best dense",
        "library": "over best sparse library",
        "onednn": "over oneDNN packed",
        "int8": "over int8 dense",
        "int8_error": "error of int8",
        "bound": "share of the byte bound",
    }
    return table.rename(columns=names)


def _crossings(results: Results) -> pd.DataFrame:
    from repro.sparse.timing import Timing, crossover_density

    names = list(Timing.__dataclass_fields__)
    crossings = []
    for (rows, columns, batch), group in _products(results).groupby(["rows", "columns", "batch"]):
        if group.loc[group["sparse"], "sparsity"].nunique() < 2:
            continue
        row = {"rows": rows, "columns": columns, "batch": batch}
        libraries = group[~group["sparse"] | (group["runtime"] != "repro")]
        for who, part in (("libraries", libraries), ("with our kernels", group)):
            found = [
                crossover_density([Timing(**timing) for timing in repeat[names].to_dict("records")])
                for _, repeat in part.groupby("repeat")
            ]
            row[who] = summary(100 * density if density is not None else np.nan for density in found)["ours"]
        crossings.append(row)
    return pd.DataFrame(crossings)


def _missing(results: Results) -> pd.DataFrame:
    reasons = {}
    for record in results.used():
        reasons |= {name.removeprefix("missing "): why for name, why in record.metrics.items() if name.startswith("missing ")}
    return pd.DataFrame(reasons.items(), columns=["library", "why, at some size at least"])


def figure(results: Results) -> Figure | None:
    """Speed-ups of the paper's rows; ours over the best opponents; the roofline; the trend with the batch."""
    if not results.has("products"):
        return None
    drawn, ((first, second), (third, fourth)) = plots.new_figure(2, 2, size=(11, 9.6))
    _draw_rows(first, results)
    _draw_opponents(second, results)
    _draw_roofline(third, results)
    _draw_batches(fourth, results)
    drawn.suptitle(results.machine(), fontsize=9, x=0.01, ha="left")
    return drawn


def _draw_rows(ax, results: Results) -> None:
    places, records = np.arange(len(ROWS)), results.seeds("products")
    for shift, colour, label, own in ((-0.15, RED, "best sparse library", False), (0.15, GREEN, "our kernels", True)):
        found = [interval([q.speedup(r, cell, width, base=base, own=own) for r in records]) for cell, width, base in ROWS]
        plots.points(ax, places + shift, *np.array(found).T, label, color=colour)
    published = [paper("table6", f"{cell} sparse", "speedup", width) for cell, width, _ in ROWS]
    plots.paper(ax, places, [p.value for p in published], published[0].known, "paper")
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xticks(places, [f"{cell} {width}\nover {base}" for cell, width, base in ROWS], fontsize=8)
    plots.plain_log(ax, "y")
    ax.set(ylabel="speed-up of 95 % sparse, batch 1", title="a: Table 6, over its smaller dense layer")
    plots.legend_below(ax, columns=3)


def _draw_opponents(ax, results: Results) -> None:
    found = ratios(results).query("batch == 1")
    shapes = sorted({(rows, columns) for rows, columns in zip(found["rows"], found["columns"], strict=True)})
    for kind, colour, label in (
        ("dense", BLUE, "best dense"),
        ("library", RED, "best sparse library"),
        ("int8", ORANGE, "int8 dense"),
    ):
        for sparsity, shift, marker in ((0.9, -0.12, "o"), (0.95, 0.12, "s")):
            part = found[np.isclose(found["sparsity"], sparsity)]
            if part.empty:
                continue
            values = [part[(part["rows"] == r) & (part["columns"] == c)][kind] for r, c in shapes]
            heights = np.array([interval(v) for v in values]).T
            name = f"over {label}, {sparsity:.0%}"
            plots.points(ax, np.arange(len(shapes)) + shift, *heights, name, color=colour, marker=marker)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xticks(range(len(shapes)), [f"{r} x {c}" for r, c in shapes], fontsize=8)
    plots.plain_log(ax, "y")
    ax.set(ylabel="their time over ours", title="b: our kernels over the best of each kind, batch 1")
    plots.legend_below(ax, columns=3)


def _draw_roofline(ax, results: Results) -> None:
    grid = product_grid(results).query("batch == 1")
    for backend, (marker, colour) in _STYLES.items():
        group = grid[grid["backend"] == backend]
        if group.empty:
            continue
        ax.plot(group["bound_us"], group["median_us"], marker, color=colour, label=backend, markersize=5, alpha=0.8)
    ends = np.array([grid["bound_us"].min(), grid["bound_us"].max()])
    ax.plot(ends, ends, color="black", linewidth=1, label="bound, float32")
    plots.plain_log(ax, "x")
    plots.plain_log(ax, "y")
    ax.set(
        xlabel="time to read the fewest possible bytes at measured bandwidth, µs",
        ylabel="measured time, µs",
        title="c: roofline, batch 1, all sparsities",
    )
    plots.legend_below(ax, columns=4)


def _draw_batches(ax, results: Results) -> None:
    rows, columns = q.timed_shape(results.seeds("products")[0], q.matrix_shape(q.GRU, 2560))
    products = _products(results)
    products = products[(products["rows"] == rows) & (products["columns"] == columns)]
    batches = sorted(products["batch"].unique())
    for sparsity, style in ((0.9, "--"), (0.95, "-")):
        for own, colour, label in ((False, RED, "best sparse library"), (True, GREEN, "our kernels")):
            heights = []
            for batch in batches:
                cell = products[products["batch"] == batch]
                gains = []
                for _, one in cell.groupby("repeat"):
                    dense = one.loc[~one["sparse"] & ~one["reduced"], "median_us"].min()
                    kind = one["sparse"] & ~one["reduced"] & ((one["runtime"] == "repro") == own)
                    gains.append(dense / one.loc[kind & np.isclose(one["sparsity"], sparsity), "median_us"].min())
                heights.append(interval(gains))
            if np.isfinite(heights).any():
                plots.band(ax, batches, *np.array(heights).T, f"{label}, {sparsity:.0%}", color=colour, linestyle=style)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(batch) for batch in batches])
    plots.plain_log(ax, "y")
    ax.set(xlabel="batch", ylabel="speed-up over the best dense library", title=f"d: {rows} x {columns}, by batch")
    plots.legend_below(ax, columns=2)
