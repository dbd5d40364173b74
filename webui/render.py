"""HTML from the Jinja2 templates of this package.

Every text is escaped; HTML that was rendered before is `Markup` and stays as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

# A component whose template says {{value}} evaluates these in its value, as Handlebars or as a JavaScript template string.
TEMPLATE_CHARACTERS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})


def escaped(value: object) -> object:
    """`value` escaped for HTML and for the templates of gr.HTML; Markup and undefined values as they are."""
    return value if isinstance(value, Markup | StrictUndefined) else Markup(str(escape(value)).translate(TEMPLATE_CHARACTERS))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=escaped,
)
# The macros of parts.html for Python: parts.warning("The disk is full.").
parts: Any = TEMPLATES.get_template("parts.html").module


def render(name: str, **values: object) -> Markup:
    """The template `name` with `values`.

    Raises: jinja2.UndefinedError if the template needs a value that is missing.
    """
    return Markup(TEMPLATES.get_template(name).render(**values))
