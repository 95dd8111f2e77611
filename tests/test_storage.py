"""Bytes of pruned weights and what fits on a chip: the paper's own numbers, closed forms, and the order of the formats."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.errors import ReproError
from repro.sparse.storage import INDEXES, megabytes, on_chip_speedup, register_gbps, stored_bytes, units_on_chip

MIB = 2**20


@st.composite
def matrices(draw):
    """(rows, columns, nonzero) of a matrix with a density of at least 1 in 1,000."""
    rows, columns = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    nonzero = draw(st.integers(math.ceil(rows * columns / 1000), rows * columns))
    return rows, columns, nonzero


@pytest.mark.parametrize(
    ("parameters", "printed", "unit"),
    [(67e6, 268, 1e6), (115e6, 460, 1e6), (8.3e6, 32, MIB), (16.7e6, 64, MIB), (13e6, 50, MIB)],
)
def test_sizes_printed_in_section_5_2_are_values_without_positions(parameters, printed, unit):
    """All five follow from 4 bytes per weight and no index: the dense ones in MB, the sparse ones, as printed, in MiB."""
    assert round(stored_bytes(parameters, parameters) / unit) == printed
    assert megabytes(parameters, parameters) == pytest.approx(4 * parameters / 1e6)


def test_a_sparse_size_is_not_what_is_printed_in_megabytes():
    """33.2 MB where the paper prints 32: the reading above is needed."""
    assert megabytes(67e6, 8.3e6) == pytest.approx(33.2)
    assert megabytes(67e6, 16.7e6) == pytest.approx(66.8)


def test_four_byte_indices_double_the_size():
    assert megabytes(67e6, 8.3e6, index="csr32") == pytest.approx(2 * 33.2)
    assert megabytes(67e6, 8.3e6, index="csr16") == pytest.approx(1.5 * 33.2)


@pytest.mark.parametrize(
    ("rows", "columns", "moved"),
    [(1760, 1760, 1.24), (2560, 2560, 2.62), (3072, 3072, 3.77), (7680, 2560, 7.86), (10704, 3568, 15.3)],
)
def test_bytes_behind_table_6(rows, columns, moved):
    """At 95 % and 8 bytes per non-zero; the row pointers that the derivation leaves out are under 1 %."""
    nonzero = round(0.05 * rows * columns)
    bare = megabytes(rows * columns, nonzero, index="csr32")
    assert bare == pytest.approx(moved, rel=0.005)
    assert megabytes(rows * columns, nonzero, index="csr32", rows=rows) == pytest.approx(bare + 4 * (rows + 1) / 1e6)


def test_every_format_of_a_small_matrix():
    """16 x 32 weights, a quarter kept, 2-byte values: 512 weights, 128 values, 17 pointers, H(1/4) = 2 - 3/4 log2(3)."""

    def size(index):
        return stored_bytes(512, 128, value_bytes=2, index=index, rows=16)

    assert size("dense") == 1024
    assert size("none") == 256
    assert size("csr32") == 256 + 512 + 68
    assert size("csr16") == 256 + 256 + 68
    assert size("bitmap") == 256 + 64
    assert size("entropy") == pytest.approx(256 + 512 / 8 * (2 - 0.75 * math.log2(3)))


@pytest.mark.parametrize(("density", "expected"), [(0.10, 4.59), (0.05, 4.72)])
def test_information_minimum_per_nonzero(density, expected):
    """4 bytes + H(p)/p bits."""
    n = 1760 * 1760
    assert stored_bytes(n, density * n, index="entropy") / (density * n) == pytest.approx(expected, abs=0.005)


@settings(deadline=None)
@given(matrices())
def test_entropy_is_between_bare_values_and_every_real_format(matrix):
    rows, columns, nonzero = matrix
    size = {index: stored_bytes(rows * columns, nonzero, index=index, rows=rows) for index in INDEXES}
    least = size["entropy"] * (1 - 1e-12)
    assert size["none"] <= size["entropy"]
    assert all(least <= size[index] for index in ("bitmap", "csr32", "csr16"))
    assert size["csr16"] <= size["csr32"]


@settings(deadline=None)
@given(matrices())
def test_a_bitmap_beats_indices_exactly_above_one_weight_in_their_width(matrix):
    """n bits against 32 k, or 16 k, bits."""
    rows, columns, nonzero = matrix
    n = rows * columns
    bitmap = stored_bytes(n, nonzero, index="bitmap")
    assert (bitmap < stored_bytes(n, nonzero, index="csr32")) == (32 * nonzero > n)
    assert (bitmap < stored_bytes(n, nonzero, index="csr16")) == (16 * nonzero > n)


@settings(deadline=None)
@given(matrices(), st.sampled_from([index for index in INDEXES if index != "dense"]), st.data())
def test_more_nonzeros_never_take_fewer_bytes(matrix, index, data):
    """Values of 4 bytes outweigh what a fuller mask saves in entropy."""
    rows, columns, nonzero = matrix
    more = data.draw(st.integers(nonzero, rows * columns))
    sizes = [stored_bytes(rows * columns, k, index=index, rows=rows) for k in (nonzero, more)]
    assert sizes[0] <= sizes[1] * (1 + 1e-12)


@settings(deadline=None)
@given(st.lists(matrices(), min_size=1, max_size=4), st.sampled_from(INDEXES))
def test_a_list_of_matrices_is_the_sum_of_its_matrices(model, index):
    rows, columns, nonzero = zip(*model, strict=True)
    parameters = [r * c for r, c in zip(rows, columns, strict=True)]
    alone = [stored_bytes(n, k, index=index, rows=r) for n, k, r in zip(parameters, nonzero, rows, strict=True)]
    assert stored_bytes(parameters, nonzero, index=index, rows=rows) == pytest.approx(sum(alone))


def test_totals_overstate_the_entropy_of_unlike_matrices():
    """One full and one empty matrix need no positions at all; their totals look like a half-filled one."""
    assert stored_bytes([800, 800], [800, 0], index="entropy") == 3200
    assert stored_bytes(1600, 800, index="entropy") == 3200 + 200


@pytest.mark.parametrize(("units", "sparsity", "used"), [(2600, 0.0, 13.52), (8000, 0.9, 12.8), (24000, 0.99, 11.52)])
def test_units_of_section_6_2_fit_only_without_indices(units, sparsity, used):
    """Values alone fit the P100's 14,336 KiB of registers, as printed; with a 2-byte column each, the sparse ones do not."""
    registers = 14336 * 1024
    assert megabytes(units**2, round((1 - sparsity) * units**2), value_bytes=2) == pytest.approx(used)
    assert units_on_chip(used * 1e6, sparsity) == units
    assert units_on_chip(registers, sparsity) >= units
    if sparsity:
        assert units_on_chip(registers, sparsity, index="csr16") < units


@settings(deadline=None)
@given(st.integers(0, 10**8), st.floats(0, 0.995), st.sampled_from([0.5, 1, 2, 4]), st.sampled_from(INDEXES))
def test_units_on_chip_is_the_largest_that_fits(capacity, sparsity, value_bytes, index):
    units = units_on_chip(capacity, sparsity, value_bytes=value_bytes, index=index)

    def needed(h):
        return stored_bytes(h * h, round((1 - sparsity) * h * h), value_bytes=value_bytes, index=index, rows=h)

    assert units == 0 or needed(units) <= capacity
    assert needed(units + 1) > capacity


def test_two_byte_columns_end_at_65536_units():
    assert units_on_chip(10**10, 0.99, index="csr16") == 2**16
    assert units_on_chip(10**10, 0.99, index="csr32") > 2**16


def test_146x_is_titanx_registers_over_titanx_memory():
    """Data sheet figures, not the paper's: 3,072 lanes, 1 GHz, 336.5 GB/s."""
    registers = register_gbps(3072, 1.0)
    assert registers == 49152
    assert round(on_chip_speedup(336.5, registers)) == 146
    assert on_chip_speedup(100, 300, byte_ratio=10) == 30


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: stored_bytes(10, 5, index="csr64"), "csr16"),
        (lambda: stored_bytes(10, 11), "between 0 and"),
        (lambda: stored_bytes(10, -1), "between 0 and"),
        (lambda: stored_bytes(0, 0), "at least 1"),
        (lambda: stored_bytes([10, 10], [5]), "one of each per matrix"),
        (lambda: units_on_chip(1e6, 1.0), r"\[0, 1\)"),
        (lambda: units_on_chip(-1, 0.5), "positive"),
        (lambda: on_chip_speedup(0, 1), "positive"),
    ],
)
def test_impossible_sizes_are_refused(call, complaint):
    with pytest.raises(ReproError, match=complaint):
        call()
