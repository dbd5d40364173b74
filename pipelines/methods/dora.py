"""DoRA: by PEFT,  h = m (W + s B A) x / ||W + s B A||,  norms by row  [Liu et al. 2024]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.methods.lora import Lora

if TYPE_CHECKING:
    from peft import PeftConfig

EXPORT_NOTE = """The kohya file holds `dora_scale`, the length of each row of every changed weight, as LyCORIS with `wd_on_output`
writes it. Stock diffusers and sd-scripts leave it out, A1111 takes it for the lengths of columns, and ComfyUI and Forge divide by
the base model's lengths: their images differ. The diffusers file is the adapter as it was trained."""


class Dora(Lora):
    """LoRA that trains the length of every row of the weight too; its files are LoRA's with that length in them."""

    name = "dora"
    title = "DoRA"
    reference = "Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation"
    export_note = EXPORT_NOTE

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """LoRA's configuration with `use_dora`."""
        config = super().config(target_modules, exclude_modules)
        config.use_dora = True
        return config


METHOD = Dora
