"""Every screen fits a phone and a desk, with runs of both tasks to show."""

import pytest
from browsing import go_to, quiet
from class_folders import COLOURS, colour_folder, finished_classifier
from run_folders import finished_run

from webui.page import SCREENS
from webui.workspace import Workspace


@pytest.fixture(scope="module")
def server(app_server, tmp_path_factory):
    """A server with a finished run of each task."""
    server = app_server()
    names = {name: f"{name} with quite a long name" for name in COLOURS}
    workspace = Workspace(server.runs, server.uploads, is_local=True)
    finished_classifier(workspace, colour_folder(tmp_path_factory.mktemp("pictures"), 6), names)
    finished_run(server.runs / "29990101-000001-newest")
    return server


@pytest.mark.parametrize(("size", "dark"), [("phone", True), ("desk", False)])
@pytest.mark.slow(20)
def test_every_screen_fits_a_phone_and_a_desk(server, new_page, size, dark):
    page = new_page(server.url, size=size, dark=dark)
    for screen in SCREENS:
        go_to(page, screen)
        quiet(page)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), screen
