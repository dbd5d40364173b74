"""The forms of the core M: each against its equation, with its parameters, gradients, files and sums."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from small_models import MODELS, change_weights, config_for, output
from torch import nn

from nora_vision import NoraConfig, calibrate, initialize_nora_weights, load_adapter, save_adapter
from nora_vision.inner import sparse_positions
from nora_vision.layer import nora_layers

R, INNER_R, ENTRIES = 8, 2, 5
FORMS = {
    "serial": {},
    "parallel": {},
    "a_side": {},
    "b_side": {},
    "full": {},
    "block_diagonal": {"inner_blocks": 4},
    "diagonal": {},
    "symmetric": {},
    "antisymmetric": {},
    "sparse_low_rank": {"sparse_entries": ENTRIES, "sparse_seed": 3},
}
COUNTS = {
    "serial": 2 * R * INNER_R,
    "parallel": 2 * R * INNER_R,
    "a_side": R * INNER_R,
    "b_side": R * INNER_R,
    "full": R * R,
    "block_diagonal": R * R // 4,
    "diagonal": R,
    "symmetric": 2 * R * INNER_R,
    "antisymmetric": 2 * R * INNER_R,
    "sparse_low_rank": 2 * R * INNER_R + ENTRIES,
}
forms = pytest.mark.parametrize("form", FORMS)


def fields_of(form, **fields):
    return {"r": R, "inner_r": INNER_R, "alpha": 3.0, "inner_form": form, **FORMS[form], **fields}


def layer_of(base, form="serial", **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inject_adapter_in_model(config_for(["0"], **fields_of(form, **fields)), nn.Sequential(base))[0]


def core(form, A, B, M, sparse):
    """M by its equation."""
    P = torch.eye(R)[:INNER_R]
    if form == "sparse_low_rank":
        total = B @ A
        for position, value in zip(sparse_positions(R, ENTRIES, 3, torch.device("cpu")).tolist(), sparse, strict=True):
            total = total + value * torch.outer(torch.eye(R)[position // R], torch.eye(R)[position % R])
        return total
    return {
        "serial": lambda: B @ A,
        "parallel": lambda: B @ P + P.T @ A,
        "a_side": lambda: P.T @ A,
        "b_side": lambda: B @ P,
        "full": lambda: M[0],
        "block_diagonal": lambda: torch.block_diag(*M),
        "diagonal": lambda: torch.diag(M.flatten()),
        "symmetric": lambda: B @ A + (B @ A).T,
        "antisymmetric": lambda: B @ A - (B @ A).T,
    }[form]()


def core_of(layer, form, suffix=""):
    """M of the layer, or with the suffix 0 its frozen start."""
    names = ("nora_inner_A", "nora_inner_B", "nora_inner_M")
    tensors = [getattr(layer, name + suffix) for name in names]
    sparse = layer.nora_inner_sparse if not suffix else {"default": torch.zeros(ENTRIES)}
    values = [each["default"].detach() if "default" in each else None for each in (*tensors, sparse)]
    return core(form, *values)


def base_and_input(kind):
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(20, 30), torch.randn(4, 7, 20)
    return nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=1), torch.randn(4, 6, 9, 8)


@pytest.mark.parametrize("preserve_output", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@forms
def test_the_weight_change_is_s_B_M_A_in_the_output_the_merged_weight_and_the_low_rank_factors(form, kind, preserve_output):
    base, x = base_and_input(kind)
    layer = layer_of(base, form, init_weights=True, inner_init="gaussian", inner_std=0.5, preserve_output=preserve_output)
    change_weights(layer)
    M = core_of(layer, form) - (core_of(layer, form, "0") if preserve_output else 0)
    change = 3.0 / INNER_R * layer.nora_B["default"] @ M @ layer.nora_A["default"]
    weight = base.weight + change.reshape(base.weight.shape)
    expected = torch.func.functional_call(base, {"weight": weight}, (x,))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.get_delta_weight("default").flatten(1), change, rtol=1e-4, atol=1e-5)
    up, down = layer.low_rank_factors("default")
    torch.testing.assert_close(up @ down, change, rtol=1e-4, atol=1e-5)
    assert up.shape[1] <= R


@forms
def test_the_number_of_trained_parameters_is_that_of_the_form(form):
    layer = layer_of(nn.Linear(20, 30), form)
    layer.base_layer.requires_grad_(False)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == COUNTS[form]
    assert layer.inner_form["default"].num_parameters() == COUNTS[form]


@forms
def test_every_trained_number_gets_a_gradient(form):
    base, x = base_and_input("linear")
    layer = layer_of(base, form)
    layer.base_layer.requires_grad_(False)
    (layer(x) * torch.randn(30)).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.all(), name


@pytest.mark.parametrize("preserve_output", [False, True])
@forms
def test_the_default_start_is_the_base_model_to_the_bit_and_trains(form, preserve_output):
    base, x = base_and_input("linear")
    expected = base(x)
    layer = layer_of(base, form, init_weights=True, preserve_output=preserve_output)
    assert torch.equal(layer(x), expected)
    layer.base_layer.requires_grad_(False)
    layer(x).square().sum().backward()
    assert any(parameter.grad.any() for parameter in layer.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("inner_init", ["gaussian", "uniform", "orthogonal", "singular_values"])
@forms
def test_every_other_start_moves_the_base_model_and_none_does_with_preserve_output(form, inner_init):
    if (form, inner_init) == ("antisymmetric", "singular_values"):
        pytest.skip("the diagonal of an antisymmetric matrix is zero")
    base, x = base_and_input("linear")
    expected = base(x)
    assert not torch.allclose(layer_of(base, form, init_weights=True, inner_init=inner_init)(x), expected)
    kept = layer_of(base, form, init_weights=True, inner_init=inner_init, preserve_output=True)
    assert torch.equal(kept(x), expected)
    assert not kept.get_delta_weight("default").any()


@pytest.mark.parametrize(("inner_init", "bound"), [("gaussian", None), ("uniform", 3**0.5), ("orthogonal", None)])
def test_random_starts_have_the_standard_deviation_of_the_gaussian_one(inner_init, bound):
    layer = layer_of(nn.Linear(256, 256), r=256, inner_r=64, init_weights=True, inner_init=inner_init, inner_std=0.05)
    for values, std in ((layer.nora_inner_A["default"], 256**-0.5), (layer.nora_inner_B["default"], 0.05)):
        assert values.square().mean().sqrt().item() == pytest.approx(std, rel=0.02)
        assert bound is None or values.abs().max() <= bound * std


def test_an_orthogonal_start_has_orthonormal_rows_and_columns():
    layer = layer_of(nn.Linear(20, 30), init_weights=True, inner_init="orthogonal", inner_std=0.5)
    A, B = layer.nora_inner_A["default"].detach(), layer.nora_inner_B["default"].detach()
    torch.testing.assert_close(A @ A.T, torch.eye(INNER_R), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B.T @ B, 0.5**2 * R * torch.eye(INNER_R), rtol=1e-5, atol=1e-6)


def best_approximation(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def test_the_preprints_form_starts_at_s_times_the_best_approximation_of_the_weight():
    base, _ = base_and_input("linear")
    layer = layer_of(base, outer_scaling="none", inner_init="singular_values", init_weights=True)
    A, B = layer.nora_A["default"], layer.nora_B["default"]
    torch.testing.assert_close(A @ A.T, torch.eye(R), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B.T @ B, torch.eye(R), rtol=1e-5, atol=1e-5)
    roots = torch.linalg.svdvals(base.weight)[:INNER_R].sqrt()
    diagonal = torch.zeros(INNER_R, R)
    diagonal[range(INNER_R), range(INNER_R)] = roots.detach()
    torch.testing.assert_close(layer.nora_inner_A["default"].detach(), diagonal, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.nora_inner_B["default"].detach(), diagonal.T, rtol=1e-4, atol=1e-5)
    expected = 3.0 / INNER_R * best_approximation(base.weight, INNER_R)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"antisymmetric"}))
@pytest.mark.parametrize("outer_scaling", ["B", "A", "split", "mean", "none"])
def test_the_start_from_singular_values_is_the_best_approximation_in_the_weighted_norm_wherever_they_are(form, outer_scaling):
    base, x = base_and_input("linear")
    model = inject_adapter_in_model(
        config_for(
            ["0"], **fields_of(form, outer_scaling=outer_scaling, inner_init="singular_values"), outer_init="awsvd",
            init_weights=True,
        ),
        nn.Sequential(base),
    )  # fmt: skip
    initialize_nora_weights(model, calibrate(model, lambda: model(x * torch.arange(1, 21))))
    S = model[0].nora_activation_scale["default"]
    rank = R if form in ("full", "block_diagonal", "diagonal") else INNER_R
    expected = 3.0 / INNER_R * best_approximation((base.weight * S).detach(), rank)
    torch.testing.assert_close(model[0].get_delta_weight("default") * S, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("outer_scaling", ["B", "A", "split", "mean", "none"])
def test_the_singular_values_are_where_the_option_says(outer_scaling):
    base, x = base_and_input("conv2d")
    fields = {"outer_scaling": outer_scaling, "outer_init": "awsvd", "init_weights": True}
    model = inject_adapter_in_model(config_for(["0"], **fields_of("serial", **fields)), nn.Sequential(base))
    initialize_nora_weights(model, calibrate(model, lambda: model(x)))
    stored = model[0].nora_activation_scale["default"]
    S = stored / stored.mean()
    B, A = model[0].nora_B["default"], model[0].nora_A["default"] * S
    values = torch.linalg.svdvals(base.weight.flatten(1) * S)[:R].detach()
    one = torch.ones(R)
    of_B, of_A = {
        "B": (values, one),
        "A": (one, values),
        "split": (values.sqrt(), values.sqrt()),
        "mean": (values.mean() * one, one),
        "none": (one, one),
    }[outer_scaling]
    torch.testing.assert_close(B.T @ B, of_B.square().diag(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(A @ A.T, of_A.square().diag(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B @ A, best_approximation_with((base.weight.flatten(1) * S).detach(), of_B * of_A))


def best_approximation_with(matrix, values):
    """The leading singular vectors of `matrix` with other singular values."""
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, : len(values)] * values @ Vh[: len(values)]


def test_a_direction_without_a_singular_value_stays_zero():
    base = nn.Linear(20, 30)
    with torch.no_grad():
        base.weight.copy_(torch.randint(-5, 5, (30, 3)).float() @ torch.randint(-5, 5, (3, 20)).float())
    layer = layer_of(base, outer_scaling="none", init_weights=True)
    norms = layer.nora_B["default"].norm(dim=0)
    torch.testing.assert_close(norms, torch.tensor([1.0] * 3 + [0.0] * 5))


def test_the_sparse_positions_are_the_smallest_splitmix64_hashes():
    def hashed(number):
        state = number * 0x9E3779B97F4A7C15 % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state - 2**64 if state >= 2**63 else state

    expected = sorted(range(R * R), key=lambda position: hashed(position + 7 * 2**32))[:ENTRIES]
    assert sparse_positions(R, ENTRIES, 7, torch.device("cpu")).tolist() == sorted(expected)


def test_sparse_positions_first_used_in_inference_mode_can_be_trained_later():
    layer = layer_of(nn.Linear(20, 30), "sparse_low_rank", sparse_seed=11)
    with torch.inference_mode():
        layer(torch.randn(2, 20))
    layer(torch.randn(2, 20)).sum().backward()
    assert layer.nora_inner_sparse["default"].grad.all()


def started(kind, form, **fields):
    """A PEFT model with a trained adapter that was started from statistics, its inputs and output."""
    model, inputs, targets = MODELS[kind]()
    config = config_for(targets, **fields_of(form, outer_init="awsvd", init_weights=True, inner_init="uniform", **fields))
    model = get_peft_model(model, config).eval()
    initialize_nora_weights(model, calibrate(model, lambda: model(*inputs)), generator=torch.Generator().manual_seed(0))
    change_weights(model)
    return model, inputs, output(model, inputs)


SAVED = [(form, {}) for form in FORMS] + [
    ("serial", {"outer_scaling": "A"}),
    ("parallel", {"outer_scaling": "split", "preserve_output": True}),
    ("sparse_low_rank", {"outer_scaling": "mean", "preserve_output": True}),
    ("full", {"outer_scaling": "none", "preserve_output": True}),
    ("serial", {"num_subspaces": 4}),
    ("block_diagonal", {"num_subspaces": 2, "preserve_output": True}),
]


@pytest.mark.parametrize(("form", "fields"), SAVED, ids=str)
def test_full_and_compact_files_and_those_of_peft_give_the_same_output(form, fields, tmp_path):
    model, inputs, expected = started("linear", form, **fields)
    model.save_pretrained(tmp_path / "peft")
    for on_meta in (False, True):
        fresh, _, _ = MODELS["linear"]()
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "peft", low_cpu_mem_usage=on_meta).eval()
        assert torch.equal(output(loaded, inputs), expected)
    for compact in (False, True):
        folder = save_adapter(model, tmp_path / f"compact_{compact}", compact=compact)
        fresh, _, _ = MODELS["linear"]()
        load_adapter(fresh, folder, "again")
        torch.testing.assert_close(output(fresh, inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_configuration_of_an_earlier_version_is_that_of_the_defaults(tmp_path):
    NoraConfig(target_modules=["first"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    for name in ("inner_form", "inner_blocks", "sparse_entries", "sparse_seed", "num_subspaces", "outer_scaling"):
        del fields[name]
    file.write_text(json.dumps(fields))
    assert NoraConfig.from_pretrained(tmp_path) == NoraConfig(target_modules=["first"], inner_form="serial", outer_scaling="B")


@forms
def test_a_lora_with_the_low_rank_factors_gives_the_same_output(form):
    model, inputs, expected = started("linear", form)
    factors = {name.removeprefix("base_model.model."): layer for name, layer in nora_layers(model).items()}
    pairs = {name: layer.low_rank_factors("default") for name, layer in factors.items()}
    rank = len(next(iter(pairs.values()))[1])
    base, _, targets = MODELS["linear"]()
    lora = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)).eval()
    for name, (up, down) in pairs.items():
        layer = lora.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down, up
    torch.testing.assert_close(output(lora, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["conv2d", "conv1d"])
@forms
def test_merging_keeps_the_output_and_unmerging_restores_the_weights(form, kind):
    model, inputs, expected = started(kind, form, preserve_output=True)
    with model.disable_adapter():
        base = output(model, inputs)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(output(model, inputs), base, rtol=1e-4, atol=1e-4)


def test_adapters_of_several_forms_share_a_model_and_add_up_to_one():
    model, inputs, targets = MODELS["linear"]()
    chosen = ("parallel", "full", "antisymmetric", "sparse_low_rank")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config_for(targets, **fields_of("serial")), "serial").eval()
        for form in chosen:
            model.add_adapter(form, config_for(targets, **fields_of(form)))
    weights = {"serial": 0.5, "parallel": -1.0, "full": 0.3, "antisymmetric": 2.0, "sparse_low_rank": 0.7}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", "cat")
    for layer in nora_layers(model).values():
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in weights.items())
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-5)
    model.delete_adapter("parallel")
    assert not any("parallel" in name for name in model.state_dict())
    assert output(model, inputs).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("form", "fields"), [*((form, {}) for form in FORMS), ("serial", {"num_subspaces": 4})], ids=str)
def test_half_precision_models_train_float32_tensors(form, fields, dtype):
    model, inputs, targets = MODELS["linear"]()
    model = get_peft_model(model.to(dtype), config_for(targets, **fields_of(form, **fields)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    result = output(model, (inputs[0].to(dtype),))
    assert result.dtype == dtype
    result.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def mixture(kind, **fields):
    base, x = base_and_input(kind)
    layer = layer_of(base, "serial", num_subspaces=4, **fields)
    return base, x, layer


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_mixture_is_the_sum_of_gated_adapters_on_disjoint_subspaces(kind):
    base, x, layer = mixture(kind)
    A, B = layer.nora_A["default"], layer.nora_B["default"]
    inner_A, inner_B, C = (each["default"].detach() for each in (layer.nora_inner_A, layer.nora_inner_B, layer.nora_gate))
    # One column a token, or a position of the kernel.
    columns = x.flatten(0, 1).T if kind == "linear" else unfolded(base, x)
    gates = 4 * (C @ A @ columns).softmax(dim=0)
    change = torch.zeros(len(B), columns.shape[1])
    for k in range(4):
        part = slice(2 * k, 2 * k + 2)
        change += gates[k] * (B[:, part] @ inner_B[part] @ inner_A[:, part] @ A[part] @ columns)
    actual = layer(x) - base(x)
    actual = actual.flatten(0, 1).T if kind == "linear" else actual.transpose(0, 1).flatten(1)
    torch.testing.assert_close(actual, 3.0 / INNER_R * change, rtol=1e-4, atol=1e-4)


def unfolded(base, x):
    """(in, positions): the inputs of each output value."""
    columns = nn.functional.unfold(x, base.kernel_size, padding=base.padding, stride=base.stride)
    return columns.transpose(0, 1).flatten(1)


def test_a_mixture_starts_with_all_gates_at_one_and_trains_every_number():
    base, x, layer = mixture("linear", init_weights=True, inner_init="gaussian")
    layer.base_layer.requires_grad_(False)
    up, down = layer.inner_form["default"].factors(layer.inner_tensors("default"))
    block = torch.block_diag(*[torch.ones(2, 2)] * 4)
    M = block * (layer.nora_inner_B["default"] @ layer.nora_inner_A["default"])
    torch.testing.assert_close(up @ down, M)
    expected = base(x) + 3.0 / INNER_R * x @ (layer.nora_B["default"] @ M @ layer.nora_A["default"]).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * R * INNER_R + 4 * R
    (layer(x) * torch.randn(30)).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.all(), name


def test_what_a_mixture_cannot_do_is_refused_with_what_to_do_instead():
    model, inputs, targets = MODELS["linear"]()
    model = get_peft_model(model, config_for(targets, **fields_of("serial", num_subspaces=2)), "a").eval()
    model.add_adapter("b", config_for(targets, **fields_of("serial")))
    before = output(model, inputs)
    layer = next(iter(nora_layers(model).values()))
    message = r"'a' is a mixture of subspaces, .*cannot be merged, added .*num_subspaces=1"
    for refused in (
        model.merge_adapter,
        lambda: layer.get_delta_weight("a"),
        lambda: layer.low_rank_factors("a"),
        lambda: model.add_weighted_adapter(["b", "a"], [1.0, 1.0], "sum"),
        lambda: model.merge_adapter(adapter_names=["b", "a"]),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not any(layer.merged for layer in nora_layers(model).values())
    assert torch.equal(output(model, inputs), before)
    assert not layer.supports_lora_conversion("a")
    assert layer.supports_lora_conversion("b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inner_form": "nested"}, r"inner_form must be one of \('serial', .*\), got 'nested'"),
        ({"outer_scaling": "C"}, r"outer_scaling must be one of \('B', 'A', 'split', 'mean', 'none'\), got 'C'"),
        ({"inner_form": "block_diagonal"}, r"inner_blocks must be at least 2 and divide r=8, got 1.*inner_form='full'"),
        ({"inner_form": "block_diagonal", "inner_blocks": 3}, "inner_blocks must be at least 2 and divide r=8, got 3"),
        ({"inner_blocks": 2}, "inner_blocks needs inner_form='block_diagonal', got 2 with 'serial'"),
        ({"inner_blocks": 0}, "inner_blocks must be an integer of at least 1, got 0"),
        ({"inner_form": "sparse_low_rank"}, r"sparse_entries must be an integer in \[1, r\^2=64\], got 0"),
        ({"inner_form": "sparse_low_rank", "sparse_entries": 2.5}, r"sparse_entries must be an integer in .*, got 2.5"),
        ({"inner_form": "sparse_low_rank", "sparse_entries": 65}, r"sparse_entries must be an integer in .*, got 65"),
        ({"sparse_entries": 4}, "sparse_entries needs inner_form='sparse_low_rank', got 4"),
        ({"sparse_seed": -1}, r"sparse_seed must be an integer in \[0, 2\^31\), got -1"),
        ({"sparse_seed": "1"}, r"sparse_seed must be an integer in .*, got '1'"),
        ({"inner_form": "antisymmetric", "inner_init": "singular_values"}, "must not be 'singular_values' for .*antisymmetric"),
        ({"inner_form": "antisymmetric", "r": 1, "inner_r": 1}, "r must be at least 2 for inner_form='antisymmetric', got 1"),
        ({"num_subspaces": 3}, "num_subspaces must divide r=8, got 3"),
        ({"num_subspaces": 4, "inner_r": 4}, r"inner_r must be in \[1, r / num_subspaces = 2\], got 4"),
        ({"num_subspaces": 2, "inner_form": "full"}, "num_subspaces=2 needs inner_form='serial', or 'block_diagonal'.*'full'"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NoraConfig(**{"r": 8, "inner_r": 2, **fields})


def test_a_rank_that_does_not_fit_is_refused_with_the_layers_name():
    config = config_for(["first", "second"], inner_form="block_diagonal", inner_blocks=4, rank_pattern={"second": 6})
    with pytest.raises(ValueError, match="inner_blocks must be at least 2 and divide r=6 for 'second', got 4"):
        get_peft_model(MODELS["linear"]()[0], config)
