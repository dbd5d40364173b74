"""An adapted CLIP model exported as merged weights, plain LoRA, torch.export and ONNX computes the same."""

import copy
import json
import re
import sys
from functools import partial
from itertools import cycle

import open_clip
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import CONFIG, END, images, prompts, tiny_clip, tiny_coca
from tiny_options import TINY, full_precision_methods

from pipelines import mini_clip
from pipelines.adapter_method import trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.clip import Clip, load_clip
from pipelines.clip_attention import separate
from pipelines.errors import InputError
from pipelines.fewshot import adapters, export
from pipelines.fewshot.adapters import TargetLayers
from pipelines.methods import DEFAULT
from pipelines.mini_sdxl import PROMPT_WORDS, reduced_tokenizer

TOKENS = prompts(3, 5, 9)
EVERYWHERE = TargetLayers(projections=["q", "k", "v", "out"])
methods = pytest.mark.parametrize("method", full_precision_methods())


def adapter_layers(components):
    """Every adapted layer, by encoder and name."""
    return {f"{name}.{layer}": module for name, model in components.items() for layer, module in tuner_layers(model).items()}


def loss_on(clip, pixels, tokens, count):
    """The distance of images to prompts, `count` times."""
    for _ in range(count):
        yield -(clip.encode_images(pixels) @ clip.encode_texts(tokens).T).mean()


def adapted(folder, method="nora", clip=None, tokens=TOKENS, pixels=None, targets=EVERYWHERE, **changes):
    """A tiny model whose adapter's parameters are all changed, as training does."""
    clip = clip or Clip(tiny_clip(), None, None, "tiny")
    options = AdapterOptions(method=method, rank=4, inner_r=2, **TINY, **changes)
    components = adapters.attach(clip, options, targets)
    pixels = images(3) if pixels is None else pixels
    adapters.start(clip, options, components, [pixels], tokens, folder, 0, partial(loss_on, clip, pixels, tokens))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(components):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return clip, components


@torch.no_grad()
def features(model):
    return torch.cat([model.encode_image(images(3), normalize=True), model.encode_text(TOKENS, normalize=True)])


# Merged


HOSTS = {"CLIP": tiny_clip, "CustomTextCLIP": lambda: tiny_clip(custom_text=True), "CoCa": tiny_coca}


# The default method on every kind of model, and every other method on one of them.
MERGED = [(DEFAULT, host) for host in HOSTS] + [
    pair for pair in zip(full_precision_methods(), cycle(HOSTS)) if pair[0] != DEFAULT
]


@pytest.mark.parametrize(("method", "host"), MERGED)
def test_the_merged_model_is_plain_open_clip_with_the_same_outputs_and_keys(method, host, tmp_path):
    clip, _ = adapted(tmp_path, method, Clip(HOSTS[host](), None, None, "tiny"))
    base, plain = HOSTS[host](), export.merged(clip).model
    assert list(plain.state_dict()) == list(base.state_dict())
    assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]
    torch.testing.assert_close(features(plain), features(clip.model), atol=1e-6, rtol=0)
    assert (features(plain) - features(base)).abs().max() > 5e-3


def test_merging_leaves_the_adapted_model_and_every_other_weight_alone(tmp_path):
    clip, components = adapted(tmp_path, targets=TargetLayers("image", ["v"], "last-1"))
    before, base = features(clip.model), tiny_clip().state_dict()
    plain = export.merged(clip).model.state_dict()
    assert torch.equal(features(clip.model), before)
    assert len(adapter_layers(components)) == 1
    changed = {name for name in base if not torch.equal(base[name], plain[name])}
    assert changed == {"visual.transformer.resblocks.2.attn.in_proj_weight"}
    (name,) = changed
    width = CONFIG["vision_cfg"]["width"]
    assert torch.equal(base[name][: 2 * width], plain[name][: 2 * width])


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_merging_uses_the_current_scale(strength, tmp_path):
    clip, components = adapted(tmp_path)
    base, full = tiny_clip().state_dict(), export.merged(clip).model.state_dict()
    adapters.set_scale(components, strength)
    for name, weight in export.merged(clip).model.state_dict().items():
        torch.testing.assert_close(weight, base[name] + strength * (full[name] - base[name]), atol=1e-6, rtol=0)
        assert strength or torch.equal(weight, base[name])


def test_an_adapter_that_is_not_finite_is_not_merged(tmp_path):
    clip, components = adapted(tmp_path)
    trained_parameters(components)[0].data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"visual\.transformer\.resblocks\.0\.attn\.q_proj' cannot be merged"):
        export.merged(clip)


@torch.no_grad()
def test_the_merged_checkpoint_is_loaded_by_open_clip_and_by_name(tmp_path):
    clip, _ = adapted(tmp_path)
    export.save_merged(clip, tmp_path / "merged.safetensors")
    assert load_file(tmp_path / "merged.safetensors").keys() == tiny_clip().state_dict().keys()
    stock = tiny_clip()
    open_clip.load_checkpoint(stock, str(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(features(stock), features(clip.model), atol=1e-6, rtol=0)
    config = tmp_path / "tiny-merged.json"
    config.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(config)
    again = load_clip("tiny-merged", str(tmp_path / "merged.safetensors"))
    assert torch.equal(features(again.model), features(stock))


@torch.no_grad()
def test_the_merged_checkpoint_keeps_the_activation_and_the_preprocessing_of_a_tags_weights(tmp_path, monkeypatch):
    config = tmp_path / "tiny-tagged.json"
    config.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(config)
    save_file(tiny_clip().state_dict(), tmp_path / "tag.safetensors")
    settings = {"file": str(tmp_path / "tag.safetensors"), "quick_gelu": True, "mean": (0.1,) * 3, "std": (0.2,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-tagged", {"original": settings})
    clip, _ = adapted(tmp_path, clip=load_clip("tiny-tagged", "original"))
    export.save_merged(clip, tmp_path / "merged.safetensors")
    again = load_clip("tiny-tagged", str(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(features(again.model), features(clip.model), atol=1e-6, rtol=0)
    white = Image.new("RGB", (16, 16), "white")
    torch.testing.assert_close(again.preprocess(white), torch.full((3, 16, 16), (1 - 0.1) / 0.2))


@torch.no_grad()
def test_the_built_in_models_packed_linears_are_merged_repacked_and_exported(tmp_path):
    tokenizer = reduced_tokenizer([PROMPT_WORDS])
    mini_clip.write_configuration(tmp_path, tokenizer)
    torch.manual_seed(0)
    base = mini_clip.new_model(tmp_path).eval().requires_grad_(False)
    tokens, pixels = mini_clip.tokenize(tokenizer, ["a red star", "a photo of zebras"]), torch.rand(2, 3, 64, 64)
    clip, _ = adapted(tmp_path, clip=Clip(copy.deepcopy(base), None, None, "mini"), tokens=tokens, pixels=pixels)
    plain = export.merged(clip).model
    assert list(plain.state_dict()) == list(base.state_dict())
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    assert changed == {
        name for name in base.state_dict() if re.search(r"\.attn\.(qkv\.|proj\.|out_proj\.|in_proj_)weight$", name)
    }
    assert any(name.endswith("qkv.weight") for name in changed)
    torch.testing.assert_close(Clip(plain, None, None, "").encode_images(pixels), clip.encode_images(pixels), atol=1e-6, rtol=0)
    # Its windows depend on the batch size, which must be dynamic in an exported program.
    image = export.export_towers(clip, tokens)["image"].module()
    torch.testing.assert_close(image(pixels[:1]), clip.encode_images(pixels[:1]), atol=1e-6, rtol=0)


# Plain LoRA


@methods
def test_plain_lora_is_loaded_by_peft_and_computes_the_same(method, tmp_path):
    clip, components = adapted(tmp_path, method)
    assert_plain_lora_is_the_same(clip, components, 0.5 if adapters.allows_any_scale(components) else 1.0, tmp_path / "lora")


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_plain_lora_leaves_out_the_start_that_nora_subtracts(strength, tmp_path):
    clip, components = adapted(tmp_path, inner_init="gaussian", preserve_output=True)
    assert_plain_lora_is_the_same(clip, components, strength, tmp_path / "lora")


def assert_plain_lora_is_the_same(clip, components, strength, folder):
    adapters.set_scale(components, strength)
    export.save_lora(components, folder, strength)
    model = tiny_clip()
    separate(model)
    PeftModel.from_pretrained(model.visual, str(folder / "image"))
    PeftModel.from_pretrained(model.transformer, str(folder / "text"))
    torch.testing.assert_close(features(model), features(clip.model), atol=1e-6, rtol=0)


def test_plain_lora_of_one_encoder_and_some_layers_changes_no_others(tmp_path):
    clip, components = adapted(tmp_path, targets=TargetLayers("text", ["q", "out"], "0-0"))
    export.save_lora(components, tmp_path / "lora")
    assert [folder.name for folder in (tmp_path / "lora").iterdir()] == ["text"]
    model = tiny_clip()
    separate(model)
    PeftModel.from_pretrained(model.transformer, str(tmp_path / "lora" / "text"))
    assert set(adapter_layers({"text": model.transformer})) == set(adapter_layers(components))
    torch.testing.assert_close(features(model), features(clip.model), atol=1e-6, rtol=0)


def test_plain_lora_at_scale_0_changes_nothing_and_is_refused_for_dora(tmp_path):
    for method in ("nora", "lora"):
        _, components = adapted(tmp_path / method, method)
        adapters.set_scale(components, 0.0)
        export.save_lora(components, tmp_path / method, 0.0)
        tensors = load_file(tmp_path / method / "image" / "adapter_model.safetensors")
        assert not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    _, components = adapted(tmp_path / "dora", "dora")
    adapters.set_scale(components, 0.0)
    with pytest.raises(InputError, match=r"magnitudes can be exported as LoRA only at scale 1, got 0 .*q_proj"):
        export.save_lora(components, tmp_path / "dora", 0.0)


# torch.export and ONNX


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("statistics"))[0]


@torch.no_grad()
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_exported_encoders_compute_the_adapted_features_for_any_number_of_inputs(format, clip, tmp_path):
    files = export.save_exported(clip, tmp_path, TOKENS[:2], format)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files.values())
    for count in (1, 3):
        pixels = images(count, seed=5)
        torch.testing.assert_close(export.run_exported(files["image"], pixels), clip.encode_images(pixels), atol=1e-5, rtol=0)
    # The file itself finds the end token: later tokens have no effect, but its position does.
    text, places = prompts(4), torch.arange(len(prompts(4)[0]))
    behind = torch.where(places > 3, 7, text)
    moved = torch.where(places == 4, END, torch.where(places == 3, 7, text))
    tokens = torch.cat([text, behind, moved, prompts(2, 12, 7)])
    found = export.run_exported(files["text"], tokens)
    torch.testing.assert_close(found, clip.encode_texts(tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)
    assert (found[2] - found[0]).abs().max() > 1e-2
    torch.testing.assert_close(export.run_exported(files["text"], text), found[:1], atol=1e-6, rtol=0)


def test_an_export_with_other_features_is_refused(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "run_exported", lambda file, inputs: torch.zeros(len(inputs), 24))
    with pytest.raises(ValueError, match=r"image\.pt2 must match PyTorch's"):
        export.save_exported(clip, tmp_path, TOKENS[:2], "torch")


def test_a_missing_runtime_is_named_with_its_remedy(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install onnxscript"):
        export.save_exported(clip, tmp_path, TOKENS[:2], "onnx")


def test_an_unknown_format_is_refused(clip, tmp_path):
    with pytest.raises(InputError, match="format must be torch or onnx, got 'tflite'"):
        export.save_exported(clip, tmp_path, TOKENS[:2], "tflite")
