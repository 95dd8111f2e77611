"""The figures of the study, ours and the paper's values in the same axes wherever the paper's are known."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from repro.collectives.costs import cost, limit
from repro.collectives.fitting import predict
from repro.collectives.schedules import COLLECTIVES, steps
from repro.report import plots
from repro.report.statistics import bootstrap_band
from repro.studies.base import Results, summary
from repro.studies.comparing import interval
from repro.studies.exchanging import NOT_PERMITTED
from repro.studies.replicas import DRIFTS, PAPERS_SYSTEMS, SYSTEMS
from repro.studies.wang2017 import arithmetic, measured, simulated
from repro.studies.wang2017.arithmetic import BE, LP, MST
from repro.studies.wang2017.profiles import DIRECT, LIBRARY, RING, TWO_WAY
from repro.studies.wang2017.tables import PAPERS_MODEL, paper

BLUE, RED, GREEN, PINK, ORANGE, SKY = plots.PALETTE
GREY = "#888888"
STYLE = {
    LP: {"color": BLUE, "marker": "o", "label": "linear pipeline (LP)"},
    MST: {"color": RED, "marker": "s", "label": "spanning tree (MST)"},
    BE: {"color": GREEN, "marker": "^", "label": "bidirectional exchange (BE)"},
    RING: {"color": ORANGE, "marker": "D", "label": "ring"},
    TWO_WAY: {"color": SKY, "marker": "v", "label": "two-way ring"},
    DIRECT: {"color": PINK, "marker": "P", "label": "all-to-all"},
    LIBRARY: {"color": GREY, "marker": "x", "label": "library (gloo)"},
}
SYSTEM_STYLE = {
    "LP fork-join": {"color": BLUE, "linestyle": "-"},
    "LP allreduce": {"color": BLUE, "linestyle": "--"},
    "LP overlap": {"color": BLUE, "linestyle": ":"},
    "MST fork-join": {"color": RED, "linestyle": "-"},
    "BE fork-join": {"color": GREEN, "linestyle": "-"},
    "BE overlap": {"color": GREEN, "linestyle": ":"},
    "LP dependency": {"color": PINK, "linestyle": "-"},
    "DDP buckets": {"color": GREY, "linestyle": "-"},
}
SPAN_COLOURS = {
    "forward": SKY,
    "loss": PINK,
    "backward": BLUE,
    "update": GREEN,
    "wait": "#DDDDDD",
    "reduce": ORANGE,
    "allreduce": "#B8860B",
    "broadcast": RED,
    "barrier": GREY,
}
_SAME = {"average": "allreduce"}  # DistributedDataParallel's hook calls it so


def _where(results: Results) -> str:
    rate = results.profile.megabytes_per_second
    return f"{results.machine()}; hosts: network namespaces, {rate:g} MB/s each way"


def _nothing_timed(results: Results) -> Figure | None:
    """In the place of a figure: why nothing could be timed; None where nothing was run yet."""
    reasons = {record.metrics[NOT_PERMITTED] for record in results.used() if NOT_PERMITTED in record.metrics}
    if not reasons:
        return None
    figure, ax = plots.new_figure(size=(6.4, 1.6))
    ax.set_axis_off()
    ax.text(0.5, 0.5, "\n".join(["Not measured on this machine:", *sorted(reasons)]), ha="center", va="center", wrap=True)
    return figure


def costs(results: Results) -> Figure:
    """What the printed costs promise LP over the others, by number of ranks."""
    figure, axes = plots.new_figure(1, 3, size=(11, 4.2), sharey=True)
    ranks = np.arange(2, 17)
    claimed = paper("table1", "LP over BE", "speedup_high")
    for ax, collective in zip(axes, COLLECTIVES, strict=True):
        for algorithm in (BE, MST):
            line = {name: STYLE[algorithm][name] for name in ("color", "marker")}
            ratios = [limit(collective, algorithm, int(p)) for p in ranks]
            ax.plot(ranks, ratios, label=f"{STYLE[algorithm]['label']} / LP, by the printed costs", markersize=4, **line)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.axhline(
            claimed.value, color=plots.PAPER, linestyle=":", label=plots.paper_label(claimed.known, "paper: LP over BE, up to")
        )
        ax.set(title=f"{collective}", xlabel="ranks p")
    axes[0].set_ylabel("time over LP's, long messages")
    plots.ours_and_paper_legend(axes[0], columns=3)
    return figure


def data_flow(results: Results) -> Figure:
    """Figure 2: which block is on which link in which time step."""
    flows = simulated.figure2()
    figure, axes = plots.new_figure(2, 2, size=(10, 5.6))
    names, colours = "abcd", (BLUE, ORANGE, GREEN, PINK)
    for ax, (title, transfers) in zip(axes.flat, flows.items(), strict=True):
        links = sorted({(t.source, t.target) for t in transfers})
        for t in transfers:
            place = links.index((t.source, t.target))
            ax.barh(place, 0.94, left=t.step + 0.53, color=colours[t.start], height=0.7, alpha=1 if t.reduce else 0.45)
            ax.text(t.step + 1, place, names[t.start], ha="center", va="center", fontsize=10)
        ax.set_yticks(range(len(links)), [f"GPU {source} to {target}" for source, target in links])
        ax.invert_yaxis()
        ax.set_xticks(range(1, steps(transfers) + 1))
        ax.set(title=f"{title}: {steps(transfers)} steps", xlabel="time step")
        ax.grid(axis="y", visible=False)
    handles = [Patch(color=GREY), Patch(color=GREY, alpha=0.45)]
    figure.legend(handles, ["added at the target", "stored at the target"], loc="outside lower center", ncols=2)
    return figure


def sizes(results: Results) -> Figure | None:
    """Figure 3: time against message size, on hosts and on loopback; the paper's factors beside ours."""
    if measured.timed(results, "loopback").empty:
        return _nothing_timed(results)
    figure, axes = plots.new_figure(2, 3, size=(12, 8))
    for row, (arm, where) in enumerate(
        (("hosts", f"{results.profile.ranks} emulated hosts"), ("loopback", "2 ranks, loopback"))
    ):
        times = measured.fastest(measured.timed(results, arm))
        for ax, collective in zip(axes[row], COLLECTIVES, strict=True):
            ax.set(title=f"{collective}, {where}", xlabel="message, KiB")
            if times.empty:
                ax.text(0.5, 0.5, "hosts could not be emulated", transform=ax.transAxes, ha="center")
                continue
            for algorithm, style in STYLE.items():
                part = times[(times["collective"] == collective) & (times["algorithm"] == algorithm)]
                grouped = part.groupby("nbytes")["seconds"]
                x = np.array(sorted(part["nbytes"].unique()))
                found = np.array([interval(1e3 * values) for _, values in grouped])
                plots.band(ax, x / 1024, *found.T, markersize=4, **style)
            plots.plain_log(ax, "x")
            plots.plain_log(ax, "y")
        axes[row][0].set_ylabel("time, ms")
    plots.note(figure, _where(results))
    plots.ours_and_paper_legend(axes[0][0] if not measured.timed(results, "hosts").empty else axes[1][0], columns=4)
    return figure


def ranks(results: Results) -> Figure | None:
    """Figure 4: time against the number of ranks, with what the cost model says; loopback beside it."""
    figure, axes = plots.new_figure(2, 2, size=(10, 8))
    many = {"hosts": results.profile.many_ranks, "loopback": results.profile.loopback_ranks}
    panels = [("hosts", collective) for collective in COLLECTIVES] + [("loopback", "allreduce")]
    drawn = False
    for ax, (where, collective) in zip(axes.flat, panels, strict=True):
        for algorithm in (LP, MST, BE, RING, LIBRARY):
            style = STYLE[algorithm]
            values = [
                1e3 * measured.seconds(results, f"{where}, by ranks", collective, algorithm, ranks=p) for p in many[where]
            ]
            if not np.isfinite(np.concatenate(values)).any():
                continue
            drawn = True
            found = np.array([interval(v) for v in values])
            plots.band(ax, many[where], *found.T, markersize=5, **style)
            if where == "hosts" and algorithm != LIBRARY:
                link = arithmetic.Link(0.0, 1 / results.profile.rate)
                block = 64 * 1024 if algorithm == LP else None
                size = results.profile.ranks_size
                bound = [1e3 * cost(collective, algorithm, p, size, link, block) for p in many[where]]
                ax.plot(many[where], bound, color=style["color"], linestyle=":", linewidth=1)
        title = f"{collective}, hosts" if where == "hosts" else "allreduce, loopback (ranks share cores)"
        ax.set(title=title, xlabel="ranks", ylabel=f"time of {results.profile.ranks_size / 2**20:g} MiB, ms", ylim=(0, None))
        ax.set_xticks(many[where])
    if not drawn:
        return _nothing_timed(results)
    plots.note(figure, _where(results))
    axes[1][1].plot([], [], color="0.4", linestyle=":", linewidth=1, label="model: bytes alone, at the link's rate (hosts)")
    plots.ours_and_paper_legend(axes[1][1], columns=3)
    return figure


def _bars(ax, results: Results, model: str) -> None:
    """Communication and computation of an iteration, and how long it takes."""
    places = np.arange(len(SYSTEMS))
    found = [measured.per_iteration(results, model, system) for system in SYSTEMS]
    compute, communicate = ([1e3 * summary(f[name])["ours"] for f in found] for name in ("computing", "communicating"))
    ax.barh(places - 0.2, compute, height=0.36, color=SKY, label="computation")
    ax.barh(places - 0.2, communicate, left=compute, height=0.36, color=ORANGE, label="communication")
    heights = np.array([interval(1e3 * f["iteration"]) for f in found]).T
    errors = np.nan_to_num(np.maximum([heights[0] - heights[1], heights[2] - heights[0]], 0))
    ax.barh(places + 0.2, heights[0], xerr=errors, height=0.36, color=BLUE, label="iteration", error_kw={"capsize": 2})
    ax.set_yticks(places, SYSTEMS)
    ax.invert_yaxis()
    parameters = results.seeds("training")[0].metrics[f"parameters {model}"]
    ax.set(title=f"{model}, {parameters * 4 / 1e6:.2g} MB (for {PAPERS_MODEL[model]})", xlabel="ms")
    ax.grid(axis="y", visible=False)


def iteration_profile(results: Results) -> Figure | None:
    """Table 2: communication and computation of an iteration, system by system, beside the time it takes."""
    if measured.iterations(results, "rnn").empty:
        return _nothing_timed(results)
    figure, axes = plots.new_figure(1, 2, size=(11, 5))
    for ax, model in zip(axes, measured.MODELS, strict=True):
        _bars(ax, results, model)
    plots.note(figure, f"{_where(results)}; {results.profile.ranks} hosts share the machine's cores")
    plots.ours_and_paper_legend(axes[0])
    return figure


def convergence(results: Results) -> Figure | None:
    """Figure 5: loss against time; and the speed-ups of the text beside ours."""
    if measured.iterations(results, "rnn").empty:
        return _nothing_timed(results)
    figure, axes = plots.new_figure(2, 2, size=(11, 8.4))
    for ax, model in zip(axes[0], measured.MODELS, strict=True):
        rows = measured.iterations(results, model)
        for system in PAPERS_SYSTEMS:
            part = rows[(rows["system"] == system) & (rows["repeat"] == rows["repeat"].min())]
            ax.plot(part["seconds"], part["loss"], label=system, **SYSTEM_STYLE[system])
        ax.set(title=f"{model} (for {PAPERS_MODEL[model]}), first repeat", xlabel="seconds", ylabel="training loss, nats")
    plots.legend_below(axes[0][0], columns=3)
    plots.legend_below(axes[0][1], columns=3)
    series = ("LP-Alg.1 over BE-Alg.1", "LP-Alg.1 over MST-Alg.1", "LP-Overlap-Alg.3 over BE-Alg.1")
    keys = ("speedup_lp_over_be", "speedup_lp_over_mst", "speedup_overlap_over_be")
    for ax, model in zip(axes[1], measured.MODELS, strict=True):
        found = np.array([interval(measured.MEASURED[f"{key}_{model}"](results)) for key in keys]).T
        plots.points(ax, np.arange(3) - 0.08, *found, "ours", color=BLUE)
        printed = [paper("figure5", name, f"{PAPERS_MODEL[model].lower()}_speedup") for name in series]
        plots.paper(ax, np.arange(3) + 0.08, [p.value for p in printed], printed[0].known, f"paper, {PAPERS_MODEL[model]}")
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xticks(range(3), ["LP over BE\nfork-join", "LP over MST\nfork-join", "LP overlap over\nBE fork-join"])
        ax.set(title=model, ylabel="speed-up to the target loss", xlim=(-0.5, 2.5), ylim=(0, None))
        plots.legend_below(ax)
    plots.note(figure, _where(results))
    return figure


def time_lines(results: Results) -> Figure | None:
    """Figure 1: one iteration of each variant as it ran, computing thread above, communicator below."""
    systems = ("LP fork-join", "LP allreduce", "LP overlap", "LP dependency", "DDP buckets")
    record = next((r for r in results.seeds("training") if "spans" in r.curves), None)
    if record is None:
        return _nothing_timed(results)
    curve = record.curves["spans"]
    spans = [dict(zip(curve, row, strict=True)) for row in zip(*curve.values(), strict=True)]
    spans = [span | {"what": _SAME.get(span["what"], span["what"])} for span in spans if span["model"] == "rnn"]
    figure, axes = plots.new_figure(len(systems), 1, size=(10, 9), sharex=True)
    own = ("forward", "loss", "backward", "update", "wait")
    for ax, system in zip(axes, systems, strict=True):
        for span in (s for s in spans if s["system"] == system):
            lane = 0 if span["what"] in own else 1
            colour = SPAN_COLOURS.get(span["what"], GREY)
            ax.barh(lane, 1e3 * (span["end"] - span["start"]), left=1e3 * span["start"], color=colour, height=0.8, linewidth=0)
        ax.set_yticks([0, 1], ["computing", "messages"])
        ax.set_ylim(1.6, -0.6)
        ax.set_title(system, fontsize=10)
        ax.grid(axis="y", visible=False)
    axes[-1].set_xlabel("ms")
    labels = [name for name in SPAN_COLOURS if any(span["what"] == name for span in spans)]
    figure.legend([Patch(color=SPAN_COLOURS[name]) for name in labels], labels, loc="outside lower center", ncols=5)
    plots.note(figure, f"last iteration of the rnn, rank 0; {_where(results)}")
    return figure


def cost_model(results: Results) -> Figure | None:
    """Predicted against measured times, fitted and held out; and the block of the pipeline."""
    if measured.fitted(results, 0) is None:
        return _nothing_timed(results)
    figure, (left, right) = plots.new_figure(1, 2, size=(11, 4.8))
    link = measured.fitted(results, 0)
    labels = ("fitted", "other sizes, held out", "other numbers of ranks, held out")
    for rows, colour, marker, label in zip(measured.divided(results, 0), (GREY, BLUE, RED), "o^s", labels, strict=True):
        if rows:
            seconds = [1e3 * row.seconds for row in rows]
            left.plot(
                seconds, 1e3 * predict(link, rows), marker, color=colour, markersize=4, alpha=0.7, label=label, linestyle="none"
            )
    ends = np.array(left.get_xlim())
    ends = np.array([max(ends[0], 0.5), ends[1]])
    left.plot(ends, ends, color="black", linewidth=0.8, label="equal")
    plots.plain_log(left, "x")
    plots.plain_log(left, "y")
    left.set(xlabel="measured, ms", ylabel="predicted, ms", title="a: one link for all algorithms, first repeat")
    plots.legend_below(left)
    for repeat in range(len(results.arms["hosts"])):
        sweep = measured.block_sweep(results, repeat)
        if sweep.empty:
            continue
        right.plot(
            np.array(sweep.index) / 1024, 1e3 * sweep.to_numpy(), "o-", color=BLUE, alpha=0.6, label="LP broadcast, a repeat"
        )
        block = measured.predicted_block(results, repeat) / 1024
        right.axvline(block, color=GREEN, linewidth=1, label="b* of the fitted constants")
    printed = paper("table1", "constants", "block_kilobytes")
    right.axvline(printed.value, color=plots.PAPER, linestyle="--", label=plots.paper_label(printed.known))
    plots.plain_log(right, "x")
    size = max(results.profile.sizes) / 2**20
    right.set(xlabel="block, KiB", ylabel="ms", ylim=(0, None), title=f"b: LP broadcast of {size:g} MiB by block")
    plots.legend_below(right)
    plots.note(figure, _where(results))
    return figure


def overlaps(results: Results) -> Figure | None:
    """Every system's iteration over the sum, and the longer, of its communication and computation."""
    if measured.iterations(results, "rnn").empty:
        return _nothing_timed(results)
    figure, axes = plots.new_figure(1, 2, size=(11, 4.6), sharey=True)
    places = np.arange(len(SYSTEMS))
    for ax, model in zip(axes, measured.MODELS, strict=True):
        base = measured.per_iteration(results, model, "LP fork-join")
        heights = np.array(
            [interval(measured.per_iteration(results, model, system)["iteration"] / base["iteration"]) for system in SYSTEMS]
        ).T
        errors = np.nan_to_num(np.maximum([heights[0] - heights[1], heights[2] - heights[0]], 0))
        ax.barh(
            places,
            heights[0],
            xerr=errors,
            color=[SYSTEM_STYLE[s]["color"] for s in SYSTEMS],
            height=0.6,
            error_kw={"capsize": 2},
        )
        total = base["communicating"] + base["computing"]
        longest = base[["communicating", "computing"]].max(axis=1)
        ax.axvline(
            summary(total / base["iteration"])["ours"], color="black", linestyle="--", label="comm + compt of LP fork-join"
        )
        ax.axvline(summary(longest / base["iteration"])["ours"], color="black", linestyle=":", label="max(comm, compt)")
        ax.set_yticks(places, SYSTEMS)
        ax.set(title=model, xlabel="seconds of an iteration over LP fork-join's")
        ax.grid(axis="y", visible=False)
        plots.legend_below(ax)
    axes[0].invert_yaxis()
    plots.note(figure, _where(results))
    return figure


def drifts(results: Results) -> Figure:
    """How far replicas are apart, by iteration."""
    figure, ax = plots.new_figure()
    for way, colour, style in zip(DRIFTS, (BLUE, GREEN, RED), ("-", "--", "-"), strict=True):
        curves = []
        for record in results.seeds("drift"):
            rows = record.curves["drift"]
            curves.append([value for name, value in zip(rows["way"], rows["drift"], strict=True) if name == way])
        mean, low, high = bootstrap_band(curves)
        plots.band(ax, np.arange(1, len(mean) + 1), mean, low, high, way, color=colour, linestyle=style)
    ax.set_yscale("symlog", linthresh=1e-9)
    ax.set_ylim(-2e-10, None)
    ax.set(xlabel="iteration", ylabel="largest difference / largest parameter", title="Replicas, never resynchronised")
    plots.legend_below(ax, columns=1)
    return figure


def sparse(results: Results) -> Figure | None:
    """Left: zeros on the way from gate gradients to the wire. Right: exchanging the gradients of a pruned model."""
    figure, (left, right) = plots.new_figure(1, 2, size=(10, 4.6))
    names = ("gates", "sequence", "minibatch", "exchanged")
    shares = np.array([interval(100 * measured.zeros(results, name)) for name in names])
    errors = np.nan_to_num(np.maximum([shares[:, 0] - shares[:, 1], shares[:, 2] - shares[:, 0]], 0))
    left.bar(range(4), shares[:, 0], yerr=errors, color=(BLUE, SKY, ORANGE, RED), error_kw={"capsize": 3})
    left.set_xticks(range(4), ["gate\ngradients", "dW of one\nsequence", "dW of a\nminibatch", "dW of all\nranks"])
    left.set(ylabel="exact zeros, %", title="a: thresholded LSTM", ylim=(0, 100))
    times = measured.kept_times(results)
    if times.empty:
        right.text(0.5, 0.5, "hosts could not be emulated", transform=right.transAxes, ha="center")
    else:
        gains = (times["dense_median"] / times["kept_median"]).groupby(times["sparsity"])
        kept = 100 * (1 - np.array(sorted(times["sparsity"].unique())))
        found = np.array([interval(values) for _, values in gains])
        plots.points(right, kept, *found.T, "kept gradients only", color=GREEN)
        right.plot(kept, 100 / kept, color="black", linewidth=0.8, linestyle="--", label="by bytes")
        plots.plain_log(right, "x")
        plots.plain_log(right, "y")
        right.axhline(1, color="black", linewidth=0.8)
        plots.legend_below(right)
    right.set(xlabel="kept weights, %", ylabel="dense / kept time", title="b: allreduce of a pruned model")
    plots.note(figure, _where(results))
    return figure


def scaling(results: Results) -> Figure:
    """The simulator: sockets, and hundreds of hosts."""
    figure, axes = plots.new_figure(1, 3, size=(13, 4.6))
    for algorithm in (LP, MST, BE):
        line = {name: STYLE[algorithm][name] for name in ("color", "marker", "label")}
        times = [1e3 * simulated.socket_seconds(algorithm, p) for p in simulated.SOCKET_RANKS]
        axes[0].plot(simulated.SOCKET_RANKS, times, markersize=5, **line)
    axes[0].set(title="a: a bridge after GPU 4", xlabel="GPUs", ylabel="broadcast of the paper's message, ms", ylim=(0, None))
    for ax, switch, title in ((axes[1], None, "b: one switch"), (axes[2], simulated.SWITCH, "c: switches of 16 hosts")):
        for algorithm in simulated.CLUSTER_ALGORITHMS:
            line = {name: STYLE[algorithm][name] for name in ("color", "marker", "label")}
            times = [1e3 * simulated.cluster_seconds(algorithm, p, switch) for p in simulated.CLUSTER_RANKS]
            ax.plot(simulated.CLUSTER_RANKS, times, markersize=4, **line)
        ax.set_xscale("log", base=2)
        ax.set_xticks(simulated.CLUSTER_RANKS, [str(p) for p in simulated.CLUSTER_RANKS])
        plots.plain_log(ax, "y")
        ax.set(title=title, xlabel="hosts", ylabel=f"allreduce of {simulated.MESSAGE / 1e6:g} MB, ms")
    plots.note(figure, "simulated")
    plots.ours_and_paper_legend(axes[1], columns=6)
    return figure


def audit(results: Results) -> Figure:
    """Recomputed over printed, statement by statement."""
    rows = arithmetic.paper_arithmetic()
    figure, ax = plots.new_figure(size=(9, 0.27 * len(rows) + 1))
    ratios = [row.recomputed / row.printed for row in rows]
    within = [0.95 <= ratio <= 1.05 for ratio in ratios]
    colours = [GREEN if ok else RED for ok in within]
    ax.axvline(1, color="black", linewidth=0.8)
    ax.scatter(np.clip(ratios, 1e-2, 1e2), range(len(rows)), color=colours, zorder=3)
    ax.set_yticks(range(len(rows)), [row.statement for row in rows], fontsize=8)
    ax.invert_yaxis()
    plots.plain_log(ax, "x")
    ax.set(xlabel="recomputed / printed (cut at 0.01 and 100)", title="The paper's arithmetic: green within 5 %")
    return figure
