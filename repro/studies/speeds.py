"""Timing trials of zhu2017: what zeros of dnet are worth in real time, of one layer and within a training."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from repro.engine import Context, Outcome, Trial, local_executor, seed_for
from repro.errors import ReproError, one_of
from repro.studies.gates import FollowedTrial

if TYPE_CHECKING:
    import numpy as np

    from repro.gradients.timing import Step

NN, DENSE = "nn.LSTM", "dense"
SCATTERED, COLUMNS, CSR, GATHERED = "scattered", "columns", "CSR", "gathered"
HELD, TOP = "held", "top-k"
NO_GPU, NO_AVX2 = "no GPU", "no AVX2"  # metrics that say why
DEVICES = ("cpu", "cuda")
DRIVER = Path("/proc/driver/nvidia")

# For numba, MKL, oneDNN and torch; before they are loaded. On processors that are not Intel's MKL does as it likes.
AVX2_ALONE = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}


@dataclass(frozen=True)
class SpeedSizes:
    """Layers that are timed: each of `widths` with each of `batches`, and so many of `rounds` for each width.

    `sparsities` at all widths, and once more at `avx2_widths` with AVX2 alone; `compared` at `compared_width` alone, and at
    `gpu_width` on a GPU. `after`: the share of a training that goes before its step is timed, in `trained_rounds`.
    """

    widths: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: tuple[int, ...]
    sparsities: tuple[float, ...]
    compared: tuple[float, ...]
    compared_width: int
    avx2_widths: tuple[int, ...]
    gpu_width: int
    after: float
    trained_rounds: int


@cache
def gpu_model() -> str | None:
    """The name of the GPU that torch would use, None if there is none for it; by NVIDIA's driver, without waiting for torch."""
    if metadata.version("torch").endswith("+cpu") or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    lines = [line for path in sorted(DRIVER.glob("gpus/*/information")) for line in path.read_text().splitlines()]
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return next(iter(names), "an NVIDIA GPU" if (DRIVER / "version").exists() else None)


@cache
def has_avx2() -> bool:
    """Whether this processor has the instructions to which `SpeedTrial` can be kept, without waiting for torch."""
    from llvmlite.binding import get_host_cpu_features

    found = get_host_cpu_features()
    return bool(found.get("avx2") and found.get("fma"))


@dataclass(frozen=True, kw_only=True)
class SpeedTrial(Trial):
    """Forward and backward pass of one LSTM layer with as many inputs as cells, by several means in turn; one repeat.

    Always "nn.LSTM" and "dense", this package's layer with threshold 0. At each of `sparsities`, the share of zeros in dnet:
    "scattered", this package's step with a static threshold that leaves about as many, over a gradient and input drawn from a
    normal distribution. At each of `compared` also "held" and "top-k", the same share by rules that find it; "columns", whole
    columns of every time step's dnet zero, drawn at random; and by torch alone: "CSR", scattered zeros by its CSR matrices,
    conversion included, and "gathered", dense products of the columns that are left. On a GPU, which has no kernels of this
    package, the last two only.

    `avx2`: all competitors keep to AVX2, registers of 8 lanes, in a process of their own, whatever else the processor has.

    Curve `steps`, a row each: `method`, `sparsity` wanted, `zeros` measured, and in seconds the median over `rounds` of
    `forward` and `backward` and of their sum, `step`, with its quartiles `lower` and `upper`. Where there is no GPU for the
    device "cuda", or no AVX2, the outcome is a metric that says so, under a key of its own.
    """

    study: ClassVar[str] = "zhu2017"
    kind: ClassVar[str] = "speed"
    timing: ClassVar[bool] = True

    hidden: int
    batch: int
    length: int
    sparsities: tuple[float, ...]
    compared: tuple[float, ...]
    rounds: int
    device: str = "cpu"
    avx2: bool = False
    replicate: int = 0

    def __post_init__(self):
        super().__post_init__()
        one_of("device", self.device, DEVICES)

    def _missing(self) -> dict[str, str]:
        """What this machine lacks, by the name of the metric."""
        missing = {}
        if self.device == "cuda" and gpu_model() is None:
            missing[NO_GPU] = "there is no NVIDIA GPU on this machine that torch can use"
        if self.avx2 and not has_avx2():
            missing[NO_AVX2] = "this processor has no AVX2"
        return missing

    def identity(self) -> dict[str, Any]:
        identity = super().identity() | dict.fromkeys(self._missing(), True)
        if self.device == "cuda" and gpu_model() is not None:
            identity["machine"]["gpu"] = gpu_model()
        return identity

    def seconds(self) -> float:
        """For two cores, fitted by eye."""
        if self.device == "cuda":
            return 5.0 if gpu_model() else 0.0
        dense = 6e-12 * 24 * self.batch * self.length * self.hidden**2
        methods = 2 + 0.7 * len(self.sparsities) + 10 * len(self.compared)
        return 1.5 + (self.rounds + 2) * methods * dense

    def label(self) -> str:
        where = "on the GPU" if self.device == "cuda" else "by AVX2 alone" if self.avx2 else "on the CPU"
        return f"steps of {self.hidden} cells, batch {self.batch}, {where}, repeat {self.replicate}"

    def run(self, context: Context) -> Outcome:
        if missing := self._missing():
            return Outcome(missing)
        if self.avx2:
            with local_executor(1, context.threads) as process:
                return process.submit(_by_avx2, replace(self, avx2=False), context).result()
        from repro.gradients.timing import interleaved

        steps = self.steps()
        zeros = {key: 0.0 if key[0] in (NN, DENSE) else step.zeros()[0] for key, step in steps.items()}
        rows = [
            {"method": key[0], "sparsity": key[1], "zeros": zeros[key]} | _summary(times)
            for key, times in interleaved(steps, self.rounds).items()
        ]
        return Outcome({}, {"steps": {name: [row[name] for row in rows] for name in rows[0]}})

    def steps(self) -> dict[tuple[str, float], Step]:
        """What is timed, by method and wanted share of zeros."""
        import torch
        from torch import nn

        from repro.gradients import HeldSparsity, ThresholdedLSTM, TopK
        from repro.gradients.peers import LibraryLSTM
        from repro.gradients.timing import DrawnColumns, Step

        torch.manual_seed(seed_for(self.study, self.replicate, f"steps of {self.hidden}"))
        plain = nn.LSTM(self.hidden, self.hidden)
        x, d_out = torch.randn(2, self.length, self.batch, self.hidden).to(self.device)

        def step(layer) -> Step:
            layer.load_state_dict(plain.state_dict())
            return Step([layer.to(self.device)], x, d_out)

        size = (self.hidden, self.hidden)
        dense = step(ThresholdedLSTM(*size))
        steps = {(NN, 0.0): step(nn.LSTM(*size)), (DENSE, 0.0): dense}
        thresholds = {share: dense.threshold_for(share) for share in {*self.sparsities, *self.compared}}
        if self.device == "cpu":
            steps |= {
                (SCATTERED, share): step(ThresholdedLSTM(*size, threshold=thresholds[share])) for share in self.sparsities
            }
        for share in self.compared:
            columns = DrawnColumns(share, seed_for(self.study, self.replicate, "columns"))
            if self.device == "cpu":
                steps[HELD, share] = step(ThresholdedLSTM(*size, threshold=HeldSparsity(share)))
                steps[TOP, share] = step(ThresholdedLSTM(*size, threshold=TopK(share)))
                steps[COLUMNS, share] = step(ThresholdedLSTM(*size, threshold=columns))
            steps[CSR, share] = step(LibraryLSTM(*size, threshold=thresholds[share], means="CSR"))
            steps[GATHERED, share] = step(LibraryLSTM(*size, threshold=columns, means="columns"))
        return steps


def _by_avx2(trial: SpeedTrial, context: Context) -> Outcome:
    """Of a process that has loaded none of the libraries yet."""
    os.environ.update(AVX2_ALONE)
    import torch

    from repro.sparse.simd import has_avx512

    taken = torch.backends.cpu.get_cpu_capability()
    if taken != "AVX2" or has_avx512():
        raise ReproError(f"torch ({taken}) or numba was loaded before it could be kept to AVX2: set {AVX2_ALONE} earlier")
    return trial.run(context)


def _summary(times: np.ndarray) -> dict[str, float]:
    """Medians of (rounds, 2) seconds, and quartiles of their sums."""
    import numpy as np

    forward, backward = np.median(times, axis=0)
    lower, step, upper = np.quantile(times.sum(1), [0.25, 0.5, 0.75])
    return {"forward": forward, "backward": backward, "step": step, "lower": lower, "upper": upper}


@dataclass(frozen=True, kw_only=True)
class TrainedSpeedTrial(FollowedTrial):
    """The LSTM layers of a character model within its training, with the zeros that its rule makes there; one repeat.

    The `training` is followed for a share `after` of its updates; the step that comes next is then taken over and over: its
    layers' forward and backward pass by "nn.LSTM", by this package without a rule ("dense"), and with it ("scattered"); then
    those of the whole model, from the symbols to the loss.

    Curves `steps`, of the layers, and `model_steps`, as of `SpeedTrial`; curve `zeros`, a row for each `layer`, the lowest one
    first: the share of `zeros` in its dnet and its cycles on the simulated accelerator, as `repro.studies.probing.Meter` has
    them; metric `symbols`, how many the vocabulary has.
    """

    kind: ClassVar[str] = "trained speed"
    code_version: ClassVar[int] = 3  # with the whole model
    timing: ClassVar[bool] = True

    rounds: int

    def seconds(self) -> float:
        followed = replace(self.training, snapshots=())
        return 1 + self.after * followed.seconds() + 8 * self.rounds * followed.seconds() / self.training.steps

    def label(self) -> str:
        return f"steps within {self.training.label()}"

    def run(self, context: Context) -> Outcome:
        from torch import nn

        from repro.gradients import ThresholdedLSTM
        from repro.gradients.timing import Step, WholeStep, interleaved

        course, step = self.followed()
        model, (*batch, states) = course.model, course.minibatch(step)
        others = {name: _with_layers(model, kind) for name, kind in ((NN, nn.LSTM), (DENSE, ThresholdedLSTM))}
        models = others | {SCATTERED: model}
        arriving = self._arriving(model, batch, states)
        steps = {name: Step(list(each.layers), *arriving, states) for name, each in models.items()}
        measured = _measured(steps[SCATTERED])
        overall = sum(measured["zeros"]) / len(measured["zeros"])
        curves = {"zeros": measured}
        whole = {name: WholeStep(each, partial(self._loss, each, batch, states)) for name, each in models.items()}
        for curve, competitors in (("steps", steps), ("model_steps", whole)):
            rows = [
                {"method": name, "sparsity": overall * (name == SCATTERED), "zeros": overall * (name == SCATTERED)}
                | _summary(times)
                for name, times in interleaved(competitors, self.rounds).items()
            ]
            curves[curve] = {name: [row[name] for row in rows] for name in rows[0]}
        return Outcome({"symbols": model.decoder.out_features}, curves)

    def _loss(self, model, batch, states):
        tokens, targets = batch
        return self._of_logits(model(tokens, states)[0], targets)

    def _of_logits(self, logits, targets):
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / self.training.items()

    def _arriving(self, model, batch, states):
        """(input, arriving gradient) of the layers."""
        import torch

        tokens, targets = batch
        with torch.no_grad():
            out, _ = model.decoder_input(tokens, states)
        out.requires_grad_()
        loss = self._of_logits(model.decoder(out), targets)
        return model.embedding(tokens).detach(), *torch.autograd.grad(loss, out)


def _with_layers(model, kind):
    """The model with layers of another kind, of the same weights."""
    other = copy.deepcopy(model)
    for i, layer in enumerate(model.layers):
        other.layers[i] = kind(layer.input_size, layer.hidden_size)
        other.layers[i].load_state_dict(layer.state_dict())
    return other


def _measured(step: Step) -> dict[str, list]:
    """Curve `zeros` of `TrainedSpeedTrial`."""
    from repro.gradients.accelerator import Accelerator
    from repro.studies.gates import MACHINE
    from repro.studies.probing import CAUSES, Meter

    meter = Meter(step.layers, {0}, Accelerator(*MACHINE))
    meter.begin(0)
    step()
    meter.end()
    columns = meter.columns
    removed = zip(*(columns[cause] for cause in CAUSES), strict=True)
    zeros = [sum(row) / entries for row, entries in zip(removed, columns["entries"], strict=True)]
    return {"layer": columns["layer"], "zeros": zeros} | {name: columns[name] for name in ("dense_cycles", "simulated_cycles")}
