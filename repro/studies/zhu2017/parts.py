"""From MACs to time by the parts of a training step: forward and backward apart, the layers around the LSTM counted or not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from repro.engine import Record
from repro.studies.base import Results
from repro.studies.gates import MACHINE
from repro.studies.speeds import DENSE, NN, SCATTERED
from repro.studies.zhu2017 import comparisons as c

if TYPE_CHECKING:
    from repro.gradients.macs import Account

COUNTED = {"LSTM layers": (), "output layer too": ("output",), "one-hot embedding too": ("output", "embedding")}
PARTS = ("forward", "backward", "step")

ByPart = dict[str, float]


def accounts(record: Record, outer: tuple[str, ...] = ()) -> dict[str, Account]:
    """By part, with the zeros of the whole training, or of the one step that was timed."""
    from repro.gradients import macs

    spec = record.spec.get("training", record.spec)
    zeros = c.zeros_by_layer(record) / 100 if spec is record.spec else c.column(record, "zeros", "zeros")
    symbols = record.metrics["symbols"] if outer else 1  # the LSTM layers do not ask for it
    sizes = (spec[name] for name in ("hidden", "hidden", "layers", "length", "batch"))
    return {
        account.part: account for account in macs.accounts(macs.language_model_products(symbols, *sizes, outer=outer), zeros)
    }


def cycles(record: Record, outer: tuple[str, ...] = ()) -> dict[str, tuple[float, float, float]]:
    """By part, of all measured steps on the simulated accelerator: all MACs at its peak, the dense bound; the machine that
    skips nothing; the one that does. Forward products are dense. NaN with an embedding, which it looks up.
    """
    from repro.gradients.accelerator import Accelerator, simulate_forward, simulate_output, total

    if "embedding" in outer:
        return dict.fromkeys(PARTS, (math.nan,) * 3)
    spec, machine = record.spec.get("training", record.spec), Accelerator(*MACHINE)
    length, batch, hidden = (spec[name] for name in ("length", "batch", "hidden"))
    found = [c.column(record, "zeros", name) for name in ("dense_cycles", "simulated_cycles")]
    steps = len(found[0]) / spec["layers"]
    forward = len(found[0]) * total(simulate_forward(length, batch, hidden, hidden, machine).values()).dense
    dense, skipping = (part.sum() - forward for part in found)
    if "output" in outer:
        output = {
            name: steps * product.dense
            for name, product in simulate_output(record.metrics["symbols"], hidden, length * batch, machine).items()
        }
        forward += output["V h"]
        dense, skipping = (part + output["dh"] + output["dV"] for part in (dense, skipping))
    taken = {"forward": (forward, forward), "backward": (dense, skipping), "step": (forward + dense, forward + skipping)}
    return {part: (steps * account.macs / machine.elements, *taken[part]) for part, account in accounts(record, outer).items()}


def simulated(record: Record, outer: tuple[str, ...] = ()) -> ByPart:
    """Speed-up on the simulated accelerator over the same one that skips nothing."""
    return {part: dense / skipping for part, (_, dense, skipping) in cycles(record, outer).items()}


def measured(record: Record, outer: tuple[str, ...] = ()) -> ByPart:
    """Over the dense step that was the faster one, of the layers of a training or with the output layer of the whole model.

    NaN with an embedding as a product: the model looks it up.
    """
    if "embedding" in outer:
        return dict.fromkeys(PARTS, math.nan)
    times = pd.DataFrame(record.curves["model_steps" if outer else "steps"]).set_index("method")[list(PARTS)]
    return (times.loc[times.loc[[NN, DENSE], "step"].idxmin()] / times.loc[SCATTERED]).to_dict()


def rows(results: Results, arm: str) -> list[dict]:
    """Means over `n` seeds, by what is counted and by part."""
    records = results.seeds(arm)
    found = []
    for counted, outer in COUNTED.items():
        for part in PARTS if records else ():
            means = pd.DataFrame([_columns(record, outer, part) for record in records]).mean()
            found.append({"": arm, "counted": counted, "part": part} | means.to_dict() | {"n": len(records)})
    return found


def _columns(record: Record, outer: tuple[str, ...], part: str) -> dict[str, float]:
    account, (bound, dense, skipping) = accounts(record, outer), cycles(record, outer)[part]
    return {
        "MACs of the step, %": 100 * account[part].macs / account["step"].macs,
        "redundant, %": 100 * account[part].share,
        "ideal": account[part].ideal,
        "simulated": dense / skipping,
        "simulated, over the dense bound": bound / skipping,
        "measured": measured(record, outer)[part] if "steps" in record.curves else math.nan,
    }
