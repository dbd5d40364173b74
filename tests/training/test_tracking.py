"""Trackers get every metric and every image that the run's directory gets."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.errors import InputError
from training.runs.run import RunDirectory
from training.runs.tracking import start_tracker


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run", {})


def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))


def logged(run):
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_gets_every_metric_and_image(run):
    run.trackers.extend(start_tracker("tensorboard", run.path, 0))
    with run.recording():
        run.log(1, loss=0.5, lr=0.1)
        run.log(2, loss=0.25)
        run.save_image(2, image())
    events = logged(run)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [event.step for event in events.Scalars("lr")] == [1]
    (logged_image,) = events.Images("samples")
    assert (logged_image.step, logged_image.height, logged_image.width) == (2, 4, 6)
    assert (run.samples / "step-0000002.png").is_file()


def test_a_resumed_run_shows_every_step_once(run):
    run.trackers.extend(start_tracker("tensorboard", run.path, 0))
    for step in (1, 2, 3):
        run.log(step, loss=1.0)
    run.trackers.pop().finish()
    run.trackers.extend(start_tracker("tensorboard", run.path, 2))
    run.log(3, loss=3.0)
    run.trackers.pop().finish()
    assert [(event.step, event.value) for event in logged(run).Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 3.0)]


class FakeWandb(ModuleType):
    """What accelerate calls of wandb."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.logged, self.settings = [], {}

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, values, step=None, **more):
        assert not more
        self.logged.append((step, values))

    def Image(self, pixels):
        return pixels.shape

    def finish(self):
        self.logged.append("finished")


def test_wandb_gets_every_metric_and_image(run, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run.trackers.extend(start_tracker("wandb", run.path, 0))
    with run.recording():
        run.log(1, loss=0.5)
        run.save_image(1, image())
    assert wandb.settings["name"] == "run"
    assert wandb.logged == [(1, {"loss": 0.5}), (1, {"samples": [(4, 6, 3)]}), "finished"]


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(run, monkeypatch):
    monkeypatch.setattr("training.runs.tracking.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--report_to wandb needs the package 'wandb'.*pip install wandb"):
        start_tracker("wandb", run.path, 0)


def test_none_and_processes_that_do_not_write_have_no_tracker(run):
    assert start_tracker("none", run.path, 0) == []
    assert start_tracker("tensorboard", run.path, 0, writes=False) == []
