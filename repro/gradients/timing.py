"""The time of training steps of LSTM layers, forward and backward pass apart, with a wanted share of zeros in dnet."""

import copy
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from repro.errors import ReproError
from repro.gradients.counting import Counted
from repro.gradients.lstm import ThresholdedLSTM
from repro.gradients.thresholds import Rule, TopK, check_sparsity

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt


class Step:
    """The forward and the backward pass of one-layer `layers`, each fed by the one before; called: the seconds of both.

    `x` (T, B, features); `d_out` (T, B, hidden): the gradient that arrives at the last layer's output; `states`: (h, c) of each
    layer, zeros if None. Gradients of x and of all weights are formed.
    """

    def __init__(self, layers: Sequence[nn.Module], x: Tensor, d_out: Tensor, states: Sequence | None = None):
        self.layers, self.d_out = nn.ModuleList(layers), d_out
        self.x = x.detach().requires_grad_()
        self.states = states or [None] * len(layers)

    def __call__(self) -> tuple[float, float]:
        self.x.grad = None
        self.layers.zero_grad()
        begin = self._clock()
        out = self.x
        for layer, state in zip(self.layers, self.states, strict=True):
            out, _ = layer(out, state)
        middle = self._clock()
        out.backward(self.d_out)
        return middle - begin, self._clock() - middle

    def _clock(self) -> float:
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def zeros(self) -> list[float]:
        """The share of zeros in the dnet of each layer, the thresholds that a rule holds those of its first step."""
        counts = [rule.take() for rule in self._under(lambda rule: Counted(copy.deepcopy(rule)))]
        return [zeros / entries for entries, zeros in counts]

    def threshold_for(self, share: float) -> float:
        """The static t under which about a share of dnet is zero: the median of the quantiles of all time steps."""
        (rule,) = self._under(lambda _: _Quantiles(share))
        return statistics.median(rule.found)

    def _under(self, make: Callable[[Rule], Rule]) -> list[Rule]:
        """One step with another rule for each layer, made from its own; returns these."""
        with _replaced(self.layers, make) as rules:
            self()
        return rules


class WholeStep:
    """The forward and the backward pass of `loss()`, the gradients of all of `model` formed; called: the seconds of both."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]):
        self.model, self.loss = model, loss

    def __call__(self) -> tuple[float, float]:
        self.model.zero_grad()
        begin = time.perf_counter()
        loss = self.loss()
        middle = time.perf_counter()
        loss.backward()
        return middle - begin, time.perf_counter() - middle


@contextmanager
def _replaced(layers: nn.ModuleList, make: Callable[[Rule], Rule]) -> Iterator[list[Rule]]:
    if not all(isinstance(layer, ThresholdedLSTM) for layer in layers):
        raise ReproError("zeros are those of a rule: all layers must be ThresholdedLSTM")
    sites = [site for layer in layers for site in layer.sites]
    before = [(site.rule, site.number) for site in sites]
    for layer in layers:
        layer.threshold = make(layer.threshold)
    try:
        yield [layer.threshold for layer in layers]
    finally:
        for site, (rule, number) in zip(sites, before, strict=True):
            site.rule, site.number = rule, number


class _Quantiles(TopK):
    """A wanted share in each time step, by the threshold that this takes."""

    def __init__(self, sparsity: float):
        super().__init__(sparsity)
        self.found: list[float] = []

    def threshold(self, dnet, site=0):
        t = super().threshold(dnet, site)
        self.found.append(float(t))
        return t


class DrawnColumns(Rule):
    """Of the n columns of each dnet all but `n - round(sparsity n)`, drawn anew for each, become zero for the whole minibatch.

    `repro.gradients.structured.ColumnTopK` selects them by their norms, which takes its time; drawing takes less, but some.
    """

    def __init__(self, sparsity: float, seed: int):
        check_sparsity(sparsity)
        self.sparsity, self._generator = sparsity, np.random.default_rng(seed)

    def threshold(self, dnet, site=0):
        columns = dnet.shape[-1]
        thresholds = np.zeros(columns, np.float32)
        thresholds[self._generator.permutation(columns)[: round(self.sparsity * columns)]] = math.inf
        return torch.from_numpy(thresholds).to(dnet)


def keep_memory() -> None:
    """Memory that is freed stays with this process, where glibc's `malloc` can be told so.

    Otherwise it depends on what else was allocated whether a step's large arrays are the last step's or fresh pages, which can
    take longer to come than what is written to them takes to compute: of nn.LSTM's as of ours.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if tell is not None:
        tell(_MMAP_MAX, 0)
        tell(_TRIM_THRESHOLD, 2**31 - 1)


def interleaved(steps: Mapping[str, Step | WholeStep], rounds: int) -> dict[str, np.ndarray]:
    """(rounds, 2) seconds, forward and backward, of each step: in turn, the order reversed from round to round.

    What disturbs the machine meets all of them. A first call of each, which compiles and finds memory, does not count.
    """
    keep_memory()
    for step in steps.values():
        step()
    found = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            found[name].append(steps[name]())
    return {name: np.array(times) for name, times in found.items()}
