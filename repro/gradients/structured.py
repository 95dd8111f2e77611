"""Zeros that dense hardware can use: whole columns of dnet, as in the follow-up to Zhu et al. 2017 (arXiv 1806.00512)."""

import math

import torch

from repro.gradients.thresholds import TopK


class ColumnTopK(TopK):
    """Of the n columns of a time step's dnet (batch, gates * hidden), `round(sparsity * n)` become zero for all sequences.

    They are those of smallest L2 norm over the minibatch; of equal norms at the limit all go. A column is a gate of a unit: all
    four backward products of the step are then smaller dense ones. The follow-up's abstract speaks of "structured sparsity in
    the gate gradients"; its structure and how it selects are not known to us, so that this is our reading of it.

    With more than two dimensions a column is over all but the last; with one sequence the rule is `TopK`.
    """

    def threshold(self, dnet, site=0):
        """0 for columns that stay, infinity for the others, (gates * hidden,)."""
        rows = dnet.reshape(-1, dnet.shape[-1])
        norms = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64)  # squares of small float32 would underflow
        return torch.where(norms <= super().threshold(norms), math.inf, 0.0).to(dnet)

    def __repr__(self) -> str:
        return f"ColumnTopK({self.sparsity:g})"
