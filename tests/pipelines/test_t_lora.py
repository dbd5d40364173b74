"""T-LoRA: the rank by noise level in training and in generation, its files, and the average that is exported."""

import pytest
import torch
from tiny_pipeline import image, tiny_pipeline

from nora_vision.factors import low_rank_factors
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, no_losses, trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.methods.t_lora import MIN_RANK, RankSchedule
from pipelines.native_files import METHOD_KEY, read_native, write_native
from pipelines.subject import adapters

RANK, MIN = 6, 2
TARGETS = ["to_q", "to_v", "conv1", "time_emb_proj"]


def ranks(timesteps):
    """floor((r - r_min) (T - t) / T) + r_min, in whole numbers."""
    return [(RANK - MIN) * (1000 - t) // 1000 + MIN for t in timesteps]


def adapted(pipe, folder, **changes):
    options = AdapterOptions("t_lora", rank=RANK, **{"min_rank": MIN, "target_modules": TARGETS, **changes})
    components = adapters.attach(pipe, options)
    for model in components.values():
        options.create().start(model, Probe(lambda: None, no_losses, torch.Generator().manual_seed(1), folder), ADAPTER_NAME)
    return components


def disturb(components):
    with torch.no_grad():
        for index, parameter in enumerate(trained_parameters(components)):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))


def predict(unet, timesteps):
    generator = torch.Generator().manual_seed(0)
    latents, prompts = (torch.randn(len(timesteps), *shape, generator=generator) for shape in ((4, 8, 8), (5, 40)))
    conditions = {"text_embeds": torch.ones(len(timesteps), 24), "time_ids": torch.ones(len(timesteps), 6)}
    return unet(latents, torch.tensor(timesteps), prompts, added_cond_kwargs=conditions).sample


@torch.no_grad()
def test_the_prediction_at_each_noise_level_is_that_of_lora_cut_to_the_rank_of_that_level(pipe, tmp_path):
    disturb(adapted(pipe, tmp_path, alpha=3.0))
    timesteps = [0, 1, 400, 999]
    assert ranks(timesteps) == [6, 5, 4, 2]
    together = predict(pipe.unet, timesteps)
    for index, (timestep, rank) in enumerate(zip(timesteps, ranks(timesteps), strict=True)):
        plain = tiny_pipeline()
        adapters.attach(plain, AdapterOptions("lora", rank=RANK, alpha=3.0, target_modules=TARGETS))
        for ours, theirs in zip(tuner_layers(pipe.unet).values(), tuner_layers(plain.unet).values(), strict=True):
            theirs.lora_A[ADAPTER_NAME].weight.copy_(ours.lora_A[ADAPTER_NAME].weight)
            theirs.lora_B[ADAPTER_NAME].weight.copy_(ours.lora_B[ADAPTER_NAME].weight)
            theirs.lora_B[ADAPTER_NAME].weight[:, rank:] = 0
        torch.testing.assert_close(together[index], predict(plain.unet, timesteps)[index], atol=1e-5, rtol=1e-4)
        # One number for the whole batch, as pipelines give it.
        alone = pipe.unet(
            torch.ones(2, 4, 8, 8),
            timestep,
            torch.ones(2, 5, 40),
            added_cond_kwargs={"text_embeds": torch.ones(2, 24), "time_ids": torch.ones(2, 6)},
        ).sample
        assert torch.allclose(alone[0], alone[1], atol=1e-6)


def test_rows_beyond_the_rank_of_a_level_get_no_gradient(pipe, tmp_path):
    disturb(adapted(pipe, tmp_path))
    predict(pipe.unet, [999, 999]).square().mean().backward()
    for layer in tuner_layers(pipe.unet).values():
        gradient = layer.lora_A[ADAPTER_NAME].weight.grad.flatten(1)
        assert gradient[:MIN].any(dim=1).all()
        assert not gradient[MIN:].any()


def test_the_rows_of_a_start_orthonormal_and_the_change_starts_at_zero(pipe, tmp_path):
    for layer in tuner_layers(adapted(pipe, tmp_path)["unet"]).values():
        A = layer.lora_A[ADAPTER_NAME].weight.flatten(1)
        torch.testing.assert_close(A @ A.T, torch.eye(RANK), atol=1e-5, rtol=0)
        assert not layer.lora_B[ADAPTER_NAME].weight.any()


def test_a_loaded_adapter_follows_the_noise_level_too_and_a_second_one_has_its_own_ranks(pipe, tmp_path):
    components = adapted(pipe, tmp_path)
    disturb(components)
    adapter_files.save(components, tmp_path)
    assert read_native(tmp_path / "full" / "unet").metadata[MIN_RANK] == str(MIN)
    fresh = tiny_pipeline()
    adapters.load_adapter(fresh, tmp_path / "full", "loaded")
    torch.testing.assert_close(predict(fresh.unet, [20, 980]), predict(pipe.unet, [20, 980]))
    torch.testing.assert_close(image(fresh), image(pipe), atol=1 / 255, rtol=0)
    rewrite(tmp_path / "full" / "unet", str(RANK))
    adapters.load_adapter(fresh, tmp_path / "full", "at full rank")
    fresh.set_adapters("at full rank")
    assert not torch.allclose(predict(fresh.unet, [980]), predict(pipe.unet, [980]), atol=1e-3)
    torch.testing.assert_close(predict(fresh.unet, [0]), predict(pipe.unet, [0]))


def rewrite(folder, min_rank):
    config, tensors, _ = read_native(folder)
    write_native(folder, config, tensors, {METHOD_KEY: "t_lora", MIN_RANK: min_rank})


@pytest.mark.parametrize("min_rank", ["0", "7", "-1", "half"])
def test_a_file_with_a_wrong_minimum_is_refused(pipe, tmp_path, min_rank):
    adapter_files.save(adapted(pipe, tmp_path), tmp_path)
    rewrite(tmp_path / "full" / "unet", min_rank)
    with pytest.raises(InputError, match=rf"full/unet: {MIN_RANK} must be in \[1, r=6\], got '{min_rank}'"):
        adapters.load_adapter(tiny_pipeline(), tmp_path / "full", "loaded")


def test_the_exported_change_is_the_average_over_all_levels_with_its_error(pipe, tmp_path):
    disturb(adapted(pipe, tmp_path, alpha=3.0))
    for layer in tuner_layers(pipe.unet).values():
        A, B = (part[ADAPTER_NAME].weight.detach().flatten(1).double() for part in (layer.lora_A, layer.lora_B))
        # There are only a few different ranks, so that the average over 1000 levels is one over them.
        counts = {rank: sum(other == rank for other in ranks(range(1000))) for rank in range(MIN, RANK + 1)}
        changes = {rank: 3.0 / RANK * B[:, :rank] @ A[:rank] for rank in counts}
        average = sum(count * changes[rank] for rank, count in counts.items()) / 1000
        error = sum(count * (changes[rank] - average).square().sum() for rank, count in counts.items())
        norm = sum(count * changes[rank].square().sum() for rank, count in counts.items())
        factors = low_rank_factors(layer, ADAPTER_NAME)
        torch.testing.assert_close(factors.up.double() @ factors.down.double(), average, atol=1e-5, rtol=1e-4)
        assert factors.relative_error == pytest.approx(float((error / norm).sqrt()), rel=1e-3)
        assert factors.relative_error > 0.05
        change = layer.get_delta_weight(ADAPTER_NAME).detach().flatten(1).double()
        torch.testing.assert_close(change, average, atol=1e-5, rtol=1e-4)


def test_fractional_and_extreme_timesteps_stay_within_the_ranks():
    schedule = RankSchedule(RANK, MIN)
    masks = schedule.masks(torch.tensor([-5.0, 0.0, 0.4, 500.5, 999.9, 1000.0, 5000.0]))
    assert masks.sum(dim=1).tolist() == [6, 6, 5, 3, 2, 2, 2]


def test_text_encoders_and_other_models_have_full_rank(pipe, tmp_path):
    components = adapted(pipe, tmp_path, train_text_encoder=True)
    disturb(components)
    adapter_files.save(components, tmp_path)
    assert MIN_RANK not in read_native(tmp_path / "full" / "text_encoder").metadata
    for layer in tuner_layers(pipe.text_encoder).values():
        factors = low_rank_factors(layer, ADAPTER_NAME)
        assert factors.relative_error == 0
        x = torch.randn(3, layer.in_features)
        expected = layer.get_base_layer()(x) + x @ (factors.up @ factors.down).T
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_a_minimum_above_the_rank_is_refused():
    with pytest.raises(InputError, match=r"min_rank must be in \[1, rank=4\], got 5"):
        AdapterOptions("t_lora", rank=4, min_rank=5)
    with pytest.raises(InputError, match="min_rank must be at least 1, got 0"):
        AdapterOptions("t_lora", min_rank=0)
