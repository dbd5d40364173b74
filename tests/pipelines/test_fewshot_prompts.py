"""The prompts of the classes."""

import open_clip
import pytest
import torch

from pipelines.errors import InputError
from pipelines.fewshot.prompts import TEMPLATE_NAMES, Prompts, clean_name, make_prompts, templates_named
from pipelines.fewshot.sets import SETS

CLASSES = ("golden_retriever", "Siamese  cat")


@pytest.mark.parametrize(
    ("name", "clean"),
    [("golden_retriever", "golden retriever"), ("_a__b_ c ", "a b c"), ("707-320", "707-320"), ("Émeu", "Émeu"), ("__", "")],
)
def test_underscores_and_repeated_spaces_become_one_space(name, clean):
    assert clean_name(name) == clean


def test_every_template_is_used_for_every_class_class_by_class():
    prompts = make_prompts(CLASSES, ("a {}.", "many {}"))
    assert prompts.texts() == ["a golden retriever.", "many golden retriever", "a Siamese cat.", "many Siamese cat"]
    assert [text for own in prompts.of_each_class() for text in own] == prompts.texts()
    assert make_prompts(CLASSES).texts() == ["a photo of a golden retriever.", "a photo of a Siamese cat."]


@pytest.mark.parametrize(
    ("name", "theirs"), [("ensemble", "SIMPLE_IMAGENET_TEMPLATES"), ("ensemble80", "OPENAI_IMAGENET_TEMPLATES")]
)
def test_ensembles_are_open_clips(name, theirs):
    assert make_prompts(["dog"], name).texts() == [template("dog") for template in getattr(open_clip, theirs)]


def test_every_dataset_of_the_protocol_has_its_template():
    assert set(SETS) < set(TEMPLATE_NAMES)
    for name in TEMPLATE_NAMES:
        Prompts(CLASSES, templates_named(name))


@pytest.mark.parametrize("names", [("{0.real}", "{}"), ("{", "}}"), ("%s", "$x")])
def test_class_names_with_format_characters_are_used_unchanged(names):
    assert make_prompts(names, "{}").texts() == list(names)


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{0}", "{name}", "ensemble 80"])
def test_a_template_needs_one_placeholder(template):
    with pytest.raises(InputError, match=r"must contain \{\} once.*ensemble80"):
        make_prompts(CLASSES, template)


def test_no_template_at_all_is_refused():
    with pytest.raises(InputError, match="at least one prompt template, got none"):
        make_prompts(CLASSES, ())


def test_a_class_feature_is_the_normalised_mean_of_normalised_prompt_features():
    features = torch.tensor([[3.0, 0.0], [0.0, 0.1], [0.0, -2.0], [0.0, -9.0]])
    found = make_prompts(CLASSES, ("a {}", "b {}")).class_features(features)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


def test_one_template_gives_its_normalised_features():
    features = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    found = make_prompts(CLASSES).class_features(features)
    torch.testing.assert_close(found, features / features.norm(dim=1, keepdim=True))


def test_new_classes_are_appended_and_need_unique_names():
    prompts = make_prompts(CLASSES, "dtd").with_classes("pug", "owl")
    assert prompts.classes == (*CLASSES, "pug", "owl")
    assert prompts.texts()[2:] == ["pug texture.", "owl texture."]
    for taken in ("Siamese_cat", " ", "owl"):
        with pytest.raises(InputError, match=f"must not be empty or in use, got {taken!r}"):
            prompts.with_classes(taken)
    with pytest.raises(InputError, match="got 'fox'"):
        prompts.with_classes("fox", "fox")
