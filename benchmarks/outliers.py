"""How well the check for outliers separates photos of one subject from those of others.

    python benchmarks/outliers.py --subjects SUBJECTS

SUBJECTS is a folder with a folder of photos for each subject; the built-in subject is added. Random sets are drawn: photos of one
subject, the same with one photo of another subject, and one photo of each subject.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path

from pipelines.built_in import ASSETS
from pipelines.images import is_image
from pipelines.subject.outliers import MIN_SIMILARITY, similarities

Subjects = dict[str, list[Path]]


def of_one_subject(subjects: Subjects, generator: random.Random) -> tuple[list[Path], int]:
    """Three to five photos of one subject, and the number of photos of others, which come last."""
    photos = generator.choice(list(subjects.values()))
    return generator.sample(photos, generator.randint(3, min(5, len(photos)))), 0


def with_one_other(subjects: Subjects, generator: random.Random) -> tuple[list[Path], int]:
    """The same, and one photo of another subject."""
    same, other = generator.sample(list(subjects.values()), 2)
    return [*generator.sample(same, generator.randint(3, min(5, len(same)))), generator.choice(other)], 1


def one_of_each(subjects: Subjects, generator: random.Random) -> tuple[list[Path], int]:
    """One photo of each subject."""
    return [generator.choice(photos) for photos in subjects.values()], len(subjects)


def measure(make: Callable[[Subjects, random.Random], tuple[list[Path], int]], subjects: Subjects, sets: int) -> str:
    """The shares of sets with a reported photo of the subject, and of others."""
    generator, same, other = random.Random(0), 0, 0
    for _ in range(sets):
        photos, count = make(subjects, generator)
        below = [value < MIN_SIMILARITY for value in similarities(photos)]
        same += any(below[: len(photos) - count])
        other += any(below[len(photos) - count :])
    return f"{make.__name__}: a photo of the subject in {same / sets:.1%} of the sets, one of others in {other / sets:.1%}"


def main() -> None:
    """Print the shares for each kind of set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=Path, required=True, help="folder with a folder of photos for each subject")
    parser.add_argument("--sets", type=int, default=500, help="number of random sets of each kind")
    options = parser.parse_args()
    folders = [folder for folder in sorted(options.subjects.iterdir()) if folder.is_dir()]
    subjects = {folder.name: sorted(filter(is_image, folder.iterdir())) for folder in [*folders, ASSETS / "sample-subject"]}
    for make in (of_one_subject, with_one_other, one_of_each):
        sys.stdout.write(measure(make, subjects, options.sets) + "\n")


if __name__ == "__main__":
    main()
