"""Products by packed panels are those of NumPy, whole or by non-zero entries, for any shape and number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.gradients.panels import memory
from repro.gradients.products import packed, transpose
from repro.sparse.regions import make_plan, run
from repro.sparse.simd import has_avx2, has_avx512
from repro.studies.speeds import AVX2_ALONE

pytestmark = pytest.mark.skipif(not has_avx2(), reason="needs AVX2")
CLOSE = 1e-6  # of the largest entry; measured: 3e-7


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


def draw(rows: int, columns: int, density: float | np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, columns), dtype=np.float32)
    return values * (generator.random((rows, columns)) < density)


def assert_product(a, b, *, packed_transposed: bool, sparse: bool):
    wanted = a.astype(np.float64) @ b
    product = packed(np.ascontiguousarray(b.T) if packed_transposed else b, transposed=packed_transposed)
    found = np.full(wanted.shape, np.nan, np.float32)
    product(a, found, sparse=sparse)
    assert np.abs(found - wanted).max() <= CLOSE * max(np.abs(wanted).max(), 1e-30)


@settings(max_examples=40)
@given(
    rows=st.one_of(st.integers(1, 20), st.sampled_from([255, 256, 300, 650])),
    inner=st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 300])),
    columns=st.sampled_from([1, 16, 17, 50, 64, 65, 80, 81, 128, 144, 150]),
    density=st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    threads=st.integers(1, 3),
    packed_transposed=st.booleans(),
    a_transposed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_product_is_numpys(rows, inner, columns, density, threads, packed_transposed, a_transposed, seed):
    """Rows, depths and columns around every size of tile, block, panel and register; also more threads than rows."""
    a, b = draw(rows, inner, density, seed), draw(inner, columns, 1.0, seed + 100)
    torch.set_num_threads(threads)
    assert_product(a, b, packed_transposed=packed_transposed, sparse=False)
    assert_product(np.asfortranarray(a) if a_transposed else a, b, packed_transposed=packed_transposed, sparse=True)


def test_all_work_in_one_row_or_one_block_is_shared_out_without_loss():
    """Bounds equal in non-zero entries may leave threads without rows."""
    torch.set_num_threads(3)
    for place in (0, 150, 299):
        a, b = np.zeros((300, 400), np.float32), draw(400, 70, 1.0, 1)
        a[place] = draw(1, 400, 1.0, 2)
        assert_product(a, b, packed_transposed=False, sparse=True)


@settings(max_examples=40)
@given(
    rows=st.sampled_from([1, 7, 20, 300]),
    by_block=st.lists(st.sampled_from([0.0, 0.01, 0.06, 0.3, 1.0]), min_size=1, max_size=6),
    rest=st.integers(0, 127),
    columns=st.sampled_from([64, 70, 150]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_rows_may_have_few_entries_in_some_blocks_and_many_in_others(rows, by_block, rest, columns, threads, seed):
    """Whatever blocks a row's entries are listed by: first, last, none, some or all by themselves, the others together."""
    inner = 128 * len(by_block) + rest
    density = np.repeat([*by_block, 0.06], 128)[:inner]
    orders = np.random.default_rng(seed).permuted(np.tile(np.arange(len(by_block)), (rows, 1)), axis=1)
    density = np.take_along_axis(np.tile(density, (rows, 1)), block_order(orders, inner), 1)
    torch.set_num_threads(threads)
    assert_product(draw(rows, inner, density, seed), draw(inner, columns, 1.0, 1), packed_transposed=False, sparse=True)


def block_order(orders: np.ndarray, inner: int) -> np.ndarray:
    """(rows, inner) columns, blocks of 128 in another order in each row; what is left stays last."""
    blocks = (128 * orders[:, :, None] + np.arange(128)).reshape(len(orders), -1)
    return np.hstack([blocks, np.tile(np.arange(blocks.shape[1], inner), (len(orders), 1))])


def test_more_rows_of_b_than_16_bits_count():
    a, b = draw(3, 2**16 + 200, 0.01, 1), draw(2**16 + 200, 20, 1.0, 2)
    assert_product(a, b, packed_transposed=False, sparse=True)


def test_nan_and_infinity_of_a_are_entries_like_others():
    a, b = draw(4, 200, 0.1, 1), draw(200, 30, 1.0, 2)
    a[1, 7], a[2, 150] = np.nan, np.inf
    product, found = packed(b), np.zeros((4, 30), np.float32)
    product(a, found, sparse=True)
    assert np.isnan(found[1]).all()
    assert np.isinf(found[2]).all()
    assert np.isfinite(found[[0, 3]]).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_single_column_may_lie_apart(sparse):
    """Where there is one column, the distance between columns says nothing, and torch calls such a view contiguous."""
    a, b = draw(20, 50, 0.5, 1)[:, :1], draw(1, 90, 1.0, 2)
    assert_product(a, b, packed_transposed=False, sparse=sparse)


def test_a_part_without_rows_touches_nothing():
    """It has the number of a neighbour, which may be at work: what the neighbour has noted has to stay."""
    product = packed(draw(200, 70, 1.0, 1))
    product(draw(300, 200, 0.2, 2), np.empty((300, 70), np.float32), sparse=True)
    noted = memory("present", 0).array
    before = noted.copy()
    assert before.any()
    plan = make_plan([6, 6], (product.arguments.ctypes.data,))
    run(plan, product.sparse)
    assert np.array_equal(noted, before)


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 100), (700, 30), (5, 1000)])
def test_transposed(shape):
    matrix = draw(*shape, 1.0, 3)
    torch.set_num_threads(2)
    assert np.array_equal(transpose("test", matrix), matrix.T)


@pytest.mark.parametrize("columns", [(64, 90), (1, 90), (90, 1)])
def test_lists_serve_a_second_product_with_the_same_a(columns):
    """Also where one of them is small enough for one thread, and the other is not."""
    torch.set_num_threads(3)
    a = draw(300, 140, 0.2, 1)
    for width, listed in zip(columns, (False, True), strict=True):
        right = draw(140, width, 1.0, width)
        product, found = packed(right), np.empty((300, width), np.float32)
        product(a, found, sparse=True, listed=listed)
        assert np.abs(found - a.astype(np.float64) @ right).max() <= CLOSE * np.abs(found).max()


@pytest.mark.skipif(not has_avx512(), reason="all tests are of AVX2 here")
def test_registers_of_8_lanes_do_as_well():
    """The same laws of what is compiled for a processor with AVX2 alone, in a process that is kept to it."""
    here = Path(__file__).parent
    laws = [
        "test_products.py::test_any_product_is_numpys",
        "test_products.py::test_rows_may_have_few_entries_in_some_blocks_and_many_in_others",
        "test_gradients.py::test_compiled_loops_are_the_masked_dense_computation",
        "test_gradients.py::test_compiled_threshold_removes_what_the_rule_in_torch_does",
    ]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *laws],
        cwd=here,
        env=os.environ | AVX2_ALONE,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    assert " passed" in answer.stdout, answer.stdout
    assert "skipped" not in answer.stdout, answer.stdout
