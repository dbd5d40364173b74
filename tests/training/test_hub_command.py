"""A model that is named on the hub, from the first download to a run without a network.

tests/test_documented_commands.py runs the README's own command for SDXL against the same stand-in for the hub.
"""

import json

from hub_server import model_files

FLAGS = ("--pretrained_model_name_or_path", "me/sdxl", "--variant", "fp16", "--learning_rate", "0.03")


def test_a_model_is_downloaded_once_and_trained_and_certified_again_without_a_network(
    trainer, tiny_model, hub_server, certified_here, tmp_path, caplog
):
    hub_server.add("me/sdxl", model_files(tiny_model, None, "fp16"))
    first = trainer.run(tmp_path / "first", *FLAGS)
    weights = {name for name in hub_server.downloads() if name.endswith(".safetensors")}
    assert weights == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}

    hub_server.stop()
    hub_server.requests.clear()
    second = trainer.run(tmp_path / "second", *FLAGS, "--certify")
    assert "is loaded from the cache, as the hub failed" in caplog.text
    assert hub_server.requests == []
    assert [run.status().state for run in (first, second)] == ["done", "done"]
    files = [(run.path / "diffusers" / "pytorch_lora_weights.safetensors").read_bytes() for run in (first, second)]
    assert files[0] == files[1]
    assert json.loads((second.path / "certificate.json").read_text())["passed"]
