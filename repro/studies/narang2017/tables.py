"""The tables of every exhibit: title -> frame, the paper's number beside ours."""

from __future__ import annotations

import numpy as np
import pandas as pd

from repro.report.published import load_published
from repro.sparse.storage import megabytes, on_chip_speedup, register_gbps, units_on_chip
from repro.studies.base import Results
from repro.studies.comparing import beside
from repro.studies.narang2017 import quantities as q
from repro.studies.narang2017.comparisons import STUDY, TABLE3, base_of, paper, relative_cer, table3
from repro.studies.speech import ROLES

Tables = dict[str, pd.DataFrame]


def schedule_heuristics(results: Results) -> Tables:
    """Table 1: the rule of each hyper-parameter, at the paper's training length and at this profile's."""
    from repro.pruning import Ramp, table1

    ours = results.profile
    trials = [trial for arm in results.arms.values() for trial in arm]
    steps = next((r.metrics["steps_per_epoch"] for r in map(results.records.get, (t.key() for t in trials)) if r), None)
    paper_size = q.paper_ramp()
    rows = [("start_itr", "start of the second epoch"), ("ramp_itr", "25 % of all epochs"), ("end_itr", "50 % of all epochs")]
    here = Ramp(1.0, **table1(ours.epochs, steps), freq=ours.freq, phi=ours.phi) if steps else None
    table = [
        {
            "hyper-parameter": name,
            "heuristic of the paper": rule,
            "at 55,000 iterations": getattr(paper_size, name[:-4]),
            f"{ours.name} profile": getattr(here, name[:-4]) if here else np.nan,
        }
        for name, rule in rows
    ]
    table += [
        {
            "hyper-parameter": name,
            "heuristic of the paper": rule,
            "at 55,000 iterations": value(paper_size),
            f"{ours.name} profile": value(here) if here else np.nan,
        }
        for name, rule, value in (
            ("theta / q", "Equation 1", lambda r: r.theta),
            ("phi / theta", "1.5 to 2", lambda r: r.phi),
            ("freq", "100", lambda r: r.freq),
        )
    ]
    ends = [
        ("epsilon at the last update / q, phi = 1.5 theta", 1.5, "epsilon at end_itr, ramp_slope 1.5"),
        ("epsilon at the last update / q, phi = 2 theta", 2.0, "epsilon at end_itr, ramp_slope 2"),
    ]
    closing = beside(
        (name, "epsilon / q", paper("table1", series, "multiple_of_q"), (r := q.paper_ramp(phi)).threshold(r.last_update()))
        for name, phi, series in ends
    )
    return {"Heuristics": pd.DataFrame(table), "Where the threshold ends": closing}


def layer_counts(exhibit: str):
    """Table 2 or 5, layer by layer, built at full size on torch's meta device."""

    def tables(results: Results) -> Tables:
        rows = [
            {"layer": layer, "paper": int(printed), "known": known, "ours": counted, "difference": counted - int(printed)}
            for layer, counted, printed, known in q.layer_counts(exhibit)
        ]
        frame = pd.DataFrame(rows)
        total = {"layer": "total", "paper": frame["paper"].sum(), "known": "derived", "ours": frame["ours"].sum()}
        total["difference"] = total["ours"] - total["paper"]
        return {"Parameters by layer": pd.concat([frame, pd.DataFrame([total])], ignore_index=True)}

    return tables


def main_results(results: Results) -> Tables:
    """Table 3: error rates, and sizes by role."""
    errors, sizes = [], []
    for arm in TABLE3:
        cer = 100 * results.metric(arm, "test_cer")
        errors.append((arm, "test CER, %", table3(arm, "cer_percent"), cer))
        if arm != base_of(arm):
            published = table3(arm, "relative_percent")
            errors.append((arm, "relative performance, %", published, -relative_cer(results, arm, base_of(arm))))
        if "sparse" in arm:
            sizes.append(
                (
                    arm,
                    "zeros, total, %",
                    table3(arm, "sparsity_percent"),
                    100 * results.metric(arm, "sparsity_total"),
                )
            )
            sizes += [(arm, f"zeros, {role}, %", None, 100 * results.metric(arm, f"sparsity_{role}")) for role in ROLES]
        sizes.append((arm, "non-zero parameters", table3(arm, "parameters"), results.metric(arm, "nonzero")))
    only = "GRU recurrent only"
    published = paper("table3", "GRU Sparse, GRU layers only", "relative_percent")
    errors.append((only, "test CER, %", None, 100 * results.metric(only, "test_cer")))
    errors.append((only, "relative performance, %", published, -relative_cer(results, only, "GRU dense 2560")))
    return {"Error rates": beside(errors), "Sizes": beside(sizes)}


def hard_pruning(results: Results) -> Tables:
    """Table 4: hard pruning of RNN 1760 against the gradual method."""
    rows = []
    for arm in results.arms:
        values = 100 * results.metric(arm, "test_cer")
        relative = -relative_cer(results, arm, "RNN dense 1760")
        if arm.startswith("hard"):
            epoch = float(arm.split()[-1].split("/")[0])
            published = [paper("table4", "hard pruning", metric, epoch) for metric in ("cer_percent", "relative_percent")]
        else:
            published = [table3(arm, metric) for metric in ("cer_percent", "relative_percent")]
        rows.append((arm, "test CER, %", published[0], values))
        rows.append((arm, "relative performance, %", published[1], relative))
        rows.append((arm, "zeros, total, %", None, 100 * results.metric(arm, "sparsity_total")))
    return {"Hard pruning at one epoch": beside(rows)}


def loss_curves(results: Results) -> Tables:
    """Figures 1a and 1b: CTC cost at the end of training."""
    rows = []
    for arm, panel, train, dev in (
        ("RNN dense 1760", "figure1a", "dense 1760 train", "dense 1760 dev"),
        ("RNN sparse 2560", "figure1a", None, "sparse 2560 dev"),
        ("RNN sparse 3072", "figure1a", None, "sparse 3072 dev"),
        ("GRU dense 2560", "figure1b", "dense 2560 train", "dense 2560 dev"),
        ("GRU sparse 2560", "figure1b", "sparse 2560 train", "sparse 2560 dev"),
    ):
        for series, metric, name in ((train, "train_loss", "training"), (dev, "validation_loss", "validation")):
            published = paper(panel, series, "ctc_cost", 20) if series else None
            rows.append((arm, f"CTC cost, {name}, last epoch", published, results.metric(arm, metric)))
    return {"CTC cost at the end (nats per utterance; other speech, other lengths)": beside(rows)}


def layer_sparsities(results: Results) -> Tables:
    """Figures 2a and 2b: zeros in every recurrent matrix at the end."""
    by_matrix: dict[tuple[int, str], list[float]] = {}
    for record in results.seeds("RNN sparse 1760"):
        for layer, direction, share in q.recurrent_layer_sparsities(record):
            by_matrix.setdefault((layer, direction), []).append(100 * share)
    rows = [(f"layer {layer}, {direction}", "zeros, %", None, shares) for (layer, direction), shares in by_matrix.items()]
    early = q.early_removed_percent(results)
    published = paper("figure2b", "recurrent layer", "weights_pruned", 15_000)
    share = published._replace(value=100 * published.value / 1760**2, known="derived")
    return {
        "Zeros by recurrent matrix (the paper's values could not be read)": beside(rows),
        "Pruned at 15,000 of 55,000 iterations": beside([("recurrent matrices", "pruned, %", share, early)]),
    }


def memory_sizes(results: Results) -> Tables:
    """Section 5.2: the printed megabytes, and what storing the positions adds."""
    rows = []
    for series, width in q.MEMORY.items():
        count = q.printed_parameters(series)
        everything = sum(n for _, n in q.full_size(f"{series[:3].lower()}{width}"))
        row = {"model": series, "paper, MB": paper("memory", series, "megabytes").value, "known": "read"}
        row["values only, MB"] = megabytes(count, count)
        for index in ("csr32", "csr16", "bitmap", "entropy") if "Sparse" in series else ():
            row[f"{index} index, MB"] = megabytes(everything, count, index=index)
        row["float16 + entropy, MB"] = (
            megabytes(everything, count, value_bytes=2, index="entropy") if "Sparse" in series else np.nan
        )
        rows.append(row)
    half = beside(
        [
            ("RNN sparse 1760", "test CER, float32 weights, %", None, 100 * results.metric("RNN sparse 1760", "test_cer")),
            (
                "RNN sparse 1760",
                "test CER, float16 weights, %",
                None,
                100 * results.metric("RNN sparse 1760", "test_cer_float16"),
            ),
        ]
    )
    return {"Megabytes, with and without positions": pd.DataFrame(rows), "Weights rounded to float16": half}


def onchip_projection(results: Results) -> Tables:
    """Section 6.2: how wide a layer fits on the chip, and the 146x."""
    capacity = 2 * paper("onchip", "NVIDIA P100, float16", "hidden_units", 0).value ** 2
    rows = []
    for percent in (0, 90, 99):
        published = paper("onchip", "NVIDIA P100, float16", "hidden_units", percent)
        row = {"sparsity, %": percent, "paper, units": published.value, "known": published.known}
        for index in ("none", "csr16", "bitmap", "entropy"):
            row[f"units, {'values only' if index == 'none' else index + ' index'}"] = units_on_chip(
                capacity, percent / 100, index="dense" if percent == 0 else index
            )
        rows.append(row)
    # Data sheet of the TitanX (Maxwell), not in the paper: 3,072 lanes at 1 GHz, 336.5 GB/s of DRAM.
    derived = on_chip_speedup(336.5, register_gbps(3072, 1.0))
    gain = beside([("registers over DRAM, TitanX", "speed-up", paper("onchip", "NVIDIA P100 over TitanX", "speedup"), derived)])
    return {"Units whose recurrent matrix fits (float16)": pd.DataFrame(rows), "The 146x, from data sheet figures": gain}


def paper_arithmetic(results: Results) -> Tables:
    """The paper's numbers against each other."""
    relative = pd.DataFrame(
        [
            {"row": row, "printed, %": printed, "from the CERs, %": again, "difference, points": printed - again}
            for row, printed, again in q.relative_performances()
        ]
    )
    published = load_published(STUDY)
    pruned = paper("figure2b", "recurrent layer", "weights_pruned", 15_000)
    half = paper("table3", "GRU Sparse, GRU layers only", "compression_percent")
    remark = [
        (
            "RNN Dense Medium, relative performance, %",
            table3("RNN dense 2560", "relative_percent").value,
            q.table3_dense_medium_recomputed(results),
        ),
        (
            "weights pruned before iteration 15,000, % of a matrix",
            100 * pruned.value / 1760**2,
            100 * q.gaussian_share_below(0.41),
        ),
        (
            "epochs complete at iteration 15,000",
            paper("figure2b", "recurrent layer", "epochs_complete", 15_000).value,
            q.epochs_at_iteration_15000(results),
        ),
        ("GRU, all matrices of the GRU layers pruned, % removed", half.value, q.gru_layers_only_removed_percent(results)),
        ("GRU, recurrent matrices alone pruned, % removed", half.value, q.gru_recurrent_only_removed_percent(results)),
        (
            "hard pruning 7 to 9 % worse: smaller of the two, as CER ratio",
            paper("table4", "gradual over hard", "gain_low").value,
            q.table4_gain_as_cer_ratio(results),
        ),
        (
            "smallest speed-up of Table 6 (abstract: 2x to 7x)",
            paper("prose", "pruned models", "speedup_low").value,
            q.table6_smallest_speedup(results),
        ),
        (
            "bandwidth bound at 95 % with a 4-byte index per value",
            paper("table6", "expected from bandwidth", "speedup").value,
            q.bandwidth_bound_speedup_with_indices(results),
        ),
    ]
    statements = pd.DataFrame(remark, columns=["statement", "printed", "recomputed"])
    speedups = pd.DataFrame(
        [
            {
                "layer": name,
                "printed (over the smaller dense layer)": printed,
                "recomputed": again,
                "over dense of its own size, scaled by bytes": again
                * (width / (1760 if name.startswith("RNN") else 2560)) ** 2,
            }
            for name, width, printed, again, _ in q.table6_rows()
        ]
    )
    counts = published["known"].value_counts().rename_axis("known").reset_index(name="numbers")
    return {
        "Statements that can be recomputed": statements,
        "Relative performance": relative,
        "Speed-ups": speedups,
        "How the published numbers are known": counts,
    }


def ablations(results: Results) -> Tables:
    """Variations of RNN sparse 1760, paired by seed with the method as the prose has it."""
    rows = []
    for arm in results.arms:
        rows.append((arm, "test CER, %", None, 100 * results.metric(arm, "test_cer")))
        if arm != "RNN sparse 1760":
            rows.append((arm, "CER against RNN sparse 1760, %", None, relative_cer(results, arm, "RNN sparse 1760")))
        if arm != "RNN dense 1760":
            rows.append((arm, "zeros, recurrent, %", None, 100 * results.metric(arm, "sparsity_recurrent")))
            rows.append((arm, "zeros, total, %", None, 100 * results.metric(arm, "sparsity_total")))
            share = 100 * results.metric(arm, "regrown") / results.metric(arm, "prunable")
            rows.append((arm, "regrown, % of prunable weights", None, share))
    return {"Ablations and other methods (ours)": beside(rows)}


def pruner_cost(results: Results) -> Tables:
    """What the pruner adds to a training step."""
    rows = [
        ("training step, dense", "milliseconds", None, results.metric("step", "dense_ms")),
        ("training step, pruned", "milliseconds", None, results.metric("step", "pruned_ms")),
        ("pruner alone", "milliseconds", None, results.metric("step", "pruner_ms")),
        ("pruner alone", "% of a dense step", None, results.metric("step", "overhead_percent")),
        ("pruned over dense step", "ratio", None, results.metric("step", "ratio")),
    ]
    return {"Cost of GradualPruner": beside(rows)}
