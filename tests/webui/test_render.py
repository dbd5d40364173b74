"""HTML from templates: text is escaped once, for HTML and for Gradio's own templates."""

import pytest
from jinja2 import UndefinedError

from webui.render import TEMPLATES, parts, render

NASTY = "<script>alert(1)</script>\"'&{{value}}${alert(2)}`"


def test_text_is_escaped_in_every_part_and_rendered_html_is_not_escaped_again():
    chip = parts.chip("good", NASTY)
    shown = [
        chip,
        parts.warning(NASTY, NASTY),
        parts.note(NASTY),
        parts.empty(NASTY, NASTY, NASTY),
        parts.figure(NASTY, NASTY, NASTY, NASTY),
        parts.table([NASTY], [[NASTY, chip]], NASTY, NASTY, NASTY),
        parts.progress(0.5, NASTY, NASTY, NASTY),
        parts.facts([(NASTY, NASTY)]),
    ]
    for html in shown:
        assert "<script" not in html
        assert not set("{}$`") & set(html)
        assert "&lt;script&gt;" in html
        assert "&amp;lt;" not in html
    assert chip in shown[5]


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="'words' is undefined"):
        TEMPLATES.from_string("{{ words }}").render()


def test_a_progress_bar_without_a_share_has_no_value():
    assert 'aria-valuenow="50"' in parts.progress(0.496)
    assert "aria-valuenow" not in parts.progress(None)
    assert "unknown" in parts.progress(None)


def test_templates_render_by_name():
    assert render("parts.html").strip() == ""
