"""Layers of torch and of this study on sparse matrices: same calls, same outputs, inference only; `repro.sparse.runtime`."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from repro.errors import ReproError
from repro.models.recurrent import BidirectionalClippedRNN
from repro.sparse.gates import CELLS
from repro.sparse.recurrence import NotFinite, Projection, Recurrence, by_units


def _matrices(module: nn.Module) -> list[Tensor]:
    return [value for name, value in module.named_parameters(recurse=False) if name.startswith("weight")]


def density_of(module: nn.Module) -> float:
    """The share of the weights of a layer, biases apart, that is not zero."""
    matrices = _matrices(module)
    return sum(int(w.count_nonzero()) for w in matrices) / max(sum(w.numel() for w in matrices), 1)


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


class _SparseLayer(nn.Module):
    """What all replaced layers share: no parameters, inference only, float32 on the CPU, neither copied nor pickled."""

    density: float

    def __reduce_ex__(self, protocol):
        raise ReproError(f"{type(self).__name__} holds packed weights in place: copy or save the model, and compile that again")

    def _checked(self, x: Tensor, features: int, what: str = "input") -> Tensor:
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.device.type != "cpu":
            found = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ReproError(f"{what} of {type(self).__name__} is {found}: float32 on the CPU is needed")
        if x.requires_grad and torch.is_grad_enabled():
            raise ReproError(f"{what} of {type(self).__name__} requires a gradient: compiled models are for inference only")
        if x.ndim == 0 or x.shape[-1] != features:
            raise ReproError(f"{what} of {type(self).__name__} has shape {tuple(x.shape)}: the last size must be {features}")
        return x.detach()


class SparseLinear(_SparseLayer):
    """`nn.Linear` on a sparse matrix."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product = Projection(_numbers(linear.weight), None if linear.bias is None else _numbers(linear.bias).copy())
        self.density = density_of(linear)

    @property
    def weight(self) -> Tensor:
        """The dense weights, made anew at each access: for code that reads a layer's weights instead of calling it."""
        return torch.from_numpy(self._product.by_rows.todense())

    @property
    def bias(self) -> Tensor | None:
        return None if self._product.bias is None else torch.from_numpy(self._product.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self._checked(x, self.in_features)
        y = self._product(x.reshape(-1, self.in_features).numpy())
        return torch.from_numpy(np.ascontiguousarray(y)).reshape(*x.shape[:-1], self.out_features)

    def prepare(self, batch: int) -> None:
        self._product.prepare(batch)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, density={self.density:.3g}"


class SparseRNN(_SparseLayer):
    """`nn.RNN`, `nn.GRU` or `nn.LSTM` on sparse matrices: same inputs, outputs and states; a sequence of no steps gives its
    state back.
    """

    def __init__(self, module: nn.RNNBase):
        super().__init__()
        self.mode, self.input_size, self.hidden_size = module.mode, module.input_size, module.hidden_size
        self.num_layers, self.bidirectional = module.num_layers, module.bidirectional
        self.batch_first, self.has_bias = module.batch_first, module.bias
        self.density = density_of(module)
        self._suffixes = [f"_l{i}{d}" for i in range(module.num_layers) for d in ("", "_reverse")[: 1 + module.bidirectional]]
        self._parts = [self._part(module, suffix) for suffix in self._suffixes]
        self._biases = {name: _numbers(value).copy() for name, value in module.named_parameters() if name.startswith("bias")}

    def _part(self, module: nn.RNNBase, suffix: str) -> tuple[Projection, Recurrence]:
        gates, bias, acted_on = CELLS[self.mode].gates, None, None
        if module.bias:
            bias, recurrent = (_numbers(getattr(module, f"bias_{end}{suffix}")).copy() for end in ("ih", "hh"))
            added = 2 * self.hidden_size if self.mode == "GRU" else len(bias)
            bias[:added] += recurrent[:added]
            acted_on = recurrent[added:] if self.mode == "GRU" else None
            bias = by_units(bias, gates)
        w_ih, w_hh = (_numbers(getattr(module, f"weight_{end}{suffix}")) for end in ("ih", "hh"))
        return Projection(by_units(w_ih, gates), bias, exact=True), Recurrence(self.mode, w_hh, acted_on)

    def todense(self) -> nn.RNNBase:
        """The layer as plain torch."""
        kind = {"GRU": nn.GRU, "LSTM": nn.LSTM}.get(self.mode, nn.RNN)
        options = {"nonlinearity": self.mode[4:].lower()} if kind is nn.RNN else {}
        dense = kind(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bias=self.has_bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            **options,
        )
        weights = dict(self._biases)
        for suffix, (product, recurrence) in zip(self._suffixes, self._parts, strict=True):
            weights[f"weight_ih{suffix}"] = recurrence.in_torch_order(product.by_rows.todense())
            weights[f"weight_hh{suffix}"] = recurrence.todense()
        dense.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return dense.eval().requires_grad_(False)

    def forward(self, input: Tensor | PackedSequence, hx=None):
        packed = isinstance(input, PackedSequence)
        x = self._checked(input.data if packed else input, self.input_size)
        batched = packed or x.ndim == 3
        if not packed and x.ndim not in (2, 3):
            raise ReproError(f"input of {self.mode} has {x.ndim} dimensions: 2 (one sequence) or 3 are needed")
        if packed:
            sizes = input.batch_sizes.numpy()
            batch = int(sizes[0])
        else:
            x = x[:, None] if not batched else x.transpose(0, 1) if self.batch_first else x
            steps, batch = x.shape[:2]
            sizes = np.full(steps, batch)
        order = (input.sorted_indices, input.unsorted_indices) if packed else (None, None)
        first = self._states(hx, batch, batched, order[0])
        try:
            y, last = self._run(x.reshape(-1, self.input_size).numpy(), sizes, first)
        except NotFinite:
            with torch.no_grad():
                return self.todense()(input, hx)
        y = torch.from_numpy(y)
        if packed:
            output = input._replace(data=y)
        else:
            output = y.reshape(steps, batch, y.shape[-1])
            output = output[:, 0] if not batched else output.transpose(0, 1) if self.batch_first else output
        last = [torch.from_numpy(state) for state in last]
        if order[1] is not None:
            last = [state.index_select(1, order[1]) for state in last]
        if not batched:
            last = [state[:, 0] for state in last]
        return output, tuple(last) if self.mode == "LSTM" else last[0]

    def _states(self, hx, batch: int, batched: bool, order: Tensor | None) -> list[np.ndarray]:
        """First h (and c), each (layers * directions, batch, hidden)."""
        count, shape = 1 + (self.mode == "LSTM"), (len(self._parts), batch, self.hidden_size)
        if hx is None:
            return [np.zeros(shape, np.float32)] * count
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        wanted = shape if batched else (shape[0], shape[2])
        states = [self._checked(state, self.hidden_size, "a state") for state in given]
        if len(states) != count or any(state.shape != wanted for state in states):
            found = ", ".join(str(tuple(state.shape)) for state in states)
            raise ReproError(f"states of {self.mode} have shapes {found}: {count} of {wanted} needed")
        states = [state.reshape(shape) for state in states]
        return [(state if order is None else state.index_select(1, order)).numpy() for state in states]

    def _run(self, frames: np.ndarray, sizes: np.ndarray, first: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        directions = 1 + self.bidirectional
        last = [state.copy() for state in first]
        if len(frames) == 0:
            return np.empty((0, directions * self.hidden_size), np.float32), last
        for layer in range(self.num_layers):
            outputs = []
            for k in range(layer * directions, (layer + 1) * directions):
                product, recurrence = self._parts[k]
                states = [state[k] for state in first]
                out, *ends = recurrence.run(product(frames), sizes, *states, backwards=k % directions == 1)
                outputs.append(out)
                for state, end in zip(last, ends, strict=False):
                    state[k] = end
            frames = np.ascontiguousarray(outputs[0]) if directions == 1 else np.concatenate(outputs, axis=1)
        return frames, last

    def prepare(self, batch: int) -> None:
        for _, recurrence in self._parts:
            recurrence.prepare(batch)

    def extra_repr(self) -> str:
        return (
            f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.has_bias}, "
            f"batch_first={self.batch_first}, bidirectional={self.bidirectional}, density={self.density:.3g}"
        )


class SparseClippedRNN(_SparseLayer):
    """`BidirectionalClippedRNN` on sparse matrices, batch norm with its running statistics folded into the input weights."""

    def __init__(self, module: BidirectionalClippedRNN):
        super().__init__()
        norm, weights = module.norm, module.weight_ih.detach()
        self.hidden_size, self.input_size = weights.shape
        scale = (norm.running_var + norm.eps).rsqrt() * norm.weight.detach()
        self._shift = _numbers(norm.bias - norm.running_mean * scale)
        self._product = Projection(by_units(_numbers(weights * scale[:, None]), 1), by_units(self._shift, 1), exact=True)
        self._parts = [Recurrence("CLIPPED", _numbers(w)) for w in (module.weight_hh, module.weight_hh_reverse)]
        self.density = density_of(module)

    def todense(self) -> BidirectionalClippedRNN:
        """The layer as plain torch, with the folded input weights."""
        dense = BidirectionalClippedRNN(self.input_size, self.hidden_size)
        dense.norm = nn.BatchNorm1d(self.hidden_size, eps=0.0, affine=False)
        weights = {
            "weight_ih": self._product.by_rows.todense()[: self.hidden_size],
            "weight_hh": self._parts[0].todense(),
            "weight_hh_reverse": self._parts[1].todense(),
            "norm.running_mean": -self._shift,
        }
        dense.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
        return dense.eval().requires_grad_(False)

    def forward(self, packed: PackedSequence) -> PackedSequence:
        frames = self._checked(packed.data, self.input_size).contiguous().numpy()
        x = self._product(frames)
        try:
            both = [p.run(x, packed.batch_sizes.numpy(), backwards=p is self._parts[1])[0] for p in self._parts]
        except NotFinite:
            return self.todense()(packed)
        return packed._replace(data=torch.from_numpy(both[0] + both[1]))

    def prepare(self, batch: int) -> None:
        for part in self._parts:
            part.prepare(batch)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, density={self.density:.3g}"
