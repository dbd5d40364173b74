"""A Llama with random weights in a folder, with a tokenizer of few words; from it everything runs as from a downloaded model."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("is", "the", "water", "wet", "true", "false", "answer", "correct", "question", "please", "or", "solution1", "solution2")


def save_tiny_llama(folder: Path) -> Path:
    """Write the model and its tokenizer to `folder`, as `save_pretrained` does, and return it."""
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=256,
        # Large enough for greedy decoding to depend on the context.
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder
