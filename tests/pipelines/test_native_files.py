"""The native files of methods other than NoRA."""

import json

import pytest
import torch
from peft import LoraConfig
from torch import nn

from nora_vision import AdapterFileError
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.methods import method_named
from pipelines.native_files import CONFIG, read_native, save_config, write_native

LAYERS = ["to_v", "proj_in", "to_k", "ff.net.2", "to_q", "conv2", "to_out.0", "conv1"]


def test_equal_configurations_are_saved_as_equal_bytes_whatever_the_order_of_their_sets(tmp_path):
    config = LoraConfig(r=2, target_modules=LAYERS)
    save_config(config, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == sorted(LAYERS)
    # The configuration in use keeps its set, which PEFT expects.
    assert config.target_modules == set(LAYERS)


def model():
    return nn.ModuleDict({"layer": nn.Linear(12, 8)})


def saved(method, folder, **changes):
    """The native files of an adapter that was just added, with other values in its configuration."""
    adapted = model()
    size = {"block_size": 4} if method == "oft" else {"rank": 4}
    AdapterOptions(method, **size).create().add(adapted, ["layer"], torch.Generator())
    method_named(method).save({"image": adapted}, folder, ADAPTER_NAME)
    config, tensors, metadata = read_native(folder / "full" / "image")
    for name, value in changes.items():
        setattr(config, name, value)
    write_native(folder / "full" / "image", config, tensors, metadata)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("lora", "r", 0),
        ("lora", "r", "four"),
        ("lora", "target_modules", 5),
        ("lora", "target_modules", "((("),
        ("lora", "lora_dropout", 7.0),
        ("psoft", "r", -1),
        ("vera", "r", 0),
        ("vblora", "vector_length", 0),
        ("tinylora", "projection_seed", "one"),
    ],
)
def test_a_configuration_with_impossible_values_is_refused_by_its_name(tmp_path, method, field, value):
    saved(method, tmp_path, **{field: value})
    with pytest.raises((InputError, AdapterFileError), match=r"full/image.* (does not fit this|is not a valid configuration)"):
        adapter_files.load({"image": model()}, tmp_path / "full")


@pytest.mark.parametrize("method", ["lora", "miss", "oft", "vera"])
def test_a_file_of_a_model_with_other_sizes_is_refused_with_both(tmp_path, method):
    saved(method, tmp_path)
    other = nn.ModuleDict({"layer": nn.Linear(16, 4)})
    with pytest.raises(InputError, match=r"does not fit this .*model: '.*' must have the shape \(.*\), got \(.*\)"):
        adapter_files.load({"image": other}, tmp_path / "full")


@pytest.mark.parametrize("marks", ["{", "3", '{"layer": 3}', '{"layer": [[1, 2, 3, 99], [0.1, 0.1, 0.1, 0.1]]}', "{}"])
def test_a_file_of_psoft_without_readable_marks_of_its_basis_is_refused(tmp_path, marks):
    saved("psoft", tmp_path)
    config, tensors, metadata = read_native(tmp_path / "full" / "image")
    write_native(tmp_path / "full" / "image", config, tensors, {**metadata, "psoft_basis": marks})
    with pytest.raises(AdapterFileError, match="does not say which basis the layer 'layer' was trained in"):
        adapter_files.load({"image": model()}, tmp_path / "full")
