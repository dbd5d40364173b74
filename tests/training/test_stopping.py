"""A run whose launcher is ended saves and stops too, and a signal during an import stops it after the import."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from subject_runs import FLAGS, PROMPT

from training.engine.stopping import StopRequests, TrainingInterrupted, launcher, stopping_at_once
from training.runs.record import newest_step
from training.runs.run import RunDirectory

ROOT = Path(__file__).parents[2]
LONG = "--max_train_steps 100000 --checkpointing_steps 100000 --validation_steps 100000 --heldout_steps 100000"
PATIENCE = 300


def wait_for(what):
    """Wait until `what()` is true."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.1)


@pytest.mark.slow(25)
def test_when_the_launcher_is_killed_the_run_saves_and_stops(tiny_model, images_dir, tmp_path):
    command = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += [str(ROOT / "training" / "dreambooth_nora.py"), *FLAGS.split(), *LONG.split(), "--instance_prompt", PROMPT]
    command += ["--validation_prompt", PROMPT, "--output_dir", str(tmp_path / "run")]
    command += ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(images_dir)]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)})
    run = RunDirectory(tmp_path / "run", writes=False)
    wait_for(lambda: started.poll() is not None or (run.status().step or 0) > 0)
    assert started.poll() is None, (tmp_path / "log").read_text()
    started.kill()
    started.wait()
    wait_for(lambda: not run.is_at_work())
    assert run.status().state == "stopped"
    assert newest_step(run.checkpoints) > 0


def test_the_end_of_the_launcher_counts_as_a_request_to_stop(monkeypatch):
    monkeypatch.setattr("training.engine.stopping.launcher", os.getppid)
    requests = StopRequests()
    assert requests.noted == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert requests.noted == signal.SIGTERM


def test_only_accelerate_is_a_launcher():
    assert launcher() is None


def test_a_signal_during_an_import_waits_for_its_end(tmp_path, monkeypatch):
    (tmp_path / "stopped_import.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nENDED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    ended = []

    def run():
        ended.append(importlib.import_module("stopped_import").ENDED)
        time.sleep(PATIENCE)

    with pytest.raises(TrainingInterrupted, match="SIGTERM"), stopping_at_once():
        run()
    assert ended == [True]
