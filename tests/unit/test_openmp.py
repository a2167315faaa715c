"""Threads of OpenMP wait passively, so that they do not take the cores of others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("users, expected", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_the_wait_policy_is_set_before_openmp_is_loaded(users, expected):
    libraries = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not libraries:
        pytest.skip("torch has no libgomp of its own here")
    # the library alone: to import torch takes seconds
    script = f"import ctypes, sys, tidar; assert 'torch' not in sys.modules; ctypes.CDLL({str(libraries[0])!r})"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=environment | {"OMP_DISPLAY_ENV": "TRUE"} | users, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert f"OMP_WAIT_POLICY = '{expected}'" in finished.stderr
