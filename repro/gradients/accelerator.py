"""Cycles of a small accelerator that skips zeros of dnet: what is left of redundant MACs once hardware has to find them.

Zhu et al. 2017 count MACs and leave the speed-up to hardware. This model takes the zeros as a training made them, and charges
for what counting leaves out: elements that wait for the slowest one, and looking for non-zero entries. Its rules:

1. There are `lanes` times `width` processing elements. Each takes a MAC a cycle and holds the sums of its outputs until they
   are whole (output-stationary).
2. The elements of a lane share a row of outputs, at most `ceil(N / width)` of a row's N for each, and one operand entry, which
   stays until all of them have met it: so many cycles for each entry that is not skipped. It is looked for once a row.
3. Such rows are dealt to lanes in turn: row r goes to lane `r mod lanes`. For W x, U h, dx and dh there is one for each
   sequence and time step, its operand a row of x, h or dnet. For dW and dU there is one for each column of dnet, which is
   its operand, over all sequences and time steps.
4. A lane that is done waits for the slowest: in U h and dh after every time step, which the next one needs; in W x, dx, dW and
   dU, made for the whole sequence at once, at its end. Products follow one another.
5. Only zeros of dnet are skipped; W x and U h are dense. A lane finds non-zero entries by a bitmask, `scan` entries a cycle
   that it works off before it looks further: such a group costs the cycles of its non-zero entries, and one if it has none.
   (With sums for one output alone a lane would go over a row's entries, and look for them, `ceil(N / width)` times.)

Not charged: memory (lanes at different entries read different rows of W and U, where dense lanes share one), making dnet and
its bitmask, filling and draining. Real hardware is slower: the model says what load imbalance and index leave of the ideal.

Existing simulators. SCALE-Sim v3 (`scalesim` 3.0.0) takes products as M, N, K, which gives dense bounds. Its sparsity is
that of the filter operand only, weight-stationary only, in N:M patterns that the tool makes itself (N <= M/2 in its row-wise
mode): it can bound structured variants, it cannot take masks of dnet. ZigZag (`zigzag-dse` 3.9.1) takes ONNX graphs and
gives dense energy and latency; its list of features has no sparsity.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import ArrayLike

from repro.errors import ReproError
from repro.gradients.macs import check_sizes


@dataclass(frozen=True)
class Accelerator:
    """`lanes` times `width` elements; `scan`: entries of dnet a lane looks at in a cycle, None: it finds them at no cost.

    More lanes than sequences stand idle in U h and dh. Twice the lanes, or any greater width, is never slower; lanes that
    are no multiple may be, as rows are dealt differently.
    """

    lanes: int
    width: int
    scan: int | None = None

    def __post_init__(self):
        check_sizes(lanes=self.lanes, width=self.width, scan=1 if self.scan is None else self.scan)

    @property
    def elements(self) -> int:
        return self.lanes * self.width


@dataclass(frozen=True)
class Cycles:
    """Of one product, or of several one after another.

    `bound`: all MACs over all elements; `ideal`: those without a zero of dnet over all elements; `dense`: the machine that
    skips nothing; `simulated`: the one that skips. `ideal <= simulated <= dense`, `ideal <= bound <= dense`.
    """

    bound: float
    ideal: float
    dense: int
    simulated: int

    def __add__(self, other: Cycles) -> Cycles:
        return Cycles(
            self.bound + other.bound, self.ideal + other.ideal, self.dense + other.dense, self.simulated + other.simulated
        )

    @property
    def ideal_speedup(self) -> float:
        """By counting MACs; infinite if none is left."""
        return self.bound / self.ideal if self.ideal else np.inf

    @property
    def speedup(self) -> float:
        """The machine that skips over the same one that does not; infinite if it has nothing to do.

        It may pass `ideal_speedup` where rows cannot be dealt evenly: the dense machine loses by that too.
        """
        return self.dense / self.simulated if self.simulated else np.inf


def total(cycles: Iterable[Cycles]) -> Cycles:
    """Of products, or layers, one after another."""
    return reduce(add, cycles, Cycles(0.0, 0.0, 0, 0))


def simulate(mask: ArrayLike, inputs: int, machine: Accelerator) -> dict[str, Cycles]:
    """Cycles of the six products of an LSTM layer, by the names of `repro.gradients.macs.FORWARD` and `BACKWARD`.

    `mask`: True where the thresholded dnet is not zero, (T, B, 4H), of any order of gates; `inputs`: D. Where the embedding is
    not trained, the lowest layer's "dx" is to be left out.

    Raises ReproError for a mask that is not boolean, of another shape, or empty, and for fewer than one input.
    """
    mask = _checked(mask)
    check_sizes(inputs=inputs)
    steps, batch, gates = mask.shape
    frames, hidden = steps * batch, gates // 4
    nonzero = int(np.count_nonzero(mask))
    rows = _groups(mask.reshape(frames, gates), 1, machine.scan)
    columns = _groups(mask.reshape(frames, gates), 0, machine.scan).T

    def sparse(groups: np.ndarray, outputs: int, waits: int = 1) -> Cycles:
        each = _ceil(outputs, machine.width)
        busy = (groups * each if machine.scan is None else np.maximum(groups * each, 1)).sum(1)
        whole = _dense(len(busy), frames * gates // len(busy), outputs, machine, waits)
        return replace(
            whole,
            ideal=nonzero * outputs / machine.elements,
            simulated=_slowest(busy.reshape(waits, -1), machine.lanes),
        )

    return simulate_forward(steps, batch, inputs, hidden, machine) | {
        "dx": sparse(rows, inputs),
        "dh": sparse(rows, hidden, steps),
        "dW": sparse(columns, inputs),
        "dU": sparse(columns, hidden),
    }


def simulate_forward(steps: int, batch: int, inputs: int, hidden: int, machine: Accelerator) -> dict[str, Cycles]:
    """Cycles of the two forward products of an LSTM layer, which have no zeros to skip; names as in `simulate`."""
    check_sizes(steps=steps, batch=batch, inputs=inputs, hidden=hidden)
    return {
        "W x": _dense(steps * batch, inputs, 4 * hidden, machine),
        "U h": _dense(steps * batch, hidden, 4 * hidden, machine, steps),
    }


def simulate_output(symbols: int, hidden: int, frames: int, machine: Accelerator) -> dict[str, Cycles]:
    """Cycles of the output layer's three products, all dense, for `frames` = T B; names as in `repro.gradients.macs`."""
    check_sizes(symbols=symbols, hidden=hidden, frames=frames)
    return {
        "V h": _dense(frames, hidden, symbols, machine),
        "dh": _dense(frames, symbols, hidden, machine),
        "dV": _dense(symbols, frames, hidden, machine),
    }


def _checked(mask: ArrayLike) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != 3 or mask.shape[2] % 4:
        raise ReproError(f"mask is {mask.dtype} {mask.shape}: boolean (steps, batch, 4 hidden) is needed, True for non-zeros")
    if mask.size == 0:
        raise ReproError(f"mask {mask.shape} is empty: at least one step, sequence and unit are needed")
    return mask


def _dense(rows: int, inner: int, outputs: int, machine: Accelerator, waits: int = 1) -> Cycles:
    """`rows` of `inner` operand entries and `outputs` outputs each, none skipped, in `waits` equal parts."""
    work = rows * inner * outputs / machine.elements
    cycles = waits * _ceil(rows // waits, machine.lanes) * inner * _ceil(outputs, machine.width)
    return Cycles(work, work, cycles, cycles)


def _groups(mask: np.ndarray, axis: int, scan: int | None) -> np.ndarray:
    """Non-zero entries in each group of `scan` neighbours along the axis, the last one perhaps smaller; None: one group."""
    size = mask.shape[axis]
    return np.add.reduceat(mask, np.arange(0, size, scan or size), axis=axis, dtype=np.int64)


def _slowest(busy: np.ndarray, lanes: int) -> int:
    """Cycles of the slowest lane between waits, added up; `busy` (waits, rows): cycles of each row."""
    waits, rows = busy.shape
    dealt = np.zeros((waits, _ceil(rows, lanes) * lanes), dtype=np.int64)
    dealt[:, :rows] = busy
    return int(dealt.reshape(waits, -1, lanes).sum(1).max(1).sum())


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
