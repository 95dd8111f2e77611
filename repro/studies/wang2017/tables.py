"""The tables of every exhibit: title -> frame, the paper's number beside ours."""

from __future__ import annotations

import numpy as np
import pandas as pd

from repro.collectives.costs import bus_bandwidth, cost, limit, printed_cost
from repro.collectives.schedules import ALGORITHMS, COLLECTIVES, schedule, steps
from repro.report.published import Published, published_value
from repro.studies.base import Results, summary
from repro.studies.comparing import beside
from repro.studies.exchanging import NOT_PERMITTED
from repro.studies.replicas import DRIFTS, SYSTEMS
from repro.studies.wang2017 import arithmetic, measured, simulated
from repro.studies.wang2017.arithmetic import BE, LP, MST, STUDY

Tables = dict[str, pd.DataFrame]
NAMES = {LP: "LP", MST: "MST", BE: "BE"}
PAPERS_MODEL = {"rnn": "AlexNet", "cnn": "GoogLeNet"}
NOT_EMULATED = "Hosts could not be emulated here"


def paper(exhibit: str, series: str, metric: str, x: float | None = None) -> Published:
    """One published number of this study."""
    return published_value(STUDY, exhibit, series, metric, x)


def refusals(results: Results) -> Tables:
    """Why some trials could not be run on emulated hosts."""
    reasons = {record.metrics[NOT_PERMITTED] for record in results.used() if NOT_PERMITTED in record.metrics}
    return {NOT_EMULATED: pd.DataFrame({"reason": sorted(reasons)})} if reasons else {}


def costs(results: Results) -> Tables:
    """Table 1 with the paper's constants, as printed and as our schedules have it; and its limits."""
    link, block, ranks = arithmetic.paper_link(), arithmetic.paper_block(), arithmetic.paper_ranks()
    message = arithmetic.paper_message()
    rows = [
        {
            "collective": collective,
            "algorithm": algorithm,
            "steps": steps(schedule(collective, algorithm, ranks, 64, 1)),
            "as printed, ms": 1e3 * printed_cost(collective, algorithm, ranks, message, link, block)
            if algorithm in NAMES
            else np.nan,
            "our schedule, ms": 1e3 * cost(collective, algorithm, ranks, message, link, block),
        }
        for collective in COLLECTIVES
        for algorithm in ALGORITHMS
    ]
    limits = [
        {"collective": collective, "time over LP's": NAMES[algorithm]}
        | {f"p = {p}": limit(collective, algorithm, p) for p in (2, 3, 4, 6, 8, 16, 64)}
        for collective in COLLECTIVES
        for algorithm in (BE, MST)
    ]
    title = f"{message / 1e6:g} MB over {ranks} ranks, the paper's constants (steps: 64 blocks)"
    return {title: pd.DataFrame(rows), "Limits for long messages by the printed costs": pd.DataFrame(limits)}


def data_flow(results: Results) -> Tables:
    """Figure 2: time steps of the paper's example."""
    return {"Time steps, 3 ranks and 4 blocks": beside((name, "steps", *row) for name, *row in simulated.figure2_steps())}


def sizes(results: Results) -> Tables:
    """Figure 3: every time, the paper's factors beside ours, and ours against the library's own."""
    rows = []
    for series, other in (("LP over BE", BE), ("LP over MST", MST)):
        for collective in COLLECTIVES:
            printed = paper("figure3", series, f"{collective}_speedup")
            rows.append(
                (f"{NAMES[other]} / LP, {collective}", "time", printed, measured.over_pipeline(collective, other)(results))
            )
    tables = {"The paper's factors (Open MPI, Caffe; K40m) and ours (one transport, emulated hosts)": beside(rows)}
    tables |= {"Our allreduce and the library's own, two ranks on loopback": _parity(results)}
    for arm, where in (("hosts", "emulated hosts"), ("loopback", "two ranks on loopback")):
        tables[f"Milliseconds on {where}, medians over repeats"] = _times(results, arm)
    return tables | refusals(results)


def _parity(results: Results) -> pd.DataFrame:
    times = measured.timed(results, "loopback")
    rows = []
    for nbytes in [] if times.empty else sorted(times["nbytes"].unique()):
        library = measured.seconds(results, "loopback", "allreduce", "library", nbytes=nbytes)
        rows.append({"MiB": nbytes / 2**20, "library, ms": 1e3 * np.nanmedian(library)})
        for algorithm, name in ((LP, "LP"), ("ring", "ring")):
            ours = measured.seconds(results, "loopback", "allreduce", algorithm, nbytes=nbytes)
            found = summary(library / ours)
            rows[-1] |= {f"{name}, ms": 1e3 * np.nanmedian(ours), f"library / {name}": found["ours"]}
            rows[-1] |= {f"{name}: low": found["low"], f"{name}: high": found["high"]}
            rate = bus_bandwidth("allreduce", 2, int(nbytes), float(np.nanmedian(ours))) / 1e9
            rows[-1] |= {f"{name}: busbw, GB/s": rate}
    return pd.DataFrame(rows)


def _times(results: Results, arm: str) -> pd.DataFrame:
    times = measured.timed(results, arm)
    if times.empty:
        return times
    columns = ["collective", "nbytes", "algorithm", "block"]
    table = 1e3 * times.groupby(columns, sort=False)[["lower", "seconds", "upper"]].median()
    names = {"nbytes": "bytes", "lower": "lower quartile", "seconds": "median", "upper": "upper quartile"}
    return table.reset_index().rename(columns=names)


def ranks(results: Results) -> Tables:
    """Figure 4: times by number of ranks; on loopback marked where ranks share cores."""
    rows = []
    for arm in results.arms:
        times = measured.fastest(measured.timed(results, arm))
        if times.empty:
            continue
        where = arm.split(",")[0]
        cores = results.seeds(arm)[0].provenance.get("threads", 1)
        for (count, collective, algorithm), part in times.groupby(["ranks", "collective", "algorithm"], sort=False):
            row = {"where": where, "ranks": int(count), "collective": collective, "algorithm": algorithm}
            shared = where == "loopback" and count > cores
            rows.append(row | {"ms": 1e3 * part["seconds"].median(), "more ranks than cores": "yes" if shared else ""})
    return {"Milliseconds, medians over repeats, LP in its fastest block": pd.DataFrame(rows)} | refusals(results)


def iteration_profile(results: Results) -> Tables:
    """Table 2: seconds of communication and computation in an iteration."""
    rows = []
    for model in measured.MODELS:
        for system in SYSTEMS:
            found = measured.per_iteration(results, model, system)
            row = {"model": model, "system": system}
            row |= {f"{name}, ms": 1e3 * summary(found[name])["ours"] for name in ("communicating", "computing", "iteration")}
            rows.append(row)
    ratios = []
    for model, name in PAPERS_MODEL.items():
        for other in ("BE", "MST"):
            printed = paper("table2", f"LP-Alg.1 over {other}-Alg.1", f"{name.lower()}_communication_percent")
            ours = measured.MEASURED[f"communication_percent_lp_of_{other.lower()}_{model}"](results)
            ratios.append((f"LP fork-join of {other} fork-join, {model} ({name})", "communication, %", printed, ours))
    found = {"Per iteration, rank 0, means over iterations and repeats": pd.DataFrame(rows)}
    return found | {"Communication of LP over the others": beside(ratios)} | refusals(results)


def convergence(results: Results) -> Tables:
    """Figure 5: time to the target loss, and the speed-ups of the text."""
    times = [
        {"model": model, "system": system} | summary(measured.time_to_target(results, model, system))
        for model in measured.MODELS
        for system in SYSTEMS
    ]
    rows = []
    for model, name in PAPERS_MODEL.items():
        for series, key in (
            ("LP-Alg.1 over BE-Alg.1", "speedup_lp_over_be"),
            ("LP-Alg.1 over MST-Alg.1", "speedup_lp_over_mst"),
            ("LP-Overlap-Alg.3 over BE-Alg.1", "speedup_overlap_over_be"),
        ):
            values = measured.MEASURED[f"{key}_{model}"](results)
            printed = paper("figure5", series, f"{name.lower()}_speedup")
            rows.append((f"{series}, {model} ({name})", "speed-up to the target loss", printed, values))
    replicas = [
        {"model": model, "repeat": record.spec["replicate"]}
        | {system: record.metrics.get(f"differs {model} {system}", np.nan) for system in SYSTEMS}
        for model in measured.MODELS
        for record in results.seeds("training")
    ]
    return {
        "Seconds to the target loss": pd.DataFrame(times),
        "Speed-ups": beside(rows),
        "Parameters in which replicas differ at the end": pd.DataFrame(replicas),
    } | refusals(results)


def time_lines(results: Results) -> Tables:
    """Figure 1: how long one iteration of each variant takes, and its sum of communication and computation."""
    rows = []
    for model in measured.MODELS:
        for system in SYSTEMS:
            found = measured.per_iteration(results, model, system)
            total = found["communicating"] + found["computing"]
            longest = found[["communicating", "computing"]].max(axis=1)
            row = {"model": model, "system": system, "iteration, ms": 1e3 * summary(found["iteration"])["ours"]}
            row |= {"over comm + compt": summary(found["iteration"] / total)["ours"]}
            rows.append(row | {"over max(comm, compt)": summary(found["iteration"] / longest)["ours"]})
    return {"One iteration": pd.DataFrame(rows)} | refusals(results)


def cost_model(results: Results) -> Tables:
    """The fitted constants, repeat by repeat, the error on what was held out, and the block."""
    constants, errors = [], []
    for repeat in range(len(results.arms["hosts"])):
        found = measured.fitted(results, repeat)
        if found is None:
            continue
        estimate = found.estimates[None]
        row = {"repeat": repeat}
        for index, (name, scale) in enumerate((("alpha, µs", 1e6), ("beta, ns/byte", 1e9), ("gamma, ns/byte", 1e9))):
            value = (estimate.link.alpha, estimate.link.beta, estimate.link.gamma)[index]
            row |= {
                name: scale * value,
                f"{name}: low": scale * estimate.low[index],
                f"{name}: high": scale * estimate.high[index],
            }
        constants.append(row | {"b*, KiB": measured.predicted_block(results, repeat) / 1024})
        for what, held in zip(("other sizes", "other numbers of ranks"), measured.held_out(results, repeat), strict=True):
            if held:
                spread = {"median |error|, %": 100 * held.median, "low": 100 * held.low, "high": 100 * held.high}
                errors.append({"repeat": repeat, "held out": what, "rows": len(held.relative)} | spread)
    sweeps = [measured.block_sweep(results, repeat) for repeat in range(len(results.arms["hosts"]))]
    sweep = pd.DataFrame([s for s in sweeps if not s.empty])
    blocks = pd.DataFrame([{"block, KiB": b / 1024} | {"ms": 1e3 * sweep[b].median()} for b in sweep]) if len(sweep) else sweep
    return {
        "Constants of one link for all algorithms, emulated hosts": pd.DataFrame(constants),
        "Prediction of what the fit has not seen": pd.DataFrame(errors),
        "LP broadcast of the largest message by block (medians)": blocks,
    } | refusals(results)


def overlaps(results: Results) -> Tables:
    """All schedules against each other."""
    return {k: v for k, v in iteration_profile(results).items() if k.startswith("Per iteration")} | time_lines(results)


def drifts(results: Results) -> Tables:
    """Largest difference of replicas at the end of training."""
    rows = [{"sum of gradients": way} | summary(measured.drift(way)(results)) for way in DRIFTS]
    return {"Largest difference of replicas over the largest parameter": pd.DataFrame(rows)}


def sparse(results: Results) -> Tables:
    """Zeros on the way from gate gradients to the wire; and times of pruned exchanges."""
    tables = {}
    if results.has("zeros"):
        names = {
            "gates": "gate gradients dnet",
            "sequence": "dW of one sequence",
            "minibatch": "dW of a minibatch",
            "exchanged": "dW of all ranks' minibatches",
            "bytes": "bytes over dense",
        }
        rows = [{"": label} | summary(measured.zeros(results, name)) for name, label in names.items()]
        tables["Share of exact zeros at the end of training"] = pd.DataFrame(rows)
    times = measured.kept_times(results)
    if not times.empty:
        grouped = times.groupby("sparsity").median().drop(columns="repeat").reset_index()
        grouped["dense / kept"] = grouped["dense_median"] / grouped["kept_median"]
        scaled = [name for name in grouped if name.startswith(("dense_", "kept_"))]
        grouped[scaled] *= 1e3
        tables["Allreduce of a pruned model's gradients, ms"] = grouped.rename(columns=lambda name: name.replace("_", ", "))
    return tables | refusals(results)


def scaling(results: Results) -> Tables:
    """The simulator beyond this machine: two sockets, and hundreds of ranks."""
    return {
        "Two sockets of 4, a bridge of half the rate: ms": simulated.socket_table(),
        "Up to hundreds of hosts: ms of an allreduce, LP in its best block": simulated.cluster_table(),
    }


def audit(results: Results) -> Tables:
    """The paper's arithmetic, recomputed."""
    table = pd.DataFrame(arithmetic.paper_arithmetic())
    table["recomputed / printed"] = table["recomputed"] / table["printed"]
    return {"Printed, and recomputed from other printed numbers": table}
