"""What `ThresholdedLSTM` and `ThresholdedGRU` share: torch's recurrent layers with a backward pass of their own.

Within a layer sequences are packed as torch packs them: frames (total, features) time step by time step, longest sequence
first; `sizes[t]` sequences still run at step t. Equally long ones are the special case of equal sizes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from repro.errors import ReproError
from repro.gradients.eager import eager
from repro.gradients.recording import Thresholded
from repro.gradients.thresholds import Static


class Course(NamedTuple):
    """The order in which a layer walks through packed frames: `sizes` of all steps, and whether it goes backwards in time."""

    sizes: list[int]
    backwards: bool

    def steps(self) -> list[tuple[int, slice]]:
        """(time step, its frames) in the order of the forward pass."""
        steps, first = [], 0
        for t, size in enumerate(self.sizes):
            steps.append((t, slice(first, first + size)))
            first += size
        return steps[::-1] if self.backwards else steps


class States:
    """The states of one kind, h or c, at all frames: `before` and `after` each step, both (total, hidden).

    Of equally long sequences `before` and `after` are two views of one array: what a step writes, the next one reads.
    """

    def __init__(self, first: Tensor, course: Course):
        batch, total = len(first), sum(course.sizes)
        self.one_array = course.sizes[-1] == batch
        if self.one_array:
            rows = first.new_empty(total + batch, first.shape[1])
            self.before, self.after = (rows[batch:], rows[:total]) if course.backwards else (rows[:total], rows[batch:])
            rows[total:].copy_(first) if course.backwards else rows[:batch].copy_(first)
            self._last = self.after[:batch] if course.backwards else self.after[total - batch :]
        else:
            self.before, self.after = (first.new_empty(total, first.shape[1]) for _ in range(2))
            self._last = first.clone()

    def enter(self, frames: slice) -> Tensor:
        """The states (n, hidden) that a step starts from; call it before the step writes `after`."""
        before = self.before[frames]
        if not self.one_array:
            before.copy_(self._last[: len(before)])
        return before

    def leave(self, frames: slice) -> None:
        """The step has written `after[frames]`."""
        if not self.one_array:
            after = self.after[frames]
            self._last[: len(after)] = after

    def last(self) -> Tensor:
        """The state after the last step of each sequence, (batch, hidden)."""
        return self._last.clone()


class ThresholdedRNN(Thresholded):
    """Mixed into `nn.LSTM` or `nn.GRU`: all of it as there, but for the backward pass of each layer.

    `_run(x, states, weights, course, site) -> (out, *last states)` of a layer and direction is what a class adds. Without
    gradients the forward pass is torch's own, and so are both passes with threshold 0 where `_outruns_torch` says no.
    """

    gate_names: tuple[str, ...]

    def _outruns_torch(self, x: Tensor) -> bool:
        """Whether both passes of `_run` take no longer than torch's own, for frames like x."""
        return False

    def _begin(self, threshold) -> None:
        directions = ("", "_reverse")[: 1 + self.bidirectional]
        self._make_sites([f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions], threshold)

    @eager  # its loops are compiled already, and which rule acts is looked up in the backward pass
    def forward(self, input: Tensor | PackedSequence, hx=None):
        """As of `nn.LSTM` and `nn.GRU`: (T, B, input), (B, T, input) if `batch_first`, (T, input), packed -> output, state.

        Under autocast input and states are converted to the numbers of the weights, which the layer computes in.
        """
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(*_converted((input, hx), self.weight_ih_l0.dtype))
        recording = any(site.record is not None for site in self.sites)
        nobody = not packed and x.ndim == 3 and x.shape[1 - self.batch_first] == 0
        if nobody or not (torch.is_grad_enabled() or recording):
            return super().forward(input, hx)
        self._check_numbers(x)
        if packed:
            sizes, batched = input.batch_sizes.tolist(), True
        else:
            if x.ndim not in (2, 3):
                raise ReproError(f"input of {type(self).__name__} has {x.ndim} dimensions: 2 (one sequence) or 3 are needed")
            batched = x.ndim == 3
            x = x[:, None] if not batched else x.transpose(0, 1) if self.batch_first else x
            steps, batch = x.shape[:2]
            sizes, x = [batch] * steps, x.reshape(-1, x.shape[2])
        if len(x) == 0:
            raise ReproError(f"input of {type(self).__name__} has no frames: at least one step of one sequence is needed")
        if x.shape[1] != self.input_size:
            raise ReproError(f"input of {type(self).__name__} has {x.shape[1]} features: input_size is {self.input_size}")
        order = (input.sorted_indices, input.unsorted_indices) if packed else (None, None)
        first = self._first_states(hx, sizes[0], batched, order[0], x)
        if not recording and self._removes_nothing() and not self._outruns_torch(x):
            return self._run_torch(input, hx)
        out, last = self._run_layers(x, first, sizes)
        if packed:
            out = input._replace(data=out)
        else:
            out = out.reshape(steps, batch, -1)
            out = out[:, 0] if not batched else out.transpose(0, 1) if self.batch_first else out
        if order[1] is not None:
            last = [state.index_select(1, order[1]) for state in last]
        if not batched:
            last = [state[:, 0] for state in last]
        return out, tuple(last) if self.mode == "LSTM" else last[0]

    def _check_numbers(self, x: Tensor) -> None:
        name, wanted = type(self).__name__, self.weight_ih_l0.dtype
        if x.dtype != wanted:
            raise ReproError(f"input of {name} is {x.dtype}, its weights are {wanted}: they must be the same")
        if x.device.type == "cpu" and wanted not in (torch.float32, torch.float64):
            raise ReproError(f"{name} in {wanted} on the CPU: float32 or float64 is needed there")

    def _first_states(self, hx, batch: int, batched: bool, order: Tensor | None, x: Tensor) -> list[Tensor]:
        """First h (and c), each (layers * directions, batch, hidden), sequences in the order of the frames."""
        count, shape = 1 + (self.mode == "LSTM"), (len(self.sites), batch, self.hidden_size)
        if hx is None:
            return [x.new_zeros(shape)] * count
        given = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        wanted = _described(shape if batched else (shape[0], shape[2]), x)
        found = [_described(tuple(state.shape), state) if isinstance(state, Tensor) else repr(state) for state in given]
        if found != [wanted] * count:
            raise ReproError(f"states of {type(self).__name__} are {', '.join(found)}: {count} of {wanted} needed")
        given = [state.reshape(shape) for state in given]
        return given if order is None else [state.index_select(1, order) for state in given]

    def _removes_nothing(self) -> bool:
        return all(type(site.rule) is Static and site.rule.t == 0 for site in self.sites)

    def _run_torch(self, input, hx):
        """torch's own layer; its backward pass knows of no rule, so none may be assigned before it has ended."""

        def check(gradient: Tensor) -> None:
            name = type(self).__name__
            if any(site.record is not None for site in self.sites):
                raise ReproError(f"{name} is recorded in the backward pass alone: the forward pass must be in the block, too")
            if not self._removes_nothing():
                raise ReproError(
                    f"threshold of {name} was 0 in the forward pass, now it is {self.threshold!r}: assign it before that"
                )

        out, last = super().forward(input, hx)
        results = [out.data if isinstance(out, PackedSequence) else out, *(last if isinstance(last, tuple) else (last,))]
        for tensor in results:
            if tensor.requires_grad:
                tensor.register_hook(check)
        return out, last

    def _run_layers(self, x: Tensor, first: list[Tensor], sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
        directions = 1 + self.bidirectional
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for k in range(layer * directions, (layer + 1) * directions):
                ends = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
                weights = [getattr(self, f"{end}_{self.sites[k].name}") for end in ends]
                weights += [None] * (4 - len(weights))
                course = Course(sizes, k % directions == 1)
                out, *ends = self._run(x, [state[k] for state in first], weights, course, self.sites[k])
                outputs.append(out)
                last.append(ends)
            x = outputs[0] if directions == 1 else torch.cat(outputs, 1)
            if layer < self.num_layers - 1 and self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
        return x, [torch.stack(states) for states in zip(*last, strict=True)]


def _converted(value, dtype: torch.dtype):
    """A tensor, a packed sequence, None, or a tuple or list of these, in other numbers."""
    if isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        return tuple(_converted(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, Tensor | PackedSequence) else value


def _described(shape: tuple[int, ...], like: Tensor) -> str:
    return f"{shape} {like.dtype} on {like.device}"
