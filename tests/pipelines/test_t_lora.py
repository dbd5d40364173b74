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
from pipelines.methods.t_lora import RANK as RANK_KEY
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


def terms(layer):
    """(sign, B, S A) of B S A and B_0 S_0 A_0; without Ortho-LoRA of B A alone."""
    A, B = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
    if not hasattr(A, "parametrizations"):
        return [(1, B.weight.detach(), A.weight.detach())]
    rows, columns = A.parametrizations.weight, B.parametrizations.weight
    scaled = torch.einsum("r,r...->r...", rows[0].scales, rows.original).detach()
    return [(1, columns.original.detach(), scaled), (-1, columns[0].start, rows[0].start)]


both_starts = pytest.mark.parametrize("ortho_lora", [True, False])


@both_starts
@torch.no_grad()
def test_the_prediction_at_each_noise_level_is_that_of_lora_cut_to_the_rank_of_that_level(pipe, tmp_path, ortho_lora):
    disturb(adapted(pipe, tmp_path, alpha=3.0, ortho_lora=ortho_lora))
    timesteps = [0, 1, 400, 999]
    assert ranks(timesteps) == [6, 5, 4, 2]
    together = predict(pipe.unet, timesteps)
    for index, (timestep, rank) in enumerate(zip(timesteps, ranks(timesteps), strict=True)):
        plain = tiny_pipeline()
        both = 2 * RANK if ortho_lora else RANK
        adapters.attach(plain, AdapterOptions("lora", rank=both, alpha=3.0 / RANK * both, target_modules=TARGETS))
        for ours, theirs in zip(tuner_layers(pipe.unet).values(), tuner_layers(plain.unet).values(), strict=True):
            theirs.lora_A[ADAPTER_NAME].weight.copy_(torch.cat([A for _, _, A in terms(ours)]))
            B = theirs.lora_B[ADAPTER_NAME].weight
            B.copy_(torch.cat([sign * B for sign, B, _ in terms(ours)], dim=1))
            B[:, rank:RANK], B[:, RANK + rank :] = 0, 0
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
        rows = layer.lora_A[ADAPTER_NAME].parametrizations.weight
        for gradient in (rows.original.grad.flatten(1), rows[0].scales.grad[:, None]):
            assert gradient[:MIN].any(dim=1).all()
            assert not gradient[MIN:].any()


def test_without_ortho_lora_the_rows_of_a_start_orthonormal_and_b_at_zero(pipe, tmp_path):
    for layer in tuner_layers(adapted(pipe, tmp_path, ortho_lora=False)["unet"]).values():
        A = layer.lora_A[ADAPTER_NAME].weight.flatten(1)
        torch.testing.assert_close(A @ A.T, torch.eye(RANK), atol=1e-5, rtol=0)
        assert not layer.lora_B[ADAPTER_NAME].weight.any()


@torch.no_grad()
def test_ortho_lora_starts_with_the_last_singular_triples_of_a_random_matrix_and_subtracts_them(pipe, tmp_path):
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    base = predict(pipe.unet, [999, 400, 0])
    layers = tuner_layers(adapted(pipe, tmp_path)["unet"])
    assert torch.equal(predict(pipe.unet, [999, 400, 0]), base)
    for name, layer in layers.items():
        assert torch.equal(layer.get_base_layer().weight, before[f"{name}.weight"])
        assert not layer.get_delta_weight(ADAPTER_NAME).any()
        rows, columns = (part[ADAPTER_NAME].parametrizations.weight for part in (layer.lora_A, layer.lora_B))
        A, B, scales = rows.original.flatten(1), columns.original.flatten(1), rows[0].scales
        for product in (A @ A.T, B.T @ B):
            torch.testing.assert_close(product, torch.eye(RANK), atol=1e-5, rtol=0)
        assert torch.equal(columns[0].start, columns.original)
        torch.testing.assert_close(rows[0].start.flatten(1), scales.diag() @ A)
        assert (scales.diff() <= 0).all()
    # The smallest singular values of matrices with entries N(0, 1 / r^2): their mean over shapes and 20 samples of each.
    expected = [
        torch.linalg.svdvals(torch.randn(20, len(B), A.shape[1], generator=torch.Generator().manual_seed(0)) / RANK)[:, -RANK:]
        for A, B in ((rows.flatten(1), columns) for _, columns, rows in (terms(layer)[0] for layer in layers.values()))
    ]
    scales = torch.stack([layer.lora_A[ADAPTER_NAME].parametrizations.weight[0].scales for layer in layers.values()])
    assert scales.mean() == pytest.approx(float(torch.stack(expected).mean()), rel=0.1)


def test_rows_that_a_small_weight_cannot_have_start_as_in_lora(tmp_path):
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(32, 4), "wide": torch.nn.Linear(32, RANK)})
    method = AdapterOptions("t_lora", rank=RANK).create()
    method.add(model, ["layer", "wide"], torch.Generator().manual_seed(0))
    method.start(model, Probe(lambda: None, no_losses, torch.Generator().manual_seed(1), tmp_path), ADAPTER_NAME)
    x, layer = torch.randn(3, 32), model["layer"]
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    (_, B, A), _ = terms(layer)
    torch.testing.assert_close(B[:, :4] @ B[:, :4].T, torch.eye(4), atol=1e-5, rtol=0)
    assert not B[:, 4:].any()
    assert A[4:].any(dim=1).all()


@torch.no_grad()
def test_a_scale_multiplies_the_change_and_merging_is_undone(pipe, tmp_path):
    disturb(adapted(pipe, tmp_path))
    layer = next(iter(tuner_layers(pipe.unet).values()))
    change, weight = layer.get_delta_weight(ADAPTER_NAME), layer.get_base_layer().weight.clone()
    for scale in (0.0, -1.5):
        layer.set_scale(ADAPTER_NAME, scale)
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer().weight, weight + scale * change)
        layer.unmerge()
        torch.testing.assert_close(layer.get_base_layer().weight, weight)


def test_a_convolution_with_groups_is_refused_by_ortho_lora():
    model = torch.nn.ModuleDict({"layer": torch.nn.Conv2d(8, 8, 3, groups=2)})
    with pytest.raises(InputError, match="'layer' must be a convolution without groups, got 2"):
        AdapterOptions("t_lora", rank=2).create().add(model, ["layer"], torch.Generator())


@both_starts
def test_a_loaded_adapter_follows_the_noise_level_too_and_a_second_one_has_its_own_ranks(pipe, tmp_path, ortho_lora):
    components = adapted(pipe, tmp_path, ortho_lora=ortho_lora)
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


def test_a_plain_lora_under_the_name_of_a_deleted_adapter_does_not_follow_the_noise_level(pipe, tmp_path):
    components = adapted(pipe, tmp_path, ortho_lora=False)
    disturb(components)
    adapter_files.save(components, tmp_path / "ranks")
    config, tensors, _ = read_native(tmp_path / "ranks" / "full" / "unet")
    write_native(tmp_path / "plain" / "unet", config, tensors, {METHOD_KEY: "lora"})
    fresh = tiny_pipeline()
    adapters.load_adapter(fresh, tmp_path / "ranks" / "full", "loaded")
    fresh.delete_adapters("loaded")
    adapters.load_adapter(fresh, tmp_path / "plain", "loaded")
    for layer in tuner_layers(fresh.unet).values():
        A, B = (part["loaded"].weight for part in (layer.lora_A, layer.lora_B))
        torch.testing.assert_close(layer.get_delta_weight("loaded").flatten(1), B.flatten(1) @ A.flatten(1))
        assert low_rank_factors(layer, "loaded").relative_error == 0


def rewrite(folder, min_rank, rank=RANK):
    config, tensors, _ = read_native(folder)
    write_native(folder, config, tensors, {METHOD_KEY: "t_lora", MIN_RANK: min_rank, RANK_KEY: str(rank)})


@pytest.mark.parametrize("min_rank", ["0", "7", "-1", "half"])
def test_a_file_with_a_wrong_minimum_is_refused(pipe, tmp_path, min_rank):
    adapter_files.save(adapted(pipe, tmp_path), tmp_path)
    rewrite(tmp_path / "full" / "unet", min_rank)
    with pytest.raises(InputError, match=rf"full/unet: {MIN_RANK} must be in \[1, r=6\], got '{min_rank}'"):
        adapters.load_adapter(tiny_pipeline(), tmp_path / "full", "loaded")


@pytest.mark.parametrize("rank", ["5", "0", "24", "six"])
def test_a_file_with_a_rank_that_its_tensors_do_not_have_is_refused(pipe, tmp_path, rank):
    adapter_files.save(adapted(pipe, tmp_path), tmp_path)
    rewrite(tmp_path / "full" / "unet", "2", rank)
    with pytest.raises(InputError, match=rf"full/unet: {RANK_KEY} must be one of 12, 6, got '{rank}'"):
        adapters.load_adapter(tiny_pipeline(), tmp_path / "full", "loaded")


def test_a_file_without_its_rank_is_one_of_plain_rows(pipe, tmp_path):
    components = adapted(pipe, tmp_path, ortho_lora=False)
    disturb(components)
    adapter_files.save(components, tmp_path)
    config, tensors, _ = read_native(tmp_path / "full" / "unet")
    write_native(tmp_path / "full" / "unet", config, tensors, {METHOD_KEY: "t_lora", MIN_RANK: str(MIN)})
    fresh = tiny_pipeline()
    adapters.load_adapter(fresh, tmp_path / "full", "loaded")
    torch.testing.assert_close(predict(fresh.unet, [20, 980]), predict(pipe.unet, [20, 980]))


@both_starts
def test_the_exported_change_is_the_average_over_all_levels_with_its_error(pipe, tmp_path, ortho_lora):
    disturb(adapted(pipe, tmp_path, alpha=3.0, ortho_lora=ortho_lora))
    for layer in tuner_layers(pipe.unet).values():
        products = [(sign * B.flatten(1).double(), A.flatten(1).double()) for sign, B, A in terms(layer)]
        # There are only a few different ranks, so that the average over 1000 levels is one over them.
        counts = {rank: sum(other == rank for other in ranks(range(1000))) for rank in range(MIN, RANK + 1)}
        changes = {rank: 3.0 / RANK * sum(B[:, :rank] @ A[:rank] for B, A in products) for rank in counts}
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
