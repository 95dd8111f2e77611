"""How the non-zero weights of a matrix lie in memory, for the kernels of `repro.sparse.kernels`.

Windows (batch 1 to 4, AVX-512). 16 rows make a group, a row a lane. A *slot* holds one weight of each lane, all out of the same
window of consecutive columns; a *step* is `count` slots with the same window, whose columns of x fill two or four registers.
A weight's place in the window travels with it, and one table look-up fetches x for all 16 lanes. Windows slide: each starts at
the first column (rounded down to 16) that still has a weight in any lane, so that no weight is ever left over and lanes wait
for each other only when they are a window apart. At 90 % zeros about 4 of 5 places of a slot are filled, at 95 % 2 of 3,
whatever the pattern of the mask; blocks at fixed columns fill 7 and 5 of 10, and leave weights over.

- `P64`: windows of 64 columns, 4 bytes a weight. The five low bits of the mantissa and one bit of the exponent (weights are
  scaled by a power of two below 1) hold the place; the weight is rounded to the nearest float32 with these five bits, which is
  off by 2^-19 of it at most.
- `P64 exact`: windows of 64, weights as they are and a byte for the place.
- `P16`: windows of 32, 2 bytes a weight: the nearest 16-bit integer, as a share of the row's largest weight, whose five low
  bits are the place. Off by at most 16 / 32735 of the largest weight of the row.

CSR (any processor, any batch): values, columns of 2 bytes (4 from 65,537 columns on), row pointers.
"""

from dataclasses import dataclass

import numpy as np

from repro.sparse.caching import kept

LANES = 16
WINDOW = {"P64": 64, "P64 exact": 64, "P16": 32}
SLOT_BYTES = {"P64": 64, "P64 exact": 80, "P16": 32}
COUNTS = (2, 4)
CSR_UNIT = 4  # sums that run side by side in a product by rows: an addition takes four cycles, and rows have no remainders
_LARGEST_16_BIT = 2**15 - 1 - 32


def aligned(shape, dtype) -> np.ndarray:
    """An array of zeros that starts at a multiple of 64 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Windows:
    """`slots` (steps * count, slot bytes) uint8; `starts` (steps,) uint32 first column; `groups` (groups + 1,) int64 first
    step; `scales` (16 * groups,) float32, what the sum of a row is multiplied by; `count` slots a step; `nonzero` weights.
    """

    slots: np.ndarray
    starts: np.ndarray
    groups: np.ndarray
    scales: np.ndarray
    count: int
    nonzero: int


@dataclass(frozen=True)
class CSR:
    """`values` float32 and `columns` uint16 or uint32, with the zeros that fill rows up; `pointers` (rows + 1,) int64;
    `nonzero` weights.
    """

    values: np.ndarray
    columns: np.ndarray
    pointers: np.ndarray
    nonzero: int


def _by_rows(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(values, row, column, pointers) of the non-zero entries, row by row."""
    row, column = np.nonzero(weights)
    pointers = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(weights)))])
    return weights[row, column], row, column, pointers


def pack_csr(weights: np.ndarray) -> CSR:
    """The non-zero entries of a float32 matrix, row by row; rows are filled up to multiples of `CSR_UNIT` with zeros."""
    found, row, column, unfilled = _by_rows(weights)
    pointers = np.concatenate([[0], np.cumsum(-(-np.diff(unfilled) // CSR_UNIT) * CSR_UNIT)])
    at = np.arange(len(found)) + (pointers - unfilled)[row]
    values = np.zeros(pointers[-1], np.float32)
    columns = np.zeros(pointers[-1], np.uint16 if weights.shape[1] <= 2**16 else np.uint32)
    values[at], columns[at] = found, column
    return CSR(values, columns, pointers, len(found))


def pack_windows(weights: np.ndarray, kind: str) -> Windows:
    """Slots of the non-zero entries of a float32 matrix, with as many slots a step as make the product fastest (`_cost`)."""
    values, row, column, pointers = _by_rows(weights)
    placed = {count: _place(column, pointers, WINDOW[kind], count) for count in COUNTS}
    count = min(COUNTS, key=lambda count: _cost(len(placed[count][0]), count))
    starts, groups, slot, lane, place = placed[count]
    scales = np.ones(LANES * (len(groups) - 1), dtype=np.float32)
    slots = aligned((len(starts) * count, SLOT_BYTES[kind]), np.uint8)
    if kind == "P64 exact":
        slots[:, :64].view(np.float32)[slot, lane] = values
        slots[:, 64:][slot, lane] = place
    elif kind == "P64":
        largest = np.abs(values).max(initial=0.0)
        exponent = min(int(np.frexp(largest)[1]), 127)  # largest = m 2^exponent with m in [0.5, 1)
        slots.view(np.uint32)[slot, lane] = _with_place(np.ldexp(values, -exponent), place)
        scales[:] = np.ldexp(np.float32(1), exponent)
    else:
        largest = np.abs(weights).max(axis=1, initial=0.0)
        scales[: len(weights)] = np.where(largest > 0, largest / _LARGEST_16_BIT, 1)
        whole = 32 * np.rint((values / scales[row] - place) / 32) + place
        slots.view(np.int16)[slot, lane] = whole.astype(np.int16)
    return Windows(slots, starts, groups, scales, count, len(values))


def _cost(steps: int, count: int) -> float:
    """Cycles, as measured at 1760 x 1760 and 7680 x 2560: a slot costs its bytes, a step its four loads of x."""
    return steps * (2.6 * count + 2.0)


@kept
def _place(columns, pointers, window, count):
    """(starts, groups, slot, lane, place): windows of all steps, first step of each group, and where each weight goes."""
    rows = len(pointers) - 1
    groups = np.zeros((rows + LANES - 1) // LANES + 1, np.int64)
    starts = np.zeros(len(columns), np.uint32)
    slot = np.zeros(len(columns), np.int64)
    lane = np.zeros(len(columns), np.uint8)
    place = np.zeros(len(columns), np.uint8)
    step = 0
    for group in range(len(groups) - 1):
        first = group * LANES
        lanes = min(LANES, rows - first)
        at = pointers[first : first + lanes].copy()
        while True:
            start = -1
            for i in range(lanes):
                if at[i] < pointers[first + i + 1] and (start < 0 or columns[at[i]] < start):
                    start = np.int64(columns[at[i]])
            if start < 0:
                break
            start -= start % LANES
            starts[step] = start
            for i in range(lanes):
                for k in range(count):
                    j = at[i]
                    if j < pointers[first + i + 1] and columns[j] < start + window:
                        slot[j], lane[j], place[j] = step * count + k, i, columns[j] - start
                        at[i] += 1
            step += 1
        groups[group + 1] = step
    return starts[:step].copy(), groups, slot, lane, place


def _with_place(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """float32 values below 1 in magnitude -> bits of the nearest ones whose five low bits are those of `place`.

    Bit 30, the top of the exponent and 0 below 2.0, holds the sixth bit of the place.
    """
    bits = values.view(np.uint32).astype(np.int64)
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    low = place.astype(np.int64) & 31
    nearest = (magnitude - low + 16) // 32 * 32 + low
    nearest = np.where(nearest < 0, low, np.minimum(nearest, 0x3FFFFFE0 + low))
    return (sign | nearest | (place.astype(np.int64) & 32) << 25).astype(np.uint32)


def unpack_windows(windows: Windows, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """The dense float32 matrix that the slots stand for: what a product by windows multiplies x by."""
    slots = windows.slots
    if kind == "P64 exact":
        values, place = slots[:, :64].copy().view(np.float32), slots[:, 64:].astype(np.int64)
    elif kind == "P64":
        bits = slots.view(np.uint32)
        values, place = (bits & ~np.uint32(1 << 30)).view(np.float32), (bits & 31 | bits >> 25 & 32).astype(np.int64)
    else:
        whole = slots.view(np.int16)
        values, place = whole.astype(np.float32), (whole & 31).astype(np.int64)
    steps = np.diff(windows.groups) * windows.count
    group = np.repeat(np.arange(len(steps)), steps)
    column = np.repeat(windows.starts.astype(np.int64), windows.count)[:, None] + place
    row = LANES * group[:, None] + np.arange(LANES)
    filled = values != 0
    dense = np.zeros((LANES * len(steps), shape[1]), np.float32)
    dense[row[filled], column[filled]] = values[filled]
    return (dense * windows.scales[:, None])[: shape[0]]
