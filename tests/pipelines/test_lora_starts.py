"""LoRAs that are started otherwise, against their equations and PEFT; the base weight stays as it is."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from nora_vision.factors import low_rank_factors
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, adapters_off, no_losses, trained_parameters, tuner_layers
from pipelines.errors import InputError
from pipelines.methods import method_named
from pipelines.methods.eva import allocated_ranks

RANK, ALPHA, OUT, IN = 2, 3.0, 6, 5
SCALE = ALPHA / RANK
SUBTRACTED = ["pissa", "olora", "milora", "corda", "lora_ga"]
FROM_DATA = ["corda", "eva", "lora_ga"]
methods = pytest.mark.parametrize("name", SUBTRACTED)


def small_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(IN, OUT), "second": nn.Linear(OUT, OUT)})


def inputs():
    """Seven tokens whose features differ in size."""
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, IN + 1)


def output(model):
    return model["second"](torch.tanh(model["first"](inputs())))


def losses_of(model, count):
    for index in range(count):
        yield (output(model) - index).square().mean()


def started(name, folder, model=None, **options):
    model = model or small_model()
    kind = method_named(name)
    method = kind(kind.Options(**{"rank": RANK, "alpha": ALPHA, **options}))
    method.add(model, ["first", "second"], torch.Generator().manual_seed(0))
    probe = Probe(
        lambda: output(model), partial(losses_of, model), torch.Generator().manual_seed(0), folder / "small.safetensors"
    )
    method.start(model, probe, ADAPTER_NAME)
    return model


def disturb(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained_parameters({"model": model}):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def trained_of(part):
    """A or B of a layer: `part` is its lora_A or lora_B."""
    return part[ADAPTER_NAME].parametrizations.weight.original.detach()


def first_of(part):
    """A_0 or B_0 of a layer."""
    return part[ADAPTER_NAME].parametrizations.weight[0].start


def start_of(layer):
    """s B_0 A_0"""
    return SCALE * first_of(layer.lora_B) @ first_of(layer.lora_A)


def weight_of(layer):
    return layer.get_base_layer().weight.detach()


@methods
def test_training_starts_exactly_at_the_base_model_whose_weights_stay(name, tmp_path):
    base, model = small_model(), started(name, tmp_path)
    assert torch.equal(output(model), output(base))
    disturb(model)
    output(model).square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained_parameters({"model": model}))
    for key in ("first", "second"):
        assert torch.equal(weight_of(model[key]), base[key].weight)
    with adapters_off([model]):
        assert torch.equal(output(model), output(base))


@methods
def test_the_change_is_that_of_the_equation(name, tmp_path):
    model = started(name, tmp_path)
    disturb(model)
    for layer in tuner_layers(model).values():
        expected = SCALE * trained_of(layer.lora_B) @ trained_of(layer.lora_A) - start_of(layer)
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER_NAME), expected)
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), layer.get_base_layer()(x) + x @ expected.T)


@methods
def test_files_hold_the_plain_lora_of_twice_the_rank_that_peft_loads(name, tmp_path):
    model = started(name, tmp_path)
    disturb(model)
    adapter_files.save({"model": model}, tmp_path)
    loaded = PeftModel.from_pretrained(small_model(), str(tmp_path / "full" / "model"))
    torch.testing.assert_close(output(loaded.base_model.model), output(model))
    tensors = load_file(tmp_path / "full" / "model" / "adapter_model.safetensors")
    assert tensors["base_model.model.first.lora_A.weight"].shape == (2 * RANK, IN)
    factors = low_rank_factors(model["first"], ADAPTER_NAME)
    torch.testing.assert_close(factors.up @ factors.down, model["first"].get_delta_weight(ADAPTER_NAME))


@methods
def test_a_and_b_alone_are_wrong_on_the_original_weights(name, tmp_path):
    """What PEFT's own `save_pretrained` writes, without `path_initial_model_for_weight_conversion`."""
    model = started(name, tmp_path)
    disturb(model)
    wrong = small_model()
    with torch.no_grad():
        for key in ("first", "second"):
            wrong[key].weight += SCALE * trained_of(model[key].lora_B) @ trained_of(model[key].lora_A)
    assert (output(wrong) - output(model)).abs().max() > 0.01


@pytest.mark.parametrize(("name", "init"), [("pissa", "pissa"), ("olora", "olora")])
def test_the_function_and_its_start_are_those_of_peft(name, init, tmp_path):
    ours = started(name, tmp_path)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=init, target_modules=["first", "second"])
    theirs = get_peft_model(small_model(), config).base_model.model
    for key in ("first", "second"):
        torch.testing.assert_close(trained_of(ours[key].lora_A), theirs[key].lora_A[ADAPTER_NAME].weight)
        torch.testing.assert_close(trained_of(ours[key].lora_B), theirs[key].lora_B[ADAPTER_NAME].weight)
        assert (weight_of(theirs[key]) - weight_of(ours[key])).norm() > 0.1


@pytest.mark.parametrize(("name", "part"), [("pissa", slice(RANK)), ("milora", slice(-RANK, None))])
def test_the_start_is_a_part_of_the_singular_value_decomposition(name, part, tmp_path):
    for layer in tuner_layers(started(name, tmp_path)).values():
        U, S, Vh = torch.linalg.svd(weight_of(layer), full_matrices=False)
        torch.testing.assert_close(start_of(layer), (U[:, part] * S[part]) @ Vh[part])


def test_olora_starts_from_the_first_columns_of_q_and_rows_of_r(tmp_path):
    for layer in tuner_layers(started("olora", tmp_path)).values():
        Q, R = torch.linalg.qr(weight_of(layer))
        torch.testing.assert_close(start_of(layer), SCALE * Q[:, :RANK] @ R[:RANK])


@pytest.mark.parametrize(("method", "part"), [("ipm", slice(RANK)), ("kpm", slice(-RANK, None))])
def test_corda_decomposes_the_weight_times_the_covariance_of_its_inputs(method, part, tmp_path):
    layer = started("corda", tmp_path, corda_method=method)["first"]
    x = inputs()
    covariance = x.T @ x / x.square().sum() * IN
    # PEFT adds a hundredth of the mean of the diagonal.
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(IN)
    U, S, Vh = torch.linalg.svd(weight_of(layer) @ covariance, full_matrices=False)
    expected = (U[:, part] * S[part]) @ Vh[part] @ torch.linalg.inv(covariance)
    torch.testing.assert_close(start_of(layer), expected, atol=1e-4, rtol=1e-3)


def test_lora_ga_starts_from_singular_vectors_of_the_gradient(tmp_path):
    model = started("lora_ga", tmp_path, gradient_batches=3)
    base = small_model()
    torch.stack(list(losses_of(base, 3))).mean().backward()
    U, _, Vh = torch.linalg.svd(base["first"].weight.grad, full_matrices=False)
    layer = model["first"]
    A, B = first_of(layer.lora_A), first_of(layer.lora_B)
    # ArB2r: A is V_1, ..., V_r; B is U_{r+1}, ..., U_{2r} with their singular values.
    torch.testing.assert_close((A @ Vh[:RANK].T).abs(), torch.eye(RANK), atol=1e-4, rtol=0)
    cosines = nn.functional.normalize(B, dim=0).T @ U[:, RANK : 2 * RANK]
    torch.testing.assert_close(cosines.abs(), torch.eye(RANK), atol=1e-3, rtol=0)


def test_eva_starts_from_the_singular_vectors_of_the_activations_and_a_zero_b(tmp_path):
    model = started("eva", tmp_path)
    layer = model["first"]
    rank = layer.r[ADAPTER_NAME]
    _, _, Vh = torch.linalg.svd(inputs() - inputs().mean(dim=0), full_matrices=False)
    A = layer.lora_A[ADAPTER_NAME].weight.detach()
    torch.testing.assert_close((A @ Vh[:rank].T).abs(), torch.eye(rank), atol=1e-4, rtol=0)
    assert not layer.lora_B[ADAPTER_NAME].weight.any()
    assert torch.equal(output(model), output(small_model()))
    assert layer.scaling[ADAPTER_NAME] == pytest.approx(SCALE)


def test_eva_gives_the_budget_to_the_directions_that_explain_most():
    explained = {"a": torch.tensor([0.9, 0.05, 0.03]), "b": torch.tensor([0.4, 0.3, 0.2]), "c": torch.tensor([0.5, 0.06, 0.01])}
    assert allocated_ranks(explained, 6) == {"a": 1, "b": 3, "c": 2}
    reordered = dict(reversed(explained.items()))
    assert allocated_ranks(reordered, 6) == {"a": 1, "b": 3, "c": 2}


def test_eva_keeps_the_sum_of_the_ranks_and_saves_each(tmp_path):
    model = started("eva", tmp_path)
    disturb(model)
    assert sum(layer.r[ADAPTER_NAME] for layer in tuner_layers(model).values()) == 2 * RANK
    adapter_files.save({"model": model}, tmp_path)
    loaded = small_model()
    adapter_files.load({"model": loaded}, tmp_path / "full")
    torch.testing.assert_close(output(loaded), output(model))


@pytest.mark.parametrize("name", FROM_DATA)
def test_without_its_pass_over_the_data_a_method_is_an_error_and_not_plain_lora(name, tmp_path):
    model, kind = small_model(), method_named(name)
    method = kind(kind.Options(rank=RANK))
    method.add(model, ["first", "second"], torch.Generator())
    with pytest.raises(ValueError, match="is initialised from"):
        method.start(model, Probe(None, no_losses, torch.Generator(), tmp_path / "x.safetensors"), ADAPTER_NAME)


@pytest.mark.parametrize("name", FROM_DATA)
def test_a_second_start_reads_what_the_first_has_cached(name, tmp_path):
    first, model, kind = started(name, tmp_path), small_model(), method_named(name)
    method = kind(kind.Options(rank=RANK, alpha=ALPHA))
    method.add(model, ["first", "second"], torch.Generator())
    method.start(model, Probe(None, no_losses, torch.Generator(), Path(tmp_path / "small.safetensors")), ADAPTER_NAME)
    pairs = zip(trained_parameters({"model": first}), trained_parameters({"model": model}), strict=True)
    assert all(torch.equal(ours, again) for ours, again in pairs)


@methods
def test_a_rank_above_the_size_of_a_layer_is_refused_with_its_name(name, tmp_path):
    with pytest.raises(InputError, match=r"rank must be in \[1, 5\] for 'first', got 6"):
        started(name, tmp_path, rank=6)


def test_lora_fa_trains_only_b(tmp_path):
    model = started("lora", tmp_path, lora_fa=True)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".lora_B." in name for name in names)
    assert sum(p.numel() for p in trained_parameters({"model": model})) == 2 * RANK * OUT


def test_lora_xs_trains_one_square_matrix_between_the_singular_vectors(tmp_path):
    model = started("lora_xs", tmp_path)
    base = small_model()
    assert torch.equal(output(model), output(base))
    disturb(model)
    for layer in tuner_layers(model).values():
        (R,) = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        assert R.numel() == RANK * RANK
        U, S, Vh = torch.linalg.svd(weight_of(layer), full_matrices=False)
        signs = torch.sign(Vh[:RANK].gather(1, Vh[:RANK].abs().argmax(dim=1, keepdim=True)))
        B, A = U[:, :RANK] * S[:RANK] * signs.T, signs * Vh[:RANK]
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER_NAME), SCALE * B @ R.detach().reshape(RANK, RANK) @ A)


def test_copies_of_a_started_layer_share_nothing(tmp_path):
    layer = started("pissa", tmp_path)["first"]
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.lora_A[ADAPTER_NAME].parametrizations.weight.original.zero_()
    assert trained_of(layer.lora_A).any()
