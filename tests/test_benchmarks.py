"""The measuring scripts run: a GPU lease is no place to find that one does not."""

from __future__ import annotations

import subprocess
import sys


def test_gpu_script_runs_dry():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WRONG" not in done.stdout
    assert done.stdout.count("cpp") == 5
