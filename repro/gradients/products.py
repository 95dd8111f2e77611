"""C = A B in two ways for the same packed B: by all entries of A, or only by those that are not zero.

B (inner, columns) is packed in panels of 64 columns, (panels, inner, 64); the last 16 columns or fewer are taken together with
the panel before. A product takes 128 rows of a panel at a time, 32 KiB that stay in the nearest cache while rows of A pass by:
five of them in 20 registers if A is taken whole, one row's non-zero entries, four at a time, if not. For these, A is first
compressed into lists of entries, in the order in which they are used.

All take raw addresses, in an int64 array of arguments that a plan (see `repro.sparse.regions`) points to.
"""

import threading
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit

from repro.gradients import simd
from repro.sparse.caching import kept
from repro.sparse.packing import aligned
from repro.sparse.regions import BOUNDS, FREE, THREADS, entry, make_plan, region, run, thread_count
from repro.sparse.simd import read_u64

PANEL, BLOCK, TILE = 64, 128, 5
_PANEL_BYTES = 4 * PANEL
_SUMS_BYTES = 4 * (PANEL + 16)
_LONGEST = BLOCK + 16  # entries a list has room for: vectors are written past its end
_STRIP = 64  # rows of A that are transposed together
_TURN = 320  # rows of C that are finished before the next, in a dense product: meanwhile they stay in the second cache
_ROW_COST = 2  # of an empty row, in fours of entries
_MANY_ROWS = 256  # of C: from here on threads share out rows, below panels
_WORTH_THREADS = 2**16  # multiplications: fewer take less time than starting a second thread
u = np.uintp

(A, A_ROW, B, B_PANEL, C, C_ROW, ROWS, INNER, COLUMNS, ADD, BY_ROWS, REVERSED, TRANSPOSED) = (u(k) for k in range(13))
VALUES, OFFSETS, LISTS, LISTED, ENDS, STRIP, SUMS = (u(k) for k in range(13, 20))
_ARGUMENTS = 20
_MEMORY = threading.local()


class _Memory(NamedTuple):
    array: np.ndarray
    address: int


def _memory(name: str, nbytes: int) -> _Memory:
    """Memory that this thread uses again for the next product of that name: fresh pages cost time."""
    held = _MEMORY.__dict__
    if name not in held or held[name].array.nbytes < nbytes:
        array = aligned(nbytes, np.uint8)
        held[name] = _Memory(array, array.ctypes.data)
    return held[name]


def scratch(name: str, size: int, dtype=np.float32) -> np.ndarray:
    """`size` entries in this thread's memory of that name."""
    nbytes = size * np.dtype(dtype).itemsize
    return _memory(name, nbytes).array[:nbytes].view(dtype)


@njit(inline="always")
def _panels(columns):
    """How many panels a product takes: the last one has 17 to 80 columns, unless it is the only one."""
    return max((columns + u(PANEL - 17)) // u(PANEL), u(1))


@njit(inline="always")
def _share(arguments, first, last):
    """(first row, last row, first panel, last panel) of a thread's part."""
    if entry(arguments, BY_ROWS) != u(0):
        return first, last, u(0), _panels(entry(arguments, COLUMNS))
    return u(0), entry(arguments, ROWS), first, last


@njit(inline="always")
def _columns(arguments, panel):
    """How many columns of C a panel takes."""
    columns = entry(arguments, COLUMNS)
    return u(PANEL) if panel + u(1) < _panels(columns) else columns - panel * u(PANEL)


@cache
def _dense_rows(registers: int, masked: int):
    """Rows of A times 128 rows or fewer of a panel."""

    @njit
    def times(a, a_row, b, fifth, inner, c, c_row, columns, add, rows):
        for _ in range(rows // u(TILE)):
            simd.dense_tile(a, a_row, b, fifth, inner, c, c_row, columns, add, TILE, registers, masked)
            a += u(TILE) * a_row
            c += u(TILE) * c_row
        for _ in range(rows % u(TILE)):
            simd.dense_tile(a, a_row, b, fifth, inner, c, c_row, columns, add, 1, registers, masked)
            a += a_row
            c += c_row

    return times


@cache
def dense_product(edge: int):
    """Body of C = or += A B. `edge`: registers of 16 columns of the last panel, 1 to 5."""
    full, at_edge = _dense_rows(4, 0), _dense_rows(edge, 1)

    @region
    def body(plan, first, last):
        arguments = entry(plan, FREE)
        row, last_row, first_panel, last_panel = _share(arguments, first, last)
        a_row, c_row, inner = entry(arguments, A_ROW), entry(arguments, C_ROW), entry(arguments, INNER)
        for i in range(first_panel, last_panel):
            panel = first_panel + last_panel - u(1) - i if entry(arguments, REVERSED) != u(0) else i
            columns, fifth = _columns(arguments, panel), entry(arguments, B_PANEL)
            b = entry(arguments, B) + panel * entry(arguments, B_PANEL)
            for turn in range(row, last_row, u(_TURN)):
                rows, add = min(last_row - turn, u(_TURN)), entry(arguments, ADD)
                a = entry(arguments, A) + turn * a_row
                c = entry(arguments, C) + turn * c_row + panel * u(_PANEL_BYTES)
                for k in range(u(0), inner, u(BLOCK)):
                    count = min(inner - k, u(BLOCK))
                    if columns == u(PANEL):
                        full(a + k * u(4), a_row, b + k * u(_PANEL_BYTES), fifth, count, c, c_row, columns, add, rows)
                    else:
                        at_edge(a + k * u(4), a_row, b + k * u(_PANEL_BYTES), fifth, count, c, c_row, columns, add, rows)
                    add = u(1)

    return body


@njit(inline="always")
def _part(plan, first):
    """The number of the part that begins at `first`: one that no other part has, unless it is empty."""
    part, threads = u(0), entry(plan, u(THREADS))
    while part + u(1) < threads and entry(plan, u(BOUNDS + 1) + part) <= first:
        part += u(1)
    return part


@njit(inline="always")
def _transpose_strip(arguments, row, strip, strip_row):
    """Write up to 64 rows of A from `row` on to `strip`; A is given as its transpose, (inner, rows)."""
    a_row, rows, inner = entry(arguments, A_ROW), entry(arguments, ROWS), entry(arguments, INNER)
    for k in range(u(0), inner, u(16)):
        for r in range(row, min(row + u(_STRIP), rows), u(16)):
            source = entry(arguments, A) + k * a_row + r * u(4)
            simd.transpose_tile(source, a_row, inner - k, rows - r, strip + (r - row) * strip_row + k * u(4), strip_row)


@njit(inline="always")
def _first_entry(of_row):
    return of_row >> u(8)


@njit(inline="always")
def _fours(of_row):
    return of_row & u(255)


@cache
def compressor():
    """Body that lists the non-zero entries of A, those of 128 columns of a row in one list; its bounds are rows.

    An entry is a value, and where its row of B begins in a block: two arrays. `lists` (blocks of columns, `listed` rows): how
    many times four entries, of which the last may be 0, plus 256 times the number of the first one. A part's lists of a block
    follow each other without gaps, also from one call to the next: `ends` (parts, blocks) says where the next one begins.
    """

    @region
    def body(plan, first_row, last_row):
        arguments = entry(plan, FREE)
        listed, inner, transposed = entry(arguments, LISTED), entry(arguments, INNER), entry(arguments, TRANSPOSED) != u(0)
        values, offsets = entry(arguments, VALUES), entry(arguments, OFFSETS)
        lists = entry(arguments, LISTS) + first_row * u(8)
        strip_row = (inner + u(15)) // u(16) * u(64)
        part = _part(plan, first_row)
        strip = entry(arguments, STRIP) + part * u(_STRIP) * strip_row
        ends = entry(arguments, ENDS) + part * ((inner + u(BLOCK - 1)) // u(BLOCK)) * u(8)
        for row in range(first_row, last_row):
            a, ahead = entry(arguments, A) + row * entry(arguments, A_ROW), u(0)
            if transposed:
                place = (row - first_row) % u(_STRIP)
                if place == u(0):
                    _transpose_strip(arguments, row, strip, strip_row)
                a = strip + place * strip_row
                # A cache line of the next strip for each 16 entries of this one: the processor fetches none by itself.
                ahead = entry(arguments, A) + (row - place + u(_STRIP)) * u(4) + u(63)
                ahead += place % u(16) * entry(arguments, A_ROW) + place // u(16) * u(64)
            here, at = lists, ends
            for k in range(u(0), inner, u(BLOCK)):
                begin = read_u64(at)
                end, last = begin, min(k + u(BLOCK), inner)
                for lane in range(k, last, u(16)):
                    if transposed:
                        simd.prefetch(ahead + lane * entry(arguments, A_ROW))
                    of_b = (lane - k) * u(_PANEL_BYTES)
                    end += simd.compress_lanes(a + lane * u(4), last - lane, values + end * u(4), offsets + end * u(2), of_b)
                for address in (values + end * u(4), values + end * u(4) + u(8), offsets + end * u(2)):
                    simd.write_u64(address, u(0))
                fours = (end - begin + u(3)) // u(4)
                simd.write_u64(here, begin << u(8) | fours)
                simd.write_u64(at, begin + u(4) * fours)
                here += listed * u(8)
                at += u(8)
            lists += u(8)

    return body


@cache
def _sparse_rows(registers: int, masked: int):
    """Lists of rows of A times 128 rows or fewer of a panel; meanwhile the 32 KiB after these are fetched."""

    @njit
    def times(lists, values, offsets, b, fifth, before, c, stride, columns, add, rows):
        following, ahead = b + u(BLOCK * _PANEL_BYTES), u(BLOCK * _PANEL_BYTES // 64) // max(rows, u(1)) + u(1)
        for _ in range(rows):
            for _ in range(ahead):
                simd.prefetch(following)
                following += u(64)
            of_row = read_u64(lists)
            value, offset = values + _first_entry(of_row) * u(4), offsets + _first_entry(of_row) * u(2)
            simd.sparse_tile(value, offset, _fours(of_row), b, fifth, before, c, columns, add, registers, masked)
            lists += u(8)
            before += u(_SUMS_BYTES)
            c += stride

    return times


@cache
def sparse_product(edge: int):
    """Body of C = A B, from the lists of A.

    Sums of a panel of C wait for the last block next to each other, at `sums`: rows of C itself lie far apart.
    """
    full, at_edge = _sparse_rows(4, 0), _sparse_rows(edge, 1)

    @region
    def body(plan, first, last):
        arguments = entry(plan, FREE)
        first_row, last_row, first_panel, last_panel = _share(arguments, first, last)
        listed, inner, count = entry(arguments, LISTED), entry(arguments, INNER), last_row - first_row
        values, offsets = entry(arguments, VALUES), entry(arguments, OFFSETS)
        sums = entry(arguments, SUMS) + _part(plan, first) * listed * u(_SUMS_BYTES)
        for i in range(first_panel, last_panel):
            panel = first_panel + last_panel - u(1) - i if entry(arguments, REVERSED) != u(0) else i
            columns, fifth = _columns(arguments, panel), entry(arguments, B_PANEL)
            b, add = entry(arguments, B) + panel * entry(arguments, B_PANEL), u(0)
            lists = entry(arguments, LISTS) + first_row * u(8)
            for k in range(u(0), inner, u(BLOCK)):
                c, stride = sums, u(_SUMS_BYTES)
                if k + u(BLOCK) >= inner:
                    stride = entry(arguments, C_ROW)
                    c = entry(arguments, C) + first_row * stride + panel * u(_PANEL_BYTES)
                if columns == u(PANEL):
                    full(lists, values, offsets, b, fifth, sums, c, stride, columns, add, count)
                else:
                    at_edge(lists, values, offsets, b, fifth, sums, c, stride, columns, add, count)
                lists += listed * u(8)
                b += u(BLOCK * _PANEL_BYTES)
                add = u(1)

    return body


@kept
def _share_entries(plan, lists, work):
    """Bounds of rows with about as many entries in each part; `lists` (blocks, rows) from `compressor`."""
    work[:] = _ROW_COST
    for block in range(len(lists)):
        for row in range(len(work)):
            work[row] += lists[block, row] & 255
    total, threads, part, done = work.sum(), plan[THREADS], 1, 0
    for row in range(len(work)):
        while part < threads and done * threads >= total * part:
            plan[BOUNDS + part] = row
            part += 1
        done += work[row]
    plan[BOUNDS + part : BOUNDS + threads] = len(work)


@cache
def packer():
    """Body that packs B, rows of `columns` floats at `a`, in panels at `b`; its bounds are rows of B."""

    @region
    def body(plan, first, last):
        arguments = entry(plan, FREE)
        columns, a_row = entry(arguments, COLUMNS), entry(arguments, A_ROW)
        for row in range(first, last):
            source, target = entry(arguments, A) + row * a_row, entry(arguments, B) + row * u(_PANEL_BYTES)
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
        self.panels = int(_panels.py_func(u(columns)))
        self.edge = -(-(columns - PANEL * (self.panels - 1)) // 16)
        self.arguments = np.zeros(_ARGUMENTS, np.int64)
        self.arguments[[B_PANEL, INNER, COLUMNS]] = inner * _PANEL_BYTES, inner, columns
        self._packing = self.arguments.copy()
        if transposed:
            self._packing[[ROWS, COLUMNS, C_ROW]] = columns, PANEL, _PANEL_BYTES
        self._pack_plan, self._panels_plan, self._rows_plan = map(_plan, (self._packing, self.arguments, self.arguments))
        self._shared(self._pack_plan, -(-inner // 16) if transposed else inner, 1)
        self._packer = (transposer if transposed else packer)()

    def pack(self, matrix: np.ndarray) -> None:
        """Take B from a matrix of the shape this product was made for."""
        memory = _memory("panels", -(-self.columns // PANEL) * self.inner * _PANEL_BYTES)
        self.arguments[B] = self._packing[B] = memory.address
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
        return sparse_product(self.edge).address

    def make_lists(self, rows: int, plan: np.ndarray, calls: int = 1) -> None:
        """Find memory for the lists of A (rows, inner), which so many calls of `plan`, some rows each, are going to make."""
        blocks, parts = -(-self.inner // BLOCK), int(plan[THREADS])
        room = (rows // parts + 2 * TILE * calls) * _LONGEST  # of a part in one block
        _memory("lists", 8 * blocks * rows)
        _memory("values", 4 * parts * blocks * room)
        _memory("offsets", 2 * parts * blocks * room)
        _memory("strip", 4 * parts * _STRIP * (self.inner + 16))
        scratch("ends", parts * blocks, np.int64)[:] = np.arange(0, parts * blocks * room, room)
        self.use_lists(rows)

    def use_lists(self, rows: int) -> None:
        """Point to the lists that were last made, for as many rows."""
        arguments = self.arguments
        arguments[LISTED] = rows
        for place, name in ((LISTS, "lists"), (VALUES, "values"), (OFFSETS, "offsets"), (ENDS, "ends"), (STRIP, "strip")):
            arguments[place] = _memory(name, 0).address
        arguments[SUMS] = _memory("sums", self.threads * rows * _SUMS_BYTES).address

    def begin_steps(self, a_row: int, c_row: int, *, c: int = 0, add: int = 0) -> None:
        """For callers who run the plans by panels themselves, step by step: bytes between rows of A and of C, address of C."""
        arguments = self.arguments
        arguments[A_ROW], arguments[C_ROW], arguments[C], arguments[ADD] = a_row, c_row, c, add
        arguments[BY_ROWS] = arguments[TRANSPOSED] = arguments[REVERSED] = 0

    def __call__(self, a: np.ndarray, c: np.ndarray, *, sparse: bool, listed: bool = False) -> None:
        """Write C = A B; `sparse`: by the non-zero entries of A, which may be a transposed view of an array of rows; `listed`:
        the last such product had the same A.
        """
        rows, transposed, arguments = len(a), a.strides[1] != a.itemsize, self.arguments
        arguments[A], arguments[A_ROW], arguments[TRANSPOSED] = a.ctypes.data, a.strides[transposed], transposed
        arguments[C], arguments[C_ROW] = c.ctypes.data, c.strides[0]
        arguments[ROWS], arguments[ADD], arguments[BY_ROWS], arguments[REVERSED] = rows, 0, rows >= _MANY_ROWS, 0
        plan = self.by_rows(rows) if rows >= _MANY_ROWS else self.by_panels(rows)
        if not sparse:
            run(plan, self.dense)
            return
        if listed:
            self.use_lists(rows)
        else:
            by_rows = self.by_rows(rows)
            self.make_lists(rows, by_rows)
            run(by_rows, compressor().address)
        if rows >= _MANY_ROWS:
            blocks = -(-self.inner // BLOCK)
            lists = scratch("lists", blocks * rows, np.int64).reshape(blocks, rows)
            _share_entries(plan, lists, scratch("work", rows, np.int64))
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
    arguments = np.zeros(_ARGUMENTS, np.int64)
    arguments[[A, A_ROW, B, C_ROW]] = matrix.ctypes.data, matrix.strides[0], target.ctypes.data, target.strides[0]
    arguments[[ROWS, INNER, COLUMNS]] = rows, inner, rows
    plan = _plan(arguments)
    _share_items(plan, thread_count() if matrix.size > _WORTH_THREADS else 1, -(-inner // 16), 1)
    run(plan, transposer().address)
    return target[:, :rows]


def _plan(arguments: np.ndarray) -> np.ndarray:
    """A plan for all threads that leads to `arguments`; work is shared out later."""
    return make_plan([0] * (thread_count() + 1), (arguments.ctypes.data,))
