"""Products with sparse matrices: right for every shape, mask, batch and thread count, on both code paths."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.errors import ReproError
from repro.sparse import SparseMatrix, kernels, packing, regions, simd
from repro.sparse.matrix import FORMATS, DenseMatrix
from repro.sparse.packing import SLOT_BYTES, WINDOW, pack_csr, pack_windows, unpack_windows

AVX512 = simd.has_avx512()
HERE = [format for format in FORMATS if AVX512 or format == "CSR"]
needs_avx512 = pytest.mark.skipif(not AVX512, reason="this processor has no AVX-512")
# Largest deviation from the float64 product, over the largest |w| |x| that could add up; float32 sums cost a few 1e-7.
ALLOWED = {"P64": 4e-6, "P64 exact": 1e-6, "P16": 1e-3, "CSR": 1e-6}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def masked(rows, columns, density, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < density)
    return weights.astype(np.float32)


def assert_close(weights, x, y, format):
    """Entry by entry, against what rounding of weights and sums can amount to."""
    x = x.astype(np.float64)
    exact = weights.astype(np.float64) @ x
    if format == "P16":  # weights are off by a share of the largest of their row
        room = np.abs(weights).max(axis=1, initial=0.0)[:, None] * (weights != 0) @ np.abs(x)
    else:
        room = np.abs(weights.astype(np.float64)) @ np.abs(x)
    assert y.dtype == np.float32 and y.shape == exact.shape
    assert np.all(np.abs(y - exact) <= ALLOWED[format] * room)


@pytest.mark.parametrize("format", HERE)
@pytest.mark.parametrize("batch", [None, 1, 2, 3, 4, 5, 8, 9, 17, 33, 65])
def test_products_are_those_of_float64(format, batch, threads):
    """All formats, all registers a batch may fill, columns that end within a window, rows that end within a group."""
    for rows, columns, density in [(1, 1, 1.0), (3, 70, 0.5), (40, 33, 0.1), (200, 150, 0.05), (65, 129, 1.0)]:
        weights = masked(rows, columns, density, seed=rows)
        shape = columns if batch is None else (columns, batch)
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        assert_close(weights, x, SparseMatrix(weights, format=format) @ x, format)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 140),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
    format=st.sampled_from(HERE),
    batch=st.sampled_from([None, 1, 3]),
)
def test_products_of_any_shape(rows, columns, density, seed, format, batch):
    """Empty rows, rows longer than a window, columns without weights: whatever the mask, the product is right."""
    weights = masked(rows, columns, density, seed)
    weights[np.random.default_rng(seed).random(rows) < 0.3] = 0
    x = np.random.default_rng(seed + 1).standard_normal(columns if batch is None else (columns, batch)).astype(np.float32)
    assert_close(weights, x, SparseMatrix(weights, format=format) @ x, format)


@pytest.mark.parametrize("format", HERE)
def test_all_zero_dense_and_uneven_masks(format, threads):
    """A matrix of zeros gives zeros; one full row among empty ones, and all weights in one column, are products as any."""
    x = np.linspace(-1, 1, 300, dtype=np.float32)
    assert not (SparseMatrix(np.zeros((20, 300), np.float32), format=format) @ x).any()
    row, column = np.zeros((2, 50, 300), np.float32)
    row[7] = 2.5
    column[:, 299] = 1.5
    for weights in (row, column):
        assert_close(weights, x, SparseMatrix(weights, format=format) @ x, format)


@pytest.mark.parametrize("format", HERE)
@pytest.mark.parametrize("batch", [None, 2, 20])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinities_and_nan_give_what_the_dense_product_gives(format, batch, bad):
    """Zero times infinity is NaN in the dense product, and empty places in slots must not make it so anywhere else."""
    weights = masked(40, 90, 0.3, seed=5)
    weights[:, 7] = np.abs(weights[:, 7]) + 1  # a column that no row skips
    x = np.random.default_rng(2).standard_normal(90 if batch is None else (90, batch)).astype(np.float32)
    for place in (7, 8, 64, 89):
        spoilt = x.copy()
        spoilt[place if batch is None else (place, 1)] = bad
        with np.errstate(invalid="ignore"):
            dense = weights @ spoilt
        y = SparseMatrix(weights, format=format) @ spoilt
        assert np.array_equal(np.isnan(y), np.isnan(dense))
        assert np.array_equal(y[np.isinf(dense)], dense[np.isinf(dense)])
        assert np.allclose(y[np.isfinite(dense)], dense[np.isfinite(dense)], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("format", HERE)
def test_strided_and_misaligned_vectors(format):
    """x may be any view: every second entry, reversed, transposed, or one that starts four bytes off."""
    weights = masked(30, 64, 0.3)
    rng = np.random.default_rng(3)
    wide, tall = rng.standard_normal(200).astype(np.float32), rng.standard_normal((40, 64)).astype(np.float32)
    matrix = SparseMatrix(weights, format=format)
    for x in (wide[:128:2], wide[63::-1], wide[1:65], tall.T, tall[::2].T, tall[:3].T, np.asfortranarray(tall.T[:, ::3])):
        assert_close(weights, x, matrix @ x, format)


@pytest.mark.parametrize("format", HERE)
def test_dense_form_is_the_matrix_that_is_used(format):
    """`todense` has the zeros of the weights, and their values within the rounding that the format states."""
    weights = masked(70, 200, 0.2, seed=9)
    dense = SparseMatrix(weights, format=format).todense()
    share = {"P64": 2.0**-19, "P64 exact": 0, "CSR": 0}
    if format == "P16":
        limit = 16.5 / 32735 * np.abs(weights).max(axis=1, keepdims=True) * (weights != 0)
    else:
        limit = share[format] * np.abs(weights)
    assert np.all(np.abs(dense - weights) <= limit)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 3e38])
@needs_avx512
def test_weights_of_any_size(scale):
    """The exponent bit that holds a place costs no range: weights near both ends of float32 keep their precision."""
    weights = masked(20, 100, 0.5, seed=4)
    weights *= np.float32(scale) / np.abs(weights).max()
    dense = SparseMatrix(weights, format="P64").todense()
    assert np.all(np.abs(dense.astype(float) - weights) <= 2.0**-19 * np.abs(weights) + 1.5e-45 * 32)


@pytest.mark.parametrize("kind", WINDOW)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 1.0])
def test_every_weight_has_a_place_of_its_own(kind, density):
    """Packing alone, on any processor: nothing is lost, nothing doubled, and windows begin at multiples of 16."""
    weights = masked(37, 300, density, seed=8)
    packed = pack_windows(weights, kind)
    assert packed.nonzero == np.count_nonzero(weights)
    rounded_off = 17 / 32735 * np.abs(weights).max(axis=1, keepdims=True) if kind == "P16" else 0
    found = unpack_windows(packed, kind, weights.shape) != 0
    assert not found[weights == 0].any() and found[np.abs(weights) > rounded_off].all()
    assert not (packed.starts % 16).any() and (packed.starts < 300).all()
    assert packed.slots.shape == (len(packed.starts) * packed.count, SLOT_BYTES[kind])
    assert packed.groups[-1] == len(packed.starts)
    assert not packed.slots.size or packed.slots.ctypes.data % 64 == 0


def test_windows_are_well_filled():
    """What the format is for: at 90 % zeros at least 70 of 100 places hold a weight, at 95 % at least half."""
    for density, least in ((0.1, 0.70), (0.05, 0.50)):
        packed = pack_windows(masked(320, 1760, density), "P64")
        assert packed.nonzero / (16 * len(packed.slots)) > least


def test_csr_rows_are_filled_up_with_zeros():
    """Pointers and columns are those of scipy's CSR but for the zeros at the end of rows."""
    weights = masked(9, 40, 0.2)
    csr = pack_csr(weights)
    for row in range(9):
        part = slice(csr.pointers[row], csr.pointers[row + 1])
        kept = np.flatnonzero(weights[row])
        assert np.array_equal(csr.columns[part][: len(kept)], kept)
        assert np.array_equal(csr.values[part][: len(kept)], weights[row, kept])
        assert not csr.values[part][len(kept) :].any() and (part.stop - part.start) % packing.CSR_UNIT == 0


def test_columns_beyond_two_bytes():
    """From 65,537 columns on, indices are wider."""
    weights = np.zeros((3, 70_000), np.float32)
    weights[1, [0, 65_535, 65_536, 69_999]] = [1, 2, 3, 4]
    x = np.arange(70_000, dtype=np.float32)
    for format in HERE:
        expected = float(weights[1].astype(float) @ x)
        assert (SparseMatrix(weights, format=format) @ x)[1] == pytest.approx(expected, rel=ALLOWED[format])
    y = SparseMatrix(weights, format="CSR") @ np.stack([x, -x], axis=1)
    assert y[1].tolist() == pytest.approx([expected, -expected])


def test_the_region_does_all_parts_whatever_the_threads(monkeypatch):
    """More parts than threads, and a process without OpenMP, still give the whole product."""
    weights, x = masked(300, 100, 0.2), np.ones(100, np.float32)
    matrix = SparseMatrix(weights, format="CSR")
    y = np.empty(300, np.float32)
    kernel = kernels.times_vector(2)
    for parts in (1, 3, 8):
        y[:] = np.nan
        assert kernel(matrix._plans[parts], x, y)
        assert_close(weights, x, y, "CSR")
    monkeypatch.setattr(regions, "_openmp", lambda: (0, 0, 0))
    alone = SparseMatrix(weights, format="CSR")
    assert_close(weights, x, alone @ x, "CSR")


def test_dense_product_is_right(threads):
    """The dense opponent computes the same thing."""
    weights, x = masked(50, 70, 1.0), np.random.default_rng(0).standard_normal(70).astype(np.float32)
    assert_close(weights, x, DenseMatrix(weights) @ x, "CSR")


def test_format_follows_batch_and_processor(monkeypatch):
    """Windows for single vectors where AVX-512 is there, rows for batches and elsewhere."""
    weights = masked(8, 8, 0.5)
    assert SparseMatrix(weights, batch=16).format == "CSR"
    assert SparseMatrix(weights).format == ("P64" if AVX512 else "CSR")
    monkeypatch.setattr("repro.sparse.matrix.has_avx512", lambda: False)
    assert SparseMatrix(weights).format == "CSR"
    with pytest.raises(ReproError, match="AVX-512"):
        SparseMatrix(weights, format="P64")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SparseMatrix(np.ones((2, 2))), "float64.*float32"),
        (lambda: SparseMatrix(np.ones(2, np.float32)), r"\(2,\)"),
        (lambda: SparseMatrix(np.full((2, 2), np.nan, np.float32)), "NaN"),
        (lambda: SparseMatrix(np.ones((2, 2), np.float32), batch=0), "batch is 0"),
        (lambda: SparseMatrix(np.ones((2, 2), np.float32), format="ELL"), "CSR"),
        (lambda: SparseMatrix(np.ones((2, 3), np.float32)) @ np.ones(2, np.float32), r"\(3,\)"),
        (lambda: SparseMatrix(np.ones((2, 3), np.float32)) @ np.ones(3), "float64"),
        (lambda: SparseMatrix(np.ones((2, 3), np.float32)) @ np.ones((3, 1, 1), np.float32), "batch"),
    ],
)
def test_refusals_say_what_would_be_right(make, words):
    """Nothing is multiplied that does not fit: addresses are taken only of checked arrays."""
    with pytest.raises(ReproError, match=words):
        make()


PROGRAM = """
import numpy as np
from repro.sparse import SparseMatrix, simd
assert not simd.has_avx512()
rng = np.random.default_rng(0)
weights = (rng.standard_normal((200, 300)) * (rng.random((200, 300)) < 0.1)).astype(np.float32)
matrix = SparseMatrix(weights)
assert matrix.format == "CSR"
for x in (rng.standard_normal(300), rng.standard_normal((300, 5)), rng.standard_normal((300, 40))):
    exact = weights.astype(float) @ x
    assert np.abs(matrix @ x.astype(np.float32) - exact).max() < 1e-5 * np.abs(exact).max()
print("right")
"""


@pytest.mark.parametrize("processor", ["haswell", "generic"])
def test_on_a_processor_without_avx512(processor):
    """The portable path, compiled for older processors: chosen before anything is compiled, or the process would abort."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert answer.stdout.strip() == "right", answer.stderr[-2000:]
