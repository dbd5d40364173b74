"""The README's command for real SDXL, against a stand-in for the hub that serves the built-in model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import model_files

from pipelines.built_in import BUILT_IN_MODEL
from training.runs.run import RunDirectory

ROOT = Path(__file__).parents[2]
# What the built-in model is too small for, and what takes long.
INSTEAD = {
    "--resolution": "64",
    "--max_train_steps": "4",
    "--gradient_accumulation_steps": "1",
    # The certificate compares with the adapter's effect, which must be more than rounding after so few steps.
    "--learning_rate": "0.03",
    "--instance_data_dir": str(ROOT / "assets" / "sample-subject"),
}
FEWER = shlex.split(
    "--lr_warmup_steps 0 --heldout_image none --num_candidate_images 0 --validation_steps 4 --validation_prompt x"
)


def readme_command() -> list[str]:
    """The README's recipe with SDXL's hub name, in words, on a model of 64 pixels.

    Without the launcher, which has no part in downloads; and so in float32, since bfloat16 is slow on CPUs.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "stabilityai/" in block)
    words = shlex.split(block.replace("\\\n", " "))
    for option, value in INSTEAD.items():
        words[words.index(option) + 1] = value
    return words[words.index("training/dreambooth_nora.py") :]


def run(command: list[str], endpoint: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run `command` in a process of its own that asks the hub at `endpoint` and keeps its files in `cache`."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**others, **own}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow(45)
def test_the_readmes_sdxl_command_runs_from_nothing_and_then_without_a_network(hub_server, tmp_path):
    hub_server.add("stabilityai/stable-diffusion-xl-base-1.0", model_files(BUILT_IN_MODEL, None, "fp16"))
    command, cache = [*readme_command(), *FEWER], tmp_path / "cache"
    online = run([*command, "--no_certify", "--output_dir", str(tmp_path / "first")], hub_server.endpoint, cache)
    assert online.returncode == 0, online.stderr[-2000:]
    weights = {name for name in hub_server.downloads() if name.endswith(".safetensors")}
    assert weights == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}

    hub_server.stop()
    hub_server.requests.clear()
    finished = run([*command, "--output_dir", str(tmp_path / "second")], hub_server.endpoint, cache)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "is taken from the cache as it is: the hub failed" in finished.stderr
    assert hub_server.requests == []
    first, second = (RunDirectory(tmp_path / name) for name in ("first", "second"))
    assert [run.status()["state"] for run in (first, second)] == ["done", "done"]
    files = [(run.path / "diffusers" / "pytorch_lora_weights.safetensors").read_bytes() for run in (first, second)]
    assert files[0] == files[1]
    assert (second.path / "certificate.json").is_file()
