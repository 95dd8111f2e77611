"""`ThresholdedGRU`: `nn.GRU` whose backward pass thresholds the gate gradients, as `ThresholdedLSTM` does for `nn.LSTM`."""

import torch
from torch import Tensor, nn

from repro.gradients.once import once
from repro.gradients.recording import Site
from repro.gradients.recurrent import Course, States, ThresholdedRNN


class ThresholdedGRU(ThresholdedRNN, nn.GRU):
    """A drop-in for `nn.GRU` with the arguments, shapes, parameters and `state_dict` of that, and `threshold`: t or a `Rule`.

        r = sigma(W_r x + U_r h + b), z = sigma(W_z x + U_z h + b), n = tanh(W_n x + b + r (U_n h + b')), h' = (1 - z) n + z h

    Thresholded are the gradients of the three sums in brackets, dnet (batch, 3 hidden), once all three are formed. The
    products of the input (dx, dW) take dnet as it is; those of the state (dh, dU) take dnet_n times r for the third gate, as
    r stands between U_n h and its sum: a zero stays one, and the threshold acts once. The output is not to be changed in place,
    unlike that of `nn.GRU` (torch says so).
    """

    gate_names = ("r", "z", "n")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        threshold=0.0,
    ):
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device=device, dtype=dtype
        )
        self._begin(threshold)

    def _run(self, x: Tensor, states: list[Tensor], weights: list[Tensor | None], course: Course, site: Site):
        return _Layer.apply(x, *states, *weights, course, site)


class _Layer(torch.autograd.Function):
    """One layer and direction over packed frames."""

    @staticmethod
    def forward(ctx, x, h0, w_ih, w_hh, b_ih, b_hh, course: Course, site: Site):
        h = States(h0, course)
        gates = nn.functional.linear(x, w_ih, b_ih)
        hidden = h0.shape[1]
        recurrent_n = torch.empty_like(h.after)  # U_n h + b', which r acts on
        for _, frames in course.steps():
            before, net = h.enter(frames), gates[frames]
            recurrent = nn.functional.linear(before, w_hh, b_hh)
            recurrent_n[frames] = recurrent[:, 2 * hidden :]
            net[:, : 2 * hidden] += recurrent[:, : 2 * hidden]
            r, z, n = net.chunk(3, 1)
            r.sigmoid_(), z.sigmoid_()
            n.addcmul_(r, recurrent_n[frames]).tanh_()
            torch.lerp(n, before, z, out=h.after[frames])
            h.leave(frames)
        if site.record is not None:
            site.record.add_gates(gates.unflatten(1, (3, -1)))
        ctx.save_for_backward(x, w_ih, w_hh, h.before, gates, recurrent_n)
        ctx.course, ctx.site = course, site
        return h.after, h.last()

    @staticmethod
    @once
    def backward(ctx, d_out, d_h):
        x, w_ih, w_hh, before_h, gates, recurrent_n = ctx.saved_tensors
        hidden = before_h.shape[1]
        forming = _Forming(gates, before_h, recurrent_n)
        dnet_ih, dnet_hh = torch.empty_like(gates), torch.empty_like(gates)
        d_h = d_h.clone()  # what flows back in time, (batch, hidden)
        for t, frames in reversed(ctx.course.steps()):
            n = frames.stop - frames.start
            dh, dnet, recurrent, reset = d_h[:n] + d_out[frames], dnet_ih[frames], dnet_hh[frames], gates[frames, :hidden]
            forming.step(t, frames, dh, dnet, ctx.site)
            recurrent[:, : 2 * hidden] = dnet[:, : 2 * hidden]
            torch.mul(dnet[:, 2 * hidden :], reset, out=recurrent[:, 2 * hidden :])
            torch.addmm(dh * gates[frames, hidden : 2 * hidden], recurrent, w_hh, out=d_h[:n])
        wanted = ctx.needs_input_grad
        return (
            dnet_ih @ w_ih if wanted[0] else None,
            d_h,
            dnet_ih.t() @ x if wanted[2] else None,
            dnet_hh.t() @ before_h if wanted[3] else None,
            dnet_ih.sum(0) if wanted[4] else None,
            dnet_hh.sum(0) if wanted[5] else None,
            None,
            None,
        )


class _Forming:
    """dnet of each step; what does not depend on the step after it is worked out for all frames at once.

    gates (total, 3 hidden); before_h, recurrent_n (total, hidden).
    """

    def __init__(self, gates: Tensor, before_h: Tensor, recurrent_n: Tensor):
        _, z, n = gates.chunk(3, 1)
        activations = gates.unflatten(1, (3, -1))
        self._derivatives = activations * (1 - activations)
        torch.sub(1, n * n, out=self._derivatives[:, 2])
        self._factors = torch.stack((recurrent_n, before_h - n, 1 - z), 1)
        self._n_by_h = self._factors[:, 2] * self._derivatives[:, 2]  # n's sum, which r acts on, by h

    def step(self, t: int, frames: slice, dh: Tensor, dnet: Tensor, site: Site) -> None:
        """Write the thresholded dnet (n, 3 hidden) of step t."""
        factors, derivatives, whole = self._factors[frames], self._derivatives[frames], dnet.unflatten(1, (3, -1))
        d_sum = dh * self._n_by_h[frames]
        torch.mul(d_sum, factors[:, 0], out=whole[:, 0])
        torch.mul(dh[:, None], factors[:, 1:], out=whole[:, 1:])
        whole *= derivatives
        before = None if site.record is None else whole.clone()
        site.apply(dnet)
        if before is not None:
            site.record.add_step(t, before, derivatives, torch.stack((d_sum, dh, dh), 1), factors, whole)
