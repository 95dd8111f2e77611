"""Where things lie, and how a file is written so that a killed process never leaves half of one."""

import os
import tempfile
import tokenize
import zipfile
import zlib
from pathlib import Path

from repro.errors import ReproError

# What `np.load` raises for an .npz file of which some bits are wrong, or which is something else.
DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, SyntaxError)
DAMAGED += (zipfile.BadZipFile, zlib.error, tokenize.TokenError)


def repository_root() -> Path:
    """The checkout this package runs from (editable install): the folder with `data/papers` and `notebooks`.

    Raises ReproError when the package was copied elsewhere without them.
    """
    root = Path(os.environ.get("REPRO_ROOT", Path(__file__).resolve().parent.parent))
    if not (root / "data" / "papers").is_dir():
        raise ReproError(f"no data/papers in {root}: install with `pip install -e .` from a clone, or set REPRO_ROOT to one")
    return root


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write `data` to a temporary file beside `path`, flush it to disk, rename it: readers see the old file or the new one.

    Raises ReproError naming the path when the disk is full or the folder is not writable; the old file is kept.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ReproError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private; the file should be as readable as any other
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise ReproError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
