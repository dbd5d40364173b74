"""Only the warnings of libraries that do not apply here are dropped."""

import ast
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from diffusers import AutoencoderKL
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipeline import tiny_pipeline

from pipelines.library_warnings import POINTLESS, leave_out_pointless_warnings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def terminal():
    """The output of these libraries' loggers as text."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in POINTLESS]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


def test_the_warning_about_several_adapters_in_a_model_is_dropped_and_other_warnings_of_peft_are_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        leave_out_pointless_warnings()
        warnings.warn("Already found a `peft_config` attribute in the model.", stacklevel=1)
        warnings.warn("The adapter has no effect.", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["The adapter has no effect."]


def test_the_warning_about_an_empty_list_of_float32_modules_is_dropped(terminal, monkeypatch):
    model = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    model.to(torch.bfloat16)
    assert terminal == []
    monkeypatch.setattr(model, "_keep_in_fp32_modules", ["quant_conv"])
    model.to(torch.float16)
    assert len(terminal) == 1
    assert "should be kept in float32: ['quant_conv']" in terminal[0]


def test_the_warning_about_a_missing_kernel_is_dropped_but_no_other_of_bitsandbytes(terminal):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you", "No module")
    logger.warning("The weights are damaged.")
    assert terminal == ["The weights are damaged."]


def lora_state(rank, layers):
    """Load a LoRA of some layers onto a tiny text encoder with transformers."""
    encoder = tiny_pipeline().text_encoder
    encoder.add_adapter(LoraConfig(r=rank, target_modules=layers))
    return get_peft_model_state_dict(encoder, adapter_name="default")


@pytest.mark.parametrize(
    ("layers", "rank", "shown"),
    [
        ("some layers", 4, None),
        ("another rank", 3, "MISMATCH"),
        ("strange names", 4, "UNEXPECTED"),
    ],
)
def test_only_a_lora_that_does_not_fit_is_reported(terminal, layers, rank, shown):
    encoder = tiny_pipeline().text_encoder
    state = {name: value for name, value in lora_state(rank, ["q_proj", "v_proj"]).items() if ".layers.0." in name}
    if layers == "strange names":
        state["encoder.layers.0.no_such_layer.lora_A.weight"] = torch.ones(4, 16)
    encoder.load_adapter(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_state_dict=state,
                         ignore_mismatched_sizes=True)  # fmt: skip
    if shown is None:
        assert terminal == []
    else:
        assert any(shown in line for line in terminal)


def test_a_second_call_adds_nothing():
    before = {name: list(logging.getLogger(name).filters) for name in POINTLESS}
    leave_out_pointless_warnings()
    assert {name: logging.getLogger(name).filters for name in POINTLESS} == before


@pytest.mark.parametrize("recipe", ["dreambooth_nora.py", "fewshot_nora.py", "arena.py"])
def test_a_recipe_installs_the_filters_before_it_imports_a_library(recipe):
    statements = ast.parse((ROOT / "training" / recipe).read_text()).body
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert next(name for name in names if name.partition(".")[0] not in sys.stdlib_module_names) == "pipelines"


@pytest.mark.parametrize(("config", "listed"), [("default.yaml", False), ("one_gpu.yaml", False), (None, True)])
def test_accelerate_lists_no_defaults_with_an_example_configuration(config, listed, monkeypatch, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere")
    flags = [] if config is None else ["--config_file", str(ROOT / "training" / "configs" / config)]
    with caplog.at_level("WARNING", "accelerate.commands.launch"):
        _validate_launch_command(launch_command_parser().parse_args([*flags, "recipe.py"]))
    assert ("had defaults used instead" in caplog.text) == listed
