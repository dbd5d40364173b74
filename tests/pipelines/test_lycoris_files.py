"""Adapters in LyCORIS's file forms, and LoRA files that hold an approximation; ComfyUI's and A1111's formulas are the oracle."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny_options import TINY
from tiny_pipeline import image, tiny_pipeline
from torch import nn

from nora_vision.approximation import LEFT_OUT, LeftOut
from nora_vision.export import export_lora
from nora_vision.factors import Factors, low_rank_factors
from nora_vision.files import read_header
from nora_vision.kohya import kohya_name
from nora_vision.lycoris import lycoris_form
from nora_vision.weight_change import weight_change
from pipelines.adapter_method import ADAPTER_NAME, trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.export_error import expected_left_out, has_lycoris_form, left_out_sentence
from pipelines.methods import method_named, method_names
from pipelines.peft_method import PeftMethod
from pipelines.subject import adapters
from training.subject.kohya_lint import lint_kohya


def loha(parts, weight):
    """ComfyUI's and A1111's formula of the change."""
    scale = parts["alpha"] / len(parts["hada_w1_b"])
    return scale * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])


def lokr(parts, weight):
    """Theirs too: alpha counts only if there are factors, and w1 has a kernel of 1 x 1 beside that of w2."""
    if "lokr_w2" in parts:
        w1, w2 = parts["lokr_w1"], parts["lokr_w2"]
        return torch.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2).flatten(1)
    scale = parts["alpha"] / len(parts["lokr_w2_b"])
    return scale * torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])


def ia3(parts, weight):
    """A1111's formula: the weight times the scales of its columns is added to it."""
    assert parts["on_input"].item() == 1
    return (weight * parts["weight"]).flatten(1)


FORMS = {"loha": loha, "lokr": lokr, "ia3": ia3}


def adapted(method, **changes):
    """A tiny pipeline with an adapter that was changed as training does."""
    pipe = tiny_pipeline()
    options = AdapterOptions(method=method, rank=2, train_text_encoder=True, **TINY, **changes)
    targets = ["to_q", "to_out.0", *(["conv1"] if method_named(method).adapts_convolutions else [])]
    components = adapters.attach(pipe, AdapterOptions(**{**vars(options), "target_modules": targets}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(components):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return pipe, components


KOHYA = [
    ("loha", {"alpha": 3.0}),
    ("lokr", {"alpha": 3.0, "decompose_factor": 2}),
    ("lokr", {"alpha": 3.0}),
    ("ia3", {}),
]


@pytest.mark.parametrize(("method", "changes"), KOHYA)
@torch.no_grad()
def test_a_kohya_file_in_the_form_of_lycoris_holds_the_change_of_every_layer_as_other_programs_compute_it(
    method, changes, tmp_path
):
    pipe, components = adapted(method, **changes)
    path = export_lora(pipe, tmp_path / "own.safetensors", ADAPTER_NAME, "kohya")
    tensors, layers = load_file(path), 0
    for component, model in components.items():
        for name, layer in tuner_layers(model).items():
            name = name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = kohya_name(component, name, pipe.unet.config.layers_per_block)
            parts = {tensor.removeprefix(f"{key}."): value for tensor, value in tensors.items() if tensor.startswith(f"{key}.")}
            expected = weight_change(layer, ADAPTER_NAME).float()
            torch.testing.assert_close(FORMS[method](parts, layer.get_base_layer().weight), expected, atol=1e-5, rtol=1e-5)
            assert expected.norm() > 0
            layers += 1
    assert layers == len({name.partition(".")[0] for name in tensors})
    header = read_header(path).metadata
    assert header["ss_network_module"] == "lycoris.kohya"
    assert f'"algo": "{method}"' in header["ss_network_args"]
    assert LEFT_OUT not in header
    assert lint_kohya(path) == []
    fresh = tiny_pipeline()
    adapters.load_adapter(fresh, path, "loaded")
    torch.testing.assert_close(image(fresh), image(pipe), atol=1 / 255, rtol=0)


def test_an_ia3_that_scales_outputs_has_no_form_because_it_scales_biases():
    from peft import IA3Config, inject_adapter_in_model

    model = nn.ModuleDict({"layer": nn.Linear(4, 6)})
    inject_adapter_in_model(IA3Config(target_modules=["layer"], feedforward_modules=[]), model)
    assert lycoris_form(model["layer"], ADAPTER_NAME) is None


# Approximations

WIDE = (200, 160)
# Of methods of which a LoRA of rank 64 cannot hold the change of a layer of size WIDE.
FULL_RANK = {"boft", "c3a", "fourierft", "ia3", "oft", "randlora"}


def wide(method):
    """An adapter on a layer of size WIDE, as started."""
    model = nn.ModuleDict({"small": nn.Linear(8, 8), "layer": nn.Linear(WIDE[1], WIDE[0])}).requires_grad_(False)
    options = {"rank": 4, "block_size": 4, "n_frequency": 60 if method == "fourierft" else 1}
    AdapterOptions(method=method, **options).create().add(model, ["small", "layer"], torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("method", [name for name in method_names() if PeftMethod in method_named(name).__bases__])
@torch.no_grad()
def test_the_expected_error_is_that_of_the_best_approximation_of_a_trained_layer(method):
    model = wide(method)
    share = expected_left_out({"model": model})
    assert (share > 0) == (method in FULL_RANK)
    generator = torch.Generator().manual_seed(9)
    for parameter in trained_parameters({"": model}):
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    S = torch.linalg.svdvals(weight_change(model["layer"], ADAPTER_NAME))
    exact = int((1e-9 * S[0] < S).sum()) <= len(S) // 2
    trained = 0.0 if exact else float(S[64:].norm() / S.norm())
    assert share == pytest.approx(trained, rel=0.35)
    words = left_out_sentence(share, has_lycoris_form({"model": model}))
    assert ("The kohya file will be exact" in words) == (method in FORMS)
    assert f"leave out about {share:.0%} of the weight change" in words


def test_what_several_layers_leave_out_together_is_the_root_of_the_sum_of_squares():
    generator = torch.Generator().manual_seed(0)
    matrices = {name: torch.randn(rows, 90, dtype=torch.float64, generator=generator) for name, rows in (("a", 150), ("b", 180))}
    changes, lost = {}, {}
    for name, matrix in matrices.items():
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        changes[name] = Factors(U[:, :64] * S[:64], Vh[:64], relative_error=float(S[64:].norm() / S.norm()))
        lost[name] = S[64:].norm()
    total = torch.cat([matrix.flatten() for matrix in matrices.values()]).norm()
    found = LeftOut.of({**changes, "exact": Factors(torch.zeros(3, 1), torch.zeros(1, 3))})
    assert found.overall == pytest.approx(float(torch.stack([*lost.values()]).norm() / total))
    assert (found.worst, found.layer) == max((change.relative_error, name) for name, change in changes.items())
    assert LeftOut.of({"exact": Factors(torch.ones(3, 1), torch.ones(1, 3))}) is None


@pytest.fixture
def small_rank(monkeypatch):
    """Exports of rank 2, so that the tiny model's layers need an approximation."""
    monkeypatch.setattr("nora_vision.weight_change.EXPORT_RANK", 2)
    monkeypatch.setattr("nora_vision.approximation.EXPORT_RANK", 2)


@torch.no_grad()
def test_an_approximation_is_named_in_the_log_and_in_the_metadata_of_its_files_only(small_rank, tmp_path, caplog):
    pipe, components = adapted("oft")
    with caplog.at_level(logging.WARNING):
        adapters.save_everywhere(pipe, components, tmp_path, "own")
    files = [tmp_path / "diffusers" / "pytorch_lora_weights.safetensors", tmp_path / "kohya" / "own.safetensors"]
    norms, errors = [], []
    for layer in (layer for model in components.values() for layer in tuner_layers(model).values()):
        norms.append(float(weight_change(layer, ADAPTER_NAME).norm()))
        errors.append(low_rank_factors(layer, ADAPTER_NAME).relative_error)
    norms, errors = torch.tensor(norms), torch.tensor(errors)
    for path in files:
        left_out = LeftOut.read(path)
        assert left_out.overall == pytest.approx(float((norms * errors).norm() / norms.norm()), rel=1e-3)
        assert left_out.worst == pytest.approx(float(errors.max()))
        assert f"{path} is not exact: it holds the best approximation of rank 2 or less and leaves out" in caplog.text
        assert left_out.layer in caplog.text
    pipe, components = adapted("ia3")
    adapters.save_everywhere(pipe, components, tmp_path / "ia3", "own")
    assert LeftOut.read(tmp_path / "ia3" / "diffusers" / "pytorch_lora_weights.safetensors") is not None
    assert LeftOut.read(tmp_path / "ia3" / "kohya" / "own.safetensors") is None
