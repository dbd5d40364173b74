"""The predictions of a trial for its test images, the content of test.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipelines.fewshot.data import LabelledImage
from training.runs.fewshot_files import ImagePrediction, PredictionFile

# All probabilities of fifty thousand images and a thousand classes would take gigabytes.
MOST_LIKELY, DIGITS = 10, 6


def prediction_file(
    images: Sequence[LabelledImage],
    logits: torch.Tensor,
    temperature: float,
    classes: Sequence[str],
    digests: Mapping[str, str],
) -> PredictionFile:
    """The content of test.json.

    Args:
        images: the test images.
        logits: (n, classes).
        temperature: divisor of the logits, fitted on the validation images.
        digests: sha256 of each image file by the image's name, to recognise files that changed after the test.
    """
    probabilities = (logits.double() / temperature).softmax(dim=1)
    values, indices = probabilities.topk(min(MOST_LIKELY, len(classes)), dim=1)
    # The class that the metrics count: topk may order equal probabilities differently.
    predicted = logits.argmax(dim=1).tolist()
    rows = zip(images, predicted, indices.tolist(), values.tolist(), strict=True)
    predictions = [
        ImagePrediction(
            name=image.name,
            sha256=digests[image.name],
            true=image.label,
            predicted=label,
            confidence=round(likely[0], DIGITS),
            top=[[index, round(value, DIGITS)] for index, value in zip(order, likely, strict=True)],
        )
        for image, label, order, likely in rows
    ]
    return PredictionFile(tuple(classes), temperature, predictions)
