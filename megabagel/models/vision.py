"""SigLIP NaViT vision tower and the connector into the language model; replicated over ranks.

Each image attends to itself only, at its own resolution. Weight names follow the released BAGEL files.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megabagel.config.schema import ModelConfig, VisionConfig
from megabagel.models.attention import AttentionPlan, prepare_attention


def is_frozen(model: ModelConfig) -> bool:
    """Whether the tower does not train: then it runs before the pipeline, on every rank of a replica."""
    return model.freeze_vit or model.freeze_und


class VisionAttention(nn.Module):
    """Full multi-head attention within each image, biases everywhere."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype):
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, dtype=dtype))

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        q, k, v = (proj(x).view(len(x), self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(plan(q, k, v).reshape(x.shape))


# Under the names of Hugging Face configurations; importing theirs takes seconds in every process.
_ACTIVATIONS = {"gelu_pytorch_tanh": partial(nn.GELU, "tanh"), "gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class VisionMLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: str, dtype: torch.dtype):
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden, dtype=dtype)
        self.fc2 = nn.Linear(hidden, outputs, dtype=dtype)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm encoder layer."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon, dtype=dtype)
        self.self_attn = VisionAttention(config, dtype)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon, dtype=dtype)
        self.mlp = VisionMLP(config.hidden_size, config.ffn_hidden_size, config.hidden_size, "gelu_pytorch_tanh", dtype)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), plan)
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """Patches of many images -> features: linear patch embedding, learned positions, encoder, final LayerNorm.

    `recompute`: the backward pass computes each layer's activations again instead of keeping them.
    """

    def __init__(self, config: VisionConfig, dtype: torch.dtype, recompute: bool = False):
        super().__init__()
        self.config, self.recompute = config, recompute
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size, dtype=dtype)
        self.position_embedding = nn.Embedding(config.max_num_patch_per_side**2, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(VisionLayer(config, dtype) for _ in range(config.num_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon, dtype=dtype)

    def forward(self, patches: Tensor, position_ids: Tensor, seqlens: list[int]) -> Tensor:
        """patches [n, p*p*3] (row, column, channel), position_ids [n], tokens per image -> [n, hidden]."""
        x = self.patch_embedding(patches) + self.position_embedding(position_ids)
        lengths = torch.tensor(seqlens, dtype=torch.int64)
        starts, none = lengths.cumsum(0) - lengths, torch.zeros_like(lengths)
        images = torch.stack([starts, lengths, starts, none, none], dim=1)  # full attention without a prefix
        plan = prepare_attention(images, len(x), "auto", x.device, x.dtype)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, plan, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, plan)
        return self.post_layernorm(x)
