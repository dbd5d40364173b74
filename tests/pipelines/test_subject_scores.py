"""Scores of images: identities, and on the built-in model the separation of good images from bad ones."""

import json
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from safetensors.torch import save_file
from tiny_clip import CONFIG, tiny_clip
from tiny_pipeline import add_nora, byte_tokenizer, tiny_pipeline
from transformers import BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from pipelines import mini_clip
from pipelines.backgrounds import BACKGROUNDS
from pipelines.built_in import BASE_SCORER, BUILT_IN_MODEL
from pipelines.errors import InputError
from pipelines.mini_sdxl import PROMPT_WORDS, reduced_tokenizer
from pipelines.scenes import COLOURS, Toy, render_toy, sample_toy
from pipelines.subject.adapters import without_adapters
from pipelines.subject.base_model import load_base_model
from pipelines.subject.embedders import OpenClipEmbedder, load_embedder
from pipelines.subject.scores import (
    BaseModelScorer,
    EmbeddingScorer,
    copy_scores,
    create_image_scorer,
    cropped,
    nearest_limit,
)


def noise(seed, side=32):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_mirrored_and_brightened_copies_score_one_and_other_images_do_not():
    references = [noise(0), noise(1)]
    mirrored = references[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    paler = Image.eval(references[0], lambda value: value // 2 + 60)
    found = copy_scores([references[0], mirrored, paler, noise(2)], references)
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] == pytest.approx(1, abs=1e-5)
    assert found[2] > 0.98
    assert found[3] < 0.5


def test_a_training_image_scores_highest_as_subject_and_as_copy():
    references = [noise(seed) for seed in range(2)]
    judge = BaseModelScorer(tiny_pipeline(), references[:1], [noise(9)], 16)
    same, other = judge.scores([references[0], noise(7)], ["a", "b"])
    assert same.subject == pytest.approx(1, abs=1e-4)
    assert other.subject < same.subject
    assert same.copy == pytest.approx(1, abs=1e-5)
    assert same.nearest == pytest.approx(1, abs=1e-4)


def test_subject_is_the_mean_and_nearest_the_maximum_over_the_training_images():
    references, sample = [noise(seed) for seed in range(3)], [noise(7)]
    pipe = tiny_pipeline()
    # The other images only centre the features; with the same ones everywhere, the scores of single references can be averaged.
    everything = [*references, noise(9)]
    alone = []
    for reference in references:
        rest = [image for image in everything if image is not reference]
        alone += [each.subject for each in BaseModelScorer(pipe, [reference], rest, 16).scores(sample, ["a"])]
    (found,) = BaseModelScorer(pipe, references, [noise(9)], 16).scores(sample, ["a"])
    assert found.subject == pytest.approx(np.mean(alone), abs=1e-4)
    assert found.nearest == pytest.approx(max(alone), abs=1e-4)
    # Any images can be the references.
    judge = BaseModelScorer(pipe, references[:1], everything[1:], 16)
    assert judge.similarities(sample, references)[0].tolist() == pytest.approx(alone, abs=1e-4)


def test_the_nearest_limit_is_that_of_cropped_copies_but_at_least_that_of_training_images():
    of_cropped = torch.tensor([[0.9, 1.0], [1.0, 0.8]])
    assert nearest_limit(torch.tensor([[1.0, 0.3], [0.3, 1.0]]), of_cropped) == pytest.approx(0.85)
    assert nearest_limit(torch.tensor([[1.0, 0.95], [0.95, 1.0]]), of_cropped) == pytest.approx(0.95)
    assert nearest_limit(torch.ones(1, 1), of_cropped[:1, :1]) == pytest.approx(0.9)


def test_a_cropped_copy_is_the_middle_at_the_images_size():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (2, 1, 38, 19))
    found = cropped(image)
    assert found.size == (40, 20)
    assert np.abs(np.asarray(found).astype(int) - (0, 0, 255)).max() <= 1


def test_scores_do_not_depend_on_the_adapter_and_restore_it():
    plain, adapted = tiny_pipeline(), tiny_pipeline()
    add_nora(adapted)
    adapted.unet.train()
    before = {name: parameter.requires_grad for name, parameter in adapted.unet.named_parameters()}
    assert any(before.values())
    images, prompts = [noise(0), noise(1)], ["a red star", "snow"]
    found = [BaseModelScorer(pipe, images[:1], [noise(9)], 16).scores(images, prompts) for pipe in (plain, adapted)]
    assert found[0] == found[1]
    assert {name: parameter.requires_grad for name, parameter in adapted.unet.named_parameters()} == before
    assert adapted.unet.training


def test_adapters_are_enabled_again_after_an_error():
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


def assert_judges_by(found, judge, images, texts):
    """Check that the scores are the cosines of these features; the first image is the only training image.

    The last image is its cropped copy.
    """
    cosines = (images * texts).sum(dim=1).tolist()
    assert [each.prompt for each in found] == pytest.approx(cosines, abs=1e-5)
    to_training = (images @ images[0]).tolist()
    assert [each.subject for each in found] == pytest.approx(to_training, abs=1e-5)
    assert [each.nearest for each in found] == pytest.approx(to_training, abs=1e-5)
    assert judge.nearest_limit == pytest.approx(to_training[-1], abs=1e-5)


def unit(values):
    return torch.nn.functional.normalize(values, dim=-1)


def test_a_clip_of_transformers_scores_by_its_cosine_similarities(clip_folder):
    images, prompts = [noise(0), noise(1), cropped(noise(0))], ["a red star", "snow", "night"]
    judge = create_image_scorer(str(clip_folder), None, images[:1], [], 16)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    inputs = CLIPImageProcessor.from_pretrained(clip_folder)(images=images, return_tensors="pt")
    with torch.no_grad():
        answer = model(**inputs, **byte_tokenizer()(prompts, padding=True, return_tensors="pt"))
    assert_judges_by(judge.scores(images, prompts), judge, unit(answer.image_embeds), unit(answer.text_embeds))


@pytest.fixture
def mini_folder(tmp_path, monkeypatch):
    """A folder like that of the built-in CLIP, with untrained weights."""
    folder = tmp_path / "assets" / "mini-clip"
    mini_clip.write_configuration(folder, reduced_tokenizer([PROMPT_WORDS]))
    torch.manual_seed(0)
    save_file(mini_clip.new_model(folder).state_dict(), folder / mini_clip.WEIGHTS_FILE)
    monkeypatch.setattr("pipelines.clip.BUILT_IN_CLIP", folder)
    return folder


@pytest.mark.parametrize("named", ["mini", "folder"])
def test_the_built_in_clip_scores_as_plain_open_clip(mini_folder, monkeypatch, named):
    images = [noise(0, 64), noise(1, 64), cropped(noise(0, 64))]
    prompts = ["a photo of sks toy", "snow", "night"]
    judge = create_image_scorer("mini" if named == "mini" else str(mini_folder), None, images[:1], [], 64)
    monkeypatch.chdir(mini_folder.parents[1])
    stock, _, preprocess = open_clip.create_model_and_transforms("local-dir:assets/mini-clip")
    tokens = open_clip.get_tokenizer("local-dir:assets/mini-clip")(prompts)
    with torch.no_grad():
        image_features = stock.eval().encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        texts = stock.encode_text(tokens, normalize=True)
    assert_judges_by(judge.scores(images, prompts), judge, image_features, texts)


def test_an_open_clip_model_is_given_with_its_weights(tmp_path):
    (tmp_path / "judging-clip.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "judging-clip.json")
    save_file(tiny_clip().state_dict(), tmp_path / "weights.safetensors")
    embedder = load_embedder(f"open_clip:judging-clip/{tmp_path / 'weights.safetensors'}")
    assert isinstance(embedder, OpenClipEmbedder)
    for name, value in tiny_clip().state_dict().items():
        assert torch.equal(embedder.clip.model.state_dict()[name], value)


def test_dino_scores_the_subject_and_the_base_model_scores_the_prompt(tmp_path):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7)
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14}).save_pretrained(tmp_path)
    images, prompts = [noise(0), noise(1)], ["a red star", "snow"]
    pipe = tiny_pipeline()
    judge = create_image_scorer(str(tmp_path), pipe, images[:1], [noise(9)], 16)
    base = create_image_scorer(BASE_SCORER, pipe, images[:1], [noise(9)], 16)
    assert isinstance(base, BaseModelScorer)
    assert isinstance(judge, EmbeddingScorer)
    found = judge.scores(images, prompts)
    assert found[0].subject == pytest.approx(1, abs=1e-5)
    assert [each.prompt for each in found] == [each.prompt for each in base.scores(images, prompts)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}", r"image_scorer .* could not be loaded as CLIP or DINOv2"),
        ("open_clip:ViT-B-16", r"image_scorer 'open_clip:ViT-B-16' .*one of the tags openai.* got None.*Give 'mini'"),
        ("open_clip:nothing/openai", r"a name that open_clip knows.* got 'nothing'"),
        ("open_clip:ViT-B-16/weights.pt", r"is a pickle by its name"),
    ],
)
def test_an_image_scorer_that_cannot_be_loaded_is_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        load_embedder(name.format(folder=tmp_path))


def toy_image(toy: Toy, colour: str, background: str, rng: random.Random) -> Image.Image:
    """The toy near the middle of a 64 x 64 image."""
    canvas = 192
    image = BACKGROUNDS[background].render(canvas, rng)
    radius = canvas / 2 * rng.uniform(0.5, 0.75)
    centre = tuple(canvas / 2 + rng.uniform(-0.8, 0.8) * (canvas / 2 - radius) for _ in range(2))
    paint = Image.new("RGB", (canvas, canvas), COLOURS[colour])
    return render_toy(image, paint, centre, radius, toy).resize((64, 64), Image.Resampling.BOX)


def auc(good, bad):
    """How often a good image scores above a bad one."""
    return float(np.mean([[g > b for b in bad] for g in good]))


def five_toys():
    """Five toys, each on the same five backgrounds, and the prompts of these."""
    rng, places = random.Random(0), list(BACKGROUNDS)[:5]
    toys = [(sample_toy(colour, rng), colour) for colour in rng.sample(list(COLOURS), 5)]
    prompts = [f"a photo of sks toy {BACKGROUNDS[place].phrase}" for place in places]
    return [[toy_image(toy, colour, place, rng) for place in places] for toy, colour in toys], prompts


def test_the_built_in_clip_separates_good_from_bad():
    drawn, prompts = five_toys()
    good, bad, right, wrong = [], [], [], []
    for mine, subject in enumerate(drawn):
        others = [images[place] for place, images in enumerate(drawn[:mine] + drawn[mine + 1 :])]
        judge = create_image_scorer("mini", None, subject[:4], [], 64)
        found = judge.scores([subject[4], *others], [prompts[4], *prompts[:4]])
        good.append(found[0].subject)
        bad += [each.subject for each in found[1:]]
        right += [each.prompt for each in found]
        wrong += [each.prompt for each in judge.scores([subject[4], *others], [*prompts[:4], prompts[4]])]
        assert found[0].nearest < judge.nearest_limit
    assert auc(good, bad) > 0.8
    assert auc(right, wrong) > 0.8


@pytest.mark.slow(13)
def test_on_the_built_in_model_each_score_separates_good_from_bad():
    (drawn, prompts), pipe = five_toys(), load_base_model(str(BUILT_IN_MODEL))
    good, bad, right, wrong, copied, fresh = [], [], [], [], [], []
    beyond_limit = {"fresh": [], "copied": []}
    # Three of the five, each against all others.
    for mine, subject in enumerate(drawn[:3]):
        others = [images[place] for place, images in enumerate(drawn[:mine] + drawn[mine + 1 :])]
        judge = BaseModelScorer(pipe, subject[:4], others, 64)
        found = judge.scores([subject[4], *others], [prompts[4], *prompts[:4]])
        good.append(found[0].subject)
        bad += [each.subject for each in found[1:]]
        right += [each.prompt for each in found]
        wrong += [each.prompt for each in judge.scores([subject[4], *others], [*prompts[:4], prompts[4]])]
        changed = [ImageEnhance.Brightness(image).enhance(1.15) for image in subject[:4]]
        blurred = [image.filter(ImageFilter.GaussianBlur(1)) for image in subject[:4]]
        beyond_limit["fresh"].append(found[0].nearest >= judge.nearest_limit)
        near = [each.nearest for each in judge.scores([*changed, *blurred], prompts[:4] * 2)]
        beyond_limit["copied"] += [value >= judge.nearest_limit for value in near]
        copied += copy_scores(changed, subject[:4])
        fresh += copy_scores(subject[4:], subject[:4])
    assert auc(good, bad) > 0.8
    assert auc(right, wrong) > 0.9
    assert auc(copied, fresh) > 0.95
    assert not any(beyond_limit["fresh"])
    assert all(beyond_limit["copied"])
