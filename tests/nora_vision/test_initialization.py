import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from small_models import MODELS, change_weights, config_for, mlp, output
from torch import nn

from nora_vision import calibrate, initialize_nora_weights
from nora_vision.layer import nora_layers


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def started(kind, **fields):
    """A model whose adapter was initialised from statistics, its inputs and the statistics."""
    model, inputs, targets = MODELS[kind]()
    model = inject_adapter_in_model(config_for(targets, init_weights=True, outer_init="awsvd", **fields), model)
    stats = calibrate(model, lambda: model(*inputs))
    initialize_nora_weights(model, stats)
    return model, inputs, stats


def test_outer_factors_attain_the_optimal_error_weighted_by_the_activations(kind):
    model, _, stats = started(kind)
    for name, layer in nora_layers(model).items():
        scale = stats[name].clamp_min(1e-3 * stats[name].mean())
        weight = layer.finite_weight_matrix(name)
        error = ((weight - layer.nora_B["default"] @ layer.nora_A["default"]) * scale).norm()
        torch.testing.assert_close(error, torch.linalg.svdvals(weight * scale)[8:].norm(), rtol=1e-3, atol=1e-4)


def test_the_start_is_the_base_model(kind):
    model, inputs, _ = started(kind)
    base, _, _ = MODELS[kind]()
    assert torch.equal(output(model, inputs), output(base, inputs))


def test_a_model_scaled_by_c_gets_the_same_product_of_outer_factors():
    model, (x,), targets = mlp()
    inject_adapter_in_model(config_for(targets), model)
    products = []
    for c in (1.0, 1000.0):
        initialize_nora_weights(model, calibrate(model, lambda c=c: model(c * x), targets))
        products.append(model.first.nora_B["default"] @ model.first.nora_A["default"])
    torch.testing.assert_close(products[0], products[1])


def test_outer_factors_stay_in_the_range_of_half_precision_however_many_tokens_were_seen():
    model, (x,), targets = mlp()
    x[:, 3] = 0.0
    model.to(torch.float16)
    inject_adapter_in_model(config_for(targets), model)
    initialize_nora_weights(model, calibrate(model, lambda: model(x.half().repeat(5000, 1) * 5)))
    for layer in nora_layers(model).values():
        assert layer.nora_A["default"].isfinite().all()
        assert layer.nora_B["default"].isfinite().all()
        assert layer.nora_A["default"].abs().amax(dim=1).min() > 1e-2


def test_statistics_fit_every_rank(kind):
    model, inputs, targets = MODELS[kind]()
    stats = calibrate(model, lambda: model(*inputs))
    for r in (4, 8):
        model, _, _ = MODELS[kind]()
        inject_adapter_in_model(config_for(targets, r=r, inner_r=2), model)
        initialize_nora_weights(model, stats)
        assert {layer.nora_A["default"].shape[0] for layer in nora_layers(model).values()} == {r}


def test_a_lower_rank_keeps_the_leading_triples_of_a_higher_one():
    model, (x,), targets = mlp()
    stats = calibrate(model, lambda: model(x))
    factors = {}
    for r in (4, 8):
        model, _, _ = mlp()
        inject_adapter_in_model(config_for(targets, r=r, inner_r=2), model)
        initialize_nora_weights(model, stats)
        factors[r] = model.first.nora_A["default"]
    torch.testing.assert_close(factors[8][:4], factors[4])


def test_without_statistics_the_plain_svd_is_used_with_a_warning(kind):
    model, _, targets = MODELS[kind]()
    inject_adapter_in_model(config_for(targets), model)
    with pytest.warns(UserWarning, match="No activation statistics: NoRA adapter 'default' starts from the plain SVD"):
        initialize_nora_weights(model)
    for name, layer in nora_layers(model).items():
        error = (layer.finite_weight_matrix(name) - layer.nora_B["default"] @ layer.nora_A["default"]).norm()
        bound = torch.linalg.svdvals(layer.finite_weight_matrix(name))[8:].norm()
        torch.testing.assert_close(error, bound, rtol=1e-3, atol=1e-4)


def test_a_layer_that_saw_only_zeros_gets_the_plain_svd():
    model, (x,), targets = mlp()
    inject_adapter_in_model(config_for(targets), model)
    initialize_nora_weights(model, calibrate(model, lambda: model(torch.zeros_like(x))))
    weight = model.first.base_layer.weight
    error = (weight - model.first.nora_B["default"] @ model.first.nora_A["default"]).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight)[8:].norm(), rtol=1e-3, atol=1e-4)


def test_initializing_resets_a_trained_adapter():
    model, inputs, stats = started("linear", preserve_output=True, inner_init="gaussian")
    change_weights(model)
    assert not torch.allclose(output(model, inputs), output(mlp()[0], inputs))
    initialize_nora_weights(model, stats)
    assert torch.equal(output(model, inputs), output(mlp()[0], inputs))


def test_the_same_generator_gives_the_same_bytes_and_another_one_other_inner_factors():
    model, _, stats = started("linear", inner_init="gaussian")

    def states(seed):
        initialize_nora_weights(model, stats, generator=torch.Generator().manual_seed(seed))
        return {name: tensor.clone() for name, tensor in model.state_dict().items() if "nora_" in name}

    first, same, other = states(0), states(0), states(1)
    for name, tensor in first.items():
        assert torch.equal(same[name], tensor)
        assert torch.equal(other[name], tensor) == ("inner" not in name)


def test_inner_factors_have_the_configured_standard_deviation():
    model = nn.Sequential(nn.Linear(300, 300))
    inject_adapter_in_model(
        config_for(["0"], r=256, inner_r=128, init_weights=True, inner_init="gaussian", inner_std=0.05), model
    )
    assert model[0].nora_inner_A["default"].std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert model[0].nora_inner_B["default"].std().item() == pytest.approx(0.05, rel=0.05)


def test_the_configuration_records_where_the_outer_factors_came_from():
    model, _, stats = started("linear")
    assert model.peft_config["default"].outer_init == "awsvd"
    with pytest.warns(UserWarning, match="plain SVD"):
        initialize_nora_weights(model)
    assert model.peft_config["default"].outer_init == "svd"
    initialize_nora_weights(model, stats)
    assert model.peft_config["default"].outer_init == "awsvd"


def test_one_adapter_of_several_is_initialized_and_progress_is_reported():
    model, (x,), targets = mlp()
    model = get_peft_model(model, config_for(targets), "first")
    model.add_adapter("second", config_for(targets))
    stats = calibrate(model, lambda: model(x))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = []
    initialize_nora_weights(model, stats, "second", progress=lambda done, total: told.append((done, total)))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.endswith(".second") for name in changed)
    assert told == [(1, 2), (2, 2)]


def test_unknown_and_merged_adapters_are_refused():
    model, (x,), targets = mlp()
    model = get_peft_model(model, config_for(targets))
    stats = calibrate(model, lambda: model(x))
    with pytest.raises(ValueError, match="The model has no NoRA adapter 'other'"):
        initialize_nora_weights(model, stats, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot initialize 'first' while \['default'\] are merged into it"):
        initialize_nora_weights(model, stats)
