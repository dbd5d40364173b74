"""Cancel affects the generations that a tab has started, and no later or other ones."""

from webui.cancellation import MAX_SESSIONS, CancellationTokens
from webui.generation import FILE
from webui.screens.use import adapter_fields


def test_cancel_affects_only_the_generations_that_this_tab_has_started():
    tokens = CancellationTokens()
    first, waiting = tokens.begin("a"), tokens.begin("a")
    other = tokens.begin("b")
    tokens.cancel("a")
    later = tokens.begin("a")
    assert [tokens.is_cancelled("a", token) for token in (first, waiting, later)] == [True, True, False]
    assert not tokens.is_cancelled("b", other)


def test_the_number_of_remembered_tabs_is_limited():
    tokens = CancellationTokens()
    for place in range(MAX_SESSIONS + 5):
        tokens.begin(str(place))
        tokens.cancel(str(place))
    assert len(tokens._last) == len(tokens._cancelled) == MAX_SESSIONS


def test_the_settings_of_an_image_become_run_step_scale_and_further_adapters():
    used = [{"name": "a", "reference": "run@30", "scale": 0.5}, {"name": "b", "reference": f"{FILE}@x", "scale": 1.2}]
    assert adapter_fields({"adapters": used}) == ("run", 30, 0.5, [(f"{FILE}@x", 1.2)])
    assert adapter_fields({"adapters": used[1:]}) == (None, None, 0.0, [(f"{FILE}@x", 1.2)])
    assert adapter_fields({"adapters": []}) == (None, None, 0.0, [])
