"""The ways to compute y = W x that are timed against each other, by name, and the runtime whose threads each of them uses.

Two thread pools in one process slow each other down while their idle threads spin, so `repro.sparse.bench` gives every runtime
a process of its own. Libraries are imported when a backend prepares its matrix, by that process only.

What the names stand for: torch dense calls MKL, which takes its AVX2 path on processors not made by Intel; oneDNN packed is the
same product with weights reordered beforehand; int8 dynamic is `torch.ao`'s quantised layer (FBGEMM). scipy CSR has one thread.
"""

import importlib.metadata
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from repro.errors import ReproError

# Largest |y - exact| over largest |exact| that passes; float32 libraries reach 3e-6, dense at 3,568 columns.
TOLERANCE = 1e-5
_INT8_TOLERANCE = 5e-2
_16_BIT_TOLERANCE = 1e-2

Call = Callable[[], object]


@dataclass(frozen=True)
class Backend:
    """One way to compute y = W x.

    `prepare(weights, x)` does what is done once per matrix (conversion, packing) and returns the call to be timed; it gets
    float32 arrays `(rows, columns)`, to keep, and `(columns, batch)`, not to change. A library that is not installed is left to
    raise its `ImportError`; what a backend cannot do here it says with a `ReproError`: both make it a missing peer. The
    call returns y, anything `numpy.asarray` reads, as `(rows, batch)` or, if `batch_first`, `(batch, rows)`. `sparse`: whether
    zeros are skipped. `tolerance`: the error allowed; more than `TOLERANCE` marks a backend of reduced precision.
    """

    runtime: str
    prepare: Callable[[np.ndarray, np.ndarray], Call]
    sparse: bool
    batch_first: bool = False
    tolerance: float = TOLERANCE

    @property
    def reduced(self) -> bool:
        return self.tolerance > TOLERANCE


def missing_reason(error: ImportError | ReproError) -> str:
    """Why a backend could not prepare, in words."""
    absent = isinstance(error, ModuleNotFoundError) and error.name
    return f"{error.name} is not installed" if absent else str(error)


def _torch_dense(weights, x) -> Call:
    import torch

    weights, x = torch.from_numpy(weights), torch.from_numpy(x.T.copy())
    return lambda: torch.nn.functional.linear(x, weights)


def _onednn_packed(weights, x) -> Call:
    import torch

    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise ReproError("this torch has no mkldnn._linear_pointwise")
    product = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.from_numpy(weights), x.shape[1])
    x = torch.from_numpy(x.T.copy())
    return lambda: product(x, packed, None, "none", [], "")


def _int8_dynamic(weights, x) -> Call:
    import torch

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ReproError("this torch has no FBGEMM")
    layer = torch.nn.Linear(*reversed(weights.shape), bias=False, device="meta")  # spares drawing weights to replace
    layer.weight = torch.nn.Parameter(torch.from_numpy(weights), requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated")
        try:
            # Only children are quantised, never the module itself.
            quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear})[0]
        except AttributeError:
            raise ReproError("this torch has no torch.ao.quantization.quantize_dynamic") from None
    x = torch.from_numpy(x.T.copy())
    return lambda: quantized(x)


def _torch_csr(weights, x) -> Call:
    import torch

    values, column, pointers = (torch.from_numpy(part) for part in csr(weights))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(pointers, column, values, size=weights.shape, check_invariants=True)
    x = torch.from_numpy(_vector_at_batch_1(x))
    return lambda: matrix @ x


def _openblas_dense(weights, x) -> Call:
    from threadpoolctl import threadpool_info

    if not any(pool["internal_api"] == "openblas" and "numpy" in pool["filepath"] for pool in threadpool_info()):
        raise ReproError("numpy is linked with another BLAS here")
    x = _vector_at_batch_1(x)
    return lambda: weights @ x


def _scipy_csr(weights, x) -> Call:
    import scipy.sparse

    matrix, x = scipy.sparse.csr_array(csr(weights), shape=weights.shape), _vector_at_batch_1(x)
    return lambda: matrix @ x


def _onnxruntime_dense(weights, x) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    x, y = x.T.copy(), np.empty((x.shape[1], len(weights)), dtype=np.float32)
    # With the constant on the right it is packed once, when the session is made.
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weights"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y.shape)],
        [numpy_helper.from_array(np.ascontiguousarray(weights.T), "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if threads > 1:  # on cores of their own, as OpenMP's threads in the other processes; the first thread is the caller's
        options.add_session_config_entry(
            "session.intra_op_thread_affinities", ";".join(str(core + 1) for core in range(1, threads))
        )
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return y

    return call


def _mkl_csr(weights, x) -> Call:
    os.environ.setdefault("MKL_RT", _mkl_library())
    import scipy.sparse
    from sparse_dot_mkl import dot_product_mkl

    matrix, x = scipy.sparse.csr_array(csr(weights), shape=weights.shape), _vector_at_batch_1(x)
    return lambda: dot_product_mkl(matrix, x)


def _mkl_library() -> str:
    """Where the package `mkl` put its library; in a virtual environment `sparse_dot_mkl` does not find it."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(name="mkl") from None
    found = [str(file.locate().resolve()) for file in files if "mkl_rt" in file.name]
    if not found:
        raise ReproError("the installed mkl has no library mkl_rt")
    return found[0]


def _own(**options):
    """The kernels of this package; `format` as in `repro.sparse.matrix.SparseMatrix`."""

    def prepare(weights, x) -> Call:
        from repro.sparse.kernels import LARGEST_WINDOW_BATCH
        from repro.sparse.matrix import SparseMatrix
        from repro.sparse.packing import aligned

        if options and x.shape[1] > LARGEST_WINDOW_BATCH:
            raise ReproError(f"format {options['format']} takes {LARGEST_WINDOW_BATCH} columns a pass: it is timed up to these")
        matrix = SparseMatrix(weights, batch=x.shape[1], **options)
        if matrix.format == "CSR":
            placed = aligned(x.shape, np.float32)
            placed[:] = x
        else:
            placed = np.asfortranarray(x)
        placed = _vector_at_batch_1(placed)
        return lambda: matrix @ placed

    return prepare


def _own_dense(weights, x) -> Call:
    from repro.sparse.matrix import DenseMatrix

    if x.shape[1] > 1:
        raise ReproError("the dense product of this package takes one vector at a time")
    matrix, x = DenseMatrix(weights), x[:, 0]
    return lambda: matrix @ x


def csr(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, column of each, row pointers. Indices have 4 bytes: torch's default of 8 makes its product 1.5 times slower."""
    mask = weights != 0
    pointers = np.zeros(len(weights) + 1, dtype=np.int32)
    np.cumsum(mask.sum(axis=1), out=pointers[1:])
    column = np.broadcast_to(np.arange(weights.shape[1], dtype=np.int32), weights.shape)[mask]
    return weights[mask], column, pointers


def _vector_at_batch_1(x: np.ndarray) -> np.ndarray:
    """Libraries take their matrix-vector path for a vector only."""
    return x[:, 0] if x.shape[1] == 1 else x


BACKENDS: dict[str, Backend] = {
    "torch dense": Backend("torch", _torch_dense, sparse=False, batch_first=True),
    "oneDNN packed": Backend("torch", _onednn_packed, sparse=False, batch_first=True),
    "int8 dynamic": Backend("torch", _int8_dynamic, sparse=False, batch_first=True, tolerance=_INT8_TOLERANCE),
    "OpenBLAS dense": Backend("numpy", _openblas_dense, sparse=False),
    "onnxruntime dense": Backend("onnxruntime", _onnxruntime_dense, sparse=False, batch_first=True),
    "repro dense": Backend("repro", _own_dense, sparse=False),
    "torch CSR": Backend("torch", _torch_csr, sparse=True),
    "scipy CSR": Backend("numpy", _scipy_csr, sparse=True),
    "MKL CSR": Backend("mkl", _mkl_csr, sparse=True),
    "repro sparse": Backend("repro", _own(), sparse=True),
    "repro exact": Backend("repro", _own(format="P64 exact"), sparse=True),
    "repro 16-bit": Backend("repro", _own(format="P16"), sparse=True, tolerance=_16_BIT_TOLERANCE),
}
