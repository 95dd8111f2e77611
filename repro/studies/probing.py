"""What a character trial measures of its gate gradients: steps of the training itself, and single steps at snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repro.gradients import CAUSES, LayerRecord, Static, ThresholdedLSTM, cosines, dense_gradients
from repro.gradients.accelerator import Accelerator, simulate, structured_sparsity, total
from repro.gradients.recording import Site

GATES = ThresholdedLSTM.gate_names
LARGEST_DERIVATIVE = {"i": 0.25, "f": 0.25, "g": 1.0, "o": 0.25}  # of a sigmoid at 0, of tanh at 0

Columns = dict[str, list]


def sites(model: nn.Module) -> list[Site]:
    """The layers of a model on whose gradients a rule acts, the lowest first."""
    return [site for module in model.modules() if isinstance(module, ThresholdedLSTM) for site in module.sites]


def lstm_weights(model: nn.Module) -> list[str]:
    """The names of W and U of all LSTM layers, without biases."""
    return [name for name, _ in model.named_parameters() if "weight_ih" in name or "weight_hh" in name]


@dataclass
class MaskedRecord(LayerRecord):
    """A `LayerRecord` that also keeps, of each step of one backward pass, which entries are not zero, (batch, 4 hidden)."""

    masks: list[Tensor] = field(default_factory=list)

    def add_step(self, step, dnet, derivatives, arriving, factors, kept) -> None:
        super().add_step(step, dnet, derivatives, arriving, factors, kept)
        self.masks.append((kept != 0).flatten(1))

    def mask(self) -> Tensor:
        """(T, batch, 4 hidden); the backward pass went from the last step to the first."""
        return torch.stack(self.masks[::-1])


class Meter:
    """Measures some steps of a training: call `begin` before the forward pass of each step and `end` after its update.

    `columns`, a row for each measured step and layer: `entries` of dnet and how many are zero, by cause; `columns` of dnet (one
    cell, gate and time step) and how many are zero for the whole minibatch; cycles of the layer's training step on `machine`,
    `dense_cycles` without skipping and `simulated_cycles` with the very zeros of this step.
    """

    NAMES = ("step", "layer", "entries", *CAUSES, "columns", "zero_columns", "dense_cycles", "simulated_cycles")

    def __init__(self, model: nn.Module, machine: Accelerator, steps: set[int]):
        self.sites, self.machine, self.steps = sites(model), machine, steps
        self.columns: Columns = {name: [] for name in self.NAMES}
        self._step: int | None = None

    def begin(self, step: int) -> None:
        if step in self.steps:
            self._step = step
            for site in self.sites:
                site.record = MaskedRecord(GATES)

    def end(self) -> None:
        if self._step is None:
            return
        for layer, site in enumerate(self.sites):
            record, site.record = site.record, None
            row = (self._step, layer, *_counts(record), *_hardware(record, self.machine))
            for column, value in zip(self.columns.values(), row, strict=True):
                column.append(value)
        self._step = None

    def state_dict(self) -> dict:
        return self.columns

    def load_state_dict(self, state: dict) -> None:
        self.columns = state


def _counts(record: LayerRecord) -> list[int]:
    return [sum(record.totals) * len(GATES), *torch.stack(record.zeros).sum((0, 1)).tolist()]


def _hardware(record: MaskedRecord, machine: Accelerator) -> tuple[int, int, int, int]:
    mask = record.mask().numpy()
    steps, _, gates = mask.shape
    cycles = total(simulate(mask, gates // 4, machine).values())  # the embedding is as wide as the layers
    zero = round(structured_sparsity(mask) * steps * gates)
    return steps * gates, zero, cycles.dense, cycles.simulated


class _Counted(Static):
    """A static threshold that counts what it leaves."""

    feedback = True

    def __init__(self, t: float, signed: bool = False):
        super().__init__(t)
        self.signed, self.kept, self.total = signed, 0, 0

    def observe(self, site, kept, alive, total):
        self.kept += kept
        self.total += total


@contextmanager
def _under(model: nn.Module, rule: Static) -> Iterator[None]:
    """Another rule for all layers within the block."""
    found = sites(model)
    before = [(site.rule, site.number) for site in found]
    for site in found:
        site.rule, site.number = rule, rule.new_site()
    try:
        yield
    finally:
        for site, (own, number) in zip(found, before, strict=True):
            site.rule, site.number = own, number


def single_step(model: nn.Module, loss: Callable[[], Tensor], thresholds: tuple[float, ...], printed: float) -> Columns:
    """Figure 3: the same batch and weights under each t, and under the printed signed rule at t = `printed`.

    `loss()`: the normalised loss of the batch, whose gradient is taken. A row each: `rule` ("static" or "printed"), `t`,
    `entries` of dnet, `zeros` among them, and `cosine` of W and U of all LSTM layers with their dense gradient. Gradients
    are left cleared.
    """
    value = loss()
    dense = dense_gradients(model, value)
    reference = {name: dense[name] for name in lstm_weights(model)}
    columns: Columns = {name: [] for name in ("rule", "t", "entries", "zeros", "cosine")}
    for name, t in [*(("static", t) for t in thresholds), ("printed", printed)]:
        rule = _Counted(t, signed=name == "printed")
        model.zero_grad()
        with _under(model, rule):
            value.backward(retain_graph=True)
        row = (name, t, rule.total, rule.total - rule.kept, cosines(model, reference)["all"])
        for column, found in zip(columns.values(), row, strict=True):
            column.append(found)
    model.zero_grad()
    return columns


class DenseProbe:
    """Stands in for the records of all layers in one dense step: activations (Figure 2), and what makes entries small."""

    def __init__(self):
        self._gates = LayerRecord(GATES)
        self.exact_zeros = torch.zeros(len(GATES), dtype=torch.long)
        self.activations = 0  # of each gate
        self._largest = torch.tensor([LARGEST_DERIVATIVE[gate] for gate in GATES])[:, None]
        self._magnitudes: list[Tensor] = []
        self._possible: list[Tensor] = []
        self._sums = torch.zeros(7, dtype=torch.float64)

    def add_gates(self, activations: Tensor) -> None:
        self._gates.add_gates(activations)
        self.exact_zeros += (activations == 0).sum((0, 2)).cpu()
        self.activations += activations.shape[0] * activations.shape[2]

    def add_step(self, step, dnet, derivatives, arriving, factors, kept) -> None:
        self._magnitudes.append(dnet.abs().flatten())
        self._possible.append(((arriving * factors).abs() * self._largest).flatten())
        alive = dnet != 0
        size, derivative, arrived = (x[alive].abs().double().log() for x in (dnet, derivatives, arriving))
        products = (size * size, derivative, derivative * size, arrived, arrived * size)
        self._sums += torch.stack([torch.tensor(float(len(size))), size.sum(), *(p.sum() for p in products)]).double()

    @property
    def histograms(self) -> Tensor:
        """(gates, bins) counts."""
        return self._gates.histograms

    def lifted(self, sparsity: float) -> tuple[int, int]:
        """Entries below t, the `sparsity` quantile of |dnet|, and those of them the largest derivative would lift above."""
        magnitudes, possible = torch.cat(self._magnitudes), torch.cat(self._possible)
        t = magnitudes.kthvalue(max(1, round(sparsity * len(magnitudes)))).values
        below = magnitudes <= t
        return int(below.sum()), int((below & (possible > t)).sum())

    def variance_shares(self) -> tuple[float, float]:
        """Covariance with log |dnet| over its variance: of log |gate derivative|, and of log |arriving gradient|."""
        n, size, squares, derivative, with_derivative, arrived, with_arrived = self._sums.tolist()
        variance = squares / n - (size / n) ** 2
        shares = ((with_derivative, derivative), (with_arrived, arrived))
        first, second = ((product / n - total * size / n**2) / variance for product, total in shares)
        return first, second


def probe(model: nn.Module, loss: Callable[[], Tensor]) -> DenseProbe:
    """One dense step of a model without a threshold. Gradients are left cleared."""
    found = DenseProbe()
    for site in sites(model):
        site.record = found
    try:
        loss().backward()
    finally:
        for site in sites(model):
            site.record = None
    model.zero_grad()
    return found
