"""LoRA files with the layer names of every program, as files and in folders."""

import shutil

import foreign_lora as foreign
import pytest
import torch
from foreign_lora import LINEAR, OUTPUT, TEXT, TEXT_2, assert_is, kohya, module_of, output_of, weight_of
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_pipeline import TARGETS, add_nora, tiny_pipeline

from nora_vision import AdapterFileError, export_lora
from pipelines.subject.adapters import load_adapter


def dotted(layer, ups="lora_B.weight", downs="lora_A.weight", change=str):
    name = change(layer)
    return {f"{name}.{ups}": 0, f"{name}.{downs}": 1}


DIALECTS = {
    "diffusers": lambda layer: dotted(layer),
    "an adapter's name": lambda layer: dotted(layer, "lora_B.default.weight", "lora_A.default.weight"),
    "another adapter's name": lambda layer: dotted(layer, "lora_B.default_0.weight", "lora_A.default_0.weight"),
    "lora_up": lambda layer: dotted(layer, "lora_up.weight", "lora_down.weight"),
    "lora.up": lambda layer: dotted(layer, "lora.up.weight", "lora.down.weight"),
    "lora_linear_layer": lambda layer: dotted(layer, "lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    "PEFT": lambda layer: dotted(layer, change=lambda name: f"base_model.model.{name}"),
    "kohya": lambda layer: dotted(layer, "lora_up.weight", "lora_down.weight", kohya),
    "kohya, diffusers' blocks": lambda layer: dotted(
        layer, "lora_up.weight", "lora_down.weight", lambda name: f"lora_{name.replace('.', '_')}"
    ),
    "OneTrainer": lambda layer: dotted(
        layer, "lora_up.weight", "lora_down.weight", lambda name: f"unet.{ONETRAINER.get(name, name)}"
    ),
    "no unet.": lambda layer: dotted(layer, change=lambda name: name.removeprefix("unet.")),
    "PEFT, no unet.": lambda layer: dotted(layer, change=lambda name: f"base_model.model.{name.removeprefix('unet.')}"),
    "processor": lambda layer: {
        f"{layer.replace('attn1.', 'attn1.processor.').removesuffix('.0')}_lora.{side}.weight": place
        for place, side in enumerate(("up", "down"))
    },
}
ONETRAINER = {
    LINEAR: "middle_block.1.transformer_blocks.0.attn1.to_q",
    OUTPUT: "middle_block.1.transformer_blocks.0.attn1.to_out.0",
}


@pytest.mark.parametrize("layer", [LINEAR, OUTPUT])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_way_to_name_a_layer_is_read(model, loaded, dialect, layer):
    weight = weight_of(model, layer)
    factors = foreign.randn(len(weight), 2), foreign.randn(2, weight.shape[1])
    loaded({name: factors[place] for name, place in DIALECTS[dialect](layer).items()})
    assert_is(module_of(model, layer), weight + factors[0] @ factors[1])


TEXT_NAMES = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": TEXT,
    "text_encoder.encoder.layers.0.self_attn.q_proj": TEXT,
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q": TEXT,
    "base_model.model.text_encoder.text_model.encoder.layers.0.self_attn.q_proj": TEXT,
    "base_model.model.text_model.encoder.layers.0.self_attn.q_proj": TEXT,
    "clip_l.text_model.encoder.layers.0.self_attn.q_proj": TEXT,
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": TEXT,
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": TEXT_2,
    "clip_g.text_model.encoder.layers.0.mlp.fc1": TEXT_2,
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": TEXT_2,
    "base_model.model.text_model.encoder.layers.0.mlp.fc1": TEXT_2,
}


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_every_way_to_name_a_text_encoders_layer_is_read(model, loaded, name):
    layer = TEXT_NAMES[name]
    weight = weight_of(model, layer)
    up, down = foreign.randn(len(weight), 2), foreign.randn(2, weight.shape[1])
    loaded({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down})
    assert_is(module_of(model, layer), weight + up @ down)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float16, torch.bfloat16])
def test_an_alpha_may_have_any_dtype_and_either_shape(model, loaded, dtype, shape):
    weight = weight_of(model, LINEAR)
    parts, change = foreign.lora(weight)
    parts["alpha"] = torch.full(shape, 6, dtype=dtype)
    loaded({f"{kohya(LINEAR)}.{part}": tensor for part, tensor in parts.items()})
    assert_is(module_of(model, LINEAR), weight + 4 * change)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_weights_may_have_eight_bits_or_sixty_four(model, loaded, dtype):
    weight = weight_of(model, LINEAR)
    up, down = foreign.randn(len(weight), 2).to(dtype), foreign.randn(2, weight.shape[1]).to(dtype)
    loaded({f"{kohya(LINEAR)}.lora_up.weight": up, f"{kohya(LINEAR)}.lora_down.weight": down})
    assert_is(module_of(model, LINEAR), weight + up.float() @ down.float())


def peft_folder(tmp_path, unet, config):
    """A folder that PEFT's save_pretrained wrote for an adapter with random factors, and that adapter's model."""
    adapted = get_peft_model(unet, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = foreign.randn(*parameter.shape) + (1 if "magnitude" in name else 0)
    save_file(get_peft_model_state_dict(adapted), tmp_path / "adapter_model.safetensors")
    config.base_model_name_or_path = "C:\\my models\\sd xl"
    config.save_pretrained(tmp_path)
    return adapted.get_base_model()


PEFT_CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"]),
    "patterns": LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], rank_pattern={"attn1.to_q": 3}, alpha_pattern={"to_q": 9}),
    "rslora": LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"], use_dora=True),
    "expression": LoraConfig(r=4, lora_alpha=2, target_modules=r".*mid_block.*to_q"),
    "bias": LoraConfig(r=4, lora_alpha=2, target_modules=["to_out.0"], lora_bias=True),
    "loha": LoHaConfig(r=2, alpha=6, target_modules=["to_q", "conv1"], init_weights=False),
    "loha, tucker": LoHaConfig(r=2, alpha=6, target_modules=["conv1"], use_effective_conv2d=True, init_weights=False),
    "lokr": LoKrConfig(r=2, alpha=6, target_modules=["to_q", "conv1"], init_weights=False),
    "lokr, whole": LoKrConfig(r=64, alpha=32, target_modules=["to_q"], init_weights=False),
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_a_folder_saved_by_peft_gives_the_same_model_as_in_peft(model, tmp_path, name):
    expected = peft_folder(tmp_path, tiny_pipeline().unet, PEFT_CONFIGS[name])
    load_adapter(model, tmp_path, "x")
    theirs, ours = output_of(expected), output_of(model.unet)
    model.delete_adapters(["x"])
    base = output_of(model.unet)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 1e-3


def test_a_folder_of_diffusers_is_read_and_one_of_a_single_file(model, tmp_path):
    pipe = tiny_pipeline()
    add_nora(pipe, components=("unet",), target_modules=["to_q", "conv1"], r=4, inner_r=2)
    expected = output_of(pipe.unet)
    for format in ("diffusers", "kohya"):
        export_lora(pipe, tmp_path / format, format=format)
        load_adapter(model, tmp_path / format, "x")
        torch.testing.assert_close(output_of(model.unet), expected, rtol=1e-4, atol=1e-4)
        model.delete_adapters(["x"])
    shutil.copy(tmp_path / "kohya" / "default.safetensors", tmp_path / "kohya" / "Second.SAFETENSORS")
    load_adapter(model, tmp_path / "kohya" / "Second.SAFETENSORS", "x")
    torch.testing.assert_close(output_of(model.unet), expected, rtol=1e-4, atol=1e-4)
    model.delete_adapters(["x"])
    with pytest.raises(AdapterFileError, match=r"holds 2 \.safetensors files, such as 'Second.SAFETENSORS'"):
        load_adapter(model, tmp_path / "kohya", "x")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_exported_doras_are_loaded_unchanged(model, tmp_path, format):
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=1.5, target_modules=TARGETS["unet"], use_dora=True), "default")
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data = parameter + 0.2 * torch.rand(parameter.shape)
    load_adapter(model, export_lora(pipe, tmp_path / "x.safetensors", format=format), "x")
    torch.testing.assert_close(output_of(model.unet), output_of(pipe.unet), rtol=1e-4, atol=1e-4)
    model.delete_adapters(["x"])
