"""Compiled loops: W times one to four vectors by windows, W times a vector or a matrix by rows, and dense ones to compare with.

The arrays that `repro.sparse.packing` makes are passed as addresses in a plan (see `repro.sparse.regions`), in the order of
their fields. Kernels are compiled on first use.
"""

from functools import cache

import numpy as np
from numba import njit

from repro.sparse.caching import kept
from repro.sparse.packing import CSR_UNIT
from repro.sparse.regions import FREE, array_at, entry, region, run
from repro.sparse.simd import read_u32, read_u64, row_step, scale_sums, store_sums, window_step, zero_sums

LARGEST_WINDOW_BATCH = 4
_A, _B, _C, _D, _X, _X_STRIDE, _Y, _Y_STRIDE = (FREE + k for k in range(8))
u = np.uintp


@kept
def finite(x):
    """Whether a contiguous float32 array holds neither infinity nor NaN."""
    bits = x.reshape(-1).view(np.uint32)
    largest = np.uint32(0)
    for i in range(u(len(bits))):
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    return largest < np.uint32(0x7F800000)


@njit
def _set_out(plan, x, x_stride, y, y_stride):
    plan[_X], plan[_X_STRIDE], plan[_Y], plan[_Y_STRIDE] = x.ctypes.data, x_stride, y.ctypes.data, y_stride


@cache
def group_sums(slot_bytes: int, count: int, batch: int):
    """`sums(plan, group, x, x_stride)`: W x for the 16 rows of a group and `batch` vectors, by windows.

    `plan`: the address of one that begins with slots, starts, groups, scales. The vectors are `x_stride` bytes apart, at
    multiples of 64. The registers are what `store_sums(..., batch)` takes: one a vector, or two that add up if there is one.
    """
    sums_count = 2 if batch == 1 else batch
    step_bytes = u(slot_bytes * count)

    @njit(forceinline=True)
    def sums_of(plan, group, x, x_stride):
        slots, starts, groups, scales = entry(plan, _A), entry(plan, _B), entry(plan, _C), entry(plan, _D)
        first, last = read_u64(groups + group * u(8)), read_u64(groups + group * u(8) + u(8))
        sums = zero_sums(16, sums_count)
        slot = slots + first * step_bytes
        for step in range(first, last):
            window = x + read_u32(starts + step * u(4)) * u(4)
            sums = window_step(slot, window, x_stride, sums, slot_bytes, count, batch)
            slot += step_bytes
        return scale_sums(sums, scales + group * u(64))

    return sums_of


@cache
def times_vectors(slot_bytes: int, count: int, batch: int):
    """`kernel(plan, x, staged, y) -> finite`: y = W x by windows; x (batch, columns), y (batch, rows up to a multiple of 16).

    Both are contiguous. `plan`: slots, starts, groups, scales; its bounds are groups.
    `staged`: (batch, columns and a window of zeros), at a multiple of 64 bytes and so its rows. If x is not finite there is no
    y: empty places in slots would turn infinities into NaN.
    """
    sums_of = group_sums(slot_bytes, count, batch)

    @region
    def body(plan, first_group, last_group):
        x, x_stride, y, y_stride = entry(plan, _X), entry(plan, _X_STRIDE), entry(plan, _Y), entry(plan, _Y_STRIDE)
        for group in range(first_group, last_group):
            store_sums(y + group * u(64), y_stride, sums_of(plan, group, x, x_stride), batch)

    address = body.address

    @njit
    def kernel(plan, x, staged, y):
        vectors = x.reshape(batch, -1)
        for b in range(batch):
            for c in range(vectors.shape[1]):
                staged[b, c] = vectors[b, c]
        if not finite(staged):
            return False
        _set_out(plan, staged, 4 * staged.shape[1], y, 4 * (y.size // batch))
        run(plan, address)
        return True

    kernel.body = body  # whose code would be freed with it
    return kernel


@cache
def times_vector(index_bytes: int):
    """`kernel(plan, x, y) -> finite`: y = W x by rows, on any processor.

    `plan`: values, columns, pointers, number of values; its bounds are rows.
    """
    index = {2: np.uint16, 4: np.uint32}[index_bytes]

    @region
    def body(plan, first_row, last_row):
        pointers, size = entry(plan, _C), entry(plan, _D)
        values, columns = array_at(entry(plan, _A), size, np.float32), array_at(entry(plan, _B), size, index)
        x, y = array_at(entry(plan, _X), entry(plan, _X_STRIDE), np.float32), array_at(entry(plan, _Y), last_row, np.float32)
        for row in range(first_row, last_row):
            one = np.float32(0)
            for j in range(read_u64(pointers + row * u(8)), read_u64(pointers + row * u(8) + u(8))):
                one += values[j] * x[columns[j]]
            y[row] = one

    address = body.address

    @njit
    def kernel(plan, x, y):
        if not finite(x):
            return False
        _set_out(plan, x, len(x), y, 0)
        run(plan, address)
        return True

    kernel.body = body
    return kernel


@cache
def times_matrix(lanes: int, registers: int, index_bytes: int):
    """`kernel(plan, x, y) -> finite`: Y = W X by rows; X (columns, width) and Y (rows, width), width = `lanes * registers`.

    `plan`: values, columns, pointers; its bounds are rows. X should begin at a multiple of 64 bytes: reads of 64 bytes that
    cross cache lines make the product 1.5 times slower.
    """
    width = u(4 * lanes * registers)
    register_bytes = u(4 * lanes)
    sums_count = CSR_UNIT * registers

    @region
    def body(plan, first_row, last_row):
        values, columns, pointers = entry(plan, _A), entry(plan, _B), entry(plan, _C)
        x, y = entry(plan, _X), entry(plan, _Y)
        for row in range(first_row, last_row):
            first, last = read_u64(pointers + row * u(8)), read_u64(pointers + row * u(8) + u(8))
            value, column = values + first * u(4), columns + first * u(index_bytes)
            sums = zero_sums(lanes, sums_count)
            for _ in range((last - first) // u(CSR_UNIT)):
                sums = row_step(value, column, x, width, sums, registers, CSR_UNIT, index_bytes)
                value += u(CSR_UNIT * 4)
                column += u(CSR_UNIT * index_bytes)
            store_sums(y + row * width, register_bytes, sums, registers)

    address = body.address

    @njit
    def kernel(plan, x, y):
        if not finite(x):
            return False
        _set_out(plan, x, 0, y, 0)
        run(plan, address)
        return True

    kernel.body = body
    return kernel


@cache
def dense_times_vector():
    """`kernel(plan, weights, x, y)`: y = W x of a dense (rows, columns) matrix; the bounds of the plan are rows."""

    @region
    def body(plan, first_row, last_row):
        columns = entry(plan, _X_STRIDE)
        x, y = array_at(entry(plan, _X), columns, np.float32), array_at(entry(plan, _Y), last_row, np.float32)
        weights = array_at(entry(plan, _A), last_row * columns, np.float32)
        for row in range(first_row, last_row):
            one = np.float32(0)
            for column in range(columns):
                one += weights[row * columns + column] * x[column]
            y[row] = one

    address = body.address

    @njit
    def kernel(plan, x, y):
        _set_out(plan, x, len(x), y, 0)
        run(plan, address)

    kernel.body = body
    return kernel


@cache
def read_all():
    """`kernel(plan, passes, sums)`: read a float32 array over and over; each thread adds up its part `passes` times.

    `plan`: the array, and how many entries it has. `sums`: one float32; what it holds afterwards only keeps the loops alive.
    """

    @region
    def body(plan, first, last):
        array, sums = array_at(entry(plan, _A), entry(plan, _B), np.float32), array_at(entry(plan, _Y), 1, np.float32)
        one = np.float32(0)
        for _ in range(entry(plan, _X_STRIDE)):
            for i in range(first, last):
                one += array[i]
        sums[u(0)] = one

    address = body.address

    @njit
    def kernel(plan, passes, sums):
        _set_out(plan, sums, passes, sums, 0)
        run(plan, address)

    kernel.body = body
    return kernel
