"""What the page does around its screens: it is still while nothing changes, tells what runs, and its address remembers."""

import json
import re
import time

import pytest
from browsing import go_to, quiet, reload
from playwright.sync_api import expect
from run_folders import end_processes, finished_run, run_in

PATIENCE = 60_000
DONE, ACTIVE = "29990101-000001-done", "20260101-000000-active"
COUNT = """() => {
  window.counted = {changes: 0};
  new MutationObserver(records => { window.counted.changes += records.length; })
    .observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
}"""
COUNT_FRAMES = """{
  const request = window.requestAnimationFrame.bind(window);
  window.frameCount = 0;
  window.requestAnimationFrame = (callback) => { window.frameCount += 1; return request(callback); };
  window.noted = [];
  window.Notification = class { constructor(title, options) { Object.assign(this, options, {title}); window.noted.push(this); } };
  window.Notification.permission = "default";
  window.Notification.requestPermission = async () => { window.Notification.permission = "granted"; };
}"""
RUNNING = "document.getAnimations().filter(each => each.playState === 'running').length"
# More than two looks for changes.
SECONDS = 5


@pytest.fixture(scope="module")
def server(app_server):
    """A server with a finished run and one that seems to go on."""
    server = app_server()
    finished_run(server.runs / DONE)
    run_in(server.runs / ACTIVE, steps=40, share=0.4)
    yield server
    end_processes()


def end(run):
    """Let a run be done."""
    status = run / "status.json"
    ended = {"state": "done", "phase": "done", "step": 100, "seconds": 60.0}
    status.write_text(json.dumps(json.loads(status.read_text()) | ended))


def tab(page):
    return page.locator("#screens > .tab-wrapper [aria-selected=true]")


@pytest.mark.slow(60)
def test_a_page_is_still_while_a_run_is_active_and_nothing_changes(server, new_page):
    page = new_page()
    page.emulate_media(reduced_motion="no-preference")
    page.add_init_script(COUNT_FRAMES)
    page.goto(server.url)
    page.wait_for_selector("#screens", timeout=PATIENCE)
    expect(page.locator("#activity")).to_contain_text("40%", timeout=PATIENCE)
    assert page.title().startswith("40% sks toy")
    # The permission to notify is asked for by a button, once.
    page.locator("#activity button").click()
    expect(page.locator("#activity button")).to_be_hidden()
    for screen in ("photos", "train", "runs"):
        go_to(page, screen)
        quiet(page)
        # The checks of the example photos, for which the worker loads a model, change the page when they are done.
        page.locator("body:not([data-busy])").wait_for(timeout=PATIENCE)
        page.wait_for_timeout(2000)
        page.evaluate(COUNT)
        before = page.asked, page.evaluate("frameCount")
        page.wait_for_timeout(1000 * SECONDS)
        assert page.asked == before[0], screen
        assert page.evaluate("frameCount") - before[1] <= 2, screen
        assert page.evaluate("counted.changes") == 0, screen
        assert page.evaluate(RUNNING) == 0, screen

    # The end of the run is told, the open screen shows it, and the line goes away.
    end(server.runs / ACTIVE)
    expect(page.locator("#activity")).to_be_hidden(timeout=PATIENCE)
    assert page.title() == "NoRA Vision"
    assert page.evaluate("noted.map(note => [note.title, note.tag])") == [["sks toy: done", ACTIVE]]
    expect(page.locator("button.run", has_text="running")).to_have_count(0, timeout=PATIENCE)


@pytest.mark.slow(30)
def test_the_address_remembers_the_screen_and_the_run(server, new_page):
    page = new_page()
    page.goto(f"{server.url}?tab=judge&run={DONE}")
    expect(tab(page)).to_have_text(re.compile("Judge"), timeout=PATIENCE)
    expect(page.locator("#judge-suggestion")).to_contain_text("Step", timeout=PATIENCE)
    go_to(page, "train")
    expect(page).to_have_url(re.compile(f"tab=train&run={DONE}"), timeout=PATIENCE)
    quiet(page)
    reload(page)
    expect(tab(page)).to_have_text(re.compile("Train"), timeout=PATIENCE)
    expect(page.locator("#train-phase")).to_contain_text("Done", timeout=PATIENCE)
    quiet(page)
    # The newest images are above the earlier ones.
    tops = page.locator(".newest-first h3").evaluate_all("titles => titles.map(title => title.getBoundingClientRect().top)")
    assert len(tops) > 1
    assert tops == sorted(tops, reverse=True)
    page.go_back()
    expect(tab(page)).to_have_text(re.compile("Judge"), timeout=PATIENCE)
    page.go_forward()
    expect(tab(page)).to_have_text(re.compile("Train"), timeout=PATIENCE)


def test_the_end_of_a_run_while_the_page_opens_is_shown(server, new_page):
    run, page = server.runs / "20260101-000001-ending", new_page()
    run_in(run, steps=40, share=0.4)

    def late(route):
        # The page, if it does not wait for this first answer, shows the run as it is.
        time.sleep(3)
        end(run)
        route.continue_()

    page.route("**/activity", late, times=1)
    page.goto(f"{server.url}?tab=train&run={run.name}")
    expect(page.locator("#train-state")).to_contain_text("Done", timeout=PATIENCE)
