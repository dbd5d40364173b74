"""The benchmark of kills, with few of them, and that it would see a difference."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.kill_resume import differences
from training.runs.run import RunDirectory

ROOT = Path(__file__).parents[2]


@pytest.mark.slow(20)
def test_runs_killed_at_random_moments_end_in_the_bytes_of_the_one_that_was_not():
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_resume.py"), "--kills", "2", "--seed", "1"]
    finished = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    result = json.loads(finished.stdout[finished.stdout.index("{") :])
    assert result["kills"] == sum(result["by phase"].values()) == 2
    assert result["runs finished"] >= 1
    assert result["files that differ"] == []


@pytest.fixture
def whole(tmp_path):
    """What a run leaves that the benchmark compares."""
    run = RunDirectory.create(tmp_path / "whole", {})
    (run.path / "adapter").mkdir()
    save_file({"weight": torch.ones(3)}, run.path / "adapter" / "a.safetensors")
    run.log(1, loss=0.5)
    return run.path


def test_a_changed_a_missing_and_a_further_file_and_another_metric_are_differences(whole, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    assert differences(whole, other) == []
    save_file({"weight": torch.full((3,), 1.0000001)}, other / "adapter" / "a.safetensors")
    save_file({"weight": torch.ones(3)}, other / "adapter" / "b.safetensors")
    assert differences(whole, other) == ["adapter/a.safetensors", "adapter/b.safetensors"]
    assert differences(other, whole) == ["adapter/a.safetensors", "adapter/b.safetensors"]
    RunDirectory(other).log(2, loss=0.25)
    assert differences(whole, other)[-1] == "metrics.jsonl"
