"""The README's command for real SDXL, in processes of its own, against a stand-in for the hub that serves the built-in model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer, model_files

from pipelines.built_in import BUILT_IN_MODEL
from training.runs.run import RunDirectory

ROOT = Path(__file__).parents[2]
# What the built-in model is too small for, and what takes long.
INSTEAD = {
    "--resolution": "64",
    # bfloat16 is slow on a CPU, and nothing here is about precision.
    "--mixed_precision": "no",
    "--max_train_steps": "4",
    # The certificate compares with the adapter's effect, which must be more than rounding after so few steps.
    "--learning_rate": "0.03",
    "--instance_data_dir": str(ROOT / "assets" / "sample-subject"),
}
FEWER = shlex.split("--lr_warmup_steps 0 --heldout_image none --drawn_candidates 0 --validation_steps 4 --validation_prompt x")


def readme_command() -> list[str]:
    """The README's command with SDXL's hub name, in words, on a model of 64 pixels."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "stabilityai/" in block)
    words = shlex.split(block.replace("\\\n", " "))
    for option, value in INSTEAD.items():
        words[words.index(option) + 1] = value
    return words


@pytest.fixture
def hub():
    """The stand-in with the built-in model under SDXL's name."""
    server = HubServer()
    server.add("stabilityai/stable-diffusion-xl-base-1.0", model_files(BUILT_IN_MODEL, None, "fp16"))
    yield server
    server.stop()


def run(command: list[str], hub: HubServer, home: Path) -> subprocess.CompletedProcess[str]:
    """Run `command` with an own cache of the hub's files below `home`."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    environment = {
        **others,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
    }
    program = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_readmes_sdxl_command_runs_from_nothing_and_then_without_a_network(hub, tmp_path):
    command = [*readme_command(), *FEWER]
    first = run([*command, "--no_certify", "--output_dir", str(tmp_path / "first")], hub, tmp_path / "home")
    assert first.returncode == 0, first.stderr[-2000:]
    weights = {name for name in hub.downloads() if name.endswith(".safetensors")}
    assert weights == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}

    hub.stop()
    hub.requests.clear()
    second = run([*command, "--output_dir", str(tmp_path / "second")], hub, tmp_path / "home")
    assert second.returncode == 0, second.stderr[-2000:]
    assert "is taken from the cache as it is: the hub failed" in second.stderr
    assert hub.requests == []
    for name in ("first", "second"):
        assert RunDirectory(tmp_path / name).status()["state"] == "done"
    files = [(tmp_path / name / "diffusers" / "pytorch_lora_weights.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
    assert (tmp_path / "second" / "certificate.json").is_file()
