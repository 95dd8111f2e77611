"""Vector instructions for the products of `repro.gradients.products`; see `repro.sparse.simd`.

Addresses are unsigned integers and distances between rows bytes. Rows may end anywhere: the last of their vectors of 16 lanes
are masked. A vector is one register with AVX-512, and two of 16 without: there tiles are made so that fewer are in use.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from repro.sparse.gates import _Lanes, _sigmoid, _tanh
from repro.sparse.simd import _I8, _I16, _I32, _I64, _constant, _floats, _load, _multiply_add, has_avx512

_FLOATS, _INTEGERS, _MASK = _floats(16), ir.VectorType(_I32, 16), ir.VectorType(ir.IntType(1), 16)
_SHORTS = ir.VectorType(_I16, 16)
_IOTA = ir.Constant(_INTEGERS, list(range(16)))
_WORD = types.uintp


def word(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def first_lanes(builder, count):
    """The mask of the lanes below `count`, a 64-bit integer of any size."""
    count = builder.select(builder.icmp_unsigned("<", count, word(16)), count, word(16))
    return builder.icmp_unsigned("<", _IOTA, _splat(builder, builder.trunc(count, _I32)))


def _splat(builder, value, lanes: int = 16):
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _constant(ir.VectorType(_I32, lanes), 0))


def _in_register(builder, vector):
    """The same; LLVM does not know that it comes from memory, from where it would load each lane by itself."""
    return builder.asm(ir.FunctionType(vector.type, [vector.type]), "", "=v,0", [vector], side_effect=False)


def _function(builder, name, result, arguments):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def load_lanes(builder, address, mask=None):
    """16 floats; lanes outside of `mask` are 0 and not read."""
    if mask is None:
        return _load(builder, address, _FLOATS)
    pointer = builder.inttoptr(address, _FLOATS.as_pointer())
    load = _function(builder, "llvm.masked.load.v16f32.p0", _FLOATS, [pointer.type, _I32, _MASK, _FLOATS])
    return builder.call(load, [pointer, ir.Constant(_I32, 4), mask, _constant(_FLOATS, 0.0)])


def store_lanes(builder, value, address, mask=None):
    """Write 16 lanes of 4 bytes, or those within `mask`."""
    pointer = builder.inttoptr(address, value.type.as_pointer())
    if mask is None:
        builder.store(value, pointer).align = 4
        return
    store = _function(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), [_FLOATS, pointer.type, _I32, _MASK])
    builder.call(store, [value, pointer, ir.Constant(_I32, 4), mask])


def _column_masks(builder, columns, vectors: range, masked: bool):
    if not masked:
        return [None] * len(vectors)
    counts = []
    for v in vectors:
        past = builder.icmp_unsigned("<", columns, word(16 * v))
        counts.append(builder.select(past, word(0), builder.sub(columns, word(16 * v))))
    return [first_lanes(builder, count) for count in counts]


def _load_row(builder, row, vectors: range, fifth):
    """Of a row of B: 16 columns a vector, of which the fifth are `fifth` bytes after the first."""
    return [load_lanes(builder, builder.add(row, fifth if v == 4 else word(64 * v))) for v in vectors]


class _Sums:
    """Registers that a loop adds up."""

    def __init__(self, builder, count: int):
        self._builder = builder
        self._places = [cgutils.alloca_once(builder, _FLOATS) for _ in range(count)]
        for place in self._places:
            builder.store(_constant(_FLOATS, 0.0), place)

    def begin(self, k: int, value) -> None:
        self._builder.store(value, self._places[k])

    def add_product(self, k: int, a, b) -> None:
        self._builder.store(_multiply_add(self._builder, a, b, self[k]), self._places[k])

    def __getitem__(self, k: int):
        return self._builder.load(self._places[k])


def _write(builder, sums, target, vectors: range, masks, add) -> None:
    """Store `sums`, these `vectors` of the row at `target`, added to what is there if `add`."""
    for v, value, mask in zip(vectors, sums, masks, strict=True):
        at = builder.add(target, word(64 * v))
        old = builder.select(add, load_lanes(builder, at, mask), _constant(_FLOATS, 0.0))
        store_lanes(builder, builder.fadd(old, value), at, mask)


@intrinsic(prefer_literal=True)
def dense_tile(typing, a, a_row, b, fifth, inner, c, c_row, columns, add, rows, vectors, masked):
    """C (rows, columns) = or += A B. A: `inner` floats in each of `rows` rows; B: `inner` rows of 64 floats.

    `columns`: of C, at most 16 `vectors`; looked at if `masked` only. 16 columns more than 64, a fifth vector, lie `fifth`
    bytes after the first ones.
    """
    if not all(isinstance(kind, types.Literal) for kind in (rows, vectors, masked)):
        return None
    row_count, width, edge = rows.literal_value, vectors.literal_value, bool(masked.literal_value)

    def generate(context, builder, signature, arguments):
        a, a_row, b, fifth, inner, c, c_row, columns, add = arguments[:9]
        add = builder.icmp_unsigned("!=", add, word(0))
        starts = [builder.add(a, builder.mul(a_row, word(row))) for row in range(row_count)]
        together = width if has_avx512() else 1
        for first in range(0, width, together):
            of_turn = range(first, first + together)
            sums = _Sums(builder, row_count * together)
            with cgutils.for_range(builder, inner) as loop:
                right = _load_row(builder, builder.add(b, builder.mul(loop.index, word(256))), of_turn, fifth)
                step = builder.mul(loop.index, word(4))
                for row, start in enumerate(starts):
                    left = _splat(builder, _load(builder, builder.add(start, step), ir.FloatType()))
                    for k, vector in enumerate(right):
                        sums.add_product(row * together + k, left, vector)
            masks = _column_masks(builder, columns, of_turn, edge)
            for row in range(row_count):
                at = builder.add(c, builder.mul(c_row, word(row)))
                _write(builder, [sums[row * together + k] for k in range(together)], at, of_turn, masks, add)
        return context.get_dummy_value()

    return types.void(*[_WORD] * 9, rows, vectors, masked), generate


def _four_values(builder, address):
    """Four floats at an address, each in all lanes of a vector."""
    if not has_avx512():
        return [_splat(builder, _load(builder, builder.add(address, word(4 * k)), ir.FloatType())) for k in range(4)]
    # One load for four: while a value is loaded, no row of B is.
    four = _load(builder, address, _floats(4), align=16)
    four = _in_register(builder, builder.shuffle_vector(four, four, ir.Constant(_INTEGERS, [0, 1, 2, 3] * 4)))
    orders = ([lane - lane % 4 + k for lane in range(16)] for k in range(4))
    return [builder.shuffle_vector(four, four, ir.Constant(_INTEGERS, order)) for order in orders]


@intrinsic(prefer_literal=True)
def sparse_tile(typing, values, places, fours, b, fifth, before, c, columns, vectors, masked):
    """One row: C = `before` plus the sum of `4 fours` values times rows of B; `columns`, `fifth` as in `dense_tile`.

    `places`: 16 bits each, the row of B (256 bytes) of a value, counted from `b`.
    """
    if not all(isinstance(kind, types.Literal) for kind in (vectors, masked)):
        return None
    row, edge = range(vectors.literal_value), bool(masked.literal_value)

    def generate(context, builder, signature, arguments):
        values, places, fours, b, fifth, before, c, columns = arguments[:8]
        sets = 2 if has_avx512() else 1
        sums = _Sums(builder, sets * len(row))
        for v in row:
            sums.begin(v, load_lanes(builder, builder.add(before, word(64 * v))))
        with cgutils.for_range(builder, fours) as loop:
            four = _four_values(builder, builder.add(values, builder.mul(loop.index, word(16))))
            rows = _load(builder, builder.add(places, builder.mul(loop.index, word(8))), _I64, align=8)
            for k, left in enumerate(four):
                moved = builder.lshr(rows, word(16 * k - 8)) if k else builder.shl(rows, word(8))
                at = builder.add(b, builder.and_(moved, word(0xFFFF00)))
                for v, right in enumerate(_load_row(builder, at, row, fifth)):
                    sums.add_product(k % sets * len(row) + v, left, right)
        for v, mask in enumerate(_column_masks(builder, columns, row, edge)):
            total = builder.fadd(sums[v], sums[len(row) + v]) if sets == 2 else sums[v]
            store_lanes(builder, total, builder.add(c, word(64 * v)), mask)
        return context.get_dummy_value()

    return types.void(*[_WORD] * 8, vectors, masked), generate


def _compress(builder, found, mask):
    """[(values, their lanes, how many)] of the lanes of `mask`, which come first; what comes after them is of no use."""
    if has_avx512():
        compress = _function(builder, "llvm.experimental.vector.compress.v16i32", _INTEGERS, [_INTEGERS, _MASK, _INTEGERS])
        first = [
            builder.call(compress, [vector, mask, ir.Constant(_INTEGERS, None)])
            for vector in (builder.bitcast(found, _INTEGERS), _IOTA)
        ]
        return [(*first, count_lanes(builder, mask))]
    permute = _function(builder, "llvm.x86.avx2.permps", _floats(8), [_floats(8), ir.VectorType(_I32, 8)])
    table, parts = _orders(builder), []
    for first in (0, 8):
        half = ir.Constant(ir.VectorType(_I32, 8), list(range(first, first + 8)))
        values, inside = (builder.shuffle_vector(one, one, half) for one in (found, mask))
        bits = builder.bitcast(inside, _I8)
        order = builder.gep(table, [ir.Constant(_I64, 0), builder.zext(bits, _I64)])
        lanes = builder.zext(builder.load(order), half.type)
        count = builder.zext(builder.call(_function(builder, "llvm.ctpop.i8", _I8, [_I8]), [bits]), _I64)
        parts.append((builder.call(permute, [values, lanes]), builder.add(lanes, _constant(half.type, first)), count))
    return parts


def _orders(builder):
    """Of each 8 bits, the numbers of those that are set, in a table."""
    rows = [[bit for bit in range(8) if bits >> bit & 1] for bits in range(256)]
    row = ir.VectorType(_I8, 8)
    rows = [ir.Constant(row, found + [0] * (8 - len(found))) for found in rows]
    return cgutils.global_constant(builder, "orders", ir.Constant(ir.ArrayType(row, 256), rows))


@intrinsic
def compress_lanes(typing, source, lanes, values, places, first):
    """Write all that is not zero of `lanes` (up to 16) floats to `values`, and its lane plus `first`, 16 bits each, to
    `places`; returns how many. Up to 64 and 32 bytes are written.
    """

    def generate(context, builder, signature, arguments):
        source, lanes, values, places, first = arguments
        found = load_lanes(builder, source, first_lanes(builder, lanes))
        mask = builder.fcmp_unordered("!=", found, _constant(_FLOATS, 0.0))
        total = word(0)
        for kept, of_lanes, count in _compress(builder, found, mask):
            shorts = builder.trunc(of_lanes, ir.VectorType(_I16, of_lanes.type.count))
            shorts = builder.add(shorts, _splat(builder, builder.trunc(first, _I16), of_lanes.type.count))
            store_lanes(builder, kept, builder.add(values, builder.mul(total, word(4))))
            store_lanes(builder, shorts, builder.add(places, builder.mul(total, word(2))))
            total = builder.add(total, count)
        return total

    return _WORD(*[_WORD] * 5), generate


@intrinsic
def move_entries(typing, values, places, to_values, to_places, further):
    """Copy 16 entries of a list, with `further` added to their places."""

    def generate(context, builder, signature, arguments):
        values, places, to_values, to_places, further = arguments
        store_lanes(builder, load_lanes(builder, values), to_values)
        further = _splat(builder, builder.trunc(further, _I16))
        store_lanes(builder, builder.add(_load(builder, places, _SHORTS, align=2), further), to_places)
        return context.get_dummy_value()

    return types.void(*[_WORD] * 5), generate


def count_lanes(builder, mask):
    """How many lanes a mask holds, 64 bits."""
    bits = builder.bitcast(mask, ir.IntType(16))
    count = builder.call(_function(builder, "llvm.ctpop.i16", bits.type, [bits.type]), [bits])
    return builder.zext(count, _I64)


@intrinsic
def write_u64(typing, address, value):
    """Write a 64-bit integer."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], _I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(_WORD, _WORD), generate


@intrinsic
def pad_lanes(typing, source, lanes, target):
    """Copy `lanes` (up to 16) floats and write zeros after them, 16 in all."""

    def generate(context, builder, signature, arguments):
        source, lanes, target = arguments
        store_lanes(builder, load_lanes(builder, source, first_lanes(builder, lanes)), target)
        return context.get_dummy_value()

    return types.void(_WORD, _WORD, _WORD), generate


def _interleave(builder, a, b, step: int):
    """Blocks of `step` lanes of two vectors: the even ones of both, and the odd ones of both."""
    low, high = [], []
    for lane in range(16):
        block, inside = divmod(lane, step)
        source = 16 * (block % 2) + inside
        low.append(source + (block - block % 2) * step)
        high.append(source + (block - block % 2 + 1) * step)
    return [builder.shuffle_vector(a, b, ir.Constant(_INTEGERS, order)) for order in (low, high)]


@intrinsic
def transpose_tile(typing, source, source_row, rows, columns, target, target_row):
    """target (columns, rows) = source (rows, columns) transposed, up to 16 x 16; zeros fill rows of the target up to 16.

    Four rounds exchange blocks of 8, 4, 2 and 1 lanes between rows as far apart.
    """

    def generate(context, builder, signature, arguments):
        source, source_row, rows, columns, target, target_row = arguments
        inside, nothing = first_lanes(builder, columns), ir.Constant(_MASK, None)
        tile = []
        for row in range(16):
            mask = builder.select(builder.icmp_unsigned("<", word(row), rows), inside, nothing)
            tile.append(load_lanes(builder, builder.add(source, builder.mul(source_row, word(row))), mask))
        for step in (8, 4, 2, 1):
            for row in (row for row in range(16) if not row & step):
                tile[row], tile[row + step] = _interleave(builder, tile[row], tile[row + step], step)
        everything = ir.Constant(_MASK, [1] * 16)
        for column, value in enumerate(tile):
            mask = builder.select(builder.icmp_unsigned("<", word(column), columns), everything, nothing)
            store_lanes(builder, value, builder.add(target, builder.mul(target_row, word(column))), mask)
        return context.get_dummy_value()

    return types.void(*[_WORD] * 6), generate


_NEAREST, _SECOND = 3, 2  # caches, as LLVM numbers them


def _prefetch(builder, address, cache: int) -> None:
    pointer = builder.inttoptr(address, _I8.as_pointer())
    fetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    builder.call(fetch, [pointer, *(ir.Constant(_I32, number) for number in (0, cache, 1))])


@intrinsic
def prefetch(typing, address):
    """Ask for the cache line at an address."""

    def generate(context, builder, signature, arguments):
        _prefetch(builder, arguments[0], _NEAREST)
        return context.get_dummy_value()

    return types.void(_WORD), generate


@intrinsic
def prefetch_columns(typing, address):
    """Ask for 64 floats at an address, which are about to be written: else each write waits for what is written over.

    They come into the second cache: of requests for the nearest one a processor has fewer on the way.
    """

    def generate(context, builder, signature, arguments):
        for line in range(5):
            _prefetch(builder, builder.add(arguments[0], word(64 * line)), _SECOND)
        return context.get_dummy_value()

    return types.void(_WORD), generate


def _lane_access(builder, lanes):
    mask = first_lanes(builder, lanes)

    def read(address, offset=None):
        address = address if offset is None else builder.add(address, offset)
        return _Lanes(builder, load_lanes(builder, address, mask))

    def write(lanes, address, offset=None):
        address = address if offset is None else builder.add(address, offset)
        store_lanes(builder, lanes.value, address, mask)

    return mask, read, write


@intrinsic
def lstm_step(typing, gates, gate_bytes, lanes, bias, before_c, tanh_c, after_c, after_h):
    """Up to 16 units of an LSTM's forward step: sums at `gates` become activations in place; i, f, g, o, `gate_bytes` apart."""

    def generate(context, builder, signature, arguments):
        gates, gate_bytes, lanes, bias, before_c, tanh_c, after_c, after_h = arguments
        _, read, write = _lane_access(builder, lanes)
        places = [builder.mul(gate_bytes, word(k)) for k in range(4)]
        sums = [read(gates, place) + read(bias, place) for place in places]
        i, f, g, o = _sigmoid(sums[0]), _sigmoid(sums[1]), _tanh(sums[2]), _sigmoid(sums[3])
        for gate, place in zip((i, f, g, o), places, strict=True):
            write(gate, gates, place)
        c = f * read(before_c) + i * g
        tanh = _tanh(c)
        write(c, after_c)
        write(tanh, tanh_c)
        write(o * tanh, after_h)
        return context.get_dummy_value()

    return types.void(*[_WORD] * 8), generate


@intrinsic
def lstm_gradients(typing, gates, gate_bytes, lanes, before_c, tanh_c, d_h, d_out, d_c, dnet, threshold, signed):
    """Up to 16 units of an LSTM's backward step: write the thresholded dnet, and dc f over dc.

    `threshold`: the bits of a float32. Returns 2^32 times the entries that were not zero before the threshold, plus those that
    are not after it.
    """

    def generate(context, builder, signature, arguments):
        gates, gate_bytes, lanes, before_c, tanh_c, d_h, d_out, d_c, dnet, threshold, signed = arguments
        mask, read, write = _lane_access(builder, lanes)
        places = [builder.mul(gate_bytes, word(k)) for k in range(4)]
        i, f, g, o = (read(gates, place) for place in places)
        tanh, dh = read(tanh_c), read(d_h) + read(d_out)
        one = _Lanes(builder, _constant(_FLOATS, 1.0))
        dc = dh * o * (one - tanh * tanh) + read(d_c)
        write(dc * f, d_c)
        of_gates = (
            dc * g * (i * (one - i)),
            dc * read(before_c) * (f * (one - f)),
            dc * i * (one - g * g),
            dh * tanh * (o * (one - o)),
        )
        t = _splat(builder, builder.bitcast(builder.trunc(threshold, _I32), ir.FloatType()))
        signed = builder.icmp_unsigned("!=", signed, word(0))
        zeros, counts = _constant(_FLOATS, 0.0), word(0)
        for gradient, place in zip(of_gates, places, strict=True):
            value = gradient.value
            magnitude = builder.call(_function(builder, "llvm.fabs.v16f32", _FLOATS, [_FLOATS]), [value])
            stays = builder.fcmp_unordered(">", builder.select(signed, value, magnitude), t)  # NaN stays
            kept = builder.select(stays, value, zeros)
            write(_Lanes(builder, kept), dnet, place)
            for part, shift in ((value, 32), (kept, 0)):
                found = count_lanes(builder, builder.and_(mask, builder.fcmp_unordered("!=", part, zeros)))
                counts = builder.add(counts, builder.shl(found, word(shift)))
        return counts

    return _WORD(*[_WORD] * 11), generate
