"""Documented commands run as they are written, in this process and within seconds: a folder that has all that they name."""

from __future__ import annotations

import functools
import getpass
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import httpx
import open_clip
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from app_process import free_port
from diffusers import StableDiffusionXLPipeline
from documented import ROOT, Command
from hub_server import HubServer, model_files
from image_sets import class_files, stored_image, write_files
from peft import get_peft_model
from processes import kill_all_naming
from safetensors.torch import save_file
from stand_in_app import standing_for_training
from tiny_clip import CONFIG
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM
from worker_thread import run_jobs_in_this_process

import nora_vision
from nora_vision import NoraConfig
from pipelines.mini_clip import WEIGHTS_FILE
from training import arena, dreambooth_nora, fewshot_nora
from training.options import parse_options
from training.options.arena import DIGITS, parse_arena_options
from training.options.fewshot import parse_fewshot_options
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from webui import launching, server

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
LLAMA = "meta-llama/Meta-Llama-3-8B"
COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
OPENAI_CLIP = "timm/vit_base_patch16_clip_224.openai"
# Which documented commands no test here runs, and why. A command of CI stands in .ci/run.
RUN_BY_CI = "CI runs it"
NEEDS_ENGINE = (
    "it needs a container engine; tests/test_container.py checks its flags, and builds and starts the image where it can"
)
NEEDS_GPU = "it needs a GPU; tests/training/test_gpu_benchmark.py runs its steps on tiny models"
DOWNLOADS = "it downloads packages"
NOT_RUN = {
    "pip install -r requirements.txt": RUN_BY_CI,
    "ruff check .": RUN_BY_CI,
    "ruff format --check .": RUN_BY_CI,
    "mypy": RUN_BY_CI,
    "mkdocs build --strict": RUN_BY_CI,
    "mkdocs serve": "it serves until it is interrupted; `mkdocs build --strict` builds the same site",
    "pre-commit install": "it writes into the repository's hooks; they run what CI runs",
    "docker build --tag nora-vision .": NEEDS_ENGINE,
    "docker build --tag nora-vision:cuda --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 "
    "--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .": NEEDS_ENGINE,
    "docker run --rm --interactive --tty --volume nora-vision:/data nora-vision app "
    "--accounts /data/accounts.txt --add_account ada": NEEDS_ENGINE,
    "docker run --init --publish 127.0.0.1:7860:7860 --volume nora-vision:/data nora-vision": NEEDS_ENGINE,
    "docker run --gpus all --init --publish 127.0.0.1:7860:7860 --volume nora-vision:/data nora-vision:cuda": NEEDS_ENGINE,
    "docker run --rm --user 1000 --volume .:/data nora-vision train --instance_data_dir PHOTOS "
    "--instance_prompt 'a photo of sks dog'": NEEDS_ENGINE,
    "git clone https://github.com/AGI-Edgerunners/LLM-Adapters": "it downloads data; the tests write files in its form",
    "bash benchmarks/gpu.sh --minutes 8 --output gpu.md": NEEDS_GPU,
    "bash benchmarks/gpu.sh --wheels wheels --minutes 8 --output gpu.md": NEEDS_GPU,
    "pip download --only-binary=:all: --no-deps --dest wheels diffusers transformers peft accelerate open_clip_torch": DOWNLOADS,
    "pip download --only-binary=:all: --dest wheels pydantic ftfy": DOWNLOADS,
    "python -m training.runs.waiting": "the web app starts it with arguments; tests/training/test_waiting.py runs it",
}
RUNS = ("RUN", "CLASSIFIER")
ADDRESS = "http://127.0.0.1:7860"
PASSWORD = "a long enough password"

# Appended to a command, where the last value of a flag counts.
SHORT_SUBJECT = (
    "--max_train_steps 1 --heldout_image none --heldout_steps 1 --validation_steps 1 --num_candidate_images 0"
    " --validation_prompt x --no_certify --report_to none --lr_warmup_steps 0 --train_batch_size 1"
)
SHORT_FEWSHOT = (
    "--shots 2 --seeds 0 --test_share 0.03 --min_train_steps 1 --iterations_per_shot 1 --train_batch_size 4 --views 1"
    " --report_to none"
)
SMALL_RANKS = "--rank 4 --inner_r 2"
SMALL_MODEL = f"--pretrained_model_name_or_path tiny {SMALL_RANKS}"
# What a run to be resumed needs besides.
RESUMABLE = "--max_train_steps 2 --checkpointing_steps 1"
SHORT_MODULES = {"pipelines.fewshot.domain_shift": "--images_dir PRETRAINING --num_classes 2 --num_train_images 8"}
SHORT_PRETRAINING = "--output_dir pretrained --scenes 8 --stages basis"
SHORT_PROGRAMS = {
    "benchmarks/adapter_step.py": "--tokens 16 --steps 1",
    "benchmarks/awsvd_speed.py": "--rank 4 --repeats 1",
    "benchmarks/base_calibration.py": "--rank 4 --threads --dtypes",
    "benchmarks/bleed.py": f"--pretrained_model_name_or_path tiny --flags '{SHORT_SUBJECT}' --nora_flags '{SMALL_RANKS}'",
    "benchmarks/clip_step.py": "--steps 1 --rank 4 --inner_r 1 --formats",
    "benchmarks/domain_shift.py": "--images_dir PRETRAINING --num_classes 2 --seeds 0",
    "benchmarks/methods.py": "--width 64 --tokens 8 --steps 1 --methods lora",
    "benchmarks/mini_clip.py": "--photos_dir PRETRAINING --scenes 4 --draws 1 --shots 4",
    "benchmarks/outliers.py": "--sets 4",
    "benchmarks/output_errors.py": "--ranks 4",
    "benchmarks/paper.py": "--dry_run",
    "benchmarks/small_adapter.py": "--layers 4",
    "benchmarks/trainer_speed.py": "--repeats 1",
    "benchmarks/true_size.py": f"--tiny {SMALL_RANKS}",
}
# Instead of a value that only a large model or much time can use; where the flag is given.
INSTEAD = {"--resolution": "16", "--rank": "4", "--inner_r": "2", "--num_class_images": "1", "--stop_text_encoder_training": "1"}


class UnknownCommandError(Exception):
    """No rule says how a command is run."""


class Workspace:
    """A folder with the repository's files and with what the pages call PHOTOS, CLASSES, runs/RUN and so on.

    Args:
        path: of the folder; commands run in it.
        tiny: the folder of a model in which a training step takes a fraction of a second.
        patch: changes of this process, undone when the test ends.
    Attributes:
        recipe_runs: the recipes that have run in any folder, with their arguments.
    """

    recipe_runs: ClassVar[set[tuple[str, ...]]] = set()

    def __init__(self, path: Path, tiny: Path, images: Path, patch: pytest.MonkeyPatch) -> None:
        self.path, self.patch = path, patch
        path.mkdir()
        for entry in ROOT.iterdir():
            if not entry.name.startswith((".git", "runs", "uploads")) and entry.name not in ("assets", "docs"):
                (path / entry.name).symlink_to(entry)
        # Folders of its own, since documented commands write files into them.
        shutil.copytree(ROOT / "docs", path / "docs")
        (path / "assets").mkdir()
        for entry in (ROOT / "assets").iterdir():
            if entry.is_dir():
                (path / "assets" / entry.name).symlink_to(entry)
        (path / "tiny").symlink_to(tiny)
        (path / "PHOTOS").symlink_to(images)
        (path / "SUBJECTS").mkdir()
        for name in ("backpack_dog", "candle", "robot_toy", "wolf_plushie"):
            (path / "SUBJECTS" / name).symlink_to(images)
        write_files(path / "CLASSES", class_files({"cats": 8, "dogs": 8, "fish": 8}))
        (path / "IMAGE.jpg").write_bytes(stored_image(0, form="JPEG"))
        self._write_pretraining_photos(path / "PRETRAINING")
        (path / "train_dreambooth_lora_sdxl.py").touch()
        self._shorten()
        # A worker process would outlive the folder that it was started in.
        run_jobs_in_this_process(patch)

    def _write_pretraining_photos(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "classes.json").write_text(json.dumps({"n1": "cat", "n2": "dog"}))
        with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
            for name, content in class_files({"n1": 10, "n2": 10}).items():
                archive.writestr(name, content)

    def _shorten(self) -> None:
        """Have this process work in the folder, and every image take one denoising step."""
        self.patch.chdir(self.path)
        for name in [name for name in os.environ if name.startswith(("GRADIO_", "ACCELERATE_"))]:
            self.patch.delenv(name)
        call = StableDiffusionXLPipeline.__call__

        @functools.wraps(call)
        def one_step(*arguments: object, **named: object) -> object:
            return call(*arguments, **named | {"num_inference_steps": 1})

        self.patch.setattr(StableDiffusionXLPipeline, "__call__", one_step)

    def add_runs(self, runs: Path) -> None:
        """Have copies of the finished runs RUN and CLASSIFIER."""
        shutil.copytree(runs, self.path / "runs")

    def serve_models(self, hub: HubServer, sdxl: Path) -> None:
        """Have the hub serve the models that pages name: the one in the folder `sdxl`, and a tiny CLIP as OpenAI's ViT-B-16."""
        hub.add(SDXL, model_files(sdxl, None, "fp16"))
        configuration = CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"vocab_size": 49408, "context_length": 77}}
        self.patch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", configuration)
        weights = self.path / WEIGHTS_FILE
        save_file(open_clip.CLIP(**configuration, quick_gelu=True).state_dict(), weights)
        hub.add(OPENAI_CLIP, {WEIGHTS_FILE: weights})

    def add_language_model(self, hub: HubServer) -> None:
        """Have the hub serve a tiny Llama as LLaMA-3 8B, and have data in LLM-Adapters' form and a trained adapter."""
        folder = save_tiny_llama(self.path / "llama")
        hub.add(LLAMA, model_files(folder))
        example = {"instruction": "is the water wet true or false", "output": "the correct answer is true", "answer": "true"}
        for file in ("ft-training_set/commonsense_170k.json", *(f"dataset/{name}/test.json" for name in COMMONSENSE)):
            path = self.path / "LLM-Adapters" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([example] * 8))
        config = NoraConfig(r=4, inner_r=2, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        model.save_pretrained(self.path / "commonsense" / "adapter")
        # The layers of the tiny model are smaller than LLaMA's ranks.
        self.patch.setattr(nora_vision, "NoraConfig", lambda **fields: NoraConfig(**fields | {"r": 16, "inner_r": 4}))

    def run(self, command: Command) -> None:
        """Run a command; what it cannot do is an error, as is one that no rule knows."""
        for name, value in command.variables:
            self.patch.setenv(name, value)
        for start, rule in RULES.items():
            if command.words[: len(start)] == start:
                return rule(self, *command.words[len(start) :])
        raise UnknownCommandError(str(command))


def shortened(words: Sequence[str], *more: str) -> list[str]:
    """The words of a command with `more` flags, and with small values where it gives large ones."""
    flags = [word for option, value in INSTEAD.items() if option in words for word in (option, value)]
    return [*words, *(word for flags_in_one in more for word in flags_in_one.split()), *flags]


def launch(workspace: Workspace, *words: str) -> None:
    """`accelerate launch`: a recipe in this process, after accelerate has accepted the launcher's flags.

    The recipe trains in float32, since bfloat16 is slow on CPUs.
    """
    given = launch_command_parser().parse_args(words)
    recipe = given.training_script if given.module else given.training_script.removesuffix(".py").replace("/", ".")
    if given.config_file is not None:
        load_config_from_file(given.config_file)
    if not given.module and not Path(given.training_script).is_file():
        raise FileNotFoundError(given.training_script)
    run_recipe(workspace, recipe, given.training_script_args)


def run_recipe(workspace: Workspace, recipe: str, arguments: Sequence[str]) -> None:
    """Run a recipe, once for its arguments: other launcher flags and another directory do not change what it does."""
    if (recipe_run := (recipe, *without_output_dir(arguments))) not in workspace.recipe_runs:
        RECIPES[recipe](workspace, *arguments)
        workspace.recipe_runs.add(recipe_run)


def without_output_dir(words: Sequence[str]) -> list[str]:
    """`words` without `--output_dir` and its value."""
    at = words.index("--output_dir") if "--output_dir" in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def train_subject(workspace: Workspace, *words: str) -> None:
    """Two training steps; on a tiny model where the command does not depend on which one it is."""
    uses_a_model = "--pretrained_model_name_or_path" in words or "--options_file" in words
    resumes = "--resume_from_checkpoint" in words
    if resumes:
        shutil.rmtree(list_checkpoints(RunDirectory(Path(words[words.index("--output_dir") + 1])).checkpoints)[-1])
    elif "--output_dir" in words:
        shutil.rmtree(words[words.index("--output_dir") + 1], ignore_errors=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    more = [SHORT_SUBJECT, RESUMABLE if resumes else "" if uses_a_model else SMALL_MODEL]
    dreambooth_nora.main(parse_options(shortened(words, *more)))


def train_classifier(workspace: Workspace, *words: str) -> None:
    """All methods that the command names, on two images of each class."""
    if "--output_dir" in words:
        shutil.rmtree(words[words.index("--output_dir") + 1], ignore_errors=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    fewshot_nora.main(parse_fewshot_options(shortened(words, SHORT_FEWSHOT, SMALL_RANKS)))


def compare_methods(workspace: Workspace, *words: str) -> None:
    """The arena with all that the command names, without its trainings: tests/training/test_arena.py has them."""
    options = parse_arena_options([*words, "--report_only"])
    for name in options.data.datasets:
        if name != DIGITS and not (workspace.path / name).exists():
            write_files(workspace.path / name, class_files({"cats": 8, "dogs": 8, "fish": 8}))
    arena.main(options)


def run_module(workspace: Workspace, module: str, *words: str) -> None:
    """`python -m`."""
    workspace.patch.setattr(sys, "argv", [module, *words, *SHORT_MODULES.get(module, "").split()])
    workspace.patch.delitem(sys.modules, module, raising=False)
    _ending_well(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def run_script(workspace: Workspace, script: str, *words: str) -> None:
    """`python`, for a benchmark: on models and numbers that are small."""
    workspace.patch.setattr(sys, "argv", [script, *words, *shlex.split(SHORT_PROGRAMS[script])])
    AcceleratorState._reset_state(reset_partial_state=True)
    # As when Python runs a script.
    workspace.patch.syspath_prepend(str(Path(script).parent.resolve()))
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if script in SMALLER:
        SMALLER[script](workspace, module)
        return _ending_well(module.main)
    return _ending_well(lambda: runpy.run_path(script, run_name="__main__"))


def _ending_well(program: Callable[[], object]) -> None:
    try:
        code = program()
    except SystemExit as ended:
        code = ended.code
    if isinstance(code, int | str) and code:
        raise RuntimeError(f"The command ended with the exit code {code}.")


def small_matrices(workspace: Workspace, benchmark: object) -> None:
    """One small matrix in place of SDXL's."""
    for name in ("compare_on_one_matrix", "compare_precisions"):
        compare = getattr(benchmark, name)
        workspace.patch.setattr(benchmark, name, lambda size, *more, compare=compare: compare(32, *more))
    workspace.patch.setattr(benchmark, "sdxl_attention_shapes", lambda: Counter({(16, 24): 1}))


def only_parsed(workspace: Workspace, benchmark: object) -> None:
    """The flags of both trainers, without the trainers: tests/training/test_trainer_speed.py has the stopwatch."""

    def measured(sides: dict[str, SimpleNamespace], folder: Path) -> dict[str, dict]:
        parse_options(sides["ours"].command[1:])
        return {name: {"steps_per_second": 1.0, "milliseconds": {"backward": 1.0}} for name in sides}

    workspace.patch.setattr(benchmark, "measured", measured)
    parse = benchmark.HfArgumentParser(benchmark.BenchmarkOptions).parse_args_into_dataclasses
    workspace.patch.setattr(benchmark, "main", functools.partial(lambda main: main(parse()[0]), benchmark.main))


def tiny_unet(workspace: Workspace, benchmark: object) -> None:
    """The UNet of the tiny model, and a few digits."""
    workspace.patch.setattr(benchmark, "BUILT_IN_MODEL", workspace.path / "tiny")
    workspace.patch.setattr(benchmark, "IMAGES", 8)


def tables_of_a_copy(workspace: Workspace, benchmark: object) -> None:
    """The document is a link to the repository's: its tables are replaced in a copy."""

    def write(document: Path, tables: dict[str, str]) -> None:
        copied = workspace.path / document.name
        shutil.copy(document, copied)
        written(copied, tables)
        assert tables["measured"] in copied.read_text(encoding="utf-8")

    written = benchmark.write
    workspace.patch.setattr(benchmark, "write", write)


def only_slices(workspace: Workspace, benchmark: object) -> None:
    """The two slices, at one noise level, without LoRA and ordinary NoRA."""
    options, kinds = benchmark.BenchmarkOptions, benchmark.BenchmarkOptions.kinds
    workspace.patch.setattr(options, "kinds", lambda given: {benchmark.SLICES: kinds(given)[benchmark.SLICES]})
    workspace.patch.setattr(benchmark, "NOISE_LEVELS", 1)
    workspace.patch.setattr(benchmark, "SEEDS", (0,))
    parse = benchmark.HfArgumentParser(options).parse_args_into_dataclasses
    workspace.patch.setattr(benchmark, "main", functools.partial(lambda main: main(parse()[0]), benchmark.main))


SMALLER = {
    "benchmarks/awsvd_speed.py": small_matrices,
    "benchmarks/bleed.py": only_slices,
    "benchmarks/methods.py": tables_of_a_copy,
    "benchmarks/output_errors.py": tiny_unet,
    "benchmarks/trainer_speed.py": only_parsed,
}


def open_app(workspace: Workspace, *words: str) -> None:
    """`python app.py`: served, asked for its first page, and interrupted."""
    workspace.patch.setattr(getpass, "getpass", lambda _: PASSWORD)
    launched, asked = server.launched, []

    def launched_and_asked(*arguments: object, **named: object) -> object:
        page = launched(*arguments, **named)
        asked.append(httpx.get(page.local_url).status_code)
        return page

    def interrupted(number: int, handler: Callable[[int, object], None]) -> None:
        handler(number, None)

    workspace.patch.setattr(server, "launched", launched_and_asked)
    workspace.patch.setattr(server.signal, "signal", interrupted)
    port = [] if "--add_account" in words else ["--port", str(free_port())]
    assert server.main([*words, *port]) == 0
    assert asked == ([] if "--add_account" in words else [200])


def check_installation(workspace: Workspace, *words: str) -> None:
    """`pip install`: the file, or the extras, exist; nothing is installed."""
    for word in words:
        if extras := re.fullmatch(r"(?:\.|nora-vision)\[([\w,]+)\]", word):
            known = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extras[1].split(",")) <= set(known), f"pyproject.toml has no {extras[1]}"


def console_command(workspace: Workspace, name: str, *words: str) -> None:
    """`nora-vision`, by its entry point; one that needs arguments and is named without any answers --help."""
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"].get("scripts", {})
    module, _, function = scripts["nora-vision"].partition(":")
    if name == "app":
        return open_app(workspace, *words)
    if words and name in RECIPE_NAMES:
        return run_recipe(workspace, RECIPE_NAMES[name], words)
    entry = getattr(importlib.import_module(module), function)
    workspace.patch.setattr(sys, "argv", ["nora-vision", name, *(words or ["--help"])])
    workspace.patch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return _ending_well(entry)


def find_tests(workspace: Workspace, *words: str) -> None:
    """`python -m pytest`, which runs this: the files exist that it is given."""
    for path in (word for word in words if "/" in word):
        if not Path(path).exists():
            raise FileNotFoundError(path)


RECIPE_NAMES = {"train": "training.dreambooth_nora", "fewshot": "training.fewshot_nora", "arena": "training.arena"}
RECIPES = {
    "training.arena": compare_methods,
    "benchmarks.arena": compare_methods,
    "training.dreambooth_nora": train_subject,
    "training.fewshot_nora": train_classifier,
    "training.pretrain_mini": lambda workspace, *words: run_module(
        workspace, "training.pretrain_mini", *words, *SHORT_PRETRAINING.split()
    ),
}
RULES = {
    ("accelerate", "launch"): launch,
    ("python", "app.py"): open_app,
    ("python", "-m", "pytest"): find_tests,
    ("python", "-m"): run_module,
    ("nora-vision",): console_command,
    ("python",): run_script,
    ("pip", "install"): check_installation,
}


def run_python(workspace: Workspace, source: str, where: str) -> None:
    """Run a Python block; one that asks the web app finds it at its address, with a stand-in for the training."""
    if ADDRESS not in source:
        exec(compile(source, where, "exec"), {"__name__": "__main__"})
        return
    workspace.patch.setattr(launching, "_with_launcher", standing_for_training)
    settings = server.checked_settings(server.parser().parse_args(["--port", str(free_port())]))
    page = server.launched(settings)
    try:
        exec(compile(source.replace(ADDRESS, page.local_url), where, "exec"), {"__name__": "__main__"})
    finally:
        page.close(verbose=False)
        kill_all_naming(workspace.path)


def make_runs(workspace: Workspace) -> Path:
    """Train RUN and CLASSIFIER on the built-in models; returns the folder that holds them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    dreambooth_nora.main(parse_options(["--output_dir", "runs/RUN", *SHORT_SUBJECT.split(), *RESUMABLE.split()]))
    flags = f"--data_dir CLASSES --method zeroshot nora --output_dir runs/CLASSIFIER {SHORT_FEWSHOT}"
    AcceleratorState._reset_state(reset_partial_state=True)
    fewshot_nora.main(parse_fewshot_options(flags.split()))
    return workspace.path / "runs"
