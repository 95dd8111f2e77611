"""Fetching the corpora of `data/registry.toml`: from a local folder or by download, checked, whole or not at all.

A corpus may come in several *editions* (other packings of the same recordings). Its folder is prepared under a temporary
name in the cache and renamed when everything in it was checked; `fetched.json` inside tells where each file came from.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from repro.datasets.archives import extract
from repro.errors import ReproError, one_of
from repro.files import repository_root

MIRROR = "REPRO_DATA_MIRROR"
STAMP = "fetched.json"


@dataclass(frozen=True)
class Status:
    """`state`: "ready", "absent" or "damaged". `detail`: the edition, or what is wrong and the line that mends it."""

    corpus: str
    state: str
    path: Path
    detail: str
    licence: str


def read_registry(path: Path | None = None) -> dict[str, dict]:
    """The corpora of `data/registry.toml` (or of the file `path`), by name."""
    path = path or repository_root() / "data" / "registry.toml"
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReproError(f"cannot read the registry of corpora {path}: {error}") from error


def cache_folder(target: Path | None = None) -> Path:
    """`target`, or the folder that the variable REPRO_DATA_CACHE names, or `data/cache` of the checkout."""
    return Path(target or os.environ.get("REPRO_DATA_CACHE") or repository_root() / "data" / "cache")


def fetch(corpus: str, target: Path | None = None, mirror: Path | None = None, registry: Path | None = None) -> Path:
    """Make `target/corpus` complete and return it; does nothing when it already is, by the checksums of its files.

    `mirror` (default: the folder that the variable REPRO_DATA_MIRROR names) is used instead of the network when given: it
    holds the files under the registry's paths. Otherwise each address is tried in turn. Raises ReproError, leaving what was
    there before, for a missing or wrong file, naming file, address or folder, expected and found, and how to mend it.
    """
    corpora = read_registry(registry)
    one_of("corpus", corpus, corpora)
    target = cache_folder(target)
    mirror = mirror or os.environ.get(MIRROR)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / f".{corpus}.lock"):
            if _problem(corpora[corpus], target / corpus, read=True) is None:
                return target / corpus
            for left in target.glob(f".{corpus}-*"):  # of a call that was killed: nobody else is at work under this lock
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(prefix=f".{corpus}-", dir=target) as folder:
                if mirror:
                    prepared = _from_mirror(corpus, corpora[corpus], Path(mirror), Path(folder))
                else:
                    prepared = _from_network(corpus, corpora[corpus], Path(folder))
                if (target / corpus).exists():
                    (target / corpus).rename(Path(folder) / "replaced")
                prepared.rename(target / corpus)
    except OSError as error:
        raise ReproError(f"cannot prepare {target / corpus}: {error}; free space or choose another folder") from error
    return target / corpus


def status(corpus: str, target: Path | None = None, registry: Path | None = None) -> Status:
    """Whether `target/corpus` is complete, by the names and sizes of its files."""
    corpora = read_registry(registry)
    one_of("corpus", corpus, corpora)
    folder = cache_folder(target) / corpus
    problem = _problem(corpora[corpus], folder)
    state = "ready" if problem is None else "damaged" if folder.exists() else "absent"
    detail = f"edition {_stamp(folder)['edition']}" if problem is None else f"{problem}; {_mend(corpus)}"
    return Status(corpus, state, folder, detail, corpora[corpus]["licence"])


def locate(corpus: str, target: Path | None = None, registry: Path | None = None) -> Path:
    """The folder of a complete corpus; taken from REPRO_DATA_MIRROR when that is set, never downloaded unasked.

    Raises ReproError saying what is missing and how to get it.
    """
    found = status(corpus, target, registry)
    if found.state == "ready":
        return found.path
    if os.environ.get(MIRROR):
        return fetch(corpus, target, registry=registry)
    raise ReproError(f"the corpus {corpus!r} is {found.state} in {found.path}: {found.detail}")


def content(folder: Path) -> str:
    """SHA-256 of the sorted `sha256  path` lines of the files in a fetched corpus: two equal ones hold the same bytes."""
    return _stamp(folder)["content"]


def _mend(corpus: str) -> str:
    fetch = f"make data CORPORA={corpus}"
    return f"run `{fetch}` (downloads), or `{fetch} FROM=<folder>` or {MIRROR}=<folder> with a folder that holds {corpus}/"


def _stamp(folder: Path) -> dict:
    return json.loads((folder / STAMP).read_text())


def _problem(entry: dict, folder: Path, read: bool = False) -> str | None:
    """What is wrong with a prepared folder, or None: by the sizes of its files or, if they are `read`, by their checksums."""
    if not folder.is_dir():
        return "it was not fetched"
    try:
        stamp = _stamp(folder)
        if stamp["registry"] not in map(_digest, entry["editions"]):
            return "the registry has changed since it was fetched"
        for name, (size, checksum) in stamp["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                return f"{name} is missing or does not have its {size} bytes"
            if read and _sha256(folder / name) != checksum:
                return f"{name} does not have its SHA-256 {checksum}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{STAMP} is missing or damaged"
    return None


def _digest(edition: dict) -> str:
    """Of what decides an edition's content: its addresses may change."""
    files = [[file["path"], file.get("sha256"), file.get("size")] for file in edition["files"]]
    return _sha256(json.dumps([edition["name"], edition.get("audio"), files]).encode())


def _from_mirror(corpus: str, entry: dict, mirror: Path, folder: Path) -> Path:
    """Assemble the first edition all of whose files the mirror has."""
    if not mirror.is_dir():
        raise ReproError(f"the mirror {mirror} is not a folder; {_mend(corpus)}")
    missing = {}
    for edition in entry["editions"]:
        sources = [mirror / file["path"] for file in edition["files"]]
        absent = [str(source.relative_to(mirror)) for source in sources if not source.is_file()]
        if absent:
            missing[edition["name"]] = ", ".join(absent)
            continue
        for file, source in zip(edition["files"], sources, strict=True):
            if wrong := _mismatch(source, file):
                raise ReproError(f"{source} has {wrong}; copy it again, or {_mend(corpus)}")
        return _assemble(corpus, edition, sources, sources, folder)
    wanted = "; or ".join(f"{paths} (edition {name!r})" for name, paths in missing.items())
    raise ReproError(f"the mirror {mirror} lacks files of {corpus}: {wanted}; {_mend(corpus)}")


def _from_network(corpus: str, entry: dict, folder: Path) -> Path:
    """Assemble the first edition that can be downloaded whole and right; if none can, tell why for each address."""
    failures = []
    for edition in entry["editions"]:
        if not all(file.get("urls") for file in edition["files"]):
            continue
        place = folder / edition["name"]
        try:
            pairs = [_download(file, place / "downloads" / str(i)) for i, file in enumerate(edition["files"])]
            return _assemble(corpus, edition, *zip(*pairs, strict=True), place)
        except ReproError as error:
            failures.append(str(error))
    raise ReproError(f"cannot download {corpus}: {'; '.join(failures) or 'no address is known'}; to mend it, {_mend(corpus)}")


def _download(file: dict, folder: Path) -> tuple[Path, str]:
    """(downloaded file, address) from the first address that gives the right file."""
    import pooch  # here, because it takes long to import and most calls find their corpus in the cache

    pooch.get_logger().setLevel(logging.WARNING)
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
    failures = []
    for index, address in enumerate(file["urls"]):
        try:
            path = Path(pooch.retrieve(address, None, Path(file["path"]).name, folder / str(index), downloader=downloader))
        except (OSError, ValueError) as error:  # the exceptions of requests are OSErrors
            failures.append(f"{address}: {error}")
            continue
        if wrong := _mismatch(path, file):
            failures.append(f"{address} has {wrong}")
            continue
        return path, address
    raise ReproError("; ".join(failures))


def _assemble(corpus: str, edition: dict, sources: Iterable[Path], origins: Iterable, folder: Path) -> Path:
    """Unpack or copy the checked `sources` under `folder`, check the recordings, stamp and return `folder/corpus`."""
    for file, source in zip(edition["files"], sources, strict=True):
        if file.get("unpack"):
            extract(source, folder)
        else:
            (folder / file["path"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / file["path"])
    root = folder / corpus
    if not root.is_dir():
        raise ReproError(f"{', '.join(map(str, origins))}: no folder {corpus}/ inside; {_mend(corpus)}")
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    files = {name: ((root / name).stat().st_size, _sha256(root / name)) for name in names}
    if "audio" in edition:
        # The list that sha256sum would print one folder up: its own checksum stands for all recordings at once.
        lines = [f"{files[name][1]}  {corpus}/{name}\n" for name in names if name.endswith(".raw")]
        found = _sha256("".join(lines).encode())
        if found != edition["audio"]:
            raise ReproError(
                f"the {len(lines)} recordings in {', '.join(map(str, origins))} have the joint SHA-256 {found}, "
                f"expected {edition['audio']}; {_mend(corpus)}"
            )
    stamp = {
        "edition": edition["name"],
        "registry": _digest(edition),
        "content": _sha256("".join(f"{files[name][1]}  {name}\n" for name in names).encode()),
        "sources": [str(origin) for origin in origins],
        "files": files,
    }
    (root / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    return root


def _mismatch(path: Path, file: dict) -> str | None:
    """How the file differs in size or SHA-256 from the registry, where that knows them."""
    size, expected = path.stat().st_size, file.get("size")
    if expected is not None and size != expected:
        return f"{size} bytes, expected {expected}"
    found, expected = _sha256(path), file.get("sha256")
    if expected is not None and found != expected:
        return f"SHA-256 {found}, expected {expected}"
    return None


def _sha256(data: Path | bytes) -> str:
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
