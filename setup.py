"""The part of the build that pyproject.toml cannot state: a wheel carries assets/ under a name of its own.

A top-level package `assets` could clash with another distribution's; `pipelines.built_in` finds the folder under either name.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nora_vision*", "pipelines*", "training*", "webui*"]), "nora_vision_assets"],
    package_dir={"nora_vision_assets": "assets"},
)
