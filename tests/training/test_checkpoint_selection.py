"""Which step is suggested, by the held-out loss and by samples, why, and what is warned of."""

import dataclasses
import random
import re

import pytest

from training.subject.checkpoint_selection import (
    MIN_SHARE_OF_REDUCTION,
    PROMPT_TOLERANCE,
    SIMILARITY_TOLERANCE,
    Point,
    StepScores,
    candidate_steps,
    steps_to_sample,
    suggest,
)

BASE = StepScores(subject=0.2, prompt=0.3, copy=0.1, nearest=0.3, nearest_limit=0.9)
# A curve whose least is at step 10, and of whose fall step 30 keeps less than half.
FALL = [1.0, 0.5, 0.7, 0.8]


def curve(heldout, seen=None):
    """Points every ten steps, the first of them the base model."""
    seen = seen or [None] * len(heldout)
    return [Point(10 * place, loss, other) for place, (loss, other) in enumerate(zip(heldout, seen, strict=True))]


def test_the_step_with_the_lowest_heldout_loss_is_recommended_and_the_reason_names_it():
    found = suggest(curve([1.0, 0.8, 0.5, 0.7]), last=30)
    assert (found.step, found.last) == (20, 30)
    assert "0.5000 at step 20" in found.why


def test_a_loss_that_falls_to_the_end_recommends_the_last_step_without_a_warning():
    found = suggest(curve([1.0, 0.8, 0.6, 0.4], [1.0, 0.7, 0.5, 0.3]), last=30)
    assert (found.step, found.warnings) == (30, [])


def test_the_earliest_of_equally_good_steps_is_recommended():
    found = suggest(curve([1.0, 0.8, 0.505, 0.502, 0.5]), last=40)
    assert found.step == 20
    assert "as good as the lowest value" in found.why
    assert suggest(curve([1.0, 0.8, 0.52, 0.502, 0.5]), last=40).step == 30


def test_overfitting_is_a_rise_of_the_heldout_loss_while_the_training_loss_falls():
    (warning,) = suggest(curve([1.0, 0.5, 0.56], [1.0, 0.5, 0.4]), last=20).warnings
    assert warning.startswith("Overfitting: the validation loss rises from 0.5000 at step 10 to 0.5600 at step 20")
    assert "from 0.5000 to 0.4000" in warning
    assert suggest(curve([1.0, 0.5, 0.54], [1.0, 0.5, 0.4]), last=20).warnings == []


def test_a_rise_of_both_losses_is_no_overfitting():
    (warning,) = suggest(curve([1.0, 0.5, 0.9], [1.0, 0.5, 0.8]), last=20).warnings
    assert "unstable" in warning
    assert "Overfitting" not in warning


def test_training_that_never_lowers_the_heldout_loss_is_warned_of():
    found = suggest(curve([1.0, 1.1, 1.2]), last=20)
    assert found.step == 10
    assert "did not improve the loss on the held-out image" in found.warnings[0]


def test_training_that_lowers_only_the_training_loss_is_overfitting_from_the_start():
    warnings = suggest(curve([1.0, 1.1, 1.2], [1.0, 0.9, 0.8]), last=20).warnings
    assert "did not improve the loss on the held-out image" in warnings[0]
    assert warnings[1].startswith("Overfitting: the validation loss rises from 1.0000 at step 0 to 1.2000 at step 20")
    assert len(suggest(curve([1.0, 1.001, 1.01], [1.0, 0.9, 0.8]), last=20).warnings) == 1


def test_a_rise_that_is_small_compared_with_the_reduction_is_no_overfitting():
    assert suggest(curve([1.0, 0.99, 1.0], [1.0, 0.9, 0.6]), last=20).warnings == []
    assert suggest(curve([1.0, 0.99, 1.04], [1.0, 0.9, 0.6]), last=20).warnings != []


def test_without_a_heldout_image_the_last_step_is_recommended_with_a_warning():
    found = suggest([], last=20)
    assert found.step == 20
    assert "not trained on" in found.warnings[0]


def test_folds_shorter_than_the_training_show_overfitting_only_within_their_steps():
    assert suggest(curve([1.0, 0.8, 0.6]), last=90).step == 90
    assert suggest(curve([1.0, 0.5, 0.6], [1.0, 0.5, 0.4]), last=90).step == 10


def samples(*steps, **columns):
    """The scores at `steps`, like the base model's but for the columns given, one value a step; the base model's at 0."""
    changed = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {0: BASE, **{step: dataclasses.replace(BASE, **each) for step, each in zip(steps, changed, strict=True)}}


def test_a_step_with_more_similar_samples_is_preferred_to_the_one_with_the_lowest_loss():
    found = suggest(curve(FALL), 30, samples(10, 20, subject=[0.5, 0.7]))
    assert (found.step, found.warnings[0][:12]) == (20, "Overfitting:")
    for said in (
        "Of the checkpoints at steps 10 and 20, step 20 is clearly the most similar to the subject.",
        "Image similarity (CLIP-I) 0.700; range over all steps 0.200 (base model) to 0.700 (step 20).",
        "Validation loss 0.7000; range over all steps 0.5000 (step 10) to 1.0000 (base model).",
        "Memorisation: nearest image 0.300 (limit 0.900), nearest thumbnail 0.100 (limit 0.900).",
        "Compared: 10, 20.",
    ):
        assert said in found.why


def test_a_step_that_keeps_less_than_half_of_the_reduction_is_not_compared():
    assert suggest(curve(FALL), 30, samples(10, 20, 30, subject=[0.5, 0.6, 0.9])).step == 20
    half = 1.0 - MIN_SHARE_OF_REDUCTION * 0.5
    assert candidate_steps(curve([1.0, 0.5, half - 0.001, half + 0.001]), [10, 20, 30]) == [10, 20]


def test_among_equally_similar_steps_the_lowest_loss_decides():
    heldout, best = curve([1.0, 0.6, 0.5, 0.7]), 0.7
    just = best - SIMILARITY_TOLERANCE * (best - BASE.subject)
    assert suggest(heldout, 30, samples(10, 20, 30, subject=[0.7, just + 0.001, 0.7])).step == 20
    assert suggest(heldout, 30, samples(10, 20, 30, subject=[0.7, just - 0.001, 0.7])).step == 10


def test_a_step_with_low_similarity_to_its_prompts_is_excluded_and_named():
    just = 0.3 * (1 - PROMPT_TOLERANCE)
    alike = {"subject": [0.4, 0.7]}
    assert suggest(curve(FALL), 30, samples(10, 20, prompt=[0.3, just + 0.001], **alike)).step == 20
    found = suggest(curve(FALL), 30, samples(10, 20, prompt=[0.3, just - 0.001], **alike))
    assert found.step == 10
    assert "Excluded for low similarity to their prompts: 20." in found.why
    negative = samples(10, 20, prompt=[-0.3, -0.32], **alike)
    assert suggest(curve(FALL), 30, negative).step == 20


@pytest.mark.parametrize("figure", ["copy", "nearest"])
def test_a_step_with_near_copies_is_excluded_and_named_unless_the_base_model_copies_too(figure):
    scores = samples(10, 20, subject=[0.4, 0.7], **{figure: [0.5, 0.95]})
    found = suggest(curve(FALL), 30, scores)
    assert found.step == 10
    assert "Excluded for near copies: 20." in found.why
    scores[0] = dataclasses.replace(BASE, **{figure: 0.95})
    assert suggest(curve(FALL), 30, scores).step == 20


def test_if_all_steps_generate_copies_the_one_that_copies_least_is_recommended_and_named():
    found = suggest(curve(FALL), 30, samples(10, 20, copy=[0.97, 0.95]))
    assert found.step == 20
    assert found.why.startswith("Steps 10 and 20 generate near copies of training images. Of these, step 20 is")
    assert "is nearly a copy" in found.warnings[-1]


def test_without_samples_of_the_step_with_the_least_loss_the_loss_alone_decides():
    for scores in ({}, samples(20, 30, subject=[0.7, 0.8]), samples(10, subject=[0.7])):
        found = suggest(curve(FALL), 30, scores)
        assert found.step == 10
        assert found.why.startswith("The validation loss falls from 1.0000")
    unknown_base = samples(10, 20, subject=[0.4, 0.7])
    del unknown_base[0]
    assert suggest(curve(FALL), 30, unknown_base).step == 10


def test_samples_do_not_decide_if_the_heldout_loss_never_fell():
    found = suggest(curve([1.0, 1.2, 1.1]), 20, samples(10, 20, subject=[0.9, 0.3]))
    assert found.step == 20
    assert "comes closest" in found.why


def test_without_a_heldout_image_the_earliest_of_the_most_similar_steps_is_recommended():
    found = suggest([], 30, samples(10, 20, 30, subject=[0.5, 0.698, 0.7]))
    assert found.step == 20
    assert found.why.startswith("Steps 20 and 30 are about equally similar to the subject. Of these, step 20 is the earliest. No")
    assert "not trained on" in found.warnings[0]


def test_after_a_curve_that_falls_to_its_end_the_samples_decide():
    found = suggest(curve([1.0, 0.8, 0.6]), 90, samples(20, 50, 90, subject=[0.5, 0.699, 0.7]))
    assert found.step == 50
    assert "Of these, step 50 is the earliest after step 20, where the validation loss was still falling." in found.why
    assert suggest(curve([1.0, 0.5, 0.8]), 90, samples(10, 20, 90, subject=[0.5, 0.5, 0.9])).step == 10


def test_the_steps_with_the_lowest_loss_are_sampled_unless_they_have_samples():
    heldout = curve([1.0, 0.55, 0.5, 0.6, 0.7, 0.9])
    assert steps_to_sample(heldout, [10, 20, 30, 40, 50], [0, 10, 50], count=3) == [20, 30]
    assert steps_to_sample(heldout, [10, 20, 30, 40, 50], [0], count=9) == [10, 20, 30, 40]
    assert steps_to_sample(heldout, [10, 20, 30, 40, 50], [0], count=0) == []
    assert steps_to_sample(curve([1.0, 1.2, 1.1]), [10, 20], [0], count=2) == [20]


def test_without_losses_evenly_spaced_steps_and_the_last_one_are_sampled():
    assert steps_to_sample([], [10, 20, 30, 40, 50, 60], [0], count=3) == [20, 40, 60]
    assert steps_to_sample([], [10, 20, 30, 40, 50, 60], [40, 60], count=3) == [20]
    assert steps_to_sample([], [10, 20], [], count=5) == [10, 20]
    assert steps_to_sample(curve([1.0, 0.8, 0.6]), [10, 20, 30, 40], [], count=2) == [20, 40]


@pytest.mark.parametrize(
    ("base", "last", "warned"),
    [
        ({}, {"copy": 0.95}, True),
        ({}, {"copy": 0.7}, False),
        ({"copy": 0.95}, {"copy": 0.95}, False),
        ({}, {"nearest": 0.9}, True),
    ],
)
def test_copies_of_training_images_in_the_last_samples_are_warned_of(base, last, warned):
    scores = {0: dataclasses.replace(BASE, **base), 5: BASE, 10: dataclasses.replace(BASE, **last)}
    warnings = suggest([], 10, scores).warnings
    assert any("A sample of step 10 is nearly a copy of a training image: nearest image" in w for w in warnings) == warned


def random_run(rng):
    """Losses and scores on a grid of few values, so that ties and near ties are frequent."""
    steps = range(0, 10 * rng.randint(2, 7), 10)
    points = [Point(step, rng.randint(20, 60) / 100 + rng.choice([0, 1e-6]), 0.3) for step in steps]
    sampled = [step for step in steps if step == 0 or rng.random() < 0.8]
    scored = {
        step: StepScores(
            *(rng.randint(20, 36) / 100 + rng.choice([0, 1e-6]) for _ in range(2)), rng.choice([0.2, 0.95]), 0.4, 0.9
        )
        for step in sampled
    }
    # Without a held-out image, with cross-validation that ends early, or complete.
    return points[: rng.choice([0, 2, len(points), len(points)])], scored, steps[-1]


def named(words):
    return [int(step) for step in re.findall(r"\d+", words)]


@pytest.mark.parametrize("seed", range(3))
def test_every_sentence_agrees_with_the_table_of_measurements(seed):
    rng = random.Random(seed)
    for _ in range(200):
        check_sentences(*random_run(rng))


def check_sentences(points, scored, last):
    found = suggest(points, last, scored)
    tables = {
        "Image similarity (CLIP-I)": ({step: each.subject for step, each in scored.items()}, 3),
        "Prompt similarity (CLIP-T)": ({step: each.prompt for step, each in scored.items()}, 3),
        "Validation loss": ({point.step: point.heldout for point in points}, 4),
    }
    for name, value, low, high in re.findall(
        r"([A-Z][\w -]+(?: \(.*?\))?) ([\d.]+); range .*? ([\d.]+) .*? to ([\d.]+) ", found.why
    ):
        column, digits = tables[name]
        shown = {step: f"{each:.{digits}f}" for step, each in column.items()}
        assert (value, low, high) == (shown[found.step], min(shown.values()), max(shown.values()))
    for words, of_these in re.findall(
        r"Steps ([\d, and]+) are about equally similar to the subject. Of these, (.*?)\.", found.why
    ):
        assert found.step in named(words)
        if "lowest validation loss" in of_these:
            assert tables["Validation loss"][0][found.step] == min(tables["Validation loss"][0][step] for step in named(words))
    for words in re.findall(r"Of the checkpoints at steps ([\d, and]+), step \d+ is clearly the most similar", found.why):
        assert scored[found.step].subject == max(scored[step].subject for step in named(words))
    compared, excluded = re.findall(r"Compared: (.*?)\.", found.why), re.findall(r"Excluded for [a-z ]+: (.*?)\.", found.why)
    if compared:
        assert sorted(set(named(",".join(compared + excluded)))) == [step for step in sorted(scored) if step]
        assert found.step in set(named(compared[0])) - set(named(",".join(excluded)))
    for low, at in re.findall(r"lowest value, ([\d.]+) at step (\d+)", found.why):
        assert low == f"{min(point.heldout for point in points):.4f}" == f"{tables['Validation loss'][0][int(at)]:.4f}"
