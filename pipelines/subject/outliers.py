"""Photos of a set that look unlike the others, by image features of the built-in CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from pipelines.clip import BUILT_IN, Clip, load_clip
from pipelines.images import opened_image, upright_rgb
from pipelines.subject.image_checks import Diagnosis, Finding, ImageCheckReport

# The mean similarity to the others below which a photo is reported. Measured by benchmarks/outliers.py on five photos each of
# five subjects: of random sets of 3 to 5 photos of one subject, 2% have a photo below it. If one photo of another subject is
# added, it is below in 59% of the sets, and one of the others in 7%. Of sets with one photo of each subject, 97% have one below.
# The threshold was chosen on these same photos. Chosen on four subjects, it lies between 0.34 and 0.37, and the rates on the
# fifth are 3% and 63% in the mean (--leave_one_out).
MIN_SIMILARITY = 0.35
# With two photos, neither is the odd one.
MIN_PHOTOS = 3
DECODED_SIDE = 512
# The shares of the width and height of the crops that are compared: a subject may fill a photo or stand in its middle.
CENTRES = (1.0, 0.6)


def with_outliers(report: ImageCheckReport) -> ImageCheckReport:
    """`report` with a finding for each photo that looks unlike the others of its subject, and for subjects of such photos."""
    findings, outliers = list(report.findings), {}
    for subject in dict.fromkeys(image.subject for image in report.images):
        paths = [image.path for image in report.images if image.usable and image.subject == subject]
        if len(paths) < MIN_PHOTOS:
            continue
        below = {path: value for path, value in zip(paths, similarities(paths), strict=True) if value < MIN_SIMILARITY}
        outliers |= below
        if 2 * len(below) > len(paths):
            words = f"Most images of {subject!r} look unlike each other, as if they showed different things."
            advice = "Use images of one subject. To tell several things apart, train a classifier."
            findings.append(Finding("different_things", words, advice))
    images = [_with_finding(image, outliers[image.path]) if image.path in outliers else image for image in report.images]
    return replace(report, images=tuple(images), findings=tuple(findings))


def _with_finding(diagnosis: Diagnosis, similarity: float) -> Diagnosis:
    words = f"It looks unlike the other images (similarity {similarity:.2f}, usually {MIN_SIMILARITY} or more)."
    finding = Finding("outlier", words, "If it shows the same subject, keep it; otherwise remove it.")
    return replace(diagnosis, findings=(*diagnosis.findings, finding))


def similarities(images: Sequence[Path]) -> list[float]:
    """For each image, its mean similarity to the others: the highest cosine of the features of any two crops."""
    features = torch.stack([_features(path, path.stat().st_mtime_ns) for path in images])
    pairs = torch.einsum("icd,jed->ijce", features, features).amax(dim=(2, 3))
    return ((pairs.sum(dim=1) - pairs.diagonal()) / (len(images) - 1)).tolist()


@lru_cache(maxsize=1024)
@torch.no_grad()
def _features(path: Path, changed: int) -> torch.Tensor:
    """(crops, width) features of length 1."""
    with opened_image(path) as opened:
        opened.draft(None, (DECODED_SIDE, DECODED_SIDE))
        image = upright_rgb(opened)
    clip, (width, height) = _clip(), image.size
    crops = [image]
    for share in CENTRES:
        across, down = (min(width, height),) * 2 if share == 1 else (share * width, share * height)
        left, top = (width - across) / 2, (height - down) / 2
        crops.append(image.crop((round(left), round(top), round(left + across), round(top + down))))
    return clip.encode_images(torch.stack([clip.preprocess(crop) for crop in crops])).float()


@lru_cache(maxsize=1)
def _clip() -> Clip:
    return load_clip(BUILT_IN)
