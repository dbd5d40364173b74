import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from small_models import MODELS, Mlp, config_for, conv_net, mlp, output
from tiny_pipeline import tiny_unet
from torch import nn

from nora_vision import ActivationStatistics, calibrate, initialize_nora_weights
from nora_vision.files import AdapterFileError, write_tensors
from nora_vision.layer import nora_layers


def test_the_statistics_of_a_linear_layer_are_the_norms_of_its_input_columns():
    model, (x,), _ = mlp()
    hidden = model.first(x).relu()
    stats = calibrate(model, lambda: model(x))
    assert set(stats) == {"first", "second", "head"}
    torch.testing.assert_close(stats["first"], torch.linalg.vector_norm(x, dim=0))
    torch.testing.assert_close(stats["second"], torch.linalg.vector_norm(hidden, dim=0).detach())
    assert all(scale.dtype == torch.float32 for scale in stats.values())


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular", "replicate"])
def test_the_statistics_of_a_convolution_are_those_of_its_unfolded_input(padding_mode):
    layer = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), padding_mode=padding_mode)
    x = torch.randn(4, 3, 9, 8)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    patches = nn.functional.unfold(nn.functional.pad(x, (2, 2, 1, 1), mode), (3, 2), dilation=(1, 2), stride=(2, 1))
    model = nn.Sequential(layer)
    torch.testing.assert_close(calibrate(model, lambda: model(x))["0"], patches.square().sum(dim=(0, 2)).sqrt())


def test_every_token_of_every_batch_has_the_same_weight():
    model, _, _ = mlp()
    x = torch.randn(12, 20)
    at_once = calibrate(model, lambda: model(x))
    in_parts = calibrate(model, lambda: [model(x[:1]), model(x[1:8].reshape(7, 1, 20)), model(x[8:].reshape(2, 2, 20))])
    for name in at_once:
        torch.testing.assert_close(in_parts[name], at_once[name])


def test_statistics_are_accurate_for_half_precision():
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.float16)
    x = torch.full((3000, 4), 100.0, dtype=torch.float16)
    torch.testing.assert_close(calibrate(model, lambda: model(x))["0"], torch.full((4,), 100.0 * 3000**0.5))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("wrap", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_statistics_are_the_same_before_and_after_adapters_are_added(kind, wrap):
    model, inputs, targets = MODELS[kind]()
    before = calibrate(model, lambda: model(*inputs), target_modules=targets)
    model = wrap(model, config_for(targets))
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted = output(model, inputs)
    after = calibrate(model, lambda: model(*inputs))
    assert set(before) == set(after)
    for name in before:
        assert torch.equal(before[name], after[name])
    assert before.fingerprints == after.fingerprints
    assert torch.equal(output(model, inputs), adapted)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_removed_and_adapters_enabled_again_even_if_the_run_fails():
    model, (x,), targets = mlp()
    inject_adapter_in_model(config_for(targets), model)
    adapted = output(model, (x,))

    def fail():
        model(x)
        assert hooks(model) == 2
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(model, fail)
    assert hooks(model) == 0
    assert torch.equal(output(model, (x,)), adapted)


def test_calibration_builds_no_graph():
    model, (x,), _ = mlp()
    calibrate(model, lambda: [model(x), pytest.fail("a graph was built") if torch.is_grad_enabled() else None])


def test_a_unet_is_calibrated_at_its_attention_projections_by_name():
    unet = tiny_unet()
    conditions = {"text_embeds": torch.randn(2, 24), "time_ids": torch.randn(2, 6)}
    context = torch.randn(2, 7, 40)
    stats = calibrate(
        unet,
        lambda: unet(torch.randn(2, 4, 8, 8), 3, context, added_cond_kwargs=conditions),
        target_modules=["attn2.to_k", "attn2.to_v"],
    )
    assert stats
    for name, scale in stats.items():
        assert name.endswith(("attn2.to_k", "attn2.to_v"))
        torch.testing.assert_close(scale, torch.linalg.vector_norm(context, dim=(0, 1)))


def test_saved_statistics_are_loaded_as_they_were(tmp_path):
    model, inputs, _ = conv_net()
    stats = calibrate(model, lambda: model(*inputs))
    stats.save(tmp_path / "stats.safetensors")
    loaded = ActivationStatistics.load(tmp_path / "stats.safetensors")
    assert list(loaded) == sorted(stats)
    assert all(torch.equal(loaded[name], stats[name]) for name in stats)
    assert loaded.fingerprints == stats.fingerprints


def test_the_same_statistics_are_saved_as_the_same_bytes(tmp_path):
    model, inputs, _ = mlp()
    for name in ("1", "2"):
        calibrate(model, lambda: model(*inputs)).save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"first": torch.ones(20)}, {}, "stats.safetensors does not contain activation statistics"),
        ({"first": torch.ones(20)}, {"nora_activation_statistics": "[]"}, "does not contain activation statistics"),
        ({"first": torch.ones(20)}, {"nora_activation_statistics": "{"}, "does not contain activation statistics"),
        ({"first": torch.ones(20)}, {"nora_activation_statistics": '{"second": "0"}'}, "does not contain activation statistics"),
        ({"first": -torch.ones(20)}, {"nora_activation_statistics": '{"first": "0"}'}, "'first' must be one vector"),
        ({"first": torch.ones(2, 2)}, {"nora_activation_statistics": '{"first": "0"}'}, "'first' must be one vector"),
    ],
)
def test_files_with_other_content_are_refused(tmp_path, tensors, metadata, message):
    write_tensors(tmp_path / "stats.safetensors", tensors, metadata)
    with pytest.raises(AdapterFileError, match=message):
        ActivationStatistics.load(tmp_path / "stats.safetensors")


def test_statistics_of_another_model_are_refused_by_the_layers_name():
    model, (x,), targets = mlp()
    stats = calibrate(model, lambda: model(x))
    other = Mlp()
    other.load_state_dict(model.state_dict())
    other.second.weight.data[3, 4] += 1e-3
    inject_adapter_in_model(config_for(targets), other)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="belong to another model: the weight of 'second' differs"):
        initialize_nora_weights(other, stats)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_statistics_without_a_layer_are_refused_by_its_name():
    model, (x,), targets = mlp()
    stats = calibrate(model, lambda: model(x), target_modules=["first"])
    inject_adapter_in_model(config_for(targets), model)
    with pytest.raises(ValueError, match="no activation statistics of 'second'"):
        initialize_nora_weights(model, stats)


def test_a_run_that_reaches_no_layer_is_refused():
    model, _, _ = mlp()
    with pytest.raises(ValueError, match="run_model called none of the 3 layers"):
        calibrate(model, lambda: None)


def test_targets_that_match_nothing_are_refused():
    model, (x,), _ = mlp()
    with pytest.raises(ValueError, match=r"No layer to calibrate: target_modules \['third'\] match none of Mlp"):
        calibrate(model, lambda: model(x), target_modules=["third"])


def test_inputs_that_are_not_finite_are_refused_by_the_layers_name():
    model, (x,), _ = mlp()
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="The inputs of 'first' must be finite"):
        calibrate(model, lambda: model(x))


def test_a_merged_adapter_is_refused():
    model, (x,), targets = mlp()
    model = get_peft_model(model, config_for(targets))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot calibrate while \['default'\] are merged into 'first'"):
        calibrate(model, lambda: model(x))
    assert all(layer.merged for layer in nora_layers(model).values())


def rank_statistics(rank, x, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    model, _, _ = mlp()
    # The second rank never reaches the last two layers.
    calibrated = calibrate(model, lambda: model(x[:3]) if rank == 0 else model.first(x[3:]))
    calibrated.save(f"{path}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_all_ranks_get_the_statistics_of_all_inputs(tmp_path):
    model, (x,), _ = mlp()
    # Forked, since a spawned process would import everything again.
    torch.multiprocessing.start_processes(rank_statistics, (x, str(tmp_path)), nprocs=2, start_method="fork")
    expected = calibrate(model, lambda: [model(x[:3]), model.first(x[3:])])
    for rank in (0, 1):
        reduced = ActivationStatistics.load(tmp_path / f"{rank}.safetensors")
        assert set(reduced) == set(expected)
        for name in expected:
            torch.testing.assert_close(reduced[name], expected[name])
