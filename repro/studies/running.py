"""Trials that run pruned models: a really trained one on sparse kernels and from a file, and sequences against libraries."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from repro.engine import Context, Outcome, Record, Trial, seed_for
from repro.errors import ReproError
from repro.studies.speech import STEP_SECONDS, SpeechTrial
from repro.studies.timings import byte_bound

if TYPE_CHECKING:
    from torch import Tensor, nn

_LEAST_TURNS = 3
_WAKE_SECONDS = 0.1


@dataclass(frozen=True)
class PrunedModel:
    """A speech model that `RuntimeTrial` trains: recurrent `layers` of `hidden` units, in `epochs`."""

    cell: str
    hidden: int
    layers: int
    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class RunningSizes:
    """How large the trials of this file are in a profile. `corpus_size`: of the made corpus; `utterances`: timed, of its test
    set; `repeats` of each trial; the rest: every sequence of `steps` that `SequenceTrial` takes.
    """

    corpus_size: str
    models: tuple[PrunedModel, ...]
    utterances: int
    cells: tuple[str, ...]
    widths: tuple[int, ...]
    sparsities: tuple[float, ...]
    steps: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class RuntimeTrial(SpeechTrial):
    """Trains and prunes one speech model as `SpeechTrial` does, then runs it on sparse kernels and stores it sparse.

    Metrics, next to those of `SpeechTrial`: `dense_rtf` and `sparse_rtf`, seconds to compute over seconds of speech, one of
    `utterances` at a time, from features to scores; over the whole test set, also one at a time, `dense_cer`, `sparse_cer`,
    `transcripts` and `other_transcripts`, how many of them differ, and `score_error`, largest difference over largest score;
    `sparse_layers` and `dense_layers`, of those that `compile` looked at.

    Curve `products`: the densest recurrent matrix times a vector by every backend, and by the sparse ones its weights
    "shuffled" too, which is what a random mask is (`backends`: names from `repro.sparse.peers`, all if empty). Curve `files`:
    what `save` writes, by type of the values, and what a model loaded from there reads; `error` as `score_error`, against the
    model before it was saved.
    """

    kind: ClassVar[str] = "runtime"
    timing: ClassVar[bool] = True

    utterances: int
    rounds: int
    backends: tuple[str, ...] = ()

    def seconds(self) -> float:
        return super().seconds() + 25 + self.rounds

    def label(self) -> str:
        return f"{super().label()}, run and stored"

    def _outcome(self, model, history, trace, test, steps) -> Outcome:
        """After training, before `SpeechTrial` rounds the model to float16 in place."""
        import torch

        from repro.datasets.batches import batches
        from repro.datasets.features import load_features
        from repro.datasets.speech import character_error_rate
        from repro.sparse import compile

        trained = super()._outcome(model, history, trace, test, steps)
        options = {"size": self.corpus_size} if self.corpus_size else {}
        speech = list(batches(load_features(self.corpus, speeds=self.speeds, **options).splits["test"], 1))
        references = [text for batch in speech for text in batch.texts]
        threads = torch.get_num_threads()
        model.eval()
        seed = seed_for(self.study, self.replicate, "products")
        products, missing = recurrent_products(model, threads, self.rounds, seed, self.backends)
        fast = compile(model)
        dense, sparse = read(model, speech), read(fast, speech)
        chosen = speech[:: max(1, len(speech) // self.utterances)][: self.utterances]
        seconds = sum(int(batch.lengths[0]) for batch in chosen) * STEP_SECONDS
        turns = take_turns({"dense": lambda: read(model, chosen), "sparse": lambda: read(fast, chosen)}, threads, self.rounds)
        runs = [choice.runs for choice in fast.choices]
        metrics = {
            "train_seconds": sum(row["seconds"] for row in history),
            "dense_rtf": turns.medians["dense"] / seconds,
            "sparse_rtf": turns.medians["sparse"] / seconds,
            "turns_dropped": turns.dropped,
            "speech_seconds": seconds,
            "dense_cer": character_error_rate(references, dense.texts),
            "sparse_cer": character_error_rate(references, sparse.texts),
            "transcripts": len(references),
            "other_transcripts": sum(ours != theirs for ours, theirs in zip(sparse.texts, dense.texts, strict=True)),
            "score_error": largest_difference(sparse, dense),
            "sparse_layers": runs.count("sparse"),
            "dense_layers": runs.count("dense"),
        }
        metrics |= {f"missing {name}": reason for name, reason in missing.items()}
        stored = [
            row | {"cer": character_error_rate(references, found.texts), "error": largest_difference(found, sparse)}
            for row, found in stored_models(model, speech)
        ]
        curves = {"products": _columns(products), "files": _columns(stored)}
        return Outcome(trained.metrics | metrics, trained.curves | curves)


@dataclass(frozen=True, kw_only=True)
class SequenceTrial(Trial):
    """One sequence of `steps` through a recurrent layer with as many inputs as units, weights drawn as torch does, zeros at
    random in both matrices: our runtime, torch in float32, torch's dynamic int8, and what is a bound for dense libraries,
    the recurrent product alone by our own dense kernel.

    Curve `sequences`: milliseconds of each (medians over quiet turns), errors as the largest |y - exact| over the largest
    |exact|, exact in float64. A metric `missing int8 <cell>` says why its columns are empty.
    """

    study: ClassVar[str] = "narang2017"
    kind: ClassVar[str] = "sequences"
    timing: ClassVar[bool] = True

    cells: tuple[str, ...]
    widths: tuple[int, ...]
    sparsities: tuple[float, ...]
    steps: int
    rounds: int
    replicate: int = 0

    def seconds(self) -> float:
        gates = {"rnn": 1, "gru": 3, "lstm": 4}
        weights = sum(gates[cell] * width**2 for cell in self.cells for width in self.widths) * len(self.sparsities)
        return 10 + weights * (3e-7 + 4e-10 * self.steps * self.rounds)

    def label(self) -> str:
        return f"sequences of {', '.join(self.cells)}, repeat {self.replicate}"

    def run(self, context: Context, *needed: Record) -> Outcome:
        import torch

        rows, missing = [], {}
        for cell in self.cells:
            for width in self.widths:
                for sparsity in self.sparsities:
                    generator = torch.Generator().manual_seed(seed_for(self.study, self.replicate, f"{cell} {width}"))
                    layer = _pruned_layer(cell, width, sparsity, generator)
                    x = torch.randn(self.steps, 1, width, generator=generator)
                    row, reason = self._row(layer, x, context.threads)
                    rows.append({"cell": cell, "hidden": width, "sparsity": sparsity} | row)
                    missing |= {f"missing int8 {cell}": reason} if reason else {}
        return Outcome(missing, {"sequences": _columns(rows)})

    def _row(self, layer: nn.RNNBase, x: Tensor, threads: int) -> tuple[dict, str]:
        import torch

        from repro.sparse import compile
        from repro.sparse.matrix import DenseMatrix

        recurrent, state = DenseMatrix(layer.weight_hh_l0.numpy()), x[0, 0].numpy()
        modules, reason = {"dense": layer, "sparse": compile(layer, densest=1.0)}, ""
        try:
            modules["int8"] = _int8(layer)
        except ReproError as error:
            reason = str(error)

        def products():
            for _ in range(self.steps):
                recurrent @ state

        with torch.inference_mode():
            exact = copy.deepcopy(layer).double()(x.double())[0]
            errors = {name: float((module(x)[0] - exact).abs().max() / exact.abs().max()) for name, module in modules.items()}
            calls = {name: (lambda module=module: module(x)) for name, module in modules.items()}
            turns = take_turns(calls | {"products": products}, threads, self.rounds)
        row = {f"{name}_ms": 1e3 * turns.medians[name] if name in turns.medians else None for name in SEQUENCE_CALLS}
        row |= {f"{name}_error": errors.get(name) for name in ("dense", "sparse", "int8")}
        return row | {"dropped": turns.dropped}, reason


SEQUENCE_CALLS = ("dense", "products", "int8", "sparse")


class Turns(NamedTuple):
    """Median seconds of each call over the turns kept, and how many turns were dropped in all."""

    medians: dict[str, float]
    dropped: int


def take_turns(calls: Mapping[str, Callable[[], object]], threads: int, rounds: int) -> Turns:
    """Time calls that share this process and its threads, `rounds` quiet turns each.

    They take turns in one order and then in the other. A turn is calls for a tenth of a second that are not timed, as threads
    that slept may share a core so long, and one that is; then the process comes to rest, and a probe tells whether the machine
    ran at full speed. Turns next to slow probes are dropped and taken again, up to twice as many; if fewer than three were
    quiet, the three next to the fastest probes are kept.
    """
    from threadpoolctl import threadpool_limits

    from repro.sparse.bench import probe
    from repro.sparse.timing import quiet_turns, settle

    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}

    def kept(name: str, least: int) -> list[float]:
        quiet = quiet_turns([slowest for slowest, _ in turns[name]], fastest, least=least)
        return [turns[name][i][1] for i in quiet]

    # The probe multiplies with NumPy: a pool of its own would spin into the next turn.
    with threadpool_limits(1, user_api="blas"):
        settle()
        fastest = before = probe(threads)
        for index in range(2 * rounds):
            waiting = [name for name in calls if len(kept(name, 0)) < rounds]
            for name in waiting if index % 2 else reversed(waiting):
                awake = time.perf_counter() + _WAKE_SECONDS
                while time.perf_counter() < awake:
                    calls[name]()
                start = time.perf_counter()
                calls[name]()
                seconds = time.perf_counter() - start
                settle()
                after = probe(threads)
                fastest = min(fastest, after)
                turns[name].append((max(before, after), seconds))
                before = after
    found = {name: kept(name, min(_LEAST_TURNS, rounds)) for name in calls}
    dropped = sum(len(turns[name]) - len(found[name]) for name in calls)
    return Turns({name: statistics.median(seconds) for name, seconds in found.items()}, dropped)


class Reading(NamedTuple):
    """What a model made of utterances: `scores` (frames, outputs) and greedy transcript of each."""

    scores: list[Tensor]
    texts: list[str]


def read(model: nn.Module, speech) -> Reading:
    """The scores and transcripts of batches of one utterance each."""
    import torch

    from repro.datasets.speech import decode

    found = Reading([], [])
    with torch.inference_mode():
        for batch in speech:
            scores = model(batch.features, batch.lengths)[0][:, 0]
            found.scores.append(scores)
            found.texts.append(decode(scores.argmax(-1).tolist()))
    return found


def largest_difference(ours: Reading, theirs: Reading) -> float:
    """Over all utterances, the largest difference of scores over the largest score of the utterance."""
    pairs = zip(ours.scores, theirs.scores, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def recurrent_products(
    model: nn.Module, threads: int, rounds: int, seed: int, backends: tuple[str, ...] = ()
) -> tuple[list[dict], dict[str, str]]:
    """The densest recurrent matrix, "trained" and "shuffled", times a vector: a row per backend, and what is missing."""
    import numpy as np

    from repro.pruning.weights import prunable_weights
    from repro.sparse.bench import Bench
    from repro.sparse.peers import BACKENDS

    found = {name: w.detach().numpy() for name, (role, w) in prunable_weights(model).items() if role == "recurrent"}
    layer = max(found, key=lambda name: np.count_nonzero(found[name]))
    weights = found[layer]
    shuffled = np.random.default_rng(seed).permutation(weights.ravel()).reshape(weights.shape)
    backends = backends or tuple(BACKENDS)
    sparse_ones = [name for name in backends if BACKENDS[name].sparse]
    with Bench(threads) as bench:
        trained = bench.time_weights([weights], 1, backends=backends, rounds=rounds, seed=seed)
        random = bench.time_weights([shuffled], 1, backends=sparse_ones, rounds=rounds, seed=seed)
        rows = [
            {"layer": layer, "matrix": matrix} | asdict(timing) | byte_bound(timing, bench)
            for matrix, products in (("trained", trained), ("shuffled", random))
            for timing in products.timings
        ]
    return rows, trained.missing


def stored_models(model: nn.Module, speech):
    """By type of the stored values: sizes in bytes, and what the model loaded from the file and compiled reads."""
    from repro.sparse import compile, load, save
    from repro.sparse.files import VALUES

    with tempfile.TemporaryDirectory() as folder:
        for values in VALUES:
            path = Path(folder) / f"{values}.safetensors"
            size = save(model, path, values=values)
            loaded = copy.deepcopy(model)
            loaded.load_state_dict(load(path))
            row = {"stored": values, "file": size.file, "values": size.values, "minimum": size.minimum, "dense": size.dense}
            yield row, read(compile(loaded), speech)


def _pruned_layer(cell: str, width: int, sparsity: float, generator) -> nn.RNNBase:
    """`nn.RNN`, `nn.GRU` or `nn.LSTM` with torch's own initialisation, about a share `sparsity` of both matrices zero."""
    import torch

    layer = getattr(torch.nn, cell.upper())(width, width, device="meta").to_empty(device="cpu").requires_grad_(False)
    for name, parameter in layer.named_parameters():
        parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        if name.startswith("weight"):
            parameter.mul_(torch.rand(parameter.shape, generator=generator) >= sparsity)
    return layer.eval()


def _int8(layer: nn.RNNBase) -> nn.Module:
    """torch's dynamically quantised version of a layer. Raises ReproError where there is none."""
    import warnings

    import torch

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ReproError("this torch has no FBGEMM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated")
        try:
            # Only children are quantised, never the module itself, and types that it does not know are left alone.
            found = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {type(layer)})[0]
        except AttributeError:
            raise ReproError("this torch has no torch.ao.quantization.quantize_dynamic") from None
    if isinstance(found, type(layer)):
        raise ReproError(f"torch.ao.quantization.quantize_dynamic leaves nn.{type(layer).__name__} in float32")
    return found


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}
