"""A pruned model, run and stored sparse (ours): its recurrent layers, its real-time factor, its files, and sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repro.report import plots
from repro.studies.base import Arms, Results, summary
from repro.studies.comparing import beside, interval
from repro.studies.narang2017.comparisons import paper
from repro.studies.narang2017.figures import BLUE, GREEN, ORANGE, RED, SKY
from repro.studies.running import PrunedModel, RuntimeTrial, SequenceTrial
from repro.studies.speech import Pruning

if TYPE_CHECKING:
    from repro.studies.narang2017.profiles import Profile

OURS, INT8 = "repro sparse", "int8 dynamic"
_MB = 1e6
# Section 5.2: the dense and the sparse model of each kind, in megabytes without positions.
_PAPERS = {"pruned rnn": ("RNN Dense Baseline", "RNN Sparse 1760"), "pruned gru": ("GRU Dense", "GRU Sparse")}


def arms(profile: Profile) -> Arms:
    """The models that are trained, each with the automatic ramp (no dense model has to be trained first), and sequences."""
    sizes, repeats = profile.running, range(profile.running.repeats)
    found: Arms = {f"pruned {model.cell}": [_runtime(profile, model, i) for i in repeats] for model in sizes.models}
    found["sequences"] = [
        SequenceTrial(
            cells=sizes.cells,
            widths=sizes.widths,
            sparsities=sizes.sparsities,
            steps=sizes.steps,
            rounds=profile.timing_rounds,
            replicate=i,
        )
        for i in repeats
    ]
    return found


def _runtime(profile: Profile, model: PrunedModel, replicate: int) -> RuntimeTrial:
    return RuntimeTrial(
        corpus="made",
        corpus_size=profile.running.corpus_size,
        replicate=replicate,
        cell=model.cell,
        hidden=model.hidden,
        layers=model.layers,
        channels=profile.channels,
        time_strides=profile.time_strides,
        epochs=model.epochs,
        batch=profile.batch,
        learning_rate=model.learning_rate,
        weight_decay=profile.weight_decay,
        pruning=Pruning(method="auto", sparsity=profile.sparsity, freq=profile.freq, phi=profile.phi),
        utterances=profile.running.utterances,
        rounds=profile.timing_rounds,
        backends=profile.timing_backends,
    )


def _models(results: Results) -> list[str]:
    return [arm for arm in results.arms if arm.startswith("pruned") and results.has(arm)]


def real_time_speedup(results: Results, arm: str) -> np.ndarray:
    """By repeat, how many times faster the whole pruned model reads on sparse kernels."""
    return results.metric(arm, "dense_rtf") / results.metric(arm, "sparse_rtf")


def layer_ratios(results: Results) -> pd.DataFrame:
    """Our kernel in the recurrent layers, over the best of each kind of opponent; one row an arm, repeat and matrix.

    `dense`, `library`: the fastest float32 dense product and sparse library; `int8` with its `error`; `bound`: share of the
    time that reading the fewest possible bytes takes. NaN where there is no such opponent. Dense products do not depend on
    where the zeros are, so they stand for the "shuffled" weights too.
    """
    found = []
    for arm in _models(results):
        for record in results.seeds(arm):
            rows = pd.DataFrame(record.curves["products"])
            dense = rows[~rows["sparse"]]
            int8 = dense[dense["backend"] == INT8]
            for _, ours in rows[rows["backend"] == OURS].iterrows():
                libraries = rows[rows["sparse"] & (rows["runtime"] != "repro") & (rows["matrix"] == ours["matrix"])]
                us = ours["median_us"]
                found.append(
                    {
                        "arm": arm,
                        "rows": ours["rows"],
                        "columns": ours["columns"],
                        "mask": ours["matrix"],
                        "sparsity": ours["sparsity"],
                        "median_us": us,
                        "dense": dense.loc[~dense["reduced"], "median_us"].min() / us,
                        "library": libraries["median_us"].min() / us,
                        "int8": int8["median_us"].min() / us,
                        "int8_error": int8["error"].max(),
                        "bound": ours["bytes"] / ours["gbps"] / 1e3 / us,
                    }
                )
    return pd.DataFrame(found)


def sequence_ratios(results: Results) -> pd.DataFrame:
    """Milliseconds of every sequence, and our runtime against each opponent, one row a repeat, cell, width and sparsity."""
    parts = [
        pd.DataFrame(record.curves["sequences"]).assign(repeat=record.spec["replicate"])
        for record in results.seeds("sequences")
    ]
    if not parts:
        return pd.DataFrame()
    rows = pd.concat(parts, ignore_index=True)
    for column in ("int8_ms", "int8_error"):
        rows[column] = rows[column].astype(float)  # None where torch has no such layer
    ratios = {f"over_{name}": rows[f"{name}_ms"] / rows["sparse_ms"] for name in ("dense", "products", "int8")}
    return rows.assign(**ratios)


def stored(results: Results) -> pd.DataFrame:
    """Sizes in bytes and what the loaded model reads, one row an arm, repeat and type of the values."""
    parts = [
        pd.DataFrame(record.curves["files"]).assign(arm=arm, repeat=record.spec["replicate"])
        for arm in _models(results)
        for record in results.seeds(arm)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Real-time factors, files, layers, sequences."""
    found = {}
    if _models(results):
        found["The whole model, one utterance at a time"] = beside(_real_time_rows(results))
        found["Files, MB"] = _file_table(results)
        found["Smaller by, whole model"] = beside(_smaller_rows(results))
        found["Densest recurrent matrix times a vector: our kernel over the best opponent (median over repeats)"] = (
            _layer_table(results)
        )
    if results.has("sequences"):
        found["Sequences, milliseconds (median over repeats)"] = _sequence_table(results)
    found["Not measured"] = _missing(results)
    return found


def _real_time_rows(results: Results):
    for arm in _models(results):
        for name, quantity, scale in (
            ("dense_rtf", "real-time factor, dense", 1),
            ("sparse_rtf", "real-time factor, sparse", 1),
            ("other_transcripts", "transcripts that differ", 1),
            ("transcripts", "of transcripts", 1),
            ("score_error", "largest difference over largest score", 1),
            ("dense_cer", "test CER, dense, %", 100),
            ("sparse_cer", "test CER, sparse, %", 100),
            ("sparsity_recurrent", "zeros, recurrent, %", 100),
            ("sparsity_total", "zeros, total, %", 100),
            ("train_seconds", "seconds of training", 1),
        ):
            yield arm, quantity, None, scale * results.metric(arm, name)
            if name == "sparse_rtf":
                yield arm, "dense over sparse", None, real_time_speedup(results, arm)


def _file_table(results: Results) -> pd.DataFrame:
    rows = stored(results)
    sizes = ["file", "values", "minimum", "dense"]
    table = rows.assign(over=rows["file"] / rows["minimum"], cer=100 * rows["cer"], **{n: rows[n] / _MB for n in sizes})
    table = table.groupby(["arm", "stored"], sort=False)[[*sizes, "over", "cer", "error"]].median().reset_index()
    names = {
        "arm": "",
        "stored": "values as",
        "file": "file",
        "values": "values alone (the paper's count)",
        "minimum": "information minimum",
        "over": "file over minimum",
        "cer": "test CER, %",
        "error": "largest difference over largest score",
    }
    return table.rename(columns=names)


def _smaller_rows(results: Results):
    rows = stored(results)
    for arm in _models(results):
        own = rows[rows["arm"] == arm]
        exact = own[own["stored"] == "float32"]
        dense, sparse = (paper("memory", series, "megabytes") for series in _PAPERS[arm])
        published = dense._replace(value=dense.value / sparse.value, known="derived")
        yield arm, "dense over values alone", published, exact["dense"] / exact["values"]
        for name in own["stored"].unique():
            part = own[own["stored"] == name]
            yield arm, f"dense over file, {name}", None, part["dense"] / part["file"]


def _layer_table(results: Results) -> pd.DataFrame:
    keys = ["arm", "rows", "columns", "mask"]
    names = {
        "arm": "",
        "median_us": "ours, us",
        "dense": "over best dense",
        "library": "over best sparse library",
        "int8": "over int8 dense",
        "int8_error": "error of int8",
        "bound": "share of the byte bound",
    }
    return layer_ratios(results).groupby(keys, sort=False).median().reset_index().rename(columns=names)


def _sequence_table(results: Results) -> pd.DataFrame:
    keys = ["cell", "hidden", "sparsity"]
    names = {
        "dense_ms": "torch float32",
        "products_ms": "best dense, recurrent product alone",
        "int8_ms": "torch int8",
        "sparse_ms": "ours",
        "over_dense": "over float32",
        "over_products": "over best dense",
        "over_int8": "over int8",
        "sparse_error": "our error",
        "int8_error": "error of int8",
    }
    rows = sequence_ratios(results).groupby(keys, sort=False)[list(names)].median()
    return rows.reset_index().rename(columns={"hidden": "units", **names})


def _missing(results: Results) -> pd.DataFrame:
    reasons = {}
    for record in results.used():
        reasons |= {name.removeprefix("missing "): why for name, why in record.metrics.items() if name.startswith("missing ")}
    return pd.DataFrame(reasons.items(), columns=["", "why"])


def figure(results: Results) -> Figure | None:
    """Times of the recurrent layers by library; real-time factors; file sizes with the least possible marked."""
    if not _models(results):
        return None
    drawn, axes = plots.new_figure(1, 3, size=(13, 5))
    for ax, draw in zip(axes, (_draw_layers, _draw_real_time, _draw_files), strict=True):
        draw(ax, results)
    words = f"made speech corpus, {results.profile.name} profile; {results.machine()}"
    drawn.suptitle(words, fontsize=9, x=0.01, ha="left")
    return drawn


def _draw_layers(ax, results: Results) -> None:
    for shift, line, marker, arm in zip((-0.15, 0.15), (":", "--"), ("o", "s"), _models(results), strict=False):
        curves = [pd.DataFrame(record.curves["products"]) for record in results.seeds(arm)]
        rows = pd.concat(curves, ignore_index=True).query("matrix == 'trained'")
        names = list(rows["backend"].unique())
        for place, name in enumerate(names):
            own = rows[rows["backend"] == name]
            mean, low, high = interval(own["median_us"])
            spread = None if np.isnan(low) else [[max(mean - low, 0)], [max(high - mean, 0)]]
            ax.errorbar([mean], [place + shift], xerr=spread, fmt=marker, color=_colour(own.iloc[0]), markersize=5, capsize=3)
        shape = f"{arm}, {rows['rows'].iloc[0]} x {rows['columns'].iloc[0]}"
        ax.plot([], [], marker, color=plots.PAPER, label=shape)
        sparse = rows[rows["sparse"]]
        bound = (sparse["bytes"] / sparse["gbps"] / 1e3).median()
        ax.axvline(bound, color="black", linewidth=0.8, linestyle=line, label=f"{arm}, bound by bytes")
        ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    plots.plain_log(ax, "x")
    ax.set(xlabel="µs a product (log scale)", title="a: densest recurrent matrix, batch 1")
    plots.legend_below(ax)


def _colour(row) -> str:
    if row["runtime"] == "repro":
        return GREEN if row["sparse"] else BLUE
    return ORANGE if row["reduced"] else RED if row["sparse"] else BLUE


def _draw_real_time(ax, results: Results) -> None:
    found = _models(results)
    places = np.arange(len(found))
    for shift, name, colour, label in ((-0.15, "dense_rtf", BLUE, "dense"), (0.15, "sparse_rtf", GREEN, "sparse kernels")):
        heights = np.array([interval(results.metric(arm, name)) for arm in found]).T
        plots.points(ax, places + shift, *heights, label, color=colour)
    gains = [summary(real_time_speedup(results, arm))["ours"] for arm in found]
    ax.set_xticks(places, [f"{arm}\n{gain:.3g} x" for arm, gain in zip(found, gains, strict=True)], fontsize=8)
    ax.set_xlim(-0.6, len(found) - 0.4)
    plots.plain_log(ax, "y")
    ax.set(ylabel="seconds a second of speech (log scale)", title="b: real-time factor, whole model")
    plots.legend_below(ax)


def _draw_files(ax, results: Results) -> None:
    rows, labels = stored(results), []
    for arm in _models(results):
        sizes = rows[rows["arm"] == arm].groupby("stored", sort=False)[["file", "minimum", "values", "dense"]].median() / _MB
        ax.barh(len(labels), sizes["dense"].iloc[0], color=BLUE, height=0.7)
        labels.append(f"{arm.removeprefix('pruned ')}, dense")
        for name, size in sizes.iterrows():
            place = len(labels)
            ax.barh(place, size["file"], color=SKY, height=0.7)
            for kind, colour, label in (("minimum", RED, "information minimum"), ("values", "black", "values alone")):
                ax.plot([size[kind]] * 2, [place - 0.35, place + 0.35], color=colour, label=label)
            labels.append(f"{arm.removeprefix('pruned ')}, {name}")
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.invert_yaxis()
    plots.plain_log(ax, "x")
    ax.set(xlabel="MB (log scale)", title="c: size of the file")
    plots.legend_below(ax)
