"""What a model of true size must not suffer: batches larger than the training's, and work done twice."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_pipeline import tiny_pipeline
from torch.utils.data import Dataset

import nora_vision
from nora_vision import moment_groups
from nora_vision.layer import nora_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.methods import DEFAULT, method_named
from pipelines.subject.generate import Sampling, generate
from pipelines.subject.loss import DenoisingLoss
from training import dreambooth_nora
from training.engine import memory_fallback
from training.engine.dry_run import DoesNotFitError
from training.engine.memory_fallback import with_memory_fallback
from training.fewshot.adapter_training import CalibrationBatches
from training.options import parse_options
from training.runs.run_files import FallbackStep
from training.subject import samples, validation

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "true_size.py"
FLAGS = "--instance_prompt toy --validation_prompt toy --max_train_steps 4 --heldout_steps 2 --validation_steps 4 --rank 6"
FLAGS += " --inner_r 2 --resolution 16 --no_certify --report_to none --num_candidate_images 2 --target_modules to_q to_k to_v"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Few inference steps, and the precision of no other test's run."""
    monkeypatch.setattr(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("true_size", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["true_size"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def flags(tmp_path, tiny_model, images_dir):
    """Those of a short run, all but the batch size."""
    paths = ["--output_dir", str(tmp_path / "run"), "--pretrained_model_name_or_path", str(tiny_model)]
    return [*FLAGS.split(), *paths, "--instance_data_dir", str(images_dir), "--heldout_image", "2.png"]


def test_a_whole_run_decomposes_each_layer_once_however_often_its_adapter_is_kept_and_exported(benchmark, flags):
    pipeline = tiny_pipeline()
    phases = benchmark.measured(pipeline, [*flags, "--train_batch_size", "1"])
    counts = {name: phase.decompositions for name, phase in phases.totals.items() if phase.decompositions}
    assert counts == {"start the layers (AwSVD)": len(nora_layers(pipeline.unet))}
    assert phases.totals["saved adapter"].calls == 3
    assert phases.totals["export"].calls >= 1
    table = phases.table().splitlines()
    assert len({line.count("|") for line in table}) == 1
    for name in ("calibrate", "training steps", "held-out loss (4 draws)", "saved adapter", "export", "all"):
        assert any(line.startswith(f"| {name} |") for line in table)
    assert all(phase.peak_memory > 1e8 for phase in phases.totals.values())


def test_a_phase_is_charged_for_what_runs_in_it_and_not_in_a_phase_inside(benchmark):
    phases, inner = benchmark.Phases(), []
    with phases.phase("outer"):
        step = phases.timed("inner", lambda: inner.append(torch.linalg.svd(torch.randn(200, 200))))
        counted = phases.counted(step)
        counted()
        counted()
    assert (phases.totals["outer"].calls, phases.totals["inner"].calls) == (1, 2)
    assert (phases.totals["outer"].decompositions, phases.totals["inner"].decompositions) == (2, 0)
    assert phases.totals["inner"].seconds > 0


def test_before_and_between_the_steps_no_batch_is_larger_than_the_trainings(flags, monkeypatch):
    sizes, measured, drawn, predict = [], [], [], DenoisingLoss.predict

    def noted(loss, latents, *given, **more):
        if not torch.is_grad_enabled():
            sizes.append(len(latents))
        return predict(loss, latents, *given, **more)

    monkeypatch.setattr(DenoisingLoss, "predict", noted)
    monkeypatch.setattr(validation, "SMALL_PIXELS", 0)
    monkeypatch.setattr(validation, "mean_denoising_loss", lambda *_, batch_size, **__: measured.append(batch_size) or 1.0)
    monkeypatch.setattr(samples, "generate", lambda *given: (drawn.append(given[4]), generate(*given))[1])
    monkeypatch.setattr(dreambooth_nora, "finish", lambda *_: None)
    dreambooth_nora.main(parse_options([*flags, "--max_train_steps", "1", "--train_batch_size", "2"]))
    assert max(sizes) == 2
    assert set(measured) == set(drawn) == {2}


@pytest.mark.parametrize(
    ("sizes", "batch_size", "expected"),
    [
        ([(1024, 1024)], 1, 1),
        ([(1024, 1024)], 4, 4),
        ([(512, 512)], 1, 1),
        ([(256, 256)], 1, 4),
        ([(64, 64)], 1, 16),
        ([(64, 64), (512, 1024)], 2, 2),
        ([(1024, 1024)], 99, 16),
    ],
)
def test_small_images_are_measured_in_larger_batches(sizes, batch_size, expected):
    assert validation.measurement_batch(SimpleNamespace(sizes=sizes), batch_size) == expected


def test_nothing_is_calibrated_or_decomposed_before_the_memory_is_known_to_suffice(flags, monkeypatch):
    for module, long_work in ((moment_groups, "calibrate"), (nora_vision, "initialize_nora_weights")):
        monkeypatch.setattr(module, long_work, lambda *_, name=long_work, **__: pytest.fail(f"{name} was called"))
    with pytest.raises(DoesNotFitError, match=r"needs .* GB of memory, but memory_limit_gb is 0\.001"):
        dreambooth_nora.main(parse_options([*flags, "--memory_limit_gb", "0.001"]))


@pytest.mark.parametrize(
    ("option", "value", "first"),
    [
        ("weighting", "diagonal", True),
        ("weighting", "none", True),
        ("weighting", "covariance", False),
        ("basis", "gradient", False),
    ],
)
def test_the_dry_run_comes_first_only_if_the_initialisation_needs_no_more_memory_than_a_step(option, value, first):
    method, unet = AdapterOptions(rank=4, inner_r=2, **{option: value}).create(), tiny_pipeline().unet
    method.add(unet, ["to_q"], torch.Generator())
    assert method.prepare_dry_run(unet, "default") == first


class Started(Exception):
    """The adapter is initialised, and its tensors are the argument."""


def test_an_adapter_initialised_after_the_dry_run_is_the_one_initialised_before_it(flags, monkeypatch):
    def stop(training):
        states = {name: model.state_dict() for name, model in training.components.items()}
        raise Started({(name, key): tensor for name in states for key, tensor in states[name].items() if "nora_" in key})

    monkeypatch.setattr(dreambooth_nora.SubjectTraining, "add_class_images", stop)
    monkeypatch.setattr(dreambooth_nora.SubjectTraining, "sample_base_model", lambda *_: [])
    calls, tensors = [], []
    for name in ("run_dry_run", "runs_on_subject"):
        work = getattr(dreambooth_nora, name)
        monkeypatch.setattr(dreambooth_nora, name, lambda *given, name=name, work=work: (calls.append(name), work(*given))[1])
    for number in (1, 2):
        if number == 2:
            monkeypatch.setattr(method_named(DEFAULT), "prepare_dry_run", lambda *_: False)
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(Started) as started:
            dreambooth_nora.main(parse_options([*flags, "--output_dir", f"{flags[flags.index('--output_dir') + 1]}{number}"]))
        tensors.append(started.value.args[0])
    assert calls == ["run_dry_run", "runs_on_subject", "runs_on_subject", "run_dry_run"]
    after, before = tensors
    assert after.keys() == before.keys()
    assert any(key.endswith("nora_B.default") and tensor.any() for (_, key), tensor in after.items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())


def test_calibration_that_runs_out_of_memory_leads_to_settings_that_fit(flags, monkeypatch):
    def runs_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(dreambooth_nora.adapters, "start", runs_out)
    fitting = FallbackStep({"train_batch_size": 1, "gradient_accumulation_steps": 4}, True, 10**9, 0.5)
    monkeypatch.setattr(memory_fallback, "find_fitting", lambda *_: [fitting])
    with pytest.raises(
        InputError, match=r"does not fit into memory: CUDA out of memory.*--train_batch_size 1 --gradient_accumulation_steps 4"
    ):
        with_memory_fallback(dreambooth_nora.main, parse_options(flags), "training.dreambooth_nora")


class Images(Dataset):
    """Seven labelled images as a model takes them."""

    def __len__(self):
        return 7

    def __getitem__(self, place):
        return torch.full((3, 2, 2), float(place)), place


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (64, [7])])
def test_a_classifier_is_calibrated_in_batches_no_larger_than_the_trainings(batch_size, sizes):
    calibration = CalibrationBatches(Images(), batch_size, has_bar=False)
    batches = list(calibration)
    assert len(list(calibration)) == len(batches)
    assert [len(batch) for batch in batches] == sizes
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == list(range(7))
