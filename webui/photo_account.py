"""The files in a run's image folders that it did not use, and why."""

from __future__ import annotations

from typing import Any

from pipelines.subject.folder_entries import FolderAccount
from training.runs.run_files import IMAGE_CHECKS
from webui.cards import escaped
from webui.views import RunView


def photo_account(view: RunView) -> str:
    """The unused files in a run's folders, and the prompts that were truncated, as HTML; empty if there are none."""
    report = view.read(IMAGE_CHECKS)
    sentences = []
    for name in ("folder", "class_folder"):
        account = _account(report.get(name))
        sentences += [] if account is None else [*account.warnings(), *account.infos()]
    sentences += [each["summary"] for each in _dicts(report.get("long_prompts")) if isinstance(each.get("summary"), str)]
    listed = "".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences)
    return f'<h3>Notes on the photos</h3><ul class="account">{listed}</ul>' if listed else ""


def _account(values: Any) -> FolderAccount | None:
    """The folder account in the report; None if it is missing or of another version."""
    try:
        return FolderAccount.from_json(values)
    except (KeyError, TypeError, AttributeError):
        return None


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []
