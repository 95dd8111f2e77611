"""A sparse matrix that multiplies faster than the dense one: `SparseMatrix(weights) @ x`."""

from collections.abc import Callable

import numpy as np

from repro.errors import ReproError, one_of
from repro.sparse import kernels
from repro.sparse.packing import LANES, SLOT_BYTES, WINDOW, aligned, pack_csr, pack_windows, unpack_windows
from repro.sparse.regions import make_plan, thread_count
from repro.sparse.simd import has_avx512

FORMATS = (*WINDOW, "CSR")
_SLAB = 64  # columns of X that one pass over a CSR matrix takes


class Plans:
    """What kernels are passed (see `repro.sparse.regions`), made once for each number of threads.

    `free`: arrays, or numbers; `work`: cumulative work, from 0, by row or by group of rows, of which threads get equal shares.
    """

    def __init__(self, free, work: np.ndarray):
        self._free = [part.ctypes.data if isinstance(part, np.ndarray) else part for part in free]
        self._work = work
        self._made: dict[int, np.ndarray] = {}

    def __getitem__(self, threads: int) -> np.ndarray:
        if threads not in self._made:
            bounds = np.searchsorted(self._work, self._work[-1] * np.arange(threads + 1) / threads)
            bounds[0], bounds[-1] = 0, len(self._work) - 1
            self._made[threads] = make_plan(bounds, self._free)
        return self._made[threads]


def _checked(weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights)
    if weights.ndim != 2 or weights.dtype != np.float32:
        raise ReproError(f"weights are {weights.dtype} of shape {weights.shape}: a float32 matrix is needed")
    return weights


class SparseMatrix:
    """W (rows, columns) with unstructured zeros, packed once; `W @ x` is float32, on `torch.get_num_threads()` threads.

    `weights`: float32, finite. x: float32, (columns,) or (columns, batch), of any strides; the answer is (rows,) or
    (rows, batch). If x holds an infinity or a NaN, it is the dense product's. x of few columns is taken fastest as the
    transpose of a contiguous (batch, columns) array, of many as a contiguous (columns, batch) one.

    `format`: see `repro.sparse.packing`. By default the fastest with float32 accuracy (2e-6 of the largest entry of W x) for
    products with `batch` columns: "P64" up to 7 of them on a processor with AVX-512, else "CSR".
    """

    def __init__(self, weights: np.ndarray, *, batch: int = 1, format: str | None = None):
        weights = _checked(weights)
        if not np.isfinite(weights).all():
            raise ReproError("weights hold an infinity or a NaN: a sparse matrix keeps finite weights only")
        if batch < 1:
            raise ReproError(f"batch is {batch}: it must be at least 1")
        if format is None:
            format = "P64" if has_avx512() and batch < 2 * kernels.LARGEST_WINDOW_BATCH else "CSR"
        one_of("format", format, FORMATS)
        if format in WINDOW and not has_avx512():
            raise ReproError(f'format "{format}" needs a processor with AVX-512: take "CSR" here')
        self.shape, self.format = weights.shape, format
        if format in WINDOW:
            packed = pack_windows(weights, format)
            self._arrays = (packed.slots, packed.starts, packed.groups, packed.scales)
            work = packed.groups
            self._padded_rows = LANES * (len(packed.groups) - 1)
        else:
            packed = pack_csr(weights)
            self._arrays = (packed.values, packed.columns, packed.pointers)
            work = packed.pointers
        self.nonzero = packed.nonzero
        self._packed, self._plans = packed, Plans((*self._arrays, packed.nonzero), work)
        self._staged: dict[int, np.ndarray] = {}
        self._kernels: dict[tuple[int, int], Callable[[np.ndarray, np.ndarray], bool]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads: weights, positions, padding."""
        return sum(array.nbytes for array in self._arrays)

    def todense(self) -> np.ndarray:
        """The (rows, columns) matrix that x is multiplied by: the weights, rounded as the format rounds them."""
        if self.format in WINDOW:
            return unpack_windows(self._packed, self.format, self.shape)
        dense = np.zeros(self.shape, np.float32)
        row = np.repeat(np.arange(self.shape[0]), np.diff(self._packed.pointers))
        np.add.at(dense, (row, self._packed.columns), self._packed.values)  # the zeros that fill rows up share a column
        return dense

    def _dense_product(self, x: np.ndarray) -> np.ndarray:
        """Where infinities and NaN get to, zeros of W included."""
        with np.errstate(invalid="ignore"):
            return self.todense() @ x

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        if x.dtype.char != "f" or x.ndim not in (1, 2) or x.shape[0] != self.shape[1]:
            raise ReproError(
                f"x is {x.dtype} of shape {x.shape}: float32 of shape ({self.shape[1]},) or ({self.shape[1]}, batch) is needed"
            )
        if self.format != "CSR":
            return self._by_windows(x)
        return self._times_vector(x) if x.ndim == 1 else self._times_matrix(x)

    def _by_windows(self, x: np.ndarray) -> np.ndarray:
        rows = self.shape[0]
        if x.ndim == 1:
            y = np.empty(self._padded_rows, np.float32)
            kernel = self._kernels.get((1, thread_count())) or self._window_kernel(1)
            if not kernel(np.ascontiguousarray(x), y):
                return self._dense_product(x)
            return y if rows == self._padded_rows else y[:rows]
        vectors = np.ascontiguousarray(x.T)
        y = np.empty((len(vectors), self._padded_rows), np.float32)
        for first in range(0, len(vectors), kernels.LARGEST_WINDOW_BATCH):
            part = vectors[first : first + kernels.LARGEST_WINDOW_BATCH]
            if not self._window_kernel(len(part))(part, y[first : first + len(part)]):
                return self._dense_product(x)
        return y[:, :rows].T

    def _window_kernel(self, batch: int):
        """The kernel for `batch` vectors with all it needs but x and y; kept: finding it takes as long as a small product."""
        threads = thread_count()
        if (batch, threads) not in self._kernels:
            kernel = kernels.times_vectors(SLOT_BYTES[self.format], self._packed.count, batch)
            columns = -(-self.shape[1] // LANES) * LANES + WINDOW[self.format]
            plan, staged = self._plans[threads], aligned((batch, columns), np.float32)
            self._kernels[batch, threads] = lambda x, y: kernel(plan, x, staged, y)
        return self._kernels[batch, threads]

    def _times_vector(self, x: np.ndarray) -> np.ndarray:
        y = np.empty(self.shape[0], np.float32)
        kernel = kernels.times_vector(self._packed.columns.itemsize)
        return y if kernel(self._plans[thread_count()], np.ascontiguousarray(x), y) else self._dense_product(x)

    def _times_matrix(self, x: np.ndarray) -> np.ndarray:
        batch = x.shape[1]
        if batch <= _SLAB:
            return self._times_slab(x)
        return np.concatenate([self._times_slab(x[:, first : first + _SLAB]) for first in range(0, batch, _SLAB)], axis=1)

    def _times_slab(self, x: np.ndarray) -> np.ndarray:
        batch = x.shape[1]
        lanes = 8 if batch <= 8 else 16
        registers = next(r for r in (1, 2, 4) if r * lanes >= batch)
        width = registers * lanes
        if batch != width or not x.flags.c_contiguous or x.__array_interface__["data"][0] % 64:
            if width not in self._staged:
                self._staged[width] = aligned((self.shape[1], width), np.float32)
            staged = self._staged[width]
            staged[:, :batch] = x
            staged[:, batch:] = 0
            x = staged
        y = np.empty((self.shape[0], width), np.float32)
        kernel = kernels.times_matrix(lanes, registers, self._packed.columns.itemsize)
        if not kernel(self._plans[thread_count()], x, y):
            y = self._dense_product(x)
        return y[:, :batch]


class DenseMatrix:
    """W (rows, columns) as it is, with the same product for vectors: a dense opponent that reads memory as fast as we can."""

    def __init__(self, weights: np.ndarray):
        self.weights = np.ascontiguousarray(_checked(weights))
        self.shape = weights.shape
        self._plans = Plans((self.weights,), np.arange(self.shape[0] + 1))

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        y = np.empty(self.shape[0], np.float32)
        kernels.dense_times_vector()(self._plans[thread_count()], np.ascontiguousarray(x), y)
        return y
