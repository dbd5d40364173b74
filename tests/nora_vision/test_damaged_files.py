"""Damaged adapter files are refused or load the same adapter, never another one."""

import json
import shutil
import warnings
from pathlib import Path
from random import Random

import pytest
import torch
from mutations import CONFIG, WEIGHTS, joined, mutate, parts
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from small_models import MODELS, change_weights, config_for

from nora_vision import ActivationStatistics, AdapterFileError, calibrate, save_adapter
from nora_vision.files import DIGEST, read_header
from nora_vision.loading import apply_adapter
from nora_vision.packing import PACKED_DTYPES
from nora_vision.reading import read_adapter
from nora_vision.saving import adapter_tensors

MUTATIONS = 50
VARIED = {"r": 6, "inner_r": 3, "init_weights": True, "preserve_output": True, "inner_init": "gaussian"}
# Models and their target layers: linear layers, convolutions, transposed weights, and modules_to_save.
KINDS = {
    "linear": {"modules_to_save": ["head"]},
    "conv2d": {"rank_pattern": {"second": 5}, "inner_rank_pattern": {"first": 2}},
    "conv1d": {},
    "text_encoder": {"exclude_modules": r".*\.1\..*"},
}


def saved(kind: str, compact: bool, folder: Path) -> torch.nn.Module:
    """Save a trained adapter of the model `kind` in `folder`; returns an equal model without an adapter."""
    model, _, targets = MODELS[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config_for(targets, **VARIED | KINDS[kind]))
    change_weights(model)
    save_adapter(model, folder, compact=compact)
    return MODELS[kind]()[0]


def loaded(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in `folder` on `model`, which is restored afterwards."""
    take_off = apply_adapter(model, read_adapter(model, folder), "default")
    tensors = {name: tensor.clone() for name, tensor in adapter_tensors(model, "default").items()}
    scalings = {
        f"{name}.s": torch.tensor(module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "nora_A")
    }
    take_off()
    return tensors | scalings


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_adapter_is_refused_or_the_same(tmp_path, kind, compact):
    model = saved(kind, compact, tmp_path / "saved")
    expected, refused = loaded(model, tmp_path / "saved"), 0
    for seed in range(MUTATIONS):
        shutil.copytree(tmp_path / "saved", tmp_path / "damaged", dirs_exist_ok=True)
        mutation = mutate(Random(f"{kind} {compact} {seed}"), tmp_path / "damaged")
        try:
            assert are_equal(loaded(model, tmp_path / "damaged"), expected), (seed, mutation)
        except AdapterFileError:
            refused += 1
        assert not hasattr(model, "peft_config"), (seed, mutation)
    assert refused > MUTATIONS / 2


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def of_an_earlier_version(path: Path) -> None:
    save_file(load_file(path), path, {key: value for key, value in read_header(path).metadata.items() if key != DIGEST})


@pytest.mark.parametrize("strip", [without_metadata, of_an_earlier_version])
def test_files_without_a_digest_still_load(tmp_path, strip):
    model = saved("linear", False, tmp_path)
    expected = loaded(model, tmp_path)
    strip(tmp_path / WEIGHTS)
    assert are_equal(loaded(model, tmp_path), expected)


def test_what_peft_saves_has_no_digest_and_loads(tmp_path):
    model, _, targets = MODELS["linear"]()
    model = get_peft_model(model, config_for(targets))
    model.save_pretrained(tmp_path)
    assert DIGEST not in read_header(tmp_path / WEIGHTS).metadata
    tensors = loaded(MODELS["linear"]()[0], tmp_path)
    for name, tensor in adapter_tensors(model, "default").items():
        assert torch.equal(tensors[name], tensor)


def rewrite(path: Path, change) -> None:
    _, header, data = parts(path.read_bytes())
    data = bytearray(data)
    change(header, data)
    path.write_bytes(joined(header, bytes(data)))


SCALE = "base_model.model.first.nora_activation_scale"
MISMATCH, UNKNOWN = "does not match the digest in its header", "has metadata that this version does not know"
DAMAGE = {
    "the lowest bit of a number": (lambda header, data: data.__setitem__(0, data[0] ^ 1), MISMATCH),
    "a number that changes no output": (
        lambda header, data: data.__setitem__(header[SCALE]["data_offsets"][0], data[header[SCALE]["data_offsets"][0]] ^ 1),
        MISMATCH,
    ),
    "the digest": (lambda header, data: header["__metadata__"].update({DIGEST: "0" * 64}), MISMATCH),
    "the digest's name": (
        lambda header, data: header["__metadata__"].update(nora_digesT=header["__metadata__"].pop(DIGEST)),
        rf"{UNKNOWN}: \['nora_digesT'\]",
    ),
    "a value of the metadata": (lambda header, data: header["__metadata__"].update(nora_layout="compact"), MISMATCH),
    "a key less": (lambda header, data: header["__metadata__"].pop("nora_layout"), MISMATCH),
    "a key more": (lambda header, data: header["__metadata__"].update(author="somebody"), rf"{UNKNOWN}: \['author'\]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_digest_covers_all_bytes_and_all_metadata(tmp_path, damage):
    change, message = DAMAGE[damage]
    model = saved("linear", False, tmp_path)
    rewrite(tmp_path / WEIGHTS, change)
    with pytest.raises(AdapterFileError, match=rf"{WEIGHTS}.*{message}"):
        read_adapter(model, tmp_path)


def test_exchanged_tensors_of_the_same_shape_are_refused(tmp_path):
    model = saved("conv1d", False, tmp_path)
    names = [f"base_model.model.h.{block}.attn.c_attn.nora_inner_B" for block in range(2)]

    def exchange(header, data):
        header[names[0]], header[names[1]] = header[names[1]], header[names[0]]

    rewrite(tmp_path / WEIGHTS, exchange)
    with pytest.raises(AdapterFileError, match="does not match the digest"):
        read_adapter(model, tmp_path)


def test_a_change_below_the_tolerance_of_a_probe_is_refused(tmp_path):
    model = saved("linear", True, tmp_path)
    metadata, tensors = read_header(tmp_path / WEIGHTS, PACKED_DTYPES).metadata, load_file(tmp_path / WEIGHTS)
    tensors["nora_inner_B"][0] *= 1 + 1e-6
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    with pytest.raises(AdapterFileError, match="does not match the digest"):
        read_adapter(model, tmp_path)


def test_an_equivalent_spelling_of_a_configuration_is_accepted(tmp_path):
    model = saved("linear", False, tmp_path)
    expected = loaded(model, tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(dict(reversed(fields.items())), indent=8))
    assert are_equal(loaded(model, tmp_path), expected)
    (tmp_path / CONFIG).write_text(json.dumps(fields | {"dropout": 0.5}))
    with pytest.raises(AdapterFileError, match=f"{CONFIG} is not the one that {WEIGHTS} was saved with"):
        read_adapter(model, tmp_path)


def test_a_pattern_of_a_file_that_matches_no_layer_is_refused_and_so_is_a_target(tmp_path):
    model, _, targets = MODELS["linear"]()
    get_peft_model(model, config_for(targets)).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    for changed, message in (
        ({"rank_pattern": {"^frist": 4}}, r"rank_pattern \['\^frist'\] match no adapted layer of Mlp"),
        ({"target_modules": [*targets, "frist"]}, r"target_modules \['frist'\] match no module of Mlp"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(fields | changed))
        with pytest.raises(AdapterFileError, match=rf"{CONFIG} does not fit this model: {message}"):
            read_adapter(MODELS["linear"]()[0], tmp_path)


def test_damaged_activation_statistics_are_refused(tmp_path):
    model, inputs, _ = MODELS["linear"]()
    path = tmp_path / "statistics.safetensors"
    calibrate(model, lambda: model(*inputs)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AdapterFileError, match=r"statistics\.safetensors was changed or damaged"):
        ActivationStatistics.load(path)
