"""The trainer's options: resolved, checked, and the same on the command line."""

import json

import pytest

from pipelines.adapter_options import AdapterOptions
from pipelines.built_in import BUILT_IN, BUILT_IN_MODEL, CLIP_WEIGHTS
from pipelines.errors import InputError
from training.options import SubjectOptions, parse_options
from training.options.data import SAMPLE_PROMPT, SAMPLE_SUBJECT, DataOptions
from training.options.fewshot import FewShotOptimisationOptions, parse_fewshot_options
from training.options.model import ModelOptions
from training.options.optimisation import OptimisationOptions
from training.options.output import OutputOptions
from training.options.validation import BUILT_IN_CANDIDATES, CANDIDATES, ValidationOptions


def test_without_flags_the_built_in_model_is_trained_on_the_bundled_subject():
    options = parse_options([])
    assert options.model.pretrained_model_name_or_path == BUILT_IN
    assert parse_options(["--pretrained_model_name_or_path", str(BUILT_IN_MODEL)]) == options
    assert options.data.instance_data_dir == str(SAMPLE_SUBJECT)
    assert options.data.instance_prompt == SAMPLE_PROMPT
    assert options.data.size_conditioning == "target"
    assert options.adapter.method == "nora"
    assert options.output.validation_prompt[0] == SAMPLE_PROMPT
    assert len(options.output.validation_prompt) > 1


def test_the_defaults_do_not_depend_on_the_working_directory():
    assert BUILT_IN_MODEL.is_absolute()
    assert SAMPLE_SUBJECT.is_absolute()


def test_flags_are_parsed_into_their_groups():
    flags = (
        "--method lora --rank 8 --learning_rate 1e-4 --instance_prompt dog --validation_prompt a b --train_text_encoder --seed 3"
    )
    options = parse_options(flags.split())
    assert (options.adapter.method, options.adapter.rank, options.adapter.train_text_encoder) == ("lora", 8, True)
    assert (options.optimisation.learning_rate, options.optimisation.seed) == (1e-4, 3)
    assert options.output.validation_prompt == ["a", "b"]


def test_other_models_than_the_built_in_one_are_conditioned_on_the_original_size():
    assert SubjectOptions(model=ModelOptions("owner/model")).data.size_conditioning == "image"


def test_attention_is_adapted_and_on_the_built_in_model_convolutions_too():
    sdxl = parse_options(["--pretrained_model_name_or_path", "owner/model"]).adapter.target_modules
    assert sdxl == ["to_q", "to_k", "to_v", "to_out.0"]
    assert {*sdxl, "conv1", "conv2"} < set(parse_options([]).adapter.target_modules)


def validation(*flags):
    options = parse_options(list(flags)).validation
    return options.image_scorer, options.num_candidate_images


def test_the_default_image_scorer_is_the_built_in_clip_for_the_built_in_model_and_else_the_base_model(tmp_path, monkeypatch):
    other = ("--pretrained_model_name_or_path", "owner/model")
    monkeypatch.setattr("training.options.validation.BUILT_IN_CLIP", tmp_path)
    assert validation() == ("base", BUILT_IN_CANDIDATES)
    (tmp_path / CLIP_WEIGHTS).touch()
    assert validation() == ("mini", BUILT_IN_CANDIDATES)
    assert validation(*other) == ("base", CANDIDATES)
    assert CANDIDATES < BUILT_IN_CANDIDATES
    assert validation(*other, "--image_scorer", "mini", "--num_candidate_images", "0") == ("mini", 0)


def test_the_learning_rate_fits_method_and_model():
    built_in, sdxl = (
        {m: parse_options(["--method", m, *more]).optimisation.learning_rate for m in ("nora", "lora", "vera")}
        for more in ([], ["--pretrained_model_name_or_path", "owner/model"])
    )
    assert sdxl["nora"] < sdxl["vera"]
    assert all(built_in[method] > rate for method, rate in sdxl.items())


@pytest.mark.parametrize(
    ("flags", "divisor"),
    [
        ("--inner_r 24 --rank 48", 3),
        ("--inner_r 24 --rank 48 --alpha 8", 1),
        ("--inner_r 8 --alpha 16", 2),
        ("--inner_r 4", 1),
        ("--inner_r 24 --inner_form full", 1),
    ],
)
def test_the_default_rate_of_nora_falls_with_the_size_of_a_step_of_adamw(flags, divisor):
    usual = parse_options([]).optimisation.learning_rate
    assert parse_options(flags.split()).optimisation.learning_rate == pytest.approx(usual / divisor)
    for optimizer, expected in (("AdamW", divisor), ("Muon", 1)):
        parsed = [parse_fewshot_options([*each, "--optimizer", optimizer]) for each in ([], flags.split())]
        assert parsed[1].learning_rate("nora") == pytest.approx(parsed[0].learning_rate("nora") / expected)


def test_nora_classifies_with_muon_on_the_built_in_model_and_all_else_with_adamw_unless_an_optimiser_is_given():
    options = parse_fewshot_options(["--method", "nora", "lora"])
    assert [options.optimizer(name) for name in ("nora", "lora")] == ["Muon", "AdamW"]
    assert parse_fewshot_options(["--model", "ViT-B-16", "--pretrained", "random"]).optimizer("nora") == "AdamW"
    for given, name in (("adamw", "AdamW"), ("MUON", "Muon")):
        assert parse_fewshot_options(["--optimizer", given]).optimizer("nora") == name
    assert parse_options([]).optimisation.optimizer == "AdamW"


def test_prodigy_has_a_learning_rate_of_one_with_every_method_and_model():
    assert parse_options(["--optimizer", "Prodigy"]).optimisation.learning_rate == 1
    assert parse_options(["--optimizer", "prodigy", "--learning_rate", "0.5"]).optimisation.learning_rate == 0.5


@pytest.mark.parametrize("flag", ["--text_encoder_lr 1e-5", "--stop_text_encoder_training 3"])
def test_options_of_text_encoders_need_text_encoders_that_are_trained(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_options(flag.split())
    assert "needs --train_text_encoder" in capsys.readouterr().err.splitlines()[-1]
    parse_options([*flag.split(), "--train_text_encoder"])


def test_resolved_options_are_plain_values():
    assert json.loads(json.dumps(SubjectOptions().to_dict())) == SubjectOptions().to_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelOptions(""), r"hub name or a folder, got an empty text"),
        (lambda: DataOptions("elsewhere"), r"need --instance_prompt"),
        (lambda: DataOptions(instance_prompt=" "), r"instance_prompt must not be empty"),
        (lambda: DataOptions(resolution=60), r"resolution must be a multiple of 8, got 60"),
        (lambda: DataOptions(resolution=0), r"resolution must be at least 8, got 0"),
        (lambda: OptimisationOptions(max_train_steps=0), r"max_train_steps must be at least 1, got 0"),
        (lambda: OptimisationOptions(learning_rate=0.0), r"learning_rate must be above 0, got 0.0"),
        (lambda: OptimisationOptions(learning_rate=float("nan")), r"learning_rate must be above 0, got nan"),
        (lambda: OptimisationOptions(snr_gamma=-1.0), r"snr_gamma must be above 0, got -1.0"),
        (lambda: OptimisationOptions(lr_scheduler="spiral"), r"lr_scheduler must be one of .*cosine.*got 'spiral'"),
        (lambda: OptimisationOptions(adam_beta2=1.0), r"adam_beta2 must be in \[0, 1\), got 1.0"),
        (lambda: OptimisationOptions(lr_scheduler="piecewise_constant"), r"lr_scheduler must be one of .*polynomial"),
        (lambda: OptimisationOptions(ema_decay=1.0), r"ema_decay must be in \[0, 1\), got 1.0"),
        (lambda: OptimisationOptions(noise_offset=-0.1), r"noise_offset must be at least 0, got -0.1"),
        (lambda: AdapterOptions(lora_plus_ratio=0.0), r"lora_plus_ratio must be above 0, got 0.0"),
        (lambda: OptimisationOptions(stop_text_encoder_training=0), r"stop_text_encoder_training must be at least 1, got 0"),
        (lambda: OptimisationOptions(text_encoder_lr=[1e-4, 0.0]), r"one or two learning rates above 0, got 0.0001 0.0"),
        (
            lambda: OptimisationOptions(text_encoder_lr=[1e-4, 1e-4, 1e-4]),
            r"one or two learning rates above 0, got 0.0001 0.0001",
        ),
        (lambda: OptimisationOptions(optimizer="sgd"), r"optimizer must be one of AdamW, Muon, Prodigy, got 'sgd'"),
        (lambda: OptimisationOptions(optimizer="Prodigy", use_8bit_adam=True), r"use_8bit_adam needs --optimizer AdamW"),
        (lambda: OptimisationOptions(optimizer="muon", use_8bit_adam=True), r"needs --optimizer AdamW, got Muon"),
        (lambda: FewShotOptimisationOptions(optimizer="Prodigy"), r"optimizer must be one of AdamW, Muon, got 'Prodigy'"),
        (lambda: OptimisationOptions(optimizer="Prodigy", text_encoder_lr=[1e-4]), r"Prodigy adapts one learning rate"),
        (
            lambda: SubjectOptions(
                adapter=AdapterOptions(lora_plus_ratio=4.0), optimisation=OptimisationOptions(optimizer="Prodigy")
            ),
            r"Prodigy adapts one learning rate",
        ),
        (
            lambda: OptimisationOptions(do_edm_style_training=True, snr_gamma=5.0),
            r"snr_gamma cannot be used with EDM-style training",
        ),
        (lambda: OptimisationOptions(seed=-1), r"seed must be at least 0, got -1"),
        (lambda: OutputOptions(validation_steps=0), r"validation_steps must be at least 1, got 0"),
        (lambda: ValidationOptions(num_candidate_images=-1), r"num_candidate_images must be at least 0, got -1"),
        (lambda: ValidationOptions(image_scorer=" "), r"image_scorer must be 'mini', 'base', .*got an empty text"),
        (lambda: OutputOptions(resume_from_checkpoint="latest"), r"needs --output_dir"),
    ],
)
def test_a_wrong_value_is_refused_with_the_range(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "dreamfusion"], "method must be one of"),
        (["--rank", "eight"], "invalid int value"),
        (["--no_such_flag"], "no_such_flag"),
        (["--mixed_precision", "fp8"], "invalid choice"),
        (["--resume_from_checkpoint", "step-3"], "invalid choice"),
    ],
)
def test_a_wrong_flag_ends_with_one_line_and_exit_code_two(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_options(flags)
    assert message in capsys.readouterr().err.splitlines()[-1]
