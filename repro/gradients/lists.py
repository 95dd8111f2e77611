"""C = A B by the entries of A that are not zero, which are compressed into lists first.

A list holds a row's entries of one block of B's rows (see `repro.gradients.panels`): the block stays in the nearest cache while
the lists of all rows pass by. To begin and end a list takes as long as six or more of its entries. Hence a row's entries of all
blocks in which it has few go into one list, the scattered one, whose rows of B come from the cache behind. Gate gradients
have few of three gates: under one threshold most of what stays is g's, at least until a layer is trained.
"""

from functools import cache

import numpy as np
from numba import njit

from repro.gradients import simd
from repro.gradients.panels import (
    A_ROW,
    B_PANEL,
    BLOCK,
    C_ROW,
    ENDS,
    INNER,
    LISTED,
    LISTS,
    PANEL,
    PANEL_BYTES,
    PLACES,
    PRESENT,
    REVERSED,
    ROWS,
    STRIP,
    SUMS,
    TILE,
    TRANSPOSED,
    VALUES,
    A,
    B,
    C,
    memory,
    panel_columns,
    scratch,
    share,
    u,
)
from repro.sparse.caching import kept
from repro.sparse.regions import BOUNDS, FREE, THREADS, array_at, entry, region
from repro.sparse.simd import read_u64

STRIP_ROWS = 64  # rows of A that are transposed together
_SUMS_BYTES = 4 * (PANEL + 16)
_SCATTERED = 8  # entries of a row in a block, up to which they go into its scattered list; at most 16; about as fast: 6 to 12
_VECTOR = 16  # entries that are written past the end of a list
_ROWS_AHEAD = 16  # from a row of C that is fetched to the one that is written
_LIST_COST = 4  # of a list without entries, in fours of entries
_FARTHEST = 2**16  # rows of B: places of scattered lists have 16 bits
_FOURS, _FIRST, _LAST, _BEGIN = 0xFFFF, 1 << 16, 1 << 17, u(18)  # of a list's description


def list_count(inner: int) -> int:
    """Lists of a row of `inner` entries: one for each block, then the scattered one."""
    return -(-inner // BLOCK) + 1


def find_memory(arguments: np.ndarray, rows: int, parts: int, threads: int, calls: int) -> None:
    """Memory for the lists of A, `rows` rows that so many `calls` of the compressor with so many `parts` are going to make."""
    inner = int(arguments[INNER])
    count = list_count(inner)
    most = np.full(count, BLOCK + _VECTOR)  # entries of a list
    most[-1] = (count - 1) * _SCATTERED + _VECTOR
    room = np.tile((rows // parts + 2 * TILE * calls) * most, parts)
    memory("lists", 8 * count * rows)
    memory("values", 4 * int(room.sum()))
    memory("places", 2 * int(room.sum()))
    memory("strip", 4 * parts * STRIP_ROWS * (inner + 16))
    scratch("ends", room.size, np.int64)[:] = room.cumsum() - room
    use_memory(arguments, rows, threads)


def use_memory(arguments: np.ndarray, rows: int, threads: int) -> None:
    """Point to the lists that were last made, for as many rows, and to memory of the product's threads."""
    count = list_count(int(arguments[INNER]))
    arguments[LISTED] = rows
    for place, name in ((LISTS, "lists"), (VALUES, "values"), (PLACES, "places"), (ENDS, "ends"), (STRIP, "strip")):
        arguments[place] = memory(name, 0).address
    scratch("sums", (threads * rows + 1) * (PANEL + 16))[: PANEL + 16] = 0  # what the first list of a row adds to
    arguments[SUMS] = memory("sums", 0).address
    arguments[PRESENT] = memory("present", 4 * threads * count * (rows + 2)).address


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
        for r in range(row, min(row + u(STRIP_ROWS), rows), u(16)):
            source = entry(arguments, A) + k * a_row + r * u(4)
            simd.transpose_tile(source, a_row, inner - k, rows - r, strip + (r - row) * strip_row + k * u(4), strip_row)


@njit(inline="always")
def _close(values, places, begin, end):
    """Fill a list up to a multiple of four entries with zeros; returns its description."""
    for address in (values + end * u(4), values + end * u(4) + u(8), places + end * u(2)):
        simd.write_u64(address, u(0))
    return begin << _BEGIN | (end - begin + u(3)) // u(4)


@njit(inline="always")
def _end(description):
    return (description >> _BEGIN) + u(4) * (description & u(_FOURS))


@cache
def compressor():
    """Body that lists the non-zero entries of A; its bounds are rows.

    An entry is a value and its place, the row of B it is multiplied with: two arrays. `lists` (lists of a row, `listed` rows)
    has descriptions: how many times four entries, of which the last may be 0; whether it is the first list of its row, and the
    last; the number of its first entry. 0: there is no such list. A row without entries has an empty scattered list. Lists of a
    part follow each other without gaps, also from one call to the next: `ends` (parts, lists of a row) says where.
    """

    @region
    def body(plan, first_row, last_row):
        arguments = entry(plan, FREE)
        listed, inner, transposed = entry(arguments, LISTED), entry(arguments, INNER), entry(arguments, TRANSPOSED) != u(0)
        values, places = entry(arguments, VALUES), entry(arguments, PLACES)
        strip_row = (inner + u(15)) // u(16) * u(64)
        part, count = _part(plan, first_row), (inner + u(BLOCK - 1)) // u(BLOCK) + u(1)
        strip = entry(arguments, STRIP) + part * u(STRIP_ROWS) * strip_row
        ends = entry(arguments, ENDS) + part * count * u(8)
        few = u(_SCATTERED) if inner <= u(_FARTHEST) else u(0)
        for row in range(first_row, last_row):
            a, ahead = entry(arguments, A) + row * entry(arguments, A_ROW), u(0)
            if transposed:
                place = (row - first_row) % u(STRIP_ROWS)
                if place == u(0):
                    _transpose_strip(arguments, row, strip, strip_row)
                a = strip + place * strip_row
                # A cache line of the next strip for each 16 entries of this one: the processor fetches none by itself.
                ahead = entry(arguments, A) + (row - place + u(STRIP_ROWS)) * u(4) + u(63)
                ahead += place % u(16) * entry(arguments, A_ROW) + place // u(16) * u(64)
            here, at = entry(arguments, LISTS) + row * u(8), ends
            scattered_end = ends + (count - u(1)) * u(8)
            scattered, last_list, first = read_u64(scattered_end), u(0), u(_FIRST)
            scattered_from = scattered
            for k in range(u(0), inner, u(BLOCK)):
                begin = read_u64(at)
                end, last = begin, min(k + u(BLOCK), inner)
                for lane in range(k, last, u(16)):
                    if transposed:
                        simd.prefetch(ahead + lane * entry(arguments, A_ROW))
                    end += simd.compress_lanes(a + lane * u(4), last - lane, values + end * u(4), places + end * u(2), lane - k)
                description = u(0)
                if end - begin <= few:
                    to_values, to_places = values + scattered * u(4), places + scattered * u(2)
                    simd.move_entries(values + begin * u(4), places + begin * u(2), to_values, to_places, k)
                    scattered += end - begin
                elif end != begin:
                    description = _close(values, places, begin, end)
                    simd.write_u64(at, _end(description))
                    description, first, last_list = description | first, u(0), here
                simd.write_u64(here, description)
                here += listed * u(8)
                at += u(8)
            description = u(0)
            if scattered != scattered_from or last_list == u(0):
                description = _close(values, places, scattered_from, scattered)
                simd.write_u64(scattered_end, _end(description))
                description, last_list = description | first, here
            simd.write_u64(here, description)
            simd.write_u64(last_list, read_u64(last_list) | u(_LAST))

    return body


@njit
def _note_rows(lists, present):
    """Write how many rows have one of these `lists`, and then which, to `present`: two entries more than there are rows."""
    count = 0
    for row in range(len(lists)):
        present[1 + count] = row
        count += lists[row] != 0
    present[0] = count


@cache
def _sparse_rows(vectors: int, masked: int):
    """Lists of the rows `present` times a block of a panel, or all of it; meanwhile the 32 KiB at `following` are fetched, and
    if `ending` the rows of C that are written next."""

    @njit
    def times(present, lists, values, places, b, following, fifth, nothing, sums, c, c_row, columns, ending):
        count = u(present[0])
        ahead = u(BLOCK * PANEL_BYTES // 64) // count + u(1)
        for i in range(count):
            for _ in range(ahead):
                simd.prefetch(following)
                following += u(64)
            if ending != u(0):
                soon = u(present[u(1) + min(i + u(_ROWS_AHEAD), count - u(1))])
                simd.prefetch_columns(c + soon * c_row)
            row = u(present[u(1) + i])
            of_row = read_u64(lists + row * u(8))
            begin, sum_of_row = of_row >> _BEGIN, sums + row * u(_SUMS_BYTES)
            before = nothing if of_row & u(_FIRST) else sum_of_row
            target = c + row * c_row if of_row & u(_LAST) else sum_of_row
            value, place = values + begin * u(4), places + begin * u(2)
            simd.sparse_tile(value, place, of_row & u(_FOURS), b, fifth, before, target, columns, vectors, masked)

    return times


@cache
def sparse_product(edge: int):
    """Body of C = A B, from the lists of A. `edge`: vectors of 16 columns of the last panel, 1 to 5.

    Sums of a panel of C wait for the row's last list next to each other, at `sums`: rows of C itself lie far apart.
    """
    full, at_edge = _sparse_rows(4, 0), _sparse_rows(edge, 1)

    @region
    def body(plan, first, last):
        if first == last:  # the number of such a part, and with it its memory, is another's
            return
        arguments = entry(plan, FREE)
        first_row, last_row, first_panel, last_panel = share(arguments, first, last)
        listed, inner, rows = entry(arguments, LISTED), entry(arguments, INNER), last_row - first_row
        values, places, c_row = entry(arguments, VALUES), entry(arguments, PLACES), entry(arguments, C_ROW)
        part, blocks = _part(plan, first), (inner + u(BLOCK - 1)) // u(BLOCK)
        sums = entry(arguments, SUMS) + (part * listed + u(1)) * u(_SUMS_BYTES)
        nothing = entry(arguments, SUMS)
        lists, each = entry(arguments, LISTS) + first_row * u(8), rows + u(2)
        noted = entry(arguments, PRESENT) + part * (blocks + u(1)) * (listed + u(2)) * u(4)
        noted = array_at(noted, (blocks + u(1)) * each, np.uint32)
        for k in range(blocks + u(1)):
            _note_rows(array_at(lists + k * listed * u(8), rows, np.int64), noted[k * each : (k + u(1)) * each])
        for i in range(first_panel, last_panel):
            panel = first_panel + last_panel - u(1) - i if entry(arguments, REVERSED) != u(0) else i
            columns, fifth = panel_columns(arguments, panel), entry(arguments, B_PANEL)
            b = entry(arguments, B) + panel * entry(arguments, B_PANEL)
            c = entry(arguments, C) + first_row * c_row + panel * u(PANEL_BYTES)
            for k in range(blocks + u(1)):
                present = noted[k * each : (k + u(1)) * each]
                if present[0] == 0:
                    continue
                of_block = lists + k * listed * u(8)
                block, following = b + k * u(BLOCK * PANEL_BYTES), b + (k + u(1)) * u(BLOCK * PANEL_BYTES)
                ending = u(k + u(1) >= blocks)  # most rows of C are written by one of the last two
                if k == blocks:
                    block, following = b, b + fifth  # all of the panel, and then the next one
                of_b, of_c = (block, following, fifth), (nothing, sums, c, c_row, columns, ending)
                if columns == u(PANEL):
                    full(present, of_block, values, places, *of_b, *of_c)
                else:
                    at_edge(present, of_block, values, places, *of_b, *of_c)

    return body


@kept
def share_entries(plan, lists, work):
    """Bounds of rows with about as much work in each part; `lists` (lists of a row, rows) from `compressor`."""
    work[:] = 0
    for k in range(len(lists)):
        for row in range(len(work)):
            if lists[k, row]:
                work[row] += (lists[k, row] & _FOURS) + _LIST_COST
    total, threads, part, done = work.sum(), plan[THREADS], 1, 0
    for row in range(len(work)):
        while part < threads and done * threads >= total * part:
            plan[BOUNDS + part] = row
            part += 1
        done += work[row]
    plan[BOUNDS + part : BOUNDS + threads] = len(work)
