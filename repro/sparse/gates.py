"""The equations of recurrent cells for 16 units at a time, as vector instructions for `repro.sparse.recurrence`.

A cell computes the next state of 16 units from the input's and the recurrent share of the sums of its gates. All of it is plain
LLVM that any processor runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import factorial

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from repro.models.recurrent import CLIP
from repro.sparse.simd import _I32, _constant, _floats, _load

_UNITS = 16
_INTEGERS = ir.VectorType(_I32, _UNITS)


@dataclass(frozen=True)
class _Lanes:
    """16 float32 values while code is generated: `a * b + c` emits these instructions."""

    builder: ir.IRBuilder
    value: ir.Value

    def _of(self, other) -> ir.Value:
        return other.value if isinstance(other, _Lanes) else _constant(_floats(_UNITS), float(other))

    def _emit(self, instruction: str, first: ir.Value, second: ir.Value) -> "_Lanes":
        return _Lanes(self.builder, getattr(self.builder, instruction)(first, second, flags=["contract"]))

    def __add__(self, other):
        return self._emit("fadd", self.value, self._of(other))

    def __sub__(self, other):
        return self._emit("fsub", self.value, self._of(other))

    def __mul__(self, other):
        return self._emit("fmul", self.value, self._of(other))

    def __truediv__(self, other):
        return self._emit("fdiv", self.value, self._of(other))

    def __rtruediv__(self, other):
        return self._emit("fdiv", self._of(other), self.value)

    def magnitude(self):
        return _Lanes(self.builder, _call(self.builder, "llvm.fabs.v16f32", self.value))

    def signed_as(self, other):
        return _Lanes(self.builder, _call(self.builder, "llvm.copysign.v16f32", self.value, other.value))

    def at_least(self, bound: float):
        return self._bounded("<", bound)

    def at_most(self, bound: float):
        return self._bounded(">", bound)

    def _bounded(self, beyond: str, bound: float):
        # NaN compares false and stays NaN, as in torch.
        outside = self.builder.fcmp_ordered(beyond, self.value, self._of(bound))
        return _Lanes(self.builder, self.builder.select(outside, self._of(bound), self.value))


def _call(builder, name: str, *values):
    """A function of vectors to one of their kind."""
    kind = ir.FunctionType(values[0].type, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _expm1(x: _Lanes) -> _Lanes:
    """e^x - 1, to about 1e-7 of itself for |x| <= 88 and that of the nearest bound beyond.

    x = k ln 2 + r with |r| <= ln 2 / 2; e^x - 1 = (2^k - 1) + 2^k (e^r - 1), e^r - 1 by its Taylor series up to r^8 / 8!.
    """
    x = x.at_least(-88.0).at_most(88.0)
    builder = x.builder
    k = _Lanes(builder, _call(builder, "llvm.rint.v16f32", (x * 1.4426950408889634).value))
    r = x - k * 0.693359375 - k * -2.12194440e-4  # the first product is exact
    series = r * (1 / factorial(8)) + 1 / factorial(7)
    for power in range(6, 0, -1):
        series = series * r + 1 / factorial(power)
    number = builder.fcmp_ordered("ord", k.value, k.value)  # there is no integer for NaN; the series keeps it
    whole = builder.fptosi(builder.select(number, k.value, _constant(_floats(_UNITS), 0.0)), _INTEGERS)
    exponent = builder.add(whole, _constant(_INTEGERS, 127))
    power_of_two = _Lanes(builder, builder.bitcast(builder.shl(exponent, _constant(_INTEGERS, 23)), _floats(_UNITS)))
    return power_of_two * (series * r) + (power_of_two - 1.0)


def _where_above(x: _Lanes, bound: float, then, otherwise) -> _Lanes:
    """`then` where x > `bound`, `otherwise` elsewhere, NaN included."""
    above = x.builder.fcmp_ordered(">", x.value, x._of(bound))
    return _Lanes(x.builder, x.builder.select(above, x._of(then), x._of(otherwise)))


def _sigmoid(x: _Lanes) -> _Lanes:
    """1 / (e^|x| + 1) if x is negative, 1 less that if it is not: e^-|x| - 1 would lose what it is above -1."""
    rest = 1.0 / (_expm1(x.magnitude()) + 2.0)
    return _where_above(x, 0.0, rest * -1.0 + 1.0, rest)


def _tanh(x: _Lanes) -> _Lanes:
    """With e = e^2|x| - 1 it is e / (e + 2) and, above 1/2, 1 - 2 / (e + 2) rather than a quotient of neighbours.

    e / (e + 2) is 1 from |x| = 8.66 on, tanh in float32 from 9.01 on. What is between decides which full cells of an LSTM pass
    no gradient on: 1 - tanh(c)^2.
    """
    e = _expm1((x.magnitude() * 2.0).at_most(40.0))
    quotient = _where_above(e, 2.0, -2.0, e) / (e + 2.0)
    return (quotient + _where_above(e, 2.0, 1.0, 0.0)).signed_as(x)


def _gru(x, u, bias, h, c):
    reset, update = _sigmoid(x(0) + u(0)), _sigmoid(x(1) + u(1))
    new = _tanh(x(2) + reset * (u(2) + bias()))
    return new + update * (h() - new), None


def _lstm(x, u, bias, h, c):
    kept = _sigmoid(x(1) + u(1)) * c() + _sigmoid(x(0) + u(0)) * _tanh(x(2) + u(2))
    return _sigmoid(x(3) + u(3)) * _tanh(kept), kept


@dataclass(frozen=True)
class Cell:
    """`gates` sums a unit, in torch's order of rows; `equations(x, u, bias, h, c) -> (next h, next c or None)`.

    `x(g)`, `u(g)`: the input's (with the biases) and the recurrent share of gate g; `bias()`: the one that the reset gate of
    `nn.GRU` acts on.
    """

    gates: int
    equations: Callable


CELLS = {
    "RNN_TANH": Cell(1, lambda x, u, bias, h, c: (_tanh(x(0) + u(0)), None)),
    "RNN_RELU": Cell(1, lambda x, u, bias, h, c: ((x(0) + u(0)).at_least(0.0), None)),
    "CLIPPED": Cell(1, lambda x, u, bias, h, c: ((x(0) + u(0)).at_least(0.0).at_most(CLIP), None)),
    "GRU": Cell(3, _gru),
    "LSTM": Cell(4, _lstm),
}


@cache
def cell_step(kind: str):
    """`step(u, x, bias, h, c, following, out)`: 16 units of a cell at raw addresses.

    `u` and `x` hold the gates one after the other, 64 bytes each. The next h is written to `following` and to `out`, the next c
    (LSTM) over the old one.
    """
    equations = CELLS[kind].equations

    def step(typing, u, x, bias, h, c, following, out):
        def generate(context, builder, signature, arguments):
            def reader(address):
                return lambda gate=0: _Lanes(builder, _load(builder, address, _floats(_UNITS), 64 * gate))

            u, x, bias, h, c, following, out = arguments
            new_h, new_c = equations(reader(x), reader(u), reader(bias), reader(h), reader(c))
            for address, lanes in ((following, new_h), (out, new_h), (c, new_c)):
                if lanes is not None:
                    builder.store(lanes.value, builder.inttoptr(address, _floats(_UNITS).as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(*[types.uintp] * 7), generate

    step.__name__ = f"step_{kind}"  # by which kernels that close over it are told apart
    return intrinsic(step)


@intrinsic
def copy_lanes(typing, source, target):
    """Copy 16 float32 values from one address to another."""

    def generate(context, builder, signature, arguments):
        value = _load(builder, arguments[0], _floats(_UNITS))
        builder.store(value, builder.inttoptr(arguments[1], value.type.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp), generate
