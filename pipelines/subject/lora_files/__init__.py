"""LoRA files of any program: recognised by their tensors' names, put into PEFT's form exactly, and checked after loading.

names: tensor names of all dialects, as layers of this model. kinds: what a file is that cannot be loaded.
configuration: PEFT's settings beside the tensors. factors: each layer's change of weight as LoRA or DoRA.
offsets: changes of biases and norms. loading: onto a pipeline, and the checks afterwards.
"""

from pipelines.subject.lora_files.loading import check_file, left_out, load_lora_file, resolve, verify

__all__ = ["check_file", "left_out", "load_lora_file", "resolve", "verify"]
