"""DoRA, by PEFT:  h = m (W + alpha / r B A) x / ||W + alpha / r B A||, norms by row  [Liu et al. 2024]."""

from __future__ import annotations

from peft import PeftConfig

from pipelines.methods import AdapterOptions
from pipelines.methods.lora import Lora


class Dora(Lora):
    """LoRA that trains the length of every row of the weight too; its files are LoRA's with that length in them."""

    def config(self, options: AdapterOptions, target_modules: list[str], exclude_modules: str | None) -> PeftConfig:
        """LoRA's configuration with `use_dora`."""
        config = super().config(options, target_modules, exclude_modules)
        config.use_dora = True
        return config


METHOD = Dora()
