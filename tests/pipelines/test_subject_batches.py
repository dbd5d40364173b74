"""Training batches: functions of the seed and their index alone."""

import pytest
import torch

from pipelines.subject.base_model import PromptEmbeddings
from pipelines.subject.batches import EncodedPictures, SubjectBatches, encode_examples
from pipelines.subject.data import load_examples

COUNT = 5


def pictures(variants=1):
    """Every picture's latents are its number, without deviation; mirrored ones its negative."""
    mean = torch.arange(1.0, COUNT + 1).view(COUNT, 1, 1, 1, 1).expand(COUNT, variants, 4, 2, 2).clone()
    mean[:, 1:] *= -1
    moments = torch.stack([mean, torch.zeros_like(mean)], dim=2)
    numbers = torch.arange(1.0, COUNT + 1)
    prompts = PromptEmbeddings(numbers.view(-1, 1, 1), numbers.view(-1, 1))
    return EncodedPictures(moments, numbers.view(-1, 1).expand(COUNT, 6), numbers.long().view(-1, 1, 1), prompts)


def batches(batch_size=3, seed=0, encode_in_loss=False, variants=1):
    return SubjectBatches(pictures(variants), encode_in_loss, batch_size, num_timesteps=1000, seed=seed)


def test_a_batch_is_the_same_whatever_was_drawn_before():
    fresh, used = batches(), batches()
    for index in range(7):
        used(index)
    for name, values in fresh(7).items():
        assert torch.equal(values, used(7)[name])


def test_another_seed_or_index_draws_another_batch():
    first = batches()(0)["noise"]
    assert not torch.equal(first, batches()(1)["noise"])
    assert not torch.equal(first, batches(seed=1)(0)["noise"])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_every_picture_comes_once_in_every_round(batch_size):
    drawn = torch.cat([batches(batch_size).chosen(index) for index in range(4 * COUNT)])
    for turn in drawn[: len(drawn) // COUNT * COUNT].view(-1, COUNT):
        assert turn.sort().values.tolist() == list(range(COUNT))


def test_a_picture_never_meets_anothers_size_or_prompt():
    for encode_in_loss in (False, True):
        batch = batches(batch_size=4, encode_in_loss=encode_in_loss)(3)
        numbers = batch["latents"][:, 0, 0, 0]
        rest = [batch["tokens"]] if encode_in_loss else [batch["hidden"], batch["pooled"]]
        for values in (batch["time_ids"], *rest):
            assert torch.equal(values.flatten(1)[:, 0].float(), numbers)


def test_the_deviation_of_the_latents_is_drawn_anew_each_time():
    drawn = batches()
    drawn.pictures.latents[:, :, 1] = 1.0
    residuals = torch.cat([(drawn(k)["latents"] - (drawn.chosen(k) + 1.0).view(-1, 1, 1, 1)).flatten() for k in range(60)])
    assert residuals.mean().abs() < 0.1
    assert residuals.std() == pytest.approx(1.0, abs=0.1)


def test_mirrored_pictures_come_half_of_the_time():
    drawn = batches(batch_size=10, variants=2)
    signs = torch.cat([drawn(k)["latents"][:, 0, 0, 0].sign() for k in range(40)])
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 0.25


def test_examples_are_encoded_with_their_mirror_images(pipe, pictures_dir):
    examples = load_examples(sorted(pictures_dir.iterdir()), 16)
    encoded = encode_examples(pipe, examples, ["a star"] * len(examples), mirror=True)
    assert encoded.latents.shape == (3, 2, 2, 4, 8, 8)
    with torch.no_grad():
        mirrored = pipe.vae.encode(examples[1].pixels.flip(-1)[None]).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(encoded.latents[1:2, 1, 0], mirrored, atol=1e-5, rtol=1e-4)
    assert encoded.means.shape == (3, 4, 8, 8)
