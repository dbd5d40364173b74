"""The denoising loss, its targets and weights, against the equations of diffusion."""

import pytest
import torch
from cached_latents import cached_latents
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from torch import nn

from pipelines.errors import InputError
from pipelines.randomness import keyed_generator
from pipelines.subject.base_model import encode_prompts, tokenize
from pipelines.subject.batches import stratified_timesteps
from pipelines.subject.evaluation import mean_denoising_loss
from pipelines.subject.loss import DenoisingLoss, TrainingBatches

TIMESTEPS = torch.tensor([10, 500, 990])


@pytest.fixture
def batch(pipe):
    generator = torch.Generator().manual_seed(0)
    prompts = encode_prompts(pipe, ["a star"] * 3)
    return {
        "latents": torch.randn(3, 4, 8, 8, generator=generator),
        "noise": torch.randn(3, 4, 8, 8, generator=generator),
        "timesteps": TIMESTEPS,
        "time_ids": torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(3, 6),
        "hidden": prompts.hidden,
        "pooled": prompts.pooled,
    }


def predicting(loss, answer):
    """Make the UNet of the loss predict `answer`."""
    loss.predict = lambda *_: answer
    return loss


def test_the_noise_is_what_an_epsilon_model_predicts(pipe, batch):
    assert predicting(DenoisingLoss(pipe), batch["noise"])(**batch) == 0


def test_the_velocity_is_what_a_v_model_predicts(pipe, batch):
    pipe.scheduler = DDPMScheduler(prediction_type="v_prediction")
    loss = DenoisingLoss(pipe)
    alpha = loss.noising.scheduler.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    velocity = alpha.sqrt() * batch["noise"] - (1 - alpha).sqrt() * batch["latents"]
    torch.testing.assert_close(predicting(loss, velocity)(**batch), torch.tensor(0.0))


def test_the_image_is_what_a_sample_model_predicts(pipe, batch):
    pipe.scheduler = DDPMScheduler(prediction_type="sample")
    assert predicting(DenoisingLoss(pipe), batch["latents"])(**batch) == 0


def test_another_prediction_type_is_refused(pipe):
    pipe.scheduler = DDPMScheduler(prediction_type="noise")
    with pytest.raises(InputError, match=r"prediction_type must be one of .*epsilon.*got 'noise'"):
        DenoisingLoss(pipe)


def answers(loss, batch):
    """A random prediction of the UNet for `batch`, which the loss gets too."""
    answer = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(5))
    return predicting(loss, answer), answer


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_edm_style_errors_are_prediction_errors_times_the_squared_derivative_of_the_image(pipe, batch, prediction_type):
    pipe.scheduler = EulerDiscreteScheduler(prediction_type=prediction_type)
    (edm_style, _), (plain, _) = (answers(DenoisingLoss(pipe, edm_style=style), batch) for style in (True, False))
    alpha = plain.noising.scheduler.alphas_cumprod[TIMESTEPS].double()
    # dx_0 / d answer = -sigma, -sqrt(1 - a), 1, and the square is divided by sigma^2 = (1 - a) / a.
    slopes = {"epsilon": torch.ones(3), "v_prediction": alpha, "sample": alpha / (1 - alpha)}[prediction_type]
    arguments = [batch[name] for name in ("latents", "noise", "timesteps", "time_ids")]
    expected = slopes * plain.per_image(*arguments, None)
    torch.testing.assert_close(edm_style.per_image(*arguments, None), expected.float(), rtol=1e-3, atol=0)


def test_edm_style_training_gives_the_unet_the_inputs_that_it_was_trained_on(pipe, batch):
    shown = []
    for edm_style in (False, True):
        loss = DenoisingLoss(pipe, edm_style=edm_style)
        hook = loss.unet.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[:2]))
        loss(**batch)
        hook.remove()
    torch.testing.assert_close(shown[1][0], shown[0][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(shown[1][1], shown[0][1])


def test_a_model_trained_as_edm_gets_the_inputs_of_its_sampler(pipe, batch):
    pipe.scheduler = EDMEulerScheduler(sigma_data=0.5)
    noising = DenoisingLoss(pipe).noising
    assert noising.num_timesteps == 1000
    everything = torch.arange(1000)
    assert noising.sigma(everything).flatten().diff().gt(0).all()
    assert noising.sigma(everything)[-1].item() == pytest.approx(pipe.scheduler.config.sigma_max)
    noisy, levels = noising.inputs(batch["latents"], batch["noise"], TIMESTEPS)
    place = 1000 - 1 - TIMESTEPS
    torch.testing.assert_close(levels, pipe.scheduler.timesteps[place])
    scale = (pipe.scheduler.sigmas[place] ** 2 + 0.25).sqrt().view(-1, 1, 1, 1)
    stock = pipe.scheduler.add_noise(batch["latents"], batch["noise"], pipe.scheduler.timesteps[place])
    torch.testing.assert_close(noisy, stock / scale)


def test_perfect_denoising_by_an_edm_model_has_loss_zero(pipe, batch):
    pipe.scheduler = EDMEulerScheduler(sigma_data=0.5)
    loss = DenoisingLoss(pipe)
    sigma = loss.noising.sigma(TIMESTEPS)
    # x_0 = c_skip x + c_out F with c_skip = d^2 / (s^2 + d^2), c_out = s d / sqrt(s^2 + d^2), solved for F.
    noisy = batch["latents"] + sigma * batch["noise"]
    answer = (batch["latents"] - noisy * 0.25 / (sigma**2 + 0.25)) * (sigma**2 + 0.25).sqrt() / (sigma * 0.5)
    assert predicting(loss, answer)(**batch).item() == pytest.approx(0, abs=1e-9)
    assert predicting(loss, answer + 1)(**batch) > 0.01


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(), EDMEulerScheduler()])
def test_min_snr_is_refused_with_edm(pipe, scheduler):
    pipe.scheduler = scheduler
    with pytest.raises(InputError, match=r"snr_gamma cannot be used with EDM-style training"):
        DenoisingLoss(pipe, snr_gamma=5.0, edm_style=True)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_each_image_by_its_signal_to_noise_ratio(pipe, batch, prediction_type):
    pipe.scheduler = DDPMScheduler(prediction_type=prediction_type)
    gamma = 5.0
    loss = DenoisingLoss(pipe, snr_gamma=gamma)
    alpha = loss.noising.scheduler.alphas_cumprod[TIMESTEPS]
    snr = alpha / (1 - alpha)
    weights = torch.minimum(snr, torch.tensor(gamma)) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    prompts = encode_prompts(pipe, ["a star"] * 3)
    each = loss.per_image(*(batch[name] for name in ("latents", "noise", "timesteps", "time_ids")), prompts)
    torch.testing.assert_close(loss(**batch), (weights * each).mean())


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_each_images_loss_is_multiplied_by_its_weight(pipe, batch, snr_gamma):
    loss, weights = DenoisingLoss(pipe, snr_gamma), torch.tensor([0.5, 2.0, 0.0])
    alone = [loss(**{name: value[place : place + 1] for name, value in batch.items()}) for place in range(3)]
    torch.testing.assert_close(loss(**batch, weights=weights), (weights * torch.stack(alone)).mean())


def test_zero_terminal_snr_leaves_the_weighted_loss_finite(pipe, batch):
    pipe.scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    batch["timesteps"] = torch.full((3,), 999)
    assert torch.isfinite(DenoisingLoss(pipe, snr_gamma=5.0)(**batch))


def test_tokens_encoded_in_the_loss_give_the_same_as_prompt_embeddings(pipe, batch):
    tokens = tokenize((pipe.tokenizer, pipe.tokenizer_2), ["a star"] * 3).transpose(0, 1)
    unencoded = {name: value for name, value in batch.items() if name not in ("hidden", "pooled")}
    loss = DenoisingLoss(pipe)
    torch.testing.assert_close(loss(**unencoded, tokens=tokens), loss(**batch))


def test_fixed_tokens_give_the_same_loss_and_no_gradient_to_the_text_encoders(pipe, batch):
    tokens = tokenize((pipe.tokenizer, pipe.tokenizer_2), ["a star"] * 3).transpose(0, 1)
    unencoded = {name: value for name, value in batch.items() if name not in ("hidden", "pooled")}
    loss = DenoisingLoss(pipe).requires_grad_(True)
    trained, fixed = loss(**unencoded, tokens=tokens), loss(**unencoded, fixed_tokens=tokens)
    assert torch.equal(trained, fixed)
    fixed.backward()
    assert all(parameter.grad is None for parameter in loss.text_encoders.parameters())
    assert all(parameter.grad is not None for parameter in loss.unet.parameters())


def test_a_noise_offset_adds_one_random_value_to_each_channel():
    plain = {"noise": torch.zeros(500, 4, 2, 2), "latents": torch.zeros(500, 4, 2, 2)}
    first, again, other = (TrainingBatches(lambda _: plain, 0, noise_offset=0.1)(index) for index in (3, 3, 4))
    offset = first["noise"][:, :, :1, :1]
    assert torch.equal(first["noise"], offset.expand(-1, -1, 2, 2))
    assert offset.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(first["noise"], again["noise"])
    assert not torch.equal(first["noise"], other["noise"])
    assert not plain["noise"].any()


def test_text_encoders_are_frozen_after_their_last_batch():
    batches = TrainingBatches(lambda index: {"tokens": index}, 0, text_encoder_batches=2)
    assert [set(batches(index)) for index in range(4)] == [{"tokens"}, {"tokens"}, {"fixed_tokens"}, {"fixed_tokens"}]
    assert batches(3)["fixed_tokens"] == 3
    assert set(TrainingBatches(lambda _: {"hidden": 0}, 0, text_encoder_batches=0)(5)) == {"hidden"}


def test_the_unet_gets_the_inputs_of_the_stock_pipeline(pipe, batch):
    heard = {}
    loss = DenoisingLoss(pipe)
    loss.unet.register_forward_pre_hook(lambda module, args, kwargs: heard.update(kwargs, args=args), with_kwargs=True)
    loss(**batch)
    ours = heard["added_cond_kwargs"]
    pipe("a star", num_inference_steps=1, guidance_scale=1.0, height=16, width=16, generator=torch.Generator().manual_seed(0))
    stock = heard["added_cond_kwargs"]
    torch.testing.assert_close(ours["time_ids"][:1], stock["time_ids"])
    torch.testing.assert_close(ours["text_embeds"][:1], stock["text_embeds"])


def encoded(pipe, count=2):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, 1, 2, 4, 8, 8, generator=generator)
    tokens = tokenize((pipe.tokenizer, pipe.tokenizer_2), ["a star"] * count).transpose(0, 1)
    time_ids = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(count, 6)
    return cached_latents(latents, time_ids, tokens, encode_prompts(pipe, ["a star"] * count))


def test_the_mean_loss_is_the_same_every_time_and_in_batches_of_any_size(pipe):
    loss, images = DenoisingLoss(pipe), encoded(pipe)
    first = mean_denoising_loss(loss, images, num_timesteps=6, batch_size=6)
    assert first == mean_denoising_loss(loss, images, num_timesteps=6, batch_size=6)
    assert first == pytest.approx(mean_denoising_loss(loss, images, num_timesteps=6, batch_size=4), rel=1e-5)
    assert first != mean_denoising_loss(loss, images, num_timesteps=6, seed=1)


def test_the_mean_loss_restores_the_training_mode(pipe):
    loss = DenoisingLoss(pipe).train()
    mean_denoising_loss(loss, encoded(pipe), num_timesteps=2)
    assert loss.training


class Zero(nn.Module):
    """Predicts zero."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, noisy, timesteps, hidden, added_cond_kwargs):
        return type("Output", (), {"sample": torch.zeros_like(noisy)})


def test_predicting_zero_has_the_variance_of_the_noise_as_loss(pipe):
    loss = DenoisingLoss(pipe)
    loss.unet = Zero()
    assert mean_denoising_loss(loss, encoded(pipe), num_timesteps=64) == pytest.approx(1.0, abs=0.05)


class RightInTheMiddle(Zero):
    """Predicts the noise of black images, but only in the middle half of their height and width."""

    def __init__(self, scheduler):
        super().__init__()
        self.alphas = scheduler.alphas_cumprod

    def forward(self, noisy, timesteps, hidden, added_cond_kwargs):
        answer = torch.full_like(noisy, 100.0)
        noise = noisy / (1 - self.alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
        answer[..., 2:6, 2:6] = noise[..., 2:6, 2:6]
        return type("Output", (), {"sample": answer})


def test_only_the_middle_of_a_held_out_image_counts(pipe):
    loss, images = DenoisingLoss(pipe), encoded(pipe)
    loss.unet = RightInTheMiddle(loss.noising.scheduler)
    black = cached_latents(torch.zeros(2, 1, 2, 4, 8, 8), torch.zeros(2, 6), images.tokens, images.prompts)
    assert mean_denoising_loss(loss, black, num_timesteps=8) == pytest.approx(0.0, abs=1e-10)
    assert mean_denoising_loss(loss, images, num_timesteps=8) > 1e-3


def test_stratified_timesteps_take_one_from_each_part_and_every_level_is_possible():
    drawn = torch.stack([stratified_timesteps(4, 20, keyed_generator(0, k)) for k in range(200)])
    assert torch.equal((drawn // 5).sort(dim=1).values, torch.arange(4).expand(200, 4))
    assert drawn.unique().tolist() == list(range(20))
