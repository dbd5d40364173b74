"""The compact layout of earlier versions: a tensor for each layer and kind, shared scales, probes of eight projections."""

import json

from nora_vision.calibration import base_name, unwrapped
from nora_vision.compact import weight_change_probe
from nora_vision.files import CONFIGURATION, configuration_digest, read_json, read_tensors, write_json, write_tensors
from nora_vision.layer import nora_layers
from nora_vision.saving import save_adapter

PREFIX, SCALE = "base_model.model.", "nora_activation_scale"


def save_as_earlier(model, folder):
    """Save the adapter of `model` in the compact layout of earlier versions."""
    save_adapter(model, folder)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith((".nora_A", ".nora_B"))}
    owners, shared = {}, {}
    for name in [name for name in tensors if name.endswith(f".{SCALE}")]:
        layer, narrow = name.removeprefix(PREFIX).removesuffix(f".{SCALE}"), tensors[name].bfloat16()
        tensors[name] = narrow if (narrow.float() == tensors[name]).all() else tensors[name]
        owner = owners.setdefault((len(narrow), tensors[name].float().numpy().tobytes()), layer)
        if owner != layer:
            shared[layer] = owner
            del tensors[name]
    for name, layer in nora_layers(unwrapped(model)).items():
        factors = layer.nora_B["default"], layer.nora_A["default"]
        tensors[f"{PREFIX}{base_name(name)}.nora_probe"] = weight_change_probe(layer, "default", *factors, projections=8)
    fields = read_json(folder / "adapter_config.json") | {"compact": True}
    # Added after this layout.
    del fields["calibration"]
    metadata = {"nora_layout": "compact", "nora_shared_scales": json.dumps(shared), CONFIGURATION: configuration_digest(fields)}
    write_tensors(folder / "adapter_model.safetensors", tensors, metadata, digest=True)
    write_json(folder / "adapter_config.json", fields)
    return folder
