"""Gradients of a pruned model on the wire: only those that are kept, whose places all ranks know."""

from collections.abc import Sequence

import torch
from torch import Tensor

from repro.collectives.operations import allreduce


class KeptGradients:
    """The kept entries of several tensors as one message.

    `masks`: one boolean tensor each, True where a weight is kept, the same on all ranks. The message has as many elements as
    there are kept ones; no positions travel.
    """

    def __init__(self, masks: Sequence[Tensor]):
        self._places = [mask.flatten().nonzero().squeeze(1) for mask in masks]
        self._counts = [len(places) for places in self._places]

    def allreduce(self, gradients: Sequence[Tensor], algorithm: str = "ring", **options) -> None:
        """Sum the kept entries of all ranks' gradients in place; the others become 0. Options as in `repro.collectives`."""
        message = torch.cat([g.flatten()[places] for g, places in zip(gradients, self._places, strict=True)])
        allreduce(message, algorithm, **options)
        for gradient, places, kept in zip(gradients, self._places, message.split(self._counts), strict=True):
            gradient.zero_().view(-1)[places] = kept
