"""The choice of held-out images."""

import pytest

from pipelines.errors import InputError
from pipelines.subject.heldout import HeldOut, choose_heldout

NAMES = [f"{place}.png" for place in range(6)]


def test_with_many_images_the_seed_chooses_the_held_out_one():
    chosen = {choose_heldout(NAMES, "auto", seed).index for seed in range(60)}
    assert chosen == set(range(6))
    assert choose_heldout(NAMES, "auto", 3) == choose_heldout(NAMES, "auto", 3)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_with_few_images_each_is_held_out_in_turn(count):
    assert choose_heldout(NAMES[:count], "auto", 0) == HeldOut(folds=tuple(range(count)))


def test_one_of_five_images_is_held_out_and_a_single_one_is_not():
    assert choose_heldout(NAMES[:5], "auto", 0).index is not None
    assert choose_heldout(NAMES[:1], "auto", 0) == HeldOut()


def test_an_explicit_choice_applies_to_any_number_of_images():
    assert choose_heldout(NAMES, "none", 0) == HeldOut()
    assert choose_heldout(NAMES, "2.png", 0) == HeldOut(index=2)
    assert choose_heldout(NAMES, "leave_one_out", 0) == HeldOut(folds=tuple(range(6)))


@pytest.mark.parametrize("asked", ["0.png", "leave_one_out"])
def test_a_single_image_cannot_be_held_out(asked):
    with pytest.raises(InputError, match="heldout_image needs at least 2 images, got 1"):
        choose_heldout(NAMES[:1], asked, 0)


def test_an_unknown_name_is_refused_with_the_available_ones():
    with pytest.raises(InputError, match=r"heldout_image must be auto, none, leave_one_out or one of 0\.png, 1\.png, got 'z'"):
        choose_heldout(NAMES[:2], "z", 0)
