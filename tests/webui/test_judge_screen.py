"""The screen Judge: images, curves and scores of every step, and the recommended step, from the run's files."""

import json
import re
from dataclasses import replace
from itertools import permutations

import pytest
from browsing import go_to, quiet
from PIL import Image
from playwright.sync_api import expect
from run_folders import CURVE_STEPS, PROMPTS, add_samples, curve, end_processes, finished_run, measure, run_in, scores

from pipelines.run_file import ResolvedOptions
from training.runs.preferences import Preferences
from training.runs.record import RunRecord
from training.subject.measured import adapter_at, metric_name
from webui.page import build_page
from webui.runs import RunView
from webui.screens.judge import (
    PLOTS,
    Choices,
    blind_choice,
    choices_of,
    content,
    recommended_step,
    record_choice,
)  # fmt: skip
from webui.workspace import Settings, Workspace

PATIENCE = 60_000


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty workspace; the processes of its runs are killed at the end."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    yield Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    end_processes()


def view(run):
    return RunView(RunRecord(run.path))


def at(run, step, prompt=0):
    """A choice of the user that is still valid."""
    return Choices(run.path.name, recommended_step(view(run)), step, prompt, (0, step, prompt))


def look(run, chosen=None):
    return content(view(run), choices_of(view(run), chosen))


@pytest.fixture
def finished(workspace):
    """A finished run whose validation loss is lowest at step 40."""
    return finished_run(workspace.runs / "a")


def test_samples_of_all_steps_are_side_by_side_with_the_base_model_first_and_the_recommended_step_marked(finished):
    shown = look(finished)["grid"].make().value
    heads = re.findall(r'<th scope="col"( class="recommended")?>(.*?)</th>', shown)
    recommended = recommended_step(view(finished))
    assert [head.split("<")[0].strip() for _, head in heads] == ["base model", "step 40", "step 60", "step 100"]
    assert [head for css, head in heads if css] == [f'step {recommended}<br><span class="chip good">Recommended</span>']
    assert shown.count('<td class="recommended">') == len(PROMPTS)
    cells = re.findall(r'data-step="(\d+)" data-prompt="(\d+)"', shown)
    assert cells == [(str(step), str(index)) for index in range(len(PROMPTS)) for step in (0, 40, 60, 100)]
    assert "&lt;b&gt;in the snow" in shown
    assert "<b>in the snow" not in shown
    assert 'class="scroll"' in shown


def test_the_reasons_and_warnings_of_the_run_are_shown(finished):
    said = json.loads((finished.path / "suggestion.json").read_text())
    said |= {"version": 2, "warnings": ["Overfitting: <i>it</i> rises."], "reasons": ["Step 40 is best.", "Figures follow."]}
    (finished.path / "suggestion.json").write_text(json.dumps(said))
    shown = look(finished)["recommendation"].key
    assert f"Step {said['step']} of 100" in shown
    assert "<p>Step 40 is best.</p>" in shown
    assert "<li>Figures follow.</li>" in shown
    assert '<p class="warning overfit">Overfitting: &lt;i&gt;it&lt;/i&gt; rises.</p>' in shown


def test_plots_show_losses_scores_limits_and_the_recommended_step(finished):
    rows = {title: look(finished)[title].key for title in PLOTS}
    assert [title for title, key in rows.items() if key] == list(PLOTS)
    for title, (names, _) in PLOTS.items():
        assert {name for *_, name in rows[title]} == {*names, "Recommended"}
        assert {x for x, y, name in rows[title] if name == "Recommended" and y is not None} == {recommended_step(view(finished))}
    assert [(x, y) for x, y, name in rows["Validation loss"] if name == "Validation loss"] == [
        (point.step, point.heldout) for point in curve()
    ]
    assert {y for _, y, name in rows["Memorisation"] if name == "Limit (photo)" and y is not None} == {0.9}


def test_the_table_of_measurements_has_the_logged_values(finished):
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', look(finished)["measurements"].key)
    measured, scored = {point.step: point for point in curve()}, scores()
    assert len(rows) == len(measured)
    for (name, cells), step in zip(rows, sorted(measured), strict=True):
        values = re.findall("<td>(.*?)</td>", cells)
        assert (f"step {step}" if step else "base model") in name
        assert values[:2] == [f"{measured[step].heldout:.4f}", f"{measured[step].seen:.4f}"]
        assert values[2:4] == ([f"{scored[step].subject:.3f}", f"{scored[step].prompt:.3f}"] if step in scored else ["", ""])


@pytest.mark.parametrize("folds", [True, False])
def test_the_table_says_why_the_last_step_has_no_validation_loss(finished, folds):
    assert "There is no validation loss" not in look(finished)["measurements"].key
    finished.log(120, loss=1.0, **{metric_name(name): value for name, value in vars(scores()[100]).items()})
    if folds:
        (finished.path / "folds").mkdir()
    shown = look(finished)["measurements"].key
    assert "There is no validation loss after step 100." in shown
    assert ("short trainings, each without one photo, that end there" in shown) == folds


def test_the_recommended_step_is_selected_until_the_user_selects_another(finished):
    recommended = recommended_step(view(finished))
    assert choices_of(view(finished), None).step == recommended
    assert choices_of(view(finished), at(finished, 100, 2)) == at(finished, 100, 2)
    assert choices_of(view(finished), at(finished, 7)).step == recommended
    assert choices_of(view(finished), replace(at(finished, 100), run_id="b")).step == recommended
    assert choices_of(view(finished), replace(at(finished, 100), recommended=None)).step == recommended
    shown = look(finished, at(finished, 100, 2))["grid"].make().value
    assert len(re.findall('<button[^>]* class="selected"', shown)) == 1
    assert 'data-step="100" data-prompt="2" class="selected" aria-current="true"' in shown


def test_the_slider_and_the_shared_image_show_the_base_model_and_the_step_for_one_prompt(finished, tmp_path):
    found = look(finished, at(finished, 60, 1))
    images = [Image.open(each["path"] if isinstance(each, dict) else each.path) for each in found["slider"].make().value]
    assert [image.filename.startswith(str(tmp_path / "cache")) for image in images] == [True, True]
    assert [image.size for image in images] == [(512, 512)] * 2
    assert [image.getpixel((300, 300)) for image in images] == [(0, 60, 128), (60, 60, 128)]
    shared = Image.open(found["share"].make().value["path"])
    assert shared.filename.endswith("sks-toy-step60-before-after.png")
    assert {(0, 60, 128), (60, 60, 128)} <= {color for _, color in shared.getcolors(2**20)}
    assert "60" in found["compared"].key
    assert "sks toy &lt;b&gt;in the snow&lt;/b&gt;" in found["compared"].key
    assert look(finished, at(finished, 60, 0))["slider"].key != found["slider"].key


def test_a_step_can_be_used_only_if_its_adapter_is_saved(finished):
    assert look(finished, at(finished, 40))["use"].key == (True, "Use step 40")
    adapter_at(finished, 40).rmdir()
    assert look(finished, at(finished, 40))["use"].key[0] is False


def test_a_blind_choice_is_recorded_and_shown_beside_the_scores(finished):
    chosen, pairs = None, []
    for side in ("left", "right", "equal"):
        chosen = choices_of(view(finished), chosen)
        *steps, prompt = chosen.pair
        pairs.append((tuple(steps), prompt))
        assert "step" not in re.sub("different steps|You preferred .*?</p>", "", blind_choice(view(finished), chosen))
        chosen = record_choice(view(finished), chosen, side)
        names = [f"step {step}" if step else "the base model" for step in steps]
        assert all(name in chosen.result for name in names)
        assert (chosen.result.index(names[0]) < chosen.result.index(names[1])) == (side == "left")
    recorded = Preferences.read(finished.path).choices
    assert [each.preferred for each in recorded] == [pairs[0][0][0], pairs[1][0][1], None]
    assert [(each.steps, each.prompt) for each in recorded] == [(steps, PROMPTS[prompt]) for steps, prompt in pairs]
    shown = look(finished)["measurements"].key
    for step, (preferred, compared) in Preferences.read(finished.path).counts().items():
        assert re.search(rf"{f'step {step}' if step else 'base model'}.*<td>{preferred} of {compared}</td></tr>", shown)


def test_all_pairs_of_images_come_in_both_orders(finished):
    drawn = {choices_of(view(finished), None).pair for _ in range(2000)}
    assert drawn == {(*steps, prompt) for steps in permutations((0, 40, 60, 100), 2) for prompt in range(len(PROMPTS))}


def test_during_training_the_results_so_far_are_shown_and_later_ones_announced(workspace):
    run = run_in(workspace.runs / "a", steps=50)
    found = look(run)
    assert "recommended when training is done" in found["recommendation"].key
    assert "appear here, side by side" in found["recommendation"].key
    assert (found["grid"].make().value, found["measurements"].key, found["compare"].key[0]) == ("", "", False)
    assert [found[title].key for title in PLOTS] == [None] * 4
    measure(run, curve((0, 20, 40)), scores((0, 40)))
    for step in (0, 40):
        add_samples(run, step)
    found = look(run)
    assert "The results so far are below." in found["recommendation"].key
    assert "step 40" in found["grid"].make().value
    assert all(found[title].key for title in PLOTS)
    assert "Recommended" not in found["measurements"].key + found["grid"].make().value
    assert found["use"].key == (True, "Use step 40")


def test_no_step_is_recommended_for_a_run_that_ended_early(workspace):
    run = run_in(workspace.runs / "a", "stopped", steps=50)
    assert "did not finish, so no step is recommended.</b></p><p>Nothing was measured" in look(run)["recommendation"].key


def test_without_a_held_out_photo_only_the_scores_are_plotted(workspace):
    run = run_in(workspace.runs / "a", steps=50)
    for step, each in scores().items():
        run.log(step, **{metric_name(name): value for name, value in vars(each).items()})
    found = look(run)
    assert "No photo was held out, so there is no validation loss." in found["measurements"].key
    assert [bool(found[title].key) for title in PLOTS] == [False, True, True, True]


def test_without_a_subject_run_the_screen_says_why_it_is_empty(workspace):
    assert "no results yet" in content(None, None)["empty"].key
    run = run_in(workspace.runs / "a", "done")
    (run.path / "options.json").write_text(json.dumps({"target_layers": {}}))
    found = look(run)
    assert "on the screen Classify" in found["empty"].key
    assert found["results"].key[0] is False


def test_the_model_card_is_shown_without_its_header(finished):
    assert look(finished)["details"].key[0] is False
    (finished.path / "README.md").write_text("---\ntags: [a]\n---\n# sks toy\n\n![it](before_after.png)\n\nNoRA\n\n---\nend\n")
    assert look(finished)["card"].key == "# sks toy\n\n\nNoRA\n\n---\nend"


def test_a_refresh_sends_only_what_has_changed(finished, tmp_path):
    for step in range(101, 501):
        finished.log(step, loss=1.0, lr=1e-3)
    page = build_page(Settings(runs_dir=tmp_path / "runs", sets_dir=tmp_path / "sets"))
    named = (fn for fn in page.fns.values() if "judge-samples" in [getattr(output, "elem_id", None) for output in fn.outputs])
    (*_, chosen_state, seen_state), refresh = (found := next(named)).outputs, found.fn
    chosen, seen = None, {}
    for _ in range(3):
        sent = refresh("a", chosen, seen, None)
        chosen, seen = sent.pop(chosen_state), sent.pop(seen_state)
    assert sent == {}
    sent = refresh("a", replace(chosen, result="You preferred it."), seen, None)
    (choice,) = sent.keys() - {chosen_state, seen_state}
    assert "You preferred it." in sent[choice].value


# Whether the first line on the screen has that many points.
POINTS = """points => document.querySelector('#judge-plots .mark-line path').getAttribute('d').split('L').length === points"""


# The text of the cells of the measurements, the head first.
CELLS = """[...document.querySelectorAll('#judge-figures tr')].map(row => [...row.cells].map(cell => cell.textContent.trim()))"""
STEP = re.compile(r"step \d+|base model")
VERDICT = re.compile(r"(.+?) ([\d.]+); range over all steps ([\d.]+) \((.+)\) to ([\d.]+) \((.+)\)\.")


def shown_measurements(page):
    """The columns of the table on the page: the values, as they are written, by the name of the step."""
    (_, *names), *rows = page.evaluate(CELLS)
    heads, *columns = zip(*rows, strict=True)
    steps = [STEP.match(head)[0] for head in heads]
    return {name: dict(zip(steps, column, strict=True)) for name, column in zip(names, columns, strict=True)}


def verdict_agrees_with_the_table(page, recommended):
    """Each sentence of the verdict has the value of its step, the lowest and the highest value of the table, and their steps."""
    table = shown_measurements(page)
    sentences = [VERDICT.fullmatch(text) for text in page.locator("#judge-suggestion li").all_text_contents()]
    told = {found[1]: found.groups()[1:] for found in sentences if found}
    assert told.keys() == table.keys() & {"Validation loss", "Image similarity (CLIP-I)", "Prompt similarity (CLIP-T)"}
    for name, (value, *ends) in told.items():
        column = {step: value for step, value in table[name].items() if value}
        low, high = min(column, key=lambda step: float(column[step])), max(column, key=lambda step: float(column[step]))
        assert (value, *ends) == (column[recommended], column[low], low, column[high], high), name


def test_judge_in_a_browser_before_and_after_the_first_run(app_server, new_page, screenshot, tmp_path):
    server = app_server()
    page = new_page(server.url)
    page.set_default_timeout(PATIENCE)
    for screen, words in (("use", "There is no adapter yet"), ("judge", "There are no results yet")):
        go_to(page, screen)
        expect(page.locator(f"#{screen}-empty")).to_contain_text(words, timeout=PATIENCE)
        expect(page.locator("#use-generate, #judge-plots").locator("visible=true")).to_have_count(0)

    first = finished_run(server.runs / "20260101-000001-first")
    # Its images were measured at the last step, and its loss not.
    shorter = run_in(server.runs / "20260101-000002-second", "done", total=60)
    measure(shorter, curve((0, 20, 40)), scores((0, 40, 60)))
    ResolvedOptions({"data": {"instance_prompt": "a second toy"}}).write(shorter.path)
    page.evaluate("document.getElementById('relist').click()")

    for name, points in (("20260101-000002-second", 3), ("20260101-000001-first", len(CURVE_STEPS))):
        page.locator(f'#run button[data-run="{name}"]').first.dispatch_event("click")
        words = "recommended" if points == 3 else "Recommended"
        expect(page.locator("#judge-suggestion")).to_contain_text(words, timeout=PATIENCE)
        expect(page.locator("#judge-plots svg.marks")).to_have_count(4, timeout=PATIENCE)
        page.wait_for_function(POINTS, arg=points)
        *_, last = shown_measurements(page)["Validation loss"].values()
        reason = page.locator("#judge-figures", has_text="There is no validation loss after step 40.")
        assert (bool(last), reason.count()) == (points > 3, points == 3)
    verdict_agrees_with_the_table(page, f"step {recommended_step(view(first))}")
    # Plots are not drawn again when their screen is opened again.
    drawn = page.locator("#judge-plots svg.marks")
    drawn.evaluate_all("plots => plots.forEach(plot => { plot.dataset.drawn = 'before' })")
    go_to(page, "train")
    go_to(page, "judge")
    page.evaluate(
        """() => { window.changes = 0; const seen = new MutationObserver(list => window.changes += list.length);
        for (const plot of document.querySelectorAll('#judge-plots .vega-embed'))
          seen.observe(plot, {subtree: true, childList: true, attributes: true}); }"""
    )
    for _ in range(3):
        page.evaluate("noraVision.refresh()")
        quiet(page)
    assert page.evaluate("window.changes") == 0, "plots are drawn again although nothing changed"
    assert drawn.evaluate_all("plots => plots.map(plot => plot.dataset.drawn)") == ["before"] * 4
    screenshot(page, "each/judge")
    page.locator('#judge-samples button[data-step="100"][data-prompt="2"]').click()
    expect(page.locator("#judge-use")).to_contain_text("Use step 100")
    with page.expect_download() as download:
        page.locator("#judge-share").click()
    assert download.value.suggested_filename.endswith("step100-before-after.png")
    page.locator('#judge-choice button[data-side="left"]').click()
    expect(page.locator("#judge-choice [role=status]")).to_contain_text("You preferred")
    expect(page.locator("#judge-figures thead")).to_contain_text("You preferred")
    assert len(Preferences.read(server.runs / "20260101-000001-first").choices) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
