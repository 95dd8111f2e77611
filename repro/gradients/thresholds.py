"""Rules that decide which entries of the gate gradients dnet become zero before the backward products (Zhu et al. 2017).

A rule is called with the dnet of one time step, (batch, gates * hidden), or of a whole sequence, and zeroes entries in place.
A static t is an absolute number: it means something else for every normalisation of the loss (mean over batch and time, or
over the batch alone: a factor of the sequence length). `RelativeRMS`, `TopK`, `HeldSparsity` and `ByRate` do not depend on it.
`Rounded` puts dnet into the numbers of a smaller format before another rule acts.
"""

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from repro.errors import ReproError

_FARTHEST = 700.0  # log t, up or down: float64 holds its exponential


class Rule:
    """An entry of dnet stays where `|dnet| > t`; a subclass says which t, by `known` or by `threshold`.

    A layer and direction that a rule acts on is a *site*; a rule with `feedback` is told what became of each dnet, may keep a
    threshold for each site, and `state_dict` holds these. `signed`: whether the comparison is `dnet > t` instead.
    """

    feedback = False
    signed = False

    def new_site(self) -> int:
        """The number of a further layer and direction, to be handed to the other methods."""
        return 0

    def known(self, site: int = 0) -> float | None:
        """t of the coming call, at least 0, or None if it depends on the dnet of that call."""
        return None

    def threshold(self, dnet: Tensor, site: int = 0) -> float | Tensor:
        """t for this dnet, at least 0."""
        return self.known(site)

    def observe(self, site: int, kept: int, alive: int, total: int) -> None:
        """After a call: of `total` entries `alive` were not zero before it, and `kept` are not zero now."""

    def __call__(self, dnet: Tensor, site: int = 0) -> Tensor:
        """Set entries of dnet to zero, in place; returns dnet. NaN and infinity stay: divergence is not to be hidden.

        (But for negative infinity under a signed rule.) dnet is the caller's: what is to be kept of it has to be copied.
        """
        largest = torch.finfo(dnet.dtype).max
        t = self.threshold(dnet, site)
        t = t.clamp(max=largest) if isinstance(t, Tensor) else min(t, largest)
        alive = int(dnet.count_nonzero()) if self.feedback else 0
        if self.signed or isinstance(t, Tensor):
            dnet.masked_fill_((dnet if self.signed else dnet.abs()) <= t, 0.0)
        else:
            dnet.copy_(torch.hardshrink(dnet, t))  # the same, in less time
        if self.feedback:
            self.observe(site, int(dnet.count_nonzero()), alive, dnet.numel())
        return dnet

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` gave, after a restart."""


def as_rule(threshold: "float | Rule") -> Rule:
    """A rule as it is, a number t as `Static(t)`."""
    if isinstance(threshold, Rule):
        return threshold
    if _is_number(threshold):
        return Static(threshold)
    raise ReproError(f"threshold is {threshold!r}: give a number t >= 0 or a rule of repro.gradients.thresholds")


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_at_least_0(name: str, value: float) -> None:
    if not (_is_number(value) and 0.0 <= value < math.inf):
        raise ReproError(f"{name} is {value!r}: it must be a finite number, at least 0")


def check_sparsity(sparsity: float) -> None:
    """Raise ReproError for a share of zeros outside of [0, 1)."""
    if not (_is_number(sparsity) and 0.0 <= sparsity < 1.0):
        raise ReproError(f"sparsity is {sparsity!r}: it must be a number in [0, 1)")


class Static(Rule):
    """The paper's rule: one t for all layers, gates and steps. t = 0 removes nothing; the paper's choice is 1e-6."""

    def __init__(self, t: float):
        _check_at_least_0("threshold t", t)
        self.t = t

    def known(self, site=0):
        return self.t

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.t:g})"


class PrintedSigned(Static):
    """The rule as printed in section 3.1, `dnet > t`, without the bars: it removes every negative gradient as well.

    A misprint by the paper's own words ("rounding to zero"), kept to show what it would do.
    """

    signed = True


class RelativeRMS(Rule):
    """t = factor times the root mean square of the dnet at hand."""

    def __init__(self, factor: float):
        _check_at_least_0("factor", factor)
        self.factor = factor

    def threshold(self, dnet, site=0):
        norm = torch.linalg.vector_norm(dnet, dtype=torch.float64)  # squares of float32 would underflow, or overflow
        return self.factor * (norm / math.sqrt(max(dnet.numel(), 1)))

    def __repr__(self) -> str:
        return f"RelativeRMS({self.factor:g})"


def _quantile(dnet: Tensor, sparsity: float) -> Tensor:
    """The largest of the `round(sparsity * n)` smallest magnitudes, 0 if that is none of n."""
    below = round(sparsity * dnet.numel())
    magnitudes = dnet.detach().abs().flatten()
    if not below:
        return magnitudes.new_zeros(())
    if magnitudes.device.type == "cpu" and magnitudes.dtype in (
        torch.float32,
        torch.float64,
    ):  # NumPy takes a tenth of the time
        return torch.as_tensor(np.partition(magnitudes.numpy(), below - 1)[below - 1])
    return magnitudes.kthvalue(below).values


class TopK(Rule):
    """The `round(sparsity * n)` smallest of n magnitudes become zero, those that already are among them.

    Of equal magnitudes at the threshold all become zero: ties can only make dnet sparser.
    """

    def __init__(self, sparsity: float):
        check_sparsity(sparsity)
        self.sparsity = sparsity

    def threshold(self, dnet, site=0):
        return _quantile(dnet, self.sparsity)

    def __repr__(self) -> str:
        return f"TopK({self.sparsity:g})"


class HeldSparsity(Rule):
    """A threshold for each layer and direction that follows the gradients, so that a share `sparsity` of dnet is zero.

    The first dnet sets t to its quantile, and so does one after two steps in a row that removed all of dnet, or none of it: t
    has lost touch then. (After one such step a new start would only lose t: the last word of sentences may be one.) From there
    on t is known before dnet is, and every step corrects it: `log t += gain (sparsity total - zeros) / largest`, by as much as
    it has entries: total of the largest that was seen, which is all of them but where sequences of one batch end at different
    steps, or batches differ. If all steps counted alike there, the few longest sequences would spoil the share; nor does a step
    of a few that is removed as a whole start t anew: it takes as many in a row as have the entries of the two.

    Errors add up to the change of log t over gain: over n steps in which t has to follow gradients that grow or shrink by a
    factor of k, the mean sparsity is off by `log(k) / (gain n)` only, 0.2 points for a factor of 10 in 1,000 steps. A linear
    layer makes one step an update: a training of a few hundred updates wants a gain of 2 or 3 there. With gain 1 the feedback
    does not oscillate: the zeros grow by at most 0.48 for each unit of log t if dnet is normal, and by less for wider
    distributions. (The step is that of adaptive conformal inference, Gibbs and Candes 2021, on log t.) A dnet of zeros only
    says nothing about t and changes nothing.
    """

    feedback = True

    def __init__(self, sparsity: float, gain: float = 1.0):
        check_sparsity(sparsity)
        if not (_is_number(gain) and 0.0 < gain < math.inf):
            raise ReproError(f"gain is {gain!r}: it must be a positive number")
        self.sparsity, self.gain = sparsity, gain
        self._logs: list[float | None] = [None]  # site 0 is that of a rule called on its own
        self._largest = [0]
        self._astray = [0]  # entries of the last steps in a row that removed all or nothing

    def new_site(self) -> int:
        self._logs.append(None)
        self._largest.append(0)
        self._astray.append(0)
        return len(self._logs) - 1

    def known(self, site=0):
        return None if self._logs[site] is None else math.exp(self._logs[site])

    def threshold(self, dnet, site=0):
        t = self.known(site)
        if t is None:
            t = float(_quantile(dnet, self.sparsity))
            if 0.0 < t < math.inf:
                self._logs[site] = math.log(t)
        return t

    def observe(self, site, kept, alive, total):
        self._largest[site] = max(self._largest[site], total)
        if not alive or self._logs[site] is None:
            return
        missing = self.sparsity * total - (total - kept)
        log = self._logs[site] + self.gain * missing / self._largest[site]
        self._logs[site] = max(-_FARTHEST, min(log, _FARTHEST))
        astray = kept == 0 or (kept == alive and missing > 0)
        self._astray[site] = self._astray[site] + total if astray else 0
        if self._astray[site] >= 2 * self._largest[site]:
            self._logs[site], self._astray[site] = None, 0

    def state_dict(self) -> dict:
        return {"logs": list(self._logs), "largest": list(self._largest), "astray": list(self._astray)}

    def load_state_dict(self, state: dict) -> None:
        if len(state["logs"]) != len(self._logs):
            raise ReproError(f"state of {len(state['logs']) - 1} layers and directions: this rule has {len(self._logs) - 1}")
        self._logs, self._largest, self._astray = (list(state[name]) for name in ("logs", "largest", "astray"))

    def __repr__(self) -> str:
        return f"HeldSparsity({self.sparsity:g}, gain={self.gain:g})"


class ByRate(Rule):
    """t = factor * norm / rate: from the learning rate and the gradient's norm, which the paper names as future work.

    A weight's error after a step is rate times that of its gradient, which grows as t does: rate * t is held at a share of
    the norm. The norm makes t independent of the loss's normalisation. Tell both after each optimizer step, by `update`;
    before the first, nothing is removed.
    """

    def __init__(self, factor: float):
        _check_at_least_0("factor", factor)
        self.factor, self.t = factor, 0.0

    def update(self, rate: float, norm: float) -> None:
        """`rate`: learning rate of the coming step, positive; `norm`: L2 norm of the gradient of all weights."""
        _check_at_least_0("gradient norm", norm)
        if not 0.0 < rate < math.inf:
            raise ReproError(f"learning rate is {rate}: it must be a positive number")
        self.t = self.factor * norm / rate

    def known(self, site=0):
        return self.t

    def state_dict(self) -> dict:
        return {"t": self.t}

    def load_state_dict(self, state: dict) -> None:
        self.t = state["t"]

    def __repr__(self) -> str:
        return f"ByRate({self.factor:g})"


class Rounded(Rule):
    """Every entry of dnet is rounded to a half-precision number where it is formed; then another rule acts, or a number t.

    dnet stays in its own format, as do the products: what is shown is what the format does to the numbers of dnet.
    bfloat16 has the range of float32 and 8 significant bits; float16 has 11, and all that is at most 2^-25 = 3e-8 becomes 0.
    """

    def __init__(self, threshold: float | Rule, dtype: torch.dtype):
        if dtype not in (torch.bfloat16, torch.float16):
            raise ReproError(f"dtype of Rounded is {dtype}: it must be torch.bfloat16 or torch.float16")
        self.rule, self.dtype = as_rule(threshold), dtype

    def new_site(self) -> int:
        return self.rule.new_site()

    def __call__(self, dnet, site=0):
        return self.rule(dnet.copy_(dnet.to(self.dtype)), site)

    def state_dict(self) -> dict:
        return self.rule.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.rule.load_state_dict(state)

    def __repr__(self) -> str:
        return f"Rounded({self.rule!r}, {self.dtype})"
