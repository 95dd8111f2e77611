"""How many bytes pruned weights take, how large a layer fits on a chip, and what staying there is worth: closed forms.

The paper (Narang et al. 2017, sections 5.2 and 6.2) counts non-zero values only. A file or a kernel must also say where
they are; `index` names the ways to do that, so that the same count can be made with and without it.
"""

import bisect
import math

import numpy as np
from numpy.typing import ArrayLike

from repro.errors import ReproError, one_of


def _entropy_bits(n, k):
    from scipy.special import entr  # here, since every process of the studies imports this file

    return n * (entr(k / n) + entr(1 - k / n)) / math.log(2)


# Bits spent on positions in a matrix of n weights, k of them non-zero; row pointers of the CSR formats come on top.
_INDEX_BITS = {
    "dense": lambda n, k: np.zeros_like(n),
    "none": lambda n, k: np.zeros_like(n),
    "csr32": lambda n, k: 32 * k,
    "csr16": lambda n, k: 16 * k,
    "bitmap": lambda n, k: n,
    "entropy": _entropy_bits,
}
INDEXES = tuple(_INDEX_BITS)
_POINTER_BYTES = 4
_CSR16_COLUMNS = 2**16


def stored_bytes(
    parameters: ArrayLike, nonzero: ArrayLike, *, value_bytes: float = 4, index: str = "none", rows: ArrayLike = 0
) -> float:
    """Bytes of weights of which only the non-zero ones are kept.

    `parameters`, `nonzero`: counts, of one matrix, of a whole model, or one entry per matrix (summed; entropy and bitmap are
    then taken matrix by matrix). `index`, how positions are stored:

    - `dense`: all values, no positions (`nonzero` only has to be valid);
    - `none`: non-zero values alone, the paper's way of counting;
    - `csr32`, `csr16`: a 4- or 2-byte column per non-zero (`csr16` needs at most 65,536 columns), and where `rows` says how
      many rows each matrix has, `rows + 1` pointers of 4 bytes; 0 rows leave them out, as one must for totals;
    - `bitmap`: one bit per weight;
    - `entropy`: n H(k/n) bits, what no code for positions drawn at random undercuts (up to a few bits per matrix).

    Raises `ReproError` for an unknown index, lists of unequal length, or counts with 0 <= nonzero <= parameters violated.
    """
    one_of("index", index, INDEXES)
    n, k = (np.atleast_1d(np.asarray(count, dtype=float)) for count in (parameters, nonzero))
    if n.shape != k.shape:
        raise ReproError(f"{n.size} parameter counts but {k.size} non-zero counts: give one of each per matrix")
    if not np.all((n >= 1) & (k >= 0) & (k <= n)):
        raise ReproError("non-zero counts must lie between 0 and the parameter count of their matrix, itself at least 1")
    values = value_bytes * np.sum(n if index == "dense" else k)
    pointers = 0
    if index in ("csr32", "csr16"):
        r = np.broadcast_to(np.asarray(rows, dtype=float), n.shape)
        pointers = _POINTER_BYTES * np.sum(r + 1, where=r > 0)
    return float(values + np.sum(_INDEX_BITS[index](n, k)) / 8 + pointers)


def megabytes(
    parameters: ArrayLike, nonzero: ArrayLike, *, value_bytes: float = 4, index: str = "none", rows: ArrayLike = 0
) -> float:
    """`stored_bytes` in MB of 10^6 bytes.

    The paper's dense sizes are in these (67 M weights: 268 MB); its sparse ones fit MiB (8.3 M: 33.2 MB = 31.7 MiB,
    printed 32).
    """
    return stored_bytes(parameters, nonzero, value_bytes=value_bytes, index=index, rows=rows) / 1e6


def units_on_chip(capacity_bytes: float, sparsity: float, *, value_bytes: float = 2, index: str = "none") -> int:
    """The largest h whose (h, h) recurrent matrix, `round((1 - sparsity) h^2)` values of it non-zero, fits into the capacity.

    Section 6.2 gives about 2,600 units dense, 8,000 at 90 % and 24,000 at 99 % for float16 in a P100, which are 13.5, 12.8 and
    11.5 MB of values without any index (register file: 14,336 KiB). Never more than 65,536 units for `csr16`, whose columns end
    there; 0 if not even one unit fits.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ReproError(f"sparsity is {sparsity}: it must lie in [0, 1)")
    if not (capacity_bytes >= 0 and value_bytes > 0):
        raise ReproError(f"capacity {capacity_bytes} and value size {value_bytes} must be positive numbers of bytes")

    def needed(h: int) -> float:
        return stored_bytes(h * h, round((1 - sparsity) * h * h), value_bytes=value_bytes, index=index, rows=h)

    # One value more than fits is room for rounding the count of non-zeros.
    limit = math.isqrt(math.ceil((capacity_bytes / value_bytes + 1) / (1 - sparsity))) + 1
    if index == "csr16":
        limit = min(limit, _CSR16_COLUMNS)
    return bisect.bisect_right(range(1, limit + 1), capacity_bytes, key=needed)


def register_gbps(lanes: int, clock_ghz: float, *, operands: int = 4, operand_bytes: int = 4) -> float:
    """Register-file bandwidth in GB/s of a GPU moving `operands` words per lane and cycle (fused multiply-add: 3 in, 1 out)."""
    return lanes * clock_ghz * operands * operand_bytes


def on_chip_speedup(off_chip_gbps: float, on_chip_gbps: float, *, byte_ratio: float = 1.0) -> float:
    """Upper bound on the gain from keeping a bandwidth-bound layer's weights on the chip, not reading them every time step.

    `byte_ratio`: bytes read per step off the chip over bytes read on it (10 for dense against 90 % sparse values).

    The paper (section 6.2) projects 146x over a TitanX reading from DRAM, with neither bandwidth stated, so the number can't be
    recomputed from the paper. It does follow from TitanX data sheet figures not in the paper, which is our reading: 3,072 lanes
    at 1 GHz with 4 operands of 4 bytes are 49,152 GB/s of registers, over 336.5 GB/s of DRAM makes 146.07. Then it compares one
    TitanX with itself, at equal bytes, and counts neither the P100, nor float16, nor sparsity; synchronisation between time
    steps and arithmetic are ignored too.
    """
    if not (off_chip_gbps > 0 and on_chip_gbps > 0 and byte_ratio > 0):
        raise ReproError("bandwidths and their byte ratio must be positive")
    return byte_ratio * on_chip_gbps / off_chip_gbps
