"""The console command, and the wheel in an environment and a folder without a checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

import nora_vision_cli
from pipelines import built_in
from training.runs import provenance

ROOT = Path(__file__).parents[1]
# What comes before an imported module must not be the folder where a command is given.
# Of the root of a checkout.
NOT_SOURCES = {".git", ".venv", "build", "dist", "runs", "site", "uploads"}
TRAP = 'raise SystemExit("imported from the working directory")\n'
IMPORTED = """
import sys, nora_vision_cli
nora_vision_cli.main(["--help"])
print("imported:", *sys.modules)
"""


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_help_lists_every_subcommand_and_imports_the_standard_library_alone():
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, check=True)
    text, _, imported = done.stdout.rpartition("imported: ")
    assert re.findall(r"^  (\S+)", text, re.MULTILINE) == list(nora_vision_cli.SUBCOMMANDS)
    top_level = {name.partition(".")[0] for name in imported.split()}
    assert not top_level & {"torch", "transformers", "gradio", "pipelines", "training", "webui", "nora_vision"}


def test_an_unknown_subcommand_names_those_that_exist(capsys):
    assert nora_vision_cli.main(["trian"]) == 2
    message = "there is no subcommand 'trian'. Choose one of train, fewshot, arena, generate, classify, check-images, app."
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "subcommand"), nora_vision_cli.SUBCOMMANDS.items())
def test_a_subcommand_runs_its_module_as_the_main_program_with_its_flags_unchanged(name, subcommand, monkeypatch, tmp_path):
    modules = {"__main__": sys.modules["__main__"]}
    monkeypatch.setattr(sys, "modules", sys.modules | modules)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    package, _, module = subcommand.module.rpartition(".")
    assert (ROOT / package.replace(".", "/") / f"{module}.py").is_file()
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text("import sys, json, pathlib\npathlib.Path(sys.argv[-1]).write_text(json.dumps([__name__, *sys.argv]))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(nora_vision_cli.SUBCOMMANDS, name, subcommand._replace(module="stand_in"))
    given = ["--prompt", "a  b", "--", "--x=", str(tmp_path / "words")]
    assert nora_vision_cli.main([name, *given]) is None
    assert json.loads((tmp_path / "words").read_text()) == ["__main__", f"nora-vision {name}", *given]


def test_the_recorded_command_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nora-vision train", "--rank", "4"])
    assert provenance.typed_words(["accelerate", "launch"]) == ["nora-vision", "train", "--rank", "4"]
    monkeypatch.setattr(sys, "argv", ["training/dreambooth_nora.py", "--rank", "4"])
    words = provenance.typed_words(["accelerate", "launch"])
    assert words == ["accelerate", "launch", "training/dreambooth_nora.py", "--rank", "4"]


def test_the_built_in_model_of_a_wheel_or_checkout_that_is_gone_is_recognised():
    assert built_in.is_built_in("/gone/site-packages/nora_vision_assets/mini-sdxl")
    assert built_in.is_built_in("/gone/assets/mini-sdxl")
    assert not built_in.is_built_in("/gone/models/mini-sdxl")


def test_the_processes_that_a_run_starts_import_nothing_from_the_working_directory(tmp_path):
    """Of the console command, the queue and the dry runs of the memory fallback."""
    for package in ("training", "pipelines", "webui"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(TRAP)
    environment = os.environ | built_in.import_path()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "training.runs.waiting", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "usage:" in done.stdout) == (0, True), done.stderr
    unsafe = re.compile(r'sys\.executable, "-m", "?(recipe|training|pipelines|webui)\b')
    sources = [path for package in ("training", "pipelines", "webui") for path in (ROOT / package).rglob("*.py")]
    assert [str(path) for path in sources if unsafe.search(path.read_text(encoding="utf-8"))] == []


def test_the_linter_of_pre_commit_is_that_of_the_requirements():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    ruff = next(repo for repo in hooks["repos"] if "ruff" in repo["repo"])
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()


def test_the_licences_are_in_the_metadata():
    patterns = project()["project"]["license-files"]
    files = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    assert files == {"LICENSE", "assets/mini-sdxl/LICENSE.md", "assets/mini-clip/LICENSE.md"}
    # Of the code, and of the built-in models' weights.
    assert project()["project"]["license"] == "Apache-2.0 AND LicenseRef-ImageNet-Non-Commercial"


class Installed:
    """A wheel of this checkout in an environment of its own, with the libraries of this one behind it, and an empty folder."""

    def __init__(self, folder):
        self.folder, environment = folder / "elsewhere", folder / "environment"
        self.folder.mkdir()
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # A copy, since the build writes beside its sources.
        shutil.copytree(ROOT, folder / "source", ignore=lambda path, _: NOT_SOURCES if Path(path) == ROOT else ())
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
        subprocess.run(build, env=self.environment, check=True, capture_output=True, text=True)
        (self.wheel,) = (folder / "dist").glob("*.whl")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        self.programs = environment / "bin"
        pip = [sys.executable, "-m", "pip", "--python", self.programs / "python", "install", "--no-deps", "--no-index", "--quiet"]
        subprocess.run([*pip, self.wheel], env=self.environment, check=True)
        # Folders that a .pth file names are imported from, but their own .pth files, such as an editable install's, are not read.
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "libraries.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")

    def run(self, program, *arguments):
        """The standard output of `program`, run in the empty folder."""
        command = [self.programs / program, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("wheel"))


SHORT = (
    "--max_train_steps 2 --rank 4 --inner_r 2 --lr_warmup_steps 0 --validation_steps 2 --heldout_image none "
    "--num_candidate_images 0 --validation_prompt toy"
)
# Without importing nora_vision, which would import the libraries once more.
WHERE = """
from importlib.util import find_spec
from pipelines.built_in import ASSETS
print(find_spec("nora_vision").origin, find_spec("training").origin, ASSETS)
"""

# What the console command runs, with its words, and then the other subcommand on the run of the first.
BOTH = """
import sys
from nora_vision_cli import main
main(sys.argv[2:])
main(["generate", "--adapter", "run", "--prompt", "sks toy", "--output_dir", "images"])
"""

LICENCES = """
from importlib.metadata import distribution
installed = distribution("nora-vision")
print(installed.metadata["License-Expression"])
for name in installed.metadata.get_all("License-File"):
    assert installed.read_text(f"licenses/{name}"), name
    print(name)
"""


@pytest.mark.slow(60)
def test_an_installed_wheel_trains_generates_and_opens_from_a_folder_without_a_checkout(installed):
    files = installed.run("python", "-c", WHERE).split()
    assert all(Path(file).is_relative_to(installed.programs.parent) for file in files)
    assert installed.wheel.stat().st_size < 32 * 2**20
    license_, *license_files = installed.run("python", "-c", LICENCES).splitlines()
    assert license_ == project()["project"]["license"]
    assert sorted(license_files) == ["LICENSE", "assets/mini-clip/LICENSE.md", "assets/mini-sdxl/LICENSE.md"]
    # A project of the user's with packages of the same names.
    for package in ("training", "pipelines", "webui"):
        (installed.folder / package).mkdir()
        (installed.folder / package / "__init__.py").write_text(TRAP)

    # To import the libraries takes long: one process trains and generates, and tests/training/test_dreambooth_nora.py certifies.
    words = ["nora-vision", "train", "--no_certify", *SHORT.split(), "--output_dir", "run"]
    installed.run("python", "-P", "-c", BOTH, *words)
    run = installed.folder / "run"
    assert (run / "adapter" / "full" / "unet" / "adapter_model.safetensors").is_file()
    assert (run / "command").read_text().startswith(" ".join(words))
    assert list((installed.folder / "images").glob("*.png"))
    assert "usage: nora-vision app " in installed.run("nora-vision", "app", "--help")
