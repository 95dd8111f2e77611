"""A pruned model in one file that really is smaller.

The file is a safetensors container (no pickle). A coded matrix `name` lies in it as `name:values`, `name:positions`
(`repro.sparse.positions`) and, for int8, `name:scales`; every other tensor under its own name, as it is. One entry of the
metadata, `repro.sparse`, tells version, checksum, shapes and types.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from repro.errors import ReproError, one_of
from repro.files import write_atomically
from repro.sparse import positions
from repro.sparse.storage import stored_bytes

FORMAT = "repro.sparse"
VERSION = 1
VALUES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NO_CHECKSUM = "0" * 64  # stands in the file while the checksum of the whole file is taken
_PARTS = ("values", "positions", "scales")
_ENTRY_BYTES = 130  # most that one part of a coded matrix adds to the header, names aside
# What reading a file that is none of ours, or was made up, ends in.
_MALFORMED = (ReproError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, MemoryError)
_MALFORMED += (safetensors.SafetensorError,)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes: `file`, as stored; `values`, of the non-zeros alone, the paper's way of counting; `minimum`, these and the entropy
    of random positions (`stored_bytes`); `dense`, as it was. int8 scales, 4 bytes per row, count in `file` only.
    """

    file: int
    values: int
    minimum: float
    dense: int

    @property
    def ratio(self) -> float:
        """Stored bytes over the information minimum; infinite if nothing needs to be said."""
        return self.file / self.minimum if self.minimum else math.inf


@dataclass(frozen=True, kw_only=True)
class MatrixSize(Size):
    """One coded matrix; `index`: "gaps" or "bitmap". `file` leaves out the container's header, some 300 bytes a matrix."""

    shape: tuple[int, ...]
    nonzero: int
    index: str


@dataclass(frozen=True, kw_only=True)
class SavedSize(Size):
    """The whole file with its header; tensors stored as they are count alike in all four sizes, tied ones once."""

    matrices: dict[str, MatrixSize]


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: Path | str,
    *,
    values: str | None = None,
    index: str | None = None,
    skip_below: float = 0.1,
) -> SavedSize:
    """Write a module, or a state dict, to `path`, in one atomic step; `load` reads it. Tells what it takes.

    Matrices (floating, two or more dimensions) of which at least the share `skip_below` is zero are stored as values and
    positions, where that is smaller. All other tensors are stored exactly as they are, tied ones once.

    `values`: what the coded matrices' values become where that takes fewer bytes: "float32", "float16" or "int8" (by row, with
    scale max|w| / 127, so that errors are at most scale / 2); None keeps each matrix's own type, which loses nothing but the
    sign of -0.0. A non-zero may round to zero; its position is kept. `index`: "gaps", "bitmap" or, by None, the smaller.

    Raises `ReproError` for unknown choices, entries that are no dense tensors, values that float16 or int8 cannot hold, and
    a path that cannot be written.
    """
    if values is not None:
        one_of("values", values, VALUES)
    if index is not None:
        one_of("index", index, positions.INDEXES)
    if not 0.0 <= skip_below <= 1.0:
        raise ReproError(f"skip_below is {skip_below}: it must lie in [0, 1], a share of zeros")
    stored, matrices, sizes, tied, first, as_they_are = {}, {}, {}, {}, {}, 0
    for name, tensor in _state(model).items():
        twin = first.setdefault(_memory(tensor), name)
        if twin != name:
            tied[name] = twin
            continue
        # A copy: safetensors refuses shared memory, and does not see that a view conjugates or negates.
        tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)
        coded = _encode(name, tensor, values, index) if _prunable(tensor, skip_below) else None
        if coded is None:
            parts, as_they_are = {name: tensor}, as_they_are + tensor.nbytes
        else:
            matrices[name], parts, sizes[name] = coded
        if not stored.keys().isdisjoint(parts):
            raise ReproError(f"two tensors would be stored as {min(stored.keys() & parts)!r}: rename one")
        stored.update(parts)
    manifest = {"version": VERSION, "sha256": _NO_CHECKSUM, "matrices": matrices, "tied": tied}
    try:
        data = safetensors.torch.save(stored, {FORMAT: json.dumps(manifest, separators=(",", ":"))})
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ReproError(f"cannot write {path}: safetensors does not take a tensor of this model ({error})") from error
    write_atomically(Path(path), data.replace(_NO_CHECKSUM.encode(), hashlib.sha256(data).hexdigest().encode(), 1))
    return SavedSize(
        file=len(data),
        values=as_they_are + sum(size.values for size in sizes.values()),
        minimum=as_they_are + sum(size.minimum for size in sizes.values()),
        dense=as_they_are + sum(size.dense for size in sizes.values()),
        matrices=sizes,
    )


def load(path: Path | str) -> dict[str, Tensor]:
    """The state dict of a file that `save` wrote, on the CPU: `model.load_state_dict(load(path))`.

    Every tensor has the type and shape it was saved with; tied names give one tensor. Raises `ReproError` for a file that
    cannot be read, is damaged or cut off in any place, or is not `save`'s, or a newer version's.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from error
    manifest = _manifest(path, data)
    try:
        tensors = safetensors.torch.load(data)
        for name, entry in manifest["matrices"].items():
            tensors[name] = _decode(entry, *(tensors.pop(f"{name}:{part}", None) for part in _PARTS))
        tensors.update({name: tensors[twin] for name, twin in manifest["tied"].items()})
    except _MALFORMED as error:
        raise ReproError(f"{path} has the right checksum but wrong contents: {error!r}") from error
    return tensors


def _state(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not dense or tensor.is_meta or nn.parameter.is_lazy(tensor):
            raise ReproError(f"cannot store {name!r} of this model: it is not a dense tensor with data")
        if name == "__metadata__":
            raise ReproError("no tensor may be called '__metadata__': safetensors keeps that name for itself")
    return {name: tensor.detach() for name, tensor in state.items()}


def _memory(tensor: Tensor) -> tuple:
    """Equal for tensors that show the same memory in the same way, as tied weights do."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _prunable(tensor: Tensor, skip_below: float) -> bool:
    if tensor.dtype not in _FLOATS.values() or tensor.ndim < 2 or not tensor.numel():
        return False
    return 1 - tensor.count_nonzero().item() / tensor.numel() >= skip_below


def _encode(
    name: str, matrix: Tensor, values: str | None, index: str | None
) -> tuple[dict[str, object], dict[str, Tensor], MatrixSize] | None:
    """The manifest's entry, the parts to store and their size; None if they would take more than the matrix itself."""
    mask = (matrix != 0).flatten().numpy()
    index, code = positions.encode(mask, index)
    where = torch.from_numpy(np.flatnonzero(mask))
    kept = matrix.flatten()[where]
    parts = {"values": kept, "positions": torch.from_numpy(code)}
    if values is not None and VALUES[values].itemsize < matrix.dtype.itemsize:
        parts |= _int8(matrix, kept, where) if values == "int8" else {"values": kept.to(VALUES[values])}
        largest = 127 * parts["scales"] if values == "int8" else parts["values"][kept.isfinite()]
        if not largest.isfinite().all():
            raise ReproError(f"{name!r} holds values beyond {values}: choose wider values, or None")
    size = MatrixSize(
        file=sum(part.nbytes for part in parts.values()),
        values=parts["values"].nbytes,
        minimum=stored_bytes(mask.size, kept.numel(), value_bytes=parts["values"].dtype.itemsize, index="entropy"),
        dense=matrix.nbytes,
        shape=tuple(matrix.shape),
        nonzero=kept.numel(),
        index=index,
    )
    # What the two headers grow by, at most: a line for each part, and the entry below.
    headers = (_ENTRY_BYTES + len(json.dumps(json.dumps(name)))) * len(parts)
    if size.file + headers >= size.dense:
        return None
    entry = {"shape": list(matrix.shape), "dtype": str(matrix.dtype).removeprefix("torch."), "index": index}
    return entry, {f"{name}:{part}": content for part, content in parts.items()}, size


def _int8(matrix: Tensor, kept: Tensor, where: Tensor) -> dict[str, Tensor]:
    """Values in steps of their row's scale; rows with infinities or NaN have such scales."""
    rows = matrix.flatten(1)
    # No scale is below the smallest normal number: subnormal ones are too coarse to divide by.
    scales = (rows.abs().amax(1).double() / 127).clamp_min(torch.finfo(torch.float32).tiny).float()
    steps = kept.double() / scales.double()[where // rows.shape[1]]
    return {"values": steps.round().to(torch.int8), "scales": scales}


def _decode(entry: dict, values: Tensor, code: Tensor, scales: Tensor | None) -> Tensor:
    shape, dtype = entry["shape"], _FLOATS[entry["dtype"]]
    size = math.prod(shape)
    where = torch.from_numpy(positions.decode(entry["index"], code.numpy(), size, values.numel()))
    flat = torch.zeros(size, dtype=dtype)
    if scales is not None:
        values = values * scales[where // (size // shape[0])]
    flat[where] = values.to(dtype)
    return flat.reshape(shape)


def _manifest(path: Path | str, data: bytes) -> dict:
    """Our entry in the metadata of a file, once its checksum has been found right."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end])
        ours = header.pop("__metadata__", {}).get(FORMAT)
        end += max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except _MALFORMED as error:
        raise ReproError(f"{path} is not a safetensors file, or is damaged or cut off within its header") from error
    if ours is None:
        raise ReproError(f"{path} is a safetensors file that repro.sparse.save did not write: its metadata lacks {FORMAT!r}")
    try:
        manifest = json.loads(ours)
        version, checksum = manifest["version"], manifest["sha256"]
        newer = version > VERSION
    except _MALFORMED as error:
        raise ReproError(f"{path} is damaged: its {FORMAT!r} metadata cannot be read") from error
    if newer:
        raise ReproError(f"{path} has version {version} of the format, this is repro for versions up to {VERSION}: update it")
    if len(data) < end:
        raise ReproError(f"{path} is cut off: {len(data):,} of {end:,} bytes")
    unsealed = data.replace(str(checksum).encode(), _NO_CHECKSUM.encode(), 1)
    if hashlib.sha256(unsealed).hexdigest() != checksum:
        raise ReproError(f"{path} is damaged: its contents do not have the checksum it was written with")
    return manifest
