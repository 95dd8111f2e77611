"""The same LSTM with the products of dnet by torch's own means: what the kernels of this package are to be compared with.

They run on any device. The rule, and the forming of dnet, are those of `repro.gradients.lstm`.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from repro.errors import ReproError, one_of
from repro.gradients import compiled
from repro.gradients.lstm import Forming, ThresholdedLSTM, _Layer, twice
from repro.gradients.once import once


class CSR:
    """dnet as torch's CSR matrix, converted anew for every product."""

    @staticmethod
    def before(dnet: Tensor, matrix: Tensor, steps: list[slice]) -> Tensor:
        """dnet (n, 4 hidden) times `matrix` (4 hidden, features)."""
        return _csr(dnet) @ matrix

    @staticmethod
    def weights(dnet: Tensor, x: Tensor, steps: list[slice]) -> Tensor:
        """dnet^T x, (4 hidden, features)."""
        return _csr(dnet.t().contiguous()) @ x


def _csr(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()


class Columns:
    """Dense products of the columns of dnet that are not zero for the whole minibatch, gathered time step by time step."""

    @staticmethod
    def before(dnet: Tensor, matrix: Tensor, steps: list[slice]) -> Tensor:
        """dnet (n, 4 hidden) times `matrix` (4 hidden, features)."""
        found = dnet.new_empty(len(dnet), matrix.shape[1])
        for frames in steps:
            columns = _columns(dnet[frames])
            torch.mm(dnet[frames].index_select(1, columns), matrix.index_select(0, columns), out=found[frames])
        return found

    @staticmethod
    def weights(dnet: Tensor, x: Tensor, steps: list[slice]) -> Tensor:
        """dnet^T x, (4 hidden, features)."""
        found = x.new_zeros(dnet.shape[1], x.shape[1])
        for frames in steps:
            columns = _columns(dnet[frames])
            found.index_add_(0, columns, dnet[frames].index_select(1, columns).t() @ x[frames])
        return found


def _columns(dnet: Tensor) -> Tensor:
    return dnet.any(0).nonzero().squeeze(1)


MEANS = {"CSR": CSR, "columns": Columns}


class LibraryLSTM(ThresholdedLSTM):
    """`ThresholdedLSTM`, the products of dnet by `means`: "CSR" or "columns". Sequences of one length; no `weights_only`."""

    def __init__(self, *args, means: str, **keywords):
        one_of("means of products", means, MEANS)
        super().__init__(*args, **keywords)
        if self.sites[0].weights_only:
            raise ReproError("weights_only is True: LibraryLSTM thresholds dnet before all four products")
        self.means = means

    def _run(self, x, states, weights, course, site):
        if course.sizes[-1] != course.sizes[0]:
            raise ReproError("the packed sequences are not equally long: LibraryLSTM's products are of whole minibatches")
        return _layer(self.means).apply(x, *states, *weights, course, site)


@cache
def _layer(means: str) -> type[torch.autograd.Function]:
    products = MEANS[means]

    class Layer(_Layer):
        @staticmethod
        @once
        def backward(ctx, d_out, d_h, d_c):
            x, w_ih, w_hh, before_h, before_c, gates, tanh_c = ctx.saved_tensors
            steps = [frames for _, frames in ctx.course.steps()]
            form = _compiled_steps if ctx.compiled and ctx.site.record is None else _torch_steps
            dnet, d_h, d_c = form(products.before, d_out, d_h, d_c, w_hh, before_c, gates, tanh_c, ctx.course, ctx.site)
            dx = products.before(dnet, w_ih, steps)
            d_w, d_u = (products.weights(dnet, part, steps) for part in (x, before_h))
            d_b = dnet.sum(0) if any(ctx.needs_input_grad[5:7]) else None
            return dx, d_h, d_c, d_w, d_u, *twice(d_b), None, None

    return Layer


def _torch_steps(product, d_out, d_h, d_c, w_hh, before_c, gates, tanh_c, course, site):
    forming, dnet = Forming(before_c, gates, tanh_c), torch.empty_like(gates)
    for t, frames in reversed(course.steps()):
        d_c = forming.step(t, frames, d_h + d_out[frames], d_c, dnet[frames], dnet[frames], site)
        d_h = product(dnet[frames], w_hh, [slice(0, len(d_h))])
    return dnet, d_h, d_c


def _compiled_steps(product, d_out, d_h, d_c, w_hh, before_c, gates, tanh_c, course, site):
    d_out = d_out.contiguous()
    d_h, d_c = (part.clone(memory_format=torch.contiguous_format) for part in (d_h, d_c))
    dnet, gradient = compiled.gradients(d_out, d_h, d_c, before_c, gates, tanh_c, site.rule.signed)
    for _, frames in reversed(course.steps()):
        compiled.form_step(frames.start, len(d_h), gradient, dnet, site)
        d_h.copy_(product(dnet[frames], w_hh, [slice(0, len(d_h))]))
    return dnet, d_h, d_c
