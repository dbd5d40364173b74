"""Runs that many tests read: one of each kind, trained once a session. A test that changes one changes a copy."""

import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from subject_runs import EVERYTHING, SubjectTrainer

from training.options import parse_options
from training.runs.run import RunDirectory
from training.runs.run_requests import ASKED, ask
from training.subject import certificate
from training.subject.samples import ValidationSampler


@pytest.fixture(scope="session")
def trainer(tiny_model, images_dir):
    """Runs the subject recipe on the tiny model."""
    return SubjectTrainer(tiny_model, images_dir)


@pytest.fixture(scope="session")
def plain(trainer, tmp_path_factory):
    """What the recipe hands to the loop, with the flags that all tests share."""
    return trainer.prepare(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="session")
def lora_run(trainer, tmp_path_factory):
    """A run of LoRA, of which an image is held out."""
    return trainer.run(tmp_path_factory.mktemp("lora") / "run", "--method", "lora", "--heldout_image", "2.png")


@pytest.fixture(scope="session")
def everything(trainer, tmp_path_factory):
    """A run of NoRA with `EVERYTHING`, and the `phases` that it reported."""
    phases, update = [], RunDirectory.update_status

    def watched(run, **fields):
        if fields.get("phase") and fields["phase"] not in phases:
            phases.append(fields["phase"])
        update(run, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "update_status", watched)
        run = trainer.run(tmp_path_factory.mktemp("everything") / "run", *EVERYTHING)
    return SimpleNamespace(run=run, phases=phases)


@pytest.fixture(scope="session")
def again(trainer, everything, tmp_path_factory):
    """The same run once more from the options that it recorded, asked for samples and a checkpoint after its third step.

    Of each step, `drawn` has the images that were drawn first.
    """
    drawn, save, log = {}, ValidationSampler.save, RunDirectory.log

    def asking(run, step, **values):
        log(run, step, **values)
        if step == 2 and "loss" in values:
            for what in ASKED:
                ask(run, what)

    def remembering(sampler, run, step, images):
        drawn.setdefault(step, list(images))
        save(sampler, run, step, images)

    recorded = ["--options_file", str(everything.run.path / "options.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "log", asking)
        patch.setattr(ValidationSampler, "save", remembering)
        run = trainer.main(parse_options([*recorded, "--output_dir", str(tmp_path_factory.mktemp("again") / "run")]))
    return SimpleNamespace(run=run, drawn=drawn)


@pytest.fixture
def stock_check():
    """The stock program as a module; while it is loaded, and only then, this project's packages are blocked."""
    spec = importlib.util.spec_from_file_location("stock_check", certificate.STOCK_PROGRAM)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nora_vision", "pipelines", "training"):
            patch.setitem(sys.modules, name, sys.modules.get(name))
        spec.loader.exec_module(module)
        with pytest.raises(ImportError, match="import of nora_vision halted"):
            importlib.import_module("nora_vision")
    return module


@pytest.fixture
def certified_here(stock_check, monkeypatch, tmp_path):
    """Have the stock program draw in this process: to import diffusers again takes longer than all that it does."""

    def stock_images(request):
        stock_check.main({**request, "images": str(tmp_path / "images.safetensors")})
        return load_file(tmp_path / "images.safetensors")

    monkeypatch.setattr(certificate, "_stock_images", stock_images)
