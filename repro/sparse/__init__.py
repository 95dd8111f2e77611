"""What sparsity buys: bytes (`repro.sparse.storage`, needs no torch) and time (`repro.sparse.timing`).

`compile(model)` runs pruned layers on sparse kernels, with the same calls and outputs; `save(model, path)` writes a file that
really is smaller, and `load(path)` gives its state dict; `SparseMatrix(weights) @ x` is one product.
"""

from importlib import import_module

_HOMES = {
    "SparseMatrix": "repro.sparse.matrix",
    "compile": "repro.sparse.runtime",
    "load": "repro.sparse.files",
    "save": "repro.sparse.files",
    "to_scipy": "repro.sparse.exports",
    "to_torch_csr": "repro.sparse.exports",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    # Loaded when asked for: counting bytes needs neither torch nor a compiler.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
