"""A1111's syntax where prompts are typed: the page says what it is here, and that it does nothing."""

from webui.draft import Draft
from webui.generation_requests import GenerationRequest
from webui.screens import check, use


def test_the_scenes_of_a_draft_are_looked_through():
    plain, _ = check._Handlers(None).describe(Draft().to_browser())
    assert "A1111" not in plain
    said, _ = check._Handlers(None).describe(Draft(scenes=["at night <lora:toy:0.8>", "(snow:1.4)"]).to_browser())
    assert said.count('class="warning"') == 2
    assert "&lt;lora:toy:0.8&gt;" in said
    assert "choose it under Use" in said


def test_the_words_of_a_wish_are_looked_through():
    assert use._of_syntax(GenerationRequest(None, None, 1.0, "a star")) == ""
    said = use._of_syntax(GenerationRequest(None, None, 1.0, "a star <lora:toy:0.8>", negative_prompt="(fog:1.2)"))
    assert said.count('class="warning"') == 2
    assert "Combine with other adapters" in said
