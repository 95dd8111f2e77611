"""Thresholded gradients for linear layers, as in a Transformer block: the rule acts on the gradient of a layer's output."""

import torch
from torch import Tensor, nn

from repro.errors import ReproError
from repro.gradients.eager import eager
from repro.gradients.once import once
from repro.gradients.recording import Site, Thresholded
from repro.gradients.thresholds import Rule, as_rule


class _Threshold(torch.autograd.Function):
    """y = x, the same tensor; the gradient of y is thresholded on its way to x."""

    @staticmethod
    def forward(ctx, x: Tensor, site: Site) -> Tensor:
        ctx.site = site
        ctx.mark_dirty(x)  # a view could not be changed in place by what follows, as nn.Linear's output can
        return x

    @staticmethod
    @once
    def backward(ctx, gradient: Tensor):
        return ctx.site.apply(gradient.clone()), None


class ThresholdedLinear(Thresholded, nn.Linear):
    """A drop-in for `nn.Linear`: the gradient of the output is thresholded before both products, dx and dW, and db."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None, *, threshold=0.0):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._make_sites(["out"], threshold)

    @eager  # a graph would keep the rule of its first backward pass
    def forward(self, x: Tensor) -> Tensor:
        return _Threshold.apply(super().forward(x), self.sites[0])


def threshold_linears(module: nn.Module, threshold: float | Rule) -> list[str]:
    """Make each `nn.Linear` within `module` a `ThresholdedLinear`, its parameters kept; returns their names.

    Those that are one already get the new rule. Subclasses of `nn.Linear` stay as they are, among them the projection in
    `nn.MultiheadAttention`, which computes with the weights of its layers without calling them. Raises `ReproError` if there is
    no linear layer.
    """
    rule = as_rule(threshold)
    linears = {name: part for name, part in module.named_modules() if type(part) in (nn.Linear, ThresholdedLinear)}
    if not linears:
        raise ReproError(f"{type(module).__name__} has no nn.Linear: there is nothing to threshold")
    for part in linears.values():
        part.__class__ = ThresholdedLinear
        part._make_sites(["out"], rule)
    return list(linears)
