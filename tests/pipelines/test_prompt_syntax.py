"""A1111's prompt syntax is read as plain text, with a warning that names the alternative."""

import pytest

from pipelines.prompt_syntax import command_line_warnings, foreign_syntax, page_warnings, training_warnings


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a star <lora:toy:0.8>", [("lora", "<lora:toy:0.8>", "toy", "0.8")]),
        ("<lora:my toy>", [("lora", "<lora:my toy>", "my toy", None)]),
        ("<LORA:toy:.5:0.3> x", [("lora", "<LORA:toy:.5:0.3>", "toy", ".5")]),
        ("<lyco:toy:1:lbw=XYZ>", [("lora", "<lyco:toy:1:lbw=XYZ>", "toy", "1")]),
        ("a (red star:1.4) and (snow: 0.5)", [("weight", "(red star:1.4)", None, None), ("weight", "(snow: 0.5)", None, None)]),
        ("((red)) star", [("weight", "((red))", None, None)]),
        ("<lora:a:1> (b:2)", [("lora", "<lora:a:1>", "a", "1"), ("weight", "(b:2)", None, None)]),
        ("a star (of tin), 16:9", []),
        ("wide (16:9) image", []),
        (r"\(word:1.4\)", []),
        ("a <b> tag, a:b, (left: right)", []),
        ("(", []),
    ],
)
def test_tags_and_weights_are_found_and_ordinary_brackets_are_not(prompt, parts):
    assert [(each.kind, each.text, each.name, each.scale) for each in foreign_syntax(prompt)] == parts


def test_each_part_is_reported_once_with_the_alternative():
    prompts = ["a <lora:toy:0.8> (star:1.4)", "b <lora:toy:0.8>", "c"]
    lora, weight = command_line_warnings(prompts)
    assert "'<lora:toy:0.8>' in a prompt is A1111's syntax and is read here as plain text." in lora
    assert "--adapter PATH/toy.safetensors --scale 0.8" in lora
    assert "'(star:1.4)'" in weight
    assert "Weights have no effect" in weight
    assert "--adapter" not in " ".join([*training_warnings(prompts), *page_warnings(prompts)])
    assert "starts from the base model alone" in training_warnings(prompts)[0]
    assert "choose it under Use" in page_warnings(prompts)[0]
    assert command_line_warnings(["a star", ""]) == []
