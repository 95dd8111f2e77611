"""What happens to gate gradients in training: zeros by cause, gate activations, and how far dW is from the dense one.

Nothing is measured, and nothing costs time, outside `with record(model)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repro.errors import ReproError
from repro.gradients.thresholds import Rule, Static, as_rule

CAUSES = ("saturated", "arriving", "factor", "underflow", "threshold")


class Site:
    """One layer and direction on whose gradient a rule acts. `name`: "l0", "l0_reverse", ... as in the names of parameters.

    `weights_only`: of an LSTM, the rule acts on the dnet of the weights' gradients alone; see `ThresholdedLSTM`.
    """

    def __init__(self, name: str, rule: Rule):
        self.name = name
        self.rule, self.number = rule, rule.new_site()
        self.weights_only = False
        self.record: LayerRecord | None = None

    def apply(self, dnet: Tensor) -> Tensor:
        """Set the entries of dnet to zero that the rule removes, in place; returns dnet."""
        return self.rule(dnet, self.number)


class Thresholded:
    """What modules whose gradients are thresholded share: `threshold`, a number or a rule, and the `sites` it acts on."""

    sites: list[Site]

    def _make_sites(self, names: list[str], threshold: float | Rule) -> None:
        rule = as_rule(threshold)
        self.sites = [Site(name, rule) for name in names]

    @property
    def threshold(self) -> Rule:
        """The rule in force; a number or a rule may be assigned at any time."""
        return self.sites[0].rule

    @threshold.setter
    def threshold(self, threshold: float | Rule) -> None:
        rule = as_rule(threshold)
        for site in self.sites:
            if site.rule is not rule:
                site.rule, site.number = rule, rule.new_site()


@dataclass
class LayerRecord:
    """Counts of one layer and direction, added up over backward passes; `gates` in the order of the rows of its weights.

    `zeros[step][gate][cause]`, `totals[step]`: entries of dnet that are zero, by cause, and entries a gate, zero or not.
    Each zero has the first cause that applies: "saturated", the derivative of the gate's own activation is exactly 0;
    "arriving", the gradient that arrives (dc; dh for o) is; "factor", the other factor is, such as c_0 = 0 for f at the
    first step; "underflow", only the product is; "threshold", the rule removed it. `histograms[gate]`: activations in `BINS`
    bins of equal width over the gate's range, [0, 1] or [-1, 1].
    """

    gates: tuple[str, ...]
    zeros: list[Tensor] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)
    histograms: Tensor | None = None

    BINS = 100

    def sparsity(self) -> Tensor:
        """Share of zeros, (steps, gates); NaN where there was no entry."""
        return self._counted().sum(2).double() / torch.tensor(self.totals).double()[:, None]

    def by_cause(self) -> Tensor:
        """Share of the entries of dnet that are zero for each of `CAUSES`, (steps, gates, causes)."""
        return self._counted().double() / torch.tensor(self.totals).double()[:, None, None]

    def overall(self) -> dict[str, float]:
        """Share of all entries that are zero, by cause and as "sparsity"."""
        zeros, total = self._counted().sum((0, 1)), sum(self.totals) * len(self.gates)
        return dict(zip(CAUSES, (zeros / total).tolist(), strict=True)) | {"sparsity": int(zeros.sum()) / total}

    def _counted(self) -> Tensor:
        """(steps, gates, causes); ReproError if there was no backward pass."""
        if not self.zeros:
            raise ReproError("nothing is recorded: no backward pass of this layer ran within the block of `record`")
        return torch.stack(self.zeros)

    def add_gates(self, activations: Tensor) -> None:
        """`activations`: (frames, gates, hidden), of a whole forward pass."""
        ranges = [(-1.0 if gate in "gn" else 0.0, 1.0) for gate in self.gates]
        found = [
            torch.histc(part.detach().float().cpu(), self.BINS, low, high)
            for part, (low, high) in zip(activations.unbind(1), ranges, strict=True)
        ]
        counts = torch.stack(found).double()
        self.histograms = counts if self.histograms is None else self.histograms + counts

    def add_step(self, step: int, dnet: Tensor, derivatives: Tensor, arriving: Tensor, factors: Tensor, kept: Tensor) -> None:
        """Classify the zeros of one step, all arguments (batch, gates, hidden): dnet before and `kept` after the rule."""
        causes, unexplained = [], kept == 0
        for zero in (derivatives == 0, arriving == 0, factors == 0, dnet == 0, unexplained):
            causes.append((unexplained & zero).sum((0, 2)).cpu())
            unexplained = unexplained & ~zero
        while len(self.totals) <= step:
            self.totals.append(0)
            self.zeros.append(torch.zeros(len(self.gates), len(CAUSES), dtype=torch.long))
        self.zeros[step] += torch.stack(causes, 1)
        self.totals[step] += dnet.shape[0] * dnet.shape[2]


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, LayerRecord]]:
    """Measure all thresholded LSTM and GRU layers of `model`, in forward and backward passes within the block.

    Yields a record for each layer and direction, by name: "rnn.l0_reverse" of a module named "rnn". Both passes must be within
    the block; those of `dense` are not recorded. Raises ReproError if there is no such layer.
    """
    sites = {
        f"{name}.{site.name}".lstrip("."): (site, module.gate_names)
        for name, module in model.named_modules()
        if isinstance(module, Thresholded) and hasattr(module, "gate_names")
        for site in module.sites
    }
    if not sites:
        raise ReproError(f"{type(model).__name__} has no ThresholdedLSTM or ThresholdedGRU: there is nothing to record")
    records, before = {}, [site.record for site, _ in sites.values()]
    for name, (site, gates) in sites.items():
        records[name] = site.record = LayerRecord(gates)
    try:
        yield records
    finally:
        for (site, _), outer in zip(sites.values(), before, strict=True):
            site.record = outer


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """No rule acts on any gradient of `model` in backward passes within the block; none is told of them, nor any record."""
    sites = [site for module in model.modules() if isinstance(module, Thresholded) for site in module.sites]
    before = [(site.rule, site.number, site.record) for site in sites]
    for site in sites:
        site.rule, site.number = Static(0.0), 0
        if site.record is not None:
            site.record = LayerRecord(site.record.gates)  # not None: a pass goes on as the forward pass began it
    try:
        yield
    finally:
        for site, (rule, number, outer) in zip(sites, before, strict=True):
            site.rule, site.number, site.record = rule, number, outer


def dense_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` for each parameter without any rule; the graph stays, so that `loss.backward()` can follow."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not wanted:
        raise ReproError(f"{type(model).__name__} has no parameter that requires a gradient")
    with dense(model):
        found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


def cosines(model: nn.Module, reference: dict[str, Tensor]) -> dict[str, float]:
    """Cosine of each parameter's `.grad` with the `reference` of `dense_gradients`; under "all" that of all together.

    The correlation of the paper's Figure 3 is that of the weights of the LSTM layers. NaN where a gradient is zero,
    or so small that float64 has no squares of it.
    """
    products, ours, theirs = {}, {}, {}
    for name, parameter in model.named_parameters():
        if name in reference:
            if parameter.grad is None:
                raise ReproError(f"{name} has no gradient: call `loss.backward()` first")
            a, b = parameter.grad.double(), reference[name].double()
            products[name], ours[name], theirs[name] = (a * b).sum().item(), (a * a).sum().item(), (b * b).sum().item()
    for sums in (products, ours, theirs):
        sums["all"] = sum(sums.values())
    lengths = {name: (ours[name] * theirs[name]) ** 0.5 for name in products}
    return {name: products[name] / lengths[name] if lengths[name] else float("nan") for name in products}
