"""Training batches are functions of the seed and their index."""

import dataclasses

import pytest
import torch
from cached_latents import cached_latents

from pipelines.subject.base_model import PromptEmbeddings
from pipelines.subject.batches import SubjectBatches
from pipelines.subject.loss import DenoisingLoss

COUNT = 5


def images(variants=1, count=COUNT, first=1, deviation=0.0):
    """Every image's latents have its number as their mean; mirrored ones its negative."""
    mean = torch.arange(first, first + count).float().view(count, 1, 1, 1, 1).expand(count, variants, 4, 2, 2).clone()
    mean[:, 1:] *= -1
    moments = torch.stack([mean, torch.full_like(mean, deviation)], dim=2)
    numbers = torch.arange(first, first + count).float()
    prompts = PromptEmbeddings(numbers.view(-1, 1, 1), numbers.view(-1, 1))
    tokens = numbers.long().view(-1, 1, 1)
    return cached_latents(moments, numbers.view(-1, 1).expand(count, 6), tokens, prompts)


def of_sizes(*sizes):
    """The same images in different sizes; the latents are half as high as the image."""
    plain = images(count=len(sizes))

    def read(place, variant):
        moments, time_ids = plain.read(place, variant)
        return moments[..., :1, :1].expand(2, 4, sizes[place][0] // 2, sizes[place][1] // 2), time_ids

    return dataclasses.replace(plain, sizes=sizes, read=read)


def batches(batch_size=3, seed=0, encode_in_loss=False, variants=1, **more):
    return SubjectBatches(images(variants), encode_in_loss, batch_size, num_timesteps=1000, seed=seed, **more)


def numbers_in(batch):
    """The numbers of a batch's images."""
    return batch["latents"][:, 0, 0, 0].long().tolist()


def test_a_batch_does_not_depend_on_earlier_batches():
    fresh, used = batches(), batches()
    for index in range(7):
        used(index)
    for name, values in fresh(7).items():
        assert torch.equal(values, used(7)[name])


def test_another_seed_or_index_gives_another_batch():
    first = batches()(0)["noise"]
    assert not torch.equal(first, batches()(1)["noise"])
    assert not torch.equal(first, batches(seed=1)(0)["noise"])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_every_image_is_used_once_in_an_epoch(batch_size):
    drawn = torch.tensor([batches(batch_size).chosen(index) for index in range(4 * COUNT)]).flatten()
    for turn in drawn[: len(drawn) // COUNT * COUNT].view(-1, COUNT):
        assert turn.sort().values.tolist() == list(range(COUNT))


def test_an_image_keeps_its_size_and_prompt():
    for encode_in_loss in (False, True):
        batch = batches(batch_size=4, encode_in_loss=encode_in_loss)(3)
        numbers = batch["latents"][:, 0, 0, 0]
        rest = [batch["tokens"]] if encode_in_loss else [batch["hidden"], batch["pooled"]]
        for values in (batch["time_ids"], *rest):
            assert torch.equal(values.flatten(1)[:, 0].float(), numbers)


def test_latents_are_sampled_from_their_distribution_in_every_batch():
    drawn = SubjectBatches(images(deviation=1.0), False, 3, num_timesteps=1000, seed=0)
    means = [torch.tensor(drawn.chosen(k)) + 1.0 for k in range(60)]
    residuals = torch.cat([(drawn(k)["latents"] - mean.view(-1, 1, 1, 1)).flatten() for k, mean in enumerate(means)])
    assert residuals.mean().abs() < 0.1
    assert residuals.std() == pytest.approx(1.0, abs=0.1)


def test_half_of_the_images_are_mirrored():
    drawn = batches(batch_size=10, variants=2)
    signs = torch.cat([drawn(k)["latents"][:, 0, 0, 0].sign() for k in range(40)])
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 0.25


def test_a_batch_has_one_size_and_images_are_used_equally_often():
    sizes = ((4, 4), (4, 8), (4, 4), (8, 4), (4, 8), (4, 8))
    drawn = SubjectBatches(of_sizes(*sizes), False, 2, 1000, seed=0)
    counts = dict.fromkeys(range(1, len(sizes) + 1), 0)
    seen = []
    for index in range(3 * len(sizes)):
        batch = drawn(index)
        numbers = numbers_in(batch)
        assert {(2 * batch["latents"].shape[2], 2 * batch["latents"].shape[3])} == {sizes[number - 1] for number in numbers}
        assert batch["time_ids"][:, 0].long().tolist() == numbers
        assert batch["hidden"].flatten().long().tolist() == numbers
        seen.append(batch["latents"].shape[2:])
        for number in numbers:
            counts[number] += 1
    assert set(counts.values()) == {6}
    assert seen[:6] != seen[6:12]


def test_batches_of_several_sizes_do_not_depend_on_earlier_batches():
    def make():
        return SubjectBatches(of_sizes((4, 4), (4, 8), (8, 4)), False, 2, 1000, seed=3)

    used = make()
    for index in range(9):
        used(index)
    for name, values in make()(9).items():
        assert torch.equal(values, used(9)[name])


def with_class(batch_size=3, weight=0.5, encode_in_loss=False):
    return batches(batch_size, encode_in_loss=encode_in_loss, class_images=images(count=7, first=101), prior_loss_weight=weight)


def test_each_image_of_the_subject_is_followed_by_a_class_image():
    for encode_in_loss in (False, True):
        numbers = numbers_in(with_class(encode_in_loss=encode_in_loss)(4))
        assert numbers[::2] == numbers_in(batches()(4))
        assert all(number > 100 for number in numbers[1::2])
        batch = with_class(encode_in_loss=encode_in_loss)(4)
        words = batch["tokens" if encode_in_loss else "hidden"].flatten().long().tolist()
        assert words == numbers == batch["time_ids"][:, 0].long().tolist()


def test_every_class_image_is_used_once_in_an_epoch():
    drawn = [number for index in range(7) for number in numbers_in(with_class()(index))[1::2]]
    assert sorted(drawn) == sorted(3 * list(range(101, 108)))


def test_class_images_have_the_size_of_the_batch():
    sizes = ((4, 4), (4, 8))
    drawn = SubjectBatches(of_sizes(*sizes), False, 2, 1000, 0, of_sizes((4, 8), (4, 4), (4, 8)))
    assert {tuple(drawn(index)["latents"].shape) for index in range(8)} == {(4, 4, 2, 2), (4, 4, 2, 4)}


def test_the_loss_is_the_subjects_mean_plus_the_weighted_mean_of_the_class(pipe):
    subject, others = (mean_images(pipe, seed) for seed in (1, 2))
    batch = SubjectBatches(subject, False, 2, 1000, 0, others, prior_loss_weight=0.3)(5)
    loss = DenoisingLoss(pipe)
    halves = [{name: values[part::2] for name, values in batch.items() if name != "weights"} for part in (0, 1)]
    torch.testing.assert_close(loss(**batch), loss(**halves[0]) + 0.3 * loss(**halves[1]))


def test_an_even_split_over_processes_keeps_pairs_together():
    batch = with_class(batch_size=4)(0)
    for half in (batch["weights"][:4], batch["weights"][4:]):
        assert half.tolist() == [2.0, 1.0, 2.0, 1.0]


def mean_images(pipe, seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 1, 2, 4, 8, 8, generator=generator)
    prompts = PromptEmbeddings(torch.randn(count, 16, 40, generator=generator), torch.randn(count, 24, generator=generator))
    tokens = torch.zeros(count, 2, 16, dtype=torch.int64)
    return cached_latents(latents, torch.full((count, 6), 16.0), tokens, prompts)
