"""What a method made of every test image, in a file: for confusions that open their images, and the worst mistakes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.fewshot.data import LabelledImage
from training.runs.durable import write_text_atomically

TESTED, FORMAT = "test.json", 1
# Of a thousand classes and fifty thousand images all would be gigabytes.
MOST_LIKELY, DIGITS = 10, 6


def told_of_test(
    images: Sequence[LabelledImage],
    logits: torch.Tensor,
    temperature: float,
    classes: Sequence[str],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """What test.json says.

    Args:
        images: those tested on.
        logits: (n, classes) of them.
        temperature: that validation chose, which the logits are divided by.
        digests: the sha256 of each image's file by its name, which tells whether the file is still the one tested.
    Returns: the classes, and for each image its path within the set, its class, the one predicted and how likely that is,
        and the most likely classes with their probabilities; classes by their places.
    """
    probabilities = (logits.double() / temperature).softmax(dim=1)
    values, places = probabilities.topk(min(MOST_LIKELY, len(classes)), dim=1)
    # The very place that the scores count: topk may order equal ones otherwise.
    predicted = logits.argmax(dim=1).tolist()
    return {
        "format": FORMAT,
        "classes": list(classes),
        "temperature": temperature,
        "pictures": [
            {
                "name": image.name,
                "sha256": digests[image.name],
                "true": image.label,
                "predicted": own,
                "confidence": round(likely[0], DIGITS),
                "top": [[place, round(value, DIGITS)] for place, value in zip(order, likely, strict=True)],
            }
            for image, own, order, likely in zip(images, predicted, places.tolist(), values.tolist(), strict=True)
        ],
    }


def write_tested(folder: Path, told: Mapping[str, Any]) -> None:
    """Write test.json into a member's folder, a line for each image, so that a reader never sees half of it."""
    images = ",\n".join(json.dumps(one) for one in told["pictures"])
    rest = json.dumps({name: value for name, value in told.items() if name != "pictures"})
    write_text_atomically(folder / TESTED, f'{rest[:-1]}, "pictures": [\n{images}\n]}}\n')
