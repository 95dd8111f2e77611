"""Pruning during training (Narang et al. 2017) for any torch model, and the baselines it is compared with."""

from repro.pruning.pruner import GradualPruner, PrintedSignPruner
from repro.pruning.schedules import AutoRamp, Cubic, HardPrune, Ramp, magnitude_quantile, table1
from repro.pruning.weights import Sparsity, dense_quantiles, prunable_weights, sparsity

__all__ = [
    "AutoRamp",
    "Cubic",
    "GradualPruner",
    "HardPrune",
    "PrintedSignPruner",
    "Ramp",
    "Sparsity",
    "dense_quantiles",
    "magnitude_quantile",
    "prunable_weights",
    "sparsity",
    "table1",
]
