"""NoRA and Q-NoRA on a causal language model, through PEFT and transformers' Trainer alone."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from nora_vision import CheckpointWeights, NoraConfig, NoraLayer, calibrate, initialize_nora_weights
from nora_vision.quantization import keep_differentiable

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
        options |= {"unquantized": CheckpointWeights(base)}
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
