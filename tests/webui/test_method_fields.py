"""The expert panel has the options of the methods that a run would train, and no others."""

import pytest

from pipelines.adapter_options import AdapterOptions
from pipelines.methods import DEFAULT, REFERENCE, method_names
from training.options.fewshot import FewShotMethodOptions
from webui.panel import FieldSource, _EffectiveValues
from webui.presets import Preset
from webui.work.form_schema import panel_fields

PRESET = Preset("Plain", "no time", "Nothing of its own.", ())


def shown(task, group, own):
    """The method options that the panel shows with the user's values `own`."""
    effective = _EffectiveValues(FieldSource(None, task, [PRESET], None, None, None), PRESET, {group: own}, {})
    return {field.name for field in panel_fields(task, True)[group] if field.methods and effective.applies(field)}


def has(options, *methods):
    """The options that any of `methods` has."""
    return {name for name, option in options.method_options.items() if set(methods) & set(option.methods)}


@pytest.mark.parametrize("method", method_names())
def test_the_panel_has_the_options_of_the_chosen_method(method):
    assert shown("subject", "adapter", {"method": method}) == has(AdapterOptions, method)
    assert shown("classify", "method", {"method": ["zeroshot", method]}) == has(FewShotMethodOptions, method)


def test_without_a_choice_the_panel_has_the_options_of_the_default_methods():
    assert shown("subject", "adapter", {}) == has(AdapterOptions, DEFAULT)
    assert shown("classify", "method", {}) == has(FewShotMethodOptions, DEFAULT, REFERENCE)


def test_without_an_adapter_method_the_panel_has_no_method_options():
    assert shown("classify", "method", {"method": ["zeroshot"]}) == set()
