"""Small classes of images that differ by colour, and the directory of a finished run on them, written without training."""

import hashlib
import io
import json
import zipfile

import numpy as np
import torch
from PIL import Image

from pipelines.fewshot.data import LabelledImage
from pipelines.fewshot.metrics import score
from pipelines.fewshot.sources import ImageFile
from pipelines.run_file import ResolvedOptions
from training.fewshot.prediction_file import prediction_file
from training.fewshot.report import summary_of
from training.runs.fewshot_files import DatasetSummary, FewShotReport, TrialResult, ValidationResult
from training.runs.record import RunRecord
from training.runs.run_files import RunStatus
from webui.datasets import Dataset
from webui.uploads import add_images

COLOURS = {"ruby": (200, 40, 40), "leaf": (40, 180, 60), "sea": (40, 70, 200)}


def coloured(name, place, side=24):
    """The PNG content of an image of the colour; it differs for each index."""
    rng = np.random.default_rng([place, *name.encode()])
    pixels = np.clip(np.array(COLOURS[name.rstrip("0123456789")]) + rng.integers(-40, 40, (side, side, 3)), 0, 255).astype(
        np.uint8
    )
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG")
    return stored.getvalue()


def colour_zip(path, each=12, names=COLOURS):
    """Write a zip of class folders to `path`; returns `path`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            for place in range(each):
                archive.writestr(f"{name}/{place}.png", coloured(name, place))
    return path


def colour_folder(folder, each=12, names=COLOURS):
    """Write class folders into `folder`; returns `folder`."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for place in range(each):
            (folder / name / f"{place}.png").write_bytes(coloured(name, place))
    return folder


def colour_set(workspace, scratch, each=6, names=COLOURS):
    """Upload a dataset with these classes."""
    dataset = Dataset(workspace.new_image_set())
    given = colour_folder(scratch, each, names)
    for name in names:
        add_images(dataset, sorted((given / name).iterdir()), dataset.add_class(name))
    return dataset


def images_of(dataset, part):
    """The files of the training or test images of a dataset."""
    return {image.file for image in dataset.content().images() if image.part == part}


def trial_in(run, method, images, logits, classes, temperature=0.5):
    """The result of a trial, whose test.json is written."""
    labels = torch.tensor([image.label for image in images])
    folder = f"trials/2-shots/seed-0/{method}"
    (run / folder).mkdir(parents=True)
    digests = {image.name: hashlib.sha256(image.source.content()).hexdigest() for image in images}
    prediction_file(images, logits, temperature, classes, digests).write(run / folder)
    test, calibrated = (score(logits, labels, classes, value) for value in (1.0, temperature))
    return TrialResult(
        shots=2,
        seed=0,
        method=method,
        folder=folder,
        split_sha256="0" * 64,
        setting={},
        scale=1.0,
        scale_reason=None,
        num_trainable_parameters=10,
        stored_bytes=8000,
        seconds=3.0,
        peak_memory=2**20,
        temperature=temperature,
        validation=ValidationResult(0.5, 0.5, 8),
        test=test,
        calibrated=calibrated,
        new_classes=None,
    )


def finished_classifier(workspace, data_dir, names, wrong=2, right_of_pixels=None):
    """The directory of a finished run with NoRA, which misclassifies `wrong` images of the first class, zero-shot and pixels.

    Args:
        names: the class names by folder in `data_dir`.
        right_of_pixels: True if raw pixels classify every image correctly, False for none, None for the same as NoRA.
    """
    classes = list(names.values())
    images = [
        LabelledImage(ImageFile(f"{key}/{path.name}", data_dir), label, classes[label])
        for label, key in enumerate(names)
        for path in sorted((data_dir / key).glob("*.png"))
    ]
    labels = torch.tensor([image.label for image in images])
    logits = 3.0 * torch.nn.functional.one_hot(labels, len(classes)).float() + 0.01 * torch.arange(len(labels))[:, None]
    lost = 3.0 * torch.nn.functional.one_hot((labels + 1) % len(classes), len(classes)).float()
    adapted = torch.where((torch.arange(len(labels)) < wrong)[:, None], lost * 2, logits)
    run = workspace.new_run()
    of_pixels = adapted if right_of_pixels is None else (logits if right_of_pixels else lost)
    methods = {"zeroshot": lost, "pixels": of_pixels, "nora": adapted}
    trials = [trial_in(run, method, images, one, classes) for method, one in methods.items()]
    report = FewShotReport(
        dataset=DatasetSummary("colours", classes, [], len(images), []),
        model="mini",
        pretrained=None,
        templates=["a photo of a {}."],
        shots=[2],
        seeds=[0],
        methods=list(methods),
        trials=trials,
        summary=[summary_of([trial]) for trial in trials],
        classifier="trials/2-shots/seed-0/nora",
    )
    report.write(run)
    listed = [[image.name, image.label, list(names)[image.label]] for image in images]
    (run / "splits").mkdir()
    (run / "splits" / "2-shots-seed-0.json").write_text(json.dumps({"keys": list(names), "train": [], "val": [], "test": listed}))
    ResolvedOptions({"target_layers": {}, "data": {"data_dir": str(data_dir.absolute()), "dataset": None}}).write(run)
    (run / RunStatus.NAME).write_text(json.dumps({"state": "done", "phase": "done", "step": 3, "total": 3, "error": None}))
    return RunRecord(run)
