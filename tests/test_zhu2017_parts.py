"""MACs, cycles and seconds of a training step by its parts: against counts by hand."""

import math

import pytest
import torch

from repro.engine import Context, Record
from repro.gradients.accelerator import Accelerator, simulate, simulate_output, total
from repro.studies.base import Results
from repro.studies.gates import MACHINE, CharacterTrial
from repro.studies.speeds import TrainedSpeedTrial
from repro.studies.zhu2017 import parts

SIZES = {"hidden": 32, "layers": 2, "length": 5, "batch": 4}


def made(metrics, curves, spec=SIZES):
    return Record("key", "zhu2017", "characters", spec, metrics, curves, False, {})


def counted(zeros: tuple[int, int], updates: int = 1, **cycles):
    """A record of two layers, so many of whose 2,560 entries of dnet are zero in each update."""
    rows = 2 * updates
    columns = {"layer": [0, 1] * updates, "entries": [2560] * rows, "threshold": list(zeros) * updates, "step": [0] * rows}
    columns |= dict.fromkeys(("saturated", "arriving", "factor", "underflow"), [0] * rows)
    return made({"symbols": 10}, {"zeros": columns | cycles})


def test_macs_by_part_are_those_counted_by_hand():
    """640 and 1,920 zeros: half of both layers. 20 frames; 8,192 MACs a frame and layer forward; V h 320, E x 320."""
    record = counted((640, 1920))
    for outer, forward, extra in (
        ((), 8192 * 2, 0),
        (("output",), 8192 * 2 + 320, 640),
        (parts.COUNTED["one-hot embedding too"], 8192 * 2 + 640, 960),
    ):
        found = parts.accounts(record, outer)
        backward = 2 * 8192 * 2 + extra
        assert found["forward"].macs == 20 * forward
        assert found["forward"].share == 0
        assert found["backward"].macs == 20 * backward
        assert found["backward"].share == pytest.approx(8192 * 2 / backward)
        assert found["step"].ideal == pytest.approx((forward + backward) / (forward + backward - 8192 * 2))


def test_simulated_parts_add_up_to_what_the_machine_took():
    """The backward pass alone is that of the six products without the two forward ones; the output layer is dense on both."""
    torch.manual_seed(0)
    masks = [(torch.rand(5, 4, 128) > share).numpy() for share in (0.5, 0.9)]
    machine = Accelerator(*MACHINE)
    layers = [simulate(mask, 32, machine) for mask in masks]
    cycles = [total(layer.values()) for layer in layers]
    backward = total(layer[name] for layer in layers for name in ("dx", "dh", "dW", "dU"))
    record = counted(
        (1280, 2304), 3, dense_cycles=[c.dense for c in cycles] * 3, simulated_cycles=[c.simulated for c in cycles] * 3
    )
    found = parts.simulated(record)
    assert found["forward"] == 1
    assert found["backward"] == pytest.approx(backward.speedup)
    assert found["step"] == pytest.approx(total(cycles).speedup)
    bounds = parts.cycles(record)
    assert bounds["forward"][0] == pytest.approx(3 * 2 * 20 * 8192 / machine.elements)
    assert bounds["step"][0] == pytest.approx(3 * total(cycles).bound)
    output = total(simulate_output(10, 32, 20, machine).values()).dense
    assert parts.simulated(record, ("output",))["step"] == pytest.approx(
        (total(cycles).dense + output) / (total(cycles).simulated + output)
    )


def test_measured_parts_are_over_the_dense_step_that_was_the_faster():
    steps = {
        "method": ["nn.LSTM", "dense", "scattered"],
        "forward": [1.0, 2.0, 1.0],
        "backward": [4.0, 2.0, 1.0],
        "step": [5.0, 4.0, 2.0],
    }
    whole = steps | {"forward": [1.0, 2.0, 2.0], "step": [5.0, 4.0, 3.0]}
    record = made({}, {"steps": steps, "model_steps": whole})
    assert parts.measured(record) == {"forward": 2.0, "backward": 2.0, "step": 2.0}
    assert parts.measured(record, ("output",)) == {"forward": 1.0, "backward": 2.0, "step": 4 / 3}


@pytest.mark.parametrize("rule, value", [("static", 1e-6), ("held", 0.8)])
def test_a_timed_step_has_its_zeros_its_cycles_and_its_times(tmp_path, rule, value):
    """From MACs to time for one and the same step; the simulated machine gains at most what the MACs promise, and some."""
    training = CharacterTrial(corpus="made", corpus_size="smoke", steps=20, learning_rate=5e-3, rule=rule, value=value, **SIZES)
    trial = TrainedSpeedTrial(training=training, after=0.5, rounds=2)
    outcome = trial.run(Context(tmp_path, 1))
    record = Record(trial.key(), "zhu2017", trial.kind, trial.describe(), outcome.metrics, outcome.curves, False, {})
    rows = parts.rows(Results(None, {"one, timed": [trial]}, {trial.key(): record}), "one, timed")
    (forward, backward, step), with_embedding = rows[:3], rows[6:]
    assert [(row["part"], row["n"]) for row in rows] == [(part, 1) for part in parts.PARTS] * 3
    assert forward["redundant, %"] == 0
    assert backward["redundant, %"] == pytest.approx(1.5 * step["redundant, %"])
    assert forward["MACs of the step, %"] == pytest.approx(100 / 3)
    assert 1 < step["simulated"] <= step["ideal"] * 1.05
    assert all(row["measured"] > 0 for row in rows[:6])
    assert all(math.isnan(row["measured"]) for row in with_embedding)
    assert outcome.curves["model_steps"]["method"] == outcome.curves["steps"]["method"]
