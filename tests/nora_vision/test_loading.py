import functools
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import MODELS
from tiny_pipeline import COMPONENTS, TARGETS, add_nora, image, randomise_inner_factors, tiny_pipeline, weight_changes

from nora_vision import (
    NoraConfig,
    calibrate,
    export_lora,
    initialize_nora_weights,
    load_adapter,
    load_nora,
    save_adapter,
    save_nora,
)
from nora_vision.calibration import base_name
from nora_vision.files import read_tensors
from nora_vision.layer import nora_layers

VARIED = {
    "preserve_output": True,
    "inner_init": "gaussian",
    "rank_pattern": {"to_k|[kv]_proj": 5},
    "inner_rank_pattern": {".*attn1.*|fc[12]": 2},
}
LAYOUTS = pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])


def calibrated(pipe, adapter_name="default"):
    """An adapter initialised from activation statistics, then trained."""
    for component in COMPONENTS:
        config = NoraConfig(r=6, inner_r=3, outer_init="awsvd", target_modules=TARGETS[component])
        model = getattr(pipe, component)
        model.add_adapter(config, adapter_name)
        initialize_nora_weights(model, calibrate(model, lambda: image(pipe)), adapter_name)
        randomise_inner_factors(model, adapter_name, torch.Generator().manual_seed(0), std=0.3)


STARTS = {"svd": add_nora, "varied": lambda pipe: add_nora(pipe, **VARIED), "awsvd": calibrated}


@functools.cache
def adapted(start):
    """A pipeline with an adapter; tests must not change it."""
    pipe = tiny_pipeline()
    STARTS[start](pipe)
    return pipe


# Round trips


@LAYOUTS
@pytest.mark.parametrize("start", STARTS)
def test_a_saved_adapter_comes_back_exactly(tmp_path, start, compact):
    pipe, other = adapted(start), tiny_pipeline()
    save_nora(pipe, tmp_path, compact=compact)
    before = torch.get_rng_state()
    assert load_nora(other, tmp_path) == "default_0"
    assert torch.equal(torch.get_rng_state(), before)
    expected, loaded = weight_changes(pipe), weight_changes(other, "default_0")
    assert loaded.keys() == expected.keys()
    for name, change in loaded.items():
        torch.testing.assert_close(change, expected[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(image(other), image(pipe), rtol=0, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in other.unet.parameters())


def test_a_compact_file_contains_no_outer_factors_and_each_scale_once(tmp_path):
    pipe = adapted("awsvd")
    save_nora(pipe, tmp_path / "full")
    save_nora(pipe, tmp_path / "compact", compact=True)
    full, compact = (load_file(tmp_path / layout / "unet" / "adapter_model.safetensors") for layout in ("full", "compact"))
    assert not any(name.endswith(("nora_A", "nora_B")) for name in compact)
    # Query, key and value of a self-attention have the same input, and all cross-attentions have the same text.
    every = [tensor.bfloat16() for name, tensor in full.items() if name.endswith("nora_activation_scale")]
    once = {tuple(scale.tolist()): scale for scale in every}
    assert sum(scale.nbytes for scale in once.values()) < 0.8 * sum(scale.nbytes for scale in every)
    assert compact["nora_activation_scale"].nbytes < sum(scale.nbytes for scale in once.values())
    stored = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in (full, compact)]
    assert stored[1] < stored[0] / 4


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        pipe = tiny_pipeline()
        torch.manual_seed(0)
        add_nora(pipe, **VARIED)
        save_nora(pipe, tmp_path / name / "full")
        save_nora(pipe, tmp_path / name / "compact", compact=True)
    files = [file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*") if file.is_file()]
    assert len(files) == 12
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_peft_reads_a_full_folder_and_refuses_to_run_a_compact_one(tmp_path):
    pipe = adapted("varied")
    save_nora(pipe, tmp_path / "full")
    save_nora(pipe, tmp_path / "compact", compact=True)
    expected = weight_changes(pipe)
    model = PeftModel.from_pretrained(tiny_pipeline().unet, tmp_path / "full" / "unet")
    for name, layer in nora_layers(model.base_model.model).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), expected[f"unet.{name}"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_pipeline().text_encoder, tmp_path / "compact" / "text_encoder")
    with pytest.raises(ValueError, match="outer factors of NoRA adapter 'default' are not set"):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_load_nora_reads_adapters_saved_by_peft(tmp_path):
    pipe, other = tiny_pipeline(), tiny_pipeline()
    add_nora(pipe, components=("text_encoder",))
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")
    load_nora(other, tmp_path, "x")
    torch.testing.assert_close(image(other), image(pipe), rtol=0, atol=0)


@LAYOUTS
def test_regular_expressions_are_saved_as_the_names_they_matched(tmp_path, compact):
    pipe, other = tiny_pipeline(), tiny_pipeline()
    add_nora(pipe, components=("unet",), target_modules=r".*\.attn[12]\.to_[qk]", exclude_modules=r"up_blocks.*")
    save_nora(pipe, tmp_path, compact=compact)
    saved = json.loads((tmp_path / "unet" / "adapter_config.json").read_text())
    assert saved["exclude_modules"] is None
    assert saved["target_modules"] == sorted(nora_layers(pipe.unet))
    load_nora(other, tmp_path)
    torch.testing.assert_close(image(other), image(pipe), rtol=0, atol=1e-4)


@LAYOUTS
def test_modules_to_save_are_saved_and_loaded_with_the_adapter(tmp_path, compact):
    pipe, other = tiny_pipeline(), tiny_pipeline()
    add_nora(pipe, components=("unet",), target_modules=["to_q"], modules_to_save=["conv_out"])
    pipe.unet.conv_out.modules_to_save["default"].weight.data.mul_(3)
    save_nora(pipe, tmp_path, compact=compact)
    load_nora(other, tmp_path, "x")
    torch.testing.assert_close(image(other), image(pipe), rtol=0, atol=1e-4)


@LAYOUTS
@pytest.mark.parametrize("kind", MODELS)
def test_one_model_of_any_kind_is_saved_and_loaded(tmp_path, kind, compact):
    model, inputs, targets = MODELS[kind]()
    config = NoraConfig(r=4, inner_r=2, target_modules=targets, inner_init="gaussian", inner_std=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config).eval()
    save_adapter(adapted, tmp_path, compact=compact)
    fresh, _, _ = MODELS[kind]()
    load_adapter(fresh, tmp_path)
    for (name, layer), loaded in zip(nora_layers(adapted.base_model.model).items(), nora_layers(fresh).values(), strict=True):
        torch.testing.assert_close(loaded.get_delta_weight("default"), layer.get_delta_weight("default"), msg=name)
    assert inputs is not None
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        load_adapter(fresh, tmp_path)


@LAYOUTS
def test_half_precision_pipelines_keep_their_adapter(tmp_path, compact):
    pipe, other = tiny_pipeline().to(torch.bfloat16), tiny_pipeline().to(torch.bfloat16)
    add_nora(pipe)
    save_nora(pipe, tmp_path, compact=compact)
    load_nora(other, tmp_path, "x")
    expected, loaded = weight_changes(pipe), weight_changes(other, "x")
    for name, change in loaded.items():
        torch.testing.assert_close(change, expected[name], rtol=1e-5, atol=1e-6)
    assert {layer.nora_A["x"].dtype for layer in nora_layers(other.unet).values()} == {torch.bfloat16}
    assert {layer.nora_inner_A["x"].dtype for layer in nora_layers(other.unet).values()} == {torch.float32}


# In a pipeline


def test_a_pipeline_treats_nora_as_lora(tmp_path):
    """The same calls on a pipeline with two NoRA adapters and on one with the LoRA files of both."""
    native, stock = tiny_pipeline(), tiny_pipeline()
    for seed, name in enumerate(("a", "b")):
        pipe = tiny_pipeline()
        add_nora(pipe, seed=seed, components=COMPONENTS if name == "a" else ("unet", "text_encoder_2"))
        load_nora(native, save_nora(pipe, tmp_path / name, compact=name == "a"), name)
        stock.load_lora_weights(export_lora(pipe, tmp_path / name), adapter_name=name)
    images = [image(tiny_pipeline())]
    for call in (
        lambda pipe: None,
        lambda pipe: pipe.set_adapters("a"),
        lambda pipe: pipe.set_adapters("a", 0.4),
        lambda pipe: pipe.set_adapters(["a", "b"], [0.7, -0.5]),
        lambda pipe: pipe.set_adapters(["b", "a"], [{"unet": 0.3, "text_encoder_2": 1.5}, 0.5]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.fuse_lora(lora_scale=0.6),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.set_adapters(["a", "b"]),
        lambda pipe: pipe.fuse_lora(adapter_names=["b"], safe_fusing=True),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.delete_adapters("a"),
        lambda pipe: pipe.set_adapters("b"),
        lambda pipe: pipe.delete_adapters("b"),
        lambda pipe: pipe.unload_lora_weights(),
    ):
        for pipe in (native, stock):
            call(pipe)
        torch.testing.assert_close(image(native), image(stock), rtol=0, atol=2e-4)
        assert native.get_list_adapters() == stock.get_list_adapters()
        assert native.get_active_adapters() == stock.get_active_adapters()
        assert native.num_fused_loras == stock.num_fused_loras
        images.append(image(native))
    torch.testing.assert_close(images[-1], images[0], rtol=0, atol=1e-5)
    assert len({tuple(p.mul(255).round().flatten().tolist()) for p in images}) > 8


@pytest.mark.parametrize("nora_first", [True, False])
def test_nora_and_lora_work_together(tmp_path, nora_first):
    subject, style, pipe = adapted("svd"), tiny_pipeline(), tiny_pipeline()
    add_nora(style, seed=1)
    plain = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    save_nora(subject, tmp_path / "subject", compact=True)
    file = export_lora(style, tmp_path / "style")
    for step in (True, False):
        if step == nora_first:
            load_nora(pipe, tmp_path / "subject", "subject")
        else:
            pipe.load_lora_weights(file, adapter_name="style")
    alone, beside = (
        read_tensors(export_lora(p, tmp_path / "export", name)) for p, name in ((subject, "default"), (pipe, "subject"))
    )
    assert alone.keys() == beside.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(beside[key], tensor, rtol=1e-4, atol=1e-5)
    pipe.set_adapters(["subject", "style"])
    pipe.fuse_lora()
    changes = [weight_changes(subject), weight_changes(style)]
    weights = {base_name(name): tensor for name, tensor in pipe.unet.state_dict().items()}
    for name, tensor in plain.items():
        layer = f"unet.{name.removesuffix('.weight')}"
        expected = tensor + sum(change[layer] for change in changes) if layer in changes[0] else tensor
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-5)
    pipe.unfuse_lora()
    pipe.delete_adapters("style")
    pipe.set_adapters("subject")
    torch.testing.assert_close(image(pipe), image(subject), rtol=0, atol=1e-4)


def test_weights_add_the_changes_and_fusing_writes_the_sum(tmp_path):
    pipe = tiny_pipeline()
    plain = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    for seed, name in enumerate(("a", "b")):
        source = tiny_pipeline()
        add_nora(source, seed=seed)
        load_nora(pipe, save_nora(source, tmp_path / name), name)
    pipe.set_adapters(["a", "b"], [0.7, -0.5])
    changes = {name: weight_changes(pipe, name) for name in ("a", "b")}
    pipe.fuse_lora()
    for name, layer in nora_layers(pipe.unet).items():
        # A layer's change includes the weight that set_adapters gave it.
        expected = plain[f"{name}.weight"] + changes["a"][f"unet.{name}"] + changes["b"][f"unet.{name}"]
        torch.testing.assert_close(layer.get_base_layer().weight, expected, rtol=1e-5, atol=1e-6)
    pipe.unfuse_lora()
    for name, layer in nora_layers(pipe.unet).items():
        torch.testing.assert_close(layer.get_base_layer().weight, plain[f"{name}.weight"], rtol=1e-5, atol=1e-6)


def test_saving_over_an_adapter_of_more_components_removes_them(tmp_path):
    other = tiny_pipeline()
    add_nora(other, components=("unet",), seed=1)
    save_nora(adapted("svd"), tmp_path)
    save_nora(other, tmp_path)
    fresh = tiny_pipeline()
    load_nora(fresh, tmp_path)
    torch.testing.assert_close(image(fresh), image(other), rtol=0, atol=0)
