"""Base models and their conditioning; the stock pipeline is the oracle."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from single_file import save_single_file
from tiny_pipeline import image, tiny_pipeline

from pipelines.built_in import is_built_in
from pipelines.errors import InputError
from pipelines.subject.base_model import encode_images, encode_prompts, load_base_model, model_resolution

PROMPTS = ["a red star", "", "snow"]


def test_prompts_are_encoded_as_the_stock_pipeline_does(pipe):
    hidden, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    encoded = encode_prompts(pipe, PROMPTS)
    kept = torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(encoded.hidden, hidden * kept[:, None, None])
    torch.testing.assert_close(encoded.pooled, pooled * kept[:, None])


def test_an_empty_prompt_is_the_unconditional_one_of_the_stock_pipeline(pipe):
    _, negative, _, negative_pooled = pipe.encode_prompt("a red star", device="cpu", do_classifier_free_guidance=True)
    empty = encode_prompts(pipe, [""])
    assert torch.equal(empty.hidden, negative)
    assert torch.equal(empty.pooled, negative_pooled)


def test_an_empty_prompt_is_encoded_if_the_model_was_not_trained_on_zeros(pipe):
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert encode_prompts(pipe, [""]).hidden.abs().max() > 0


@pytest.mark.parametrize("shifted", [False, True])
def test_latents_decode_as_the_stock_pipeline_decodes(pipe, shifted):
    if shifted:
        pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = encode_images(pipe, pixels)
    distribution = pipe.vae.encode(pixels).latent_dist
    unscaled = moments[:, 0] / pipe.vae.config.scaling_factor
    if shifted:
        shift, spread = (torch.tensor(v).view(1, 4, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
        unscaled = unscaled * spread + shift
    torch.testing.assert_close(unscaled, distribution.mean)
    torch.testing.assert_close(
        moments[:, 1] / moments[:, 0].abs(), distribution.std / (moments[:, 0] * distribution.std / moments[:, 1]).abs()
    )


def test_images_are_encoded_in_float32_and_the_autoencoder_keeps_its_precision(pipe):
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    exact = encode_images(pipe, pixels)
    pipe.vae.to(torch.bfloat16)
    coarse = encode_images(pipe, pixels)
    assert pipe.vae.dtype == torch.bfloat16
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, exact, atol=0.02, rtol=0.05)


def test_a_model_loads_frozen_in_evaluation_mode_and_in_the_given_dtype(tiny_model):
    pipe = load_base_model(str(tiny_model), torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    assert not pipe.unet.training
    assert not any(parameter.requires_grad for parameter in pipe.text_encoder_2.parameters())
    assert model_resolution(pipe) == 16


def test_a_variant_of_half_precision_files_loads(tmp_path):
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    pipe = load_base_model(str(tmp_path / "half"), variant="fp16")
    assert pipe.unet.dtype == torch.float32
    torch.testing.assert_close(pipe.unet.conv_in.weight, tiny_pipeline().unet.conv_in.weight, atol=1e-3, rtol=1e-3)


def test_a_missing_folder_is_named():
    with pytest.raises(InputError, match=r"no model './nowhere'.*model_index\.json"):
        load_base_model("./nowhere")


def test_a_folder_that_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not a diffusers model.*unet/"):
        load_base_model(str(tmp_path))


def test_a_model_of_another_kind_is_refused_with_its_kind(tiny_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(InputError, match=r"must hold a StableDiffusionXLPipeline, got StableDiffusionPipeline"):
        load_base_model(str(other))


def test_a_model_with_missing_files_is_refused(tiny_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"broken.*could not be loaded"):
        load_base_model(str(broken))


def test_a_model_in_one_file_makes_the_images_of_its_folder(tiny_model, tmp_path):
    save_single_file(tiny_pipeline(), tmp_path / "model.safetensors")
    pipe = load_base_model(str(tmp_path / "model.safetensors"), single_file_config=str(tiny_model))
    torch.testing.assert_close(image(pipe), image(tiny_pipeline()))


def test_a_pickle_is_refused_without_being_read(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.ckpt' must be a \.safetensors file.*run programs"):
        load_base_model(str(tmp_path / "model.ckpt"))


def test_a_file_of_another_kind_is_refused_with_the_missing_components(tmp_path):
    save_file({"lora_unet_input_blocks.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        InputError, match=r"lora\.safetensors' is not a complete SDXL checkpoint.*model\.diffusion_model\..*a LoRA file is not"
    ):
        load_base_model(str(tmp_path / "lora.safetensors"))
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678901")
    with pytest.raises(InputError, match=r"damaged\.safetensors' is not a valid \.safetensors file"):
        load_base_model(str(tmp_path / "damaged.safetensors"))


@pytest.mark.parametrize("single_file", [False, True])
def test_another_autoencoder_replaces_that_of_the_model(tiny_model, tmp_path, single_file):
    other = tiny_pipeline(seed=1).vae
    other.save_pretrained(tmp_path / "vae")
    save_single_file(tiny_pipeline(), tmp_path / "model.safetensors")
    model = str(tmp_path / "model.safetensors") if single_file else str(tiny_model)
    pipe = load_base_model(model, torch.bfloat16, vae=str(tmp_path / "vae"), single_file_config=str(tiny_model))
    assert pipe.vae.dtype == torch.bfloat16
    assert torch.equal(pipe.vae.quant_conv.weight, other.quant_conv.weight.bfloat16())
    assert torch.equal(pipe.unet.conv_in.weight, tiny_pipeline().unet.conv_in.weight.bfloat16())


def test_a_missing_autoencoder_is_reported(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"(?s)autoencoder '.*nowhere' could not be loaded.*AutoencoderKL"):
        load_base_model(str(tiny_model), vae=str(tmp_path / "nowhere"))


def test_only_the_models_own_folder_is_the_built_in_one(tiny_model):
    assert not is_built_in(str(tiny_model))
    assert not is_built_in("owner/model")
