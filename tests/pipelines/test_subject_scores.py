"""Scores of pictures: what is fixed by algebra, and on the built-in model that each separates good from bad."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from tiny_pipeline import add_nora, byte_tokenizer, tiny_pipeline
from transformers import BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from pipelines.backgrounds import BACKGROUNDS
from pipelines.errors import InputError
from pipelines.scenes import COLOURS, Toy, draw_toy, sample_toy
from pipelines.subject.adapters import without_adapters
from pipelines.subject.base_model import BUILT_IN_MODEL, load_base_model
from pipelines.subject.scores import BaseModelJudge, EmbeddingJudge, copy_scores


def noise(seed, side=32):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_a_copy_scores_one_mirrored_or_brightened_and_another_picture_does_not():
    references = [noise(0), noise(1)]
    mirrored = references[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    paler = Image.eval(references[0], lambda value: value // 2 + 60)
    found = copy_scores([references[0], mirrored, paler, noise(2)], references)
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] == pytest.approx(1, abs=1e-5)
    assert found[2] > 0.98
    assert found[3] < 0.5


def test_a_training_picture_is_most_like_the_subject_and_its_own_copy():
    references = [noise(seed) for seed in range(2)]
    judge = BaseModelJudge(tiny_pipeline(), references[:1], [noise(9)], 16)
    same, other = judge.scores([references[0], noise(7)], ["a", "b"])
    assert same.subject == pytest.approx(1, abs=1e-4)
    assert other.subject < same.subject
    assert same.copy == pytest.approx(1, abs=1e-5)


def test_scores_are_the_base_models_whatever_adapter_is_on_it_and_leave_it_as_it_was():
    plain, adapted = tiny_pipeline(), tiny_pipeline()
    add_nora(adapted)
    adapted.unet.train()
    before = {name: parameter.requires_grad for name, parameter in adapted.unet.named_parameters()}
    assert any(before.values())
    pictures, prompts = [noise(0), noise(1)], ["a red star", "snow"]
    found = [BaseModelJudge(pipe, pictures[:1], [noise(9)], 16).scores(pictures, prompts) for pipe in (plain, adapted)]
    assert found[0] == found[1]
    assert {name: parameter.requires_grad for name, parameter in adapted.unet.named_parameters()} == before
    assert adapted.unet.training


def test_without_adapters_ends_even_where_something_fails():
    pipe = tiny_pipeline()
    add_nora(pipe, components=("unet",))
    with pytest.raises(ZeroDivisionError), without_adapters(pipe):
        raise ZeroDivisionError
    latents, kind = torch.randn(1, 4, 8, 8), {"text_embeds": torch.zeros(1, 24), "time_ids": torch.zeros(1, 6)}
    arguments = (latents, torch.tensor([5]), torch.zeros(1, 16, 40))
    with torch.no_grad():
        adapted = pipe.unet(*arguments, added_cond_kwargs=kind).sample
        base = tiny_pipeline().unet(*arguments, added_cond_kwargs=kind).sample
    assert (adapted - base).abs().max() > 1e-3


@pytest.fixture
def clip_folder(tmp_path):
    """A random CLIP model with its processor and tokenizer."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = byte_tokenizer()
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    vision = {**small, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_clip_model_judges_by_the_cosines_that_it_is_trained_on(clip_folder):
    pictures, prompts = [noise(0), noise(1)], ["a red star", "snow"]
    judge = EmbeddingJudge(str(clip_folder), pictures[:1], None)
    found = judge.scores(pictures, prompts)
    assert found[0].subject == pytest.approx(1, abs=1e-5)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    inputs = CLIPImageProcessor.from_pretrained(clip_folder)(images=pictures, return_tensors="pt")
    tokens = byte_tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        cosines = model(**inputs, **tokens).logits_per_image / model.logit_scale.exp()
    assert [each.prompt for each in found] == pytest.approx(cosines.diag().tolist(), abs=1e-5)


def test_a_dino_model_judges_the_subject_and_the_base_model_the_prompt(tmp_path):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7)
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14}).save_pretrained(tmp_path)
    pictures, prompts = [noise(0), noise(1)], ["a red star", "snow"]
    base = BaseModelJudge(tiny_pipeline(), pictures[:1], [noise(9)], 16)
    found = EmbeddingJudge(str(tmp_path), pictures[:1], base).scores(pictures, prompts)
    assert found[0].subject == pytest.approx(1, abs=1e-5)
    assert [each.prompt for each in found] == [each.prompt for each in base.scores(pictures, prompts)]


def test_a_judge_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(InputError, match=r"judge_model .* could not be loaded as CLIP or DINOv2"):
        EmbeddingJudge(str(tmp_path), [noise(0)], None)


def toy_picture(toy: Toy, colour: str, background: str, rng: random.Random) -> Image.Image:
    """The toy somewhere about the middle of a 64 x 64 picture."""
    canvas = 192
    picture = BACKGROUNDS[background].draw(canvas, rng)
    radius = canvas / 2 * rng.uniform(0.5, 0.75)
    centre = tuple(canvas / 2 + rng.uniform(-0.8, 0.8) * (canvas / 2 - radius) for _ in range(2))
    paint = Image.new("RGB", (canvas, canvas), COLOURS[colour])
    return draw_toy(picture, paint, centre, radius, toy).resize((64, 64), Image.Resampling.BOX)


def auc(good, bad):
    """How often a good one scores above a bad one."""
    return float(np.mean([[g > b for b in bad] for g in good]))


@pytest.mark.slow
@pytest.mark.skipif(not BUILT_IN_MODEL.is_dir(), reason="the built-in model is still in training")
def test_on_the_built_in_model_each_score_separates_good_from_bad():
    rng, pipe = random.Random(0), load_base_model(str(BUILT_IN_MODEL))
    places = list(BACKGROUNDS)[:5]
    prompts = [f"a photo of sks toy {BACKGROUNDS[place].phrase}" for place in places]
    toys = [(sample_toy(colour, rng), colour) for colour in rng.sample(list(COLOURS), 5)]
    drawn = [[toy_picture(toy, colour, place, rng) for place in places] for toy, colour in toys]
    good, bad, right, wrong, copied, fresh = [], [], [], [], [], []
    for mine, subject in enumerate(drawn):
        others = [pictures[place] for place, pictures in enumerate(drawn[:mine] + drawn[mine + 1 :])]
        judge = BaseModelJudge(pipe, subject[:4], others, 64)
        found = judge.scores([subject[4], *others], [prompts[4], *prompts[:4]])
        good.append(found[0].subject)
        bad += [each.subject for each in found[1:]]
        right += [each.prompt for each in found]
        wrong += [each.prompt for each in judge.scores([subject[4], *others], [*prompts[:4], prompts[4]])]
        changed = [ImageEnhance.Brightness(picture).enhance(1.15) for picture in subject[:4]]
        copied += copy_scores(changed, subject[:4])
        fresh += copy_scores(subject[4:], subject[:4])
    assert auc(good, bad) > 0.8
    assert auc(right, wrong) > 0.9
    assert auc(copied, fresh) > 0.95
