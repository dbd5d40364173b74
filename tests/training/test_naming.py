"""A run has a title, which users may change, and its files are named after it."""

import pytest

from pipelines.built_in import BUILT_IN
from pipelines.errors import InputError
from training.runs.naming import DEMO_ONLY, SDXL, default_title, file_stem, header_of, set_title, title_of


@pytest.mark.parametrize(
    ("data", "task", "title"),
    [
        ({"instance_prompt": "a photo of sks duck"}, "subject", "sks duck"),
        ({"instance_prompt": "An image of  sks coffee mug "}, "subject", "sks coffee mug"),
        ({"instance_prompt": "sks, oil painting"}, "subject", "sks, oil painting"),
        ({}, "subject", "sks toy"),
        ({"class_names": ["c0=cat", "c1=a=b", "c2=x", "c3=y"]}, "classify", "cat, a=b, x and 1 more"),
        ({"data_dir": "/photos/pets/"}, "classify", "pets"),
        ({"data_dir": None}, "classify", "handwritten digits"),
        ({"instance_prompt": "a" * 99}, "subject", "a" * 59 + "…"),
    ],
)
def test_the_default_title_is_the_trigger_and_class_word_or_the_classes(data, task, title):
    assert default_title({"data": data}, task) == title


def test_the_title_of_a_user_replaces_the_default_until_it_is_emptied(tmp_path):
    options = {"data": {"instance_prompt": "a photo of sks duck"}}
    set_title(tmp_path, "  My   rubber duck ")
    assert title_of(tmp_path, options, "subject") == "My rubber duck"
    set_title(tmp_path, " ")
    assert title_of(tmp_path, options, "subject") == "sks duck"
    with pytest.raises(InputError, match="at most 60 characters, got 61"):
        set_title(tmp_path, "a" * 61)


@pytest.mark.parametrize(
    ("title", "stem"),
    [
        ("sks duck", "sks-duck-step40"),
        ("../../etc/passwd", "etc-passwd-step40"),
        ("Ente é 鴨", "Ente-é-鴨-step40"),
        ("<b>$(rm)</b>", "b-rm-b-step40"),
        ("...", "adapter-step40"),
    ],
)
def test_files_are_named_after_the_title_and_the_step(title, stem):
    assert file_stem(title, 40) == stem


def test_the_header_says_which_base_model_the_file_fits():
    model = {"pretrained_model_name_or_path": "/models/mine.safetensors"}
    said = header_of("My duck", {"model": model, "data": {"instance_prompt": "a photo of sks duck"}}, 40)
    assert said == {
        "modelspec.title": "My duck, step 40",
        "modelspec.trigger_phrase": "sks duck",
        "modelspec.description": SDXL,
        "ss_sd_model_name": "mine.safetensors",
    }
    assert header_of("x", {"model": model}, 40, private=True) == {"modelspec.description": SDXL}
    header = header_of("x", {"model": {"pretrained_model_name_or_path": BUILT_IN}}, 40, private=True)
    assert header == {"modelspec.description": DEMO_ONLY}
