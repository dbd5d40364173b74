"""A reader of native files that was written from docs/file-formats.md alone, with numpy, gives the adapter's weight change."""

import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from earlier_layout import save_as_earlier
from peft import get_peft_model
from small_models import MODELS, config_for
from torch import nn

from nora_vision import calibrate, initialize_nora_weights, save_adapter
from nora_vision.decomposition import reproducible_awsvd
from nora_vision.factors import Factors
from nora_vision.layer import nora_layers

PREFIX = "base_model.model."
PAGE = Path(__file__).parents[2] / "docs" / "file-formats.md"
DTYPES = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16", "I8": "torch.int8", "U8": "torch.uint8"}
NUMPY = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}


class DocumentedFile:
    """The two files of one component, read as documented."""

    def __init__(self, folder):
        content = (folder / "adapter_model.safetensors").read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        self.entries = json.loads(content[8:start])
        self.metadata = self.entries.pop("__metadata__")
        spans = {name: entry["data_offsets"] for name, entry in self.entries.items()}
        self.bytes = {name: content[start + first : start + last] for name, (first, last) in spans.items()}
        self.config = json.loads((folder / "adapter_config.json").read_text())

    def content_digest(self):
        metadata = {key: value for key, value in self.metadata.items() if key != "nora_digest"}
        entries = {name: [DTYPES[entry["dtype"]], entry["shape"]] for name, entry in self.entries.items()}
        digest = hashlib.sha256(json.dumps([metadata, entries], sort_keys=True).encode())
        for name in sorted(self.bytes):
            digest.update(self.bytes[name])
        return digest.hexdigest()

    def configuration_digest(self):
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def entry(self, name):
        if self.entries[name]["dtype"] == "BF16":
            return bfloat16(self.bytes[name])
        values = np.frombuffer(self.bytes[name], NUMPY[self.entries[name]["dtype"]])
        return values.reshape(self.entries[name]["shape"]).astype(np.float64)

    def tensor(self, layer, kind):
        return self.entry(f"{PREFIX}{layer}.{kind}")

    def core(self, layer):
        inner = self.tensor(layer, "nora_inner_B") @ self.tensor(layer, "nora_inner_A")
        start = self.tensor(layer, "nora_inner_B0") @ self.tensor(layer, "nora_inner_A0")
        return self.config["alpha"] / self.config["inner_r"] * (inner - start)

    def scale(self, layer):
        owner = json.loads(self.metadata["nora_shared_scales"]).get(layer, layer)
        return self.tensor(owner, "nora_activation_scale")

    def outer_factors(self, layer, weight):
        """By the full SVD, for small layers."""
        stored = self.scale(layer).astype(np.float32)
        scale = np.maximum(stored / stored.mean(), np.float32(0.001)).astype(np.float64)
        U, S, V = np.linalg.svd(weight * scale, full_matrices=False)
        rank = self.config["r"]
        U, S, V = U[:, :rank], S[:rank], V[:rank]
        signs = np.sign(V[np.arange(rank), np.abs(V).argmax(axis=1)])
        return U * S * signs, V * signs[:, None] / scale


class DocumentedPackedFile(DocumentedFile):
    """A compact file, whose tensors are packed.

    Args:
        layers: (out, in) of each adapted layer by name.
        statistics: S (in,) of each layer, if the scales are not stored.
    """

    def __init__(self, folder, layers, statistics=None):
        super().__init__(folder)
        self.layers, self.statistics = {name: layers[name] for name in sorted(layers)}, statistics

    def tensor(self, layer, kind):
        index = list(self.layers).index(layer)
        if kind in ("nora_A", "nora_B"):
            return self.stored_outer_factor(kind, index)
        if kind == "nora_probe":
            return self.entry(kind)[index]
        r, inner_r = self.config["r"], self.config["inner_r"]
        values = self.entry(kind)[index * r * inner_r : (index + 1) * r * inner_r]
        if self.entries[kind]["dtype"] == "I8":
            values = values * self.entry(f"{kind}.step")[index]
        return values.reshape((inner_r, r) if kind.startswith("nora_inner_A") else (r, inner_r))

    def stored_outer_factor(self, kind, index):
        r, sides = self.config["r"], [shape[kind == "nora_A"] for shape in self.layers.values()]
        packed = np.frombuffer(self.bytes[kind], np.uint8)
        entries = np.stack([packed & 15, packed >> 4], axis=1).flatten().astype(np.float64) - 8
        values = entries[sum(sides[:index]) * r :][: sides[index] * r]
        steps = self.entry(f"{kind}.step")[index * r :][:r]
        return values.reshape(r, -1) * steps[:, None] if kind == "nora_A" else values.reshape(-1, r) * steps

    def scale(self, layer):
        data, coding = zlib.decompress(self.bytes["nora_activation_scale"]), self.metadata["nora_scales"]
        sizes = [n for _, n in self.layers.values()]
        start = sum(sizes[: list(self.layers).index(layer)])
        part = slice(start, start + self.layers[layer][1])
        if coding == "parity":
            parity = np.unpackbits(np.frombuffer(data, np.uint8))[part].astype(np.float64)
            S = self.statistics[layer].astype(np.float64)
            x = 2 * np.log2(np.maximum(S / S.max(), 2.0**-10))
            return 2.0 ** ((2 * np.round((x - parity) / 2) + parity) / 2)
        if coding == "steps":
            steps = np.frombuffer(data, np.int8)[part].astype(np.float64)
            return np.where(steps == -128, 0, 2.0 ** (steps / 2))
        return bfloat16(data)[part] if coding == "BF16" else np.frombuffer(data, "<f4")[part].astype(np.float64)


def bfloat16(data):
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def signs(count, size, offset):
    state = np.arange(count * size, dtype=np.int64).reshape(count, size) + offset * 2**33
    with np.errstate(over="ignore"):
        for shift, factor in ((33, 0x7FB5D329728EA185), (29, 0x1B873593CC9E2D51)):
            state = (state ^ (state >> shift) ^ (state << 7)) * np.int64(factor)
    return 1.0 - 2.0 * ((state >> 40) & 1)


@pytest.fixture(params=["linear", "conv2d"])
def saved(request, tmp_path):
    """The layers of a trained adapter by name, and its full file, its compact file and that of earlier versions."""
    model, inputs, targets = MODELS[request.param]()
    config = config_for(targets, r=4, inner_r=2, outer_init="awsvd", preserve_output=True, inner_init="gaussian")
    model = get_peft_model(model, config)
    initialize_nora_weights(model, calibrate(model, lambda: model(*inputs)))
    for name, parameter in model.named_parameters():
        if "nora_inner" in name:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "full")
    save_adapter(model, tmp_path / "compact", compact=True)
    layers = {name.removeprefix(PREFIX): layer for name, layer in nora_layers(model).items()}
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    compact = DocumentedPackedFile(tmp_path / "compact", sizes)
    return layers, DocumentedFile(tmp_path / "full"), compact, DocumentedFile(save_as_earlier(model, tmp_path / "earlier"))


def test_the_page_describes_every_field_of_the_configuration(saved):
    section = PAGE.read_text(encoding="utf-8").partition("### Configuration")[2].partition("### Tensors")[0]
    described = {name for row in re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert described == saved[2].config.keys()


def test_the_digests_are_those_that_the_page_describes(saved):
    for file in saved[1:]:
        assert file.content_digest() == file.metadata["nora_digest"]
        assert file.configuration_digest() == file.metadata["nora_configuration"]


@pytest.mark.parametrize(("decay", "blocks"), [(0.0, 6), (0.5, 6), (2.0, 5)])
def test_the_outer_factors_of_a_large_layer_are_those_that_the_page_describes(decay, blocks):
    rank, rows, columns = 8, 80, 96
    generator = torch.Generator().manual_seed(1)
    M = torch.randn(rows, columns, dtype=torch.float64, generator=generator) * torch.arange(1.0, columns + 1) ** -decay
    block = 2.0 * torch.randint(2, (8, rows), generator=torch.Generator().manual_seed(0)).numpy() - 1
    A, V, squares = M.numpy(), np.zeros((0, columns)), []
    while len(V) < 6 * 8 and not (len(V) == 5 * 8 and squares[-1] < 0.35 * squares[-2]):
        block = block @ A if not squares else block @ A.T @ A
        block = block - (block @ V.T) @ V
        block = np.linalg.qr((block - (block @ V.T) @ V).T).Q.T
        V = np.concatenate([V, block])
        squares.append(np.square(block @ A.T).sum())
    assert len(squares) == blocks
    E = np.linalg.eigh(V @ A.T @ A @ V.T)[1][:, -rank:]
    product = A @ V.T @ E @ E.T @ V
    ours = torch.matmul(*reproducible_awsvd(M, None, rank)).numpy()
    assert np.linalg.norm(ours - product) < 1e-8 * np.linalg.norm(product)


def test_a_full_file_gives_the_weight_change(saved):
    layers, full, *_ = saved
    for name, layer in layers.items():
        change = full.tensor(name, "nora_B") @ full.core(name) @ full.tensor(name, "nora_A")
        expected = layer.get_delta_weight("default").flatten(1).detach().numpy()
        np.testing.assert_allclose(change, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_compact_file_with_outer_factors_of_4_bits_gives_the_weight_change(tmp_path):
    model, _, targets = MODELS["linear"]()
    config = config_for(targets, r=3, inner_r=2, preserve_output=True, basis="gradient", outer_dtype="int4", outer_init="awsvd")
    model = get_peft_model(model, config)
    layers = {name.removeprefix(PREFIX): layer for name, layer in nora_layers(model).items()}
    factors = {n: Factors(torch.randn(layer.out_features, 3), torch.randn(3, layer.in_features)) for n, layer in layers.items()}
    initialize_nora_weights(model, factors=factors)
    for name, parameter in model.named_parameters():
        if "nora_inner" in name:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path, compact=True)
    file = DocumentedPackedFile(tmp_path, {name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    assert "nora_probe" not in file.entries
    for name, layer in layers.items():
        change = file.tensor(name, "nora_B") @ file.core(name) @ file.tensor(name, "nora_A")
        expected = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(change, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("layout", ["compact", "earlier"])
def test_a_compact_file_and_the_base_weight_give_the_weight_change_and_its_probe(saved, layout):
    layers, _, *files = saved
    compact = files[layout == "earlier"]
    for name, layer in layers.items():
        B, A = compact.outer_factors(name, layer.get_base_layer().weight.flatten(1).detach().double().numpy())
        change = B @ compact.core(name) @ A
        expected = layer.get_delta_weight("default").flatten(1).detach().numpy()
        np.testing.assert_allclose(change, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        count = {"compact": 4, "earlier": 8}[layout]
        u, v = signs(count, change.shape[0], 1), signs(count, change.shape[1], 2)
        probe = [np.linalg.norm(change), *np.einsum("im,mn,in->i", u, change, v)]
        np.testing.assert_allclose(probe, compact.tensor(name, "nora_probe"), rtol=0, atol=1e-5 * probe[0])
