"""Compact files of a base calibration: no scales, trained factors in 8 or 16 bits, and the adapter comes back bit for bit."""

import zlib
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_documented_files import DocumentedPackedFile
from tiny_pipeline import COMPONENTS, TARGETS, image, randomise_inner_factors, tiny_pipeline

from nora_vision import (
    AdapterFileError,
    NoraConfig,
    initialize_nora_weights,
    load_adapter,
    load_nora,
    save_adapter,
    save_nora,
    sdxl_calibration,
)
from nora_vision.calibration import ActivationStatistics
from nora_vision.files import read_header
from nora_vision.layer import nora_layers
from nora_vision.packing import PACKED_DTYPES
from nora_vision.rounding import round_inner_factors
from nora_vision.saving import adapter_tensors
from nora_vision.scales import OCTAVES, coarse_scale, recovered_steps, scale_of, steps_of

WEIGHTS = "adapter_model.safetensors"
RANKS = {"r": 6, "inner_r": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, empty."""
    folder = tmp_path / "assets"
    monkeypatch.setattr("nora_vision.base_calibration.cached_assets_path", lambda *names: made(folder.joinpath(*names)))
    return folder


def made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def calibrated(dtype="int8", components=COMPONENTS, seed=0, **fields):
    """A pipeline with an adapter from the base calibration, whose trained factors are rounded to `dtype`."""
    pipe = tiny_pipeline()
    for component in components:
        model = getattr(pipe, component)
        model.add_adapter(NoraConfig(**RANKS | {"outer_init": "awsvd", "target_modules": TARGETS[component]} | fields))
        statistics = sdxl_calibration(pipe)[component](list(nora_layers(model)))
        initialize_nora_weights(model, statistics, calibration="base")
        randomise_inner_factors(model, "default", torch.Generator().manual_seed(seed), std=0.3)
        round_inner_factors(model, dtype)
    return pipe


def tensors_of(pipe, adapter_name="default"):
    """The tensors of the adapter by component and name."""
    return {
        f"{component}.{name}": tensor.clone()
        for component in COMPONENTS
        if adapter_name in getattr(getattr(pipe, component), "peft_config", {})
        for name, tensor in adapter_tensors(getattr(pipe, component), adapter_name).items()
    }


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# Scales


def test_a_coarse_scale_is_the_nearest_half_octave_of_the_relative_statistics():
    statistics = torch.rand(2000, generator=torch.Generator().manual_seed(0)).double().exp2().pow(8)
    scale, relative = coarse_scale(statistics).double(), statistics / statistics.max()
    assert scale.max() == 1
    assert ((scale / relative).log2().abs() <= 0.25 + 1e-6).all()
    torch.testing.assert_close(2 * scale.log2(), (2 * scale.log2()).round(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.249])
def test_steps_are_recovered_from_their_parity_and_statistics_within_a_quarter_octave(noise):
    generator = torch.Generator().manual_seed(1)
    statistics = torch.randn(20000, generator=generator).double().mul(2).exp2()
    steps = steps_of(coarse_scale(statistics))
    other = statistics * (noise * (2 * torch.rand(20000, generator=generator).double() - 1)).exp2()
    # Only relative to the largest.
    other = (
        7 * other / other.max() * statistics[other.argmax()] / statistics.max() * statistics.max() / statistics[other.argmax()]
    )
    if noise == 0.0:
        assert torch.equal(recovered_steps(other, steps & 1), steps)
    drift = (other / other.max()).log2() - (statistics / statistics.max()).log2()
    within = drift.abs() < 0.25
    assert torch.equal(recovered_steps(other, steps & 1)[within], steps[within])
    assert within.float().mean() > 0.4


def test_a_layer_that_saw_only_zeros_has_a_scale_of_zeros():
    zeros = torch.zeros(5)
    assert torch.equal(coarse_scale(zeros), zeros)
    assert torch.equal(scale_of(steps_of(zeros)), zeros)
    assert torch.equal(scale_of(recovered_steps(zeros, torch.zeros(5, dtype=torch.uint8))), zeros)


def test_scales_between_two_steps_have_no_steps_and_very_small_ones_are_raised():
    assert steps_of(torch.tensor([1.0, 0.8])) is None
    assert coarse_scale(torch.tensor([1.0, 1e-9])).tolist() == [1.0, 2.0**-OCTAVES]


# Trained factors


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rounded_factors_are_within_half_a_step_and_rounding_again_changes_nothing(dtype):
    pipe = calibrated("float32", ("unet",))
    exact = tensors_of(pipe)
    round_inner_factors(pipe.unet, dtype)
    rounded = tensors_of(pipe)
    round_inner_factors(pipe.unet, dtype)
    assert_equal(tensors_of(pipe), rounded)
    for name, tensor in exact.items():
        if "nora_inner" in name:
            largest = tensor.abs().max()
            allowed = largest / 253 if dtype == "int8" else largest * 2**-11
            assert 0 < (rounded[name] - tensor).abs().max() <= allowed
        else:
            assert torch.equal(rounded[name], tensor)


def test_factors_too_large_for_float16_and_unknown_dtypes_are_refused():
    pipe = calibrated("float32", ("text_encoder",))
    with pytest.raises(ValueError, match="must be one of float32, float16, int8, got 'int4'"):
        round_inner_factors(pipe.text_encoder, "int4")
    next(iter(nora_layers(pipe.text_encoder).values())).nora_inner_B["default"].data.fill_(1e6)
    with pytest.raises(ValueError, match=r"must be at most 65504 in float16, got 1e\+06"):
        round_inner_factors(pipe.text_encoder, "float16")


# Files


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_file_without_scales_and_outer_factors_gives_the_same_adapter_to_the_bit(tmp_path, dtype):
    pipe = calibrated(dtype)
    save_nora(pipe, tmp_path / "adapter", compact=True)
    other = tiny_pipeline()
    load_nora(other, tmp_path / "adapter", "default")
    assert_equal(tensors_of(other), tensors_of(pipe))
    assert torch.equal(image(other), image(pipe))
    save_nora(other, tmp_path / "again", compact=True)
    for component in COMPONENTS:
        first, again = ((tmp_path / folder / component / WEIGHTS).read_bytes() for folder in ("adapter", "again"))
        assert first == again


@pytest.mark.parametrize(("dtype", "width", "steps"), [("float32", 4, 0), ("float16", 2, 0), ("int8", 1, 2 * 2)])
def test_the_size_of_a_file_is_that_of_its_factors_parities_and_probes(tmp_path, dtype, width, steps):
    pipe = calibrated(dtype, ("unet",))
    save_nora(pipe, tmp_path, compact=True)
    tensors, layers = load_file(tmp_path / "unet" / WEIGHTS), nora_layers(pipe.unet)
    factors = 2 * RANKS["r"] * RANKS["inner_r"] * len(layers)
    scales = tensors.pop("nora_activation_scale")
    assert sum(tensor.nbytes for tensor in tensors.values()) == width * factors + steps * len(layers) + 4 * 5 * len(layers)
    entries = sum(layer.in_features for layer in layers.values())
    assert len(zlib.decompress(scales.numpy().tobytes())) == -(-entries // 8)


def test_preserved_starts_and_modules_trained_in_full_come_back_too(tmp_path):
    pipe = calibrated("float32", ("unet",), preserve_output=True, inner_init="gaussian", modules_to_save=["conv_out"])
    pipe.unet.conv_out.modules_to_save["default"].weight.data.mul_(3)
    save_nora(pipe, tmp_path, compact=True)
    other = tiny_pipeline()
    load_nora(other, tmp_path, "default")
    assert_equal(tensors_of(other), tensors_of(pipe))


def test_a_reader_written_from_the_page_recovers_scale_and_factors(tmp_path):
    pipe = calibrated("int8", ("text_encoder_2",))
    save_nora(pipe, tmp_path, compact=True)
    layers = nora_layers(pipe.text_encoder_2)
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    statistics = sdxl_calibration(pipe)["text_encoder_2"](list(layers))
    # A machine that computes slightly differently.
    drifted = {name: (S * torch.linspace(0.95, 1.05, len(S))).numpy() for name, S in statistics.items()}
    file = DocumentedPackedFile(tmp_path / "text_encoder_2", sizes, drifted)
    for name, layer in layers.items():
        scale = torch.from_numpy(file.scale(name)).float()
        torch.testing.assert_close(scale, layer.nora_activation_scale["default"], rtol=1e-6, atol=0)
        inner = torch.from_numpy(file.tensor(name, "nora_inner_A")).float()
        assert torch.equal(inner, layer.nora_inner_A["default"])


def test_statistics_that_drift_by_a_tenth_give_the_same_adapter_and_others_are_refused(tmp_path):
    pipe = calibrated("int8", ("unet",))
    save_adapter(pipe.unet, tmp_path, compact=True)
    exact = sdxl_calibration(pipe)["unet"](list(nora_layers(pipe.unet)))

    def drifted(share, layers):
        generator = torch.Generator().manual_seed(0)
        scales = {name: S * (1 + share * (2 * torch.rand(len(S), generator=generator) - 1)) for name, S in exact.items()}
        return ActivationStatistics(scales, exact.fingerprints)

    other = tiny_pipeline()
    load_adapter(other.unet, tmp_path, base_calibration=partial(drifted, 0.08))
    assert_equal(tensors_of(other), tensors_of(pipe))
    fresh = tiny_pipeline()
    with pytest.raises(AdapterFileError, match=r"recomputed must be those of the adapter.*full adapter or its LoRA export"):
        load_adapter(fresh.unet, tmp_path, base_calibration=partial(drifted, 0.9))
    assert not hasattr(fresh.unet, "peft_config")


def test_a_loader_without_a_calibration_is_told_what_to_pass(tmp_path):
    pipe = calibrated("int8", ("unet",))
    save_adapter(pipe.unet, tmp_path, compact=True)
    other = tiny_pipeline()
    with pytest.raises(AdapterFileError, match=r"needs the base calibration.*sdxl_calibration\(pipe\)\['unet'\]"):
        load_adapter(other.unet, tmp_path)
    with pytest.raises(AdapterFileError, match=r"has none of 16 entries for 'down_blocks"):
        load_adapter(other.unet, tmp_path, base_calibration=lambda layers: ActivationStatistics({}, {}))
    load_adapter(other.unet, tmp_path, base_calibration=sdxl_calibration(other)["unet"])
    assert_equal(tensors_of(other), tensors_of(pipe))


@pytest.mark.parametrize("component", COMPONENTS)
def test_another_base_model_is_refused(tmp_path, component):
    save_nora(calibrated("int8", ("unet",)), tmp_path, compact=True)
    other = tiny_pipeline()
    for parameter in getattr(other, component).parameters():
        parameter.data.mul_(1 + 0.5 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(AdapterFileError, match="other weights or another precision|has other weights"):
        load_nora(other, tmp_path)
    assert not hasattr(other.unet, "peft_config")


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"no stream", "are damaged"),
        (zlib.compress(bytes(10**6)), "must have 148 bytes"),
        (zlib.compress(b"x"), "must have 148 bytes"),
        (zlib.compress(bytes(148)) + b"x", "must have 148 bytes"),
    ],
)
def test_a_damaged_stream_of_scales_is_refused_and_never_expanded_beyond_its_size(tmp_path, stream, message):
    save_nora(calibrated("int8", ("unet",)), tmp_path, compact=True)
    path = tmp_path / "unet" / WEIGHTS
    metadata, tensors = read_header(path, PACKED_DTYPES).metadata, load_file(path)
    expected = len(zlib.decompress(tensors["nora_activation_scale"].numpy().tobytes()))
    tensors["nora_activation_scale"] = torch.frombuffer(bytearray(stream.replace(b"148", b"")), dtype=torch.uint8)
    from safetensors.torch import save_file

    del metadata["nora_digest"]
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match=message.replace("148", str(expected))):
        load_nora(tiny_pipeline(), tmp_path)
