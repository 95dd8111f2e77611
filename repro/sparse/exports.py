"""Pruned matrices for other libraries: `scipy.sparse` and torch's CSR."""

import warnings

import scipy.sparse
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from repro.errors import ReproError


def to_scipy(weight: Tensor | ArrayLike) -> scipy.sparse.csr_array:
    """The non-zeros of a dense matrix in scipy's CSR, with 4-byte indices; 16-bit floats, unknown to scipy, become float32."""
    weight = _matrix(weight).cpu()
    return scipy.sparse.csr_array((weight.float() if weight.dtype.itemsize == 2 else weight).numpy())


def to_torch_csr(weight: Tensor | ArrayLike) -> Tensor:
    """The non-zeros of a dense matrix in torch's CSR, with 4-byte indices: torch's own 8-byte ones make products slower."""
    weight = _matrix(weight)
    mask = weight != 0
    pointers = functional.pad(mask.sum(dim=1).cumsum(0), (1, 0)).int()
    columns = mask.nonzero()[:, 1].int()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(pointers, columns, weight[mask], size=weight.shape, check_invariants=True)


def _matrix(weight: Tensor | ArrayLike) -> Tensor:
    matrix = torch.as_tensor(weight).detach()
    if matrix.ndim != 2:
        raise ReproError(f"only a matrix has rows to compress, not a tensor of shape {tuple(matrix.shape)}")
    return matrix
