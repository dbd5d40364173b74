"""Named endpoints for programs: start, status, stop, list, generate, classify.

    from gradio_client import Client, handle_file
    client = Client("http://127.0.0.1:7860")
    run = client.predict("subject", {}, [handle_file("a.jpg"), handle_file("b.jpg")], api_name="/start")

No `from __future__ import annotations` here: Gradio reads the annotations for the schema of the endpoints.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from pipelines.errors import InputError
from pipelines.subject.generation_request import GenerationRequest
from training.options.values import Values, merged
from webui import launching, uploads
from webui.context import AppContext
from webui.datasets import Dataset
from webui.form_schema import checked
from webui.generation import reference_of, request_for, steps_of
from webui.inference_worker import WORKER
from webui.labelled_datasets import uploaded_classes
from webui.runs import RunView, views
from webui.workspace import Settings, Workspace

STATUS_FIELDS = ("phase", "step", "total", "seconds_left", "suggested_step")
MAX_FILES = 500
# The defaults of `generate`.
DEFAULT = {name: field.default for name, field in GenerationRequest.model_fields.items()}


def build_api(context: AppContext) -> None:
    """Add the endpoints to the page that is being built."""
    api = Api(context.settings)
    endpoints = {"start": api.start, "status": api.status, "stop": api.stop, "list": api.list_runs}
    for name, endpoint in (endpoints | {"generate": api.generate, "classify": api.classify}).items():
        gr.api(endpoint, api_name=name)


@dataclass(frozen=True)
class Api:
    """The endpoints; Gradio fills in `request`."""

    settings: Settings

    def start(
        self, task: Literal["subject", "classify"], options: dict, images: list[dict] | None = None, request: gr.Request = None
    ) -> str:
        """Start a run. It waits in the queue while another run is active.

        Args:
            task: "subject" trains an adapter on one subject; "classify" trains a classifier.
            options: the values that differ from the defaults, by group and name, as in options.json of a run:
                {"data": {"instance_prompt": "a photo of sks dog"}, "optimisation": {"max_train_steps": 200}}.
            images: uploaded files, `[handle_file("a.jpg"), ...]`: photos of the subject, or one zip with a folder of images
                for each class; empty for the bundled example.
        Returns: the run's id.
        """
        workspace, files = self.settings.workspace(request), _files(images)
        checked(workspace, task, options)
        return launching.start(workspace, task, _with_images(workspace, task, options, files) if files else options)

    def status(self, run: str, request: gr.Request) -> dict:
        """The status of a run.

        Args:
            run: its id.
        Returns: {"run", "name", "task", "state", "phase", "step", "total", "seconds_left", "suggested_step", "reason", "steps",
            "actions"}; state is queued, starting, running, interrupted, stopped, failed or done; steps are those with a saved
            adapter.
        """
        return _status(RunView(self.settings.workspace(request).run(run)))

    def stop(self, run: str, request: gr.Request) -> str:
        """Stop a run. A queued run never starts; a training run saves a checkpoint first.

        Args:
            run: its id.
        Returns: the state of the run before.
        """
        workspace = self.settings.workspace(request)
        state = RunView(workspace.run(run)).state
        launching.stop(workspace, run)
        return state

    def list_runs(self, request: gr.Request) -> list[dict]:
        """The status of all your runs, newest first."""
        return [_status(view) for view in views(self.settings.workspace(request))]

    def generate(
        self,
        run: str,
        prompt: str,
        request: gr.Request,
        seed: int = DEFAULT["seed"],
        scale: float = 1.0,
        step: int | None = None,
        negative_prompt: str = DEFAULT["negative_prompt"],
        steps: int = DEFAULT["steps"],
        guidance_scale: float = DEFAULT["guidance_scale"],
        sampler: str | None = None,
        size: list[int] | None = None,
    ) -> dict:
        """Generate an image with the adapter of a run.

        Args:
            run, prompt: the run's id, and what the image should show.
            seed, scale: the same seed gives the same image; the adapter's scale, 0 for the base model.
            step: the step of the adapter, one of "steps" of `status`; None for the recommended one.
            negative_prompt: what the image should not show.
            steps, guidance_scale: denoising steps, and the scale of classifier-free guidance.
            sampler: as on the page under Use, such as "DPM++ 2M Karras"; None for the base model's own.
            size: width and height in pixels; None for those of the run's training.
        Returns: the image, a PNG file that contains its settings.
        """
        workspace = self.settings.workspace(request)
        view = RunView(workspace.run(run))
        chosen = steps_of(view.record).chosen if step is None else step
        if chosen is None or view.task != "subject":
            raise InputError("This run has no saved adapter yet. Wait until it has one, or choose another run.")
        values = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "steps": steps, "sampler": sampler}
        adapter = (reference_of(run, chosen), scale, None)
        wanted = request_for(workspace, [adapter], **values, guidance_scale=guidance_scale, size=size)
        (path,) = (event for event in WORKER.stream("generate", workspace, wanted) if isinstance(event, Path))
        return gr.FileData(path=save_file_to_cache(path, get_upload_folder()), orig_name=path.name).model_dump()

    def classify(self, run: str, images: list[dict] | None = None, request: gr.Request = None) -> list[dict]:
        """Classify images with the classifier of a run.

        Args:
            run: its id.
            images: uploaded files, `[handle_file("a.jpg"), ...]`.
        Returns: for each {"image", "class", "probability", "top": [[class, probability], ...]}, or {"image", "error"} for a
            file that cannot be read.
        """
        record = self.settings.workspace(request).run(run)
        if RunView(record).task != "classify":
            raise InputError("This run trained an adapter for generation. Choose a classifier.")
        return WORKER.call("classify", record, _files(images))


def _status(view: RunView) -> dict[str, Any]:
    fields = {name: getattr(view.status, name) for name in STATUS_FIELDS}
    steps = [step for _, step in steps_of(view.record).choices] if view.task == "subject" else []
    summary = {"run": view.id, "name": view.title, "task": view.task, "state": view.state, "reason": view.reason}
    return {**summary, **fields, "steps": steps, "actions": list(view.actions)}


def _files(given: Any) -> list[Path]:
    """The paths of uploaded files.

    Raises: InputError for any other value, such as the path of another file on the server.
    """
    if not isinstance(given, list | None) or len(given or []) > MAX_FILES:
        raise InputError(f"Images must be a list of at most {MAX_FILES} uploaded files. Pass fewer images.")
    folder = Path(get_upload_folder()).resolve()
    files = [Path(str(each.get("path"))).resolve() if isinstance(each, dict) else folder for each in given or []]
    if not all(file.is_relative_to(folder) and file.is_file() for file in files):
        raise InputError("An image must be an uploaded file. Pass gradio_client.handle_file(path).")
    return files


def _with_images(workspace: Workspace, task: str, options: Values, files: list[Path]) -> Values:
    """The options with a new dataset of the files. Raises: InputError if one is refused, which a caller would not see."""
    dataset = Dataset(workspace.new_image_set())
    if task == "classify" and len(files) != 1:
        raise InputError(f"Images for a classifier must be one zip with a folder per class, got {len(files)} files.")
    added = uploads.add_zip(dataset, files[0]) if task == "classify" else uploads.add_photos(dataset, files)
    if added.refused:
        raise InputError(added.refused[0])
    if task == "subject":
        return merged(options, {"data": {"instance_data_dir": str(dataset.folder.absolute())}})
    classes = uploaded_classes(dataset)
    classes.check()
    return classes.fitted(options, options)
