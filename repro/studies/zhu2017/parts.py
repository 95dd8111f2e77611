"""From MACs to time by the parts of a training step: forward and backward apart, the layers around the LSTM counted or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

from repro.engine import Record
from repro.studies.base import Results
from repro.studies.gates import MACHINE
from repro.studies.speeds import DENSE, NN, SCATTERED
from repro.studies.zhu2017 import comparisons as c

if TYPE_CHECKING:
    from repro.gradients.macs import Account, Product

COUNTED = {"LSTM layers": (), "output layer too": ("output",), "one-hot embedding too": ("output", "embedding")}
PARTS = ("forward", "backward", "step")

ByPart = dict[str, float]


def products(record: Record, outer: tuple[str, ...] = ()) -> list[Product]:
    """The products of a training step of the character model."""
    from repro.gradients import macs

    spec = record.spec
    sizes = (record.metrics["symbols"], spec["hidden"], spec["hidden"], spec["layers"], spec["length"], spec["batch"])
    return macs.language_model_products(*sizes, outer=outer)


def accounts(record: Record, outer: tuple[str, ...]) -> dict[str, Account]:
    """By part, with the zeros of the whole training."""
    from repro.gradients import macs

    return {account.part: account for account in macs.accounts(products(record, outer), c.zeros_by_layer(record) / 100)}


def simulated(record: Record, outer: tuple[str, ...] = ()) -> ByPart:
    """Speed-up on the simulated accelerator, whose forward products are dense; NaN with an embedding, which it looks up."""
    from repro.gradients.accelerator import Accelerator, simulate_forward, simulate_output, total

    if "embedding" in outer:
        return dict.fromkeys(PARTS, math.nan)
    spec, machine = record.spec.get("training", record.spec), Accelerator(*MACHINE)
    length, batch, hidden = (spec[name] for name in ("length", "batch", "hidden"))
    cycles = [c.column(record, "zeros", name) for name in ("dense_cycles", "simulated_cycles")]
    forward = len(cycles[0]) * total(simulate_forward(length, batch, hidden, hidden, machine).values()).dense
    dense, skipping = (part.sum() - forward for part in cycles)
    if "output" in outer:
        times = len(cycles[0]) / spec["layers"]
        output = {
            name: times * cycles.dense
            for name, cycles in simulate_output(record.metrics["symbols"], hidden, length * batch, machine).items()
        }
        forward += output["V h"]
        dense, skipping = (part + output["dh"] + output["dV"] for part in (dense, skipping))
    return {"forward": 1.0, "backward": dense / skipping, "step": (forward + dense) / (forward + skipping)}


def measured(record: Record) -> ByPart:
    """Of the layers of a training, over the dense step that was the faster one."""
    times = pd.DataFrame(record.curves["steps"]).set_index("method")[list(PARTS)]
    return (times.loc[times.loc[[NN, DENSE], "step"].idxmin()] / times.loc[SCATTERED]).to_dict()


def of_trainings(results: Results, arm: str) -> list[dict]:
    """Rows of the table for a training with the zeros of all its measured updates, by what is counted and by part."""
    rows = []
    for counted, outer in COUNTED.items():
        for part in PARTS:
            columns = {
                "MACs of the step, %": lambda r, o=outer, p=part: 100 * accounts(r, o)[p].macs / accounts(r, o)["step"].macs,
                "redundant, %": lambda r, o=outer, p=part: 100 * accounts(r, o)[p].share,
                "ideal": lambda r, o=outer, p=part: accounts(r, o)[p].ideal,
                "simulated": lambda r, o=outer, p=part: simulated(r, o)[p],
            }
            rows.append(_row(results, arm, counted, part, columns))
    return rows


def of_timed_steps(results: Results, arm: str) -> list[dict]:
    """The same for one step within a training, which was timed."""
    from repro.gradients import macs

    def of_step(record: Record) -> dict[str, Account]:
        spec = record.spec["training"]
        sizes = [spec[name] for name in ("hidden", "hidden", "length", "batch")]
        layers = [product for i in range(spec["layers"]) for product in macs.lstm_products(*sizes, layer=f"l{i}")]
        return {account.part: account for account in macs.accounts(layers, c.column(record, "zeros", "zeros"))}

    rows = []
    for part in PARTS:
        columns = {
            "MACs of the step, %": lambda r, p=part: 100 * of_step(r)[p].macs / of_step(r)["step"].macs,
            "redundant, %": lambda r, p=part: 100 * of_step(r)[p].share,
            "ideal": lambda r, p=part: of_step(r)[p].ideal,
            "simulated": lambda r, p=part: simulated(r)[p],
            "measured": lambda r, p=part: measured(r)[p],
        }
        rows.append(_row(results, arm, "LSTM layers", part, columns))
    return rows


def _row(results: Results, arm: str, counted: str, part: str, columns: dict[str, Callable[[Record], float]]) -> dict:
    """Means over seeds."""
    means = {name: c.mean_or_nan(c.per_seed(results, arm, value)) for name, value in columns.items()}
    return {"": arm, "counted": counted, "part": part} | means
