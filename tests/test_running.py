"""Trials that run and store pruned models: what they measure at the smallest size, and what their tables make of it."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pytest import approx

from repro.engine import Context, Record
from repro.studies import running
from repro.studies.base import Results
from repro.studies.narang2017 import running as exhibit
from repro.studies.running import PrunedModel, RunningSizes, RuntimeTrial, SequenceTrial, take_turns

BACKENDS = ("torch dense", "int8 dynamic", "torch CSR", "repro sparse")
SIZES = RunningSizes("smoke", (PrunedModel("gru", 24, 1, 4, 1e-2),), 3, ("rnn", "gru"), (24,), (0.9,), 6, 1)
PROFILE = SimpleNamespace(
    name="smoke", channels=2, time_strides=(4, 1), batch=4, weight_decay=0.01, sparsity=0.9, freq=1, phi=1.5,
    timing_repeats=1, timing_rounds=2, timing_backends=BACKENDS, running=SIZES,
)  # fmt: skip
ARMS = exhibit.arms(PROFILE)


def record(trial, metrics, curves) -> Record:
    return Record(trial.key(), trial.study, trial.kind, trial.describe(), metrics, curves, False, {"cpu": "test", "threads": 1})


def ran(trial, folder) -> Record:
    torch.set_num_threads(1)
    outcome = trial.run(Context(folder / "checkpoint", 1))
    assert not outcome.diverged
    return record(trial, outcome.metrics, outcome.curves)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Record:
    """A GRU model, trained and pruned in a second, then measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repro.sparse.bench.Bench.bandwidth", lambda bench, nbytes: 10.0)  # has tests of its own, and takes long
        return ran(ARMS["pruned gru"][0], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> Record:
    return ran(ARMS["sequences"][0], tmp_path_factory.mktemp("sequences"))


def test_arms_follow_the_profile():
    """One trial a repeat, each a timing of its own kind: a model trained only for its error rate has another key."""
    assert list(ARMS) == ["pruned gru", "sequences"]
    (model,), (sequence,) = ARMS.values()
    assert isinstance(model, RuntimeTrial) and isinstance(sequence, SequenceTrial) and model.timing and sequence.timing
    assert (model.kind, sequence.kind) == ("runtime", "sequences") and model.needs() == ()
    assert (model.hidden, model.learning_rate, model.pruning.sparsity, sequence.rounds) == (24, 1e-2, 0.9, 2)


def test_a_trained_model_reads_the_same_on_sparse_kernels(model):
    """All transcripts equal, scores up to rounding (but not bit for bit, or the dense model was compared with itself)."""
    found = model.metrics
    assert (found["transcripts"], found["other_transcripts"]) == (10, 0)
    assert found["sparse_layers"] >= 1 and 0 < found["score_error"] < 2e-6
    assert found["dense_cer"] == found["sparse_cer"] == approx(found["test_cer"]) and found["test_cer"] < 0.99
    assert found["sparsity_recurrent"] == approx(0.9, abs=2e-3)
    assert found["speech_seconds"] > 1 and 1e-5 < found["sparse_rtf"] < 1 and 1e-5 < found["dense_rtf"] < 1
    assert found["train_seconds"] == approx(sum(model.curves["epochs"]["seconds"]))


def test_the_matrix_timed_is_the_trained_one(model):
    """Shape and zeros are those of its recurrent matrix, also in random order; bytes are 4 k + n H(k / n) / 8."""
    rows = pd.DataFrame(model.curves["products"])
    n, k = 72 * 24, 173  # round(0.9 n) of all weights are zero
    assert set(zip(rows["rows"], rows["columns"], strict=True)) == {(72, 24)} and set(rows["layer"]) == {
        "recurrent.0.weight_hh_l0"
    }
    assert rows["sparsity"].to_numpy() == approx(np.full(len(rows), 1 - k / n))
    assert list(rows["matrix"]) == ["trained"] * 4 + ["shuffled"] * 2
    assert list(rows["backend"]) == [*BACKENDS, "torch CSR", "repro sparse"]
    entropy = -(k / n) * math.log2(k / n) - (1 - k / n) * math.log2(1 - k / n)
    assert rows["bytes"].to_numpy() == approx(np.where(rows["sparse"], 4 * k + n * entropy / 8, 4 * n))
    errors = rows.set_index(["matrix", "backend"])["error"]
    assert (errors["trained", "torch CSR"], errors["trained", "repro sparse"]) != (
        errors["shuffled", "torch CSR"],
        errors["shuffled", "repro sparse"],
    )


def test_files_are_counted_and_read_back(model):
    """float32 loses nothing; halves and bytes save 2 and 3 bytes for each non-zero of the coded matrices, and lose a little."""
    files = pd.DataFrame(model.curves["files"]).set_index("stored")
    layers = pd.DataFrame(model.curves["layers"])
    kept = round(((1 - layers["sparsity"]) * layers["weights"])[layers["sparsity"] > 0].sum())
    assert list(files["values"]["float32"] - files["values"]) == [0, 2 * kept, 3 * kept]
    assert (
        files["dense"].nunique() == 1
        and (files["values"] < files["minimum"]).all()
        and (files["minimum"] < files["file"]).all()
    )
    assert files["error"]["float32"] == 0 < files["error"]["float16"] < files["error"]["int8"] < 0.05
    assert files["cer"]["float32"] == model.metrics["sparse_cer"]


def test_sequences_tell_errors_and_what_is_missing(sequences):
    """Against float64: float32 to rounding, int8 far from it. torch has no int8 nn.RNN, which is said and left empty."""
    rows = pd.DataFrame(sequences.curves["sequences"])
    assert list(zip(rows["cell"], rows["sparsity"], strict=True)) == [("rnn", 0.9), ("gru", 0.9)]
    assert ((rows["dense_error"] > 0) & (rows["dense_error"] < 2e-6)).all() and (rows["sparse_error"] < 2e-6).all()
    assert (rows[["dense_ms", "products_ms", "sparse_ms"]] > 0).all(axis=None)
    int8 = rows[["int8_ms", "int8_error"]].astype(float)
    assert int8.loc[0].isna().all() and 1e-4 < int8["int8_error"][1] < 0.1 and int8["int8_ms"][1] > 0
    assert set(sequences.metrics) == {"missing int8 rnn"} and "nn.RNN" in sequences.metrics["missing int8 rnn"]


def test_weights_are_torchs_with_zeros_at_random():
    """Uniform in 1 / sqrt(units), zeros within four standard deviations of the share, none in the biases; all from the seed."""
    layers = [running._pruned_layer("lstm", 40, 0.9, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    weights = [layer.weight_hh_l0 for layer in layers]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    zeros = int((weights[0] == 0).sum())
    assert abs(zeros - 0.9 * 6400) < 4 * math.sqrt(6400 * 0.09)
    kept = weights[0][weights[0] != 0]
    assert kept.abs().max() < 40**-0.5 and kept.std() == approx(40**-0.5 / math.sqrt(3), rel=0.1)
    assert layers[0].bias_hh_l0.count_nonzero() == 160


def test_turns_next_to_slow_probes_do_not_count(monkeypatch):
    """With a clock that only calls advance: a turn's first call is not timed, orders alternate, slow turns are repeated."""
    clock, order = [0.0], []
    probes = iter([1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr("repro.sparse.timing.settle", lambda: None)
    monkeypatch.setattr("repro.sparse.bench.probe", lambda threads: next(probes))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        def made():
            order.append(name)
            clock[0] += next(seconds)

        return made

    # Of each pair the second is timed. The first turn of b ends, and its second begins, with the slow probe.
    a, b = iter([9, 3, 9, 5]), iter([9, 1, 9, 70, 9, 2, 9, 4])
    turns = take_turns({"b": call("b", b), "a": call("a", a)}, 1, 2)
    assert "".join(order[::2]) == "abbabb"
    assert turns.medians == {"a": approx((3 + 5) / 2), "b": approx((2 + 4) / 2)}
    assert turns.dropped == 2


def results(**records) -> Results:
    arms = {name.replace("_", " "): ARMS[name.replace("_", " ")] for name in records}
    return Results(PROFILE, arms, {record.key: record for record in records.values()})


def product(backend, median_us, matrix="trained", **changes) -> dict:
    sparse = backend not in ("torch dense", "OpenBLAS dense", "int8 dynamic")
    row = {"backend": backend, "matrix": matrix, "median_us": median_us, "sparse": sparse, "reduced": backend == "int8 dynamic"}
    row |= {"runtime": "repro" if backend.startswith("repro") else "other", "error": 0.02 if row["reduced"] else 1e-7}
    return row | {"rows": 72, "columns": 24, "sparsity": 0.9, "bytes": 3e3, "gbps": 2.0} | changes


def columns(rows) -> dict:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_ratios_are_worked_out_by_hand():
    """Best of each kind over ours: dense 20 / 4, libraries 12 / 4 and 12 / 5, int8 6 / 4; bound: 3,000 bytes at 2 GB/s."""
    products = [product("torch dense", 40.0), product("OpenBLAS dense", 20.0), product("int8 dynamic", 6.0)]
    products += [product("torch CSR", 12.0), product("scipy CSR", 30.0), product("repro sparse", 4.0)]
    products += [product("torch CSR", 12.0, "shuffled"), product("repro sparse", 5.0, "shuffled")]
    made = record(ARMS["pruned gru"][0], {"dense_rtf": 0.4, "sparse_rtf": 0.1}, {"products": columns(products)})
    found = results(pruned_gru=made)
    trained, shuffled = exhibit.layer_ratios(found).to_dict("records")
    assert (trained["mask"], shuffled["mask"]) == ("trained", "shuffled")
    assert [trained[name] for name in ("dense", "library", "int8", "int8_error", "bound")] == approx([5, 3, 1.5, 0.02, 1.5 / 4])
    assert [shuffled[name] for name in ("dense", "library", "int8")] == approx([4, 2.4, 1.2])
    assert exhibit.real_time_speedup(found, "pruned gru") == approx([4.0])


def test_tables_and_figure_show_what_was_measured(model, sequences):
    """Ratios of sizes from the file's own row; the paper's 460 MB over 50 MB beside ours; nothing is drawn of nothing."""
    found = results(pruned_gru=model, sequences=sequences)
    tables = exhibit.tables(found)
    smaller = tables["Smaller by, whole model"].set_index("quantity")
    size = {name: values[0] for name, values in model.curves["files"].items()}
    assert smaller["paper"]["dense over values alone"] == approx(460 / 50)
    assert smaller["ours"]["dense over values alone"] == approx(size["dense"] / size["values"])
    assert smaller["ours"]["dense over file, float32"] == approx(size["dense"] / size["file"])
    whole = tables["The whole model, one utterance at a time"].set_index("quantity")["ours"]
    assert whole["dense over sparse"] == approx(model.metrics["dense_rtf"] / model.metrics["sparse_rtf"])
    timed = pd.DataFrame(sequences.curves["sequences"])
    shown = tables["Sequences, milliseconds (median over repeats)"]
    assert list(shown["over best dense"]) == approx(list(timed["products_ms"] / timed["sparse_ms"]))
    assert "int8 rnn" in set(tables["Not measured"][""])
    first, second, third = exhibit.figure(found).axes
    assert len(first.get_yticklabels()) == len(BACKENDS) and len(third.patches) == 4 and second.get_title().startswith("b")
    nothing = Results(PROFILE, ARMS, {})
    assert exhibit.figure(nothing) is None and list(exhibit.tables(nothing)) == ["Not measured"]
