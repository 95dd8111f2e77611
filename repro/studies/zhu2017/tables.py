"""The tables of every exhibit: title -> frame, the paper's number beside ours."""

from __future__ import annotations

import pandas as pd

from repro.report.published import Published
from repro.studies.base import Results
from repro.studies.comparing import beside
from repro.studies.gates import PRINTED, SNAPSHOTS
from repro.studies.zhu2017 import arithmetic as a
from repro.studies.zhu2017 import comparisons as c
from repro.studies.zhu2017 import parts
from repro.studies.zhu2017 import quantities as q
from repro.studies.zhu2017.comparisons import paper, per_seed, relative_loss
from repro.studies.zhu2017.profiles import DENSE, NT, THRESHOLDS, TIMED, N, short, static_name
from repro.studies.zhu2017.speed import ideal_speedup, machine_of, measured_speedup

Tables = dict[str, pd.DataFrame]

AT = [f"{100 * share:g} % of training" for share in SNAPSHOTS]


def _base(arm: str) -> str:
    """The dense arm of the same normalisation."""
    return static_name(0.0, arm.rsplit(", ", 1)[1])


def _training_zeros_in_print(t: float) -> Published | None:
    return paper("figure4", "whole training", "zeros_percent", t) if t in (0, 1e-7, 1e-6) else None


def paper_arithmetic(results: Results) -> Tables:
    """The paper's numbers and formulas against each other."""
    printed_carry, right_carry = a.carries()
    printed_slope, right_slope = a.printed_tanh_derivative(-5.0)
    rows = [
        (
            "straight line through 45 % and 80 %",
            "log10 t at 10 % of zeros",
            None,
            a.extrapolated_exponent_of_10_percent(),
        ),
        ("straight line through 45 % and 80 %", "points a decade", _zeros_a_decade(), a.line_of_zeros()[1]),
        ("printed rule, dnet > t", "large entries removed, %", None, a.printed_rule_large_removed_percent()),
        ("tanh (1 - tanh), as printed, at -5", "derivative", None, printed_slope),
        ("1 - tanh^2, at -5", "derivative", None, right_slope),
        ("f c, as printed", "dc of the step before", None, printed_carry),
        ("f dc", "dc of the step before", None, right_carry),
        (
            "1 % of validation loss at Zaremba's small model",
            "perplexity, %",
            paper("audit", "1% of validation loss", "perplexity_percent"),
            a.perplexity_percent_of_one_percent_loss(),
        ),
    ]
    return {"Printed and recomputed": beside(rows)[["", "quantity", "paper", "known", "ours"]]}


def _zeros_a_decade() -> Published:
    return paper("figure3", "one step, zeros a decade of t", "zeros_points")


def activations(results: Results) -> Tables:
    """Figure 2: how many activations are extreme, and how far histograms are apart."""
    rows = []
    for gate, name in c.GATES.items():
        edges = "below -0.9 or above 0.9" if gate == "g" else "below 0.1 or above 0.9"
        for share, at in zip(SNAPSHOTS, AT, strict=True):
            values = per_seed(results, DENSE, lambda record, g=gate, s=share: c.extreme_percent(record, g, s))
            rows.append((f"{name}, {at}", f"{edges}, %", None, values))
    rows.append(("all gates, end of training", "exactly 0, %", None, q.zero_activations_percent(results)))
    rows.append(("10 % against 100 % of training", "distance of histograms", None, q.histogram_distance_10_to_100(results)))
    ratio = q.histogram_distance_after_10_over_whole(results)
    rows.append(("the same over that of 0.5 % and 100 %", "ratio", None, ratio))
    return {"Activations of the gates (the paper's histograms could not be seen)": beside(rows)}


def one_step(results: Results) -> Tables:
    """Figure 3: zeros and cosine of one step, under both normalisations."""
    rows = []
    for normalisation in (NT, N):
        arm = static_name(0.0, normalisation)
        for t in THRESHOLDS[NT]:
            name = static_name(t, normalisation)
            zeros, cosine = (per_seed(results, arm, lambda record, t=t, i=i: c.at_threshold(record, t)[i]) for i in range(2))
            printed = paper("figure3", "one step", "zeros_percent", t) if t in (0, 1e-8, 1e-6) else None
            rows.append((name, "zeros, %", printed, zeros))
            printed = paper("figure3", "one step", "cosine", t) if t in (0, 1e-6, 1e-5) else None
            rows.append((name, "cosine with the dense gradient", printed, cosine))
    for which, quantity in enumerate(("zeros, %", "cosine with the dense gradient")):
        values = per_seed(results, DENSE, lambda record, i=which: q.printed_rule(record)[i])
        rows.append((f"dnet > t as printed, t = {short(PRINTED)}, NT", quantity, None, values))
    cliff = [
        ("80 % of zeros", "cosine", None, q.cosine_step_at_80_percent(results)),
        ("from cosine 0.95 to 0.26", "decades of t", None, q.decades_of_the_cliff(results)),
        ("from 45 % to 80 % of zeros", "decades of t", None, q.decades_from_45_to_80_percent(results)),
    ]
    return {"One step, half of training": beside(rows), "Its shape over t, NT": beside(cliff)}


def zeros_over_training(results: Results) -> Tables:
    """Figure 4: zeros over the training, all layers together and apart."""
    rows, layers = [], []
    for arm, t in _static(results):
        rows.append((arm, "zeros, %", _training_zeros_in_print(t), per_seed(results, arm, c.training_zeros)))
        for layer in range(results.profile.layers):
            values = per_seed(results, arm, lambda record, i=layer: c.zeros_by_layer(record)[i])
            layers.append((f"{arm}, layer {layer + 1}", "zeros, %", None, values))
    return {"Zeros over the training": beside(rows), "By layer (1: nearest the input)": beside(layers)}


def _static(results: Results) -> list[tuple[str, float]]:
    """The arms with a static threshold, and it."""
    return [(arm, trials[0].value) for arm, trials in results.arms.items() if trials[0].rule == "static"]


def losses(results: Results) -> Tables:
    """Figure 5: losses at the end of training."""
    rows = []
    for arm in results.arms:
        rows.append((arm, "validation loss, nats a symbol", None, results.metric(arm, "validation_loss")))
        rows.append((arm, "test, bits a symbol", None, results.metric(arm, "test_bits")))
        if arm != _base(arm):
            rows.append((arm, "validation loss against t = 0, %", None, relative_loss(results, arm, _base(arm))))
            rows.append((arm, "test loss against t = 0, %", None, relative_loss(results, arm, _base(arm), "test_loss")))
    chosen = [
        (q.largest_harmless_threshold(results), "zeros, %", q.zeros_percent_largest_harmless_threshold(results)),
        (
            q.chosen_by_cosine(results),
            "validation loss against t = 0, %",
            q.relative_validation_loss_chosen_by_cosine(results),
        ),
    ]
    printed = (paper("macs", "sparsified", "zeros_percent_low"), None)
    names = ("largest t within 1 % of validation loss", "largest t with a cosine of 0.95 in one step")
    best = [
        (f"{name}: {arm or 'not yet known'}", quantity, published, values)
        for name, (arm, quantity, values), published in zip(names, chosen, printed, strict=True)
    ]
    return {"Losses at the end of training": beside(rows), "The threshold one would choose": beside(best)}


def causes(results: Results) -> Tables:
    """Which factor of a zero is zero, and what makes other entries small."""
    rows = [
        (f"{_CAUSES[name]}", "share of the zeros at t = 0, %", None, q.per_seed(results, DENSE, _of_zeros(name)))
        for name in c.CAUSES[:-1]
    ]
    shares, cells = [], []
    for share, at in zip(SNAPSHOTS, AT, strict=True):
        for name, of, what in (
            ("full_cells", "cells", "tanh(c) is 1 or -1, % of all cells"),
            ("dead_cells", "cells", "dc is 0, % of all cells"),
            ("dead_full_cells", "dead_cells", "tanh(c) is 1 or -1, % of those whose dc is 0"),
        ):
            counts = ((name, share), (of, share))
            cells.append((at, what, None, per_seed(results, DENSE, lambda record, n=counts: q.percent_of(record, *n))))
        for name, what in (("derivative_share", "gate's derivative"), ("arriving_share", "arriving gradient")):
            values = per_seed(results, DENSE, lambda record, n=name, s=share: q.cause(record, n, s))
            shares.append((f"{what}, {at}", "share of the variance of log |dnet|", None, values))
        lifted = per_seed(
            results, DENSE, lambda record, s=share: 100 * q.cause(record, "lifted", s) / q.cause(record, "below", s)
        )
        shares.append((f"smallest 80 %, {at}", "above t if the derivative were the largest, %", None, lifted))
    return {
        "Zeros without a threshold": beside(rows),
        "Cells that pass nothing on": beside(cells),
        "What makes entries small": beside(shares),
    }


_CAUSES = {
    "saturated": "derivative of the gate is 0",
    "arriving": "arriving gradient is 0 (dc; dh for o)",
    "factor": "other factor is 0",
    "underflow": "only the product is 0",
}


def _of_zeros(name: str):
    return lambda record: c.zeros_by_cause(record)[name]


def dynamic(results: Results) -> Tables:
    """Rules against each other: zeros, how steady they are, and what they cost."""
    rows = []
    for arm in results.arms:
        rows.append((arm, "zeros, %", None, per_seed(results, arm, c.training_zeros)))
        spread = per_seed(results, arm, lambda record: c.zeros_by_tenth(record).max() - c.zeros_by_tenth(record).min())
        rows.append((arm, "largest - smallest tenth of training, points", None, spread))
        if arm != _base(arm):
            rows.append((arm, "validation loss against t = 0, %", None, relative_loss(results, arm, _base(arm))))
            rows.append((arm, "test loss against t = 0, %", None, relative_loss(results, arm, _base(arm), "test_loss")))
    return {"Rules": beside(rows)}


def macs(results: Results) -> Tables:
    """From zeros to redundant MACs, the ideal speed-up, that of a simulated accelerator, and the one measured."""
    printed = [
        (
            "dnet's products, 256 inputs and cells",
            "MACs of all, %",
            paper("macs", "training iteration", "dnet_share_percent_recomputed"),
            a.backward_macs_percent(),
        ),
        ("the same, 64 inputs", "MACs of all, %", None, a.backward_macs_percent_other_inputs()),
        (
            "80 % of zeros",
            "redundant, %",
            paper("macs", "sparsified", "redundant_percent", 80),
            a.redundant_macs_percent_at_80(),
        ),
        (
            "80 % of zeros, fixed embedding",
            "redundant, %",
            paper("macs", "80% zeros, fixed embedding", "redundant_percent"),
            a.redundant_macs_percent_fixed_embedding(),
        ),
        *(
            (
                f"80 % of zeros, {setup}",
                "redundant, %",
                paper("macs", f"80% zeros, {setup}", "redundant_percent"),
                a.words_percent(setup),
            )
            for setup in ("Zaremba small", "Zaremba medium")
        ),
        ("80 % of zeros", "ideal speed-up", paper("macs", "sparsified", "speedup_bound", 80), a.macs_bound_speedup_80()),
    ]
    rows = []
    for arm in (arm for arm in results.arms if not arm.endswith(TIMED)):
        rows += [
            (arm, "zeros, %", None, per_seed(results, arm, c.training_zeros)),
            (arm, "columns zero for the whole minibatch, %", None, per_seed(results, arm, q.zero_columns_percent)),
            (
                arm,
                "redundant MACs, LSTM layers, %",
                paper("macs", "sparsified", "redundant_percent_low"),
                100 * per_seed(results, arm, q.redundant_share),
            ),
            (arm, "ideal speed-up", None, per_seed(results, arm, ideal_speedup)),
            (arm, "simulated speed-up", None, per_seed(results, arm, q.simulated_speedup)),
        ]
    for arm in (arm for arm in results.arms if arm.endswith(TIMED)):
        share = per_seed(results, arm, lambda record: 100 * c.column(record, "zeros", "zeros").mean())
        rows += [
            (arm, "zeros of the step, %", None, share),
            (arm, "ideal speed-up", None, per_seed(results, arm, ideal_speedup)),
            (arm, "simulated speed-up", None, per_seed(results, arm, q.simulated_speedup)),
            (arm, f"measured speed-up, {machine_of(results, [arm])}", None, per_seed(results, arm, measured_speedup)),
        ]
    return {
        "By counting": beside(printed)[["", "quantity", "paper", "known", "ours"]],
        "Of our trainings": beside(rows),
        "Forward and backward apart": pd.DataFrame([row for arm in results.arms for row in parts.rows(results, arm)]),
    }
