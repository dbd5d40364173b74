"""The native files of methods other than NoRA."""

import json

from peft import LoraConfig

from pipelines.native_files import CONFIG, save_config

LAYERS = ["to_v", "proj_in", "to_k", "ff.net.2", "to_q", "conv2", "to_out.0", "conv1"]


def test_equal_configurations_are_saved_as_equal_bytes_whatever_the_order_of_their_sets(tmp_path):
    config = LoraConfig(r=2, target_modules=LAYERS)
    save_config(config, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == sorted(LAYERS)
    # The configuration in use keeps its set, which PEFT expects.
    assert config.target_modules == set(LAYERS)
