"""C = A B in two ways for the same packed B: by all entries of A, or only by those that are not zero.

A product takes a block of a panel at a time (see `repro.gradients.panels`): five rows of A together if A is taken whole,
one row's non-zero entries, four at a time, if not (`repro.gradients.lists`).

All take raw addresses, in an int64 array of arguments that a plan (see `repro.sparse.regions`) points to.
"""

import threading
from functools import cache, lru_cache

import numpy as np
from numba import njit

from repro.gradients import lists, simd
from repro.gradients.panels import (
    A_ROW,
    ADD,
    ARGUMENTS,
    B_PANEL,
    BLOCK,
    BY_ROWS,
    C_ROW,
    COLUMNS,
    INNER,
    PANEL,
    PANEL_BYTES,
    REVERSED,
    ROWS,
    TILE,
    TRANSPOSED,
    A,
    B,
    C,
    memory,
    panel_columns,
    panel_count,
    scratch,
    share,
    u,
)
from repro.sparse.caching import kept
from repro.sparse.regions import BOUNDS, FREE, THREADS, entry, make_plan, region, run, thread_count

_TURN = 320  # rows of C that are finished before the next, in a dense product: meanwhile they stay in the second cache
_MANY_ROWS = 256  # of C: from here on threads share out rows, below panels
_WORTH_THREADS = 2**16  # multiplications: fewer take less time than starting a second thread


@cache
def _dense_rows(vectors: int, masked: int):
    """Rows of A times 128 rows or fewer of a panel."""

    @njit
    def times(a, a_row, b, fifth, inner, c, c_row, columns, add, rows):
        for _ in range(rows // u(TILE)):
            for row in range(u(TILE), u(2 * TILE)):
                simd.prefetch_columns(c + row * c_row)
            simd.dense_tile(a, a_row, b, fifth, inner, c, c_row, columns, add, TILE, vectors, masked)
            a += u(TILE) * a_row
            c += u(TILE) * c_row
        for _ in range(rows % u(TILE)):
            simd.dense_tile(a, a_row, b, fifth, inner, c, c_row, columns, add, 1, vectors, masked)
            a += a_row
            c += c_row

    return times


@cache
def dense_product(edge: int):
    """Body of C = or += A B. `edge`: vectors of 16 columns of the last panel, 1 to 5."""
    full, at_edge = _dense_rows(4, 0), _dense_rows(edge, 1)

    @region
    def body(plan, first, last):
        arguments = entry(plan, FREE)
        row, last_row, first_panel, last_panel = share(arguments, first, last)
        a_row, c_row, inner = entry(arguments, A_ROW), entry(arguments, C_ROW), entry(arguments, INNER)
        for i in range(first_panel, last_panel):
            panel = first_panel + last_panel - u(1) - i if entry(arguments, REVERSED) != u(0) else i
            columns, fifth = panel_columns(arguments, panel), entry(arguments, B_PANEL)
            b = entry(arguments, B) + panel * entry(arguments, B_PANEL)
            for turn in range(row, last_row, u(_TURN)):
                rows, add = min(last_row - turn, u(_TURN)), entry(arguments, ADD)
                a = entry(arguments, A) + turn * a_row
                c = entry(arguments, C) + turn * c_row + panel * u(PANEL_BYTES)
                for k in range(u(0), inner, u(BLOCK)):
                    count = min(inner - k, u(BLOCK))
                    if columns == u(PANEL):
                        full(a + k * u(4), a_row, b + k * u(PANEL_BYTES), fifth, count, c, c_row, columns, add, rows)
                    else:
                        at_edge(a + k * u(4), a_row, b + k * u(PANEL_BYTES), fifth, count, c, c_row, columns, add, rows)
                    add = u(1)

    return body


@cache
def packer():
    """Body that packs B, rows of `columns` floats at `a`, in panels at `b`; its bounds are rows of B."""

    @region
    def body(plan, first, last):
        arguments = entry(plan, FREE)
        columns, a_row = entry(arguments, COLUMNS), entry(arguments, A_ROW)
        for row in range(first, last):
            source, target = entry(arguments, A) + row * a_row, entry(arguments, B) + row * u(PANEL_BYTES)
            for column in range(u(0), columns, u(PANEL)):
                for at in range(column, min(column + u(PANEL), columns), u(16)):
                    simd.pad_lanes(source + at * u(4), columns - at, target + (at - column) * u(4))
                target += entry(arguments, B_PANEL)

    return body


@cache
def transposer():
    """Body that writes A (rows, inner) transposed to `b`; its bounds are groups of 16 entries of a row of A.

    `columns` rows of A make a panel of B: 64 to pack A^T in panels, all of them to transpose A plainly. Rows of B are `c_row`
    bytes apart; up to a multiple of 16 they are filled with zeros.
    """

    @region
    def body(plan, first, last):
        arguments = entry(plan, FREE)
        rows, inner, width = entry(arguments, ROWS), entry(arguments, INNER), entry(arguments, COLUMNS)
        a_row, b_row = entry(arguments, A_ROW), entry(arguments, C_ROW)
        for row in range(u(0), rows, u(16)):
            target = entry(arguments, B) + row // width * entry(arguments, B_PANEL) + row % width * u(4)
            source = entry(arguments, A) + row * a_row
            for k in range(first * u(16), min(last * u(16), inner), u(16)):
                simd.transpose_tile(source + k * u(4), a_row, rows - row, inner - k, target + k * b_row, b_row)

    return body


@kept
def _share_items(plan, threads, count, step):
    """Share out `count` items to threads, in multiples of `step`."""
    plan[THREADS] = threads
    steps = -(-count // step)
    for i in range(threads + 1):
        plan[BOUNDS + i] = min(steps * i // threads * step, count)


class Product:
    """The arguments and plans of C = A B for B (inner, columns), which `pack` brings: a matrix, or its transpose.

    Matrices are float32 arrays whose rows are contiguous. All products of a thread are packed in the same memory: each is good
    until the next one is packed. Made once a shape: between two kernels, which leave nothing of Python in the caches, each
    small operation takes ten times as long as it would alone.
    """

    def __init__(self, inner: int, columns: int, transposed: bool):
        self.inner, self.columns, self.threads = inner, columns, thread_count()
        self.panels = int(panel_count.py_func(u(columns)))
        self.edge = -(-(columns - PANEL * (self.panels - 1)) // 16)
        self.arguments = np.zeros(ARGUMENTS, np.int64)
        self.arguments[[B_PANEL, INNER, COLUMNS]] = inner * PANEL_BYTES, inner, columns
        self._packing = self.arguments.copy()
        if transposed:
            self._packing[[ROWS, COLUMNS, C_ROW]] = columns, PANEL, PANEL_BYTES
        self._pack_plan, self._panels_plan, self._rows_plan = map(_plan, (self._packing, self.arguments, self.arguments))
        self._shared(self._pack_plan, -(-inner // 16) if transposed else inner, 1)
        self._packer = (transposer if transposed else packer)()

    def pack(self, matrix: np.ndarray) -> None:
        """Take B from a matrix of the shape this product was made for."""
        found = memory("panels", -(-self.columns // PANEL) * self.inner * PANEL_BYTES)
        self.arguments[B] = self._packing[B] = found.address
        self._packing[A], self._packing[A_ROW] = matrix.ctypes.data, matrix.strides[0]
        run(self._pack_plan, self._packer.address)

    def _shared(self, plan: np.ndarray, count: int, rows: int, step: int = 1) -> np.ndarray:
        """Little work stays on one thread."""
        _share_items(plan, self.threads if rows * self.inner * self.columns > _WORTH_THREADS else 1, count, step)
        return plan

    def by_panels(self, rows: int) -> np.ndarray:
        """The plan of products for `rows` rows of C whose threads share out panels; the next call changes it."""
        return self._shared(self._panels_plan, self.panels, rows)

    def by_rows(self, rows: int) -> np.ndarray:
        """The same for threads that share out rows."""
        return self._shared(self._rows_plan, rows, rows, TILE)

    @property
    def dense(self) -> int:
        """Address of the body for all of A."""
        return dense_product(self.edge).address

    @property
    def sparse(self) -> int:
        """Address of the body for the lists of A."""
        return lists.sparse_product(self.edge).address

    def make_lists(self, rows: int, plan: np.ndarray, calls: int = 1) -> None:
        """Find memory for the lists of A (rows, inner), which so many calls of `plan`, some rows each, are going to make."""
        lists.find_memory(self.arguments, rows, int(plan[THREADS]), self.threads, calls)

    def begin_steps(self, a_row: int, c_row: int, *, c: int = 0, add: int = 0) -> None:
        """For callers who run the plans by panels themselves, step by step: bytes between rows of A and of C, address of C."""
        arguments = self.arguments
        arguments[A_ROW], arguments[C_ROW], arguments[C], arguments[ADD] = a_row, c_row, c, add
        arguments[BY_ROWS] = arguments[TRANSPOSED] = arguments[REVERSED] = 0

    def __call__(self, a: np.ndarray, c: np.ndarray, *, sparse: bool, listed: bool = False) -> None:
        """Write C = A B; `sparse`: by the non-zero entries of A, which may be a transposed view of an array of rows; `listed`:
        the last such product had the same A.
        """
        rows, arguments = len(a), self.arguments
        transposed = a.shape[1] > 1 and a.strides[1] != a.itemsize  # of a single column that distance says nothing
        arguments[A], arguments[A_ROW], arguments[TRANSPOSED] = a.ctypes.data, a.strides[transposed], transposed
        arguments[C], arguments[C_ROW] = c.ctypes.data, c.strides[0]
        arguments[ROWS], arguments[ADD], arguments[BY_ROWS], arguments[REVERSED] = rows, 0, rows >= _MANY_ROWS, 0
        plan = self.by_rows(rows) if rows >= _MANY_ROWS else self.by_panels(rows)
        if not sparse:
            run(plan, self.dense)
            return
        if listed:
            lists.use_memory(arguments, rows, self.threads)
        else:
            by_rows = self.by_rows(rows)
            self.make_lists(rows, by_rows)
            run(by_rows, lists.compressor().address)
        if rows >= _MANY_ROWS:
            count = lists.list_count(self.inner)
            made = scratch("lists", count * rows, np.int64).reshape(count, rows)
            lists.share_entries(plan, made, scratch("work", rows, np.int64))
        run(plan, self.sparse)


@lru_cache(maxsize=256)
def _product(thread: int, threads: int, inner: int, columns: int, transposed: bool) -> Product:
    return Product(inner, columns, transposed)


def packed(matrix: np.ndarray, *, transposed: bool = False) -> Product:
    """The product with `matrix`, or with its transpose; of each shape a thread has one."""
    inner, columns = matrix.shape[::-1] if transposed else matrix.shape
    product = _product(threading.get_ident(), thread_count(), inner, columns, transposed)
    product.pack(matrix)
    return product


def transpose(name: str, matrix: np.ndarray) -> np.ndarray:
    """(columns, rows) of a (rows, columns) matrix, in memory of that name."""
    rows, inner = matrix.shape
    width = -(-rows // 16) * 16
    target = scratch(name, inner * width).reshape(inner, width)
    arguments = np.zeros(ARGUMENTS, np.int64)
    arguments[[A, A_ROW, B, C_ROW]] = matrix.ctypes.data, matrix.strides[0], target.ctypes.data, target.strides[0]
    arguments[[ROWS, INNER, COLUMNS]] = rows, inner, rows
    plan = _plan(arguments)
    _share_items(plan, thread_count() if matrix.size > _WORTH_THREADS else 1, -(-inner // 16), 1)
    run(plan, transposer().address)
    return target[:, :rows]


def _plan(arguments: np.ndarray) -> np.ndarray:
    """A plan for all threads that leads to `arguments`; work is shared out later."""
    return make_plan([0] * (thread_count() + 1), (arguments.ctypes.data,))
