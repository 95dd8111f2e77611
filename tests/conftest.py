"""Every test runs on one thread per process: the suite runs two processes on two cores."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import hypothesis  # noqa: E402  after the thread counts

hypothesis.settings.register_profile("repro", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repro")
