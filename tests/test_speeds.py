"""Timings of training steps: what is timed computes the right thing, zeros are those asked for, speed-ups are as by hand."""

import dataclasses
import math
import os
import platform
import subprocess
import sys
import textwrap
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from repro.engine import Context, Record
from repro.errors import ReproError
from repro.gradients import HeldSparsity, Static, ThresholdedLSTM, record
from repro.gradients.peers import LibraryLSTM
from repro.gradients.timing import DrawnColumns, Step, interleaved
from repro.studies import STUDIES, speeds
from repro.studies.base import Results
from repro.studies.gates import CharacterTrial
from repro.studies.speeds import NO_AVX2, NO_GPU, SpeedTrial, TrainedSpeedTrial
from repro.studies.zhu2017 import speed
from repro.studies.zhu2017.profiles import COLUMNS_80, PROFILES, mac_arms, speed_arms

TINY = SpeedTrial(hidden=64, batch=3, length=4, sparsities=(0.5, 0.9), compared=(0.8,), rounds=3)
TRAINING = CharacterTrial(
    corpus="made",
    corpus_size="smoke",
    hidden=16,
    layers=2,
    length=10,
    batch=8,
    steps=12,
    learning_rate=5e-3,
    value=1e-3,
    evaluations=3,
    measurements=12,
)


@pytest.fixture(autouse=True)
def fresh_generator():
    torch.manual_seed(0)


def step(layer, steps: int = 5, batch: int = 4, dtype=torch.float32) -> Step:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, batch, layer.input_size, generator=generator)
    return Step([layer], x.to(dtype), torch.randn(steps, batch, layer.hidden_size, generator=generator).to(dtype))


def gradients(one: Step) -> list[torch.Tensor]:
    one()
    return [one.x.grad, *(p.grad for p in one.layers.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("means", ["CSR", "columns"])
@pytest.mark.parametrize("hidden", [8, 64])
def test_torchs_own_products_are_those_of_the_masked_dense_computation(means, hidden, bias):
    """Whole columns zero or scattered entries, with compiled steps and without: the gradients of the thresholded layer."""
    reference = ThresholdedLSTM(12, hidden, bias=bias, dtype=torch.float64)
    for rule in (lambda: Static(0.02), lambda: DrawnColumns(0.7, seed=3)):
        reference.threshold = rule()
        wanted = gradients(step(reference, dtype=torch.float64))
        library = LibraryLSTM(12, hidden, bias=bias, threshold=rule(), means=means)
        library.load_state_dict(reference.state_dict())
        for a, b in zip(gradients(step(library)), wanted, strict=True):
            # an entry that rounding moves over the threshold is as small as it
            assert (a.double() - b).abs().max() <= 2e-2 * b.abs().max()
            assert torch.nn.functional.cosine_similarity(a.double().flatten(), b.flatten(), 0) > 0.99999


@pytest.mark.parametrize("hidden", [8, 64])
def test_torchs_own_products_are_recorded(hidden):
    one = step(LibraryLSTM(12, hidden, threshold=0.02, means="CSR"))
    with record(one.layers[0]) as measured:
        one()
    assert 0 < measured["l0"].overall()["threshold"] < 1


def test_what_torchs_own_products_cannot_do_is_named():
    with pytest.raises(ReproError, match="CSR, columns"):
        LibraryLSTM(3, 4, means="COO")
    with pytest.raises(ReproError, match="weights_only is True"):
        LibraryLSTM(3, 4, means="CSR", weights_only=True)
    uneven, even = (nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), lengths) for lengths in ([5, 1], [5, 5]))
    layer = LibraryLSTM(3, 4, means="CSR", threshold=1e-12)
    layer(even)[0].data.sum().backward()
    with pytest.raises(ReproError, match="not equally long"):
        layer(uneven)


def test_measuring_zeros_leaves_the_thresholds_that_a_rule_holds():
    one = step(ThresholdedLSTM(12, 8, threshold=HeldSparsity(0.8)))
    one()
    (site,) = one.layers[0].sites
    before = site.rule, site.number, site.rule.state_dict()
    one.zeros(), one.threshold_for(0.5)
    assert (site.rule, site.number, site.rule.state_dict()) == before


def test_drawn_columns_are_zero_for_the_whole_minibatch_and_drawn_anew():
    """70 % of 40 columns are 28, in every time step other ones."""
    rule = DrawnColumns(0.7, seed=1)
    first, second = (rule(torch.randn(6, 40)) for _ in range(2))
    for dnet in (first, second):
        assert (dnet == 0).all(0).sum() == 28
        assert (dnet != 0).all(0).sum() == 12
    assert not torch.equal(first == 0, second == 0)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("hidden", [30, 64])
def test_a_static_threshold_makes_about_the_wanted_share_zero(share, hidden):
    """Counted as `record` counts it, on either path."""
    layer = ThresholdedLSTM(20, hidden)
    one = step(layer, steps=20, batch=16)
    layer.threshold = one.threshold_for(share)
    (found,) = one.zeros()
    assert found == pytest.approx(share, abs=0.03)
    with record(layer) as records:
        one()
    assert found == pytest.approx(records["l0"].overall()["sparsity"], abs=1e-3)


def test_zeros_are_counted_under_each_layers_own_rule_which_stays_in_force():
    layers = [ThresholdedLSTM(5, 6, threshold=1e9), ThresholdedLSTM(6, 6)]
    one = Step(layers, torch.randn(3, 2, 5), torch.randn(3, 2, 6))
    found = one.zeros()
    assert found[0] == 1
    assert found[1] == pytest.approx(1 / 12), "the forget gates of the first of three steps, whose c is 0"
    assert [layer.threshold.t for layer in layers] == [1e9, 0]
    with pytest.raises(ReproError, match="ThresholdedLSTM"):
        step(nn.LSTM(3, 4)).zeros()


def test_steps_take_turns_in_both_directions_and_the_first_call_does_not_count():
    order = []

    def fake(name):
        def call():
            order.append(name)
            return float(order.count(name)), 10.0

        return call

    found = interleaved({name: fake(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "abc" + "cba" + "abc"
    assert np.array_equal(found["b"], [[2, 10], [3, 10]])


def test_a_step_forms_the_gradients_of_all_weights_and_of_the_input():
    """The same as one backward pass through `nn.LSTM`, from given states."""
    plain, ours = nn.LSTM(5, 7), ThresholdedLSTM(5, 7)
    ours.load_state_dict(plain.state_dict())
    x, d_out, states = torch.randn(6, 3, 5), torch.randn(6, 3, 7), [tuple(torch.randn(2, 1, 3, 7))]
    for a, b in zip(*(gradients(Step([layer], x, d_out, states)) for layer in (ours, plain)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_timed_steps_find_the_memory_of_the_step_before():
    """40 MB that are freed and allocated again, which need 10,000 fresh pages each time without it."""
    faults = {}
    for call in ("keep_memory()", "None"):
        code = f"""
            import resource
            import torch
            from repro.gradients.timing import keep_memory
            {call}
            for _ in range(12):  # until there is a hole of that size
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                array = torch.empty(10**7).zero_()
                del array
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        """
        ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
        faults[call] = int(ran.stdout)
    assert faults["keep_memory()"] < 0.1 * faults["None"]


def test_a_speed_trial_times_every_method_at_every_share(tmp_path):
    outcome = TINY.run(Context(tmp_path / "none", 1))
    rows = outcome.curves["steps"]
    assert list(zip(rows["method"], rows["sparsity"], strict=True)) == [
        ("nn.LSTM", 0),
        ("dense", 0),
        ("scattered", 0.5),
        ("scattered", 0.9),
        ("held", 0.8),
        ("top-k", 0.8),
        ("columns", 0.8),
        ("CSR", 0.8),
        ("gathered", 0.8),
    ]
    assert rows["zeros"] == pytest.approx([0, 0, 0.5, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8], abs=0.06)
    assert all(0 < low <= median <= high for low, median, high in zip(rows["lower"], rows["step"], rows["upper"], strict=True))


def test_a_gpu_is_one_that_torch_can_use(monkeypatch, tmp_path):
    """The driver names it; a build of torch for processors alone, or a process that hides all GPUs, has none."""
    monkeypatch.setattr(speeds, "DRIVER", tmp_path)
    monkeypatch.setattr(speeds.metadata, "version", lambda package: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    look = speeds.gpu_model.__wrapped__
    assert look() is None
    (tmp_path / "version").touch()
    assert look() == "an NVIDIA GPU"
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H100\nIRQ: 7\n")
    assert look() == "NVIDIA H100"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert look() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(speeds.metadata, "version", lambda package: "2.13.0+cpu")
    assert look() is None


def test_without_a_gpu_the_outcome_says_so_under_a_key_of_its_own(tmp_path, monkeypatch):
    trial = dataclasses.replace(TINY, device="cuda")
    keys = set()
    for name in ("NVIDIA A100", "NVIDIA H100", None):
        monkeypatch.setattr(speeds, "gpu_model", lambda name=name: name)
        keys.add(trial.key())
    assert len(keys) == 3, "another GPU behind the same processor is another machine"
    assert "GPU" in trial.run(Context(tmp_path / "none", 1)).metrics[NO_GPU]
    assert dataclasses.replace(trial, device="cpu").key() == TINY.key()
    with pytest.raises(ReproError, match="cpu, cuda"):
        dataclasses.replace(TINY, device="tpu")


@pytest.mark.skipif(not speeds.has_avx2(), reason="needs AVX2")
def test_a_speed_trial_can_be_kept_to_avx2(tmp_path):
    """All competitors, in a process of its own: this one stays as it is. The steps are those of the same seed."""
    trial = dataclasses.replace(TINY, compared=(), avx2=True)
    before = torch.backends.cpu.get_cpu_capability(), dict(os.environ)
    rows = trial.run(Context(tmp_path / "none", 1)).curves["steps"]
    assert (torch.backends.cpu.get_cpu_capability(), dict(os.environ)) == before
    assert rows["method"] == ["nn.LSTM", "dense", "scattered", "scattered"]
    here = dataclasses.replace(trial, avx2=False).run(Context(tmp_path / "none", 1)).curves["steps"]
    assert rows["zeros"] == pytest.approx(here["zeros"], abs=2e-3)
    assert trial.key() != dataclasses.replace(trial, avx2=False).key()


def test_a_process_that_has_chosen_its_instructions_already_times_nothing(monkeypatch, tmp_path):
    """Otherwise its steps would pass for those of AVX2."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(ReproError, match="AVX512"):
        speeds._by_avx2(TINY, Context(tmp_path / "none", 1))


def test_without_avx2_the_outcome_says_so_under_a_key_of_its_own(tmp_path, monkeypatch):
    trial = dataclasses.replace(TINY, avx2=True)
    monkeypatch.setattr(speeds, "has_avx2", lambda: True)
    with_avx2 = trial.key()
    monkeypatch.setattr(speeds, "has_avx2", lambda: False)
    assert trial.key() != with_avx2
    assert "AVX2" in trial.run(Context(tmp_path / "none", 1)).metrics[NO_AVX2]


def test_the_step_that_is_timed_is_one_of_the_very_training(tmp_path):
    """Its zeros are those that the training itself counts at that update."""
    zeros = TRAINING.run(Context(tmp_path / "training", 1)).curves["zeros"]
    timed = TrainedSpeedTrial(training=TRAINING, after=0.5, rounds=2).run(Context(tmp_path / "none", 1))
    at = [i for i, update in enumerate(zeros["step"]) if update == 6]
    causes = ("saturated", "arriving", "factor", "underflow", "threshold")
    wanted = [sum(zeros[cause][i] for cause in causes) / zeros["entries"][i] for i in at]
    assert timed.curves["zeros"]["zeros"] == pytest.approx(wanted, abs=2e-3)
    assert 0.1 < min(wanted) < 1
    assert timed.curves["steps"]["method"] == ["nn.LSTM", "dense", "scattered"]
    with pytest.raises(ReproError, match="share of 1"):
        TrainedSpeedTrial(training=TRAINING, after=1.0, rounds=2)


# ------------------------------------------------------------------------------------------- what is made of the records

Row = namedtuple("Row", "method sparsity zeros forward backward step lower upper")


def made(trial, rows, metrics=(), **curves) -> Record:
    columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    return Record(trial.key(), "zhu2017", trial.kind, trial.describe(), dict(metrics), {"steps": columns} | curves, False, {})


def row(method, sparsity, seconds) -> Row:
    return Row(method, sparsity, sparsity, seconds / 3, 2 * seconds / 3, seconds, seconds, seconds)


def made_results(dense: dict[int, tuple[float, float]]) -> Results:
    """Steps at each width of nn.LSTM and ours as given; 80 % scattered take 1 s, in columns 0.5 s, by CSR 4 s."""
    profile = PROFILES["paper"]
    arms = {f"{width} cells, batch 20": speed_arms(profile)[f"{width} cells, batch 20"][:1] for width in dense}
    records = {}
    for (plain, ours), (trial,) in zip(dense.values(), arms.values(), strict=True):
        rows = [row("nn.LSTM", 0, plain), row("dense", 0, ours)]
        rows += [row("scattered", 0.8, 1), row("columns", 0.8, 0.5), row("CSR", 0.8, 4)]
        records[trial.key()] = made(trial, rows)
    return Results(profile, arms, records)


def test_speedups_are_over_the_faster_dense_step():
    results = made_results({650: (2.0, 2.5), 1500: (3.0, 1.5)})
    q = {
        name: float(np.squeeze(quantity(results)))
        for name, quantity in speed.QUANTITIES.items()
        if "650" in name or "1500" in name
    }
    assert q["speedup_80_650"] == pytest.approx(2)
    assert q["speedup_80_1500"] == pytest.approx(1.5)
    assert q["speedup_80_650_library"] == pytest.approx(0.5)
    assert q["structured_over_unstructured_650"] == pytest.approx(2)
    assert math.isnan(q["speedup_90_650"]), "not timed"


def test_each_processor_has_its_speedups():
    """One on which the dense step takes 2 s and one on which it takes 3 s; of one alone the first table says all."""
    results = made_results({650: (2.5, 2.0)})
    ((trial,),) = results.arms.values()
    results = dataclasses.replace(results, arms=speed_arms(PROFILES["paper"]) | results.arms)
    plain, title = results.records[trial.key()], "Scattered zeros, by processor; speed-up over the faster dense step"
    slow = made_results({650: (4.5, 3.0)}).records[trial.key()]
    two = [
        dataclasses.replace(record, provenance={"cpu": cpu, "commit": commit})
        for record, cpu, commit in ((plain, "abacus", "0123456789"), (slow, "slide rule", None))
    ]
    table = speed.steps(dataclasses.replace(results, timings={trial.key(): two}))[title]
    table = table[table["zeros, %"] == 80]
    assert list(table["machine"]) == ["abacus", "slide rule"]
    assert list(table["commit"]) == ["0123456", "none"], "outside of a checkout there is none"
    assert list(table["speed-up"]) == pytest.approx([2, 3])
    assert list(table["over nn.LSTM"]) == pytest.approx([2.5, 4.5])
    assert title not in speed.steps(dataclasses.replace(results, timings={trial.key(): two[:1]}))


def test_a_claim_names_the_machine_of_its_own_timings():
    """650 cells were timed by one processor, 1500 by another."""
    results = made_results({650: (2.0, 2.5), 1500: (3.0, 1.5)})
    where = [{"cpu": "abacus", "threads": 2}, {"cpu": "slide rule", "threads": 1}]
    for timed, provenance in zip(results.records.values(), where, strict=True):
        timed.provenance.update(provenance)
    results = dataclasses.replace(results, arms=speed_arms(PROFILES["paper"]) | results.arms)
    sources = {verdict.claim.quantity: verdict.source for verdict in STUDIES["zhu2017"].verdicts("speed", results)}
    assert sources["speedup_80_650"] == "abacus, 2 threads"
    assert sources["speedup_80_1500"] == "slide rule, 1 threads"


def test_what_was_timed_on_a_gpu_names_the_gpu():
    """A trial on the processor does not, though torch found a GPU beside it."""
    for device, name in (("cuda", "NVIDIA H100"), ("cpu", "abacus, 2 threads")):
        trial = dataclasses.replace(TINY, device=device)
        where = {"cpu": "abacus", "threads": 2, "gpu": "NVIDIA H100"}
        timed = Record(trial.key(), trial.study, trial.kind, trial.describe(), {}, {}, False, where)
        assert Results(None, {"arm": [trial]}, {trial.key(): timed}).machine() == name


def test_the_dense_step_is_judged_at_its_worst_width():
    found = speed.dense_step_over_nn_lstm(made_results({650: (2.0, 2.5), 1500: (3.0, 1.5)}))
    assert found == pytest.approx([1.25])


def test_measured_over_ideal_is_of_the_same_step():
    """Layers with 70, 80 and 90 % of zeros: 80 % of the MACs of equal layers, 2.14 ideally; 1.5 measured."""
    arms = mac_arms(PROFILES["paper"])
    name = "t = 1e-6, NT, timed"
    trial = arms[name][0]
    rows = [row("nn.LSTM", 0, 3.0), row("dense", 0, 4.0), row("scattered", 0, 2.0)]
    one = made(trial, rows, zeros={"layer": [0, 1, 2], "zeros": [0.7, 0.8, 0.9]})
    results = Results(PROFILES["paper"], {name: [trial]}, {trial.key(): one})
    assert speed.measured_over_ideal_speedup(results) == pytest.approx([1.5 * (1 - 2 * 0.8 / 3)])


def test_without_a_gpu_its_claims_stay_open():
    arms = speed_arms(PROFILES["laptop"])
    (name,) = [name for name in arms if name.startswith("GPU")]
    records = {t.key(): Record(t.key(), "zhu2017", t.kind, t.describe(), {NO_GPU: "why"}, {}, False, {}) for t in arms[name]}
    results = Results(PROFILES["laptop"], arms, records)
    assert np.isnan(speed.QUANTITIES["gpu_speedup_80_structured"](results)).all()
    assert list(speed.steps(results)["Not timed"]["reason"]) == ["why"]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_the_arms_are_the_sizes_of_the_claims(profile):
    arms = speed_arms(profile)
    wanted = {f"{width} cells, batch {batch}" for width in profile.speed.widths for batch in profile.speed.batches}
    assert wanted | {"t = 0, NT", COLUMNS_80, "t = 1e-6, NT", "80% held, NT, timed"} <= set(arms)
    assert len({trial.key() for trials in arms.values() for trial in trials}) == len(arms) * profile.seeds
    assert all(0.8 in trial.sparsities for name in wanted for trial in arms[name])


def test_the_exhibit_runs_end_to_end(tmp_path):
    """Tiny settings: trials, tables and figure; every method of the one width is drawn."""
    profile = dataclasses.replace(PROFILES["smoke"], seeds=1, hidden=8, layers=1, length=5, batch=8)
    (exhibit,) = speed.EXHIBITS
    arms = exhibit.arms(profile)
    records = {}
    for number, trial in enumerate(trial for trials in arms.values() for trial in trials):
        outcome = trial.run(Context(tmp_path / str(number), 1))
        records[trial.key()] = Record(
            trial.key(), trial.study, trial.kind, trial.describe(), outcome.metrics, outcome.curves, outcome.diverged, {}
        )
    results = Results(profile, arms, records)
    tables = list(exhibit.tables(results).values())
    assert len(tables[0]) == 2 * (2 + len(profile.speed.sparsities)) + 5, "the steps once more by AVX2 alone"
    assert all(len(table) for table in tables)
    drawn = exhibit.draw(results)
    assert [len(ax.patches) for ax in drawn.axes] == [0, 8, 0]
