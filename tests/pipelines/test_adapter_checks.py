"""Checks of an adapter against the model, before memory is allocated for it: targets, ranks, and the tensors of native files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_options import TINY, full_precision_methods
from tiny_pipeline import image, tiny_pipeline
from torch import nn

from nora_vision.files import CONFIGURATION, AdapterFileError, configuration_digest, write_tensors
from pipelines import adapter_files
from pipelines.adapter_method import tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.methods import method_named
from pipelines.native_files import CONFIG, METHOD_KEY, WEIGHTS
from pipelines.subject import adapters

M, N = 24, 16
HUGE = 10**12


def options(method, **changes):
    return AdapterOptions(method=method, **{"rank": 4, "inner_r": 2, **TINY, **changes})


def linear():
    return nn.ModuleDict({"layer": nn.Linear(N, M)}).requires_grad_(False)


def rewrite(folder, method, change=dict, **fields):
    """Change the tensors and the configuration of a file, with the digests of the new ones, as its author could."""
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))
    metadata = {METHOD_KEY: method, CONFIGURATION: configuration_digest(config)}
    write_tensors(folder / WEIGHTS, change(load_file(folder / WEIGHTS)), metadata, digest=True)


def file_of(method, folder, change=dict, **fields):
    """A file of an adapter of `linear`, rewritten."""
    model = linear()
    adapter = options(method).create()
    adapter.add(model, ["layer"], torch.Generator())
    adapter.save({"unet": model}, folder, "default")
    rewrite(folder / "full" / "unet", method, change, **fields)
    return folder / "full"


def without_first(tensors):
    return {name: tensors[name] for name in sorted(tensors)[1:]}


def with_another(tensors):
    return {**tensors, "base_model.model.layer.other": torch.zeros(1)}


def enlarged(tensors):
    return {name: torch.zeros(*(size + 1 for size in tensor.shape)) for name, tensor in tensors.items()}


def not_finite(tensors):
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}


@pytest.mark.parametrize("method", full_precision_methods())
def test_a_target_that_matches_nothing_is_named_beside_one_that_matches(method):
    model = linear()
    with pytest.raises(ValueError, match=r"target_modules \['nothing'\] match no module of ModuleDict"):
        options(method).create().add(model, ["layer", "nothing"], torch.Generator())
    assert type(model["layer"]) is nn.Linear


RANKED = [name for name in full_precision_methods() if method_named(name).rank_option == "rank"]


@pytest.mark.parametrize("method", [name for name in RANKED if hasattr(options(name).create().options, "rank")])
def test_a_rank_that_no_weight_can_have_is_refused_before_memory_is_allocated(method):
    model = linear()
    with pytest.raises(ValueError, match=rf"rank must be in \[1, {N}\].*got {HUGE}. Lower rank"):
        options(method, rank=HUGE).create().add(model, ["layer"], torch.Generator())
    assert type(model["layer"]) is nn.Linear


def test_the_initial_rank_of_adalora_is_limited_and_that_of_lokr_is_not():
    with pytest.raises(ValueError, match=rf"init_r must be in \[1, {N}\].*got {HUGE}"):
        options("adalora", init_r=HUGE).create().add(linear(), ["layer"], torch.Generator())
    options("lokr", rank=100_000).create().add(linear(), ["layer"], torch.Generator())


def test_a_rank_may_exceed_the_size_of_some_layers():
    model = nn.ModuleDict({"wide": nn.Linear(N, M), "narrow": nn.Linear(2, M)})
    options("lora", rank=N).create().add(model, ["wide", "narrow"], torch.Generator())
    assert len(tuner_layers(model)) == 2


@pytest.mark.parametrize(
    ("method", "name"),
    [("lora", "alpha"), ("delora", "delora_lambda"), ("fourierft", "scaling"), ("eva", "rho"), ("adalora", "orth_reg_weight")],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_options_must_be_finite(method, name, value):
    with pytest.raises(InputError, match=rf"{name} must be a finite number, got {value}"):
        options(method, **{name: value})


def test_a_huge_number_of_butterfly_factors_is_refused_at_once():
    with pytest.raises(ValueError, match=r"must divide its in_features of 16, got \d+\. Lower block_size or"):
        options("boft", boft_n_butterfly_factor=HUGE).create().add(linear(), ["layer"], torch.Generator())


FILE_METHODS = ["adalora", "boft", "c3a", "delora", "dora", "dylora", "gralora", "hra", "ia3", "loha", "lokr", "lora", "oft"]


@pytest.mark.parametrize("method", FILE_METHODS)
@pytest.mark.parametrize("change", [without_first, with_another, enlarged, not_finite])
def test_a_file_whose_tensors_are_not_those_of_the_adapter_is_refused(method, change, tmp_path):
    with pytest.raises((InputError, AdapterFileError), match="unet"):
        adapter_files.load({"unet": linear()}, file_of(method, tmp_path, change), "loaded")


@pytest.mark.parametrize("method", ["delora", "dora", "dylora", "gralora", "hra", "loha", "lora"])
@pytest.mark.parametrize("rank", [HUGE, -1, 0, "4", 2.5])
def test_a_rank_in_a_file_that_is_not_its_tensors_is_refused_before_memory_is_allocated(method, rank, tmp_path):
    with pytest.raises((InputError, AdapterFileError), match="unet"):
        adapter_files.load({"unet": linear()}, file_of(method, tmp_path, r=rank), "loaded")


def test_a_rank_of_one_layer_in_a_file_is_checked_too(tmp_path):
    with pytest.raises(InputError, match=rf"its ranks must be integers up to {M}.*got {HUGE}"):
        adapter_files.load({"unet": linear()}, file_of("lora", tmp_path, rank_pattern={"layer": HUGE}), "loaded")


def test_the_rank_of_the_second_part_of_gralora_is_checked_too(tmp_path):
    with pytest.raises(InputError, match=rf"its ranks must be integers up to {M}.*got {HUGE}"):
        adapter_files.load({"unet": linear()}, file_of("gralora", tmp_path, hybrid_r=HUGE), "loaded")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(a+)+$|layer"},
        {"target_modules": ["layer", "(a+)+$"]},
        {"exclude_modules": "(a+)+$"},
        {"rank_pattern": {"(a+)+$": 4}},
        {"layers_pattern": "(a+)+$"},
    ],
)
def test_a_regular_expression_in_a_file_is_refused(fields, tmp_path):
    with pytest.raises(AdapterFileError, match=rf"{next(iter(fields))} must list plain names, got .*\(a\+\)"):
        adapter_files.load({"unet": linear()}, file_of("lora", tmp_path, **fields), "loaded")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_file_of_peft_whose_start_would_change_the_base_weights_is_refused(start, tmp_path):
    model, folder = linear(), file_of("lora", tmp_path, init_lora_weights=start)
    before = model["layer"].weight.clone()
    with pytest.raises(InputError, match=rf"init_lora_weights='{start}' would change the base weights. Convert the adapter"):
        adapter_files.load({"unet": model}, folder, "loaded")
    assert torch.equal(model["layer"].weight, before)


@pytest.mark.parametrize("rank", [-1, 0, "4"])
def test_the_initial_rank_in_a_file_of_adalora_must_be_a_positive_integer(rank, tmp_path):
    with pytest.raises((InputError, AdapterFileError), match=r"init_r must be an integer of at least 1"):
        adapter_files.load({"unet": linear()}, file_of("adalora", tmp_path, init_r=rank), "loaded")


@pytest.mark.parametrize("method", ["lora", "loha", "hra"])
def test_a_file_that_does_not_fit_leaves_the_pipeline_without_the_adapter(method, tmp_path):
    pipe = tiny_pipeline()
    adapter_files.save(adapters.attach(pipe, options(method)), tmp_path)
    fresh = tiny_pipeline()
    before = image(fresh)
    adapters.load_adapter(fresh, tmp_path / "full", "first")
    with pytest.raises(InputError, match=r"already has an adapter 'first'"):
        adapters.load_adapter(fresh, tmp_path / "full", "first")
    rewrite(tmp_path / "full" / "unet", method, enlarged)
    with pytest.raises(InputError, match=r"must have the shape"):
        adapters.load_adapter(fresh, tmp_path / "full", "second")
    assert set(fresh.unet.peft_config) == {"first"}
    fresh.set_adapters("first")
    torch.testing.assert_close(image(fresh), before, atol=1e-5, rtol=0)
