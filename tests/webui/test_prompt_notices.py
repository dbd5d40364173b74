"""A1111 syntax in prompts: the page warns that it has no effect and says what to use instead."""

from pipelines.subject.generation_request import GenerationRequest
from webui.draft import EXAMPLE, Draft, RunSettings
from webui.screens import check, use
from webui.tasks import SubjectPlan
from webui.workspace import Workspace


def test_the_page_warns_of_a1111_syntax_in_scenes(tmp_path):
    workspace = Workspace(tmp_path, tmp_path)
    assert "A1111" not in check._prompts(SubjectPlan(workspace, Draft()))
    settings = RunSettings(scenes=["at night <lora:toy:0.8>", "(snow:1.4)"])
    said = check._prompts(SubjectPlan(workspace, Draft(settings={EXAMPLE: settings})))
    assert said.count('class="warning') == 2
    assert "&lt;lora:toy:0.8&gt;" in said
    assert "choose it under Use" in said


def test_the_page_warns_of_a1111_syntax_in_generation_requests():
    assert use.prompt_warnings(GenerationRequest(prompt="a star")) == []
    lora, weight = use.prompt_warnings(GenerationRequest(prompt="a star <lora:toy:0.8>", negative_prompt="(fog:1.2)"))
    assert "Combine with other adapters" in lora
    assert "Weights have no effect" in weight
