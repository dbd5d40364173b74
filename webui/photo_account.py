"""The files in a run's image folders that it did not use, and why."""

from __future__ import annotations

from training.runs.run_files import ImageChecks
from webui.render import escaped
from webui.runs import RunView


def photo_account(view: RunView) -> str:
    """The unused files in a run's folders, and the prompts that were truncated, as HTML; empty if there are none."""
    checks = view.read_file(ImageChecks) or ImageChecks()
    sentences = []
    for account in (checks.folder, checks.class_folder):
        sentences += [] if account is None else [*account.warnings(), *account.infos()]
    sentences += [prompt["summary"] for prompt in checks.long_prompts]
    listed = "".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences)
    return f'<h3>Notes on the photos</h3><ul class="account">{listed}</ul>' if listed else ""
