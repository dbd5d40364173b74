"""Running the base model on the subject: the statistics do not depend on the batch size."""

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from nora_vision import calibrate
from pipelines.cache import TensorCache
from pipelines.subject import calibration
from pipelines.subject.calibration import TIMESTEPS_PER_IMAGE, runs_on_subject
from pipelines.subject.data import TrainingImage
from pipelines.subject.encoding import CropConfig, LatentEncoder
from pipelines.subject.loss import DenoisingLoss
from pipelines.subject.target_layers import ATTENTION


@pytest.fixture(scope="module")
def subject(images_dir, tmp_path_factory):
    """The loss of a tiny model, and three encoded images of two sizes."""
    pipe = tiny_pipeline()
    images = [TrainingImage(path, f"toy {place}") for place, path in enumerate(sorted(images_dir.iterdir()))]
    encoder = LatentEncoder(pipe, TensorCache(tmp_path_factory.mktemp("encoded")))
    return DenoisingLoss(pipe), encoder.encode(images, CropConfig(((16, 16), (16, 24))))


def inputs_of(run, loss, monkeypatch):
    """The keyword arguments of all calls of the UNet while `run` runs."""
    asked = []
    monkeypatch.setattr(loss, "predict", lambda **given: asked.append(given))
    run()
    return asked


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 100])
def test_no_batch_is_larger_than_allowed_and_noise_and_timesteps_are_the_same_in_all(subject, batch_size, monkeypatch):
    loss, images = subject
    whole = inputs_of(runs_on_subject(loss, images, 7)["unet"], loss, monkeypatch)
    parts = inputs_of(runs_on_subject(loss, images, 7, batch_size=batch_size)["unet"], loss, monkeypatch)
    assert len(whole) == len(images)
    assert max(len(part["timesteps"]) for part in parts) == min(batch_size, TIMESTEPS_PER_IMAGE)
    for name in ("timesteps", "time_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts]), torch.cat([one[name] for one in whole]))
    for name in ("latents", "noise"):
        flat = [torch.cat([value[name].flatten() for value in given]) for given in (parts, whole)]
        assert torch.equal(*flat)
    prompts = [torch.cat([given["prompts"].hidden for given in all_given]) for all_given in (parts, whole)]
    assert torch.equal(*prompts)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_statistics_do_not_depend_on_the_batch_size(subject, batch_size):
    loss, images = subject
    whole, parts = (
        calibrate(loss.unet, runs_on_subject(loss, images, 7, batch_size=size)["unet"], ATTENTION) for size in (8, batch_size)
    )
    assert set(whole) == set(parts)
    for name, scale in whole.items():
        torch.testing.assert_close(parts[name], scale, rtol=1e-5, atol=0)


def test_several_processes_calibrate_on_the_same_data_as_one(subject):
    loss, images = subject
    whole = calibrate(loss.unet, runs_on_subject(loss, images, 7)["unet"], ATTENTION)
    shares = [calibrate(loss.unet, runs_on_subject(loss, images, 7, rank, 2, 2)["unet"], ATTENTION) for rank in (0, 1)]
    for name, scale in whole.items():
        together = torch.stack([share[name].square() for share in shares]).sum(dim=0).sqrt()
        torch.testing.assert_close(together, scale, rtol=1e-5, atol=0)


def test_only_the_first_process_shows_a_progress_bar(subject, monkeypatch):
    loss, images = subject
    bars = []

    class Bar(calibration.tqdm):
        def __init__(self, *given, **more):
            super().__init__(*given, **more | {"delay": 0})
            bars.append(self)

    monkeypatch.setattr(calibration, "tqdm", Bar)
    for run in runs_on_subject(loss, images, 7, batch_size=3).values():
        run()
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [
        ("calibrating", 9, 9),
        ("calibrating text encoder 1", 3, 3),
        ("calibrating text encoder 2", 3, 3),
    ]
    runs_on_subject(loss, images, 7, process=1, processes=2)["unet"]()
    assert bars[-1].disable
