"""A few vector instructions for numba kernels: 16 (or 8) float32 lanes loaded, multiplied and looked up at raw addresses.

numba's own vectoriser does not find these loops (kernels written as plain loops take 2 to 10 times as long). Addresses are
unsigned integers, as `array.ctypes.data` gives them: with signed ones LLVM has to keep checks for wrap-around in the loops.
All of it is plain LLVM that any processor runs, but for the look-up, which needs AVX-512 (`has_avx512`).
"""

from functools import cache
from pathlib import Path

import llvmlite.binding
import torch  # noqa: F401  before numba: both then share torch's OpenMP, and one pool of threads
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model


def _has(*features: str) -> bool:
    """Whether the processor that numba compiles for has these instructions.

    `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` override the host, as they do for numba; a named processor that is not the host
    has just the features that are listed.
    """
    if config.CPU_FEATURES is not None:
        listed = config.CPU_FEATURES.split(",")
        return all(f"+{feature}" in listed for feature in features)
    if config.CPU_NAME not in (None, "", llvmlite.binding.get_host_cpu_name()):
        return False
    found = llvmlite.binding.get_host_cpu_features()
    return all(found.get(feature, False) for feature in features)


@cache
def has_avx512() -> bool:
    """Whether there are 32 registers of 16 lanes. Compiling `window_step` for a processor without aborts the process."""
    return _has("avx512f")


@cache
def has_avx2() -> bool:
    """Whether there are at least 16 registers of 8 lanes, and fused multiply-add."""
    return _has("avx2", "fma")


@cache
def vendor() -> str:
    """Who made the processor, as Linux names it: "GenuineIntel", "AuthenticAMD"; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


class Vector(types.Type):
    """The numba type of `lanes` float32 values in one register."""

    def __init__(self, lanes: int):
        self.lanes = lanes
        super().__init__(name=f"float32x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, _floats(vector.lanes))


float32x8, float32x16 = Vector(8), Vector(16)
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _floats(lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.FloatType(), lanes)


def _constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _load(builder, address, kind, offset: int = 0, align: int = 4):
    pointer = builder.inttoptr(builder.add(address, ir.Constant(address.type, offset)), kind.as_pointer())
    value = builder.load(pointer)
    value.align = align
    return value


def _multiply_add(builder, a, b, c):
    # Multiplication and addition that may be contracted: a fused instruction where there is one, no call of libm elsewhere.
    return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])


def _reader(kind: ir.Type):
    @intrinsic
    def read(typing, address):
        def generate(context, builder, signature, arguments):
            value = _load(builder, arguments[0], kind, align=kind.width // 8)
            return value if kind == _I64 else builder.zext(value, _I64)

        return types.uintp(types.uintp), generate

    return read


read_u32, read_u64 = _reader(_I32), _reader(_I64)


@intrinsic(prefer_literal=True)
def zero_sums(typing, lanes, count):
    """A tuple of `count` registers of `lanes` zeros."""
    if not isinstance(lanes, types.Literal) or not isinstance(count, types.Literal):
        return None
    vector = {8: float32x8, 16: float32x16}[lanes.literal_value]

    def generate(context, builder, signature, arguments):
        return cgutils.pack_array(builder, [_constant(_floats(vector.lanes), 0.0)] * signature.return_type.count)

    return types.UniTuple(vector, count.literal_value)(lanes, count), generate


@intrinsic
def scale_sums(typing, sums, scales):
    """Every register of `sums` times the register at the address `scales`."""

    def generate(context, builder, signature, arguments):
        scale = _load(builder, arguments[1], _floats(signature.args[0].dtype.lanes))
        return cgutils.pack_array(builder, [builder.fmul(one, scale) for one in cgutils.unpack_tuple(builder, arguments[0])])

    return sums(sums, types.uintp), generate


@intrinsic(prefer_literal=True)
def store_sums(typing, address, stride, sums, registers):
    """Add up every `registers`-th register of `sums` and write the `registers` results, `stride` bytes apart."""
    if not isinstance(registers, types.Literal):
        return None

    def generate(context, builder, signature, arguments):
        address, stride = arguments[:2]
        parts = cgutils.unpack_tuple(builder, arguments[2])
        for first in range(registers.literal_value):
            result = parts[first]
            for part in parts[first + registers.literal_value :: registers.literal_value]:
                result = builder.fadd(result, part)
            builder.store(result, builder.inttoptr(address, result.type.as_pointer())).align = 4
            address = builder.add(address, stride)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, sums, registers), generate


def _permute(builder, low, index, high):
    """vpermi2ps: lane i gets entry `index[i] % 32` of the 32 floats low, high. Upper bits of the index are ignored."""
    floats, integers = _floats(16), ir.VectorType(_I32, 16)
    kind = ir.FunctionType(floats, [floats, integers, floats])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.ps.512")
    return builder.call(function, [low, index, high])


def _slot(builder, slots, offset: int, slot_bytes: int):
    """(16 values, 16 indices, whether each index points to the upper 32 of 64 columns, or None) of a slot, see `packing`."""
    integers = ir.VectorType(_I32, 16)
    if slot_bytes == 32:
        both = builder.sext(_load(builder, slots, ir.VectorType(_I16, 16), offset, 2), integers)
        return builder.sitofp(both, _floats(16)), both, None
    both = _load(builder, slots, integers, offset)
    if slot_bytes == 64:
        flag = 1 << 30
        value = builder.bitcast(builder.and_(both, _constant(integers, ~flag & 0xFFFFFFFF)), _floats(16))
        index = both
    else:
        flag = 32
        value = builder.bitcast(both, _floats(16))
        index = builder.zext(_load(builder, slots, ir.VectorType(_I8, 16), offset + 64, 1), integers)
    upper = builder.icmp_unsigned("!=", builder.and_(index, _constant(integers, flag)), _constant(integers, 0))
    return value, index, upper


@intrinsic(prefer_literal=True)
def window_step(typing, slots, x, stride, sums, slot_bytes, count, batch):
    """`sums += ` the products of `count` slots of 16 weights with the windows of `batch` vectors that they look into.

    `slots`: address of the first slot, of 32 (16-bit), 64 or 80 (exact) bytes each; `x`: address of the window in the first
    vector, aligned to 64 bytes; the next vector is `stride` bytes on. `sums`: one register a vector, or two if there is one.
    """
    if not all(isinstance(kind, types.Literal) for kind in (slot_bytes, count, batch)):
        return None
    size, slot_count, vectors = slot_bytes.literal_value, count.literal_value, batch.literal_value
    tables = 2 if size == 32 else 4

    def generate(context, builder, signature, arguments):
        slots, x, stride, sums = arguments[:4]
        sums = cgutils.unpack_tuple(builder, sums)
        windows = []
        for _ in range(vectors):
            windows.append([_load(builder, x, _floats(16), 64 * i, align=64) for i in range(tables)])
            x = builder.add(x, stride)
        for k in range(slot_count):
            value, index, upper = _slot(builder, slots, k * size, size)
            for b, window in enumerate(windows):
                found = _permute(builder, window[0], index, window[1])
                if upper is not None:
                    found = builder.select(upper, _permute(builder, window[2], index, window[3]), found)
                place = b if vectors > 1 else k % 2
                sums[place] = _multiply_add(builder, value, found, sums[place])
        return cgutils.pack_array(builder, sums)

    return sums(types.uintp, types.uintp, types.uintp, sums, slot_bytes, count, batch), generate


@intrinsic(prefer_literal=True)
def row_step(typing, values, columns, x, row_bytes, sums, registers, count, index_bytes):
    """`sums += ` the products of `count` weights, each with the row of a matrix x that its column names.

    `values`, `columns`: addresses of the float32 weights and of their columns (2 or 4 bytes each); rows of x are `row_bytes`
    apart and fill `registers` registers. `sums` has one such set for each weight: no addition waits for the one before.
    """
    if not all(isinstance(kind, types.Literal) for kind in (registers, count, index_bytes)):
        return None
    width = sums.dtype.lanes
    index = {2: _I16, 4: _I32}[index_bytes.literal_value]

    def generate(context, builder, signature, arguments):
        values, columns, x, row_bytes, sums = arguments[:5]
        sums = cgutils.unpack_tuple(builder, sums)
        for k in range(count.literal_value):
            column = builder.zext(_load(builder, columns, index, k * index.width // 8, index.width // 8), row_bytes.type)
            row = builder.add(x, builder.mul(column, row_bytes))
            weight = _load(builder, values, ir.FloatType(), 4 * k)
            kind = _floats(width)
            one = builder.insert_element(ir.Constant(kind, ir.Undefined), weight, ir.Constant(_I32, 0))
            weight = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _constant(ir.VectorType(_I32, width), 0))
            for r in range(registers.literal_value):
                place = k * registers.literal_value + r
                sums[place] = _multiply_add(builder, weight, _load(builder, row, kind, 4 * width * r), sums[place])
        return cgutils.pack_array(builder, sums)

    arguments = (types.uintp, types.uintp, types.uintp, types.uintp, sums, registers, count, index_bytes)
    return sums(*arguments), generate
