"""When masks are refreshed and below which magnitude weights go: Narang's ramp, its automatic form, and the baselines.

A schedule is a frozen value with two methods: `due(iteration)` and `threshold(iteration, magnitudes)`, the threshold epsilon
for a group of weights with these absolute values (a flat tensor). Iterations count from 0, one per optimizer step.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from repro.errors import ReproError


class Schedule(Protocol):
    def due(self, iteration: int) -> bool: ...
    def threshold(self, iteration: int, magnitudes: Tensor) -> float: ...


def magnitude_quantile(magnitudes: Tensor, sparsity: float) -> float:
    """The threshold below which exactly `round(sparsity * n)` of n distinct magnitudes lie (strictly).

    The largest is always kept, and so are equal magnitudes at the threshold: ties can only make the result less sparse.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ReproError(f"sparsity is {sparsity}: it must lie in [0, 1)")
    flat = magnitudes.flatten()
    below = round(sparsity * flat.numel())
    return flat.kthvalue(min(below + 1, flat.numel())).values.item()


def table1(epochs: int, iterations_per_epoch: int) -> dict[str, int]:
    """The heuristics of Table 1: start of the second epoch, of 25 % and of 50 % of all epochs, in iterations."""
    total = epochs * iterations_per_epoch
    return {"start": iterations_per_epoch, "ramp": total // 4, "end": total // 2}


def _check_order(start: int, ramp: int, end: int, freq: int) -> None:
    if not 0 <= start <= ramp <= end or start == end:
        raise ReproError(f"start {start}, ramp {ramp}, end {end}: need 0 <= start <= ramp <= end and start < end")
    if freq < 1:
        raise ReproError(f"freq is {freq}: masks are refreshed every freq >= 1 iterations")


@dataclass(frozen=True)
class Ramp:
    """Gradual pruning of Narang et al. 2017: Algorithm 1 with the slope of Equation 1.

    `q`: 90th percentile of the magnitudes in a trained dense model (`dense_quantiles`); `start`, `ramp`, `end`: `start_itr`,
    `ramp_itr`, `end_itr`; `freq`: iterations between updates; `phi`: ramp slope in units of the start slope theta, 1.5 to 2.
    Equation 1 assumes 1.5, for which epsilon reaches q at `end`; with 2 it ends near 1.2 q.
    """

    q: float
    start: int
    ramp: int
    end: int
    freq: int = 100
    phi: float = 1.5

    def __post_init__(self):
        _check_order(self.start, self.ramp, self.end, self.freq)
        if not self.q > 0:
            raise ReproError(f"q is {self.q}: it must be a positive magnitude")
        if not self.phi > 0:
            raise ReproError(f"phi is {self.phi}: it must be positive (the paper uses 1.5 to 2)")
        if self.last_update() <= self.start:
            raise ReproError(f"no multiple of freq {self.freq} between start {self.start} and end {self.end}: lower freq")

    @property
    def theta(self) -> float:
        """Start slope, Equation 1: magnitude per update."""
        return 2 * self.q * self.freq / (2 * (self.ramp - self.start) + 3 * (self.end - self.ramp))

    def due(self, iteration: int) -> bool:
        return self.start < iteration < self.end and iteration % self.freq == 0

    def threshold(self, iteration: int, magnitudes: Tensor | None = None) -> float:
        if iteration < self.ramp:
            return self.theta * (iteration - self.start + 1) / self.freq
        flat, steep = self.ramp - self.start + 1, self.phi * (iteration - self.ramp + 1)
        return self.theta * (flat + steep) / self.freq

    def last_update(self) -> int:
        """The last iteration at which the masks change."""
        return (self.end - 1) // self.freq * self.freq


@dataclass(frozen=True)
class AutoRamp:
    """The ramp with q chosen from the weights in training: no second, dense model, and the wanted sparsity is met exactly.

    Epsilon follows Algorithm 1 with q estimated anew at each update, as the `sparsity` quantile of the current magnitudes;
    the ramp is scaled to reach it at its last update. Ours, not the paper's.
    """

    sparsity: float
    start: int
    ramp: int
    end: int
    freq: int = 100
    phi: float = 1.5

    def __post_init__(self):
        magnitude_quantile(torch.ones(1), self.sparsity)
        self._shape()

    def _shape(self) -> Ramp:
        return Ramp(1.0, self.start, self.ramp, self.end, self.freq, self.phi)

    def due(self, iteration: int) -> bool:
        return self._shape().due(iteration)

    def threshold(self, iteration: int, magnitudes: Tensor) -> float:
        shape = self._shape()
        fraction = shape.threshold(iteration) / shape.threshold(shape.last_update())
        return fraction * magnitude_quantile(magnitudes, self.sparsity)


@dataclass(frozen=True)
class HardPrune:
    """All weights below one threshold are removed at once, at iteration `at` (Yu et al. 2012; the paper's Table 4)."""

    sparsity: float
    at: int

    def __post_init__(self):
        magnitude_quantile(torch.ones(1), self.sparsity)

    def due(self, iteration: int) -> bool:
        return iteration == self.at

    def threshold(self, iteration: int, magnitudes: Tensor) -> float:
        return magnitude_quantile(magnitudes, self.sparsity)


@dataclass(frozen=True)
class Cubic:
    """Automated gradual pruning (Zhu and Gupta 2017): s_t = s (1 - (1 - (t - start) / (end - start))^3)."""

    sparsity: float
    start: int
    end: int
    freq: int = 100

    def __post_init__(self):
        magnitude_quantile(torch.ones(1), self.sparsity)
        _check_order(self.start, self.start, self.end, self.freq)

    def due(self, iteration: int) -> bool:
        return self.start <= iteration <= self.end and (iteration % self.freq == 0 or iteration == self.end)

    def threshold(self, iteration: int, magnitudes: Tensor) -> float:
        remaining = 1 - (iteration - self.start) / (self.end - self.start)
        return magnitude_quantile(magnitudes, self.sparsity * (1 - remaining**3))
