"""One layer and direction of an LSTM on the CPU in float32: all steps forward, all steps backward, as compiled loops.

What passes from one to the other is what `repro.gradients.lstm` keeps, so that either half can be replaced by torch's.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from repro.gradients import products, simd
from repro.gradients.lists import compressor
from repro.gradients.panels import INNER, LISTS, REVERSED, ROWS, A, C, scratch
from repro.gradients.products import packed
from repro.gradients.recording import Site
from repro.gradients.recurrent import Course, States
from repro.gradients.thresholds import Static
from repro.sparse.caching import kept
from repro.sparse.regions import BOUNDS, FREE, THREADS, entry, make_plan, region, run, thread_count
from repro.sparse.simd import has_avx2, vendor

# The share of dnet that is not zero up to which products skip zeros: as fast as all of it at 0.35 (256 units) to 0.5.
_DENSEST = 0.35
_SMALLEST_HIDDEN = 64
_WORTH_THREADS = 2**10  # units of all sequences of a step: fewer take less time than starting a second thread
u = np.uintp

_ARGUMENTS = ("gates", "before_c", "tanh_c", "after_c", "after_h", "bias", "d_h", "d_out", "d_c", "dnet", "counts")
_ARGUMENTS += ("hidden", "threshold", "signed")
_GATES, _BEFORE_C, _TANH_C, _AFTER_C, _AFTER_H, _BIAS, _D_H, _D_OUT, _D_C, _DNET, _COUNTS = (u(k) for k in range(11))
_HIDDEN, _THRESHOLD, _SIGNED = u(11), u(12), u(13)


def usable(x: Tensor, hidden: int) -> bool:
    """Whether the compiled loops take these numbers, on this processor, and are worth compiling for this width."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and hidden >= _SMALLEST_HIDDEN and has_avx2()


@cache
def _library_is_faster() -> bool:
    """Whether torch multiplies large whole matrices faster than `products`: on Intel's processors its MKL does, by a fifth.

    (One thread of a Xeon, 650 to 2600 rows and columns: 5.7 to 6.7 against 4.8 to 5.9 vector operations a nanosecond. On an
    AMD EPYC steps with `products` took less time than nn.LSTM from 650 cells on.)
    """
    return torch.backends.mkl.is_available() and vendor() == "GenuineIntel"


@cache
def _forward_point():
    """Body that makes activations and states out of the sums of one step; its bounds are sequences."""

    @region
    def body(plan, first, last):
        p = entry(plan, FREE)
        hidden = entry(p, _HIDDEN)
        for row in range(first, last):
            for unit in range(u(0), hidden, u(16)):
                state = (row * hidden + unit) * u(4)
                simd.lstm_step(
                    entry(p, _GATES) + (u(4) * row * hidden + unit) * u(4),
                    hidden * u(4),
                    hidden - unit,
                    entry(p, _BIAS) + unit * u(4),
                    entry(p, _BEFORE_C) + state,
                    entry(p, _TANH_C) + state,
                    entry(p, _AFTER_C) + state,
                    entry(p, _AFTER_H) + state,
                )

    return body


@cache
def _backward_point():
    """Body that forms dnet of one step, thresholded, and the next dc; its bounds are sequences, and each has its count."""

    @region
    def body(plan, first, last):
        p = entry(plan, FREE)
        hidden = entry(p, _HIDDEN)
        for row in range(first, last):
            counts = u(0)
            for unit in range(u(0), hidden, u(16)):
                gate, state = (u(4) * row * hidden + unit) * u(4), (row * hidden + unit) * u(4)
                counts += simd.lstm_gradients(
                    entry(p, _GATES) + gate,
                    hidden * u(4),
                    hidden - unit,
                    entry(p, _BEFORE_C) + state,
                    entry(p, _TANH_C) + state,
                    entry(p, _D_H) + state,
                    entry(p, _D_OUT) + state,
                    entry(p, _D_C) + state,
                    entry(p, _DNET) + gate,
                    entry(p, _THRESHOLD),
                    entry(p, _SIGNED),
                )
            simd.write_u64(entry(p, _COUNTS) + row * u(8), counts)

    return body


@kept
def _share_rows(plan, first, rows):
    for i in range(plan[THREADS] + 1):
        plan[BOUNDS + i] = first + rows * i // plan[THREADS]


@kept
def _forward_steps(starts, sizes, before_h, point, plan, body, product, product_plan, product_body):
    """Steps from frame `starts[i]` on with `sizes[i]` sequences. Addresses in `point` and `before_h` are of frame 0."""
    base = point.copy()
    for i in range(len(starts)):
        state = 4 * point[_HIDDEN] * starts[i]
        point[_GATES] = base[_GATES] + 4 * state
        for k in (_BEFORE_C, _TANH_C, _AFTER_C, _AFTER_H):
            point[k] = base[k] + state
        product[A], product[C], product[ROWS], product[REVERSED] = before_h + state, point[_GATES], sizes[i], i % 2
        run(product_plan, product_body)
        _share_rows(plan, 0, sizes[i])
        run(plan, body)
    point[:] = base


@kept
def _gradient_step(start, size, point, plan, body, counts):
    """Form the dnet of one step; returns how many entries are not zero before the threshold, and after it."""
    base = point.copy()
    state = 4 * point[_HIDDEN] * start
    point[_GATES], point[_DNET] = base[_GATES] + 4 * state, base[_DNET] + 4 * state
    for k in (_BEFORE_C, _TANH_C, _D_OUT):
        point[k] = base[k] + state
    _share_rows(plan, 0, size)
    run(plan, body)
    point[:] = base
    alive, kept = 0, 0
    for row in range(size):
        alive += counts[row] >> 32
        kept += counts[row] & 0xFFFFFFFF
    return alive, kept


@kept
def _product_step(start, size, kept, dnet, product, dense_plan, dense_body, list_plan, list_body, sparse_body):
    """dh = dnet U of one step; `dnet`: the address of frame 0. Returns whether its non-zero entries were listed."""
    columns = product[INNER]
    product[A], product[ROWS], product[REVERSED] = dnet, size, 1 - product[REVERSED]
    if kept > _DENSEST * columns * size:
        product[A] += 4 * columns * start
        run(dense_plan, dense_body)
        return False
    _share_rows(list_plan, start, size)
    run(list_plan, list_body)
    lists = product[LISTS]
    product[LISTS] += 8 * start
    run(dense_plan, sparse_body)
    product[LISTS] = lists
    return True


@kept
def _backward_steps(starts, sizes, gradient, product):
    """All steps with one threshold; returns how many entries of dnet are not zero, and whether all of them were listed."""
    total, listed = 0, True
    for i in range(len(starts)):
        _, kept = _gradient_step(starts[i], sizes[i], *gradient)
        listed &= _product_step(starts[i], sizes[i], kept, *product)
        total += kept
    return total, listed


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _point(threads_for: int, **values: int) -> tuple[np.ndarray, np.ndarray]:
    """The arguments of a point body and its plan."""
    point = np.array([values.get(name, 0) for name in _ARGUMENTS], np.int64)
    threads = thread_count() if threads_for > _WORTH_THREADS else 1
    return point, make_plan([0] * (threads + 1), (point.ctypes.data,))


def _steps(course: Course) -> tuple[np.ndarray, np.ndarray]:
    """First frame and number of sequences of each step, in the order of the forward pass."""
    sizes = np.array(course.sizes, np.int64)
    starts = sizes.cumsum() - sizes
    return (starts[::-1].copy(), sizes[::-1].copy()) if course.backwards else (starts, sizes)


def forward(x: Tensor, h: States, c: States, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None, course: Course):
    """(gates (total, 4 hidden), tanh(c) (total, hidden)) of all frames; h and c are filled."""
    batch, hidden = course.sizes[0], w_hh.shape[1]
    gates, tanh_c = _empty(len(x), 4 * hidden), _empty(len(x), hidden)
    bias = x.new_zeros(4 * hidden) if bias is None else bias
    if _library_is_faster():
        torch.mm(x, w_ih.t(), out=gates)
    else:
        packed(w_ih.numpy(), transposed=True)(x.numpy(), gates.numpy(), sparse=False)
    product = packed(w_hh.numpy(), transposed=True)
    product.begin_steps(4 * hidden, 16 * hidden, add=1)
    point, plan = _point(
        batch * hidden,
        gates=_address(gates),
        before_c=_address(c.before),
        tanh_c=_address(tanh_c),
        after_c=_address(c.after),
        after_h=_address(h.after),
        bias=_address(bias),
        hidden=hidden,
    )
    rest = (
        _address(h.before),
        point,
        plan,
        _forward_point().address,
        product.arguments,
        product.by_panels(batch),
        product.dense,
    )
    starts, sizes = _steps(course)
    if h.one_array:
        _forward_steps(starts, sizes, *rest)
    else:
        for i, (_, frames) in enumerate(course.steps()):
            h.enter(frames), c.enter(frames)
            _forward_steps(starts[i : i + 1], sizes[i : i + 1], *rest)
            h.leave(frames), c.leave(frames)
    return gates, tanh_c


def backward(
    d_out: Tensor, d_h: Tensor, d_c: Tensor, w_hh: Tensor, before_c: Tensor, gates: Tensor, tanh_c: Tensor, course, site
):
    """(dnet (total, 4 hidden), whether its products had better skip zeros, whether its entries are listed for the next one).

    d_h and d_c become those of the first states.
    Where a rule acts on the gradients of the weights alone, dnet is as it was formed, and `threshold` has to follow.
    """
    rule, number = (Static(0.0), 0) if site.weights_only else (site.rule, site.number)
    batch, hidden = d_h.shape
    d_out = d_out.contiguous()
    dnet, gradient = gradients(d_out, d_h, d_c, before_c, gates, tanh_c, rule.signed)
    product = packed(w_hh.numpy())
    product.begin_steps(16 * hidden, 4 * hidden, c=_address(d_h))
    by_rows = product.by_rows(batch)
    product.make_lists(len(dnet), by_rows, len(course.sizes))
    bodies = (product.by_panels(batch), product.dense, by_rows, compressor().address, product.sparse)
    times = (_address(dnet), product.arguments, *bodies)
    starts, sizes = (part[::-1].copy() for part in _steps(course))
    t = rule.known(number)
    if t is not None and not rule.feedback:
        gradient[0][_THRESHOLD] = _bits(t)
        kept, listed = _backward_steps(starts, sizes, gradient, times)
    else:
        kept, listed = 0, True
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            of_step = form_step(start, size, gradient, dnet, site)
            listed &= _product_step(start, size, of_step, *times)
            kept += of_step
    return dnet, kept <= _DENSEST * dnet.numel(), listed


def threshold(dnet: Tensor, course: Course, site: Site) -> bool:
    """Let the rule act on a dnet formed without it, step by step, in place; returns whether products had better skip zeros."""
    for _, frames in reversed(course.steps()):
        site.apply(dnet[frames])
    return int(dnet.count_nonzero()) <= _DENSEST * dnet.numel()


def gradients(d_out: Tensor, d_h: Tensor, d_c: Tensor, before_c: Tensor, gates: Tensor, tanh_c: Tensor, signed: bool):
    """(dnet (total, 4 hidden), not yet formed, what `form_step` needs to form it).

    All tensors are contiguous, and the caller keeps them. dnet lies in memory that this thread's next backward pass uses again.
    """
    batch, hidden = d_h.shape
    dnet = torch.from_numpy(scratch("dnet of all steps", gates.numel())).view_as(gates)
    counts = np.zeros(batch, np.int64)
    point, plan = _point(
        batch * hidden,
        gates=_address(gates),
        before_c=_address(before_c),
        tanh_c=_address(tanh_c),
        d_h=_address(d_h),
        d_out=_address(d_out),
        d_c=_address(d_c),
        dnet=_address(dnet),
        counts=counts.ctypes.data,
        hidden=hidden,
        signed=signed,
    )
    return dnet, (point, plan, _backward_point().address, counts)


def form_step(start: int, size: int, gradient, dnet: Tensor, site: Site) -> int:
    """Form the dnet of the `size` frames from `start` on and dc of the step before it; dh is the caller's to fill.

    The rule acts on it, whether it reads dnet or is told of it. Returns how many entries are not zero.
    """
    rule, number = site.rule, site.number
    t = rule.known(number)
    gradient[0][_THRESHOLD], gradient[0][_SIGNED] = _bits(t or 0.0), rule.signed and t is not None
    alive, kept = _gradient_step(start, size, *gradient)
    if t is None:
        return int(site.apply(dnet[start : start + size]).count_nonzero())
    rule.observe(number, kept, alive, 4 * size * int(gradient[0][_HIDDEN]))
    return kept


def _bits(t: float) -> int:
    """Of the largest float32 at most: infinities stay."""
    return int(np.float32(min(t, np.finfo(np.float32).max)).view(np.int32))


def input_gradient(dnet: Tensor, w_ih: Tensor, sparse: bool, listed: bool) -> Tensor:
    """dx = dnet W, (total, features); `listed`: the entries of dnet still are, by `backward`."""
    dx = _empty(len(dnet), w_ih.shape[1])
    if not sparse and _library_is_faster():
        return torch.mm(dnet, w_ih, out=dx)
    packed(w_ih.numpy())(dnet.numpy(), dx.numpy(), sparse=sparse, listed=listed)
    return dx


def weight_gradients(dnet: Tensor, inputs: list[Tensor], sparse: bool) -> list[Tensor]:
    """dnet^T x, (4 hidden, features), for each x (total, features)."""
    if not sparse and _library_is_faster():
        return [torch.mm(dnet.t(), x, out=_empty(dnet.shape[1], x.shape[1])) for x in inputs]
    transposed = dnet.numpy().T if sparse else products.transpose("dnet", dnet.numpy())
    found = []
    for x in inputs:
        gradient = _empty(dnet.shape[1], x.shape[1])
        packed(x.numpy())(transposed, gradient.numpy(), sparse=sparse, listed=bool(found))
        found.append(gradient)
    return found


def _empty(*shape: int) -> Tensor:
    """NumPy asks for huge pages, torch does not: at 1500 cells a product that is written to them takes half the time."""
    return torch.from_numpy(np.empty(shape, np.float32))
