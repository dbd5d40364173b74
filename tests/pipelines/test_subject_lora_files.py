"""Untrusted LoRA files: no code is run, and no file is loaded partially."""

import json

import pytest
import torch
from tiny_pipeline import add_nora, image, tiny_pipeline

from nora_vision import AdapterFileError, export_lora
from nora_vision.files import read_tensors, write_tensors
from pipelines.errors import InputError
from pipelines.subject.adapters import load_adapter


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file of an adapter of the tiny model, and the image that it makes."""
    pipe = tiny_pipeline()
    add_nora(pipe)
    return export_lora(pipe, tmp_path_factory.mktemp("exported") / "good.safetensors"), image(pipe)


def rewritten(file, path, change=lambda tensors: tensors, **configuration):
    """Write the file with changed tensors, or with a configuration in its header, to `path`."""
    metadata = {"lora_adapter_metadata": json.dumps(configuration)} if configuration else None
    write_tensors(path, change(read_tensors(file)), metadata)
    return path


def test_a_good_file_is_loaded(exported):
    stock = tiny_pipeline()
    load_adapter(stock, exported[0], "good")
    torch.testing.assert_close(image(stock), exported[1], atol=1 / 255, rtol=0)


@pytest.mark.parametrize(
    "configuration",
    [
        {"unet.megatron_config": {"a": 1}, "unet.megatron_core": "os"},
        {"unet.target_modules": "(a+)+$"},
        {"unet.rank_pattern": {"(a+)+b": 4}},
        {"unet.layers_pattern": "x"},
    ],
)
def test_a_configuration_of_more_than_a_lora_is_refused(exported, tmp_path, configuration):
    with pytest.raises(AdapterFileError, match=r"has a value that is not supported"):
        load_adapter(tiny_pipeline(), rewritten(exported[0], tmp_path / "bad.safetensors", **configuration), "bad")


def test_a_tensor_name_that_is_a_regular_expression_is_refused(exported, tmp_path):
    bad = rewritten(
        exported[0], tmp_path / "bad.safetensors", lambda tensors: {**tensors, "unet.(a+)+b.lora_A.weight": torch.ones(1, 1)}
    )
    with pytest.raises(AdapterFileError, match=r"whose name cannot be that of a layer"):
        load_adapter(tiny_pipeline(), bad, "bad")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name.replace("mid_block", "another_block"): tensor for name, tensor in tensors.items()},
        lambda tensors: {name: torch.cat([tensor, tensor]) if "lora_B" in name else tensor for name, tensor in tensors.items()},
        lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()},
    ],
)
def test_a_file_of_another_model_does_not_change_the_pipeline(exported, tmp_path, change):
    stock = tiny_pipeline()
    before = image(stock)
    with pytest.raises(InputError, match=r"does not fit"):
        load_adapter(stock, rewritten(exported[0], tmp_path / "bad.safetensors", change), "bad")
    load_adapter(stock, exported[0], "good")
    torch.testing.assert_close(image(stock), exported[1], atol=1 / 255, rtol=0)
    stock.delete_adapters(["good"])
    torch.testing.assert_close(image(stock), before)
