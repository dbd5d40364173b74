"""NoRA's forms as docs/file-formats.md describes them: a reader with numpy gives the adapter's weight change."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from small_models import MODELS, config_for
from test_documented_files import PREFIX, DocumentedFile
from torch import nn

from nora_vision import calibrate, initialize_nora_weights, save_adapter
from nora_vision.layer import nora_layers

FORMS = {
    "serial": {},
    "parallel": {},
    "a_side": {},
    "b_side": {},
    "full": {},
    "block_diagonal": {"inner_blocks": 3},
    "diagonal": {},
    "symmetric": {},
    "antisymmetric": {},
    "sparse_low_rank": {"sparse_entries": 5, "sparse_seed": 9},
}


def saved(tmp_path, **fields):
    """The layers of a trained adapter by name, the inputs of the first, and its full file."""
    model, inputs, targets = MODELS["linear"]()
    fields = {"r": 6, "inner_r": 2, "outer_init": "awsvd", "preserve_output": True, "init_weights": True} | fields
    model = get_peft_model(model, config_for(targets, inner_init="uniform", **fields))
    initialize_nora_weights(model, calibrate(model, lambda: model(*inputs)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    return {name.removeprefix(PREFIX): layer for name, layer in nora_layers(model).items()}, inputs, DocumentedFile(tmp_path)


def sparse_matrix(file, layer, r):
    seed, entries = file.config["sparse_seed"], file.config["sparse_entries"]
    with np.errstate(over="ignore"):
        x = (np.arange(r * r, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    positions = np.sort(np.argsort(x.view(np.int64), kind="stable")[:entries])
    matrix = np.zeros(r * r)
    matrix[positions] = file.tensor(layer, "nora_inner_sparse")
    return matrix.reshape(r, r)


def core(file, layer, suffix=""):
    """M, or with the suffix 0 that of the frozen start."""
    form, r, inner_r = (file.config[name] for name in ("inner_form", "r", "inner_r"))
    if form in ("full", "block_diagonal", "diagonal"):
        blocks = file.tensor(layer, f"nora_inner_M{suffix}")
        M, size = np.zeros((r, r)), r // len(blocks)
        for index, block in enumerate(blocks):
            part = slice(index * size, (index + 1) * size)
            M[part, part] = block
        return M
    P = np.eye(r)[:inner_r]
    A = P if form == "b_side" else file.tensor(layer, f"nora_inner_A{suffix}")
    B = P.T if form == "a_side" else file.tensor(layer, f"nora_inner_B{suffix}")
    if form == "parallel":
        return B @ P + P.T @ A
    M = B @ A
    if form == "sparse_low_rank" and not suffix:
        return M + sparse_matrix(file, layer, r)
    return M + {"symmetric": 1, "antisymmetric": -1}.get(form, 0) * M.T


@pytest.mark.parametrize("form", FORMS)
def test_a_full_file_of_a_form_gives_the_weight_change(form, tmp_path):
    layers, _, file = saved(tmp_path, inner_form=form, **FORMS[form])
    for name, layer in layers.items():
        M = file.config["alpha"] / file.config["inner_r"] * (core(file, name) - core(file, name, "0"))
        change = file.tensor(name, "nora_B") @ M @ file.tensor(name, "nora_A")
        expected = layer.get_delta_weight("default").numpy()
        np.testing.assert_allclose(change, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("outer_scaling", ["B", "A", "split", "mean", "none"])
def test_the_recomputed_outer_factors_have_the_singular_values_where_the_page_says(outer_scaling, tmp_path):
    layers, _, file = saved(tmp_path, outer_scaling=outer_scaling)
    for name, layer in layers.items():
        stored = file.tensor(name, "nora_activation_scale").astype(np.float32)
        scale = np.maximum(stored / stored.mean(), np.float32(0.001)).astype(np.float64)
        U, S, V = np.linalg.svd(layer.base_layer.weight.detach().double().numpy() * scale, full_matrices=False)
        U, S, V = U[:, :6], S[:6], V[:6]
        one = np.ones(6)
        in_B, before_A = {
            "B": (S, one), "A": (one, S), "split": (S**0.5, S**0.5), "mean": (S.mean() * one, one), "none": (one, one),
        }[outer_scaling]  # fmt: skip
        signs = np.sign(V[np.arange(6), np.abs(V).argmax(axis=1)])
        np.testing.assert_allclose(U * signs * in_B, file.tensor(name, "nora_B"), rtol=0, atol=1e-5)
        np.testing.assert_allclose((before_A * signs)[:, None] * V / scale, file.tensor(name, "nora_A"), rtol=0, atol=1e-4)


def test_a_mixture_has_the_output_that_the_page_describes(tmp_path):
    layers, (x,), file = saved(tmp_path, num_subspaces=3, preserve_output=False)
    A, B, C = (file.tensor("first", kind) for kind in ("nora_A", "nora_B", "nora_gate"))
    M = core(file, "first") * np.kron(np.eye(3), np.ones((2, 2)))
    logits = np.exp(C @ A @ x.numpy().T)
    gates = (3 * logits / logits.sum(axis=0))[np.arange(6) * 3 // 6]
    change = file.config["alpha"] / file.config["inner_r"] * B @ (gates * (M @ A @ x.numpy().T))
    with torch.no_grad():
        actual = (layers["first"](x) - layers["first"].base_layer(x)).numpy().T
    np.testing.assert_allclose(change, actual, rtol=0, atol=1e-4 * np.abs(actual).max())
