"""The server as a person starts it."""

from __future__ import annotations


def test_the_page_opens_without_an_error_in_the_console(app_server, new_page):
    page = new_page(app_server().url)
    page.wait_for_timeout(3000)
    assert page.title() == "NoRA Vision"
