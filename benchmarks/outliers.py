"""How well the check for outliers separates photos of one subject from those of others.

    python benchmarks/outliers.py --subjects SUBJECTS
    python benchmarks/outliers.py --subjects SUBJECTS --leave_one_out

SUBJECTS is a folder with a folder of photos for each subject; the built-in subject is added. Random sets are drawn: photos of one
subject, the same with one photo of another subject, and one photo of each subject. With --leave_one_out, the threshold is chosen
on all subjects but one and used for the photos of that one, in turn.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipelines.built_in import ASSETS
from pipelines.images import is_image
from pipelines.subject.outliers import MIN_SIMILARITY, similarities

Subjects = dict[str, list[Path]]
# The share of sets of one subject with a photo below a threshold that is chosen.
FALSE_ALARMS = 0.02


def of_one_subject(subjects: Subjects, generator: random.Random) -> tuple[list[Path], int]:
    """Three to five photos of one subject, and the number of photos of others, which come last."""
    photos = generator.choice(list(subjects.values()))
    return generator.sample(photos, generator.randint(3, min(5, len(photos)))), 0


def with_one_other(subjects: Subjects, generator: random.Random, tested: str = "") -> tuple[list[Path], int]:
    """The same of the subject `tested`, or of a random one, and one photo of another subject."""
    tested = tested or generator.choice(list(subjects))
    same, _ = of_one_subject({tested: subjects[tested]}, generator)
    others = [photos for name, photos in subjects.items() if name != tested]
    return [*same, generator.choice(generator.choice(others))], 1


def one_of_each(subjects: Subjects, generator: random.Random) -> tuple[list[Path], int]:
    """One photo of each subject."""
    return [generator.choice(photos) for photos in subjects.values()], len(subjects)


def measure(
    make: Callable[[Subjects, random.Random], tuple[list[Path], int]], subjects: Subjects, sets: int, threshold: float
) -> tuple[float, float]:
    """The shares of sets with a reported photo of the subject, and of others."""
    generator, same, other = random.Random(0), 0, 0
    for _ in range(sets):
        photos, count = make(subjects, generator)
        below = [value < threshold for value in similarities(photos)]
        same += any(below[: len(photos) - count])
        other += any(below[len(photos) - count :])
    return same / sets, other / sets


def chosen_threshold(subjects: Subjects, sets: int) -> float:
    """The threshold below which `FALSE_ALARMS` of the sets of one subject have a photo."""
    generator = random.Random(0)
    lowest = sorted(min(similarities(of_one_subject(subjects, generator)[0])) for _ in range(sets))
    return lowest[round(FALSE_ALARMS * sets)]


def leave_one_out(subjects: Subjects, sets: int) -> str:
    """For each subject, the rates at the threshold that was chosen on the others; and the means of the rates."""
    lines, rates = [], []
    for name, photos in subjects.items():
        threshold = chosen_threshold({other: paths for other, paths in subjects.items() if other != name}, sets)
        false, _ = measure(of_one_subject, {name: photos}, sets, threshold)
        _, detected = measure(partial(with_one_other, tested=name), subjects, sets, threshold)
        rates.append((false, detected))
        lines.append(f"{name}: threshold {threshold:.2f}, a photo of the subject {false:.1%}, one of others {detected:.1%}")
    false, detected = map(statistics.mean, zip(*rates, strict=True))
    return "\n".join([*lines, f"mean: a photo of the subject in {false:.1%} of the sets, one of others in {detected:.1%}"])


def main() -> None:
    """Print the shares for each kind of set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=Path, required=True, help="folder with a folder of photos for each subject")
    parser.add_argument("--sets", type=int, default=500, help="number of random sets of each kind")
    parser.add_argument("--leave_one_out", action="store_true", help="choose the threshold without the tested subject, in turn")
    options = parser.parse_args()
    folders = [folder for folder in sorted(options.subjects.iterdir()) if folder.is_dir()]
    subjects = {folder.name: sorted(filter(is_image, folder.iterdir())) for folder in [*folders, ASSETS / "sample-subject"]}
    if options.leave_one_out:
        sys.stdout.write(leave_one_out(subjects, options.sets) + "\n")
        return
    for make in (of_one_subject, with_one_other, one_of_each):
        same, other = measure(make, subjects, options.sets, MIN_SIMILARITY)
        sys.stdout.write(f"{make.__name__}: a photo of the subject in {same:.1%} of the sets, one of others in {other:.1%}\n")


if __name__ == "__main__":
    main()
