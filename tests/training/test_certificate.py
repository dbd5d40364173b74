"""The compatibility certificate: what passes, and each way to fail."""

import json

import pytest
import torch
from tiny_options import TINY
from tiny_pipeline import add_nora, tiny_pipeline, weight_changes

from nora_vision import export_lora
from nora_vision.files import read_header, read_tensors, write_tensors
from pipelines.adapter_method import trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.subject import adapters
from pipelines.subject.generate import Sampling
from pipelines.subject.lora_files import load_lora_file
from training.subject import certificate
from training.subject.certificate import CertificateError, StockModel, certify
from training.subject.kohya_lint import lint_kohya

FAST = Sampling(num_inference_steps=2, resolution=16)
PROMPTS = ("a red star", "a blue ring in the snow")


def exported(folder, **options):
    """A pipeline with a random adapter, and its files under `folder`."""
    pipe = tiny_pipeline()
    add_nora(pipe, **options)
    export_lora(pipe, folder / "diffusers", format="diffusers")
    export_lora(pipe, folder / "kohya" / "toy.safetensors", format="kohya")
    return pipe


def rewritten(path, change, **said):
    """Write the file at `path` again with each tensor changed, and with `said` in its header."""
    tensors = {name: change(name, tensor) for name, tensor in read_tensors(path).items()}
    write_tensors(path, tensors, {**read_header(path).metadata, **said})


def test_the_program_of_stock_diffusers_certifies_both_files(tiny_model, tmp_path, certified_here):
    """tests/training/test_dreambooth_nora.py runs it in a process of its own."""
    pipe = exported(tmp_path)
    found = certify(pipe, tmp_path, StockModel(str(tiny_model)), PROMPTS, FAST)
    assert found.passed
    assert set(found.largest_difference) == {"diffusers", "kohya"}
    assert max(found.largest_difference.values()) <= 1
    assert found.effect > 8
    said = json.loads((tmp_path / "certificate.json").read_text())
    assert (said["passed"], said["prompts"], said["kohya_findings"]) == (True, list(PROMPTS), [])


def test_a_file_that_stock_diffusers_cannot_load_is_named(tiny_model, tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("raise OSError('there is no model in gone')")
    monkeypatch.setattr(certificate, "STOCK_PROGRAM", program)
    with pytest.raises(CertificateError, match=r"cannot use the exported files: .*gone"):
        certify(exported(tmp_path), tmp_path, StockModel("gone"), PROMPTS[:1], FAST)


def test_both_files_of_a_dora_are_certified(tiny_model, tmp_path, certified_here):
    pipe = tiny_pipeline()
    components = adapters.attach(pipe, AdapterOptions(method="dora"))
    with torch.no_grad():
        for parameter in trained_parameters(components):
            parameter.add_(0.3)
    for format in ("diffusers", "kohya"):
        export_lora(pipe, tmp_path / format, format=format)
    found = certify(pipe, tmp_path, StockModel(str(tiny_model)), PROMPTS[:1], FAST)
    assert set(found.largest_difference) == {"diffusers", "kohya"}
    assert (found.passed, found.kohya_findings, found.converted) == (True, [], ["kohya"])
    assert pipe.get_active_adapters() == ["default"]
    path = next((tmp_path / "kohya").iterdir())
    rewritten(path, lambda name, tensor: tensor * (1.5 if name.endswith("dora_scale") else 1))
    with pytest.raises(CertificateError, match=r"images from the kohya file differ by up to"):
        certify(pipe, tmp_path, StockModel(str(tiny_model)), PROMPTS[:1], FAST)


@pytest.mark.parametrize(
    ("method", "approximate", "converted"), [("oft", ["diffusers", "kohya"], []), ("ia3", ["diffusers"], ["kohya"])]
)
def test_files_that_approximate_an_adapter_are_compared_with_themselves(
    method, approximate, converted, tiny_model, tmp_path, certified_here, monkeypatch
):
    monkeypatch.setattr("nora_vision.weight_change.EXPORT_RANK", 2)
    pipe = tiny_pipeline()
    components = adapters.attach(pipe, AdapterOptions(method=method, **TINY))
    with torch.no_grad():
        for parameter in trained_parameters(components):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    adapters.save_everywhere(pipe, components, tmp_path, "toy")
    found = certify(pipe, tmp_path, StockModel(str(tiny_model)), PROMPTS[:1], FAST)
    assert (found.passed, found.exact, found.approximate, found.converted) == (True, False, approximate, converted)
    assert all((found.largest_difference[name] > 2) == (name in approximate) for name in ("diffusers", "kohya"))
    assert pipe.get_active_adapters() == ["default"]
    monkeypatch.setattr(certificate, "load_lora_file", load_at_half_scale)
    with pytest.raises(CertificateError, match="images from the diffusers file differ by up to"):
        certify(pipe, tmp_path, StockModel(str(tiny_model)), PROMPTS[:1], FAST)


def load_at_half_scale(pipeline, file, name):
    """A loader that misreads a file."""
    load_lora_file(pipeline, file, name)
    for parameter_name, parameter in pipeline.unet.named_parameters():
        if f"lora_B.{name}." in parameter_name:
            parameter.data *= 0.5


def test_a_file_that_holds_another_adapter_is_refused_and_recorded(tiny_model, tmp_path, certified_here):
    pipe = exported(tmp_path)
    other = tiny_pipeline()
    add_nora(other, seed=1)
    export_lora(other, tmp_path / "kohya" / "toy.safetensors", format="kohya")
    with pytest.raises(CertificateError, match=r"images from the kohya file differ by up to \d+\.\d of 255 levels; 1 is allowed"):
        certify(pipe, tmp_path, StockModel(str(tiny_model)), PROMPTS, FAST)
    said = json.loads((tmp_path / "certificate.json").read_text())
    assert not said["passed"]
    assert said["largest_difference"]["diffusers"] <= 1 < said["largest_difference"]["kohya"]


def test_an_adapter_without_any_effect_is_an_error(tiny_model, tmp_path, certified_here):
    pipe = exported(tmp_path)
    for component in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        for name, parameter in component.named_parameters():
            if "nora_inner_B" in name:
                parameter.data.zero_()
    assert not any(change.any() for change in weight_changes(pipe).values())
    export_lora(pipe, tmp_path / "diffusers", format="diffusers")
    export_lora(pipe, tmp_path / "kohya" / "toy.safetensors", format="kohya")
    with pytest.raises(CertificateError, match="the adapter changes no image"):
        certify(pipe, tmp_path, StockModel(str(tiny_model)), PROMPTS, FAST)


def test_a_file_that_stock_diffusers_ignores_completely_is_an_error(tiny_model, tmp_path, certified_here):
    pipe = exported(tmp_path)
    path = tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
    write_tensors(path, {f"no_such_part.{name}": tensor for name, tensor in read_tensors(path).items()})
    with pytest.raises(CertificateError, match="images from the diffusers file differ by up to"):
        certify(pipe, tmp_path, StockModel(str(tiny_model)), PROMPTS, FAST)


def test_two_exported_files_are_refused(tmp_path):
    exported(tmp_path)
    (tmp_path / "kohya" / "old.safetensors").write_bytes(b"")
    with pytest.raises(CertificateError, match=r"must hold one exported \.safetensors file, got 2"):
        certificate.exported_file(tmp_path / "kohya")


def test_the_stock_program_cannot_import_this_project(stock_check):
    assert set(stock_check.BLOCKED) == {"nora_vision", "pipelines", "training"}


@pytest.mark.parametrize(
    ("dtype", "offset", "passed"),
    [("float32", 0.9, True), ("float32", 1.1, False), ("bfloat16", 2.4, True), ("bfloat16", 2.6, False)],
)
def test_differences_are_limited_in_levels_and_in_half_precision_relative_to_the_effect(dtype, offset, passed):
    base = torch.zeros(1, 4, 4, 3)
    adapted = base + 10 / 255
    native = adapted + offset / 255
    stock = {"base": base, "diffusers": adapted, "kohya": adapted}
    found = certificate._compare(native, stock, [], ["x"], {}, dtype, "cpu")
    assert found.passed == passed
    assert found.effect == pytest.approx(10, rel=1e-3)
    assert found.largest_difference["kohya"] == pytest.approx(offset, rel=1e-2)


def test_a_certificate_fails_on_every_finding_in_the_kohya_file():
    base = torch.zeros(1, 4, 4, 3)
    stock = {"base": base, "diffusers": base + 1, "kohya": base + 1}
    assert certificate._compare(base + 1, stock, ["odd"], ["x"], {}, "float32", "cpu").problems == ["the kohya file: odd"]


def test_an_approximation_is_measured_and_fails_if_other_programs_misread_it():
    base = torch.zeros(1, 4, 4, 3)
    stock = {"base": base, "diffusers": base + 1, "kohya": base + 0.5}
    settings = (["x"], {}, "float32", "cpu")
    found = certificate._compare(base + 1, stock, [], *settings, {"kohya": base + 0.5})
    assert found.passed
    assert found.mean_difference["kohya"] == pytest.approx(127.5)
    assert not certificate._compare(base + 1, stock, ["odd"], *settings, {"kohya": base + 0.5}).passed
    assert not certificate._compare(base + 1, stock, [], *settings, {"kohya": base + 0.6}).passed
    assert not certificate._compare(base + 1, stock, [], *settings).passed


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(part)}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (without("alpha"), "has no alpha"),
        (without("lora_up.weight"), "has no lora_up.weight"),
        (renamed("lora_te1_", "lora_te_"), "must start with one of lora_unet_"),
        (renamed("lora_unet_input_blocks", "lora_unet_down_blocks"), "is not the name of a layer in A1111 and ComfyUI"),
        (
            renamed("encoder_layers_0_self_attn_q", "encoder_layers_0_attention_q"),
            "is not the name of a layer in A1111 and ComfyUI",
        ),
        (lambda t: {n: x[1:] if n.endswith("lora_down.weight") else x for n, x in t.items()}, "factors of different ranks"),
    ],
)
def test_layers_that_other_programs_would_misread_are_found(tmp_path, change, finding):
    exported(tmp_path)
    path = tmp_path / "kohya" / "toy.safetensors"
    assert lint_kohya(path) == []
    write_tensors(path, change(read_tensors(path)), read_header(path).metadata)
    assert any(finding in found for found in lint_kohya(path))


@pytest.mark.parametrize(
    ("said", "finding"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "ss_base_model_version must be 'custom'"),
        ({"ss_v2": "True"}, "ss_v2 must be 'False'"),
        ({"ss_network_dim": "77"}, "ss_network_dim must be "),
        ({"ss_network_module": "networks.odd"}, "ss_network_module must be 'networks.lora'"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "modelspec.architecture must be"),
        ({"sshs_model_hash": "0"}, "sshs_model_hash must be"),
        ({"ss_network_alpha": ""}, "ss_network_alpha is missing"),
    ],
)
def test_a_header_that_other_programs_would_misread_is_found(tmp_path, said, finding):
    exported(tmp_path)
    path = tmp_path / "kohya" / "toy.safetensors"
    rewritten(path, lambda _, tensor: tensor, **said)
    found = lint_kohya(path)
    assert len(found) == 1
    assert finding in found[0]


def test_a_truncated_kohya_file_is_a_finding(tmp_path):
    exported(tmp_path)
    path = tmp_path / "kohya" / "toy.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "truncated" in lint_kohya(path)[0]
