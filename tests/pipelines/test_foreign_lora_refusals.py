"""Files that are not a LoRA of this model are recognised, and unused tensors are errors."""

import json

import pytest
import torch
from foreign_lora import (
    LINEAR,
    NORM,
    WIDTH,
    assert_is,
    good,
    kohya,
    module_of,
    weight_of,
)
from safetensors.torch import save_file

from nora_vision import AdapterFileError
from pipelines.errors import InputError
from pipelines.subject import lora_files
from pipelines.subject.adapters import load_adapter


@pytest.mark.parametrize(
    "configuration",
    [
        {"unet.some_future_flag": False, "unet.other": None, "unet.list": [], "unet.table": {}, "unet.words": ""},
        {"unet.base_model_name_or_path": "C:\\my models\\sd xl", "unet.auto_mapping": {"base_model_class": "x y"}},
        {"unet.revision": "main branch", "unet.peft_version": "0.99@unknown"},
    ],
)
def test_settings_that_change_nothing_are_ignored(model, loaded, configuration):
    weight = weight_of(model, LINEAR)
    loaded(good(), {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1, **configuration})})
    assert_is(module_of(model, LINEAR), weight + 0.5 * 2)


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"unet.some_future_flag": True}, r"'unet.some_future_flag' has a value that is not supported: True"),
        ({"unet.init_lora_weights": "pissa"}, r"'unet.init_lora_weights' has a value that is not supported: 'pissa'"),
        ({"unet.modules_to_save": ["conv_in"]}, r"modules_to_save"),
        ({"unet.r": "many"}, r"'unet.r' has a value that is not supported"),
        ({"unet.r": 5, "unet.lora_alpha": 1}, r"configuration says rank 5, but its tensors have rank 2"),
        ({"unet.use_dora": True}, r"says use_dora, but it has no lora_magnitude_vector"),
        ({"unet.peft_type": "OFT"}, r"an adapter of PEFT type 'OFT', but only LoRA, DoRA, LoHa and LoKr can be loaded"),
    ],
)
def test_settings_that_would_change_something_are_refused_by_name(loaded, configuration, message):
    with pytest.raises(ValueError, match=message):
        loaded(good(), {"lora_adapter_metadata": json.dumps(configuration)})


def test_tensors_that_no_layer_uses_are_left_out_and_reported(model, loaded):
    embeddings = {"bundle_emb.blue mug.clip_l": torch.ones(3, 16), "bundle_emb.blue mug.clip_g": torch.ones(3, 24)}
    said = loaded({**good(), **embeddings, "step": torch.tensor(7)})
    assert len(said) == 2
    assert "a textual inversion ('blue mug'), which is left out" in said[0]
    assert "also holds 'step'. No layer uses this, and it is left out" in said[1]
    assert_is(module_of(model, LINEAR), weight_of(model, LINEAR) + 2)


FLUX = "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"
OLD = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
OTHERS = {
    "textual inversion": ({"clip_l": (4, 16), "clip_g": (4, 24)}, r"is a textual inversion .* and not a LoRA"),
    "textual inversion of diffusers": ({"<cat toy>": (1, 768)}, r"is a textual inversion"),
    "textual inversion of A1111": ({"emb_params": (4, 768)}, r"is a textual inversion"),
    "Flux": ({FLUX: (2, 3072), FLUX.replace("_A", "_B"): (3072, 2)}, r"is a LoRA of Flux and does not fit"),
    "Flux of kohya": ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 3072)}, r"is a LoRA of Flux"),
    "SD3": ({"lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight": (2, 1536)}, r"is a LoRA of SD3"),
    "SD 1.5": ({OLD: (2, 768)}, r"is a LoRA of Stable Diffusion 1\.5 and does not fit.*Choose a LoRA that was trained on SDXL"),
    "SD 2": ({OLD: (2, 1024)}, r"is a LoRA of Stable Diffusion 2"),
    "the refiner": ({OLD: (2, 1280)}, r"is a LoRA of the SDXL refiner"),
    "SDXL itself": (
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (2, 2048)},
        r"is a LoRA of SDXL and does not fit this base model.*--pretrained_model_name_or_path",
    ),
    "OFT": ({"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": (2, 4, 4)}, r"is an OFT or BOFT adapter .*LoHa, LoKr"),
    "GLoRA": ({"lora_unet_mid_block_attentions_0_proj_in.a1.weight": (2, 4)}, r"is a GLoRA adapter"),
    "IA3": ({"lora_unet_mid_block_attentions_0_proj_in.on_input": (1,)}, r"on_input' weight is missing"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (4, 4)}, r"is a ControlNet"),
    "IP-adapter": ({"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)}, r"is an IP-adapter"),
    "checkpoint": (
        {"model.diffusion_model.input_blocks.0.0.weight": (4, 4), "first_stage_model.x.weight": (2, 2)},
        r"is a whole checkpoint and not a LoRA .*--pretrained_model_name_or_path",
    ),
    "UNet": ({"conv_in.weight": (4, 4), "down_blocks.0.resnets.0.conv1.weight": (4, 4)}, r"is a whole UNet"),
    "VAE": ({"encoder.conv_in.weight": (4, 4), "quant_conv.weight": (2, 2)}, r"is a VAE"),
    "NoRA": ({"mid_block.attentions.0.proj_in.nora_inner_A": (2, 2)}, r"is a part of a NoRA adapter"),
    "nothing known": ({"layer.weight": (2, 2)}, r"holds no adapter, but other tensors such as 'layer.weight'"),
    "nothing": ({}, r"holds no tensors"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_not_a_lora_of_this_model_is_recognised(loaded, kind):
    shapes, message = OTHERS[kind]
    with pytest.raises(InputError, match=message):
        loaded({name: torch.ones(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("said", "trained_on"),
    [
        ({"ss_base_model_version": "sd_v1"}, "Stable Diffusion 1.5"),
        ({"ss_base_model_version": "sd3m"}, "SD3"),
        ({"ss_base_model_version": "flux1"}, "Flux"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "Stable Diffusion 2"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
    ],
)
def test_the_metadata_give_the_base_model_of_a_file_that_does_not_fit(loaded, said, trained_on):
    with pytest.raises(InputError, match=rf"is a LoRA of {trained_on} and does not fit"):
        loaded({"lora_unet_mid_block_attentions_9_proj_in.lora_down.weight": torch.ones(2, 2)}, said)


DAMAGED = {
    "an unknown tensor": (lambda t: {**t, "unet.mid_block.other": torch.ones(2)}, r"no layer uses 'unet.mid_block.other'"),
    "an unknown layer": (lambda t: {**t, "unet.mid_block.x.lora_A.weight": torch.ones(2, 2)}, r"no layer uses 'unet.mid_block.x"),
    "half a layer": (lambda t: dict([*t.items()][:1]), r"(up|down) is missing"),
    "two names of one layer": (lambda t: {**t, f"{LINEAR}.lora_A.weight": torch.ones(2, WIDTH)}, r"no layer uses"),
    "ranks that differ": (lambda t: {**t, f"{kohya(LINEAR)}.lora_up.weight": torch.ones(WIDTH, 3)}, r"different ranks, 3 and 2"),
    "another width": (lambda t: good(width=25), rf"changes a weight of size 25 x 25, but the model's is {WIDTH} x {WIDTH}"),
    "two alphas": (lambda t: {**t, f"{kohya(LINEAR)}.alpha": torch.ones(2)}, r"alpha must be one number"),
    "whole numbers": (lambda t: {name: tensor.long() for name, tensor in t.items()}, r"must be floating-point"),
    "no dimension": (lambda t: {name: torch.tensor(1.0) for name in t}, r"has shape \(\)"),
    "lengths of another layer": (
        lambda t: {**t, f"{kohya(LINEAR)}.dora_scale": torch.ones(7, 1)},
        r"dora_scale has shape \(7, 1\)",
    ),
    "a LoHa's half": (lambda t: {f"{kohya(LINEAR)}.hada_w1_a": torch.ones(WIDTH, 2)}, r"hada_w1_b.* missing"),
    "a huge product": (
        lambda t: {f"{kohya(LINEAR)}.lokr_w1": torch.ones(300, 300), f"{kohya(LINEAR)}.lokr_w2": torch.ones(300, 300)},
        r"changes a weight of size 90000 x 90000",
    ),
    "a bias of a layer that has none": (lambda t: {f"{kohya(LINEAR)}.diff_b": torch.ones(WIDTH)}, r"the layer has none"),
    "a norm of another width": (lambda t: {f"{kohya(NORM)}.w_norm": torch.ones(3)}, r"diff has 3 entries"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_unused_tensors_and_incomplete_layers_are_errors(model, loaded, damage):
    change, message = DAMAGED[damage]
    with pytest.raises(InputError, match=message):
        loaded(change(good()))
    assert "x" not in (getattr(model.unet, "peft_config", None) or {})
    assert_is(module_of(model, LINEAR), weight_of(model, LINEAR))


def test_a_parameter_on_the_meta_device_is_an_error_naming_it(model, loaded, tmp_path):
    loaded(good())
    module_of(model, LINEAR).lora_A["x"].to("meta")
    with pytest.raises(InputError, match=r"attn1\.to_q\.lora_A has no values \(it is on the meta device\)"):
        lora_files.verify(model, "x", tmp_path)
    assert "x" not in (getattr(model.unet, "peft_config", None) or {})
    with pytest.raises(InputError, match=r"no layer of the model was changed"):
        lora_files.verify(model, "x", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", r"is a Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", r"is a web page \(HTML\)"),
        (b"\xef\xbb\xbf<HTML><head></head></HTML>", r"is a web page \(HTML\)"),
        (b'{"error": "Access to this model is restricted"}', r"is text and not a safetensors file"),
        (b"Entry not found", r"is text and not a safetensors file"),
        (b"", r"is empty \(0 bytes\)\. Download it again"),
    ],
)
def test_the_result_of_a_failed_download_is_recognised(model, tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(model, tmp_path / "x.safetensors", "x")


def test_half_a_download_and_pickles_are_refused(model, tmp_path):
    save_file(good(), tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for length in (60, len(content) - 1):
        (tmp_path / "x.safetensors").write_bytes(content[:length])
        with pytest.raises(AdapterFileError, match=r"is truncated.*Download it again"):
            load_adapter(model, tmp_path / "x.safetensors", "x")
    for suffix in (".pt", ".ckpt", ".PTH", ".bin"):
        (tmp_path / f"x{suffix}").write_bytes(b"PK\x03\x04")
        with pytest.raises(AdapterFileError, match=r"is a pickle by its name"):
            load_adapter(model, tmp_path / f"x{suffix}", "x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(AdapterFileError, match=r"holds the pickle 'adapter_model.bin'"):
        load_adapter(model, folder, "x")
