"""The screen Judge: images, curves and scores of every step, and the recommended step, from the run's files."""

import json
import re

import gradio as gr
import pytest
from PIL import Image
from run_folders import PROMPTS, add_samples, curve, end_processes, finished_run, measure, run_in, scores

from training.runs.record import RunRecord
from training.runs.run_files import Certificate
from training.subject.measured import adapter_at
from webui import verdict
from webui.page import build_page
from webui.runs import RunView
from webui.screens.judge import parts, selection_of
from webui.settings import Settings
from webui.workspace import Workspace

CERTIFICATE = Certificate(True, {}, {}, 1.0, 1.0, [], [], [], {}, "float32", "cpu").to_json()


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty workspace; the processes of its runs are killed at the end."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    yield Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    end_processes()


def view(run):
    return RunView(RunRecord(run.path))


def look(run, step=None, place=None, outdated=True):
    return parts(view(run), step, place, outdated)


def table(run, *chosen):
    return look(run, *chosen)["table"].make().value


@pytest.fixture
def finished(workspace):
    """A finished run whose validation loss is lowest at step 40."""
    return finished_run(workspace.runs / "a")


def test_samples_of_all_steps_are_side_by_side_with_the_base_model_first_and_the_recommended_step_marked(finished):
    shown = table(finished)
    heads = re.findall(r'<th scope="col">(.*?)</th>', shown)
    suggested = verdict.suggested_step(finished)
    assert [head.split("<")[0].strip() for head in heads] == ["base model", "step 40", "step 60", "step 100"]
    assert [head for head in heads if "recommended" in head] == [
        f'step {suggested}<br><span class="chip good">recommended</span>'
    ]
    cells = re.findall(r'data-step="(\d+)" data-place="(\d+)"', shown)
    assert cells == [(str(step), str(place)) for place in range(len(PROMPTS)) for step in (0, 40, 60, 100)]
    assert "&lt;b&gt;in the snow" in shown
    assert "<b>in the snow" not in shown
    assert 'class="scroll"' in shown


def test_the_reasons_and_warnings_of_the_run_are_shown(finished):
    said = json.loads((finished.path / "suggestion.json").read_text())
    said |= {"version": 2, "warnings": ["Overfitting: <i>it</i> rises."], "reasons": ["Step 40 is best.", "Figures follow."]}
    (finished.path / "suggestion.json").write_text(json.dumps(said))
    shown = look(finished)["suggestion"].key
    assert f"Step {said['step']} of 100" in shown
    assert "<p>Step 40 is best.</p>" in shown
    assert "<summary>All measurements</summary><p>Figures follow.</p>" in shown
    assert '<p class="warning overfit">Overfitting: &lt;i&gt;it&lt;/i&gt; rises.</p>' in shown


def test_curves_show_loss_and_scores_with_the_recommended_step_and_an_explanation(finished):
    shown = look(finished)["curves"].key
    titles = re.findall("<figcaption>(.*?)</figcaption>", shown)
    assert titles == [
        "Validation and training loss (lower is better)",
        "Image similarity (CLIP-I)",
        "Prompt similarity (CLIP-T)",
        "Memorisation",
    ]
    assert shown.count(f"recommended: step {verdict.suggested_step(finished)}</li>") == len(titles)
    assert all(words in shown for words in (verdict.READ_LOSS, verdict.READ_SUBJECT, verdict.READ_PROMPT, verdict.READ_COPY))
    assert "limit 0.90" in shown


def test_the_table_of_measurements_has_the_logged_values(finished):
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', look(finished)["figures"].key)
    measured, scored = {point.step: point for point in curve()}, scores()
    assert len(rows) == len(measured)
    for (name, cells), step in zip(rows, sorted(measured), strict=True):
        values = re.findall("<td>(.*?)</td>", cells)
        assert (f"step {step}" if step else "base model") in name
        assert values[:2] == [f"{measured[step].heldout:.4f}", f"{measured[step].seen:.4f}"]
        assert values[2:4] == ([f"{scored[step].subject:.3f}", f"{scored[step].prompt:.3f}"] if step in scored else ["", ""])


def test_the_recommended_step_is_selected_until_the_user_selects_another(finished):
    suggested = verdict.suggested_step(finished)
    first = selection_of(view(finished), 100, 0, outdated=True)
    assert (first.step, first.forced) == (suggested, True)
    chosen = selection_of(view(finished), 100, 2, outdated=False)
    assert (chosen.step, chosen.prompt_index, chosen.forced) == (100, 2, False)
    gone = selection_of(view(finished), 7, 0, outdated=False)
    assert (gone.step, gone.forced) == (suggested, True)
    assert 'data-step="100" data-place="2" aria-label' in table(finished, 100, 2, False)
    assert len(re.findall('<button[^>]* class="shown"', table(finished, 100, 2, False))) == 1


def test_the_slider_enlarges_the_images_of_the_base_model_and_of_the_step_for_one_prompt(finished, tmp_path):
    made = look(finished, 60, 1, False)["slider"]
    assert made.key[:2] == (finished.samples_at(0) / "1.png", finished.samples_at(60) / "1.png")
    images = [Image.open(each["path"] if isinstance(each, dict) else each.path) for each in made.make().value]
    assert [image.filename.startswith(str(tmp_path / "cache")) for image in images] == [True, True]
    assert [image.size for image in images] == [(512, 512)] * 2
    assert [image.getpixel((300, 300)) for image in images] == [(0, 60, 128), (60, 60, 128)]
    assert look(finished, 60, 0, False)["slider"].key != made.key


def test_a_step_can_be_used_only_if_its_adapter_is_saved(finished):
    assert look(finished, 40, 0, False)["use"].key == (True, "Use step 40")
    adapter_at(finished, 40).rmdir()
    assert look(finished, 40, 0, False)["use"].key[0] is False


def test_during_training_the_results_so_far_are_shown_and_later_ones_announced(workspace):
    run = run_in(workspace.runs / "a", steps=50)
    found = look(run)
    assert "recommended when training is done" in found["suggestion"].key
    assert "appear here, side by side" in found["suggestion"].key
    assert (found["table"].make().value, found["curves"].key, found["figures"].key) == ("", "", "")
    assert found["frame"].key is False
    measure(run, curve((0, 20, 40)), scores((0, 40)))
    for step in (0, 40):
        add_samples(run, step)
    found = look(run)
    assert "The results so far are below." in found["suggestion"].key
    assert "step 40" in found["table"].make().value
    assert found["curves"].key.count("<figure") == 4
    assert "recommended" not in found["curves"].key + found["table"].make().value
    assert found["use"].key == (True, "Use step 40")


def test_no_step_is_recommended_for_a_run_that_ended_early(workspace):
    run = run_in(workspace.runs / "a", "stopped", steps=50)
    assert "did not finish, so no step is recommended.</b></p><p>Nothing was measured" in look(run)["suggestion"].key


def test_without_a_held_out_photo_only_the_scores_are_plotted(workspace):
    run = run_in(workspace.runs / "a", steps=50)
    for step, each in scores().items():
        run.log(step, **{f"{name}_score" if name != "nearest_limit" else name: value for name, value in vars(each).items()})
    shown = look(run)["curves"].key
    assert verdict.NO_LOSS in shown
    assert shown.count("<figure") == 3


def test_without_a_subject_run_the_screen_says_why_it_is_empty(workspace):
    assert "no results yet" in parts(None, None, None, True)["empty"].key
    run = run_in(workspace.runs / "a", "done")
    (run.path / "options.json").write_text(json.dumps({"target_layers": {}}))
    found = look(run)
    assert "on the screen\nClassify" in found["empty"].key
    assert found["table"].key == ""


def test_the_model_card_is_shown_without_its_header_and_the_certificate_as_a_sentence(finished):
    assert look(finished)["details"].key is False
    (finished.path / "README.md").write_text("---\ntags: [a]\n---\n# sks toy\n\n![it](before_after.png)\n\nNoRA\n\n---\nend\n")
    (finished.path / "certificate.json").write_text(
        json.dumps({**CERTIFICATE, "passed": True, "largest_difference": {"diffusers": 0.5}, "effect": 200.0, "problems": []})
    )
    found = look(finished)
    assert found["card"].key == "# sks toy\n\n\nNoRA\n\n---\nend"
    assert "largest pixel difference is 0.5 of 255; the adapter's effect is up to 200" in found["papers"].key
    (finished.path / "certificate.json").write_text(
        json.dumps({**CERTIFICATE, "passed": False, "largest_difference": {}, "effect": 0.0, "problems": ["<b> differs"]})
    )
    assert "differ from the trained adapter: &lt;b&gt; differs." in look(finished)["papers"].key
    (finished.path / "certificate.json").write_text(
        json.dumps(
            {**CERTIFICATE, "passed": True, "exact": False, "mean_difference": {"kohya": 2.5}, "mean_effect": 9.0, "problems": []}
        )
    )
    assert "images differ by 2.5 of 255 on average; the adapter's mean effect is 9." in look(finished)["papers"].key


def test_a_refresh_sends_only_what_has_changed(finished, tmp_path):
    for step in range(101, 501):
        finished.log(step, loss=1.0, lr=1e-3)
    page = build_page(Settings(runs_dir=tmp_path / "runs", sets_dir=tmp_path / "sets"))
    named = (fn for fn in page.fns.values() if "judge-samples" in [getattr(output, "elem_id", None) for output in fn.outputs])
    refresh = next(named).fn
    *_, seen = refresh("a", None, None, {}, None)
    for _ in range(2):
        *sent, seen = refresh("a", verdict.suggested_step(finished), 1, seen, None)
    assert all(each == gr.skip() for each in sent)
