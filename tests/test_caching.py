"""Compiled kernels on disk: read by the next process, told apart, and made anew when a source changes."""

import errno
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

from repro.sparse.caching import kept
from repro.sparse.simd import has_avx512

PRODUCT = """
import numpy as np
from numba.core import event
recorder = event.RecordingListener()
event.register("numba:compile", recorder)
from repro.gradients.products import packed
a, b = np.random.default_rng(0).standard_normal((2, 70, 70)).astype(np.float32)
c = np.empty((70, 70), np.float32)
packed(b)(a, c, sparse=False)
np.save("c.npy", c)
print(len(recorder.buffer))
"""

# `step` stands in another file than the kernel, and each kernel closes over another number.
STEP = "from numba import njit\n@njit\ndef step(x):\n    return {step}\n"
KERNELS = """
import sys
from repro.sparse.caching import kept
from step import step
def times(factor):
    @kept
    def kernel(x):
        return factor * step(x)
    return kernel
print(*(times(int(factor))(10) for factor in sys.argv[1:]))
"""


def python(folder, *arguments) -> str:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "kernels")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not has_avx512(), reason="these kernels need AVX-512")
def test_the_second_process_compiles_nothing_and_computes_the_same(tmp_path):
    assert int(python(tmp_path, "-c", PRODUCT)) > 0
    first = np.load(tmp_path / "c.npy")
    assert int(python(tmp_path, "-c", PRODUCT)) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "c.npy"), first)
    a, b = np.random.default_rng(0).standard_normal((2, 70, 70)).astype(np.float32)
    np.testing.assert_allclose(first, a.astype(float) @ b, rtol=1e-5, atol=1e-5)


def test_kernels_are_told_apart_by_what_they_close_over(tmp_path):
    """Also where each was compiled by another process, which may give both the same name in machine code."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    (tmp_path / "step.py").write_text(STEP.format(step="x + 1"))
    for factors, answers in ((["2"], "22"), (["3"], "33"), (["2", "3"], "22 33")):
        assert python(tmp_path, "kernels.py", *factors).strip() == answers


def test_kernels_follow_all_sources_of_their_folder(tmp_path):
    (tmp_path / "kernels.py").write_text(KERNELS)
    for step, answer in (("x + 1", "22"), ("x + 1", "22"), ("x + 2", "24")):
        (tmp_path / "step.py").write_text(STEP.format(step=step))
        assert python(tmp_path, "kernels.py", "2").strip() == answer


def test_a_full_disk_costs_time_only(monkeypatch):
    def full(self, key, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "save", full)
    factor = time.time_ns()  # never compiled before
    assert kept(lambda x: factor * x)(2) == 2 * factor
