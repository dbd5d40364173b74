"""What is held out of a handful of images."""

import pytest

from pipelines.errors import InputError
from pipelines.subject.evaluation import HeldOut, choose_heldout

NAMES = [f"{place}.png" for place in range(6)]


def test_of_many_images_the_seed_chooses_one():
    chosen = {choose_heldout(NAMES, "auto", seed).index for seed in range(60)}
    assert chosen == set(range(6))
    assert choose_heldout(NAMES, "auto", 3) == choose_heldout(NAMES, "auto", 3)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_few_images_each_is_left_out_in_turn(count):
    assert choose_heldout(NAMES[:count], "auto", 0) == HeldOut(folds=tuple(range(count)))


def test_of_five_images_one_can_be_spared_and_a_single_one_is_kept():
    assert choose_heldout(NAMES[:5], "auto", 0).index is not None
    assert choose_heldout(NAMES[:1], "auto", 0) == HeldOut()


def test_what_is_asked_for_is_done_whatever_the_count():
    assert choose_heldout(NAMES, "none", 0) == HeldOut()
    assert choose_heldout(NAMES, "2.png", 0) == HeldOut(index=2)
    assert choose_heldout(NAMES, "leave_one_out", 0) == HeldOut(folds=tuple(range(6)))


@pytest.mark.parametrize("asked", ["0.png", "leave_one_out"])
def test_a_single_image_cannot_be_held_out(asked):
    with pytest.raises(InputError, match="heldout_image needs at least 2 images, got 1"):
        choose_heldout(NAMES[:1], asked, 0)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"heldout_image must be auto, none, leave_one_out or one of 0\.png, 1\.png, got 'z'"):
        choose_heldout(NAMES[:2], "z", 0)
