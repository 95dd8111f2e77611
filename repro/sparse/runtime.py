"""Run a pruned model on sparse kernels: `fast = compile(model)`, then call `fast` as you would call `model`."""

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from repro.errors import ReproError
from repro.models.recurrent import BidirectionalClippedRNN
from repro.sparse.layers import SparseClippedRNN, SparseLinear, SparseRNN, density_of


class Choice(NamedTuple):
    """What `compile` did with a layer: its name in the model, its type, the share of its weights that is not zero, and whether
    it now runs as "sparse" or was left "dense".
    """

    name: str
    layer: str
    density: float
    runs: str


_SMALLEST_LINEAR = 2**17  # weights
_SPARSE = {
    nn.Linear: SparseLinear,
    nn.RNN: SparseRNN,
    nn.GRU: SparseRNN,
    nn.LSTM: SparseRNN,
    BidirectionalClippedRNN: SparseClippedRNN,
}


def _densest(module: nn.Module, batch: int) -> float:
    """The share of weights up to which a layer is compiled.

    Measured against torch's layers on two cores of an AMD Zen 5, at widths of 64 to 1760. With up to 4 rows or sequences the
    dense layer catches up at 80 % of the weights or later, with 16 to 64 at 40 to 90 %; LSTMs, for which torch has oneDNN's
    kernels, at about 50 % and at 15 to 40 %. (RNN and LSTM of 256 units with 32 sequences are not faster at 10 % either.)
    Torch's matrix product is up to twice as fast where MKL takes its AVX-512 path: hence smaller bounds. Linear layers of fewer
    than 2^17 weights stay dense: a call of a kernel costs more than they do.
    """
    if isinstance(module, nn.Linear) and module.weight.numel() < _SMALLEST_LINEAR:
        return -1.0
    if batch < 8:
        return 0.5
    return 0.15 if isinstance(module, nn.LSTM) else 0.3


def _check(name: str, module: nn.Module) -> None:
    """Raise `ReproError` for a layer that cannot be judged or replaced."""
    masked = any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
    if masked or parametrize.is_parametrized(module):
        raise ReproError(
            f"weights of {name} are computed at each call: make them permanent first, with torch.nn.utils.prune.remove or "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if getattr(module, "proj_size", 0):
        raise ReproError(f"{name} has proj_size {module.proj_size}: an LSTM with projections cannot be compiled")
    for label, parameter in module.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ReproError(f"{name}.{label} is {parameter.dtype} on {parameter.device}: float32 on the CPU is needed")
        if not parameter.isfinite().all():
            raise ReproError(f"{name}.{label} holds an infinity or a NaN: only finite weights can be compiled")


def compile(model: nn.Module, *, batch: int = 1, densest: float | None = None) -> nn.Module:
    """A copy of `model` for inference whose pruned layers run on sparse kernels, with the same calls and the same outputs.

    Replaced are `nn.Linear`, `nn.RNN`, `nn.GRU`, `nn.LSTM` and `BidirectionalClippedRNN`, `model` itself included, where at
    most a share `densest` of the weights is not zero. By default that is where the kernels of this package were measured to be
    faster than torch's (`_densest`), with `batch` sequences, or rows of a linear layer, at a time; any other number runs too.
    `compiled.choices` tells what was done, a `Choice` a layer. Outputs are off by at most 2e-6 of the largest one.

    The copy is in evaluation mode, its remaining parameters need no gradient, and inputs that require one are refused. Replaced
    layers have no parameters and cannot be loaded into, copied or pickled: keep the model. Code that reads a layer's weights
    instead of calling it finds `weight` and `bias` of linear layers only. One call at a time: layers hold buffers. The first
    call of each kind of layer takes seconds, in which its loops are compiled.

    Raises `ReproError` for layers that are not finite float32 on the CPU, for LSTMs with projections, and for weights that
    `torch.nn.utils.prune` or a parametrization computes at each call.
    """
    if batch < 1:
        raise ReproError(f"batch is {batch}: it must be at least 1")
    if densest is not None and not 0 <= densest <= 1:
        raise ReproError(f"densest is {densest}: it must be from 0 to 1")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, tuple(_SPARSE))]
    for name, module in layers:
        _check(name or type(module).__name__, module)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    made: dict[nn.Module, nn.Module] = {}
    choices = []
    for name, module in model.named_modules():
        if type(module) not in _SPARSE:  # subclasses may compute something else
            continue
        density = density_of(module)
        sparse = density <= (_densest(module, batch) if densest is None else densest)
        choices.append(Choice(name, type(module).__name__, density, "sparse" if sparse else "dense"))
        if sparse:
            made[module] = _SPARSE[type(module)](module)
            made[module].prepare(batch)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    model = made.get(model, model).eval()
    model.choices = choices
    return model
