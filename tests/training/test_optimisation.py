"""The flags of the optimisation, in whole runs on a tiny random model: what they promise is seen in the numbers they leave."""

import math
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tiny_pipeline import picture

from pipelines.adapter_options import AdapterOptions
from pipelines.subject.base_model import load_base_model
from pipelines.subject.generate import Sampling
from training import dreambooth_nora
from training.options import parse_options
from training.runs.record import list_checkpoints
from training.subject import samples

FAST = "--rank 6 --inner_r 2 --target_modules to_v --train_batch_size 2 --checkpointing_steps 2 --validation_steps 2"
FAST += " --heldout_image none --heldout_steps 2 --no_certify"
RATE = 0.01


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leave out the pictures; and accelerate keeps the precision of a process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=1))
    picture = Image.new("RGB", (16, 16))
    monkeypatch.setattr(samples, "generate", lambda pipeline, prompts, *_: [picture] * len(prompts))


@pytest.fixture
def trained(tiny_model, pictures_dir, tmp_path):
    """Runs the trainer with the flags given, in a folder of that name."""

    def run(name, flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        places = ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures_dir)]
        places += ["--instance_prompt", "sks toy", "--validation_prompt", "sks toy", "--output_dir", str(tmp_path / name)]
        return dreambooth_nora.main(parse_options([*FAST.split(), *places, "--learning_rate", str(RATE), *flags.split()]))

    return run


def numbers(run, checkpoint=-1):
    return load_file(list_checkpoints(run.checkpoints)[checkpoint] / "trained.safetensors")


def rates(run):
    return [line["lr"] for line in run.metrics() if "lr" in line]


ONE_STEP = "--max_train_steps 1 --lr_scheduler constant --train_text_encoder"


def test_adams_first_step_is_as_long_as_each_factors_rate(trained):
    more = " --adam_epsilon 1e-20 --text_encoder_lr 1e-4 2e-4 --lora_plus_ratio 4"
    moved = numbers(trained("run", ONE_STEP + more))
    b_like = {name: values for name, values in moved.items() if "nora_inner_B" in name}
    part_rates = {"unet.": RATE, "text_encoders.0.": 1e-4, "text_encoders.1.": 2e-4}
    assert all(any(name.startswith(part) for name in b_like) for part in part_rates)
    for name, values in b_like.items():
        rate = 4 * next(rate for part, rate in part_rates.items() if name.startswith(part))
        torch.testing.assert_close(values.abs().max(), torch.tensor(rate), rtol=1e-3, atol=0)


def test_text_encoders_are_neither_moved_nor_decayed_after_their_last_step(trained):
    flags = "--max_train_steps 4 --train_text_encoder --stop_text_encoder_training 1 --gradient_accumulation_steps 2"
    run = trained(
        "run", f"{flags} --adam_weight_decay 0.5 --lr_warmup_steps 0 --checkpointing_steps 1 --checkpoints_total_limit 9"
    )
    first, last = numbers(run, 0), numbers(run)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {name for name in first if name.startswith("unet")}
    moved = [values.any() for name, values in first.items() if "text_encoders" in name and "inner_B" in name]
    assert moved
    assert all(moved)


def test_a_moving_average_is_what_is_exported_and_training_goes_on_without_it(trained):
    plain = numbers(trained("plain", "--max_train_steps 4"))
    run = trained("averaged", "--max_train_steps 4 --use_ema --ema_decay 0.5")
    for name, values in numbers(run).items():
        assert torch.equal(values, plain[name])
    state = torch.load(list_checkpoints(run.checkpoints)[-1] / "state.pt", weights_only=True)
    exported = load_file(run.path / "adapter" / "full" / "unet" / "adapter_model.safetensors")
    averages = {tuple(values.flatten().tolist()) for values in state["ema"]["shadow_params"]}
    found = {tuple(values.flatten().tolist()) for name, values in exported.items() if "nora_inner_" in name}
    assert averages == found
    assert not averages & {tuple(values.flatten().tolist()) for name, values in plain.items() if "inner_B" in name}


def test_polynomial_decay_has_the_power_given(trained):
    run = trained("run", "--max_train_steps 4 --lr_warmup_steps 0 --lr_scheduler polynomial --lr_power 2")
    assert rates(run) == pytest.approx([RATE * (1 - step / 4) ** 2 for step in range(4)], abs=1e-6)


def test_cosine_restarts_as_often_as_asked(trained):
    run = trained("run", "--max_train_steps 4 --lr_warmup_steps 0 --lr_scheduler cosine_with_restarts --lr_num_cycles 2")
    assert rates(run) == pytest.approx([RATE * 0.5 * (1 + math.cos(math.pi * (2 * step / 4 % 1))) for step in range(4)])


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer prodigy --learning_rate 1 --train_text_encoder",
        "--use_8bit_adam --noise_offset 0.5 --do_edm_style_training --lora_plus_ratio 3",
    ],
    ids=["prodigy", "the rest"],
)
def test_a_run_with_every_kind_of_loss_and_optimiser_learns_and_resumes_exactly(trained, flags, monkeypatch):
    whole = trained("whole", f"--max_train_steps 4 {flags}")
    at = dreambooth_nora.TrainingBatches.__call__

    def stop(batches, index):
        if index == 3:
            raise KeyboardInterrupt
        return at(batches, index)

    monkeypatch.setattr(dreambooth_nora.TrainingBatches, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        trained("halves", f"--max_train_steps 4 {flags}")
    monkeypatch.setattr(dreambooth_nora.TrainingBatches, "__call__", at)
    halves = trained("halves", f"--max_train_steps 4 {flags} --resume_from_checkpoint latest")
    assert all(torch.equal(values, numbers(halves)[name]) for name, values in numbers(whole).items())
    assert any(values.any() for name, values in numbers(whole).items() if "inner_B" in name)


def test_a_noise_offset_is_in_the_noise_that_is_learned(trained):
    plain, offset = (numbers(trained(name, f"--max_train_steps 2 --noise_offset {name}")) for name in ("0", "0.5"))
    assert any(not torch.equal(values, offset[name]) for name, values in plain.items())


@pytest.mark.parametrize(("precision", "method"), [("fp16", "nora"), ("bf16", "dora"), ("fp16", "lora")])
def test_half_precision_trains_numbers_of_single_precision_that_stay_finite(trained, precision, method):
    trained_numbers = numbers(
        trained("run", f"--max_train_steps 2 --lr_warmup_steps 0 --method {method} --mixed_precision {precision}")
    )
    for values in trained_numbers.values():
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
    factor = AdapterOptions(method=method, lora_plus_ratio=3.0).create().learning_rate_factor
    assert all(values.any() for name, values in trained_numbers.items() if factor(name) == 3)


def test_the_options_that_a_run_records_make_the_same_run_again(trained, tmp_path):
    run = trained("first", "--max_train_steps 2 --lr_warmup_steps 0 --random_flip --dropout 0.1 --use_ema --train_text_encoder")
    again = dreambooth_nora.main(
        parse_options(["--options_file", str(run.path / "options.json"), "--output_dir", str(tmp_path / "second")])
    )
    for part in ("unet", "text_encoder"):
        file = f"adapter/full/{part}/adapter_model.safetensors"
        assert (run.path / file).read_bytes() == (again.path / file).read_bytes()


def test_an_adapter_is_trained_on_a_base_model_in_4_bits_and_loads_on_the_plain_one(trained, tiny_model):
    run = trained("run", "--max_train_steps 2 --lr_warmup_steps 0 --quantize nf4")
    assert run.status()["state"] == "done"
    pipe = load_base_model(str(tiny_model))
    before = picture(pipe)
    pipe.load_lora_weights(run.path / "diffusers")
    assert not torch.equal(picture(pipe), before)
