import functools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tiny_pipeline import COMPONENTS, TARGETS, add_nora, image, tiny_pipeline, weight_changes

from nora_vision import export, export_lora
from nora_vision.files import read_header, read_tensors
from nora_vision.kohya import kohya_name, stability_name

FORMATS = ("diffusers", "kohya")
ONE_LEVEL = 1 / 255
VARIED = {
    "preserve_output": True,
    "inner_init": "gaussian",
    "rank_pattern": {"to_k|[kv]_proj": 5},
    "inner_rank_pattern": {".*attn1.*|fc[12]": 2},
}


def add_lora(pipe, seed=0, **options):
    """PEFT's own LoRA on the same layers, with random factors."""
    torch.manual_seed(seed)
    for component in COMPONENTS:
        config = LoraConfig(r=3, lora_alpha=1.5, target_modules=TARGETS[component], init_lora_weights=False, **options)
        getattr(pipe, component).add_adapter(config, "default")


CASES = {
    "all": lambda pipe: add_nora(pipe),
    "unet": lambda pipe: add_nora(pipe, components=("unet",)),
    "text_encoder": lambda pipe: add_nora(pipe, components=("text_encoder",)),
    "text_encoder_2": lambda pipe: add_nora(pipe, components=("text_encoder_2",)),
    "varied": lambda pipe: add_nora(pipe, **VARIED),
    "lora": add_lora,
}


@functools.cache
def adapted(case):
    """A pipeline with the adapter of a case; tests must not change it."""
    pipe = tiny_pipeline()
    CASES[case](pipe)
    return pipe


def test_stock_diffusers_makes_the_same_images_from_each_file(tmp_path):
    """In this process; tests/training/test_certificate.py uses one that cannot import this package."""
    stock = tiny_pipeline()
    plain = image(stock)
    for case in CASES:
        native = image(adapted(case))
        assert (native - plain).abs().max() > 8 * ONE_LEVEL, f"{case} does not change the image enough to be a test"
        for format in FORMATS:
            stock.load_lora_weights(export_lora(adapted(case), tmp_path / f"{case}-{format}.safetensors", format=format))
            difference = (image(stock) - native).abs().max()
            stock.unload_lora_weights()
            assert difference <= ONE_LEVEL, f"{case}, {format}: {255 * difference:.2f} levels"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", ["all", "varied", "lora"])
def test_stock_loaders_get_every_weight_change_exactly(tmp_path, format, case):
    pipe, stock = adapted(case), tiny_pipeline()
    stock.load_lora_weights(export_lora(pipe, tmp_path, format=format), adapter_name="loaded")
    expected, loaded = weight_changes(pipe), weight_changes(stock, "loaded")
    assert expected.keys() <= loaded.keys()
    for name, change in loaded.items():
        torch.testing.assert_close(change, expected.get(name, torch.zeros_like(change)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_every_linear_layer_and_convolution_of_the_unet_can_be_exported(tmp_path, format):
    pipe, stock = tiny_pipeline(levels=3), tiny_pipeline(levels=3)
    layers = [name for name, layer in pipe.unet.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    add_nora(pipe, components=("unet",), target_modules=layers, r=3, inner_r=1)
    stock.load_lora_weights(export_lora(pipe, tmp_path, format=format))
    expected, loaded = weight_changes(pipe), weight_changes(stock, "default_0")
    assert expected.keys() == loaded.keys() == {f"unet.{name}" for name in layers}
    for name, change in loaded.items():
        torch.testing.assert_close(change, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_the_current_scale_and_fusing_do_not_change_the_file(tmp_path, format):
    pipe = tiny_pipeline()
    add_nora(pipe)
    before = export_lora(pipe, tmp_path / "before.safetensors", format=format)
    pipe.set_adapters("default", 0.25)
    pipe.fuse_lora()
    after = read_tensors(export_lora(pipe, tmp_path / "after.safetensors", format=format))
    for name, tensor in read_tensors(before).items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_several_adapters_become_one_file_whose_change_is_the_sum_of_theirs(tmp_path, format):
    pipe, stock = tiny_pipeline(), tiny_pipeline()
    strengths = {"default": 0.75, "second": -0.5, "third": 1.5}
    add_lora(pipe)
    add_nora(pipe, "second", seed=1, components=("unet", "text_encoder_2"))
    add_nora(pipe, "third", seed=2, components=("unet",), target_modules=["to_k", "ff.net.0.proj"], r=4)
    expected = {}
    for name, strength in strengths.items():
        for layer, change in weight_changes(pipe, name).items():
            layer = layer.replace(".base_layer", "")
            expected[layer] = expected.get(layer, 0) + strength * change
    stock.load_lora_weights(export_lora(pipe, tmp_path / "x.safetensors", strengths, format), adapter_name="loaded")
    loaded = weight_changes(stock, "loaded")
    assert expected.keys() <= loaded.keys()
    for name, change in loaded.items():
        torch.testing.assert_close(change, expected.get(name, torch.zeros_like(change)), rtol=1e-4, atol=1e-5)


def test_the_diffusers_file_has_no_alpha_and_text_model_in_every_text_encoder_key(tmp_path):
    path = export_lora(adapted("all"), tmp_path, format="diffusers")
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    keys = read_header(path).tensors
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert all(key.startswith(("unet.", "text_encoder.text_model.", "text_encoder_2.text_model.")) for key in keys)


def test_the_kohya_file_has_its_metadata_and_one_alpha(tmp_path):
    pipe = tiny_pipeline()
    add_nora(pipe, "toy", **VARIED)
    path = export_lora(pipe, tmp_path, "toy", format="kohya")
    header, tensors = read_header(path), read_tensors(path)
    ranks = Counter(len(tensor) for key, tensor in tensors.items() if key.endswith(".lora_down.weight"))
    rank = ranks.most_common(1)[0][0]
    assert len(ranks) > 1
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {float(rank)}
    assert path.name == "toy.safetensors"
    said = header.metadata
    assert said["ss_base_model_version"] == "custom"
    assert said["ss_network_module"] == "networks.lora"
    assert (int(said["ss_network_dim"]), float(said["ss_network_alpha"])) == (rank, rank)
    assert said["ss_v2"] == "False"
    assert json.loads(said["ss_network_args"]) == {"method": "NORA"}
    assert said["ss_output_name"] == said["modelspec.title"] == "toy"
    assert said["modelspec.architecture"] == "custom/lora"
    assert said["modelspec.resolution"] == "16x16"
    assert said["modelspec.prediction_type"] == "epsilon"
    assert said["ss_zero_terminal_snr"] == "False"
    assert said["modelspec.hash_sha256"] == f"0x{said['sshs_model_hash']}"


def test_only_a_file_for_the_shape_of_sdxl_claims_to_be_for_sdxl(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    add_nora(pipe, "toy", **VARIED)
    monkeypatch.setattr(export, "SDXL_WIDTHS", tuple(pipe.unet.config.block_out_channels))
    monkeypatch.setattr(export, "SDXL_TEXT_WIDTH", pipe.unet.config.cross_attention_dim)
    said = read_header(export_lora(pipe, tmp_path, "toy", format="kohya")).metadata
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


@pytest.mark.parametrize("format", FORMATS)
def test_the_header_has_further_entries(tmp_path, format):
    path = export_lora(adapted("all"), tmp_path / "x.safetensors", format=format, metadata={"modelspec.title": "a toy, step 4"})
    assert read_header(path).metadata["modelspec.title"] == "a toy, step 4"


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    again = tiny_pipeline()
    add_nora(again)
    for name, pipe in {"first": adapted("all"), "second": again}.items():
        for format in FORMATS:
            export_lora(pipe, tmp_path / name / format / "x.safetensors", format=format)
    for format in FORMATS:
        first, second = (tmp_path / name / format / "x.safetensors" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def sdxl_layers() -> dict[str, torch.nn.Module]:
    """Every Linear layer and convolution of the true SDXL UNet, by name, without its weights."""
    with init_empty_weights():
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))}


class SDXL:
    layers_per_block = 2


def test_true_sdxl_layers_have_the_names_of_its_original_checkpoint(sdxl_layers):
    names = {f"{name}.{kind}": f"{stability_name(name, 2)}.{kind}" for name in sdxl_layers for kind in ("weight", "bias")}
    checkpoint = {f"model.diffusion_model.{theirs}": ours for ours, theirs in names.items()}
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": "text_time"}
    assert convert_ldm_unet_checkpoint(checkpoint, config) == {name: name for name in names}


def test_diffusers_reads_every_true_sdxl_layer_back_from_its_kohya_name(sdxl_layers):
    state = {}
    for name in sdxl_layers:
        key = kohya_name("unet", name, 2)
        state |= {f"{key}.lora_down.weight": name, f"{key}.lora_up.weight": name}
    assert len(state) == 2 * len(sdxl_layers)
    read, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(state, SDXL))
    for key, name in read.items():
        layer = key.removeprefix("unet.").replace(".processor", "").replace("_lora.", ".lora.").partition(".lora.")[0]
        assert layer.replace("to_out", "to_out.0") == name


PUBLISHED = {
    "lora_unet_input_blocks_4_1_proj_in": "unet.down_blocks.1.attentions.0.proj_in",
    "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_k": (
        "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_k"
    ),
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
        "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
    ),
    "lora_unet_output_blocks_5_1_proj_out": "unet.up_blocks.1.attentions.2.proj_out",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "lora_te2_text_model_encoder_layers_31_self_attn_v_proj": "text_encoder_2.text_model.encoder.layers.31.self_attn.v_proj",
}


@pytest.mark.parametrize("published", PUBLISHED)
def test_kohya_names_are_those_of_published_files(published):
    component, _, name = PUBLISHED[published].partition(".")
    assert kohya_name(component, name, layers_per_block=2) == published


def test_a_layer_without_a_kohya_name_is_refused():
    with pytest.raises(ValueError, match=r"no name for UNet layer 'encoder_hid_proj'.*diffusers"):
        kohya_name("unet", "encoder_hid_proj", 2)


def refused(pipe, tmp_path: Path, match: str, **arguments) -> None:
    with pytest.raises(ValueError, match=match):
        export_lora(pipe, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_adapters_that_a_lora_file_cannot_contain_are_refused_and_nothing_is_written(tmp_path):
    pipe = tiny_pipeline()
    refused(pipe, tmp_path, "No component of the pipeline has an adapter 'default'")
    refused(pipe, tmp_path, "at least one adapter to export, got none", adapter_name={})
    add_nora(pipe, components=("unet",), target_modules=["to_q"])
    refused(pipe, tmp_path, r"format must be one of \('diffusers', 'kohya'\), got 'a1111'", format="a1111")
    refused(pipe, tmp_path, "has an adapter 'other'; its adapters are .*'unet': .'default'", adapter_name="other")
    add_nora(pipe, "head", components=("unet",), target_modules=["to_q"], modules_to_save=["conv_out"])
    refused(pipe, tmp_path, r"unet\.conv_out was trained in full", adapter_name="head")
    add_nora(pipe, "projection", components=("text_encoder_2",), target_modules=["text_projection"])
    refused(pipe, tmp_path, r"text_encoder_2\.text_projection: stock LoRA loaders drop", adapter_name="projection")
    biased = tiny_pipeline()
    add_lora(biased, lora_bias=True)
    refused(biased, tmp_path, r"has a variant of LoRA, such as a trained bias")


def add_dora(pipe, targets=TARGETS):
    """PEFT's own DoRA, with random factors and other row norms than the base model's."""
    generator = torch.Generator().manual_seed(0)
    for component in COMPONENTS:
        config = LoraConfig(r=3, lora_alpha=1.5, target_modules=targets[component], use_dora=True)
        model = getattr(pipe, component)
        model.add_adapter(config, "default")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3, generator=generator)
                if "lora_magnitude_vector" in name:
                    parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))


def test_a_dora_is_not_added_to_other_adapters(tmp_path):
    pipe = tiny_pipeline()
    add_dora(pipe)
    add_nora(pipe, "other")
    refused(pipe, tmp_path, "has a DoRA, which cannot be added to other adapters", adapter_name={"other": 1.0, "default": 1.0})


@pytest.mark.parametrize("targets", [TARGETS, {**TARGETS, "text_encoder": ["fc1"], "text_encoder_2": ["fc2"]}])
def test_stock_diffusers_makes_the_same_images_from_the_file_of_a_dora(targets, tmp_path):
    pipe = tiny_pipeline()
    plain = image(pipe)
    add_dora(pipe, targets)
    expected = image(pipe)
    assert (expected - plain).abs().max() > 2 / 255
    file = export_lora(pipe, tmp_path)
    stock = tiny_pipeline()
    stock.load_lora_weights(file.parent)
    torch.testing.assert_close(image(stock), expected, atol=1 / 255, rtol=0)


def test_the_kohya_file_of_a_dora_contains_the_norm_of_each_changed_row(tmp_path):
    pipe = tiny_pipeline()
    add_dora(pipe)
    tensors = read_tensors(export_lora(pipe, tmp_path / "x.safetensors", format="kohya"))
    layers = pipe.unet.config.layers_per_block
    for name, layer in pipe.unet.named_modules():
        if isinstance(layer, LoraLayer):
            # LyCORIS with wd_on_output:  W' = dora_scale (W + alpha / rank up down) / ||W + alpha / rank up down||.
            key, weight = kohya_name("unet", name, layers), layer.get_base_layer().weight
            up, down = (tensors[f"{key}.lora_{part}.weight"] for part in ("up", "down"))
            merged = weight + tensors[f"{key}.alpha"] / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            scale = tensors[f"{key}.dora_scale"]
            assert scale.shape == (len(weight), *(1,) * (weight.ndim - 1))
            expected = layer.get_base_layer().weight + layer.get_delta_weight("default")
            torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)
            lengths = (scale * merged / merged.flatten(1).norm(dim=1).reshape(scale.shape)).flatten(1).norm(dim=1)
            torch.testing.assert_close(lengths, layer.lora_magnitude_vector["default"].weight.flatten())


def test_diffusers_converts_a_dora_scale_to_the_magnitudes_of_peft(tmp_path):
    pipe = tiny_pipeline()
    add_dora(pipe)
    tensors = read_tensors(export_lora(pipe, tmp_path / "x.safetensors", format="kohya"))
    count = sum("dora_scale" in name for name in tensors)
    renamed, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(tensors, pipe.unet.config))
    assert sum("lora_magnitude_vector" in name for name in renamed) == count > 0
