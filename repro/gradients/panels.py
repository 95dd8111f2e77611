"""What the products of `repro.gradients.products` have in common: their arguments, their memory and how B lies in it.

B (inner, columns) is packed in panels of 64 columns, (panels, inner, 64); the last 16 columns or fewer are taken together with
the panel before. 128 rows of a panel, a block, are 32 KiB, which stay in the nearest cache while rows of A pass by.
"""

import threading
from typing import NamedTuple

import numpy as np
from numba import njit

from repro.sparse.packing import aligned
from repro.sparse.regions import entry

PANEL, BLOCK = 64, 128
TILE = 5  # rows of A that a dense product takes together; parts of rows are multiples of it
PANEL_BYTES = 4 * PANEL
u = np.uintp

(A, A_ROW, B, B_PANEL, C, C_ROW, ROWS, INNER, COLUMNS, ADD, BY_ROWS, REVERSED, TRANSPOSED) = (u(k) for k in range(13))
VALUES, PLACES, LISTS, LISTED, ENDS, STRIP, SUMS, PRESENT = (u(k) for k in range(13, 21))
ARGUMENTS = 21
_MEMORY = threading.local()


class _Memory(NamedTuple):
    array: np.ndarray
    address: int


def memory(name: str, nbytes: int) -> _Memory:
    """Memory that this thread uses again for the next product of that name: fresh pages cost time."""
    held = _MEMORY.__dict__
    if name not in held or held[name].array.nbytes < nbytes:
        array = aligned(nbytes, np.uint8)
        held[name] = _Memory(array, array.ctypes.data)
    return held[name]


def scratch(name: str, size: int, dtype=np.float32) -> np.ndarray:
    """`size` entries in this thread's memory of that name."""
    nbytes = size * np.dtype(dtype).itemsize
    return memory(name, nbytes).array[:nbytes].view(dtype)


@njit(inline="always")
def panel_count(columns):
    """How many panels a product takes: the last one has 17 to 80 columns, unless it is the only one."""
    return max((columns + u(PANEL - 17)) // u(PANEL), u(1))


@njit(inline="always")
def panel_columns(arguments, panel):
    """How many columns of C a panel takes."""
    columns = entry(arguments, COLUMNS)
    return u(PANEL) if panel + u(1) < panel_count(columns) else columns - panel * u(PANEL)


@njit(inline="always")
def share(arguments, first, last):
    """(first row, last row, first panel, last panel) of a thread's part."""
    if entry(arguments, BY_ROWS) != u(0):
        return first, last, u(0), panel_count(entry(arguments, COLUMNS))
    return u(0), entry(arguments, ROWS), first, last
