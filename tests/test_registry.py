"""Fetching a corpus: whole, checked and safe, or one clear sentence and nothing left behind."""

import hashlib
import http.server
import io
import os
import random
import socket
import tarfile
import threading
from pathlib import Path

import pytest

from repro.datasets import registry
from repro.datasets.archives import extract
from repro.errors import ReproError


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def tarball(members):
    """A gzipped tar of {name: bytes | TarInfo}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


RECORDINGS = {"toy/wav/b.raw": b"\1\2" * 500, "toy/wav/a.raw": b"\3\4" * 700}
ARCHIVE = tarball(RECORDINGS)
LIST = b"a\nb\n"
AUDIO = sha256("".join(f"{sha256(RECORDINGS[name])}  {name}\n" for name in sorted(RECORDINGS)).encode())


def entry(archive=ARCHIVE, listing=LIST, urls=("", ""), audio=AUDIO, checksum=True):
    """A registry with one corpus of an archive and a list; `checksum`: whether the archive's own is known."""
    known = f'size = {len(archive)}, sha256 = "{sha256(archive)}",' if checksum else ""
    return f"""
[toy]
licence = "none"
[[toy.editions]]
name = "only"
audio = "{audio}"
files = [
    {{ path = "toy/toy.tar.gz", {known} unpack = true{urls[0]} }},
    {{ path = "toy/etc/list", size = {len(listing)}, sha256 = "{sha256(listing)}"{urls[1]} }},
]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A mirror with a toy corpus, its registry, and an empty cache."""
    monkeypatch.delenv(registry.MIRROR, raising=False)
    (tmp_path / "mirror/toy/etc").mkdir(parents=True)
    (tmp_path / "mirror/toy/toy.tar.gz").write_bytes(ARCHIVE)
    (tmp_path / "mirror/toy/etc/list").write_bytes(LIST)
    (tmp_path / "registry.toml").write_text(entry())
    return tmp_path


def fetch(place, mirror="mirror"):
    return registry.fetch("toy", place / "cache", place / mirror if mirror else None, place / "registry.toml")


def left_behind(place):
    return [path.name for path in (place / "cache").iterdir() if path.suffix != ".lock"]


def test_mirror_is_copied_unpacked_and_then_left_alone(place):
    """All files arrive byte for byte; a second call needs no mirror and rewrites nothing."""
    folder = fetch(place)
    assert folder == place / "cache" / "toy"
    for name, data in RECORDINGS.items():
        assert (place / "cache" / name).read_bytes() == data
    assert (folder / "etc/list").read_bytes() == LIST
    assert left_behind(place) == ["toy"]
    before = (folder / registry.STAMP).stat().st_mtime_ns
    assert fetch(place, mirror="gone") == folder
    assert (folder / registry.STAMP).stat().st_mtime_ns == before
    assert registry.status("toy", place / "cache", place / "registry.toml").state == "ready"


def test_a_changed_byte_is_mended_by_the_next_fetch(place):
    """The file has its size still: `status`, which only looks, calls it ready."""
    folder = fetch(place)
    (folder / "wav/a.raw").write_bytes(b"\0" * len(RECORDINGS["toy/wav/a.raw"]))
    assert registry.status("toy", place / "cache", place / "registry.toml").state == "ready"
    fetch(place)
    assert (folder / "wav/a.raw").read_bytes() == RECORDINGS["toy/wav/a.raw"]
    assert left_behind(place) == ["toy"]


def test_content_is_that_of_the_files_and_nothing_else(place):
    """Two fetches agree on the content's checksum, which is that of the list of all files."""
    first = registry.content(fetch(place))
    files = {**RECORDINGS, "toy/etc/list": LIST}
    lines = "".join(f"{sha256(files[name])}  {name.removeprefix('toy/')}\n" for name in sorted(files))
    assert first == sha256(lines.encode())


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"short")])
@pytest.mark.parametrize("name", ["wav/a.raw", "etc/list", registry.STAMP])
def test_damage_in_the_cache_is_seen_and_mended(place, name, damage):
    """A lost or cut file makes the corpus "damaged", and the next fetch makes it whole."""
    folder = fetch(place)
    damage(folder / name)
    found = registry.status("toy", place / "cache", place / "registry.toml")
    assert found.state == "damaged" and name in found.detail and "make data" in found.detail
    fetch(place)
    assert (folder / "wav/a.raw").read_bytes() == RECORDINGS["toy/wav/a.raw"]
    assert left_behind(place) == ["toy"]


def test_wrong_checksum_tells_file_expected_found_and_remedy(place):
    """One flipped byte of the same size is refused before anything is unpacked."""
    wrong = bytearray(ARCHIVE)
    wrong[-1] ^= 1
    (place / "mirror/toy/toy.tar.gz").write_bytes(wrong)
    with pytest.raises(ReproError) as error:
        fetch(place)
    for part in (str(place / "mirror/toy/toy.tar.gz"), sha256(bytes(wrong)), sha256(ARCHIVE), "make data CORPORA=toy FROM="):
        assert part in str(error.value)
    assert left_behind(place) == []


def test_truncated_file_is_refused_by_its_size(place):
    (place / "mirror/toy/toy.tar.gz").write_bytes(ARCHIVE[:100])
    with pytest.raises(ReproError, match=f"100 bytes, expected {len(ARCHIVE)}"):
        fetch(place)
    assert left_behind(place) == []


def test_truncated_archive_without_known_checksum_leaves_nothing(place):
    """Where only the recordings' checksum is known, a cut archive is still an error and no half corpus."""
    (place / "registry.toml").write_text(entry(checksum=False))
    (place / "mirror/toy/toy.tar.gz").write_bytes(ARCHIVE[: len(ARCHIVE) // 2])
    with pytest.raises(ReproError, match=r"toy\.tar\.gz is truncated"):
        fetch(place)
    assert left_behind(place) == []


def test_other_recordings_in_the_archive_are_refused(place):
    """The joint checksum of the recordings decides when the archive's own is not known."""
    (place / "registry.toml").write_text(entry(checksum=False))
    (place / "mirror/toy/toy.tar.gz").write_bytes(tarball({**RECORDINGS, "toy/wav/a.raw": b"\4\3" * 700}))
    with pytest.raises(ReproError, match=f"joint SHA-256 .* expected {AUDIO}"):
        fetch(place)
    assert left_behind(place) == []


def test_missing_file_and_missing_mirror_are_named(place):
    (place / "mirror/toy/etc/list").unlink()
    with pytest.raises(ReproError, match=r"mirror lacks files of toy: toy/etc/list \(edition 'only'\)"):
        fetch(place)
    with pytest.raises(ReproError, match="nowhere is not a folder"):
        fetch(place, mirror="nowhere")


def test_unknown_corpus_lists_the_known(place):
    with pytest.raises(ReproError, match="unknown corpus 'timit': choose one of an4, ptb, tinyshakespeare, multi30k"):
        registry.fetch("timit", place / "cache")


def test_interruption_leaves_nothing_and_keeps_the_old(place, monkeypatch):
    """Ctrl-C while unpacking: no half corpus, and what was there before is still there."""
    folder = fetch(place)
    (folder / "etc/list").unlink()

    def interrupted(archive, target):
        extract(archive, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(place)
    assert left_behind(place) == ["toy"] and (folder / "wav/a.raw").exists()


def test_remains_of_a_killed_fetch_are_swept(place):
    """What a killed call could not remove, the next one does."""
    (place / "cache/.toy-k1ll3d/toy").mkdir(parents=True)
    fetch(place)
    assert left_behind(place) == ["toy"]


def test_locate_tells_what_to_do_and_uses_the_mirror_variable(place, monkeypatch):
    with pytest.raises(ReproError, match=r"corpus 'toy' is absent in .*/cache/toy: .*make data CORPORA=toy FROM=<folder>"):
        registry.locate("toy", place / "cache", place / "registry.toml")
    monkeypatch.setenv(registry.MIRROR, str(place / "mirror"))
    assert (registry.locate("toy", place / "cache", place / "registry.toml") / "wav/a.raw").exists()


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        {"../outside": b"x"},
        {"toy/../../outside": b"x"},
        {"/outside": b"x"},
        {"c:/outside": b"x"},
        {"toy\\..\\outside": b"x"},
        {"link": link("toy/link", tarfile.SYMTYPE, "/etc/passwd")},
        {"link": link("toy/link", tarfile.LNKTYPE, "toy/good")},
        {"device": link("toy/device", tarfile.CHRTYPE, "")},
    ],
)
def test_hostile_archives_write_nothing(tmp_path, member):
    """Neither the hostile member nor the harmless one before it is written."""
    (tmp_path / "bad.tar.gz").write_bytes(tarball({"toy/good": b"fine", **member}))
    (tmp_path / "target").mkdir()
    with pytest.raises(ReproError, match="nothing was unpacked"):
        extract(tmp_path / "bad.tar.gz", tmp_path / "target")
    with pytest.raises(ReproError, match=r"absent\.tar is missing"):
        extract(tmp_path / "absent.tar", tmp_path / "target")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.tar.gz", "target"]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("damage", ["a changed byte", "no end"])
def test_damage_that_tarfile_passes_over_is_found(tmp_path, kind, damage):
    """It stops where the members end, before the checksum of the compressed file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as tar:
        info = tarfile.TarInfo("toy/good")
        info.size = 3000
        tar.addfile(info, io.BytesIO(random.Random(0).randbytes(3000)))
    whole = buffer.getvalue()
    middle = len(whole) // 2
    bad = whole[:-3] if damage == "no end" else whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    (tmp_path / "bad").write_bytes(bad)
    with pytest.raises(ReproError, match=r"bad is (truncated|damaged)"):
        extract(tmp_path / "bad", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    (tmp_path / "good").write_bytes(whole)
    assert extract(tmp_path / "good", tmp_path / "target")[0].read_bytes() == random.Random(0).randbytes(3000)


def test_an_archive_may_begin_with_the_folder_itself(tmp_path):
    """As `tar -C folder .` writes it."""
    itself = tarfile.TarInfo(".")
    itself.type = tarfile.DIRTYPE
    (tmp_path / "good.tar.gz").write_bytes(tarball({".": itself, "./toy": b"fine"}))
    assert [path.read_bytes() for path in extract(tmp_path / "good.tar.gz", tmp_path / "target")] == [b"fine"]


@pytest.fixture
def server(place):
    """The mirror's files over HTTP on loopback; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(place / "mirror"))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_download_tries_one_address_after_the_other(place, server):
    """A dead address and a wrong file are passed over; the third address is right."""
    (place / "mirror/wrong.tar.gz").write_bytes(b"something else")
    addresses = f', urls = ["{server}/absent", "{server}/wrong.tar.gz", "{server}/toy/toy.tar.gz"]'
    (place / "registry.toml").write_text(entry(urls=(addresses, f', urls = ["{server}/toy/etc/list"]')))
    folder = fetch(place, mirror=None)
    assert (folder / "wav/a.raw").read_bytes() == RECORDINGS["toy/wav/a.raw"]
    assert registry.status("toy", place / "cache", place / "registry.toml").state == "ready"
    assert left_behind(place) == ["toy"]


def test_failed_download_tells_of_every_address(place, server):
    """Not found, wrong and unreachable are each told, with how to go on without a network."""
    (place / "mirror/wrong.tar.gz").write_bytes(b"something else")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/toy.tar.gz"
        addresses = f', urls = ["{server}/absent", "{server}/wrong.tar.gz", "{dead}"]'
        (place / "registry.toml").write_text(entry(urls=(addresses, f', urls = ["{server}/toy/etc/list"]')))
        with pytest.raises(ReproError) as error:
            fetch(place, mirror=None)
    for part in (
        f"{server}/absent: 404",
        f"{server}/wrong.tar.gz has 14 bytes, expected",
        f"{dead}: ",
        "make data CORPORA=toy FROM=",
    ):
        assert part in str(error.value)
    assert left_behind(place) == []


def test_registry_is_complete():
    """Every corpus has a licence and a downloadable edition; every file that is taken as it is has its checksum."""
    corpora = registry.read_registry()
    assert set(corpora) == {"an4", "ptb", "tinyshakespeare", "multi30k"}
    for name, corpus in corpora.items():
        assert corpus["licence"] and corpus["title"] and isinstance(corpus["redistributable"], bool)
        assert any(all(file.get("urls") for file in edition["files"]) for edition in corpus["editions"])
        for edition in corpus["editions"]:
            for file in edition["files"]:
                assert file["path"].startswith(f"{name}/")
                assert len(file.get("sha256", "")) == 64 or "audio" in edition


@pytest.mark.skipif(not os.environ.get(registry.MIRROR), reason=f"{registry.MIRROR} names no folder with the real corpora")
@pytest.mark.parametrize("corpus", ["ptb", "tinyshakespeare", "multi30k"])
def test_real_mirror_matches_the_registry(corpus, tmp_path):
    if not (Path(os.environ[registry.MIRROR]) / corpus).is_dir():
        pytest.skip(f"{registry.MIRROR} has no {corpus}")
    registry.fetch(corpus, tmp_path)
    assert registry.status(corpus, tmp_path).state == "ready"
