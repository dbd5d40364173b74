"""The denoising loss, its targets and weights, against the algebra of diffusion."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from pipelines.errors import InputError
from pipelines.randomness import keyed_generator
from pipelines.subject.base_model import encode_prompts, tokenize
from pipelines.subject.batches import EncodedPictures, stratified_timesteps
from pipelines.subject.evaluation import mean_denoising_loss
from pipelines.subject.loss import DenoisingLoss

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
    """Have the loss's UNet predict `answer`."""
    loss.predict = lambda *_: answer
    return loss


def test_the_noise_is_what_an_epsilon_model_predicts(pipe, batch):
    assert predicting(DenoisingLoss(pipe), batch["noise"])(**batch) == 0


def test_the_velocity_is_what_a_v_model_predicts(pipe, batch):
    pipe.scheduler = DDPMScheduler(prediction_type="v_prediction")
    loss = DenoisingLoss(pipe)
    alpha = loss.scheduler.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    velocity = alpha.sqrt() * batch["noise"] - (1 - alpha).sqrt() * batch["latents"]
    torch.testing.assert_close(predicting(loss, velocity)(**batch), torch.tensor(0.0))


def test_another_prediction_type_is_refused(pipe):
    pipe.scheduler = DDPMScheduler(prediction_type="sample")
    with pytest.raises(InputError, match=r"prediction_type must be one of .*epsilon.*got 'sample'"):
        DenoisingLoss(pipe)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_each_picture_by_its_signal_to_noise_ratio(pipe, batch, prediction_type):
    pipe.scheduler = DDPMScheduler(prediction_type=prediction_type)
    gamma = 5.0
    loss = DenoisingLoss(pipe, snr_gamma=gamma)
    alpha = loss.scheduler.alphas_cumprod[TIMESTEPS]
    snr = alpha / (1 - alpha)
    weights = torch.minimum(snr, torch.tensor(gamma)) / (snr if prediction_type == "epsilon" else snr + 1)
    prompts = encode_prompts(pipe, ["a star"] * 3)
    each = loss.per_picture(*(batch[name] for name in ("latents", "noise", "timesteps", "time_ids")), prompts)
    torch.testing.assert_close(loss(**batch), (weights * each).mean())


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_each_pictures_loss_is_multiplied_by_its_weight(pipe, batch, snr_gamma):
    loss, weights = DenoisingLoss(pipe, snr_gamma), torch.tensor([0.5, 2.0, 0.0])
    alone = [loss(**{name: value[place : place + 1] for name, value in batch.items()}) for place in range(3)]
    torch.testing.assert_close(loss(**batch, weights=weights), (weights * torch.stack(alone)).mean())


def test_no_signal_at_all_leaves_the_weighted_loss_finite(pipe, batch):
    pipe.scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    batch["timesteps"] = torch.full((3,), 999)
    assert torch.isfinite(DenoisingLoss(pipe, snr_gamma=5.0)(**batch))


def test_tokens_encoded_in_the_loss_give_the_same_as_prompts_encoded_before(pipe, batch):
    tokens = tokenize((pipe.tokenizer, pipe.tokenizer_2), ["a star"] * 3).transpose(0, 1)
    unencoded = {name: value for name, value in batch.items() if name not in ("hidden", "pooled")}
    loss = DenoisingLoss(pipe)
    torch.testing.assert_close(loss(**unencoded, tokens=tokens), loss(**batch))


def test_the_unet_is_told_what_the_stock_pipeline_tells_it(pipe, batch):
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
    return EncodedPictures(latents, time_ids, tokens, encode_prompts(pipe, ["a star"] * count))


def test_the_mean_loss_is_the_same_every_time_and_in_batches_of_any_size(pipe):
    loss, pictures = DenoisingLoss(pipe), encoded(pipe)
    first = mean_denoising_loss(loss, pictures, draws=6, batch_size=6)
    assert first == mean_denoising_loss(loss, pictures, draws=6, batch_size=6)
    assert first == pytest.approx(mean_denoising_loss(loss, pictures, draws=6, batch_size=4), rel=1e-5)
    assert first != mean_denoising_loss(loss, pictures, draws=6, seed=1)


def test_the_mean_loss_leaves_the_mode_of_the_model_as_it_was(pipe):
    loss = DenoisingLoss(pipe).train()
    mean_denoising_loss(loss, encoded(pipe), draws=2)
    assert loss.training


class Zero(nn.Module):
    """Predicts nothing."""

    dtype = torch.float32

    def forward(self, noisy, timesteps, hidden, added_cond_kwargs):
        return type("Output", (), {"sample": torch.zeros_like(noisy)})


def test_a_model_that_predicts_nothing_loses_the_variance_of_the_noise(pipe):
    loss = DenoisingLoss(pipe)
    loss.unet = Zero()
    assert mean_denoising_loss(loss, encoded(pipe), draws=64) == pytest.approx(1.0, abs=0.05)


def test_stratified_timesteps_take_one_from_each_part_and_every_level_is_possible():
    drawn = torch.stack([stratified_timesteps(4, 20, keyed_generator(0, k)) for k in range(200)])
    assert torch.equal((drawn // 5).sort(dim=1).values, torch.arange(4).expand(200, 4))
    assert drawn.unique().tolist() == list(range(20))
