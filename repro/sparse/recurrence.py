"""Products of all steps of a sequence with a sparse matrix, and the recurrence over them with the loop over time compiled.

Sequences are packed as torch packs them: `frames` (total, features) time step by time step, the longest sequence first;
`sizes[t]` sequences are still running at step t. Equally long ones are the special case of equal sizes.

With AVX-512 and up to 16 sequences all steps are one compiled call: recurrent weights by windows, rows reordered
so that the gates of 16 units are groups next to each other; the thread that owns these units adds up their gates and computes
their next state at once. Otherwise a step is a product by rows (CSR), and gates in torch.
"""

from functools import cache, cached_property

import numpy as np
import torch
from numba import njit
from torch import Tensor

from repro.errors import ReproError
from repro.models.recurrent import CLIP
from repro.sparse.gates import CELLS, cell_step, copy_lanes
from repro.sparse.kernels import LARGEST_WINDOW_BATCH, finite, group_sums, u
from repro.sparse.matrix import Plans, SparseMatrix
from repro.sparse.packing import LANES, SLOT_BYTES, WINDOW, aligned, pack_windows
from repro.sparse.regions import FREE, entry, region, run, thread_count
from repro.sparse.simd import has_avx512, store_sums

_MOST_FRAMES = 2 * LARGEST_WINDOW_BATCH - 1  # of a product by windows: from here on one by rows beats two of them
_MOST_SEQUENCES = 16  # by windows: they save the gates and the transposes of every step as well
_FORMAT = "P64"
_SLAB = 64  # frames of one product by rows
_GATES_OF_A_BLOCK = 8  # time of the gates of 16 units, in steps of the window product
_WORTH_TWO_THREADS = 6000  # slots of 16 weights a step: below, starting a parallel loop costs more than it saves
_SCRATCH = 1024  # bytes a thread keeps the sums of its current units in: 4 gates, 4 sequences, 16 units


class NotFinite(Exception):
    """A state is infinite or NaN: the zeros that windows are filled up with would not give what the dense product gives."""


class Projection:
    """`projection(frames (total, columns)) -> (total, rows)`: W times every frame, plus a bias, for any number of frames.

    Few frames go by windows, where the processor can, and many by rows; windows are packed when first needed. `exact`: they
    keep all bits of the weights, so that both ways give the same but for the order of sums.
    """

    def __init__(self, weights: np.ndarray, bias: np.ndarray | None = None, *, exact: bool = False):
        self.by_rows = SparseMatrix(weights, format="CSR")
        self.bias = bias
        self._format = "P64 exact" if exact else "P64"
        self._most_by_windows = _MOST_FRAMES if has_avx512() else 0

    @cached_property
    def by_windows(self) -> SparseMatrix:
        return SparseMatrix(self.by_rows.todense(), format=self._format)

    def prepare(self, frames: int) -> None:
        """Pack now what products with so many frames need."""
        if frames <= self._most_by_windows:
            _ = self.by_windows

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        if 0 < len(frames) <= self._most_by_windows:
            y = (self.by_windows @ frames.T).T
            return y if self.bias is None else y + self.bias
        if len(frames) == 1:
            y = (self.by_rows @ frames[0])[None]
            return y if self.bias is None else y + self.bias
        y = np.empty((len(frames), self.by_rows.shape[0]), np.float32)
        for first in range(0, len(frames), _SLAB):
            part = frames[first : first + _SLAB]
            width = next(w for w in (8, 16, 32, 64) if w >= len(part))
            x = aligned((frames.shape[1], width), np.float32)
            x[:, : len(part)] = part.T
            product = torch.from_numpy((self.by_rows @ x)[:, : len(part)]).t()
            target = torch.from_numpy(y[first : first + _SLAB])
            target.copy_(product) if self.bias is None else torch.add(product, torch.from_numpy(self.bias), out=target)
        return y


def by_units(rows: np.ndarray, gates: int) -> np.ndarray:
    """Rows (gates * units, ...) in torch's order -> (blocks * gates * 16, ...): the gates of 16 units next to each other."""
    units = len(rows) // gates
    blocks = -(-units // LANES)
    padded = np.zeros((gates, blocks * LANES, *rows.shape[1:]), rows.dtype)
    padded[:, :units] = rows.reshape(gates, units, *rows.shape[1:])
    return padded.reshape(gates, blocks, LANES, *rows.shape[1:]).swapaxes(0, 1).reshape(-1, *rows.shape[1:])


@cache
def _time_loop(kind: str, count: int, batch: int):
    """`loop(plan, call, offsets, first, steps, backwards)`: all steps of the sequences `first` to `first + batch`.

    `plan`: slots, starts, groups, scales, bias, blocks of 16 units, `call`; its bounds are blocks. `call`: see the body; its
    last four entries change with each step. `offsets`: where the frames of each step begin.
    """
    gates, cell = CELLS[kind].gates, cell_step(kind)
    sums_of = group_sums(SLOT_BYTES[_FORMAT], count, batch)
    gates_bytes = u(64 * gates)

    @region
    def body(plan, first_block, last_block):
        bias, blocks, call = entry(plan, FREE + 4), entry(plan, FREE + 5), entry(plan, FREE + 6)
        x, c, out, state_bytes = entry(call, 0), entry(call, 1), entry(call, 2), entry(call, 3)
        scratch = entry(call, 4) + first_block * u(_SCRATCH)  # each thread uses that of its first block only
        h, following, frame, active = entry(call, 5), entry(call, 6), entry(call, 7), entry(call, 8)
        for block in range(first_block, last_block):
            for gate in range(u(gates)):
                group = block * u(gates) + gate
                store_sums(scratch + gate * u(64), gates_bytes, sums_of(plan, group, h, state_bytes), batch)
            units = block * u(64)
            for b in range(u(batch)):
                now, then = h + b * state_bytes + units, following + b * state_bytes + units
                if b < active:
                    row = (frame + b) * blocks + block
                    c_now = c + (b * blocks + block) * u(64)
                    cell(scratch + b * gates_bytes, x + row * gates_bytes, bias + units, now, c_now, then, out + row * u(64))
                else:
                    copy_lanes(now, then)

    address = body.address

    @njit
    def loop(plan, call, offsets, first, steps, backwards):
        for i in range(steps):
            t = steps - 1 - i if backwards else i
            frame = offsets[t] + first
            call[7], call[8] = frame, min(batch, offsets[t + 1] - frame)
            run(plan, address)
            call[5], call[6] = call[6], call[5]

    loop.body = body
    return loop


class Recurrence:
    """The recurrent half of one layer and direction: `run` it over the input's share of the sums of all gates.

    `weights`: (gates * units, units), rows in torch's order; `kind`: a key of `CELLS`; `bias`: (units,), what the reset gate of
    "GRU" acts on.
    """

    def __init__(self, kind: str, weights: np.ndarray, bias: np.ndarray | None = None):
        self.kind, self.gates, self.units = kind, CELLS[kind].gates, weights.shape[1]
        self.blocks = -(-self.units // LANES)
        self.by_rows = SparseMatrix(by_units(weights, self.gates), format="CSR")
        self._most_by_windows = _MOST_SEQUENCES if has_avx512() else 0
        self.bias = np.zeros(LANES * self.blocks, np.float32)
        if bias is not None:
            self.bias[: self.units] = bias

    def in_torch_order(self, rows: np.ndarray) -> np.ndarray:
        """Rows that `by_units` has reordered -> (gates * units, ...) as torch has them."""
        blocks = rows.reshape(-1, self.gates, LANES, *rows.shape[1:]).swapaxes(0, 1)
        units = blocks.reshape(self.gates, -1, *rows.shape[1:])[:, : self.units]
        return units.reshape(-1, *rows.shape[1:])

    def todense(self) -> np.ndarray:
        """The weights, in torch's order of rows."""
        return self.in_torch_order(self.by_rows.todense())

    def prepare(self, batch: int) -> None:
        """Pack now what so many sequences need."""
        if batch <= self._most_by_windows:
            _ = self._windows

    def run(
        self, x: np.ndarray, sizes: np.ndarray, h: np.ndarray | None = None, c: np.ndarray | None = None, *, backwards: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(h of all frames, last h, last c) from x (frames, gates by units), and first h and c (batch, units) or None: zeros.

        Raises `NotFinite` where a state is infinite or NaN: the dense computation is to be taken then.
        """
        if sizes.sum() != len(x) or (sizes[1:] > sizes[:-1]).any():
            raise ReproError(f"sequences of {sizes.tolist()} frames a step do not make {len(x)} frames, longest sequence first")
        states = [np.zeros((sizes[0], LANES * self.blocks), np.float32) for _ in range(2)]
        for padded, given in zip(states, (h, c), strict=True):
            if given is not None:
                padded[:, : self.units] = given
        if not np.isfinite(states[0]).all():
            raise NotFinite
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        out = np.empty((len(x), LANES * self.blocks), np.float32)
        advance = self._compiled if len(states[0]) <= self._most_by_windows else self._step_by_step
        advance(np.ascontiguousarray(x), offsets, *states, out, backwards)
        if not finite(out):
            raise NotFinite
        return out[:, : self.units], *(state[:, : self.units] for state in states)

    @cached_property
    def _windows(self):
        windows = pack_windows(self.by_rows.todense(), _FORMAT)
        work = windows.groups[:: self.gates] + _GATES_OF_A_BLOCK * np.arange(self.blocks + 1)
        plans = Plans((windows.slots, windows.starts, windows.groups, windows.scales, self.bias, self.blocks), work)
        return windows, plans

    def _compiled(self, x, offsets, h, c, out, backwards) -> None:
        """Update the states h and c (batch, padded units) in place and write h of all frames to `out`."""
        windows, plans = self._windows
        for first in range(0, len(h), LARGEST_WINDOW_BATCH):
            part = slice(first, first + LARGEST_WINDOW_BATCH)
            batch = len(h[part])
            steps = int((np.diff(offsets) > first).sum())
            threads = thread_count() if len(windows.slots) * batch > _WORTH_TWO_THREADS else 1
            states = aligned((2, batch, LANES * self.blocks + WINDOW[_FORMAT]), np.float32)
            states[0, :, : h.shape[1]] = h[part]
            scratch = aligned((self.blocks, _SCRATCH), np.uint8)
            c_part = c[part]
            call = [x, c_part, out, states.strides[1], scratch, states[0], states[1], 0, 0]
            call = np.array([a.ctypes.data if isinstance(a, np.ndarray) else a for a in call], np.int64)
            plan = plans[threads].copy()
            plan[FREE + 6] = call.ctypes.data
            _time_loop(self.kind, windows.count, batch)(plan, call, offsets, first, steps, backwards)
            h[part] = states[steps % 2, :, : h.shape[1]]

    def _step_by_step(self, x, offsets, h, c, out, backwards) -> None:
        """The same on any processor, for any batch: a product by rows a step, in which each sequence is a column."""
        h_now, c_now = torch.from_numpy(h), torch.from_numpy(c)
        x, y = torch.from_numpy(x), torch.from_numpy(out)
        bias = torch.from_numpy(self.bias)
        steps = range(len(offsets) - 1)
        for t in reversed(steps) if backwards else steps:
            frames = slice(int(offsets[t]), int(offsets[t + 1]))
            active = frames.stop - frames.start
            state = h[:active, : self.units]
            sums = (self.by_rows @ state[0])[:, None] if active == 1 else self.by_rows @ state.T
            x_t, u_t = (self._by_gate(part) for part in (x[frames], torch.from_numpy(sums).t()))
            y[frames] = h_now[:active] = _torch_cell(self.kind, x_t, u_t, bias, h_now[:active], c_now[:active])

    def _by_gate(self, sums: Tensor) -> tuple[Tensor, ...]:
        return sums.reshape(len(sums), self.blocks, self.gates, LANES).transpose(1, 2).flatten(2).unbind(1)


def _torch_cell(kind: str, x: tuple[Tensor, ...], u: tuple[Tensor, ...], bias: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """The next h (batch, padded units) of the cells in `repro.sparse.gates`; c is replaced by its next value."""
    if kind == "GRU":
        reset, update = (x[0] + u[0]).sigmoid(), (x[1] + u[1]).sigmoid()
        new = (x[2] + reset * (u[2] + bias)).tanh()
        return new + update * (h - new)
    if kind == "LSTM":
        enter, keep, new, leave = (a + b for a, b in zip(x, u, strict=True))
        c.mul_(keep.sigmoid()).add_(enter.sigmoid() * new.tanh())
        return leave.sigmoid() * c.tanh()
    total = x[0] + u[0]
    return {"RNN_TANH": total.tanh, "RNN_RELU": total.relu, "CLIPPED": lambda: total.clamp(0.0, CLIP)}[kind]()
