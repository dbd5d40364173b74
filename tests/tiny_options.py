"""Options of adapter methods whose defaults are too large for the tiny models, and the methods that these models can have."""

from pipelines.adapter_options import AdapterOptions
from pipelines.methods import method_names

TINY = {"block_size": 4, "n_frequency": 40}


def full_precision_methods():
    """The methods that adapt a base model in full precision; test_quantization.py tests the others."""
    return [name for name in method_names() if not AdapterOptions(method=name).create().needs_quantization]
