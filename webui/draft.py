"""The settings of the next run. The browser stores them, so a reload restores them, and they are never trusted."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.errors import InputError

TRIGGER, SAMPLE_CLASS = "sks", "toy"
SAMPLE_PROMPT = f"a photo of {TRIGGER} {SAMPLE_CLASS}"
SCENES = ("in the snow", "in the forest", "at night", "in the water")
PROMPT = re.compile(r"a photo of (\S+) (.+)")
WORD = re.compile(r"[^\W_][\w'-]{0,29}")
MOST_SCENES, SCENE_LENGTH = 11, 300
# What the page says itself, so that the expert panel does not.
SET_BY_THE_PAGE = {
    "subject": {
        "data": ("instance_data_dir", "instance_prompt", "class_prompt"),
        "output": ("output_dir", "resume_from_checkpoint", "validation_prompt", "dry_run"),
    },
    "classify": {
        "data": ("data_dir", "dataset", "class_names"),
        "output": ("output_dir", "resume_from_checkpoint"),
    },
}
Options = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Draft:
    """A subject run, before it is started.

    Args:
        set: the id of its images; None for the bundled example.
        own: the id of the user's own images while the example is looked at, to come back to.
        preset: the preset's name.
        options: the user's own values, by group and field, as in SubjectOptions.
        trigger: the rare word that stands for the subject.
        class_word: what kind of thing it is; None where it was not said.
        scenes: of the sample images: what is put after the prompt, or a whole prompt where it holds the rare word; None for
            `SCENES`.
    """

    set: str | None = None
    own: str | None = None
    preset: str = "Balanced"
    options: Options = field(default_factory=dict)
    trigger: str = TRIGGER
    class_word: str | None = None
    scenes: list[str] | None = None

    @classmethod
    def from_browser(cls, value: object) -> Draft:
        """What the browser kept; whatever is not of the right shape is as if it had never been said."""
        stored = value if isinstance(value, dict) else {}
        texts = {
            name: stored[name] for name in ("set", "own", "preset", "trigger", "class_word") if isinstance(stored.get(name), str)
        }
        options = stored.get("options") if isinstance(stored.get("options"), dict) else {}
        scenes = stored.get("scenes")
        is_list = isinstance(scenes, list) and all(isinstance(scene, str) for scene in scenes)
        chosen = {group: dict(fields) for group, fields in options.items() if isinstance(fields, dict) and fields}
        return cls(**texts, options=chosen, scenes=scenes if is_list else None)

    @classmethod
    def like(cls, options: Options, set_id: str | None) -> Draft:
        """A draft that starts from a run's options.

        Args:
            options: those that differ from the defaults, by group.
            set_id: the id of its images; None for the example.
        """
        data, output = options.get("data", {}), options.get("output", {})
        words = PROMPT.fullmatch(data.get("instance_prompt") or "")
        trigger, class_word = words.groups() if words else (TRIGGER, None)
        left = without(options, SET_BY_THE_PAGE["subject"])
        draft = cls(set_id, options=left, trigger=trigger, class_word=class_word)
        prompts = output.get("validation_prompt")
        if prompts in (None, draft.prompts):
            return draft
        return replace(draft, scenes=[text.removeprefix(f"{draft.prompt} ") for text in prompts if text != draft.prompt])

    def to_browser(self) -> dict[str, Any]:
        """As plain values for the browser to keep."""
        return asdict(self)

    @property
    def kind(self) -> str:
        """The class word in force; empty where one has to be given."""
        return self.class_word if self.class_word is not None else SAMPLE_CLASS if self.set is None else ""

    @property
    def prompt(self) -> str:
        """What the images are said to show."""
        return f"a photo of {self.trigger.strip()} {self.kind.strip()}".strip()

    @property
    def prompts(self) -> list[str]:
        """Of the sample images: the prompt itself, and in each scene."""
        scenes = SCENES if self.scenes is None else [" ".join(scene.split()) for scene in self.scenes if scene.strip()]
        word = re.compile(rf"(?<!\w){re.escape(self.trigger.strip())}(?!\w)")
        return [self.prompt, *(scene if word.search(scene) else f"{self.prompt} {scene}" for scene in scenes)]

    @property
    def scenes_in_lines(self) -> str:
        """The scenes as a text, one a line."""
        return "\n".join(SCENES if self.scenes is None else self.scenes)

    def check(self) -> None:
        """Raises: InputError for the first word or scene that cannot be used."""
        check_words(self.trigger, self.kind)
        scenes = self.scenes or []
        if len(scenes) > MOST_SCENES:
            raise InputError(f"There may be {MOST_SCENES} scenes at most, got {len(scenes)}. Remove some lines.")
        for scene in scenes:
            if len(scene) > SCENE_LENGTH:
                raise InputError(f"A scene may have {SCENE_LENGTH} characters, got {len(scene)}: {scene[:40]!r}. Shorten it.")
            if scene.startswith("-"):
                raise InputError(f"A scene must not begin with a hyphen, got {scene[:40]!r}. Begin with a word.")

    def values(self, images: Path | None, options: Options) -> Options:
        """What the run is started with: `options`, and what the page says itself.

        Args:
            images: the folder of its images; None for the example, which is the trainer's default.
            options: the preset's values and the user's own.
        """
        data: dict[str, Any] = {} if images is None else {"instance_data_dir": str(images)}
        output: dict[str, Any] = {}
        if images is not None or self.prompt != SAMPLE_PROMPT:
            data["instance_prompt"] = self.prompt
        if self.scenes is not None:
            output["validation_prompt"] = self.prompts
        chosen = without(options, SET_BY_THE_PAGE["subject"])
        if chosen.get("data", {}).get("with_prior_preservation"):
            data["class_prompt"] = f"a photo of {_article(self.kind)} {self.kind.strip()}"
        said = {"data": data, "output": output}
        return merged(chosen, {group: fields for group, fields in said.items() if fields})


def check_words(trigger: str, kind: str) -> None:
    """Refuse a trigger word that is not one word, and a class word that is missing or no word.

    Raises: InputError saying what is wrong.
    """
    if not WORD.fullmatch(trigger.strip()):
        raise InputError(f"The rare word must be one word of at most 30 letters and digits, such as sks, got {trigger[:40]!r}.")
    words = kind.split()
    if not words:
        raise InputError("Say in a word what the photos show, such as dog, toy or mug: the second word under Check is empty.")
    if len(words) > 4 or not all(WORD.fullmatch(word) for word in words):
        raise InputError(f"The kind of thing must be one to four plain words, such as dog or coffee mug, got {kind[:40]!r}.")
    if trigger.strip().lower() in (word.lower() for word in words):
        raise InputError(
            f"The rare word and the kind of thing are both {trigger.strip()!r}. Use a word such as sks for the first."
        )


def _article(words: str) -> str:
    return "an" if words.strip()[:1].lower() in tuple("aeiou") else "a"


def without(options: Options, names: dict[str, tuple[str, ...]]) -> Options:
    """`options` without the fields called `names`, by group; groups that are then empty are left out."""
    left = {
        group: {name: value for name, value in fields.items() if name not in names.get(group, ())}
        for group, fields in options.items()
    }
    return {group: fields for group, fields in left.items() if fields}


def merged(*options: Options) -> Options:
    """All of them together; the later win."""
    together: Options = {}
    for each in options:
        for group, fields in each.items():
            together[group] = together.get(group, {}) | fields
    return together
