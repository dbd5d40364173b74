"""Compact files of a base calibration: no scales, trained factors in 8 or 16 bits, and the adapter comes back bit for bit."""

import zlib
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_documented_files import DocumentedPackedFile
from tiny_pipeline import COMPONENTS, TARGETS, add_nora, image, randomise_inner_factors, tiny_pipeline

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
from nora_vision.base_calibration import PROMPTS, base_statistics, natural_noise, weights_digest
from nora_vision.calibration import ActivationStatistics
from nora_vision.compact import PROJECTIONS
from nora_vision.files import CONFIGURATION, read_header, write_json, write_tensors
from nora_vision.layer import nora_layers
from nora_vision.packing import PACKED_DTYPES, SCALES, pack
from nora_vision.rounding import _rounded, round_inner_factors
from nora_vision.saving import adapter_tensors
from nora_vision.scales import OCTAVES, coarse_scale, recovered_steps, scale_of, steps_of

WEIGHTS = "adapter_model.safetensors"
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
RANKS = {"r": 6, "inner_r": 3}
LAYERS = TARGETS | {"unet": ["to_q", "to_k", "to_out.0"]}


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
        model.add_adapter(NoraConfig(**RANKS | {"outer_init": "awsvd", "target_modules": LAYERS[component]} | fields))
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
    drift = noise * (2 * torch.rand(20000, generator=generator).double() - 1)
    # Only sizes relative to the largest count, which stays the largest.
    drift[statistics.argmax()] = 0
    other = statistics * drift.exp2()
    kept = other <= statistics.max()
    other = torch.where(kept, other, statistics)
    assert torch.equal(recovered_steps(7 * other, steps & 1), steps)
    nearest = steps_of(coarse_scale(7 * other))
    assert torch.equal(nearest, steps) == (noise == 0)


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


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_all_attention_layers_of_sdxl_fit_into_200_000_bytes(tmp_path, dtype):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    shapes = {
        n: m.weight.shape for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(tuple(ATTENTION))
    }
    assert len(shapes) == 560
    generator, tensors, inputs = torch.Generator().manual_seed(0), {}, {}
    for name, (_, width) in shapes.items():
        # Query, key and value have the same input, and so have all layers on the text.
        source = "text" if name.endswith(("attn2.to_k", "attn2.to_v")) else name.replace("to_k", "to_q").replace("to_v", "to_q")
        inputs.setdefault(source, coarse_scale(torch.randn(width, generator=generator).exp()))
        inner = {"nora_inner_A": torch.randn(4, 16, generator=generator), "nora_inner_B": torch.randn(16, 4, generator=generator)}
        rounded = {kind: _rounded(factors, dtype, name) for kind, factors in inner.items()}
        probe = torch.randn(1 + PROJECTIONS, generator=generator)
        parts = {**rounded, "nora_activation_scale": inputs[source], "nora_probe": probe}
        tensors |= {f"{name}.{kind}": part for kind, part in parts.items()}
    packed, metadata = pack(tensors, base_calibration=True)
    digests = {"nora_layout": "packed", CONFIGURATION: "0" * 64}
    write_tensors(tmp_path / WEIGHTS, packed, metadata | digests, digest=True)
    write_json(tmp_path / "adapter_config.json", NoraConfig(r=16, inner_r=4, target_modules=ATTENTION).to_dict())
    assert sum(file.stat().st_size for file in tmp_path.iterdir() if file.is_file()) <= 200_000


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
    with pytest.raises(AdapterFileError, match="other weights"):
        load_nora(other, tmp_path)
    assert not hasattr(other.unet, "peft_config")


def test_a_damaged_stream_of_scales_is_refused_and_never_expanded_beyond_its_size(tmp_path):
    save_nora(calibrated("int8", ("text_encoder",)), tmp_path, compact=True)
    path = tmp_path / "text_encoder" / WEIGHTS
    metadata, tensors = read_header(path, PACKED_DTYPES).metadata, load_file(path)
    size = len(zlib.decompress(tensors["nora_activation_scale"].numpy().tobytes()))
    # Without the digest, which would detect the change before.
    del metadata["nora_digest"]
    for stream, message in (
        (b"no stream", "are damaged"),
        (zlib.compress(bytes(10**6)), f"must have {size} bytes"),
        (zlib.compress(b"x"), f"must have {size} bytes"),
        (zlib.compress(bytes(size)) + b"x", f"must have {size} bytes"),
        (zlib.compress(bytes(size)), "must be those of the adapter"),
    ):
        save_file(tensors | {"nora_activation_scale": torch.frombuffer(bytearray(stream), dtype=torch.uint8)}, path, metadata)
        with pytest.raises(AdapterFileError, match=message):
            load_nora(tiny_pipeline(), tmp_path)
    save_file(tensors, path, metadata | {SCALES: "octal"})
    with pytest.raises(AdapterFileError, match="nora_scales must be one of parity, steps, BF16, F32, got 'octal'"):
        load_nora(tiny_pipeline(), tmp_path)


@pytest.mark.parametrize("what", ["scales", "factors"])
def test_values_that_are_infinite_only_after_unpacking_are_refused_by_the_files_name(what, tmp_path):
    save_nora(calibrated("int8", ("text_encoder",)), tmp_path, compact=True)
    path = tmp_path / "text_encoder" / WEIGHTS
    metadata, tensors = read_header(path, PACKED_DTYPES).metadata, load_file(path)
    del metadata["nora_digest"]
    if what == "scales":
        inputs = 8 * len(zlib.decompress(tensors["nora_activation_scale"].numpy().tobytes()))
        metadata[SCALES] = "BF16"
        unit = torch.full((inputs,), torch.inf).bfloat16().view(torch.uint8).numpy().tobytes()
        tensors["nora_activation_scale"] = torch.frombuffer(bytearray(zlib.compress(unit)), dtype=torch.uint8)
    else:
        tensors["nora_inner_A.step"].fill_(3e38)
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match=rf"{WEIGHTS}: .* has values that are not finite"):
        load_nora(tiny_pipeline(), tmp_path)


# The calibration


def test_a_calibration_is_computed_once_for_a_model_and_again_where_its_file_is_damaged(cache, caplog):
    pipe, calls = tiny_pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda *given: calls.append(1))
    layers = ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"]
    first = sdxl_calibration(pipe)["unet"](layers)
    assert len(calls) == len(PROMPTS)
    again = sdxl_calibration(pipe)["unet"](layers[::-1])
    assert len(calls) == len(PROMPTS)
    assert_equal(dict(first), dict(again))
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert_equal(dict(first), dict(sdxl_calibration(pipe)["unet"](layers)))
    assert "computed again" in caplog.text
    assert len(calls) == 2 * len(PROMPTS)
    next(pipe.text_encoder.parameters()).data.mul_(1.5)
    sdxl_calibration(pipe)["unet"](layers)
    assert len(calls) == 3 * len(PROMPTS)


def test_the_calibration_is_that_of_the_base_model_whatever_is_attached_to_it(cache):
    pipe = tiny_pipeline()
    layers = ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]
    expected = sdxl_calibration(pipe)["unet"](layers)
    for file in cache.rglob("*.safetensors"):
        file.unlink()
    add_nora(pipe)
    pipe.unet.train()
    digests = [weights_digest(getattr(each, component)) for component in COMPONENTS for each in (pipe, tiny_pipeline())]
    assert digests[::2] == digests[1::2]
    assert_equal(dict(sdxl_calibration(pipe)["unet"](layers)), dict(expected))
    assert pipe.unet.training
    assert not any(layer.disable_adapters for layer in nora_layers(pipe.unet).values())
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="an adapter is fused into them"):
        sdxl_calibration(pipe)["unet"](["conv_in"])


def test_the_calibration_runs_the_documented_inputs(cache):
    pipe, seen = tiny_pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda _, given, named: seen.append((*given, named)), with_kwargs=True)
    sdxl_calibration(pipe)["unet"](["conv_in"])
    generator, betas = torch.Generator().manual_seed(0), torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2
    for index, (latents, timestep, hidden, named) in enumerate(seen):
        assert timestep == round(62.5 + 125 * index)
        kept = (1 - betas[: timestep + 1]).prod().item()
        clean, noise = natural_noise((1, 4, 8, 8), generator), torch.randn(1, 4, 8, 8, generator=generator)
        torch.testing.assert_close(latents, kept**0.5 * clean + (1 - kept) ** 0.5 * noise, rtol=1e-4, atol=1e-4)
        expected, _, pooled, _ = pipe.encode_prompt(PROMPTS[index], do_classifier_free_guidance=False)
        assert torch.equal(hidden, expected)
        assert torch.equal(named["added_cond_kwargs"]["text_embeds"], pooled)
        assert named["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_natural_noise_has_the_amplitude_spectrum_of_natural_images():
    images = natural_noise((64, 32, 32), torch.Generator().manual_seed(0))
    torch.testing.assert_close(images.mean(dim=(1, 2)), torch.zeros(64), rtol=0, atol=1e-5)
    torch.testing.assert_close(images.std(dim=(1, 2)), torch.ones(64))
    amplitudes = torch.fft.fft2(images).abs().square().mean(dim=0).sqrt()[0, 1:9]
    torch.testing.assert_close(amplitudes * torch.arange(1, 9), amplitudes[0].expand(8), rtol=0.2, atol=0)


def test_a_pipeline_without_text_encoders_and_layers_that_the_model_does_not_use_are_named():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="has no 'conv_inn'"):
        sdxl_calibration(pipe)["unet"](["conv_inn"])

    run_input = partial(pipe.unet.conv_in, torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="did not call 'conv_out'"):
        base_statistics(pipe.unet, ["conv_in", "conv_out"], run_input, [pipe.unet])
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="needs both text encoders and tokenizers"):
        sdxl_calibration(pipe)["unet"](["conv_in"])
