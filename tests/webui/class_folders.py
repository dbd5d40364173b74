"""Small classes of images that differ by colour, and the directory of a finished run on them, made without training."""

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
from training.fewshot.tested import told_of_test, write_tested
from training.runs.record import RunRecord
from training.runs.run_files import OPTIONS, RunStatus
from webui.class_sets import update_split
from webui.image_datasets import add_class
from webui.uploads import add_images

COLOURS = {"ruby": (200, 40, 40), "leaf": (40, 180, 60), "sea": (40, 70, 200)}


def coloured(name, place, side=24):
    """The file of an image of that colour, another for each place."""
    rng = np.random.default_rng([place, *name.encode()])
    pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-40, 40, (side, side, 3)), 0, 255).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG")
    return stored.getvalue()


def colour_zip(path, each=12, names=COLOURS):
    """A zip of class folders at `path`, which is returned."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            for place in range(each):
                archive.writestr(f"{name}/{place}.png", coloured(name, place))
    return path


def colour_folder(folder, each=12, names=COLOURS):
    """Class folders below `folder`, which is returned."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for place in range(each):
            (folder / name / f"{place}.png").write_bytes(coloured(name, place))
    return folder


def colour_set(workspace, scratch, each=6, names=COLOURS):
    """A set of the user's own with these classes; returns its folder."""
    folder = workspace.new_image_set()
    given = colour_folder(scratch, each, names)
    for name in names:
        add_images(folder, sorted((given / name).iterdir()), add_class(folder, name))
    update_split(folder)
    return folder


def member_in(run, folder, method, images, logits, classes, temperature=0.5):
    """A fitted method's entry of the report; its test.json is written."""
    labels = torch.tensor([image.label for image in images])
    member = {
        "shots": 2,
        "seed": 0,
        "method": method,
        "folder": f"members/2-shots/seed-0/{method}",
        "guard": None,
        "strength": 1.0,
    }
    own = run / member["folder"]
    own.mkdir(parents=True)
    digests = {image.name: hashlib.sha256(image.source.content()).hexdigest() for image in images}
    write_tested(own, told_of_test(images, logits, temperature, classes, digests))
    scores = [score(logits, labels, classes, value).as_dict() for value in (1.0, temperature)]
    found = {"temperature": temperature, "test": scores[0], "calibrated": scores[1], "trained_numbers": 10}
    return member | found | {"stored_bytes": 8000, "seconds": 3.0}


def finished_classifier(workspace, data_dir, names, wrong=2, right_of_pixels=None):
    """The directory of a run that is done: NoRA, which gets `wrong` of the first class's images wrong, zero-shot and pixels.

    Args:
        names: of the classes, by their folders in `data_dir`.
        right_of_pixels: whether raw pixels get all right; as NoRA unless said.
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
    members = [member_in(run, data_dir, method, images, own, classes) for method, own in methods.items()]
    summary = [
        {name: one[name] for name in ("shots", "method", "trained_numbers", "stored_bytes", "seconds")}
        | {"top1": one["test"]["top1"]}
        for one in members
    ]
    report = {"set": {"classes": classes}, "members": members, "summary": summary, "seeds": [0], "shots": [2]}
    (run / "report.json").write_text(json.dumps(report | {"classifier": "members/2-shots/seed-0/nora"}))
    listed = [[image.name, image.label, list(names)[image.label]] for image in images]
    (run / "splits").mkdir()
    (run / "splits" / "2-shots-seed-0.json").write_text(json.dumps({"keys": list(names), "train": [], "val": [], "test": listed}))
    (run / OPTIONS).write_text(json.dumps({"target_layers": {}, "data": {"data_dir": str(data_dir.absolute()), "dataset": None}}))
    (run / RunStatus.NAME).write_text(json.dumps({"state": "done", "phase": "done", "step": 3, "total": 3, "error": None}))
    return RunRecord(run)
