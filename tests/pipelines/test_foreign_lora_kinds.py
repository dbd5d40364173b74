"""LoRA files of every kind give the weights of their own equations, alone and combined."""

import foreign_lora as foreign
import pytest
import torch
from foreign_lora import (
    CONVOLUTION,
    GROUP_NORM,
    LINEAR,
    NORM,
    OUTPUT,
    STRIDED,
    TEXT,
    TEXT_2,
    assert_is,
    decomposed,
    kohya,
    module_of,
    output_of,
    weight_of,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from shared_cases import case_folder
from tiny_pipeline import add_nora, tiny_pipeline

from nora_vision import export_lora
from nora_vision.kohya import stability_name
from pipelines.built_in import BUILT_IN_MODEL
from pipelines.errors import InputError
from pipelines.subject.adapters import load_adapter
from pipelines.subject.base_model import load_base_model
from pipelines.subject.generate import GenerationOptions, main

KINDS = [(LINEAR, kind) for kind in foreign.FOR_LINEAR] + [
    (layer, kind) for layer in (CONVOLUTION, STRIDED) for kind in foreign.FOR_CONVOLUTION
]


@pytest.mark.parametrize("lengths", [None, foreign.by_rows, foreign.by_columns], ids=["plain", "rows", "columns"])
@pytest.mark.parametrize(("layer", "kind"), KINDS, ids=[f"{kind.__name__}-{layer[-5:]}" for layer, kind in KINDS])
def test_every_kind_gives_the_weight_of_its_own_equation(model, loaded, layer, kind, lengths):
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
def test_norms_are_changed_at_any_scale(model, loaded, layer, words):
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


def test_kinds_are_combined_at_their_scales_and_deleted_separately(tmp_path):
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
    """The tensors of a case by layer of the UNet, recognised by any of the layer's names."""
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
    """The weight and bias that result from a layer's tensors, by the equation of each kind."""
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
def test_files_from_bug_reports_give_the_expected_weights(built_in, case, name):
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


def test_a_textual_inversion_from_a_bug_report_is_recognised(built_in):
    with pytest.raises(InputError, match=r"textual_inversion.safetensors is a textual inversion .*LoRA, DoRA, LoCon"):
        load_adapter(built_in, case_folder("lora-other-kinds") / "textual_inversion.safetensors", "x")


def test_the_command_generates_with_a_file_that_has_an_adapters_name_in_tensor_names(tmp_path, caplog):
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
    assert "also holds 'step'. No layer uses this, and it is left out" in caplog.text
