"""Small models of every kind that NoRA adapts, each with inputs; the same seed gives the same weights."""

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2Model

from nora_vision import NoraConfig


class Mlp(nn.Module):
    """Two adapted linear layers and a head, to be saved in full."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 30)
        self.second = nn.Linear(30, 20, bias=False)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()))


class ConvNet(nn.Module):
    """Two adapted convolutions, one with stride, dilation and another padding mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 12, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1), padding_mode="circular")
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).mean(dim=(2, 3)))


def mlp():
    torch.manual_seed(0)
    return Mlp().eval(), (torch.randn(5, 20),), ["first", "second"]


def conv_net():
    torch.manual_seed(0)
    return ConvNet().eval(), (torch.randn(5, 3, 8, 8),), ["first", "second"]


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2Model(config).eval(), (torch.randint(0, 50, (4, 6)),), ["c_attn", "c_fc"]


def text_encoder():
    torch.manual_seed(0)
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, vocab_size=50,
                            max_position_embeddings=16, bos_token_id=0, eos_token_id=49, pad_token_id=49)  # fmt: skip
    return CLIPTextModel(config).eval(), (torch.randint(0, 49, (4, 6)),), ["q_proj", "v_proj", "fc1"]


MODELS = {"linear": mlp, "conv2d": conv_net, "conv1d": gpt2, "text_encoder": text_encoder}


def config_for(targets, **fields):
    """A small configuration with random factors, so that every adapter changes the output."""
    return NoraConfig(**({"r": 8, "inner_r": 4, "alpha": 4.0, "target_modules": targets, "init_weights": False} | fields))


def output(model, inputs):
    """The model's output as one tensor."""
    result = model(*inputs)
    return result if isinstance(result, torch.Tensor) else result.last_hidden_state


def change_weights(model, seed=1):
    """Change every trained parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
