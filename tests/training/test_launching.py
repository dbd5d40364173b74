"""Several processes, started as the README and the example configurations say, as far as a CPU allows."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from training.checkpoints import list_checkpoints
from training.run import RunDirectory

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
FLAGS = shlex.split("""
--instance_prompt sks --heldout_image none --rank 6 --inner_r 2 --target_modules to_v to_q --train_text_encoder
--max_train_steps 10 --checkpointing_steps 10 --validation_steps 10 --validation_prompt sks --certify false --report_to none
""")


def launched(config, arguments):
    """Start the trainer with a configuration, on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    own = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "training" / "dreambooth_nora.py"), *arguments]
    return subprocess.run(command, env=own, capture_output=True, text=True, check=False)


@pytest.fixture
def on_cpu(tmp_path):
    """An example configuration with what only a GPU has rewritten."""

    def rewritten(name):
        config = yaml.safe_load((CONFIGS / name).read_text())
        config |= {"mixed_precision": "no", "main_process_port": 0}
        (tmp_path / name).write_text(yaml.safe_dump(config))
        return tmp_path / name

    return rewritten


@pytest.mark.slow
def test_two_processes_learn_what_one_does_at_the_same_global_batch(tiny_model, pictures_dir, tmp_path, on_cpu):
    model = ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures_dir)]
    learned, statistics = [], []
    for config, batch, processes in (("one_gpu.yaml", 4, 1), ("multi_gpu.yaml", 2, 2)):
        folder = tmp_path / config.removesuffix(".yaml")
        given = [*FLAGS, *model, "--train_batch_size", str(batch), "--output_dir", str(folder)]
        finished = launched(on_cpu(config), given)
        assert finished.returncode == 0, finished.stderr
        assert RunDirectory(folder).status()["processes"] == processes
        learned.append(load_file(list_checkpoints(folder / "checkpoints")[-1] / "trained.safetensors"))
        statistics.append(load_file(folder / "calibration" / "unet.safetensors"))
    for name, value in statistics[0].items():
        torch.testing.assert_close(statistics[1][name], value, rtol=1e-6, atol=0)
    for name, value in learned[0].items():
        torch.testing.assert_close(learned[1][name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_an_example_configuration_names_the_command_that_uses_it(config):
    first = (CONFIGS / config).read_text().splitlines()[0]
    assert first == f"# accelerate launch --config_file training/configs/{config} training/dreambooth_nora.py"
