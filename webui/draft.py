"""The settings of the next runs: a preset, and what the user changed.

The browser stores them, so that a reload restores them; they are checked before use. Words, preset and options belong to a
dataset: each dataset has its own, and new images begin with the defaults.
"""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.errors import InputError
from pipelines.methods import DEFAULT, REFERENCE, title_of
from training.options import NEW_SCENES
from training.options.data import SAMPLE_PROMPT
from training.options.values import Values, merged

PROMPT = re.compile(r"a photo of (\S+) (.+)")
TRIGGER, SAMPLE_CLASS = PROMPT.fullmatch(SAMPLE_PROMPT).groups()
WORD = re.compile(r"[^\W_][\w'-]{0,29}")
CLASS_WORDS = re.compile(rf"{WORD.pattern}( +{WORD.pattern}){{0,3}}")
# The settings of the bundled subject are stored under this id.
EXAMPLE = "example"
MAX_PROMPTS, PROMPT_LENGTH, MAX_STORED = 11, 300, 30


@dataclass(frozen=True)
class Value:
    """One option's value in presets; see presets.toml.

    Args:
        presets: the names of the presets that have it.
        option: its group and its name, as "data.shots".
        value: the value of the option.
        reason: the reason, one sentence.
        below: it applies to datasets with fewer images; None for all.
        method: it applies to this adapter method of a subject; None for all.
    """

    presets: list[str]
    option: str
    value: Any
    reason: str
    below: int | None = None
    method: str | None = None


@dataclass(frozen=True)
class Preset:
    """A named set of option values.

    Args:
        name: the display name.
        summary: the display name's supplement.
        purpose: when to use it.
        values: its option values; all others are the trainer's defaults.
    """

    name: str
    summary: str
    purpose: str
    values: tuple[Value, ...]

    def of(self, num_images: int, method: str) -> Iterator[Value]:
        """The values for a dataset of so many images and an adapter method."""
        for each in self.values:
            if (each.below is None or num_images < each.below) and each.method in (None, method):
                yield each

    def options(self, num_images: int, method: str) -> Values:
        """The option values by group and name."""
        values = [(*each.option.split("."), each.value) for each in self.of(num_images, method)]
        return merged(*({group: {name: value}} for group, name, value in values))


def presets_of(task: str) -> tuple[Preset, ...]:
    """The presets of a task, in order."""
    names = {"default": DEFAULT, "reference": REFERENCE}
    titles = {f"{key}_title": title_of(name) for key, name in names.items()}
    text = Path(__file__).with_name("presets.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text.format(**names, **titles))[task]
    values = [Value(**each) for each in table["values"]]
    return tuple(
        Preset(**each, values=tuple(value for value in values if each["name"] in value.presets)) for each in table["presets"]
    )


@dataclass(frozen=True)
class RunSettings:
    """The settings of the next run on one dataset.

    Args:
        preset: the name of the preset; empty for the task's default.
        options: values of the user, by group and field, as the form has them.
        trigger: the trigger word, a rare word that stands for the subject.
        class_word: the kind of subject, such as toy; None if it was not entered.
        scenes: of the preview prompts: text appended to the prompt, or a complete prompt if it contains the trigger word; None
            for those of the trainer.
        edits: how often they were changed, by which the page tells whether a response is older than what the user has entered.
    """

    preset: str = ""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    trigger: str = TRIGGER
    class_word: str | None = None
    scenes: list[str] | None = None
    edits: int = 0

    @classmethod
    def of_run(cls, options: Values) -> RunSettings:
        """The words of the prompts of an earlier run with these options."""
        words = PROMPT.fullmatch(options.get("data", {}).get("instance_prompt") or SAMPLE_PROMPT)
        settings = cls(trigger=words[1], class_word=words[2]) if words else cls()
        prompts = options.get("output", {}).get("validation_prompt")
        if prompts in (None, settings.prompts):
            return settings
        scenes = [text.removeprefix(f"{settings.prompt} ") for text in prompts if text != settings.prompt]
        return replace(settings, scenes=scenes)

    @property
    def kind(self) -> str:
        """The class word; empty if it must be entered first."""
        return (self.class_word or "").strip()

    @property
    def prompt(self) -> str:
        """The instance prompt."""
        return f"a photo of {self.trigger.strip()} {self.kind}".strip()

    @property
    def prompts(self) -> list[str]:
        """The preview prompts: the instance prompt alone, and in each scene."""
        scenes = NEW_SCENES if self.scenes is None else [" ".join(scene.split()) for scene in self.scenes if scene.strip()]
        word = re.compile(rf"(?<!\w){re.escape(self.trigger.strip())}(?!\w)")
        return [self.prompt, *(scene if word.search(scene) else f"{self.prompt} {scene}" for scene in scenes)]

    @property
    def scene_lines(self) -> str:
        """The scenes as text, one per line."""
        return "\n".join(NEW_SCENES if self.scenes is None else self.scenes)

    def check_words(self) -> None:
        """Raises: InputError for the first invalid word or prompt."""
        trigger, scenes = self.trigger.strip(), self.scenes or []
        if not WORD.fullmatch(trigger):
            allowed = "one word of at most 30 letters and digits, such as sks"
            raise InputError(f"The trigger word must be {allowed}, got {trigger[:40]!r}.")
        if not self.kind:
            raise InputError("The class word under Check is empty. Enter what the photos show, such as dog, toy or mug.")
        if not CLASS_WORDS.fullmatch(self.kind):
            allowed = "one to four plain words, such as dog or coffee mug"
            raise InputError(f"The class word must be {allowed}, got {self.kind[:40]!r}.")
        if trigger.lower() in self.kind.lower().split():
            remedy = "Use a rare word such as sks as trigger word."
            raise InputError(f"The trigger word and the class word are both {trigger!r}. {remedy}")
        if len(scenes) > MAX_PROMPTS:
            raise InputError(f"At most {MAX_PROMPTS} preview prompts are allowed, got {len(scenes)}. Remove some lines.")
        for scene in scenes:
            if len(scene) > PROMPT_LENGTH or scene.startswith("-"):
                allowed = f"at most {PROMPT_LENGTH} characters and not begin with a hyphen"
                raise InputError(f"A preview prompt must have {allowed}, got {scene[:40]!r} with {len(scene)}. Change it.")


@dataclass(frozen=True)
class Draft:
    """The chosen dataset and the settings of the next run on each dataset.

    Args:
        set: the id of the dataset; None for the bundled example.
        previous_set: the id of the user's dataset while the example is selected, to switch back to.
        version: differs whenever settings were replaced other than by the form.
        settings: by the id of the dataset.
        copied_from: the id of the dataset, or `EXAMPLE`, that `set` was a copy of or was created in place of.
    """

    set: str | None = None
    previous_set: str | None = None
    version: float = 0.0
    settings: dict[str, RunSettings] = field(default_factory=dict)
    copied_from: str | None = None

    @classmethod
    def from_browser(cls, value: object) -> Draft:
        """The draft stored by the browser; an empty one if it is not valid."""
        try:
            return TypeAdapter(cls).validate_python(value)
        except ValidationError:
            return cls()

    def to_browser(self) -> dict[str, Any]:
        """As JSON values for the browser to store, with the settings of at most `MAX_STORED` datasets."""
        return asdict(replace(self, settings=dict(list(self.settings.items())[-MAX_STORED:])))

    def settings_of(self, key: str) -> RunSettings:
        """The settings of the dataset `key`. The class word of the example is known."""
        settings = self.settings.get(key, RunSettings())
        return replace(settings, class_word=SAMPLE_CLASS) if key == EXAMPLE and settings.class_word is None else settings

    def with_settings(self, key: str, settings: RunSettings) -> Draft:
        """The draft with other settings of the dataset `key`."""
        edited = replace(settings, edits=self.settings_of(key).edits + 1)
        return replace(self, version=time.time(), settings={**self.settings, key: edited})

    def moved_to(self, set_id: str | None) -> Draft:
        """The draft with a copy of its dataset, which keeps the settings; those of the example are not for the user's photos."""
        if set_id == self.set:
            return replace(self, previous_set=None)
        settings = self.settings.get(self.set) if self.set is not None else None
        moved = self if settings is None or set_id is None else self.with_settings(set_id, settings)
        return replace(moved, set=set_id, previous_set=None, copied_from=self.set or EXAMPLE)
