"""The buttons of Train with the real trainer: a run is killed, resumed and asked for samples, and finishes."""

import os
import time
from pathlib import Path

import pytest

from training.runs.record import newest_step
from webui import launching
from webui.run_log import log_tail
from webui.views import RunView
from webui.workspace import Workspace

PATIENCE = 540
STEPS = 60


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace whose runs use one thread; runs that are still active at the end are killed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Not a folder of a user.
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(Path("runs"), Path("sets"), is_local=True)
    yield workspace
    for run_id in workspace.run_ids():
        process = workspace.run(run_id).process()
        if process is not None and process.pid != os.getpid():
            process.kill()


def wait_for(workspace, run_id, what):
    """Wait until `what(view)` is true for the run."""
    began = time.monotonic()
    while not what(view := RunView(workspace.run(run_id))):
        assert time.monotonic() - began < PATIENCE, (view.state, view.status, log_tail(view.record))
        assert view.is_active or what(RunView(workspace.run(run_id))), (view.state, view.reason, log_tail(view.record))
        time.sleep(0.1)


def trains_from(workspace, run_id, step):
    """Wait until the run is past `step`."""
    wait_for(workspace, run_id, lambda view: view.actions == ("stop", "sample", "save") and view.status.step > step)


def sampled(record):
    """The steps with sample images."""
    return {int(path.stem.removeprefix("step-")) for path in record.samples.glob("step-*.png")}


@pytest.mark.slow(40)
def test_a_killed_subject_run_is_resumed_and_handles_requests_until_it_is_done(workspace, tiny_model, images_dir):
    options = {
        "model": {"pretrained_model_name_or_path": str(tiny_model)},
        "data": {"instance_data_dir": str(images_dir), "instance_prompt": "sks", "heldout_image": "none"},
        "adapter": {"rank": 4, "inner_r": 2, "target_modules": ["to_v"]},
        "optimisation": {"max_train_steps": STEPS, "train_batch_size": 1},
        "output": {"checkpointing_steps": 2, "validation_steps": STEPS, "validation_prompt": ["sks"], "report_to": "none"},
        "validation": {"certify": False, "heldout_steps": STEPS, "num_candidate_images": 0},
    }
    run_id = launching.start(workspace, "subject", options)
    record = workspace.run(run_id)
    trains_from(workspace, run_id, 0)
    wait_for(workspace, run_id, lambda view: newest_step(view.record.checkpoints) >= 2)
    record.process().kill()
    wait_for(workspace, run_id, lambda view: view.state == "interrupted")
    saved = newest_step(record.checkpoints)
    assert saved >= 2

    launching.resume(workspace, run_id)
    trains_from(workspace, run_id, saved)
    launching.ask(workspace, run_id, "sample")
    wait_for(workspace, run_id, lambda view: view.state == "done")
    assert sampled(record) - {0, STEPS}
    steps = [line.step for line in record.metrics() if "loss" in line.values]
    assert steps == list(range(1, STEPS + 1))
    assert (record.path / "before_after.png").exists()
    assert RunView(record).actions == ("duplicate", "delete")
