"""`ThresholdedLSTM`: `nn.LSTM` whose backward pass thresholds the gate gradients (Zhu et al. 2017, sections 2 and 3)."""

import torch
from torch import Tensor, nn

from repro.errors import ReproError
from repro.gradients import compiled
from repro.gradients.once import once
from repro.gradients.recording import Site
from repro.gradients.recurrent import Course, States, ThresholdedRNN


class ThresholdedLSTM(ThresholdedRNN, nn.LSTM):
    """A drop-in for `nn.LSTM`: same arguments, shapes, parameters and `state_dict`; `threshold` is a number t or a `Rule`.

    The four gate gradients of a time step, dnet (batch, 4 hidden), are formed first; then entries with |dnet| <= t become 0;
    then dnet enters all four backward products: dx = dnet W, dh_{t-1} = dnet U, dW += dnet^T x, dU += dnet^T h_{t-1}, and
    the gradients of the biases, the weights of a constant input. The forward pass and the path of dc are untouched. The rule
    is looked up in the backward pass. With threshold 0 the gradients are those of `nn.LSTM`, and where this package has no
    kernels that are as fast `nn.LSTM` itself runs: to assign another rule between its passes is an error then.

    `weights_only`: the thresholded dnet enters the gradients of the weights (dW, dU, biases) alone; dx and dh_{t-1} take dnet
    as it was formed, so that what is removed at one step is missing at no other. For comparison: the paper does not do this.

    float32 and float64; half precision on accelerators only. The output is not to be changed in place (torch says so). Raises
    `ReproError` for proj_size, other numbers and wrong shapes.
    """

    gate_names = ("i", "f", "g", "o")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        threshold=0.0,
        weights_only: bool = False,
    ):
        if proj_size:
            raise ReproError(f"proj_size is {proj_size}: the paper's LSTM has no projection, leave it at 0")
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device=device, dtype=dtype
        )
        self._begin(threshold)
        for site in self.sites:
            site.weights_only = weights_only

    def _outruns_torch(self, x: Tensor) -> bool:
        return compiled.usable(x, self.hidden_size)

    def _run(self, x: Tensor, states: list[Tensor], weights: list[Tensor | None], course: Course, site: Site):
        return _Layer.apply(x, *states, *weights, course, site)


class _Layer(torch.autograd.Function):
    """One layer and direction over packed frames."""

    @staticmethod
    def forward(ctx, x, h0, c0, w_ih, w_hh, b_ih, b_hh, course: Course, site: Site):
        h, c = States(h0, course), States(c0, course)
        x, w_ih, w_hh = x.contiguous(), w_ih.contiguous(), w_hh.contiguous()
        bias = None if b_ih is None else b_ih + b_hh
        ctx.compiled = compiled.usable(x, h0.shape[1])
        run = compiled.forward if ctx.compiled else _forward  # recorded or not: what is measured is what trains
        gates, tanh_c = run(x, h, c, w_ih, w_hh, bias, course)
        if site.record is not None:
            site.record.add_gates(gates.unflatten(1, (4, -1)))
        ctx.save_for_backward(x, w_ih, w_hh, h.before, c.before, gates, tanh_c)
        ctx.course, ctx.site = course, site
        return h.after, h.last(), c.last()

    @staticmethod
    @once
    def backward(ctx, d_out, d_h, d_c):
        x, w_ih, w_hh, before_h, before_c, gates, tanh_c = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_h, d_c = (part.clone(memory_format=torch.contiguous_format) for part in (d_h, d_c))  # what flows back in time
        steps = (d_out, d_h, d_c, w_hh, before_c, gates, tanh_c, ctx.course, ctx.site)
        inputs = [part for part, is_wanted in ((x, wanted[3]), (before_h, wanted[4])) if is_wanted]
        if ctx.compiled and ctx.site.record is None:
            dnet, sparse, listed = compiled.backward(*steps)
            dx = compiled.input_gradient(dnet, w_ih, sparse, listed) if wanted[0] else None
            if ctx.site.weights_only:
                sparse = compiled.threshold(dnet, ctx.course, ctx.site)
            found = compiled.weight_gradients(dnet, inputs, sparse)
        else:
            carried, dnet = _backward(*steps)
            dx = carried @ w_ih if wanted[0] else None
            found = [dnet.t() @ part for part in inputs]
        found = iter(found)
        d_w, d_u = (next(found) if is_wanted else None for is_wanted in wanted[3:5])
        d_b = dnet.sum(0) if any(wanted[5:7]) else None
        return dx, d_h, d_c, d_w, d_u, *twice(d_b), None, None


def twice(d_b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of both biases, each with its own memory: who scales gradients in place scales each once."""
    return d_b, None if d_b is None else d_b.clone()


def _forward(x, h: States, c: States, w_ih, w_hh, bias, course: Course) -> tuple[Tensor, Tensor]:
    """(gates (total, 4 hidden), tanh(c) (total, hidden)) of all frames, in torch; h and c are filled."""
    gates = nn.functional.linear(x, w_ih, bias)
    tanh_c = torch.empty_like(c.after)
    for _, frames in course.steps():
        before_h, before_c, net = h.enter(frames), c.enter(frames), gates[frames]
        net.addmm_(before_h, w_hh.t())
        i, f, g, o = net.chunk(4, 1)
        net[:, : 2 * i.shape[1]].sigmoid_(), g.tanh_(), o.sigmoid_()
        torch.addcmul(f * before_c, i, g, out=c.after[frames])
        torch.tanh(c.after[frames], out=tanh_c[frames])
        torch.mul(o, tanh_c[frames], out=h.after[frames])
        h.leave(frames), c.leave(frames)
    return gates, tanh_c


def _backward(d_out, d_h, d_c, w_hh, before_c, gates, tanh_c, course: Course, site: Site) -> tuple[Tensor, Tensor]:
    """dnet (total, 4 hidden), carried back and of the weights, in torch; d_h and d_c become those of the first states."""
    forming = Forming(before_c, gates, tanh_c)
    carried = torch.empty_like(gates)
    dnet = torch.empty_like(gates) if site.weights_only else carried
    for t, frames in reversed(course.steps()):
        n = frames.stop - frames.start
        d_c[:n] = forming.step(t, frames, d_h[:n] + d_out[frames], d_c[:n], carried[frames], dnet[frames], site)
        torch.mm(carried[frames], w_hh, out=d_h[:n])
    return carried, dnet


class Forming:
    """dnet of each step, in torch. What does not depend on the step after it is worked out for all frames at once: a narrow
    layer's step takes as long as its operations are many.

    before_c, tanh_c (total, hidden); gates (total, 4 hidden).
    """

    def __init__(self, before_c: Tensor, gates: Tensor, tanh_c: Tensor):
        i, self._f, g, o = gates.chunk(4, 1)
        activations = gates.unflatten(1, (4, -1))
        self._derivatives = activations * (1 - activations)
        torch.sub(1, g * g, out=self._derivatives[:, 2])
        self._factors = torch.stack((g, before_c, i, tanh_c), 1)
        self._c_by_h = o * (1 - tanh_c * tanh_c)

    def step(self, t: int, frames: slice, dh: Tensor, dc_next: Tensor, carried: Tensor, dnet: Tensor, site: Site) -> Tensor:
        """Write `dnet` (n, 4 hidden) of step t, thresholded, and the one that is `carried` back; returns dc f, for c_{t-1}.

        dc = dh o (1 - tanh(c)^2) + dc_{t+1} f_{t+1} (the paper prints c_{t+1} for dc_{t+1}).
        """
        factors, derivatives = self._factors[frames], self._derivatives[frames]
        dc, whole = torch.addcmul(dc_next, dh, self._c_by_h[frames]), carried.unflatten(1, (4, -1))
        torch.mul(dc[:, None], factors[:, :3], out=whole[:, :3])
        torch.mul(dh, factors[:, 3], out=whole[:, 3])
        whole *= derivatives
        if site.weights_only:
            dnet.copy_(carried)
        before = None if site.record is None else whole.clone()
        site.apply(dnet)
        if before is not None:
            arriving = torch.stack((dc, dc, dc, dh), 1)
            site.record.add_step(t, before, derivatives, arriving, factors, dnet.unflatten(1, (4, -1)))
        return dc * self._f[frames]
