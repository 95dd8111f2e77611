"""Unpacking a downloaded archive without trusting it."""

import lzma
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from repro.errors import ReproError


def extract(archive: Path, target: Path) -> list[Path]:
    """Unpack the tar file `archive` (gz, bz2, xz or plain) into the folder `target`; the regular files written.

    All names are checked before anything is written. Raises ReproError naming the archive and the member for a path outside
    `target` (absolute, `..`), a link or a device, and for a truncated or damaged archive.
    """
    try:
        with tarfile.open(archive) as tar:
            _read_whole(archive, tar.fileobj)
            members = tar.getmembers()
            for member in members:
                _check(archive, member)
            # The filter repeats the check against the real folder, and drops owners and special permission bits.
            tar.extractall(target, members=members, filter="data")
    except FileNotFoundError as error:
        raise ReproError(f"{error.filename} is missing: fetch it again") from error
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ReproError(f"{archive} is truncated or not a tar archive ({error}); fetch it again") from error
    return [target / member.name for member in members if member.isfile()]


def _read_whole(archive: Path, stream: IO[bytes]) -> None:
    """To its end, where the checksum of compressed files stands: tarfile stops before it."""
    try:
        while stream.read(1 << 20):
            pass
    except OSError as error:  # as gzip and bz2 call a wrong checksum
        raise ReproError(f"{archive} is damaged ({error}); fetch it again") from error


def _check(archive: Path, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in "".join(path.parts[:1]):
        raise ReproError(f"{archive}: {member.name!r} would be written outside the folder; nothing was unpacked")
    if not (member.isfile() or member.isdir()):
        raise ReproError(f"{archive}: {member.name!r} is a link or a device, only files belong there; nothing was unpacked")
