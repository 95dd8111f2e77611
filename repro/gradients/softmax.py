"""Linear decoder and cross-entropy in one, for large vocabularies: most of a word model's time is spent there."""

import torch
from torch import Tensor, nn

from repro.errors import ReproError
from repro.gradients import compiled
from repro.gradients.eager import eager
from repro.gradients.once import once
from repro.gradients.products import packed
from repro.gradients.recording import Thresholded


@eager
def summed_loss(x: Tensor, decoder: nn.Linear, targets: Tensor) -> Tensor:
    """The cross-entropy of `decoder(x)` with the targets, summed, in nats: x (n, hidden), targets (n,) -> a scalar.

    `nn.functional.cross_entropy(decoder(x), targets, reduction="sum")` and its gradients, but that (n, symbols) numbers are
    written twice, logits and probabilities, instead of six times; and in float32 on the CPU by this package's products, which
    use vectors of 512 bits where torch's library takes half of that on some processors.

    Raises ReproError for other shapes, and for a `ThresholdedLinear`: no rule would act on its gradients here.
    """
    if x.ndim != 2 or targets.shape != x.shape[:1]:
        raise ReproError(f"x is {tuple(x.shape)}, targets {tuple(targets.shape)}: (n, hidden) and (n,) are needed")
    if isinstance(decoder, Thresholded):
        raise ReproError("the decoder is a ThresholdedLinear, whose rule would not act here: take cross_entropy(decoder(x))")
    with torch.autocast(x.device.type, enabled=False):  # in the numbers of the weights
        return _SummedLoss.apply(x.to(decoder.weight.dtype), decoder.weight, decoder.bias, targets)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        x, weight, at = x.contiguous(), weight.contiguous(), targets[:, None]
        logits = _product(x, weight, transposed=True)
        if bias is not None:
            logits += bias
        probabilities = logits.softmax(1)
        # Through the largest one, whose probability never underflows: log p_t = log p_m - (z_m - z_t).
        largest = logits.amax(1, keepdim=True)
        loss = (largest - logits.gather(1, at) - probabilities.amax(1, keepdim=True).log()).sum()
        error = probabilities.scatter_add_(1, at, torch.full_like(largest, -1.0))
        ctx.save_for_backward(x, weight, error)
        return loss

    @staticmethod
    @once
    def backward(ctx, gradient: Tensor):
        x, weight, error = ctx.saved_tensors
        d_x = _product(error, weight) * gradient
        (d_weight,) = compiled.weight_gradients(error, [x], False) if compiled.usable(x, x.shape[1]) else (error.t() @ x,)
        d_bias = error.sum(0) * gradient if ctx.needs_input_grad[2] else None
        return d_x, d_weight * gradient, d_bias, None


def _product(a: Tensor, b: Tensor, transposed: bool = False) -> Tensor:
    """a b, or a b^T."""
    if not compiled.usable(a, b.shape[1]):
        return a @ (b.t() if transposed else b)
    found = a.new_empty(len(a), len(b) if transposed else b.shape[1])
    packed(b.detach().numpy(), transposed=transposed)(a.detach().numpy(), found.numpy(), sparse=False)
    return found
