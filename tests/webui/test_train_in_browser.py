"""A run with a stand-in trainer in a real browser: followed, stopped, resumed, reloaded, killed and judged."""

import re
import shutil

import psutil
import pytest
from app_process import REPOSITORY
from browsing import go_to, reload
from playwright.sync_api import expect
from processes import wait_for
from stand_in_app import standing_for_training
from stand_in_trainer import TOTAL, UNTIL

from training.runs.progress import PlannedPhase, RunProgress
from training.runs.record import RunRecord, update_status
from training.runs.run_files import CROSS_VALIDATION, TRAINING, Suggestion
from webui import launching
from webui.runs import RunView
from webui.workspace import Workspace

PATIENCE = 120_000
BUTTONS = ("stop", "sample", "save", "resume", "next")
AT_WORK = ("stop", "sample", "save")


@pytest.fixture(scope="module")
def server(app_server):
    """One server for all tests of this module."""
    return app_server(script="tests/webui/stand_in_app.py")


@pytest.fixture
def started(server, images_dir, monkeypatch):
    """The record of a run that was started as by the page, and waits after its first steps."""
    # Started by the test as the server resumes a run.
    monkeypatch.setattr(launching, "_with_launcher", standing_for_training)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    workspace = Workspace(server.runs, server.uploads, is_local=True)
    options = {"data": {"instance_data_dir": str(images_dir), "instance_prompt": "sks toy"}}
    return workspace.run(launching.start(workspace, "subject", options))


def opened(new_page, server):
    page = new_page()
    page.set_default_timeout(PATIENCE)
    page.set_default_navigation_timeout(PATIENCE)
    page.goto(server.url)
    go_to(page, "train")
    return page


def trains_to(page, record, step):
    """Let the run continue to `step`, and wait until the page shows the step."""
    (record.path / UNTIL).write_text(str(step))
    expect(page.locator("#train-bar")).to_contain_text(f"{step}% · step {step} of {TOTAL}", timeout=PATIENCE)


def shows(page, *names):
    """Wait until the screen shows exactly these buttons."""
    for name in BUTTONS:
        expect(page.locator(f"#train-{name}")).to_be_visible(visible=name in names, timeout=PATIENCE)


def says(page, words, place="#train-state"):
    expect(page.locator(place)).to_contain_text(words, timeout=PATIENCE)


@pytest.mark.slow(25)
def test_a_run_is_followed_stopped_resumed_and_judged(new_page, server, started, screenshot):
    record = started
    page = opened(new_page, server)
    trains_to(page, record, 20)
    expect(page.locator("#train-loss svg").first).to_be_visible(timeout=PATIENCE)
    image = page.locator("#train-samples img").first
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 16
    shows(page, *AT_WORK)
    screenshot(page, "each/train-running")

    page.locator("#train-stop").click()
    says(page, "You stopped it.")
    shows(page, "resume")
    assert record.status().step == 20

    page.locator("#train-resume").click()
    trains_to(page, record, 30)
    reload(page)
    go_to(page, "train")
    trains_to(page, record, 40)
    (record.path / UNTIL).write_text(str(TOTAL))
    says(page, "Done in")
    shows(page, "next")
    screenshot(page, "each/train-done")

    page.locator("#train-next").click()
    says(page, f"Step {Suggestion.read(record.path).step} of {TOTAL}", "#judge-suggestion")
    expect(page.locator("#judge-slider img").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#judge-plots .plot:visible svg.marks")).to_have_count(4, timeout=PATIENCE)
    expect(page.locator("#judge-samples thead th")).to_have_count(len(list(record.samples.glob("step-*"))), timeout=PATIENCE)
    page.locator('#judge-samples button[data-step="60"][data-prompt="0"]').click()
    says(page, "Use step 60", "#judge-use")
    screenshot(page, "each/judge-done")
    page.locator("#judge-use").click()
    expect(page.locator("#use-step input")).to_have_value(re.compile("60"), timeout=PATIENCE)

    # The next run replaces it on Train at once, even if the page hears of no change. Its bar does not begin at the end.
    page.route("**/activity", lambda route: route.fulfill(json={"revision": "same", "runs": []}))
    go_to(page, "photos")
    page.locator("#photos-train").click(timeout=PATIENCE)
    expect(page.locator("#train-state .run-state")).not_to_have_attribute("data-run", record.path.name, timeout=PATIENCE)
    assert page.locator("#train-state .run-state").get_attribute("data-state") in ("queued", "starting", "running")
    page.unroute("**/activity")
    bar = page.locator("#train-bar .bar")
    expect(bar).to_be_visible(timeout=PATIENCE)
    assert bar.evaluate("bar => bar.firstElementChild.getBoundingClientRect().width / bar.clientWidth") < 0.5
    page.locator("#train-stop").click()
    says(page, "You stopped it.")


@pytest.mark.slow(25)
def test_a_killed_run_is_reported_and_resumed_and_a_killed_server_loses_nothing(new_page, server, started):
    record = started
    page = opened(new_page, server)
    trains_to(page, record, 20)
    psutil.Process(record.status().pid).kill()
    says(page, "Resume continues from there.")
    expect(page.locator("#train-phase .chip.interrupted")).to_be_visible(timeout=PATIENCE)
    shows(page, "resume")
    page.locator("#train-resume").click()
    trains_to(page, record, 30)

    server.kill()
    process = record.status().pid
    assert RunView(RunRecord(record.path)).state == "running"
    page.context.close()
    server.start()
    # Failed requests to the killed server are not errors of the page.
    page.errors.clear()
    again = opened(new_page, server)
    trains_to(again, record, 40)
    assert record.status().pid == process
    (record.path / UNTIL).write_text(str(TOTAL))
    says(again, "Done in")
    wait_for(lambda: [line.step for line in record.metrics() if "loss" in line.values] == list(range(1, TOTAL + 1)))


def test_folds_have_one_bar_and_one_time_left(new_page, server):
    """Four folds of ten minutes and a training of twenty: each half takes its time off the total, which never begins again."""
    now, run = 0.0, RunRecord(server.runs / "20990101-000000-folds")
    phases = [(CROSS_VALIDATION, fold) for fold in (1, 2, 3, 4)] + [(TRAINING, None)]
    progress = RunProgress(lambda: now)
    progress.expect([PlannedPhase(name, 600.0 if fold else 1200.0, fold) for name, fold in phases])
    run.path.mkdir(parents=True)
    page, shown = None, []
    for name, fold in phases:
        progress.enter(name, fold)
        now += 300.0 if fold else 600.0
        progress.reach(0.5)
        update_status(run, state="running", phase=name, fold=fold, folds=4, step=5, total=10, **progress.fields())
        now += 300.0
        page = page or opened(new_page, server)
        page.evaluate("noraVision.refresh()")
        says(page, f"fold {fold} of 4" if fold else "Training", "#train-phase")
        bar = page.locator("#train-bar")
        shown.append((bar.locator(".bar").get_attribute("aria-valuenow"), re.search(r"(\d+) minutes left", bar.inner_text())[1]))
    assert shown == [("8", "55"), ("25", "45"), ("42", "35"), ("58", "25"), ("83", "10")]
    shutil.rmtree(run.path)
