"""What a character trial measures of its gate gradients: steps of the training itself, and single steps at snapshots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repro.gradients import (
    CAUSES,
    LayerRecord,
    PrintedSigned,
    Rounded,
    Rule,
    Static,
    ThresholdedLSTM,
    TopK,
    cosines,
    dense_gradients,
    record,
)
from repro.gradients.accelerator import Accelerator, simulate, total
from repro.gradients.counting import Counted
from repro.gradients.recording import Site
from repro.gradients.recurrent import ThresholdedRNN

GATES = ThresholdedLSTM.gate_names
# Of a sigmoid at 0, of tanh at 0.
LARGEST_DERIVATIVE = {"i": 0.25, "f": 0.25, "g": 1.0, "o": 0.25} | {"r": 0.25, "z": 0.25, "n": 1.0}

Columns = dict[str, list]


def _layers(model: nn.Module) -> list[ThresholdedRNN]:
    return [module for module in model.modules() if isinstance(module, ThresholdedRNN)]


def sites(model: nn.Module) -> list[Site]:
    """The recurrent layers of a model on whose gradients a rule acts, the lowest first."""
    return [site for module in _layers(model) for site in module.sites]


def gate_names(model: nn.Module) -> tuple[str, ...]:
    """The gates of the recurrent layers: i, f, g, o of an LSTM; r, z, n of a GRU."""
    return _layers(model)[0].gate_names


def recurrent_weights(model: nn.Module) -> list[str]:
    """The names of W and U of all recurrent layers, without biases."""
    return [name for name, _ in model.named_parameters() if "weight_ih" in name or "weight_hh" in name]


@dataclass
class MaskedRecord(LayerRecord):
    """A `LayerRecord` that also keeps, of each step of one backward pass, which entries are not zero, (batch, gates hidden)."""

    masks: list[Tensor] = field(default_factory=list)

    def add_step(self, step, dnet, derivatives, arriving, factors, kept) -> None:
        super().add_step(step, dnet, derivatives, arriving, factors, kept)
        self.masks.append((kept != 0).flatten(1))

    def mask(self) -> Tensor:
        """(T, batch, gates hidden); the backward pass went from the last step to the first."""
        return torch.stack(self.masks[::-1])


class ZeroMeter:
    """Counts the zeros of some steps: call `begin` before the forward pass of each step and `end` after its update.

    `columns`, a row for each measured step and recurrent layer, in the order of the model's modules: `entries` of dnet and how
    many are zero, by cause.
    """

    names = ("step", "layer", "entries", *CAUSES)

    def __init__(self, model: nn.Module, steps: set[int]):
        self.sites, self.gates, self.steps = sites(model), gate_names(model), steps
        self.columns: Columns = {name: [] for name in self.names}
        self._step: int | None = None

    def make_record(self) -> LayerRecord:
        return LayerRecord(self.gates)

    def row(self, record: LayerRecord) -> list[int | None]:
        """What follows step and layer."""
        return [sum(record.totals) * len(record.gates), *torch.stack(record.zeros).sum((0, 1)).tolist()]

    def begin(self, step: int) -> None:
        if step in self.steps:
            self._step = step
            for site in self.sites:
                site.record = self.make_record()

    def end(self) -> None:
        if self._step is None:
            return
        for layer, site in enumerate(self.sites):
            record, site.record = site.record, None
            for column, value in zip(self.columns.values(), (self._step, layer, *self.row(record)), strict=True):
                column.append(value)
        self._step = None

    def state_dict(self) -> dict:
        return self.columns

    def load_state_dict(self, state: dict) -> None:
        self.columns = state


class Meter(ZeroMeter):
    """Also measures what hardware could make of the zeros, where all sequences of a minibatch are equally long.

    Further `columns`: those of dnet (one cell, gate and time step) and how many are zero for the whole minibatch; cycles of the
    layer's training step on `machine`, `dense_cycles` without skipping and `simulated_cycles` with the very zeros of this step.
    Cycles are None of what the model of the machine does not know: a GRU, and a rule in the weights' gradients alone.
    """

    names = (*ZeroMeter.names, "columns", "zero_columns", "dense_cycles", "simulated_cycles")

    def __init__(self, model: nn.Module, steps: set[int], machine: Accelerator):
        super().__init__(model, steps)
        known = self.gates == GATES and not any(site.weights_only for site in self.sites)
        self.machine = machine if known else None

    def make_record(self) -> MaskedRecord:
        return MaskedRecord(self.gates)

    def row(self, record: MaskedRecord) -> list[int | None]:
        return [*super().row(record), *_hardware(record, self.machine)]


def _hardware(record: MaskedRecord, machine: Accelerator | None) -> tuple[int, int, int | None, int | None]:
    mask = record.mask().numpy()
    steps, _, gates = mask.shape
    zero = int((~mask.any(1)).sum())
    if machine is None:
        return steps * gates, zero, None, None
    cycles = total(simulate(mask, gates // 4, machine).values())  # the embedding is as wide as the layers
    return steps * gates, zero, cycles.dense, cycles.simulated


@contextmanager
def _under(model: nn.Module, rule: Rule, weights_only: bool) -> Iterator[None]:
    """Another rule for all layers within the block."""
    found = sites(model)
    before = [(site.rule, site.number, site.weights_only) for site in found]
    for site in found:
        site.rule, site.number, site.weights_only = rule, rule.new_site(), weights_only
    try:
        yield
    finally:
        for site, own in zip(found, before, strict=True):
            site.rule, site.number, site.weights_only = own


class SingleStep:
    """One batch and the weights of a dense model, whose gradient is taken under one rule after the other.

    `loss()`: the normalised loss of the batch.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]):
        self.model = model
        with _under(model, Counted(Static(0.0)), weights_only=False):  # not torch's own layer, whose gradient no rule can reach
            self.loss = loss()
        dense = dense_gradients(model, self.loss)
        self.reference = {name: dense[name] for name in recurrent_weights(model)}

    def under(self, rule: Rule, weights_only: bool = False) -> tuple[int, int, float]:
        """Entries of dnet, zeros among them, and the cosine of W and U of all layers with their dense gradient.

        Gradients are left cleared.
        """
        counted = Counted(rule)
        self.model.zero_grad()
        with _under(self.model, counted, weights_only):
            self.loss.backward(retain_graph=True)
        cosine = cosines(self.model, self.reference)["all"]
        self.model.zero_grad()
        return *counted.take(), cosine

    def thresholds(self, thresholds: tuple[float, ...], printed: float) -> Columns:
        """Figure 3: a row for each static t, and one for the printed signed rule at t = `printed`."""
        rows = [("static", t, *self.under(Static(t))) for t in thresholds]
        rows.append(("printed", printed, *self.under(PrintedSigned(printed))))
        return _columns(("rule", "t", "entries", "zeros", "cosine"), rows)

    def variants(self, sparsity: float) -> Columns:
        """A row for dnet rounded to each format, without a threshold, and for the smallest entries of each dnet set to zero.

        `sparsity`: their share, once everywhere ("top") and, of an LSTM, in the weights' gradients alone ("top, weights").
        """
        rows = [
            ("bfloat16", *self.under(Rounded(0.0, torch.bfloat16))),
            ("float16", *self.under(Rounded(0.0, torch.float16))),
            ("top", *self.under(TopK(sparsity))),
        ]
        if gate_names(self.model) == GATES:
            rows.append(("top, weights", *self.under(TopK(sparsity), weights_only=True)))
        return _columns(("variant", "entries", "zeros", "cosine"), rows)


def _columns(names: tuple[str, ...], rows: list[tuple]) -> Columns:
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


class DenseProbe:
    """Stands in for the records of all layers in one dense step: activations (Figure 2), and what makes entries small.

    `cells` of LSTM layers, at all time steps; `full_cells`: those with tanh(c) = 1 or -1 in float32, through which no gradient
    of h reaches c; `dead_cells`: those whose dc is exactly 0; `dead_full_cells`: both.
    """

    def __init__(self, gates: tuple[str, ...] = GATES):
        self.gates = gates
        self._gates = LayerRecord(gates)
        self.exact_zeros = torch.zeros(len(gates), dtype=torch.long)
        self.activations = 0  # of each gate
        self.cells = self.full_cells = self.dead_cells = self.dead_full_cells = 0
        self._largest = torch.tensor([LARGEST_DERIVATIVE[gate] for gate in gates])[:, None]
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
        if self.gates == GATES:
            full, dead = factors[:, GATES.index("o")].abs() == 1, arriving[:, GATES.index("g")] == 0  # tanh(c) and dc
            self.cells += full.numel()
            self.full_cells += int(full.sum())
            self.dead_cells += int(dead.sum())
            self.dead_full_cells += int((full & dead).sum())
        alive = dnet != 0
        size, derivative, arrived = (x[alive].abs().double().log() for x in (dnet, derivatives, arriving))
        products = (size * size, derivative, derivative * size, arrived, arrived * size)
        self._sums += torch.stack([torch.tensor(float(len(size))), size.sum(), *(p.sum() for p in products)]).double()

    @property
    def histograms(self) -> Tensor:
        """(gates, bins) counts."""
        return self._gates.histograms

    def quantile(self, sparsity: float) -> float:
        """The t below or at which a share `sparsity` of all entries of |dnet| lies."""
        magnitudes = torch.cat(self._magnitudes)
        return float(magnitudes.kthvalue(max(1, round(sparsity * len(magnitudes)))).values)

    def lifted(self, sparsity: float) -> tuple[int, int]:
        """Entries up to t, the `sparsity` quantile of |dnet|, and those of them the largest derivative would lift above."""
        magnitudes, possible, t = torch.cat(self._magnitudes), torch.cat(self._possible), self.quantile(sparsity)
        below = magnitudes <= t
        return int(below.sum()), int((below & (possible > t)).sum())

    def variance_shares(self) -> tuple[float, float]:
        """Covariance with log |dnet| over its variance: of log |gate derivative|, and of log |arriving gradient|.

        NaN where dnet is zero everywhere, or does not vary.
        """
        n, size, squares, derivative, with_derivative, arrived, with_arrived = self._sums.tolist()
        variance = squares / n - (size / n) ** 2 if n else 0.0
        if variance <= 0:
            return math.nan, math.nan
        shares = ((with_derivative, derivative), (with_arrived, arrived))
        first, second = ((product / n - total * size / n**2) / variance for product, total in shares)
        return first, second


def probe(model: nn.Module, loss: Callable[[], Tensor]) -> DenseProbe:
    """One dense step of a model without a threshold. Gradients are left cleared."""
    found = DenseProbe(gate_names(model))
    for site in sites(model):
        site.record = found
    try:
        loss().backward()
    finally:
        for site in sites(model):
            site.record = None
    model.zero_grad()
    return found


def recorded(model: nn.Module, loss: Callable[[], Tensor], rule: Rule) -> list[LayerRecord]:
    """What one step of a model under another rule makes of its gate gradients, a record a layer, the lowest first.

    Gradients are left cleared.
    """
    with _under(model, rule, weights_only=False), record(model) as records:
        loss().backward()
    model.zero_grad()
    return list(records.values())
