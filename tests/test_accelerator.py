"""The accelerator's cycles: by hand, against a slow account of each lane, and laws; zeros that dense hardware can skip."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.errors import ReproError
from repro.gradients import ThresholdedLSTM, TopK
from repro.gradients.accelerator import Accelerator, Cycles, simulate, simulate_output, total
from repro.gradients.macs import BACKWARD, FORWARD, lstm_products
from repro.gradients.structured import ColumnTopK

D = 3  # inputs in cases by hand


def mask_of(rows) -> np.ndarray:
    """Strings of 0 and 1, one list of sequences for each time step."""
    return np.array([[[entry == "1" for entry in row] for row in step] for step in rows])


def simulated(mask, machine, inputs=D) -> dict[str, int]:
    return {name: cycles.simulated for name, cycles in simulate(mask, inputs, machine).items()}


def lane_by_lane(mask, inputs, machine) -> dict[str, int]:
    """The rules of the model, one lane, row and entry at a time."""
    steps, batch, gates = mask.shape

    def row(entries, outputs):
        passes, cycles, scan = math.ceil(outputs / machine.width), 0, machine.scan or len(entries)
        for start in range(0, len(entries), scan):
            work = passes * sum(map(int, entries[start : start + scan]))
            cycles += work if machine.scan is None else max(work, 1)
        return cycles

    def product(rows, outputs):
        lanes = [0] * machine.lanes
        for number, entries in enumerate(rows):
            lanes[number % machine.lanes] += row(entries, outputs)
        return max(lanes)

    frames = [mask[t, b] for t in range(steps) for b in range(batch)]
    columns = [[frame[j] for frame in frames] for j in range(gates)]
    return {
        "dx": product(frames, inputs),
        "dh": sum(product(mask[t], gates // 4) for t in range(steps)),
        "dW": product(columns, inputs),
        "dU": product(columns, gates // 4),
    }


masks = st.builds(
    lambda steps, batch, hidden, density, seed: np.random.default_rng(seed).random((steps, batch, 4 * hidden)) < density,
    *(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.floats(0.0, 1.0), st.integers(0, 999)),
)
machines = st.builds(Accelerator, st.integers(1, 5), st.integers(1, 5), st.none() | st.integers(1, 25))
inputs = st.integers(1, 7)


def test_one_element_takes_a_cycle_for_each_mac():
    """H 2, D 3: 8 entries a row, 2 steps of 2 sequences, 5 entries of 32 not zero."""
    mask = mask_of([["10010000", "00000000"], ["01000000", "10000001"]])
    one = Accelerator(lanes=1, width=1)
    cycles = simulate(mask, D, one)
    assert {name: c.dense for name, c in cycles.items()} == {p.name: p.macs for p in lstm_products(D, 2, 2, 2)}
    assert simulated(mask, one) == {"W x": 96, "U h": 64, "dx": 15, "dh": 10, "dW": 15, "dU": 10}
    assert cycles["dx"] == Cycles(bound=96, ideal=15, dense=96, simulated=15)


def test_a_dnet_of_zeros_takes_no_time_but_that_of_looking():
    """4 rows of 8 entries, 3 a cycle: 3 cycles a row. 8 columns of 4 entries: 2 cycles a column. Two lanes each."""
    mask = np.zeros((2, 2, 8), bool)
    free = simulate(mask, D, Accelerator(2, 2))
    assert [free[name].simulated for name in BACKWARD] == [0, 0, 0, 0]
    assert free["dx"].speedup == free["dx"].ideal_speedup == math.inf
    found = simulated(mask, Accelerator(2, 2, scan=3))
    assert [found[name] for name in BACKWARD] == [2 * 3, 2 * 3, 4 * 2, 4 * 2]


@pytest.mark.parametrize("scan", [None, 1, 5, 64])
def test_a_dense_dnet_takes_as_long_as_on_the_machine_that_skips_nothing(scan):
    """Two lanes over 2 sequences, two elements each: D 3 takes 2 turns, H 2 takes 1."""
    cycles = simulate(np.ones((2, 2, 8), bool), D, Accelerator(2, 2, scan))
    by_hand = {"W x": 2 * 3 * 4, "U h": 2 * 2 * 4, "dx": 2 * 8 * 2, "dh": 2 * 8 * 1, "dW": 4 * 4 * 2, "dU": 4 * 4 * 1}
    assert {name: c.simulated for name, c in cycles.items()} == by_hand
    assert {name: c.dense for name, c in cycles.items()} == by_hand
    assert cycles["dx"].bound == cycles["dx"].ideal == 4 * 8 * 3 / 4


def test_one_full_row_keeps_one_lane_busy():
    """One sequence of four has all of dnet, H 2: its lane does the work of dx and dh, while columns are dealt evenly."""
    mask = mask_of([["11111111", "00000000", "00000000", "00000000"]])
    found = simulate(mask, D, Accelerator(lanes=4, width=1))
    assert {name: found[name].simulated for name in BACKWARD} == {"dx": 24, "dh": 16, "dW": 6, "dU": 4}
    assert {name: found[name].ideal for name in BACKWARD} == {"dx": 6, "dh": 4, "dW": 6, "dU": 4}
    assert found["dx"].speedup == 1.0


def test_two_lanes_wait_for_each_other_after_every_step_in_dh_and_once_in_dx():
    """Sequence 0 has 6 and 2 entries in two steps, sequence 1 has 2 and 4: 6 + 4 for dh, the larger of 8 and 6 for dx."""
    mask = mask_of([["11111100", "11000000"], ["11000000", "11110000"]])
    found = simulate(mask, D, Accelerator(lanes=2, width=4))
    assert (found["dh"].simulated, found["dx"].simulated) == (10, 8)
    assert found["dh"].ideal == 14 * 2 / 8


def test_lanes_wait_after_every_step_in_uh_and_once_in_wx():
    """3 sequences on 2 lanes, 2 steps, H 2: two turns a step make 4 for U h, 6 rows make 3 for W x; 8 outputs a turn."""
    found = simulate(np.ones((2, 3, 8), bool), D, Accelerator(lanes=2, width=8))
    assert (found["U h"].simulated, found["W x"].simulated) == (4 * 2, 3 * D)
    assert (found["U h"].bound, found["W x"].bound) == (6 * 2 / 2, 6 * D / 2)


def test_columns_of_one_gate_are_dealt_to_lanes_in_turn():
    """Columns 0 and 2 have 3 entries each, and one lane of two: it does all of dW."""
    mask = mask_of([["10100000"] * 3])
    assert simulated(mask, Accelerator(2, 3))["dW"] == 6
    assert simulated(mask_of([["11000000"] * 3]), Accelerator(2, 3))["dW"] == 3


def test_looking_for_entries_bounds_what_is_gained():
    """A row of 64 with one entry, 16 a cycle: three empty groups, and one that costs what its entry does."""
    mask = np.zeros((1, 1, 64), bool)
    mask[0, 0, 20] = True
    assert simulated(mask, Accelerator(1, 16, scan=16), inputs=16)["dx"] == 3 + 1
    assert simulated(mask, Accelerator(1, 4, scan=16), inputs=16)["dx"] == 3 + 4
    assert simulated(mask, Accelerator(1, 16, scan=None), inputs=16)["dx"] == 1
    assert simulated(mask, Accelerator(1, 16, scan=1), inputs=16)["dx"] == 64, "one entry a cycle is no faster than dense"


@settings(max_examples=60, deadline=None)
@given(masks, inputs, machines)
def test_cycles_are_those_of_the_rules_lane_by_lane(mask, inputs, machine):
    found = simulate(mask, inputs, machine)
    assert {name: found[name].simulated for name in BACKWARD} == lane_by_lane(mask, inputs, machine)
    whole = lane_by_lane(np.ones_like(mask), inputs, Accelerator(machine.lanes, machine.width))
    assert {name: found[name].dense for name in BACKWARD} == whole


@settings(max_examples=40, deadline=None)
@given(masks, inputs, machines)
def test_cycles_lie_between_ideal_and_dense(mask, inputs, machine):
    for cycles in simulate(mask, inputs, machine).values():
        assert cycles.ideal <= cycles.simulated <= cycles.dense
        assert cycles.ideal <= cycles.bound <= cycles.dense


@settings(max_examples=40, deadline=None)
@given(masks, inputs, machines, st.integers(2, 3), st.integers(0, 4))
def test_a_multiple_of_the_lanes_or_wider_ones_are_never_slower(mask, inputs, machine, times, wider):
    larger = Accelerator(machine.lanes * times, machine.width + wider, machine.scan)
    few, many = simulate(mask, inputs, machine), simulate(mask, inputs, larger)
    for name in (*FORWARD, *BACKWARD):
        assert many[name].simulated <= few[name].simulated
        assert many[name].dense <= few[name].dense


@settings(max_examples=40, deadline=None)
@given(masks, inputs, machines, st.integers(0, 999))
def test_the_order_of_sequences_changes_no_mac_counts(mask, inputs, machine, seed):
    """Nor the time of what is summed over them, where looking is free; who waits for whom may change."""
    mixed = mask[:, np.random.default_rng(seed).permutation(mask.shape[1])]
    before, after = simulate(mask, inputs, machine), simulate(mixed, inputs, machine)
    for name in (*FORWARD, *BACKWARD):
        assert (before[name].bound, before[name].ideal, before[name].dense) == (
            after[name].bound,
            after[name].ideal,
            after[name].dense,
        )
        if machine.scan is None and name in ("dW", "dU"):
            assert before[name].simulated == after[name].simulated


@settings(max_examples=40, deadline=None)
@given(masks, inputs, machines)
def test_work_is_that_of_the_mac_accounting(mask, inputs, machine):
    found = simulate(mask, inputs, machine)
    steps, batch, gates = mask.shape
    for product in lstm_products(inputs, gates // 4, steps, batch):
        work = product.macs * (mask.mean() if product.thresholded else 1.0)
        assert found[product.name].bound * machine.elements == pytest.approx(product.macs)
        assert found[product.name].ideal * machine.elements == pytest.approx(work)


def test_layers_and_products_add_up():
    mask = np.random.default_rng(0).random((4, 6, 20)) < 0.2
    layer = simulate(mask, D, Accelerator(2, 2, 4)).values()
    both = total([*layer, *layer])
    assert both.simulated == 2 * sum(c.simulated for c in layer)
    assert both.ideal_speedup == pytest.approx(sum(c.bound for c in layer) / sum(c.ideal for c in layer))
    assert both.speedup == pytest.approx(sum(c.dense for c in layer) / sum(c.simulated for c in layer))


def test_the_output_layer_is_dense():
    """10 symbols, H 4, 6 frames, 2 lanes of 4 elements: 3 rows of 4 entries in 3 turns; 3 of 10 in 1; 5 of 6 in 1."""
    found = simulate_output(10, 4, 6, Accelerator(2, 4, scan=8))
    assert {name: c.simulated for name, c in found.items()} == {"V h": 36, "dh": 30, "dV": 30}
    assert all(c.bound == c.ideal == 10 * 4 * 6 / 8 and c.dense == c.simulated for c in found.values())


@given(st.integers(1, 8), st.integers(1, 40), st.floats(0.0, 0.99), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_column_top_k_keeps_the_strongest_columns_whole(batch, columns, sparsity, seed):
    dnet = torch.randn(
        batch, columns, generator=torch.Generator().manual_seed(seed), dtype=(torch.float32, torch.float64)[seed % 2]
    )
    kept = ColumnTopK(sparsity)(dnet.clone())
    stays = (kept != 0).any(0)
    assert int((~stays).sum()) == round(sparsity * columns)
    assert torch.equal(kept[:, stays], dnet[:, stays])
    norms = dnet.double().square().sum(0)
    assert round(sparsity * columns) in (0, columns) or norms[stays].min() > norms[~stays].max()


def test_column_top_k_does_not_depend_on_the_scale_of_the_loss_down_to_the_smallest_floats():
    dnet = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ColumnTopK(0.8)(dnet * 2.0**-100) != 0, ColumnTopK(0.8)(dnet.clone()) != 0)


def test_column_top_k_does_not_hide_divergence_and_one_sequence_makes_it_top_k():
    dnet = torch.tensor([[1.0, math.nan, 3.0, 4.0], [1.0, 0.0, 0.0, math.inf]])
    kept = ColumnTopK(0.5)(dnet.clone())
    assert kept[0, 1].isnan()
    assert kept[1, 3].isinf()
    assert kept[:, 0].tolist() == kept[:, 2].tolist() == [0.0, 0.0]
    row = torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ColumnTopK(0.7)(row.clone()), TopK(0.7)(row.clone()))
    assert repr(ColumnTopK(0.8)) == "ColumnTopK(0.8)"
    with pytest.raises(ReproError, match=r"sparsity is 1.0: it must be a number in \[0, 1\)"):
        ColumnTopK(1.0)


def test_a_layer_trained_with_column_top_k_makes_zeros_that_dense_hardware_can_skip():
    """Its rule sees each step: the masks it leaves are structured, those of TopK at the same sparsity are not."""

    class Seen(ColumnTopK):
        masks: list

        def __call__(self, dnet, site=0):
            kept = super().__call__(dnet, site)
            self.masks.append((kept != 0).numpy().copy())
            return kept

    torch.manual_seed(0)
    rule = Seen(0.75)
    rule.masks = []
    lstm = ThresholdedLSTM(6, 10, threshold=rule)
    lstm(torch.randn(7, 8, 6))[0].square().sum().backward()
    mask = np.stack(rule.masks)
    assert mask.shape == (7, 8, 40)
    gone = (~mask.any(1)).mean(1)
    assert (gone[:-1] == 0.75).all()
    assert gone[-1] >= 0.75, "the first step's dnet of f is zero, as c_0 is"
    assert all(torch.isfinite(p.grad).all() for p in lstm.parameters())


NO_MASKS = {"numbers": np.ones((2, 2, 8)), "a step": np.ones((2, 8), bool), "6 gates": np.ones((2, 2, 6), bool)}


@pytest.mark.parametrize("mask", NO_MASKS.values(), ids=NO_MASKS)
def test_what_is_no_mask_is_named(mask):
    with pytest.raises(ReproError, match=r"boolean \(steps, batch, 4 hidden\) is needed"):
        simulate(mask, D, Accelerator(1, 1))


def test_empty_masks_and_sizes_below_one_are_named():
    with pytest.raises(ReproError, match=r"mask \(0, 2, 8\) is empty"):
        simulate(np.ones((0, 2, 8), bool), D, Accelerator(1, 1))
    with pytest.raises(ReproError, match="inputs is 0: it must be an integer, at least 1"):
        simulate(np.ones((2, 2, 8), bool), 0, Accelerator(1, 1))
    for sizes, name in (((0, 1), "lanes"), ((1, -1), "width"), ((1, 1, 0), "scan")):
        with pytest.raises(ReproError, match=f"{name} is .*: it must be an integer, at least 1"):
            Accelerator(*sizes)
    with pytest.raises(ReproError, match=r"lanes is 1\.5"):
        Accelerator(1.5, 2)
    with pytest.raises(ReproError, match="symbols is 0"):
        simulate_output(0, 4, 6, Accelerator(1, 1))
