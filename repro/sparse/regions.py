"""Parallel regions of compiled kernels, on the OpenMP threads that torch has already started.

numba's own `prange` costs a microsecond more for each region, in kernels that take ten, and compiles for longer. A kernel gets
what it needs through a *plan*, an int64 array whose first entries are the same in all:

    plan[THREADS]      parts that the work is cut into
    plan[BOUNDS + i]   where part i begins; plan[BOUNDS + threads] is where the last one ends
    plan[FREE + k]     what the kernel likes, mostly addresses, for k up to 7

The region runs each part on a thread of its own if OpenMP grants as many threads, and shares them out if not.
"""

import ctypes
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from threadpoolctl import threadpool_info

from repro.sparse.caching import kept, kept_callback
from repro.sparse.simd import read_u64

THREADS, _PARALLEL, _NUMBER, _TEAM, FREE, BOUNDS = 0, 1, 2, 3, 4, 12
u = np.uintp


@cache
def _openmp() -> tuple[int, int, int]:
    """Addresses of GOMP_parallel (which LLVM's and Intel's OpenMP have too) and of two questions; zeros without OpenMP."""
    for pool in threadpool_info():
        if pool["user_api"] == "openmp":
            library = ctypes.CDLL(pool["filepath"])
            names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
            if all(hasattr(library, name) for name in names):
                return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names)
    return 0, 0, 0


thread_count = torch.get_num_threads


def make_plan(bounds, free) -> np.ndarray:
    """A plan whose parts lie between the `bounds`; `free`: its first free entries."""
    free = [*free, *[0] * (BOUNDS - FREE - len(free))]
    return np.array([len(bounds) - 1, *_openmp(), *free, *bounds], dtype=np.int64)


@intrinsic
def _call_parallel(typing, parallel, body, plan, threads):
    def generate(context, builder, signature, arguments):
        pointer, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, integer, integer])
        function, body, plan, threads = arguments
        function = builder.inttoptr(function, kind.as_pointer())
        data = [builder.inttoptr(body, pointer), builder.inttoptr(plan, pointer)]
        builder.call(function, [*data, builder.trunc(threads, integer), ir.Constant(integer, 0)])
        return context.get_dummy_value()

    return types.void(*[types.uintp] * 4), generate


@intrinsic
def _call_body(typing, body, plan):
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [arguments[1].type])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp), generate


@intrinsic
def _ask(typing, question):
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        answer = builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return builder.zext(answer, ir.IntType(64))

    return types.uintp(types.uintp), generate


@intrinsic
def _pointer(typing, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.uintp), generate


@njit
def entry(plan, k):
    """plan[k] of a plan given by its address."""
    return read_u64(plan + u(8) * u(k))


@njit
def array_at(address, size, dtype):
    """The one-dimensional array of `size` entries at an address."""
    return carray(_pointer(address), (size,), dtype)


@kept
def run(plan, body):
    """Run the region of which `body` is the address, and wait for it."""
    address = u(plan.ctypes.data)
    if plan[THREADS] == 1 or plan[_PARALLEL] == 0:
        _call_body(u(body), address)
    else:
        _call_parallel(u(plan[_PARALLEL]), u(body), address, u(plan[THREADS]))


def region(part):
    """Compile `part(plan, first, last)`, the work between two bounds, into the body of a region; `plan` is its address."""
    part = njit(part, fastmath={"reassoc", "contract"})

    @kept_callback
    def body(plan):
        threads = entry(plan, THREADS)
        number, team = u(0), u(1)
        if threads > u(1) and entry(plan, _PARALLEL) != u(0):
            number, team = _ask(entry(plan, _NUMBER)), _ask(entry(plan, _TEAM))
        for i in range(number, threads, team):
            part(plan, entry(plan, u(BOUNDS) + i), entry(plan, u(BOUNDS + 1) + i))

    return body
