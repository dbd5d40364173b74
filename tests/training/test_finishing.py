"""What a run hands on, whole: the certificate, the suggestion, leave-one-out."""

import json
from functools import partial

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from pipelines.subject.generate import Sampling
from training import dreambooth_nora
from training.options import parse_options
from training.run import RunDirectory

FAST = "--rank 6 --inner_r 2 --target_modules to_v --max_train_steps 4 --train_batch_size 2 --lr_warmup_steps 1"
FAST += " --learning_rate 0.1 --checkpointing_steps 2 --validation_steps 2 --heldout_steps 1 --instance_prompt toy"
FAST += " --validation_prompt toy"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Few inference steps, and the precision of no other test's run."""
    monkeypatch.setattr(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def trained(tiny_model, pictures_dir, tmp_path):
    """Runs the trainer with the flags given, in a folder of that name."""

    def run(name, *more):
        given = ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures_dir)]
        return dreambooth_nora.main(parse_options([*FAST.split(), *given, "--output_dir", str(tmp_path / name), *more]))

    return run


def test_a_run_is_certified_by_default(trained):
    run = trained("run", "--heldout_image", "none")
    said = json.loads((run.path / "certificate.json").read_text())
    assert said["passed"]
    assert said["effect"] > 0
    scored = [line for line in run.metrics() if "subject_score" in line]
    assert [line["step"] for line in scored] == [0, 2, 4]
    assert all({"prompt_score", "copy_score"} <= line.keys() for line in scored)


def adapter_bytes(run):
    return (run.path / "adapter" / "full" / "unet" / "adapter_model.safetensors").read_bytes()


def test_leave_one_out_measures_each_picture_and_does_not_change_what_is_learned(trained):
    plain = trained("plain", "--heldout_image", "none", "--no_certify")
    folded = trained("folded", "--no_certify")
    assert adapter_bytes(plain) == adapter_bytes(folded)
    folds = sorted(path.name for path in (folded.path / "folds").iterdir())
    assert folds == ["0", "1", "2"]
    for name in folds:
        lines = RunDirectory(folded.path / "folds" / name).metrics()
        assert [line["step"] for line in lines if "heldout_loss" in line] == [0, 1, 2]
    said = json.loads((folded.path / "suggestion.json").read_text())
    assert [point["step"] for point in said["curve"]] == [0, 1, 2]


def test_an_interrupted_leave_one_out_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    whole = trained("whole", "--no_certify")
    fold_of = dreambooth_nora.leave_one_out

    def killed(accelerator, run, loss, folds, *rest):
        fold_of(accelerator, run, loss, list(folds)[:2], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(dreambooth_nora, "leave_one_out", killed)
    with pytest.raises(KeyboardInterrupt):
        trained("halves", "--no_certify")
    monkeypatch.setattr(dreambooth_nora, "leave_one_out", fold_of)
    before = (tmp_path / "halves" / "folds" / "0" / "metrics.jsonl").read_bytes()
    (tmp_path / "halves" / "options.json").unlink()
    halves = trained("halves", "--no_certify")
    assert (halves.path / "folds" / "0" / "metrics.jsonl").read_bytes() == before
    assert adapter_bytes(whole) == adapter_bytes(halves)
    curves = [json.loads((run.path / "suggestion.json").read_text())["curve"] for run in (whole, halves)]
    assert curves[0] == curves[1]


def test_training_far_too_long_suggests_an_earlier_adapter_exports_it_and_warns(trained, monkeypatch):
    losses = iter([1.0, 0.5, 0.6, 0.8, 0.9])
    seen = iter([1.0, 0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr("training.watching.measured_losses", lambda *_: {"heldout_loss": next(losses), "seen_loss": next(seen)})
    run = trained("run", "--heldout_image", "0.png", "--no_certify")
    said = json.loads((run.path / "suggestion.json").read_text())
    assert (said["step"], said["last"], said["adapter"]) == (1, 4, "adapters/step-0000001")
    assert "Overfitting" in said["warnings"][0]
    assert run.status()["suggested_step"] == 1
    suggested = load_file(run.path / "suggested" / "diffusers" / "pytorch_lora_weights.safetensors")
    last = load_file(run.path / "diffusers" / "pytorch_lora_weights.safetensors")
    assert suggested.keys() == last.keys()
    assert any((suggested[name] - last[name]).abs().max() > 1e-3 for name in last)
