"""Loading of LoRA files from any program: recognised by tensor names, converted to PEFT exactly, and verified after loading.

names: tensor names of all programs, mapped to the model's layers. kinds: recognition of files that cannot be loaded.
configuration: PEFT's configuration of the file. factors: each layer's weight change as a LoRA or DoRA.
offsets: changes of biases and norms. loading: onto a pipeline, with the verification.
"""

from pipelines.subject.lora_files.loading import check_file, left_out, load_lora_file, resolve, verify

__all__ = ["check_file", "left_out", "load_lora_file", "resolve", "verify"]
