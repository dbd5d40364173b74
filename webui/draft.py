"""The settings of the next run. The browser stores them, so that a reload restores them; they are checked before use."""

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
# Options with fields of their own on the page, which the expert panel leaves out.
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
    """The settings of a subject run before it starts.

    Args:
        set: the id of the dataset; None for the bundled example.
        previous_set: the id of the user's dataset while the example is selected, to switch back to.
        preset: the name of the preset.
        options: options set by the user, by group and field, as in SubjectOptions.
        trigger: the trigger word, a rare word that stands for the subject.
        class_word: the kind of subject, such as toy; None if it was not entered.
        scenes: of the validation prompts: text appended to the prompt, or a complete prompt if it contains the trigger word;
            None for `SCENES`.
    """

    set: str | None = None
    previous_set: str | None = None
    preset: str = "Balanced"
    options: Options = field(default_factory=dict)
    trigger: str = TRIGGER
    class_word: str | None = None
    scenes: list[str] | None = None

    @classmethod
    def from_browser(cls, value: object) -> Draft:
        """The draft stored by the browser; values of the wrong type are replaced by defaults."""
        stored = value if isinstance(value, dict) else {}
        # Earlier versions stored "own".
        stored = {"previous_set": stored.get("own"), **stored}
        texts = {
            name: stored[name]
            for name in ("set", "previous_set", "preset", "trigger", "class_word")
            if isinstance(stored.get(name), str)
        }
        options = stored.get("options") if isinstance(stored.get("options"), dict) else {}
        scenes = stored.get("scenes")
        is_list = isinstance(scenes, list) and all(isinstance(scene, str) for scene in scenes)
        chosen = {group: dict(fields) for group, fields in options.items() if isinstance(fields, dict) and fields}
        return cls(**texts, options=chosen, scenes=scenes if is_list else None)

    @classmethod
    def like(cls, options: Options, set_id: str | None) -> Draft:
        """A draft with the options of an earlier run.

        Args:
            options: the options that differ from the defaults, by group.
            set_id: the id of the dataset; None for the example.
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
        """As JSON values for the browser to store."""
        return asdict(self)

    @property
    def kind(self) -> str:
        """The class word; empty if it must be entered first."""
        return self.class_word if self.class_word is not None else SAMPLE_CLASS if self.set is None else ""

    @property
    def prompt(self) -> str:
        """The instance prompt."""
        return f"a photo of {self.trigger.strip()} {self.kind.strip()}".strip()

    @property
    def prompts(self) -> list[str]:
        """The validation prompts: the instance prompt alone, and in each scene."""
        scenes = SCENES if self.scenes is None else [" ".join(scene.split()) for scene in self.scenes if scene.strip()]
        word = re.compile(rf"(?<!\w){re.escape(self.trigger.strip())}(?!\w)")
        return [self.prompt, *(scene if word.search(scene) else f"{self.prompt} {scene}" for scene in scenes)]

    @property
    def scene_lines(self) -> str:
        """The scenes as text, one per line."""
        return "\n".join(SCENES if self.scenes is None else self.scenes)

    def check(self) -> None:
        """Raises: InputError for the first invalid word or scene."""
        check_words(self.trigger, self.kind)
        scenes = self.scenes or []
        if len(scenes) > MOST_SCENES:
            raise InputError(f"At most {MOST_SCENES} scenes are allowed, got {len(scenes)}. Remove some lines.")
        for scene in scenes:
            if len(scene) > SCENE_LENGTH:
                raise InputError(
                    f"A scene may have at most {SCENE_LENGTH} characters, got {len(scene)}: {scene[:40]!r}. Shorten it."
                )
            if scene.startswith("-"):
                raise InputError(f"A scene must not begin with a hyphen, got {scene[:40]!r}. Begin with a word.")

    def values(self, images: Path | None, options: Options) -> Options:
        """The options of the run: `options` and those with fields of their own on the page.

        Args:
            images: the folder of the images; None for the example, which is the trainer's default.
            options: options of the preset and the user.
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
        set_here = {"data": data, "output": output}
        return merged(chosen, {group: fields for group, fields in set_here.items() if fields})


def check_words(trigger: str, kind: str) -> None:
    """Check the trigger word and the class word.

    Raises: InputError if the trigger word is not a single word, or the class word is missing or not one to four words.
    """
    if not WORD.fullmatch(trigger.strip()):
        raise InputError(
            f"The trigger word must be one word of at most 30 letters and digits, such as sks, got {trigger[:40]!r}."
        )
    words = kind.split()
    if not words:
        raise InputError("The class word under Check is empty. Enter what the photos show, such as dog, toy or mug.")
    if len(words) > 4 or not all(WORD.fullmatch(word) for word in words):
        raise InputError(f"The class word must be one to four plain words, such as dog or coffee mug, got {kind[:40]!r}.")
    if trigger.strip().lower() in (word.lower() for word in words):
        raise InputError(
            f"The trigger word and the class word are both {trigger.strip()!r}. Use a rare word such as sks as trigger word."
        )


def _article(words: str) -> str:
    return "an" if words.strip()[:1].lower() in tuple("aeiou") else "a"


def without(options: Options, names: dict[str, tuple[str, ...]]) -> Options:
    """`options` without the fields `names`, by group; empty groups are left out."""
    left = {
        group: {name: value for name, value in fields.items() if name not in names.get(group, ())}
        for group, fields in options.items()
    }
    return {group: fields for group, fields in left.items() if fields}


def merged(*options: Options) -> Options:
    """All options merged; later ones override earlier ones."""
    together: Options = {}
    for each in options:
        for group, fields in each.items():
            together[group] = together.get(group, {}) | fields
    return together
