"""Presets have valid options, each with a reason; the balanced one has the trainer's defaults."""

import pytest

from training.options import SubjectOptions
from webui.presets import BALANCED, SUBJECT, preset_named
from webui.work.options import KINDS, default_of, fields_of, groups_of


def default(group, field):
    return default_of(fields_of(groups_of(KINDS["subject"])[group])[field])


@pytest.mark.parametrize("preset", SUBJECT, ids=lambda preset: preset.name)
def test_a_preset_sets_existing_options_with_reasons(preset):
    groups = groups_of(SubjectOptions)
    for value in preset.values:
        assert value.field in fields_of(groups[value.group])
        assert value.reason.endswith(".")
        assert len(value.reason) < 160
        assert preset.reason(value.group, value.field) == value.reason


@pytest.mark.parametrize("preset", SUBJECT, ids=lambda preset: preset.name)
def test_the_values_of_a_preset_are_valid_together(preset):
    groups = groups_of(SubjectOptions)
    SubjectOptions(**{group: groups[group](**fields) for group, fields in preset.options().items()})


def test_the_balanced_preset_has_the_trainer_s_defaults():
    assert all(value.value == default(value.group, value.field) for value in preset_named(SUBJECT, BALANCED).values)


@pytest.mark.parametrize("preset", [preset for preset in SUBJECT if preset.name != BALANCED], ids=lambda preset: preset.name)
def test_every_value_of_the_other_presets_differs_from_the_balanced_preset(preset):
    assert all(value.value != default(value.group, value.field) for value in preset.values)


def test_an_unknown_name_means_the_balanced_preset():
    assert preset_named(SUBJECT, "Fastest").name == BALANCED
