"""A training on the tiny model, followed in a real browser: watched, reloaded, stopped, resumed, killed, and judged."""

import re
import time

import psutil
import pytest
from browsing import go_to, reload

from training.runs.record import RunRecord
from webui import launching
from webui.views import RunView
from webui.workspace import Workspace

PATIENCE = 300_000
STEPS = 600
RUN_OPTIONS = {
    "data": {"instance_prompt": "sks toy", "heldout_image": "0.png"},
    "adapter": {"rank": 4, "inner_r": 2, "target_modules": ["to_v"]},
    "optimisation": {"max_train_steps": STEPS, "train_batch_size": 1, "lr_warmup_steps": 10},
    "output": {"validation_prompt": ["sks toy", "sks toy at night"], "validation_steps": 200, "checkpointing_steps": 20},
    "judging": {"heldout_steps": 150, "certify": False},
}


@pytest.fixture(scope="module")
def server(app_server):
    """One server for all of these tests."""
    return app_server()


@pytest.fixture
def workspace(server):
    """The server's, seen from here."""
    return Workspace(server.runs, server.uploads, is_local=True)


@pytest.fixture
def started(workspace, tiny_model, pictures_dir):
    """Starts a run as the page does; returns its record."""

    def start(steps=STEPS):
        options = {group: dict(fields) for group, fields in RUN_OPTIONS.items()}
        options["data"]["instance_data_dir"] = str(pictures_dir)
        options["model"] = {"pretrained_model_name_or_path": str(tiny_model)}
        options["optimisation"]["max_train_steps"] = steps
        return workspace.run(launching.start(workspace, "subject", options))

    return start


def opened(new_page, server):
    page = new_page()
    page.set_default_timeout(PATIENCE)
    page.set_default_navigation_timeout(PATIENCE)
    page.goto(server.url)
    go_to(page, "train")
    return page


def wait_for_words(page, words, place="#train-phase"):
    page.locator(place).get_by_text(words).first.wait_for(timeout=PATIENCE)


def wait_for_steps(page, steps):
    """Wait until the page says that more than `steps` steps are done; returns how many it says."""
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end:
        found = re.search(
            r"(\d+) of \d+ steps", page.locator("#train-bar").inner_text() if page.locator("#train-bar").count() else ""
        )
        if found and int(found[1]) > steps:
            return int(found[1])
        page.wait_for_timeout(200)
    raise AssertionError(page.locator("#screen-train").inner_text())


def visible(page, *names):
    return {name for name in names if page.locator(f"#train-{name}").is_visible()}


def wait_until_quiet(page, seconds=5):
    """Wait until the page has asked the server nothing for some seconds."""
    asked = [time.monotonic()]
    page.on("request", lambda request: asked.append(time.monotonic()) if "queue/join" in request.url else None)
    wait_until(page, lambda: time.monotonic() - asked[-1] > seconds)


def wait_until(page, what):
    end = time.monotonic() + PATIENCE / 1000
    while not what():
        assert time.monotonic() < end
        page.wait_for_timeout(100)


@pytest.mark.slow
def test_a_run_is_followed_stopped_resumed_reloaded_and_judged(new_page, server, started, screenshot):
    record = started()
    page = opened(new_page, server)
    wait_for_steps(page, 0)
    page.locator("#train-loss svg").first.wait_for(timeout=PATIENCE)
    page.locator("#train-samples img").first.wait_for(timeout=PATIENCE)
    assert page.locator("#train-samples img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 16
    assert visible(page, "stop", "sample", "save", "resume", "next") == {"stop", "sample", "save"}
    screenshot(page, "each/train-running")

    page.locator("#train-stop").click()
    wait_for_words(page, "You stopped it.")
    wait_until(page, lambda: visible(page, "stop", "sample", "save", "resume", "next") == {"resume"})
    stopped = record.status()["step"]
    assert 0 < stopped < STEPS
    wait_until_quiet(page)

    page.locator("#train-resume").click()
    steps = wait_for_steps(page, stopped)

    reload(page)
    go_to(page, "train")
    assert wait_for_steps(page, 0) >= steps
    wait_for_words(page, "Done in")
    wait_until(page, lambda: visible(page, "stop", "sample", "save", "resume", "next") == {"next"})
    assert [line["step"] for line in record.metrics() if "loss" in line] == list(range(1, STEPS + 1))
    screenshot(page, "each/train-done")

    page.locator("#train-next").click()
    page.locator("#judge-suggestion").get_by_text(f"Step {record.status()['suggested_step']} of {STEPS}").wait_for(
        timeout=PATIENCE
    )
    page.locator("#judge-slider img").first.wait_for(timeout=PATIENCE)
    assert page.locator("#judge-curves figure").count() == 4
    wait_until(page, lambda: page.locator("#judge-samples thead th").count() == len(list(record.samples.glob("step-*.png"))))
    page.locator('#judge-samples button[data-step="400"][data-place="0"]').click()
    page.locator("#judge-use", has_text="Use step 400").wait_for(timeout=PATIENCE)
    screenshot(page, "each/judge-done")
    page.locator("#judge-use").click()
    wait_until(page, lambda: "400" in page.locator("#use-step input").input_value())


@pytest.mark.slow
def test_a_killed_process_is_told_and_resume_goes_on_and_a_killed_server_loses_nothing(new_page, server, started):
    record = started()
    page = opened(new_page, server)
    wait_for_steps(page, 20)
    process = psutil.Process(record.status()["pid"])
    process.kill()
    wait_for_words(page, "Resume goes on from there.")
    page.locator("#train-phase .chip.interrupted").wait_for(timeout=PATIENCE)
    assert visible(page, "stop", "sample", "save", "resume", "next") == {"resume"}
    killed_at = record.status()["step"]
    page.locator("#train-resume").click()
    wait_for_steps(page, killed_at)

    server.kill()
    before = record.status()
    assert RunView(RunRecord(record.path)).state == "running"
    page.context.close()
    server.start()
    # What the page says to the dead server is no error of the page.
    page.errors.clear()
    again = opened(new_page, server)
    assert wait_for_steps(again, before["step"]) > before["step"]
    assert record.status()["pid"] == before["pid"]
    wait_for_words(again, "Done in")
    assert [line["step"] for line in record.metrics() if "loss" in line] == list(range(1, STEPS + 1))
