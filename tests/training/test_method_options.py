"""The options of adapter methods as flags of both recipes, and the method in the loop."""

import dataclasses
import itertools
import logging
import re
import typing
from pathlib import Path

import pytest
import torch
from regression import batch_at, trainable, trained
from tiny_options import full_precision_methods
from tiny_pipeline import tiny_pipeline
from torch import nn

from nora_vision.factors import low_rank_factors
from pipelines.adapter_method import ADAPTER_NAME, MethodTraining, tuner_layers
from pipelines.adapter_options import AdapterOptions, flag_of
from pipelines.errors import InputError
from pipelines.methods import method_named, method_names
from pipelines.optimizers import OptimizerSettings
from pipelines.subject import adapters
from training.fewshot.adapter_training import to_train
from training.options import parse_options
from training.options.fewshot import FewShotMethodOptions, parse_fewshot_options


@pytest.mark.parametrize(("task", "group"), [("subject", AdapterOptions), ("few-shot", FewShotMethodOptions)])
@pytest.mark.parametrize("method", method_names())
def test_every_option_of_a_method_is_a_flag_with_a_help_that_names_the_method(method, task, group):
    fields = {field.name: field for field in dataclasses.fields(group)}
    for option in dataclasses.fields(method_named(method).Options):
        field = fields[flag_of(option, task)]
        assert method_named(method).title in field.metadata["help"]
        assert option.metadata["help"] in field.metadata["help"]


def test_each_method_of_a_comparison_has_its_own_default_rank():
    options = parse_fewshot_options(
        ["--method", "nora", "lora", "vera", "--rank", "9", "--inner_r", "3", "--lora_rank", "5", "--vera_rank", "7"]
    )
    assert [options.adapter(name).rank for name in ("nora", "lora", "vera")] == [9, 5, 7]


@pytest.mark.parametrize("model", [["--model", "mini"], ["--model", "ViT-B-16", "--pretrained", "openai"]], ids=" ".join)
@pytest.mark.parametrize("method", full_precision_methods())
def test_each_method_of_a_comparison_has_its_own_defaults_whatever_other_methods_exist(method, model):
    options = parse_fewshot_options(["--method", *full_precision_methods(), *model])
    kind = method_named(method)
    defaults = kind.defaults("few-shot", options.model.is_built_in).options
    assert options.adapter(method).create().options == kind.Options(**defaults)


EXTREMES = {
    "int": [-1, 0, 1, 2, 3, 5, 64, 2**31 - 1],
    "float": [-1.0, 0.0, 0.5, 1.0, 1e300],
    "str": ["", "x", "0/1", "1/2", "2/1"],
    "bool": [False, True],
}


def some_values(method, option):
    hint = typing.get_type_hints(method_named(method).Options)[option.name]
    kinds = [kind.__name__ for kind in (typing.get_args(hint) or [hint])]
    return [*option.metadata.get("choices", ()), *(value for kind in kinds for value in EXTREMES.get(kind, ()))]


@pytest.mark.parametrize("method", method_names())
def test_options_that_are_accepted_make_a_configuration(method):
    # PEFT and nora_vision check their configurations too, but only after seconds of imports.
    kind, accepted = method_named(method), 0
    for first, second in itertools.combinations_with_replacement(dataclasses.fields(kind.Options), 2):
        for values in itertools.product(some_values(method, first), some_values(method, second)):
            given = dict(zip((flag_of(first, "subject"), flag_of(second, "subject")), values, strict=True))
            try:
                options = AdapterOptions(method, **given)
            except InputError:
                continue
            accepted += 1
            options.create().config(["to_q"])
    assert accepted or not dataclasses.fields(kind.Options)


def test_an_option_that_no_chosen_method_has_is_named_with_those_that_have_it():
    (sentence,) = parse_options(["--method", "lora", "--inner_init", "gaussian", "--rank", "3"]).unused()
    assert sentence == "--inner_init gaussian is not used: it is an option of NoRA, and this run trains LoRA."
    assert parse_options(["--method", "nora", "--inner_init", "gaussian"]).unused() == []
    (sentence,) = parse_fewshot_options(["--method", "zeroshot", "lora", "--vera_rank", "7"]).method.unused()
    assert sentence.startswith("--vera_rank 7 is not used: it is an option of VeRA")


def test_an_unused_option_is_named_even_if_another_method_has_its_value_as_the_default():
    for method, rank in (("oft", "4"), ("adalora", "8")):
        (sentence,) = parse_options(["--method", method, "--rank", rank]).unused()
        assert sentence.startswith(f"--rank {rank} is not used: it is an option of")


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("--parameter_budget 5000 --rank 12", ["rank"]),
        ("--gradient_batches 3 --gradient_scale gradient", ["gradient_batches", "gradient_scale"]),
        ("--basis gradient --gradient_batches 3 --gradient_scale gradient --gradient_share 0.7", ["gradient_share"]),
        ("--basis mixed --gradient_batches 3 --gradient_scale gradient --gradient_share 0.7", []),
        ("--parameter_budget 5000 --gradient_batches 3", []),
        ("--inner_form full --inner_r 3 --lora_plus_ratio 4", ["inner_r", "lora_plus_ratio"]),
        ("--inner_form full --inner_r 3 --alpha 2", []),
        ("--inner_form symmetric --inner_r 3 --lora_plus_ratio 4", []),
        ("--method lora_one --damping 0.1", ["damping"]),
        ("--method lora_ga --lora_ga_scale unit --stable_gamma 3", ["stable_gamma"]),
    ],
)
def test_an_option_without_effect_beside_the_others_is_named(given, flags):
    sentences = parse_options(given.split()).unused()
    assert [sentence.split()[0] for sentence in sentences] == [f"--{flag}" for flag in flags]
    assert all(sentence.endswith(" with the values of the other options.") for sentence in sentences)


def test_an_option_that_one_of_several_methods_uses_is_not_named():
    given = ["--gradient_batches", "3", "--basis", "weight", "--method", "nora"]
    (sentence,) = parse_fewshot_options(given).method.unused()
    assert sentence == "--gradient_batches 3 has no effect on NoRA with the values of the other options."
    assert parse_fewshot_options([*given, "lora_one"]).method.unused() == []


@pytest.mark.parametrize("method", full_precision_methods())
def test_no_option_is_called_unused_if_none_was_given(method):
    assert parse_options(["--method", method]).unused() == []
    assert parse_fewshot_options(["--method", method]).method.unused() == []


def test_the_flag_of_a_rank_is_named_where_it_is_not_called_rank(capsys):
    (sentence,) = parse_fewshot_options(["--method", "dora", "--rank", "4"]).method.unused()
    assert sentence.endswith("and this run trains DoRA. The rank of DoRA is --lora_rank.")
    with pytest.raises(SystemExit):
        parse_fewshot_options(["--method", "hra", "--lora_rank", "3"])
    assert re.search(r"HRA: rank must be an even number .* got 3.* The rank of HRA is --lora_rank\.", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["lora_ga", "--lora_ga_direction", "up"], "lora_ga_direction must be one of ArB2r, A2rBr, ArBr, random, got 'up'"),
        (["lora_ga", "--lora_ga_scale", "big"], "lora_ga_scale must be one of stable, weight_svd, gd_scale, unit, got 'big'"),
        (["corda", "--corda_method", "both"], "corda_method must be one of ipm, kpm, got 'both'"),
        (["lora", "--dropout", "1.5"], "dropout must be in [0, 1), got 1.5"),
        (["lora", "--alpha", "0"], "alpha must be above 0, got 0.0"),
        (["psoft", "--dropout", "1.5"], "dropout must be in [0, 1), got 1.5"),
        (["randlora", "--dropout", "-1"], "dropout must be in [0, 1), got -1.0"),
        (["tinylora", "--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["nora", "--inner_r", "-1"], "inner_r must be at least 1, got -1"),
    ],
)
def test_an_option_out_of_its_range_is_refused_before_a_model_is_loaded(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_options(["--method", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("parse", [parse_options, parse_fewshot_options])
def test_the_help_says_each_default_once_and_keeps_the_lines_of_the_description(parse, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], "First line.\n\n    a command\n")
    text = capsys.readouterr().out
    assert text.startswith("usage: ")
    assert "[options]\n\nFirst line.\n\n    a command\n" in text
    assert "(default: None)" not in text
    assert "--max-grad-norm" not in text
    assert re.search(r"--max_grad_norm MAX_GRAD_NORM\n[^-]*\(default:\s+1\.0\)", text)


def test_the_recipe_says_which_options_are_not_used(tmp_path, caplog):
    from training import dreambooth_nora

    options = parse_options(f"--method lora --preserve_output --output_dir {tmp_path / 'run'}".split())
    with caplog.at_level(logging.WARNING):
        dreambooth_nora.checked(options, dreambooth_nora.accelerator_for(options))
    assert "--preserve_output True is not used" in caplog.text


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 3.0 / 4), (True, 3.0 / 4**0.5)])
def test_lora_adds_alpha_over_the_rank_or_its_root_times_b_a_in_a_layer_and_exports(use_rslora, scale):
    pipe = tiny_pipeline()
    adapters.attach(pipe, AdapterOptions("lora", rank=4, alpha=3.0, use_rslora=use_rslora))
    for layer in tuner_layers(pipe.unet).values():
        nn.init.normal_(layer.lora_B[ADAPTER_NAME].weight)
        expected = scale * layer.lora_B[ADAPTER_NAME].weight @ layer.lora_A[ADAPTER_NAME].weight
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER_NAME), expected)
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), layer.get_base_layer()(x) + x @ expected.T, atol=1e-5, rtol=1e-4)
        factors = low_rank_factors(layer, ADAPTER_NAME)
        torch.testing.assert_close(factors.up @ factors.down, expected)


def like_lora():
    """A module with two parameters that have LoRA's names."""
    factors = {name: nn.ParameterDict({ADAPTER_NAME: nn.Parameter(torch.ones(2))}) for name in ("lora_A", "lora_B")}
    return nn.ModuleDict({"layer": nn.ModuleDict(factors)})


def test_lora_plus_is_an_option_of_both_recipes():
    options = parse_fewshot_options(["--method", "lora", "--lora_plus_ratio", "4"])
    adapter = options.adapter("lora")
    groups = to_train(like_lora(), batch_at, {}, adapter, OptimizerSettings(), 10, 0.5).optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [0.5, 2.0]
    assert parse_options(["--method", "lora", "--lora_plus_ratio", "4"]).adapter.create().learning_rate_factor("a.lora_B.x") == 4


class Recording(MethodTraining):
    """Pulls every parameter towards zero, and records its calls."""

    def __init__(self, module):
        super().__init__([module], 6)
        self.steps, self.gradients, self.calls, self.samples = [], [], [], []

    def regularizer(self):
        return sum(parameter.square().sum() for parameter in self.models[0].parameters())

    def before_step(self, step, generator):
        self._called("before", step)
        self.samples.append(torch.rand((), generator=generator).item())

    def after_backward(self, step):
        self._called("between", step)

    def _called(self, when, step):
        first = next(self.models[0].parameters())
        self.calls.append((when, step, first.grad is None, first.flatten()[0].item()))

    def after_step(self, step):
        self._called("after", step)
        self.steps.append(step)
        self.gradients.append(all(parameter.grad is not None for parameter in self.models[0].parameters()))

    def state_dict(self):
        return {"steps": list(self.steps)}

    def load_state_dict(self, state):
        self.steps = list(state.get("steps", []))


def test_the_loop_adds_the_regulariser_calls_the_method_around_each_step_and_keeps_its_state(tmp_path: Path):
    plain = trained(tmp_path / "plain", trainable())
    what = trainable()
    what.method = Recording(what.module)
    held = trained(tmp_path / "held", what, steps=4)
    assert what.method.steps == [1, 2, 3, 4]
    assert all(what.method.gradients)
    assert [call[:3] for call in what.method.calls] == [
        (when, step, when == "before") for step in (1, 2, 3, 4) for when in ("before", "between", "after")
    ]
    values = [call[3] for call in what.method.calls]
    assert values[0::3] == values[1::3]
    assert all(one != other for one, other in zip(values[1::3], values[2::3], strict=True))
    assert held.norm() < plain.norm()
    resumed = trainable()
    resumed.method = Recording(resumed.module)
    trained(tmp_path / "held", resumed, steps=6)
    assert resumed.method.steps == [1, 2, 3, 4, 5, 6]
    # What is sampled depends on the run's seed and the step only.
    uninterrupted = trainable()
    uninterrupted.method = Recording(uninterrupted.module)
    trained(tmp_path / "whole", uninterrupted, steps=6)
    assert len(set(uninterrupted.method.samples)) == 6
    assert uninterrupted.method.samples == what.method.samples + resumed.method.samples
