"""LoRA files of other programs make of each layer what their own programs' algebra says, or are called what they are."""

import json
import shutil

import foreign_lora as foreign
import pytest
import torch
from foreign_lora import assert_is, decomposed, module_of
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from shared_cases import case_folder
from tiny_pipeline import TARGETS, add_nora, tiny_pipeline

from nora_vision import AdapterFileError, export_lora
from nora_vision.components import adapters_by_component
from nora_vision.kohya import kohya_name, stability_name
from pipelines.errors import InputError
from pipelines.subject import lora_files
from pipelines.subject.adapters import load_adapter
from pipelines.subject.base_model import BUILT_IN_MODEL, load_base_model
from pipelines.subject.generate import GenerationOptions, main

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OUTPUT = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONVOLUTION = "unet.mid_block.resnets.0.conv1"
STRIDED = "unet.down_blocks.0.downsamplers.0.conv"
NORM = "unet.mid_block.attentions.0.transformer_blocks.0.norm1"
GROUP_NORM = "unet.mid_block.resnets.0.norm1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
TEXT_2 = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
KINDS = [(LINEAR, kind) for kind in foreign.FOR_LINEAR] + [
    (layer, kind) for layer in (CONVOLUTION, STRIDED) for kind in foreign.FOR_CONVOLUTION
]


@pytest.fixture(scope="module")
def model():
    """The tiny model, on which every test loads and deletes."""
    torch.manual_seed(0)
    return tiny_pipeline()


@pytest.fixture(autouse=True)
def seeded(request):
    torch.manual_seed(len(request.node.name))


@pytest.fixture
def loaded(model, tmp_path):
    """Loads tensors as a file, and leaves the model as it was."""

    def load(tensors, metadata=None, name="some.safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata)
        return load_adapter(model, tmp_path / name, "x")

    yield load
    if any("x" in names for names in adapters_by_component(model).values()):
        model.delete_adapters(["x"])


def kohya(layer):
    component, _, name = layer.partition(".")
    return kohya_name(component, name, 1)


def weight_of(pipe, layer):
    module = module_of(pipe, layer)
    return (module.get_base_layer() if hasattr(module, "get_base_layer") else module).weight.detach()


@pytest.mark.parametrize("lengths", [None, foreign.by_rows, foreign.by_columns], ids=["plain", "rows", "columns"])
@pytest.mark.parametrize(("layer", "kind"), KINDS, ids=[f"{kind.__name__}-{layer[-5:]}" for layer, kind in KINDS])
def test_every_kind_makes_the_weight_that_its_own_algebra_says(model, loaded, layer, kind, lengths):
    weight = weight_of(model, layer)
    parts, change = kind(weight)
    expected = weight + change
    if lengths is not None:
        parts["dora_scale"], expected = decomposed(weight, change, lengths)
    assert loaded({f"{kohya(layer)}.{part}": tensor for part, tensor in parts.items()}) == []
    assert_is(module_of(model, layer), expected)
    if lengths is None:
        model.set_adapters(["x"], adapter_weights=[-0.25])
        assert_is(module_of(model, layer), weight - 0.25 * change)
    model.unet.disable_adapters()
    assert_is(module_of(model, layer), weight)
    model.unet.enable_adapters()


def test_one_file_may_hold_every_kind_and_a_dora_beside_a_lora(model, loaded):
    weights = {layer: weight_of(model, layer) for layer in (LINEAR, OUTPUT, CONVOLUTION, TEXT, TEXT_2)}
    kinds = dict(zip(weights, (foreign.lora, foreign.loha, foreign.tucker, foreign.lokr, foreign.diff), strict=True))
    tensors, expected = {}, {}
    for layer, weight in weights.items():
        parts, change = kinds[layer](weight)
        expected[layer] = weight + change
        if layer == LINEAR:
            parts["dora_scale"], expected[layer] = decomposed(weight, change, foreign.by_rows)
        tensors |= {f"{kohya(layer)}.{part}": tensor for part, tensor in parts.items()}
    loaded(tensors)
    for layer, weight in expected.items():
        assert_is(module_of(model, layer), weight)


@pytest.mark.parametrize("words", [("diff", "diff_b"), ("w_norm", "b_norm")])
@pytest.mark.parametrize("layer", [NORM, GROUP_NORM])
def test_norms_are_changed_at_any_strength(model, loaded, layer, words):
    norm = module_of(model, layer)
    base = norm.get_base_layer() if hasattr(norm, "get_base_layer") else norm
    changes = [foreign.randn(*base.weight.shape), foreign.randn(*base.bias.shape)]
    loaded({f"{kohya(layer)}.{word}": change for word, change in zip(words, changes, strict=True)})
    assert_is(module_of(model, layer), base.weight + changes[0], base.bias + changes[1])
    model.set_adapters(["x"], adapter_weights=[0.5])
    assert_is(module_of(model, layer), base.weight + 0.5 * changes[0], base.bias + 0.5 * changes[1])
    model.delete_adapters(["x"])
    assert_is(module_of(model, layer), base.weight, base.bias)


@pytest.mark.parametrize("layer", [OUTPUT, CONVOLUTION])
def test_a_bias_is_changed_beside_the_weight_and_alone(model, loaded, layer):
    weight, bias = weight_of(model, layer), module_of(model, layer).bias.detach()
    parts, change = foreign.lora(weight)
    of_bias = foreign.randn(len(weight))
    loaded({f"{kohya(layer)}.{part}": tensor for part, tensor in {**parts, "diff_b": of_bias}.items()})
    assert_is(module_of(model, layer), weight + change, bias + of_bias)
    model.delete_adapters(["x"])
    loaded({f"{kohya(layer)}.diff_b": of_bias})
    assert_is(module_of(model, layer), weight, bias + of_bias)


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


@torch.no_grad()
def output_of(unet):
    """What a UNet makes of fixed inputs, (1, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    width, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim - 48
    noisy, text, embeds = (torch.randn(1, *shape, generator=generator) for shape in ((4, 8, 8), (3, width), (pooled,)))
    more = {"text_embeds": embeds, "time_ids": torch.zeros(1, 6)}
    return unet(noisy, torch.tensor([5]), encoder_hidden_states=text, added_cond_kwargs=more).sample


def peft_folder(tmp_path, unet, config):
    """What PEFT's save_pretrained writes of an adapter with random factors, and the state of that adapter's model."""
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
def test_a_folder_of_peft_is_what_peft_makes_of_it(model, tmp_path, name):
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
def test_our_own_exports_of_a_dora_come_back_as_they_were(model, tmp_path, format):
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=1.5, target_modules=TARGETS["unet"], use_dora=True), "default")
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data = parameter + 0.2 * torch.rand(parameter.shape)
    load_adapter(model, export_lora(pipe, tmp_path / "x.safetensors", format=format), "x")
    torch.testing.assert_close(output_of(model.unet), output_of(pipe.unet), rtol=1e-4, atol=1e-4)
    model.delete_adapters(["x"])


def good(layer=LINEAR, width=24):
    return {f"{kohya(layer)}.lora_up.weight": torch.ones(width, 2), f"{kohya(layer)}.lora_down.weight": torch.ones(2, width)}


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
        ({"unet.some_future_flag": True}, r"'unet.some_future_flag' is not one of a LoRA: True"),
        ({"unet.init_lora_weights": "pissa"}, r"'unet.init_lora_weights' is not one of a LoRA: 'pissa'"),
        ({"unet.modules_to_save": ["conv_in"]}, r"modules_to_save"),
        ({"unet.r": "many"}, r"'unet.r' is not one"),
        ({"unet.r": 5, "unet.lora_alpha": 1}, r"configuration says rank 5, and its tensors have rank 2"),
        ({"unet.use_dora": True}, r"says use_dora, and there is no lora_magnitude_vector"),
        ({"unet.peft_type": "OFT"}, r"an adapter of PEFT's type 'OFT'; LoRA, DoRA, LoHa and LoKr are read"),
    ],
)
def test_settings_that_would_change_something_are_refused_by_name(loaded, configuration, message):
    with pytest.raises(ValueError, match=message):
        loaded(good(), {"lora_adapter_metadata": json.dumps(configuration)})


def test_what_no_layer_takes_is_left_out_by_name(model, loaded):
    embeddings = {"bundle_emb.blue mug.clip_l": torch.ones(3, 16), "bundle_emb.blue mug.clip_g": torch.ones(3, 24)}
    said = loaded({**good(), **embeddings, "step": torch.tensor(7)})
    assert len(said) == 2
    assert "embeddings of words ('blue mug'), a textual inversion, which are left out" in said[0]
    assert "also holds 'step', which is of no layer and is left out" in said[1]
    assert_is(module_of(model, LINEAR), weight_of(model, LINEAR) + 2)


FLUX = "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"
OLD = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
OTHERS = {
    "textual inversion": ({"clip_l": (4, 16), "clip_g": (4, 24)}, r"is a textual inversion .* and not a LoRA"),
    "textual inversion of diffusers": ({"<cat toy>": (1, 768)}, r"is a textual inversion"),
    "textual inversion of A1111": ({"emb_params": (4, 768)}, r"is a textual inversion"),
    "Flux": ({FLUX: (2, 3072), FLUX.replace("_A", "_B"): (3072, 2)}, r"is a LoRA of Flux, and does not fit"),
    "Flux of kohya": ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 3072)}, r"is a LoRA of Flux"),
    "SD3": ({"lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight": (2, 1536)}, r"is a LoRA of SD3"),
    "SD 1.5": ({OLD: (2, 768)}, r"is a LoRA of Stable Diffusion 1\.5, and does not fit.*Choose a LoRA that was trained on SDXL"),
    "SD 2": ({OLD: (2, 1024)}, r"is a LoRA of Stable Diffusion 2"),
    "the refiner": ({OLD: (2, 1280)}, r"is a LoRA of the SDXL refiner"),
    "SDXL itself": (
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (2, 2048)},
        r"is a LoRA of SDXL, and does not fit this base model.*--pretrained_model_name_or_path",
    ),
    "OFT": ({"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": (2, 4, 4)}, r"is an OFT or BOFT adapter .*LoHa, LoKr"),
    "GLoRA": ({"lora_unet_mid_block_attentions_0_proj_in.a1.weight": (2, 4)}, r"is a GLoRA adapter"),
    "IA3": ({"lora_unet_mid_block_attentions_0_proj_in.on_input": (1,)}, r"is an \(IA\)\^3 adapter"),
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
def test_what_is_no_lora_of_this_model_is_called_what_it_is(loaded, kind):
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
def test_a_header_says_which_model_a_file_that_does_not_fit_was_made_for(loaded, said, trained_on):
    with pytest.raises(InputError, match=rf"is a LoRA of {trained_on}, and does not fit"):
        loaded({"lora_unet_mid_block_attentions_9_proj_in.lora_down.weight": torch.ones(2, 2)}, said)


DAMAGED = {
    "an unknown tensor": (lambda t: {**t, "unet.mid_block.other": torch.ones(2)}, r"nothing uses 'unet.mid_block.other'"),
    "an unknown layer": (lambda t: {**t, "unet.mid_block.x.lora_A.weight": torch.ones(2, 2)}, r"nothing uses 'unet.mid_block.x"),
    "half a layer": (lambda t: dict([*t.items()][:1]), r"(up|down) is missing"),
    "two names of one layer": (lambda t: {**t, f"{LINEAR}.lora_A.weight": torch.ones(2, 24)}, r"nothing uses"),
    "ranks that differ": (lambda t: {**t, f"{kohya(LINEAR)}.lora_up.weight": torch.ones(24, 3)}, r"ranks 3 and 2"),
    "another width": (lambda t: good(width=25), r"changes a weight of 25 x 25, the model's is 24 x 24"),
    "two alphas": (lambda t: {**t, f"{kohya(LINEAR)}.alpha": torch.ones(2)}, r"alpha must be one number"),
    "whole numbers": (lambda t: {name: tensor.long() for name, tensor in t.items()}, r"must hold fractions"),
    "no dimension": (lambda t: {name: torch.tensor(1.0) for name in t}, r"has shape \(\)"),
    "lengths of another layer": (
        lambda t: {**t, f"{kohya(LINEAR)}.dora_scale": torch.ones(7, 1)},
        r"dora_scale has shape \(7, 1\)",
    ),
    "a LoHa's half": (lambda t: {f"{kohya(LINEAR)}.hada_w1_a": torch.ones(24, 2)}, r"hada_w1_b.* missing"),
    "a huge product": (
        lambda t: {f"{kohya(LINEAR)}.lokr_w1": torch.ones(300, 300), f"{kohya(LINEAR)}.lokr_w2": torch.ones(300, 300)},
        r"changes a weight of 90000 x 90000",
    ),
    "a bias of a layer that has none": (lambda t: {f"{kohya(LINEAR)}.diff_b": torch.ones(24)}, r"the layer has none"),
    "a norm of another width": (lambda t: {f"{kohya(NORM)}.w_norm": torch.ones(3)}, r"diff has 3 numbers"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_tensor_that_nothing_uses_and_a_layer_that_gets_nothing_are_errors(model, loaded, damage):
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
    with pytest.raises(InputError, match=r"no layer of the model got anything"):
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
def test_what_a_failed_download_leaves_is_named(model, tmp_path, content, message):
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
    with pytest.raises(AdapterFileError, match=r"holds 'adapter_model.bin', a pickle"):
        load_adapter(model, folder, "x")


def test_kinds_mix_at_their_strengths_and_are_deleted_alone(tmp_path):
    pipe = tiny_pipeline()
    before, expected = output_of(pipe.unet), {}
    add_nora(pipe, components=("unet",), target_modules=[LINEAR.removeprefix("unet.")])
    pipe.disable_lora()
    base = weight_of(pipe, LINEAR).clone()
    norm = module_of(pipe, NORM)
    for place, kind in enumerate((foreign.lora, foreign.loha, foreign.lokr, foreign.diff)):
        parts, change = kind(base)
        tensors = {f"{kohya(LINEAR)}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{kohya(NORM)}.w_norm"] = torch.full_like(norm.weight, 0.1 * place)
        save_file(tensors, tmp_path / f"{place}.safetensors")
        load_adapter(pipe, tmp_path / f"{place}.safetensors", f"a{place}")
        expected[f"a{place}"] = change
    pipe.enable_lora()
    strengths = dict(zip(expected, (0.5, -1.0, 2.0, 0.25), strict=True))
    pipe.set_adapters(list(strengths), adapter_weights=list(strengths.values()))
    total = sum(strength * expected[name] for name, strength in strengths.items())
    assert_is(module_of(pipe, LINEAR), base + total)
    assert_is(module_of(pipe, NORM), norm.weight + sum(0.1 * place * s for place, s in enumerate(strengths.values())))
    pipe.delete_adapters(["a1", "default"])
    assert_is(module_of(pipe, LINEAR), base + total + expected["a1"])
    with pytest.raises(ValueError, match=r"norm1 has a change of a bias or a norm, which a LoRA file cannot hold"):
        export_lora(pipe, tmp_path / "mix.safetensors", {"a0": 1.0, "a2": 1.0})
    pipe.delete_adapters(["a0", "a2", "a3"])
    torch.testing.assert_close(output_of(pipe.unet), before)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_mix_of_kinds_is_exported_as_one_lora_that_stock_diffusers_reads(tmp_path, format):
    pipe, stock, names = tiny_pipeline(), tiny_pipeline(), {}
    for place, kind in enumerate((foreign.lora, foreign.loha, foreign.lokr_factored, foreign.diff, foreign.tucker)):
        layer = CONVOLUTION if kind is foreign.tucker else LINEAR
        parts, _ = kind(weight_of(pipe, layer))
        save_file({f"{kohya(layer)}.{part}": tensor for part, tensor in parts.items()}, tmp_path / f"{place}.safetensors")
        load_adapter(pipe, tmp_path / f"{place}.safetensors", f"a{place}")
        names[f"a{place}"] = 0.5 + place
    pipe.set_adapters(list(names), adapter_weights=list(names.values()))
    stock.load_lora_weights(export_lora(pipe, tmp_path / "mix" / "x.safetensors", names, format))
    torch.testing.assert_close(output_of(stock.unet), output_of(pipe.unet), rtol=1e-4, atol=1e-4)


CASES = {
    "lora-alpha-integers": ("alpha_int64", "alpha_f64", "weights_fp8", "extra_int_tensor"),
    "lora-default-in-names": ("peft_default_in_names",),
    "lora-dora-kohya": ("dora_kohya",),
    "lora-peft-names": ("peft_base_model_prefix", "diffusers_without_unet_prefix", "peft_folder/adapter_model"),
    "lora-other-kinds": (
        *("loha", "lokr", "locon_tucker_mid", "full_diff_only", "lora_plus_diff_b", "with_norms"),
        *("onetrainer_omi_dotted", "onetrainer_bundle_emb", "onetrainer_bundle_emb_nospace"),
    ),
}


@pytest.fixture(scope="module")
def built_in():
    return load_base_model(str(BUILT_IN_MODEL), torch.float32, "cpu")


def parts_by_layer(pipe, tensors):
    """The tensors of a case by the UNet's layer that they are of, told by each of the names that a layer may have."""
    table = {}
    for name, module in pipe.unet.named_modules():
        module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm)) and ".base_layer" not in name:
            stability = stability_name(name, pipe.unet.config.layers_per_block)
            spelled = f"lora_unet_{stability.replace('.', '_')}", f"unet.{stability}", f"unet.{name}", name
            table |= dict.fromkeys([*spelled, f"base_model.model.{name}"], name)
    grouped = {}
    for key, tensor in tensors.items():
        layer = next((layer for layer in table if key.startswith(f"{layer}.")), None)
        if layer is not None:
            part = (
                key.removeprefix(f"{layer}.").replace("lora_A", "lora_down").replace("lora_B", "lora_up").replace(".default", "")
            )
            grouped.setdefault(table[layer], {})[part] = tensor.float()
    return grouped


def expected_parameters(base, parts):
    """Weight and bias that a layer's tensors make, by the algebra of each kind."""
    change = torch.zeros_like(base.weight)
    if "lora_mid.weight" in parts:
        up, mid, down = (parts[f"lora_{part}.weight"] for part in ("up", "mid", "down"))
        change = torch.einsum("om,mnkl,ni->oikl", up[..., 0, 0], mid, down[..., 0, 0]) * parts["alpha"] / len(down)
    elif "lora_up.weight" in parts:
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        change = up @ down * parts.get("alpha", torch.tensor(float(len(down)))) / len(down)
    elif "hada_w1_a" in parts:
        first, second = (parts[f"hada_w{place}_a"] @ parts[f"hada_w{place}_b"] for place in (1, 2))
        change = first * second * parts["alpha"] / len(parts["hada_w1_b"])
    elif "lokr_w1" in parts:
        right = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        change = torch.kron(parts["lokr_w1"], right) * parts["alpha"] / len(parts["lokr_w2_b"])
    weight = base.weight + change + parts.get("diff", 0) + parts.get("w_norm", 0)
    if "dora_scale" in parts:
        weight = parts["dora_scale"] * weight / weight.norm(dim=1, keepdim=True)
    return weight.detach(), None if base.bias is None else base.bias + parts.get("diff_b", 0) + parts.get("b_norm", 0)


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, names in CASES.items() for name in names])
def test_a_file_from_a_bug_report_makes_the_weights_that_it_says(built_in, case, name):
    path = case_folder(case) / f"{name}.safetensors"
    grouped = parts_by_layer(built_in, load_file(path))
    assert grouped
    bases = {layer: built_in.unet.get_submodule(layer) for layer in grouped}
    bases = {layer: base.get_base_layer() if hasattr(base, "get_base_layer") else base for layer, base in bases.items()}
    said = load_adapter(built_in, path.parent if "/" in name else path, "x")
    assert len(said) == (1 if "extra_int" in name or "bundle_emb" in name else 0)
    for layer, parts in grouped.items():
        assert_is(built_in.unet.get_submodule(layer), *expected_parameters(bases[layer], parts))
    built_in.delete_adapters(["x"])


def test_a_textual_inversion_from_a_bug_report_is_called_one(built_in):
    with pytest.raises(InputError, match=r"textual_inversion.safetensors is a textual inversion .*LoRA, DoRA, LoCon"):
        load_adapter(built_in, case_folder("lora-other-kinds") / "textual_inversion.safetensors", "x")


def test_the_command_draws_with_a_file_whose_names_hold_an_adapters_name(tmp_path, caplog):
    folder = case_folder("lora-default-in-names")
    plain = {
        name.replace(".default", ""): tensor.float() for name, tensor in load_file(next(folder.glob("*.safetensors"))).items()
    }
    save_file({**plain, "step": torch.tensor(3)}, tmp_path / "plain.safetensors")
    drawn = []
    for place, file in enumerate((next(folder.glob("*.safetensors")), tmp_path / "plain.safetensors")):
        given = {"prompt": ["a red star"], "adapter": [str(file)], "output_dir": str(tmp_path / str(place))}
        drawn.append(Image.open(main(GenerationOptions(**given, num_inference_steps=2))[0]).convert("RGB"))
    first, second = (torch.tensor(list(image.get_flattened_data())).float() for image in drawn)
    assert first.std() > 5
    assert (first - second).abs().max() <= 1
    assert "also holds 'step', which is of no layer and is left out" in caplog.text
