"""IA3: h = W (l * x) with one trained number for each input, by PEFT  [Liu et al. 2022]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.adapter_method import TaskDefaults
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig

EXPORT_NOTE = """The kohya file holds the scales of the inputs as LyCORIS writes them for (IA)^3 (`weight` and `on_input`). A1111
reads it exactly; ComfyUI and stock diffusers do not read this form."""


@dataclass
class Ia3Options:
    """IA3 has no options."""


class Ia3(PeftMethod):
    """IA3 in its form for feed-forward layers, on all layers: scaled outputs would include the biases, which no file can hold."""

    name = "ia3"
    title = "IA3"
    reference = "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
    parameters = "n"
    Options = Ia3Options
    config_class = "IA3Config"
    adapts_quantized_layers = True
    samples_start = False
    export_note = EXPORT_NOTE

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The paper's rate; one number an input needs a high one."""
        return TaskDefaults(3e-3)

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration, in which all layers count as feed-forward."""
        config = super().config(target_modules, exclude_modules)
        config.feedforward_modules = set(target_modules)
        return config


METHOD = Ia3
