"""The screen Runs: the actions on a run, and the comparison of runs, with and without a browser."""

import json
import re
import shutil

import gradio as gr
import pytest
from browsing import go_to
from class_folders import colour_set
from playwright.sync_api import expect
from run_folders import add_report, add_samples, finished_run, run_in

from pipelines.errors import InputError
from pipelines.fewshot.metric_values import Interval
from training.runs.naming import set_title
from webui import inference_jobs
from webui.draft import Draft
from webui.render import render
from webui.runs import RunView
from webui.screens.runs import NO_ADAPTER, cards, comparable, comparison, draft_like, generated_with_all, plots
from webui.tasks import ClassifierPlan, SubjectPlan
from webui.workspace import Workspace

PATIENCE = 120_000
NASTY = "<script>alert(1)</script>\"'&"


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


def with_options(run, **groups):
    """Change the options of a run; returns the run."""
    found = json.loads((run.path / "options.json").read_text())
    (run.path / "options.json").write_text(json.dumps({**found, **groups}))
    return run


def classifier(folder, name="nora", value=0.8, shots=4):
    """A finished run of a classifier."""
    run = with_options(run_in(folder, "done"), target_layers={}, data={"data_dir": None, "seeds": [0]}, method={"method": [name]})
    add_report(run, name, Interval(value, value - 0.1, value + 0.1), shots)
    return run


def test_runs_are_compared_by_images_of_the_same_prompt_and_seed_and_by_options_that_differ(workspace):
    finished_run(workspace.runs / "a")
    data = {"instance_prompt": "a photo of sks toy", "instance_data_dir": "/srv/duck"}
    with_options(finished_run(workspace.runs / "b"), adapter={"method": "lora", "rank": 4}, data=data)
    runs = comparable(workspace, ["a", "b"])
    shown = comparison(runs)
    assert shown.count("<img") == 6
    assert shown.count("a photo of sks toy (seed 0)") == 1
    assert shown.count("step ") >= 2
    assert "adapter: method" in shown
    assert "instance_prompt" not in shown
    assert "default" in shown
    assert "<td>duck</td>" in shown
    assert "/srv" not in shown
    for title, plot in plots(runs).items():
        (table,) = re.findall(rf'<table class="heard"><caption>{re.escape(title)}</caption>.*?</table>', shown, re.DOTALL)
        assert {"<th>A</th>", "<th>B</th>"} == set(re.findall("<th>[A-D]</th>", table))
        assert {name for *_, name in plot.update().key} == {"A", "B"}, plot.title


def test_runs_with_different_prompts_offer_to_generate_the_same_one(workspace):
    for name, prompts in (("a", ("one",)), ("b", ("two",))):
        add_samples(run_in(workspace.runs / name, "done"), 100, prompts=prompts)
    run_in(workspace.runs / "c", "done")
    for other in "bc":
        shown = comparison(comparable(workspace, ["a", other]))
        assert "no sample images with the same prompt and seed" in shown


def test_runs_with_the_same_options_have_no_differences(workspace):
    for name in "ab":
        finished_run(workspace.runs / name)
    assert "None. The runs have the same options." in comparison(comparable(workspace, ["a", "b"]))


def test_classifiers_are_compared_by_their_accuracies_with_intervals(workspace):
    classifier(workspace.runs / "a")
    classifier(workspace.runs / "b", "lora", 0.55)
    shown = comparison(comparable(workspace, ["a", "b"]))
    assert "80% (70% to 90%)" in shown
    assert "55% (45% to 65%)" in shown
    assert "NoRA, 4 images per class" in shown
    assert "method: method" in shown
    (workspace.runs / "a" / "report.json").unlink()
    (workspace.runs / "b" / "report.json").unlink()
    assert "no accuracy yet" in comparison(comparable(workspace, ["a", "b"]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "Choose 2 to 4 runs"),
        (["a", "a"], "Choose 2 to 4 runs to compare, got 1"),
        (["a", "b", "c", "d", "e"], "got 5"),
        (["a", "digits"], "runs of the same kind"),
        (["a", "../b"], "This run does not exist"),
        (["a", None], "This run does not exist"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(workspace, ids, message):
    for name in "abcde":
        run_in(workspace.runs / name, "done")
    classifier(workspace.runs / "digits")
    with pytest.raises(InputError, match=message):
        comparable(workspace, ids)


def test_user_input_is_escaped_in_the_comparison(workspace):
    for name in "ab":
        run = with_options(finished_run(workspace.runs / name), data={"instance_prompt": NASTY + name, NASTY: NASTY + name})
        add_samples(run, 60, prompts=(NASTY,))
        add_samples(run, 100, prompts=(NASTY,))
    runs = comparable(workspace, ["a", "b"])
    shown = comparison(runs) + render("runs_question.html", run=runs[0])
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


def test_a_duplicate_has_the_run_s_photos_if_they_were_uploaded_by_the_user(workspace, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", said.append)
    own = workspace.new_image_set().absolute()
    data = {"instance_data_dir": str(own), "instance_prompt": "a photo of zwx dog"}
    draft = Draft.from_browser(draft_like(workspace, SubjectPlan, {}, {"data": data, "optimisation": {"max_train_steps": 40}}))
    settings = draft.settings[own.name]
    assert (draft.set, settings.trigger, settings.class_word) == (own.name, "zwx", "dog")
    assert settings.options == {"optimisation": {"max_train_steps": 40}}
    assert said == []
    for elsewhere in (tmp_path, own / "..", workspace.sets / "none"):
        assert draft_like(workspace, SubjectPlan, {}, {"data": {"instance_data_dir": str(elsewhere)}})["set"] is None
    assert len(said) == 3
    classes = colour_set(workspace, tmp_path / "given")
    options = {"data": {"data_dir": str(classes.folder.absolute()), "class_names": ["c00=a"], "views": 2}}
    again = Draft.from_browser(draft_like(workspace, ClassifierPlan, {}, options))
    assert again.set == classes.id
    assert again.settings[classes.id].options["data"]["views"] == 2
    assert Draft.from_browser(draft_like(workspace, ClassifierPlan, {}, {})).set == "digits"


def test_a_prompt_is_generated_with_the_adapter_of_each_run_that_has_one(workspace, monkeypatch, tmp_path):
    with_options(finished_run(workspace.runs / "a"), model={"pretrained_model_name_or_path": "mini-sdxl"})
    run_in(workspace.runs / "b", "done")
    image, requests = workspace.runs / "a" / "samples" / "step-0000100" / "0.png", []

    def generate(report, within, request):
        requests.append((request.adapters[0].reference, request.prompt, request.seed, request.count))
        report("half")
        report(image)

    monkeypatch.setattr(inference_jobs, "generate", generate)
    tables = list(generated_with_all(workspace, comparable(workspace, ["a", "b"]), NASTY, 7))
    assert requests == [("a@60", NASTY, 7, 1)]
    assert "generating" in tables[0]
    assert tables[-1].count("<img") == 1
    assert NO_ADAPTER in tables[-1]
    assert "<script" not in tables[-1]


def test_before_the_first_run_the_list_says_what_to_do():
    assert "There are no runs yet" in cards([], None)


def test_the_selected_run_is_marked_with_the_reason_why_it_ended(workspace):
    run_in(workspace.runs / "a", "interrupted")
    shown = cards([RunView(workspace.run("a"))], "a")
    assert 'aria-pressed="true"' in shown
    assert "Its process ended without reporting an error" in shown
    assert 'class="chip interrupted"' in shown


@pytest.fixture(scope="module")
def server(app_server):
    """A server with runs of several kinds."""
    server = app_server()
    set_title(finished_run(server.runs / "20260101-000001-first").path, "First duck")
    fast = next(preset for preset in SubjectPlan.presets if preset.name == "Fast").options(5, "lora")
    other = with_options(finished_run(server.runs / "20260101-000002-other"), **fast, adapter={"method": "lora"})
    set_title(other.path, "Other duck")
    run_in(server.runs / "20260101-000003-cut", "interrupted", steps=40)
    (classifier(server.runs / "20260101-000004-digits").path / "report.json").unlink()
    return server


def open_runs(page):
    """Open the screen, on a narrow page too."""
    page.set_default_timeout(PATIENCE)
    go_to(page, "runs")
    page.wait_for_selector("#runs-list button.run")


def card(page, name):
    return page.locator(f'button.run[data-run="{name}"]')


def pick(page, *names):
    """Select runs to compare."""
    for name in names:
        page.locator("#runs-compare input").click()
        page.locator("#runs-compare [role=option]", has_text=name).first.click()
    page.keyboard.press("Escape")


def test_a_run_is_selected_compared_and_deleted_after_a_confirmation(server, new_page, screenshot):
    page = new_page(server.url)
    open_runs(page)
    assert page.locator("button.run").count() == 4
    card(page, "20260101-000003-cut").click()
    page.wait_for_selector("#runs-resume")
    page.locator("#runs-title input, #runs-title textarea").fill("Cut duck")
    page.keyboard.press("Enter")
    card(page, "20260101-000003-cut").get_by_text("Cut duck").wait_for()
    assert not page.locator("#runs-stop").is_visible()
    screenshot(page, "runs")
    page.click("#runs-delete")
    page.wait_for_selector("#runs-confirm", state="visible")
    page.click("#runs-delete-no")
    page.wait_for_selector("#runs-confirm", state="hidden")
    assert (server.runs / "20260101-000003-cut").exists()
    page.click("#runs-delete")
    page.wait_for_selector("#runs-delete-yes", state="visible")
    # It looks like a button, a red one.
    colour = page.locator("#runs-delete-yes").evaluate("button => getComputedStyle(button).backgroundColor")
    red, green, blue = map(int, re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups())
    assert red > 2 * (green + blue)
    page.click("#runs-delete-yes")
    card(page, "20260101-000003-cut").wait_for(state="detached")
    assert not (server.runs / "20260101-000003-cut").exists()
    assert page.locator("button.run").count() == 3

    # A run that another tab deletes just before the click. The page has not asked for changes since.
    page.route("**/activity", lambda route: route.fulfill(json={"revision": "same", "runs": []}))
    run_in(server.runs / "20260101-000005-gone", "done")
    page.evaluate("noraVision.refresh('runs')")
    card(page, "20260101-000005-gone").click()
    page.wait_for_selector("#runs-duplicate")
    shutil.rmtree(server.runs / "20260101-000005-gone")
    page.click("#runs-open")
    page.get_by_text("This run does not exist. Choose one from the list.").wait_for()


def test_two_runs_are_compared_and_a_duplicate_opens_check(server, new_page, screenshot):
    page = new_page(server.url, dark=True)
    open_runs(page)
    pick(page, "Other duck", "First duck")
    page.click("#runs-compare-show")
    page.wait_for_selector(".compare table")
    assert page.locator(".compare td img").count() == 6
    expect(page.locator(".plot:visible svg.marks")).to_have_count(4)
    screenshot(page, "runs-compared")
    card(page, "20260101-000002-other").click()
    page.wait_for_selector('button.run[data-run="20260101-000002-other"][aria-pressed="true"]')
    page.click("#runs-duplicate")
    page.wait_for_selector("#screen-check", state="visible")
    expect(page.locator("#check-preset input:checked")).to_have_value("Fast", timeout=PATIENCE)
    expect(page.locator("#check-plan")).to_contain_text("Fast · 1 setting changed", timeout=PATIENCE)
    page.click("#check-command-shown > button")
    expect(page.locator("#check-command")).to_contain_text("--max_train_steps 160", timeout=PATIENCE)


def test_runs_fits_a_phone(server, new_page, screenshot):
    page = new_page(server.url, size="phone")
    open_runs(page)
    screenshot(page, "runs-phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
