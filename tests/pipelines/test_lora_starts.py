"""LoRAs that are started otherwise, against their equations and PEFT; the base weight stays as it is."""

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.incremental_pca import IncrementalPCA
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from nora_vision.factors import low_rank_factors
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, adapters_off, no_losses, trained_parameters, tuner_layers
from pipelines.errors import InputError
from pipelines.methods import method_named
from pipelines.methods.eva import allocated_ranks
from pipelines.methods.lora import PlainLoraOptions
from pipelines.methods.lora_ga import LoraGa, LoraGaOptions
from pipelines.second_moments import second_moments

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
    shared = {name: value for name, value in {"rank": RANK, "alpha": ALPHA}.items() if name in kind.Options.__dataclass_fields__}
    method = kind(kind.Options(**{**shared, **options}))
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


def test_lora_fa_trains_only_b_whenever_adapters_are_switched(tmp_path):
    model = started("lora", tmp_path, lora_fa=True)
    disturb(model)
    adapter_files.save({"model": model}, tmp_path)
    for layer in tuner_layers(model).values():
        layer.enable_adapters(False)
        layer.enable_adapters(True)
        layer.set_adapter([ADAPTER_NAME])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".lora_B." in name for name in names)
    method = method_named("lora")(PlainLoraOptions(rank=RANK, lora_fa=True))
    formula = sum(eval(method.parameters, {}, {"rank": RANK, "m": m}) for m in (OUT, OUT))
    assert sum(p.numel() for p in trained_parameters({"model": model})) == formula
    loaded = PeftModel.from_pretrained(small_model(), str(tmp_path / "full" / "model"))
    torch.testing.assert_close(output(loaded.base_model.model), output(model))


def test_the_gradients_of_lora_fa_give_the_step_of_b_closest_to_one_of_the_weight(tmp_path):
    model = started("lora", tmp_path, lora_fa=True)
    kind = method_named("lora")
    training = kind(kind.Options(rank=RANK, alpha=ALPHA, lora_fa=True)).training([model], 10)
    output(model).square().mean().backward()
    base = small_model()
    output(base).square().mean().backward()
    training.after_backward(1)
    for key in ("first", "second"):
        A, B = model[key].lora_A[ADAPTER_NAME].weight, model[key].lora_B[ADAPTER_NAME].weight
        # B is zero, so the gradient of the weight is that of the base model: min_g || s g A - dL/dW ||_F.
        closest = torch.linalg.lstsq(SCALE * A.T, base[key].weight.grad.T).solution.T
        torch.testing.assert_close(B.grad, closest, atol=1e-5, rtol=1e-3)


class Convolution(nn.Module):
    """One convolution with stride and padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, images):
        return self.conv(images)


@pytest.mark.parametrize("name", [*SUBTRACTED, "eva"])
def test_a_convolution_is_its_matrix(name, tmp_path):
    """(out, in * kh * kw), whose inputs are patches of the images."""
    images, model, kind = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)), Convolution(), method_named(name)
    method = kind(kind.Options(rank=RANK, alpha=ALPHA))
    method.add(model, ["conv"], torch.Generator())
    losses = partial(lambda count: ((model(images) - index).square().mean() for index in range(count)))
    probe = Probe(lambda: model(images), losses, torch.Generator(), tmp_path / "conv.safetensors")
    method.start(model, probe, ADAPTER_NAME)
    assert torch.equal(model(images), Convolution()(images))
    matrix = nn.ModuleDict({"linear": nn.Linear(27, 8)})
    base = model.conv.get_base_layer()
    matrix["linear"].load_state_dict({"weight": base.weight.flatten(1), "bias": base.bias})
    patches = nn.functional.unfold(images, 3, padding=1, stride=2).transpose(1, 2)
    # The gradient's mean over outputs is that of the same outputs in another order.
    losses = partial(lambda count: ((matrix["linear"](patches) - index).square().mean() for index in range(count)))
    other = kind(kind.Options(rank=RANK, alpha=ALPHA))
    other.add(matrix, ["linear"], torch.Generator())
    run = Probe(lambda: matrix["linear"](patches), losses, torch.Generator(), tmp_path / "matrix.safetensors")
    other.start(matrix, run, ADAPTER_NAME)
    ours, theirs = model.conv.lora_A[ADAPTER_NAME].weight, matrix["linear"].lora_A[ADAPTER_NAME].weight
    size = min(len(ours), RANK)
    signs = torch.sign((ours.flatten(1) * theirs).sum(dim=1))[:size, None]
    torch.testing.assert_close(ours.flatten(1)[:size], signs * theirs[:size], atol=2e-3, rtol=0)
    disturb(model)
    adapter_files.save({"model": model}, tmp_path)
    loaded = PeftModel.from_pretrained(Convolution(), str(tmp_path / "full" / "model"))
    torch.testing.assert_close(loaded(images), model(images), atol=1e-5, rtol=1e-4)
    expected = base(images) + nn.functional.conv2d(images, model.conv.get_delta_weight(ADAPTER_NAME), None, 2, 1)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["pissa", "olora", "milora", "corda"])
def test_a_quantised_weight_stays_as_it_is_and_is_started_from_its_dequantised_values(name, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": Linear4bit(16, 8, quant_type="nf4", compute_dtype=torch.float32)}).to("cpu")
    x = torch.randn(5, 16)
    before, quantised = model["linear"](x), model["linear"].weight.data.clone()
    dense = dequantize_4bit(model["linear"].weight.data, model["linear"].weight.quant_state)
    kind = method_named(name)
    method = kind(kind.Options(rank=RANK, alpha=ALPHA))
    method.add(model, ["linear"], torch.Generator())
    probe = Probe(lambda: model["linear"](x), no_losses, torch.Generator(), tmp_path / "x.safetensors")
    method.start(model, probe, ADAPTER_NAME)
    layer = model["linear"]
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.get_base_layer().weight.data, quantised)
    U, S, Vh = torch.linalg.svd(dense.float(), full_matrices=False)
    expected = {"pissa": (U[:, :RANK] * S[:RANK]) @ Vh[:RANK], "milora": (U[:, -RANK:] * S[-RANK:]) @ Vh[-RANK:]}
    if name in expected:
        torch.testing.assert_close(start_of(layer), expected[name])


def test_files_in_half_precision_hold_the_change_and_not_the_difference_of_two_large_products(tmp_path):
    """With B A and B_0 A_0 side by side, the rounding of bfloat16 would exceed a small change."""
    model = started("pissa", tmp_path)
    for parameter in trained_parameters({"model": model}):
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    layer = model["first"]
    change = layer.get_delta_weight(ADAPTER_NAME)

    def error(up, down):
        return float((SCALE * up.bfloat16().float() @ down.bfloat16().float() - change).norm() / change.norm())

    side_by_side = [torch.cat([trained_of(part), sign * first_of(part)], dim=dim) for part, sign, dim in (
        (layer.lora_B, -1, 1), (layer.lora_A, 1, 0))]  # fmt: skip
    torch.testing.assert_close(SCALE * side_by_side[0] @ side_by_side[1], change, atol=1e-5, rtol=0)
    assert error(layer.lora_B[ADAPTER_NAME].weight, layer.lora_A[ADAPTER_NAME].weight) < 0.01
    assert error(*side_by_side) > 0.1


@pytest.mark.parametrize("name", [*SUBTRACTED, "eva", "t_lora"])
def test_training_without_a_start_is_an_error_and_not_plain_lora(name):
    model, kind = small_model(), method_named(name)
    method = kind(kind.Options(rank=RANK))
    method.add(model, ["first", "second"], torch.Generator())
    with pytest.raises(ValueError, match=r"has not been started .*Call start before training"):
        method.training([model], 10)


def test_lora_ga_refuses_a_weight_with_a_single_row_by_its_name(tmp_path):
    model, method = nn.ModuleDict({"layer": nn.Linear(8, 1)}), LoraGa(LoraGaOptions(rank=1))
    method.add(model, ["layer"], torch.Generator())

    def losses(count):
        yield model["layer"](torch.ones(8)).square().sum()

    probe = Probe(lambda: None, losses, torch.Generator(), tmp_path / "cache")
    with pytest.raises(InputError, match="LoRA-GA cannot adapt 'layer', whose weight is a vector"):
        method.start(model, probe, ADAPTER_NAME)


def test_rows_that_a_gradient_does_not_determine_start_as_in_lora(tmp_path):
    """LoRA-GA needs 2r singular vectors; of a 6 x 5 weight it can start two rows of four."""
    layer = started("lora_ga", tmp_path, rank=4)["first"]
    A, B = first_of(layer.lora_A), first_of(layer.lora_B)
    assert not B[:, 2:].any()
    assert A[2:].any(dim=1).all()
    torch.testing.assert_close(A[:2] @ A[:2].T, torch.eye(2), atol=1e-5, rtol=0)


def test_a_convolution_with_groups_is_refused_with_its_name(tmp_path):
    model = nn.ModuleDict({"grouped": nn.Conv2d(4, 4, 3, groups=2)})
    kind = method_named("pissa")
    method = kind(kind.Options(rank=RANK))
    method.add(model, ["grouped"], torch.Generator())
    with pytest.raises(InputError, match=r"'grouped' must be a convolution without groups, got 2"):
        method.start(model, Probe(None, no_losses, torch.Generator(), tmp_path / "x.safetensors"), ADAPTER_NAME)


@pytest.mark.parametrize("group_bytes", [1, 2**30])
def test_moments_are_those_of_all_inputs_whatever_the_groups(group_bytes, tmp_path):
    model = started("lora", tmp_path)
    calls = []

    def forward():
        calls.append(output(model))

    found = dict(second_moments(tuner_layers(model), forward, group_bytes))
    assert len(calls) == (2 if group_bytes == 1 else 1)
    hidden = torch.tanh(model["first"].get_base_layer()(inputs()))
    for name, x in (("first", inputs()), ("second", hidden)):
        torch.testing.assert_close(found[name].covariance, torch.cov(x.T.double(), correction=0), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found[name].mean, x.mean(dim=0).double(), atol=1e-6, rtol=1e-5)


def test_eva_finds_the_directions_of_pefts_incremental_decomposition(tmp_path):
    layer = started("eva", tmp_path, rho=1.0)["first"]
    pca = IncrementalPCA(n_components=IN)
    pca.fit(inputs())
    A = layer.lora_A[ADAPTER_NAME].weight.detach()
    torch.testing.assert_close((A @ pca.components_[: len(A)].T).abs(), torch.eye(len(A)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_eva_keeps_the_scaling_at_every_rank(use_rslora, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.methods.eva.allocated_ranks", lambda explained, budget: {"first": 1, "second": 3})
    model = started("eva", tmp_path, use_rslora=use_rslora)
    disturb(model)
    adapter_files.save({"model": model}, tmp_path)
    loaded = PeftModel.from_pretrained(small_model(), str(tmp_path / "full" / "model")).base_model.model
    for adapted, name in ((model, ADAPTER_NAME), (loaded, "default")):
        assert [adapted[key].r[name] for key in ("first", "second")] == [1, 3]
        for key in ("first", "second"):
            assert adapted[key].scaling[name] == pytest.approx(ALPHA / (RANK**0.5 if use_rslora else RANK))
    torch.testing.assert_close(output(loaded), output(model))


def test_pissa_with_power_iterations_comes_close_to_the_exact_decomposition(tmp_path):
    exact, fast = (started("pissa", tmp_path / str(n), pissa_niter=n)["first"] for n in (0, 200))
    torch.testing.assert_close(start_of(fast), start_of(exact), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("name", "option"), [("lora_ga", {"lora_ga_direction": "random"}), ("pissa", {"pissa_niter": 1})])
def test_a_randomised_start_follows_the_probes_generator_and_not_the_global_one(name, option, tmp_path):
    starts = []
    for seed in range(2):
        model = small_model()
        torch.manual_seed(seed)
        starts.append(started(name, tmp_path / str(seed), model, **option))
    assert torch.equal(first_of(starts[0]["first"].lora_A), first_of(starts[1]["first"].lora_A))


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


@pytest.mark.parametrize("number", [0, 3])
def test_clip_svd_changes_the_singular_values_of_the_weight_and_nothing_else(number, tmp_path):
    model = started("clip_svd", tmp_path, num_singular_values=number)
    assert torch.equal(output(model), output(small_model()))
    disturb(model)
    ranks = []
    for layer in tuner_layers(model).values():
        (d,) = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        weight = weight_of(layer)
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        ranks.append(min(number or OUT, *weight.shape))
        assert d.numel() == ranks[-1]
        # A pair of singular vectors may have the other sign, which does not change the product.
        expected = U[:, : d.numel()] * d.detach().flatten() @ Vh[: d.numel()]
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER_NAME), expected)
    assert ranks == ([IN, OUT] if number == 0 else [number] * 2)


def test_copies_of_a_started_layer_share_nothing(tmp_path):
    layer = started("pissa", tmp_path)["first"]
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.lora_A[ADAPTER_NAME].parametrizations.weight.original.zero_()
    assert trained_of(layer.lora_A).any()


class Output(nn.Module):
    """The small model as a module that is called."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return output(self.model)


def in_two_processes(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=2)
    model = started("lora", folder)
    layer = model["first"]
    # Each process has a part of the inputs.
    part = inputs()[:3] if rank == 0 else inputs()[3:]
    moments = dict(second_moments({"first": layer}, lambda: layer(part)))["first"]
    torch.testing.assert_close(moments.second, (inputs().T @ inputs() / len(inputs())).double(), atol=1e-5, rtol=1e-5)
    whole, split = (Output(started("pissa", folder / f"{rank}{name}")) for name in ("whole", "split"))
    fully_shard(split)
    for module in (whole, split):
        optimizer = torch.optim.AdamW([parameter for parameter in module.parameters() if parameter.requires_grad], lr=0.1)
        for _ in range(2):
            module().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(trained_parameters({"": whole}), trained_parameters({"": split}), strict=True)
    assert all(torch.equal(ours, theirs.full_tensor()) for ours, theirs in pairs)
    torch.distributed.barrier()
    # The usual end of an interpreter is now and then aborted by threads of gloo that nobody has waited for.
    os._exit(0)


def test_moments_are_summed_over_processes_and_a_sharded_adapter_trains_as_a_whole_one(tmp_path):
    torch.multiprocessing.start_processes(in_two_processes, (tmp_path,), nprocs=2, start_method="fork")


def test_moments_are_exact_when_the_model_runs_in_half_precision(tmp_path):
    layer, x = started("lora", tmp_path)["first"], inputs()

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)

    ((_, moments),) = second_moments({"first": layer}, forward)
    torch.testing.assert_close(moments.second, x.double().T @ x.double() / len(x), atol=1e-5, rtol=1e-6)
