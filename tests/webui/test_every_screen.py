"""Every screen fits a phone and a desk, and can be read and operated by everybody, with runs of both tasks to show."""

import pytest
from arena_folders import arena_in
from axe_playwright_python.sync_playwright import Axe
from browsing import go_to, quiet
from class_folders import COLOURS, colour_folder, finished_classifier
from run_folders import end_processes, finished_run, run_in

from webui.page import SCREENS
from webui.workspace import Workspace

SERIOUS = ("serious", "critical")
OTHER_THEME = "document.body.classList.toggle('dark')"


@pytest.fixture(scope="module")
def server(app_server, tmp_path_factory):
    """A server with a finished run of each task, an arena, and a run that seems to go on."""
    server = app_server()
    names = {name: f"{name} with quite a long name" for name in COLOURS}
    workspace = Workspace(server.runs, server.uploads, is_local=True)
    finished_classifier(workspace, colour_folder(tmp_path_factory.mktemp("pictures"), 6), names)
    finished_run(server.runs / "29990101-000001-newest")
    arena_in(server.runs / "20260102-000000-arena", seeds=1)
    run_in(server.runs / "20260101-000000-active", steps=40)
    yield server
    end_processes()


def findings(page, *rules):
    """What axe-core finds on the open screen, of all rules or of some."""
    options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
    found = Axe().run(page, options=options).response["violations"]
    return [
        (rule["id"], node["html"], node["failureSummary"])
        for rule in found
        if rule["impact"] in SERIOUS
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize(("size", "dark"), [("phone", True), ("desk", False)])
@pytest.mark.slow(40)
def test_every_screen_fits_and_has_no_serious_finding_of_axe(server, new_page, size, dark):
    page = new_page(size=size, dark=dark, bypass_csp=True)
    # Opened once, since a page that is left while it waits for answers reports lost connections.
    page.goto(f"{server.url}?__theme={'dark' if dark else 'light'}&run=29990101-000001-newest")
    page.wait_for_selector("#screens", timeout=60_000)
    for screen in SCREENS:
        go_to(page, screen)
        quiet(page)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), screen
        assert not findings(page), screen
        # Only colours depend on the theme.
        page.evaluate(OTHER_THEME)
        assert not findings(page, "color-contrast"), f"{screen} in the other theme"
        page.evaluate(OTHER_THEME)
    tabs = page.locator("#screens > .tab-wrapper [role=tab]")
    assert [tab.is_visible() for tab in tabs.all()] == [True] * len(SCREENS)
