"""The bidirectional clipped-ReLU recurrent layer of Deep Speech 2, as fast as plain torch on a CPU allows.

All sequences are `PackedSequence`s: `data` holds the frames of every utterance, time step by time step, `batch_sizes[t]` of
them at step t, longest utterance first. No work is spent on padding and batch norm sees real frames only.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

CLIP = 20.0


def _neighbours(batch_sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of packed data that follow each other in time: `later[i]` is one step after `earlier[i]` in the same utterance."""
    starts = torch.tensor([0, *batch_sizes]).cumsum(0)
    later = torch.arange(batch_sizes[0], int(starts[-1]))
    sizes = torch.tensor(batch_sizes[1:], dtype=torch.long)
    earlier = later - torch.tensor(batch_sizes[:-1], dtype=torch.long).repeat_interleave(sizes)
    return earlier, later


class _ClippedRecurrence(torch.autograd.Function):
    """h_t = min(max(x_t + U h_{t-1}, 0), 20) over packed frames, h_0 = 0; forwards or backwards in time.

    The loop over time holds one matrix product a step; the gradient of U is one product over all steps at the end. Autograd's
    own graph of the same loop costs several times as much at these widths.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, batch_sizes: list[int], backwards: bool) -> Tensor:
        h = torch.empty_like(x)
        blocks = list(zip(x.split(batch_sizes), h.split(batch_sizes), strict=True))
        weight_t, state = weight.t(), None
        for x_t, h_t in reversed(blocks) if backwards else blocks:
            carried = 0 if state is None else min(len(x_t), len(state))
            if carried < len(x_t):  # utterances that begin at this step
                h_t[carried:] = x_t[carried:]
            if carried:
                torch.addmm(x_t[:carried], state[:carried], weight_t, out=h_t[:carried])
            state = h_t.clamp_(0.0, CLIP)
        ctx.save_for_backward(h, weight)
        ctx.batch_sizes, ctx.backwards = batch_sizes, backwards
        return h

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, weight = ctx.saved_tensors
        open_gate = ((h > 0) & (h < CLIP)).to(grad.dtype)
        delta = grad * open_gate
        blocks = list(zip(delta.split(ctx.batch_sizes), open_gate.split(ctx.batch_sizes), strict=True))
        after = None
        for delta_t, open_t in blocks if ctx.backwards else reversed(blocks):
            if after is not None:
                carried = min(len(delta_t), len(after))
                delta_t[:carried].addcmul_(after[:carried] @ weight, open_t[:carried])
            after = delta_t
        earlier, later = _neighbours(ctx.batch_sizes)
        source, target = (later, earlier) if ctx.backwards else (earlier, later)
        return delta, delta[target].t() @ h[source], None, None


class BidirectionalClippedRNN(nn.Module):
    """One recurrent layer of the paper's Table 2: shared input matrix, two recurrent matrices, directions summed.

    `f_t = clip(BN(W x_t) + U f_{t-1})`, `b_t = clip(BN(W x_t) + V b_{t+1})`, output `f_t + b_t`, clip to [0, 20]
    (Narang et al. 2017, section 4; batch norm on the input product alone as in Amodei et al. 2015).

    `weight_ih` (hidden, input), `weight_hh` and `weight_hh_reverse` (hidden, hidden): 3h^2 + 2h parameters for input = hidden.
    Input and output: packed frames, `data` of shape (frames, input) and (frames, hidden).
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.weight_hh_reverse = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.norm = nn.BatchNorm1d(hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in 1/sqrt(fan in), as torch's own recurrent layers; the paper states no initialisation."""
        for weight in (self.weight_ih, self.weight_hh, self.weight_hh_reverse):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, packed: PackedSequence) -> PackedSequence:
        x = self.norm(packed.data @ self.weight_ih.t())
        sizes = packed.batch_sizes.tolist()
        forwards = _ClippedRecurrence.apply(x, self.weight_hh, sizes, False)
        backwards = _ClippedRecurrence.apply(x, self.weight_hh_reverse, sizes, True)
        return packed._replace(data=forwards + backwards)


class RowConvolution(nn.Module):
    """Look-ahead of the forward-only model: `y_t = sum_j w_j * x_{t+j}`, j = 0 .. context-1, one weight a feature and offset.

    Amodei et al. 2015, section 3.7; frames past the end of an utterance count as zero. `weight` (context, features).
    """

    def __init__(self, features: int, context: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(context, features))
        with torch.no_grad():
            self.weight[0] = 1.0  # starts as the identity: the recurrent layers below train from the first step

    def forward(self, packed: PackedSequence) -> PackedSequence:
        x, lengths = nn.utils.rnn.pad_packed_sequence(packed)
        context, features = self.weight.shape
        padded = nn.functional.pad(x.permute(1, 2, 0), (0, context - 1))
        y = nn.functional.conv1d(padded, self.weight.t().unsqueeze(1), groups=features)
        order = packed.sorted_indices
        repacked = nn.utils.rnn.pack_padded_sequence(y.permute(2, 0, 1), lengths, enforce_sorted=order is None)
        return packed._replace(data=repacked.data)
