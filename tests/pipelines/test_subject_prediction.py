"""The prediction type: read from a file or given, set on the scheduler, and checked against the UNet's output."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cached_latents import cached_latents
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from single_file import save_single_file
from tiny_pipeline import image, tiny_pipeline
from torch import nn

from pipelines.built_in import BUILT_IN
from pipelines.errors import InputError
from pipelines.subject.base_model import encode_images, encode_prompts, load_base_model, model_resolution
from pipelines.subject.data import load_examples
from pipelines.subject.loss import DenoisingLoss
from pipelines.subject.mismatch import check_prediction_type, target_losses
from pipelines.subject.noising import noising_for
from pipelines.subject.prediction import Prediction, prediction_of, read_prediction
from training.options.data import SAMPLE_SUBJECT

EPSILON, V = "epsilon", "v_prediction"


def with_keys(path, *names, metadata=None, **values):
    """A .safetensors file with these tensors."""
    tensors = {name: torch.tensor([]) for name in names} | {name: torch.tensor(value) for name, value in values.items()}
    save_file({"x": torch.zeros(1)} | tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        ((), None, Prediction()),
        (("v_pred",), None, Prediction(V)),
        (("v_pred", "ztsnr"), None, Prediction(V, True)),
        (("model.v_pred", "model.ztsnr"), None, Prediction(V, True)),
        ((), {"modelspec.prediction_type": "v"}, Prediction(V)),
        ((), {"modelspec.prediction_type": "V-Prediction"}, Prediction(V)),
        ((), {"modelspec.prediction_type": "epsilon"}, Prediction(EPSILON)),
        ((), {"modelspec.prediction_type": " "}, Prediction()),
        (("ztsnr",), {"modelspec.prediction_type": "v_prediction"}, Prediction(V, True)),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, Prediction(V)),
        (("v_pred",), {"modelspec.prediction_type": "flow"}, Prediction(V)),
    ],
)
def test_the_prediction_type_is_read_from_tensor_names_or_the_header(tmp_path, names, metadata, expected):
    assert read_prediction(with_keys(tmp_path / "model.safetensors", *names, metadata=metadata)) == expected


def test_a_header_that_contradicts_the_tensor_names_is_reported(tmp_path, caplog):
    read_prediction(with_keys(tmp_path / "m.safetensors", "v_pred", metadata={"modelspec.prediction_type": "epsilon"}))
    assert "m.safetensors" in caplog.text
    assert "--prediction_type" in caplog.text


def test_an_unknown_type_in_the_header_is_refused_unless_one_is_given(tmp_path):
    file = with_keys(tmp_path / "model.safetensors", metadata={"modelspec.prediction_type": "flow"})
    with pytest.raises(InputError, match=r"must be epsilon or v, got 'flow'\. Give --prediction_type"):
        read_prediction(file)
    assert prediction_of(str(file), EPSILON) == Prediction(EPSILON)


def test_given_settings_take_precedence_over_the_file(tmp_path):
    file = str(with_keys(tmp_path / "model.safetensors", "v_pred", "ztsnr"))
    assert prediction_of(file, EPSILON, False) == Prediction(EPSILON, False)
    assert prediction_of(file, None, False) == Prediction(V, False)
    assert prediction_of("owner/model", V, True) == Prediction(V, True)


def test_without_settings_the_scheduler_is_unchanged():
    scheduler = EulerDiscreteScheduler()
    assert Prediction().apply(scheduler) is scheduler


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler, DDPMScheduler])
def test_zero_terminal_snr_ends_without_any_signal_and_sampling_starts_there(kind):
    scheduler = Prediction(V, True).apply(kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    noising = noising_for(scheduler)
    assert noising.scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


def test_sigmas_in_a_file_are_those_of_edm(tmp_path):
    file = with_keys(tmp_path / "m.safetensors", **{"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.004})
    scheduler = prediction_of(str(file)).apply(EulerDiscreteScheduler())
    assert isinstance(scheduler, EDMEulerScheduler)
    assert scheduler.sigmas.max() == pytest.approx(120)
    assert scheduler.config.prediction_type == V
    # Of v-prediction with sigma_data 1: c_skip = 1 / (s^2 + 1), c_out = -s / sqrt(s^2 + 1).
    x, answer, sigma = torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([2.0])
    expected = x / 5 - answer * 2 / 5**0.5
    torch.testing.assert_close(scheduler.precondition_outputs(x, answer, sigma), expected)


@pytest.mark.parametrize(
    ("prediction", "scheduler", "message"),
    [
        (Prediction(EPSILON, True), EulerDiscreteScheduler(), r"needs a model that predicts v.*--prediction_type v_prediction"),
        (Prediction(None, True), EulerDiscreteScheduler(), r"prediction_type 'epsilon'.*--rescale_betas_zero_snr False"),
        (Prediction(EPSILON), DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=V), r"needs a model that predicts v"),
        (Prediction(V, True), HeunDiscreteScheduler(), r"not supported by this model's HeunDiscreteScheduler"),
        (Prediction(V, True, (0.002, 120.0)), EulerDiscreteScheduler(), r"not supported by this model's EDMEulerScheduler"),
    ],
)
def test_zero_terminal_snr_is_refused_if_the_scheduler_does_not_support_it(prediction, scheduler, message):
    with pytest.raises(InputError, match=message):
        prediction.apply(scheduler)


def test_training_on_epsilon_with_zero_terminal_snr_is_refused():
    with pytest.raises(InputError, match=r"needs a model that predicts v"):
        noising_for(DDIMScheduler(rescale_betas_zero_snr=True))


def test_min_snr_weights_are_finite_without_signal():
    noising = noising_for(Prediction(V, True).apply(EulerDiscreteScheduler()))
    timesteps = torch.tensor([0, 500, 999])
    signal = noising.scheduler.alphas_cumprod[timesteps].double()
    snr = signal / (1 - signal)
    expected = snr.clamp(max=5.0) / (snr + 1)
    torch.testing.assert_close(noising.snr_weights(timesteps, 5.0).double(), expected, rtol=1e-4, atol=1e-7)
    assert noising.snr_weights(timesteps, 5.0)[-1] == 0


@pytest.fixture(scope="module")
def v_pred_file(tmp_path_factory):
    """The tiny model in a single file that declares v-prediction with zero terminal SNR."""
    path = tmp_path_factory.mktemp("models") / "v.safetensors"
    save_single_file(tiny_pipeline(), path)
    save_file(load_file(path) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, path)
    return path


def test_a_file_with_keys_makes_the_images_of_stock_diffusers_with_that_scheduler(v_pred_file, tiny_model):
    pipe = load_base_model(str(v_pred_file), single_file_config=str(tiny_model))
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_model, add_watermarker=False)
    stock.scheduler = EulerDiscreteScheduler.from_config(
        stock.scheduler.config, prediction_type=V, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    torch.testing.assert_close(image(pipe), image(stock))
    assert (image(pipe) - image(tiny_pipeline())).abs().max() > 0.01


def test_given_settings_apply_to_the_scheduler_of_a_folder(tiny_model):
    pipe = load_base_model(str(tiny_model), prediction_type=V, rescale_betas_zero_snr=True)
    config = pipe.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr, config.timestep_spacing) == (V, True, "trailing")
    with pytest.raises(InputError, match=r"needs a model that predicts v"):
        load_base_model(str(tiny_model), rescale_betas_zero_snr=True)


class ExactUNet(nn.Module):
    """A UNet that knows the image and predicts exactly its noise, or velocity."""

    def __init__(self, answer, latents, scheduler):
        super().__init__()
        self.answer, self.latents = answer, latents
        self.alphas = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
        self.config, self.dtype, self.device = SimpleNamespace(), torch.float32, torch.device("cpu")

    def forward(self, noisy, timesteps, hidden, added_cond_kwargs):
        signal = self.alphas[timesteps].sqrt().view(-1, 1, 1, 1)
        rest = (1 - signal**2).sqrt()
        noise = (noisy - signal * self.latents) / rest
        velocity = signal * noise - rest * self.latents
        return SimpleNamespace(sample=noise if self.answer == EPSILON else velocity)


def encoded(pipe, latents):
    """One image with these latents (1, channels, height, width)."""
    moments = torch.stack([latents, torch.zeros_like(latents)], dim=1)[:, None]
    tokens = torch.zeros((1, 2, 4), dtype=torch.int64)
    return cached_latents(moments, torch.zeros(1, 6), tokens, encode_prompts(pipe, ["a star"]))


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("answer", [EPSILON, V])
@pytest.mark.parametrize("size", [0.05, 1.0, 2.0])
def test_a_perfect_model_is_recognised_by_its_losses(pipe, answer, rescaled, size):
    pipe.scheduler = DDPMScheduler(prediction_type=V, rescale_betas_zero_snr=rescaled)
    latents = size * torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    pipe.register_modules(unet=ExactUNet(answer, latents, pipe.scheduler))
    losses = target_losses(DenoisingLoss(pipe), encoded(pipe, latents))
    assert getattr(losses, answer) < 1e-4
    assert not losses.contradicts(answer)
    assert losses.contradicts(V if answer == EPSILON else EPSILON)
    if answer == V:
        check_prediction_type(pipe, encoded(pipe, latents))
        return
    flags = r"--prediction_type epsilon --rescale_betas_zero_snr False\." if rescaled else r"--prediction_type epsilon\."
    with pytest.raises(InputError, match=rf"predicts epsilon, not v_prediction: .* 0\.00 for epsilon and .* {flags}"):
        check_prediction_type(pipe, encoded(pipe, latents))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_weights_contradict_no_prediction_type(seed):
    pipe = tiny_pipeline(seed)
    for size in (0.05, 1.0, 4.0):
        latents = size * torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        losses = target_losses(DenoisingLoss(pipe), encoded(pipe, latents))
        assert not losses.contradicts(EPSILON)
        assert not losses.contradicts(V)


def test_models_with_other_targets_are_not_checked(pipe):
    for scheduler in (DDPMScheduler(prediction_type="sample"), EDMEulerScheduler()):
        pipe.scheduler = scheduler
        check_prediction_type(pipe, None)


@pytest.fixture(scope="module")
def built_in():
    """The built-in model, which predicts v."""
    return load_base_model(BUILT_IN)


@pytest.mark.parametrize(("said", "refused"), [(None, False), (V, False), (EPSILON, True)])
def test_the_built_in_model_is_refused_with_the_wrong_prediction_type(built_in, said, refused):
    pipe, own = built_in, built_in.scheduler
    pipe.scheduler = Prediction(said, False if said == EPSILON else None).apply(own)
    examples = load_examples(sorted(SAMPLE_SUBJECT.glob("*.jpg"))[:2], model_resolution(pipe))
    latents = encode_images(pipe, torch.stack([example.pixels for example in examples]))
    time_ids, tokens = torch.stack([example.time_ids for example in examples]), torch.zeros((2, 2, 4), dtype=torch.int64)
    images = cached_latents(latents[:, None], time_ids, tokens, encode_prompts(pipe, ["a photo of a toy"] * 2))
    try:
        with pytest.raises(InputError, match=r"predicts v_prediction, not epsilon") if refused else nullcontext():
            check_prediction_type(pipe, images)
    finally:
        pipe.scheduler = own
