"""What the screens do with models and pictures. Only these modules import torch; the page is up before they are loaded."""

import importlib

# Several handlers may ask for different modules of this package at once. The libraries import each other in circles, which
# fails where two threads begin at different ends; here the first thread loads them, and all others wait for this package.
for name in ("pipelines.subject.generate", "training.options", "training.options.fewshot", "pipelines.fewshot.classifier"):
    importlib.import_module(name)
