import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from earlier_layout import save_as_earlier
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_pipeline import COMPONENTS, add_nora, tiny_pipeline, tiny_unet

from nora_vision import AdapterFileError, load_nora, loading, save_nora
from nora_vision.files import DIGEST, read_header
from nora_vision.layer import nora_layers
from nora_vision.packing import PACKED_DTYPES


def state_of(pipe) -> dict[str, object]:
    """The state that a failed load must not change."""
    state: dict[str, object] = {"adapters": pipe.get_list_adapters(), "active": pipe.get_active_adapters()}
    for component in COMPONENTS:
        model = getattr(pipe, component)
        state |= {f"{component}.{name} is": type(module) for name, module in model.named_modules()}
        state |= {f"{component}.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
        state |= {f"{component}.{name} trains": parameter.requires_grad for name, parameter in model.named_parameters()}
        state[f"{component} loaded"] = bool(getattr(model, "_hf_peft_config_loaded", False))
        state[f"{component} configured"] = hasattr(model, "peft_config")
    return state


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name


def edit_config(**fields: object) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        path = folder / "text_encoder_2" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return corrupt


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        path = folder / "text_encoder_2" / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return corrupt


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        path = folder / "text_encoder_2" / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return corrupt


def into_pickle(folder: Path) -> None:
    path = folder / "text_encoder_2" / "adapter_model.safetensors"
    torch.save(load_file(path), path)


def into_bin(folder: Path) -> None:
    into_pickle(folder)
    path = folder / "text_encoder_2" / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))


KEY = "base_model.model.text_model.encoder.layers.0.self_attn.k_proj"
CORRUPTIONS = {
    "a pickle by content": (into_pickle, "text_encoder_2/adapter_model.safetensors is a pickle or zip archive"),
    "a pickle by name": (into_bin, r"has no adapter_model.safetensors, only \['adapter_model.bin'\].* a .bin is a pickle"),
    "truncated": (edit_bytes(lambda content: content[:-9]), "text_encoder_2/adapter_model.safetensors is truncated"),
    "oversized": (edit_bytes(lambda content: content + b"more"), "text_encoder_2/adapter_model.safetensors is oversized"),
    "huge header": (edit_bytes(lambda content: b"\xff" * 8 + content[8:]), "has a header of 18446744073709551615 bytes"),
    "not finite": (
        edit_tensors(lambda tensors: tensors[f"{KEY}.nora_inner_A"].fill_(float("nan"))),
        f"adapter_model.safetensors: '{KEY}.nora_inner_A' has values that are not finite",
    ),
    "integers": (
        edit_tensors(lambda tensors: tensors.update({f"{KEY}.nora_inner_A": torch.ones(3, 6).long()})),
        f"'{KEY}.nora_inner_A' has dtype 'I64'",
    ),
    "a shape": (
        edit_tensors(lambda tensors: tensors.update({f"{KEY}.nora_inner_A": torch.ones(3, 5)})),
        r"layers.0.self_attn.k_proj.nora_inner_A' has shape \(3, 5\), the model needs \(3, 6\)",
    ),
    "a missing tensor": (
        edit_tensors(lambda tensors: tensors.pop(f"{KEY}.nora_inner_B")),
        "lacks 'text_model.encoder.layers.0.self_attn.k_proj.nora_inner_B'",
    ),
    "a layer the model lacks": (
        edit_tensors(lambda tensors: tensors.update({"text_model.encoder.layers.9.mlp.fc2.nora_inner_A": torch.ones(3, 6)})),
        "contains 'text_model.encoder.layers.9.mlp.fc2.nora_inner_A', which the adapter cannot have on it",
    ),
    "a negative scale": (
        edit_tensors(lambda tensors: tensors[f"{KEY}.nora_activation_scale"].fill_(-1)),
        "k_proj.nora_activation_scale' must not be negative",
    ),
    "another method": (edit_config(peft_type="LORA"), "configures an adapter of type 'LORA', not 'NORA'"),
    "an unknown field": (edit_config(novelty=1), "adapter_config.json has fields that this version does not know: .'novelty'"),
    "a regular expression": (edit_config(target_modules="(a+)+b"), "target_modules must list plain names, got '.a..*save_nora"),
    "a pattern in a list": (edit_config(exclude_modules=["(.*)*x"]), r"exclude_modules must list plain names, got '\(.\*\)\*x'"),
    "no targets": (edit_config(target_modules=None), "adapter_config.json must list target_modules, got None"),
    "a wrong type": (edit_config(alpha="much"), "adapter_config.json is not a valid configuration"),
    "an infinite value": (edit_config(alpha=float("inf")), "adapter_config.json is not valid JSON.*not finite"),
    "a rank above the layer's": (edit_config(r=25), r"r must be in \[1, 24\] for 'text_model.encoder.layers.0.self_attn.k_proj'"),
    "compact that is not": (edit_config(compact=True), "contains .*nora_A'.*, which the adapter cannot have on it"),
    "more targets than layers": (edit_config(target_modules=["k_proj", "fc1", "fc2"]), "lacks 'text_model.*fc1.nora_A' and"),
    "the configuration of another save": (edit_config(alpha=7.0), "adapter_config.json is not the one that .* was saved with"),
    "no configuration": (
        lambda folder: (folder / "text_encoder_2" / "adapter_config.json").unlink(),
        "text_encoder_2 has no adapter_config.json, so it is not an adapter",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """An adapter of all three components, to damage copies of."""
    pipe = tiny_pipeline()
    add_nora(pipe)
    folder = tmp_path_factory.mktemp("saved")
    save_nora(pipe, folder / "full")
    save_nora(pipe, folder / "compact", compact=True)
    return folder


@pytest.fixture(scope="module")
def pipes(saved) -> dict[str, object]:
    """A pipeline without an adapter and one with an adapter, each with its state."""
    fresh, adapted = tiny_pipeline(), tiny_pipeline()
    load_nora(adapted, saved / "full", "first")
    fresh.unet.requires_grad_(True)
    return {"fresh": (fresh, state_of(fresh)), "adapted": (adapted, state_of(adapted))}


@pytest.mark.parametrize("damage", CORRUPTIONS)
def test_a_damaged_file_is_named_and_leaves_every_pipeline_as_it_was(tmp_path, saved, pipes, damage):
    corrupt, message = CORRUPTIONS[damage]
    shutil.copytree(saved / "full", tmp_path / "adapter")
    corrupt(tmp_path / "adapter")
    for pipe, before in pipes.values():
        with pytest.raises(AdapterFileError, match=message) as caught:
            load_nora(pipe, tmp_path / "adapter", "second")
        assert str(tmp_path / "adapter" / "text_encoder_2") in str(caught.value)
        assert_same(before, state_of(pipe))


def test_a_compact_adapter_on_other_base_weights_is_refused_by_layer(saved):
    pipe = tiny_pipeline()
    load_nora(pipe, saved / "full", "first")
    # The adapters of the UNet and the first text encoder fit and are removed again.
    pipe.text_encoder_2.text_model.encoder.layers[1].mlp.fc2.base_layer.weight.data.mul_(1.01)
    before = state_of(pipe)
    message = r"text_encoder_2, layer text_model\.encoder\.layers\.1\.mlp\.fc2: .*has other weights"
    with pytest.raises(AdapterFileError, match=message):
        load_nora(pipe, saved / "compact", "second")
    assert_same(before, state_of(pipe))


def test_a_compact_adapter_is_refused_in_another_precision(saved):
    pipe = tiny_pipeline().to(torch.bfloat16)
    before = state_of(pipe)
    with pytest.raises(AdapterFileError, match="another precision"):
        load_nora(pipe, saved / "compact", "second")
    assert_same(before, state_of(pipe))


def test_a_failed_load_leaves_a_fused_pipeline_fused(saved):
    pipe = tiny_pipeline()
    pipe.text_encoder_2.text_model.encoder.layers[1].mlp.fc2.weight.data.mul_(1.01)
    load_nora(pipe, saved / "full", "first")
    pipe.fuse_lora(lora_scale=0.5)
    before = state_of(pipe)
    with pytest.raises(AdapterFileError, match=r"text_encoder_2, layer .*fc2"):
        load_nora(pipe, saved / "compact", "second")
    assert_same(before, state_of(pipe))
    pipe.unfuse_lora()
    plain = tiny_pipeline().text_encoder.state_dict()
    for name, layer in nora_layers(pipe.text_encoder).items():
        torch.testing.assert_close(layer.get_base_layer().weight, plain[f"{name}.weight"], rtol=1e-5, atol=1e-6)


def alone(component: Path, folder: Path) -> Path:
    """Copy the adapter of one component to `folder`, which contains nothing else."""
    return shutil.copytree(component, folder / component.name)


@pytest.mark.parametrize("entry", range(5))
def test_every_entry_of_a_probe_is_checked(tmp_path, saved, entry):
    path = alone(saved / "compact" / "text_encoder", tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(path)
    # The layers are in the order of their names.
    probe = tensors["nora_probe"][4]
    probe[entry] = probe[entry] + 0.1 * probe[0] if entry else 0.0
    # Without the digest, which would detect the change before the probe is compared.
    metadata = read_header(path, PACKED_DTYPES).metadata
    save_file(tensors, path, {key: value for key, value in metadata.items() if key != DIGEST})
    with pytest.raises(AdapterFileError, match=r"text_encoder, layer encoder\.layers\.1\.mlp\.fc1"):
        load_nora(tiny_pipeline(), tmp_path / "adapter")


FC1 = "encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize("shared", [f'{{"nowhere": "{FC1}"}}', f'{{"{FC1}": "nowhere"}}', f'{{"{FC1}": 1}}', "[]", "{"])
def test_scales_shared_with_no_such_layer_are_refused(tmp_path, saved, shared):
    pipe = tiny_pipeline()
    load_nora(pipe, saved / "full", "default")
    path = save_as_earlier(pipe.text_encoder, tmp_path / "adapter" / "text_encoder") / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"nora_shared_scales": shared})
    with pytest.raises(AdapterFileError, match=r"text_encoder/adapter_model\.safetensors"):
        load_nora(tiny_pipeline(), tmp_path / "adapter")


def test_a_failure_in_the_last_component_removes_the_adapter_from_the_others(saved, monkeypatch):
    inject, calls = loading.inject_adapter_in_model, []

    def fail_at_third(*args, **kwargs):
        calls.append(args)
        model = inject(*args, **kwargs)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return model

    monkeypatch.setattr(loading, "inject_adapter_in_model", fail_at_third)
    for adapted in (False, True):
        pipe = tiny_pipeline()
        pipe.unet.requires_grad_(True)
        if adapted:
            pipe.text_encoder_2.add_adapter(LoraConfig(target_modules=["k_proj"], init_lora_weights=False), "lora")
            add_nora(pipe, "first", components=("unet",), modules_to_save=["conv_out"])
        before = state_of(pipe)
        calls.clear()
        with pytest.raises(MemoryError, match="out of memory"):
            load_nora(pipe, saved / "full", "second")
        assert_same(before, state_of(pipe))


def test_another_architecture_is_refused_by_the_layer_that_does_not_fit(saved):
    pipe = tiny_pipeline()
    pipe.register_modules(unet=tiny_unet(cross_attention_dim=48))
    with pytest.raises(AdapterFileError, match=r"attn2.to_k.nora_A' has shape \(6, 40\), the model needs \(6, 48\)"):
        load_nora(pipe, saved / "full")
    pipe = tiny_pipeline()
    pipe.text_encoder_2 = None
    with pytest.raises(AdapterFileError, match="adapts text_encoder_2, which this pipeline does not have"):
        load_nora(pipe, saved / "full")


def test_other_paths_than_adapter_folders_are_refused(tmp_path, saved):
    pipe = tiny_pipeline()
    offloaded = tiny_pipeline()
    offloaded.unet.to("meta")
    with pytest.raises(ValueError, match=r"unet are offloaded. Load adapters before enable_sequential_cpu_offload"):
        load_nora(offloaded, saved / "full")
    with pytest.raises(FileNotFoundError, match=r"no adapter folder .*absent"):
        load_nora(pipe, tmp_path / "absent")
    with pytest.raises(AdapterFileError, match="does not contain an adapter"):
        load_nora(pipe, tmp_path)
    with pytest.raises(AdapterFileError, match=r"is a file; load_nora takes the folder .*load_lora_weights"):
        load_nora(pipe, saved / "full" / "unet" / "adapter_model.safetensors")


def test_names_that_are_in_use_or_invalid_are_refused(saved):
    pipe = tiny_pipeline()
    assert [load_nora(pipe, saved / "full") for _ in range(2)] == ["default_0", "default_1"]
    with pytest.raises(ValueError, match="already has an adapter 'default_0'"):
        load_nora(pipe, saved / "full", "default_0")
    for name in ("a.b", ""):
        with pytest.raises(ValueError, match=f"must not be empty or contain a dot, got '{name}'"):
            load_nora(pipe, saved / "full", name)


def test_adapters_that_cannot_be_saved_are_refused_and_nothing_is_written(tmp_path):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="No component of the pipeline has an adapter 'default'"):
        save_nora(pipe, tmp_path / "out")
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    with pytest.raises(ValueError, match="Adapter 'lora' of text_encoder is a LoraConfig, not NoRA"):
        save_nora(pipe, tmp_path / "out", "lora")
    add_nora(pipe, "random", components=("unet",), init_weights=False)
    with pytest.raises(AdapterFileError, match=r"unet\.down_blocks.*conv1: the weight change recomputed from the base weights"):
        save_nora(pipe, tmp_path / "out", "random", compact=True)
    add_nora(pipe, "waiting", components=("unet",), outer_init="awsvd")
    with pytest.raises(ValueError, match="outer factors of NoRA adapter 'waiting' are not set"):
        save_nora(pipe, tmp_path / "out", "waiting")
    add_nora(pipe, components=("unet", "text_encoder_2"))
    next(iter(nora_layers(pipe.text_encoder_2).values())).nora_inner_A["default"].data[0, 0] = float("inf")
    with pytest.raises(AdapterFileError, match=r"text_model\.encoder\.layers\.0.*nora_inner_A' has values that are not finite"):
        save_nora(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
