"""NoRA and Q-NoRA on a causal language model, through PEFT and transformers' Trainer alone."""

import re
import weakref
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from nora_vision import (
    AdapterFileError,
    CheckpointWeights,
    NoraConfig,
    NoraLayer,
    calibrate,
    initialize_nora_weights,
    load_adapter,
    save_adapter,
)
from nora_vision.layer import nora_layers
from nora_vision.quantization import dequantized_weight, keep_differentiable

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the base model."""
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def tokens(count, length=12):
    return torch.randint(3, 16, (count, length), generator=torch.Generator().manual_seed(4))


def load(base, quantized):
    """The base model, as its users load it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=NF4 if quantized else None)
    # On some CPUs, bitsandbytes evaluates 4-bit weights in another, coarser form.
    keep_differentiable(model)
    return model


def adapted(base, quantized, **options):
    """A new adapter on the base model; for 4-bit weights Q-NoRA."""
    torch.manual_seed(0)
    model = load(base, quantized)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        options = {"unquantized": CheckpointWeights(base), **options}
    config = NoraConfig(r=16, inner_r=4, target_modules=TARGETS, outer_init="awsvd", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    statistics = calibrate(model, lambda: model(tokens(4)))
    initialize_nora_weights(model, statistics, generator=torch.Generator().manual_seed(1), **options)
    return model


def train(model, folder, *, resume_from=None):
    examples = [{"input_ids": row, "labels": row} for row in tokens(16)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=examples).train(resume_from_checkpoint=resume_from)
    return model.eval()


def adapter_state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "nora_" in name}


def generated(model):
    return model.generate(tokens(3, 5), attention_mask=torch.ones(3, 5), max_new_tokens=8, do_sample=False)


@pytest.fixture(scope="module", params=[False, True], ids=["nora", "q_nora"])
def trained(request, base, tmp_path_factory):
    """Whether the base model is in 4 bits, the folder of the training with its checkpoints, and the trained model."""
    folder = tmp_path_factory.mktemp("trained")
    return request.param, folder, train(adapted(base, request.param), folder)


def test_training_starts_at_the_base_model_and_changes_the_inner_factors_alone(base, trained):
    quantized, _, model = trained
    start = adapted(base, quantized)
    with torch.no_grad():
        assert torch.equal(start(tokens(2)).logits, load(base, quantized).train()(tokens(2)).logits)
    before, after = adapter_state(start), adapter_state(model)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if "nora_inner" in name}
    assert not torch.equal(generated(model), generated(start.eval()))


def test_a_resumed_training_gives_the_same_bits(base, trained, tmp_path):
    quantized, folder, model = trained
    resumed = train(adapted(base, quantized), tmp_path, resume_from=str(folder / "checkpoint-2"))
    expected = adapter_state(model)
    for name, value in adapter_state(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_a_saved_adapter_reloads_to_the_same_tokens(base, trained, tmp_path):
    quantized, _, model = trained
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(base, quantized), tmp_path).eval()
    assert torch.equal(generated(reloaded), generated(model))
    assert not torch.equal(generated(reloaded), generated(load(base, quantized)))


def test_the_merged_model_generates_the_same_tokens(base, trained, tmp_path):
    quantized, _, model = trained
    model.save_pretrained(tmp_path)
    fresh = load(base, quantized)
    # The base model that was trained on, in full precision.
    reloaded = PeftModel.from_pretrained(fresh.dequantize() if quantized else fresh, tmp_path)
    merged = reloaded.merge_and_unload()
    assert not any(isinstance(layer, NoraLayer | Linear4bit) for layer in merged.modules())
    assert torch.equal(generated(merged), generated(model))
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens(2)).logits, model(tokens(2)).logits, rtol=1e-4, atol=1e-4)


def base_weights(base):
    return {name.removesuffix(".weight"): value for name, value in load(base, False).state_dict().items()}


def layers_of(model):
    return {name.removeprefix("base_model.model."): layer for name, layer in nora_layers(model).items()}


def quantization_residuals(base, model):
    """W - Q(W) of every adapted layer."""
    weights = base_weights(base)
    return {name: weights[name] - dequantized_weight(layer.get_base_layer()) for name, layer in layers_of(model).items()}


def test_merging_loses_the_error_of_quantisation_on_the_base_model_in_full_precision(base, trained, tmp_path):
    quantized, _, model = trained
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(load(base, False), tmp_path).merge_and_unload()
    for name, residual in quantization_residuals(base, model).items():
        layer = model.get_submodule(f"base_model.model.{name}")
        trained_weight = dequantized_weight(layer.get_base_layer()) + layer.get_delta_weight("default")
        torch.testing.assert_close(merged.get_submodule(name).weight - trained_weight, residual, rtol=0, atol=1e-5)
        relative = residual.norm() / base_weights(base)[name].norm()
        assert 0.05 < relative < 0.15 if quantized else relative == 0


def test_merging_into_4_bits_is_refused_with_both_remedies(base):
    model = adapted(base, True)
    with pytest.raises(ValueError, match=r"Merge into the dequantised model.*base model loaded without quantisation"):
        model.merge_and_unload()


def test_the_outer_factors_of_q_nora_are_those_of_the_unquantised_weights(base):
    weights = base_weights(base)
    for name, layer in layers_of(adapted(base, True)).items():
        scale = layer.nora_activation_scale["default"].double()
        U, S, V = torch.linalg.svd(weights[name].double() * scale, full_matrices=False)
        best = U[:, :16] * S[:16] @ V[:16] / scale
        torch.testing.assert_close((layer.nora_B["default"] @ layer.nora_A["default"]).double(), best, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loftq_start", [False, True])
def test_at_most_one_unquantised_weight_is_in_memory(base, loftq_start):
    weights, read = CheckpointWeights(base), []

    def reader(name):
        assert [earlier for earlier, weight in read if weight() is not None] == []
        weight = weights(name)
        read.append((name, weakref.ref(weight)))
        return weight

    torch.manual_seed(0)
    model = get_peft_model(load(base, True), NoraConfig(r=8, inner_r=2, target_modules=TARGETS, outer_init="awsvd"))
    statistics = calibrate(model, lambda: model(tokens(2)))
    initialize_nora_weights(model, statistics, unquantized=reader, loftq_start=loftq_start)
    assert [name for name, _ in read] == list(layers_of(model))
    assert all(weight() is None for _, weight in read)


def test_the_start_at_the_residual_is_the_nearest_of_its_rank_within_the_outer_factors(base):
    model = adapted(base, True, loftq_start=True)
    for name, residual in quantization_residuals(base, model).items():
        layer = layers_of(model)[name]
        scale = layer.nora_activation_scale["default"].double()
        scale = (scale / scale.mean()).clamp_min(1e-3)
        left = torch.linalg.qr(layer.nora_B["default"].double()).Q
        right = torch.linalg.qr((layer.nora_A["default"].double() * scale).T).Q
        target = residual.double() * scale
        inside = torch.linalg.svdvals(left.T @ target @ right)
        # What the outer factors cannot reach, and of what they reach all but the leading four singular values.
        least = target.square().sum() - inside.square().sum() + inside[4:].square().sum()
        left_over = (residual.double() - layer.get_delta_weight("default").double()) * scale
        torch.testing.assert_close(left_over.square().sum(), least, rtol=1e-5, atol=0)
        assert left_over.norm() < target.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unquantized": None, "loftq_start": True}, "loftq_start needs the unquantised weights"),
        ({"unquantized": lambda name: torch.zeros(3, 3)}, r"must have the shape \(64, 64\) of the quantised one, got \(3, 3\)"),
    ],
)
def test_unquantised_weights_that_do_not_fit_are_refused(base, options, message):
    model = get_peft_model(load(base, True), NoraConfig(r=8, inner_r=2, target_modules=["q_proj"], outer_init="awsvd"))
    statistics = calibrate(model, lambda: model(tokens(2)))
    with pytest.raises(ValueError, match=message):
        initialize_nora_weights(model, statistics, **options)


def test_unquantised_weights_for_a_model_in_full_precision_are_refused(base):
    with pytest.raises(ValueError, match="no layer of 'default' is quantised"):
        adapted(base, False, unquantized=CheckpointWeights(base))


@pytest.mark.parametrize("fields", [{"preserve_output": True, "inner_init": "gaussian"}, {"inner_form": "full"}])
def test_a_start_at_the_residual_that_its_form_cannot_have_is_refused(base, fields):
    config = NoraConfig(r=8, inner_r=2, target_modules=["q_proj"], outer_init="awsvd", **fields)
    model = get_peft_model(load(base, True), config)
    statistics = calibrate(model, lambda: model(tokens(2)))
    with pytest.raises(ValueError, match=r"loftq_start (cannot be used with preserve_output|needs inner_form='serial')"):
        initialize_nora_weights(model, statistics, unquantized=CheckpointWeights(base), loftq_start=True)


def test_a_compact_adapter_of_q_nora_loads_onto_the_base_model_in_full_precision(base, tmp_path):
    model = adapted(base, True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_adapter(model, tmp_path, compact=True)
    plain = load(base, False)
    load_adapter(plain, tmp_path)
    for name, layer in layers_of(model).items():
        assert torch.equal(plain.get_submodule(name).get_delta_weight("default"), layer.get_delta_weight("default"))
    with pytest.raises(AdapterFileError, match="The base model has other weights, another precision"):
        load_adapter(load(base, True), tmp_path)


def test_an_evaluation_after_the_adapter_was_added_does_not_change_the_gradient_through_4_bit_weights(base):
    def gradient(evaluated):
        torch.manual_seed(0)
        model = load(base, True)
        for layer in model.modules():
            if isinstance(layer, Linear4bit):
                layer.support_avx512bf16_for_cpu = has_avx512bf16()
        model = get_peft_model(model, NoraConfig(r=8, inner_r=2, target_modules=["q_proj"], outer_init="awsvd"))
        embedded = model.get_input_embeddings()(tokens(2)).detach().requires_grad_()
        with model.disable_adapter():
            if evaluated:
                with torch.no_grad():
                    model.eval()(tokens(2))
            model.train()(inputs_embeds=embedded, labels=tokens(2)).loss.backward()
        return embedded.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_model_that_was_repacked_for_inference_is_refused(base):
    model = load(base, True)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"repacked the 4-bit weight of 'model.layers.1.mlp.up_proj'.*Load the model again"):
        get_peft_model(model, NoraConfig(r=8, inner_r=2, target_modules=["q_proj"], outer_init="awsvd"))


def test_unquantised_weights_are_read_from_one_file_or_from_shards(base, tmp_path):
    load(base, False).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    name = "model.layers.1.mlp.down_proj"
    for source in (base, base / "model.safetensors", tmp_path):
        assert torch.equal(CheckpointWeights(source)(name), base_weights(base)[name])
    with pytest.raises(ValueError, match=r"has no tensor 'other.weight'. Give the checkpoint that the model was loaded from"):
        CheckpointWeights(base)("other")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has \d+ files and 0 indices"):
        CheckpointWeights(tmp_path)


# Hidden size, width of the MLP, and heads of keys and values, of 128 features each; both have 32 blocks and as many heads.
LLAMAS = {"LLaMA-3 8B": (4096, 14336, 8), "LLaMA-7B": (4096, 11008, 32)}
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "language-models.md"
ROW = re.compile(r"^\| ([\w, ]+_proj) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|$", re.MULTILINE)


@pytest.mark.parametrize("sizes", LLAMAS.values(), ids=LLAMAS)
@pytest.mark.parametrize("row", ROW.findall(PAGE.read_text(encoding="utf-8")), ids=" ".join)
def test_the_ranks_on_the_page_give_the_papers_number_of_parameters(row, sizes):
    targets, layers, r, inner_r, parameters = row[0].split(", "), *(int(text.replace(",", "")) for text in row[1:])
    hidden, intermediate, heads = sizes
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=32, num_key_value_heads=heads, vocab_size=128
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    adapter = NoraConfig(r=r, inner_r=inner_r, target_modules=targets, outer_init="awsvd")
    trained, _ = get_peft_model(model, adapter, low_cpu_mem_usage=True).get_nb_trainable_parameters()
    assert trained == parameters == layers * 2 * r * inner_r
    assert f"{trained / 1e6:.1f}" == "10.2"


def test_the_page_has_ranks():
    assert len(ROW.findall(PAGE.read_text(encoding="utf-8"))) == 5
