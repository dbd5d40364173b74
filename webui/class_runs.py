"""The classifier runs on a dataset."""

from __future__ import annotations

from pathlib import Path

from pipelines.errors import InputError
from webui.draft import Draft
from webui.runs import views
from webui.tasks import CLASSIFY
from webui.workspace import Workspace

# Options that depend on the images of one run; a run with other images does not take them over.
DATASET_OPTIONS = ("data_dir", "dataset", "class_names", "shots", "test_share")


def set_of(workspace: Workspace, stored: object) -> str:
    """The id of a stored draft's dataset; if it is gone, the user's newest dataset, or the first example."""
    return CLASSIFY.key(workspace, Draft.from_browser(stored))


def check_free(workspace: Workspace, folder: Path) -> None:
    """Raises: InputError if a queued or active run trains on the images in `folder`."""
    given = str(folder.absolute())
    for view in views(workspace):
        if view.is_active and view.launch_options.get("data", {}).get("data_dir") == given:
            raise InputError("A run is training on these images. Wait until it is done, or stop it first.")
