"""The flags of the optimisation, where they are read: at the optimiser, its schedule, the loop, the loss and what is trained."""

import math

import pytest
import torch
from safetensors.torch import load_file
from subject_runs import EVERYTHING, are_equal, parameters
from tiny_pipeline import image

from pipelines.adapter_options import AdapterOptions
from pipelines.subject.base_model import load_base_model
from training.engine.loop import LoopOptions
from training.runs.record import list_checkpoints

RATE = 0.01


def state(run):
    """What the run's last checkpoint holds beside the trained parameters."""
    return torch.load(list_checkpoints(run.checkpoints)[-1] / "state.pt", weights_only=True)


def test_the_optimiser_has_the_settings_of_the_flags(trainer, tmp_path):
    flags = "--learning_rate 0.02 --adam_beta1 0.5 --adam_beta2 0.625 --adam_weight_decay 0.25 --adam_epsilon 1e-3"
    (group,) = trainer.prepare(tmp_path / "run", *flags.split()).trainable.optimizer.param_groups
    told = {name: group[name] for name in ("initial_lr", "betas", "weight_decay", "eps")}
    assert told == {"initial_lr": 0.02, "betas": (0.5, 0.625), "weight_decay": 0.25, "eps": 1e-3}


@pytest.mark.parametrize(
    ("flags", "shares"),
    [
        ("--lr_scheduler linear --lr_warmup_steps 3", [0, 1 / 3, 2 / 3, 1]),
        ("--lr_warmup_steps 0 --lr_scheduler polynomial --lr_power 2", [(1 - step / 4) ** 2 for step in range(4)]),
        (
            "--lr_warmup_steps 0 --lr_scheduler cosine_with_restarts --lr_num_cycles 2",
            [0.5 * (1 + math.cos(math.pi * (2 * step / 4 % 1))) for step in range(4)],
        ),
    ],
    ids=["linear", "polynomial", "cosine_with_restarts"],
)
def test_the_schedule_has_the_settings_of_the_flags(trainer, tmp_path, flags, shares):
    prepared = trainer.prepare(tmp_path / "run", "--learning_rate", str(RATE), *flags.split())
    assert prepared.rates(4) == pytest.approx([RATE * share for share in shares], abs=1e-6)


def test_the_loop_has_the_settings_of_the_flags(trainer, tmp_path):
    expected = {"max_train_steps": 7, "seed": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.25}
    expected |= {"checkpointing_steps": 5, "checkpoints_total_limit": 3}
    prepared = trainer.prepare(
        tmp_path / "run", *(str(word) for name, value in expected.items() for word in (f"--{name}", value))
    )
    assert prepared.loop == LoopOptions(**expected)


def test_min_snr_weakens_the_loss_of_noise_levels_with_much_signal(trainer, plain, tmp_path):
    weighted = trainer.prepare(tmp_path / "run", "--snr_gamma", "0.1").trainable
    with torch.no_grad():
        losses = [
            [trainable.module(**plain.trainable.batch_at(index)) for index in range(4)]
            for trainable in (weighted, plain.trainable)
        ]
    assert all(ours < theirs for ours, theirs in zip(*losses, strict=True))


def test_a_noise_offset_adds_one_value_to_each_channel_of_the_noise(trainer, plain, tmp_path):
    offset = trainer.prepare(tmp_path / "run", "--noise_offset", "0.5")
    for ours, theirs in zip(offset.batches(), plain.batches(), strict=True):
        added = ours["noise"] - theirs["noise"]
        torch.testing.assert_close(added, added[..., :1, :1].expand_as(added))
        assert added.any()
        assert torch.equal(ours["latents"], theirs["latents"])


def test_another_seed_gives_other_batches(trainer, plain, tmp_path):
    other = trainer.prepare(tmp_path / "run", "--seed", "1")
    assert not torch.equal(other.trainable.batch_at(0)["noise"], plain.trainable.batch_at(0)["noise"])


def test_the_adapter_has_the_shape_and_initialisation_of_the_flags(trainer, tmp_path):
    flags = "--rank 5 --inner_r 3 --alpha 4 --dropout 0.5 --inner_init gaussian --preserve_output --target_modules to_q ff.net.2"
    prepared = trainer.prepare(tmp_path / "run", *flags.split())
    config = prepared.trainable.module.unet.peft_config["default"]
    assert (config.r, config.inner_r, config.alpha, config.dropout, config.preserve_output) == (5, 3, 4, 0.5, True)
    trained = prepared.trained()
    assert {name.rsplit(".nora", 1)[0].rsplit("attn", 1)[-1][2:] for name in trained if "attn" in name} == {"to_q"}
    assert any("ff.net.2" in name for name in trained)
    assert all(values.any() for values in trained.values())


@pytest.mark.parametrize("method", ["nora", "lora", "dora"])
def test_the_same_flags_initialise_the_same_adapter_and_another_seed_another_one(trainer, tmp_path, method):
    flags = ("--method", method, "--inner_init", "gaussian", "--train_text_encoder")
    first, same, other = (trainer.prepare(tmp_path / name, *flags, "--seed", name[-1]).trained() for name in ("a1", "b1", "c2"))
    assert are_equal(first, same)
    assert not are_equal(first, other)


def test_the_first_step_of_adam_has_the_size_of_each_factors_learning_rate(trainer, tmp_path):
    flags = f"--max_train_steps 1 --lr_scheduler constant --train_text_encoder --learning_rate {RATE}"
    flags += " --adam_epsilon 1e-20 --text_encoder_lr 1e-4 2e-4 --lora_plus_ratio 4"
    moved = parameters(trainer.train(tmp_path / "run", *flags.split()))
    b_like = {name: values for name, values in moved.items() if "nora_inner_B" in name}
    part_rates = {"unet.": RATE, "text_encoders.0.": 1e-4, "text_encoders.1.": 2e-4}
    assert all(any(name.startswith(part) for name in b_like) for part in part_rates)
    for name, values in b_like.items():
        rate = 4 * next(rate for part, rate in part_rates.items() if name.startswith(part))
        torch.testing.assert_close(values.abs().max(), torch.tensor(rate), rtol=1e-3, atol=0)


def test_text_encoders_are_neither_moved_nor_decayed_after_their_last_step(trainer, tmp_path):
    flags = "--max_train_steps 2 --train_text_encoder --stop_text_encoder_training 1 --gradient_accumulation_steps 2"
    flags += " --adam_weight_decay 0.5 --lr_warmup_steps 0 --lr_scheduler constant --checkpointing_steps 1"
    run = trainer.train(tmp_path / "run", *flags.split())
    first, last = parameters(run, 0), parameters(run)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {name for name in first if name.startswith("unet")}
    moved = [values.any() for name, values in first.items() if "text_encoders" in name and "inner_B" in name]
    assert moved
    assert all(moved)


def test_the_moving_average_is_exported(everything):
    run = everything.run
    averages = {tuple(values.flatten().tolist()) for values in state(run)["ema"]["shadow_params"]}
    exported = [load_file(path) for path in (run.path / "adapter" / "full").rglob("adapter_model.safetensors")]
    found = {tuple(values.flatten().tolist()) for file in exported for name, values in file.items() if "nora_inner_" in name}
    assert averages
    # The frozen starts are in the file too.
    assert averages <= found
    assert not averages & {tuple(values.flatten().tolist()) for name, values in parameters(run).items() if "inner_B" in name}


def test_training_continues_without_the_moving_average(trainer, tmp_path):
    plain, averaged = (
        parameters(trainer.train(tmp_path / name, "--max_train_steps", "2", "--validation_steps", "1", *more))
        for name, more in {"plain": [], "averaged": ["--use_ema", "--ema_decay", "0.5"]}.items()
    )
    assert are_equal(plain, averaged)


def assert_same_end(first, second):
    """Whether both runs end in the same parameters, and with the same optimiser, schedule and average."""
    assert are_equal(parameters(first), parameters(second))
    states = [state(first), state(second)]
    # `assert_close` compares no strings.
    decompositions = [each["method"].pop("decomposition", None) for each in states]
    assert decompositions[0] == decompositions[1]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_run_with_all_features_that_is_interrupted_and_resumed_equals_an_uninterrupted_one(trainer, everything, tmp_path):
    resumed = trainer.resume(everything.run, tmp_path / "resumed", *EVERYTHING)
    assert_same_end(resumed, everything.run)


@pytest.mark.parametrize(
    "flags",
    [
        "--method lora --optimizer prodigy --learning_rate 1 --train_text_encoder --dropout 0.1",
        "--use_8bit_adam --noise_offset 0.5 --do_edm_style_training --lora_plus_ratio 3",
    ],
    ids=["prodigy", "the rest"],
)
def test_a_run_with_every_kind_of_loss_and_optimiser_learns_and_resumes_exactly(trainer, tmp_path, flags):
    whole = trainer.train(tmp_path / "whole", *flags.split())
    resumed = trainer.resume(whole, tmp_path / "resumed", *flags.split())
    assert_same_end(resumed, whole)
    assert any(values.any() for name, values in parameters(whole).items() if "inner_B" in name or "lora_B" in name)


@pytest.mark.parametrize(("precision", "method"), [("fp16", "nora"), ("bf16", "dora"), ("bf16", "lora")])
def test_half_precision_trains_float32_parameters_that_stay_finite(trainer, tmp_path, precision, method):
    flags = f"--max_train_steps 2 --lr_warmup_steps 0 --method {method} --mixed_precision {precision}"
    run = trainer.run(tmp_path / "run", *flags.split())
    assert run.status().state == "done"
    trained = parameters(run)
    for values in trained.values():
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
    factor = AdapterOptions(method=method, lora_plus_ratio=3.0).create().learning_rate_factor
    assert all(values.any() for name, values in trained.items() if factor(name) == 3)


def test_an_adapter_is_trained_on_a_base_model_in_4_bits_and_loads_on_the_plain_one(trainer, tiny_model, tmp_path):
    flags = "--max_train_steps 2 --lr_warmup_steps 0 --learning_rate 0.1 --quantize nf4 --loftq_start"
    run = trainer.run(tmp_path / "run", *flags.split())
    assert run.status().state == "done"
    errors = run.status().quantization_errors
    assert list(errors) == ["unet", "text_encoder", "text_encoder_2"]
    card = (run.path / "README.md").read_text()
    assert all(f"{name} {error:.1%}" in card for name, error in errors.items())
    assert "the result differs from training by W - Q(W)" in card
    assert not list((run.path / "calibration").glob("unquantized*"))
    pipe = load_base_model(str(tiny_model))
    before = image(pipe)
    pipe.load_lora_weights(run.path / "diffusers")
    assert not torch.equal(image(pipe), before)
