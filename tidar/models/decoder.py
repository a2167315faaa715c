"""One decoder for the Qwen2, Qwen2.5 and Qwen3 family. Modules bear the names of Hugging Face's checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tidar.kernels.backward import NormWithResidual, RotatedHeads
from tidar.kernels.norm import RMSNorm
from tidar.kernels.rotary import RopeScaling, rotary, rotate
from tidar.kernels.selection import PLAIN, Kernels
from tidar.models.attention import Mask, attention


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. qkv_bias: as in Qwen2; qk_norm: as in Qwen3; o_bias: of the attention's output."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    initializer_range: float = 0.02


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if residual is None else residual + out


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, kernels: Kernels):
        super().__init__()
        self.flash = kernels.flash
        self.rotates_fused = kernels.fused_backward and not config.qk_norm
        self.linear = plain_linear
        if kernels.fused_products:
            from tidar.kernels.matmul import linear  # registers operators that nothing else needs

            self.linear = linear
        self.head_dim = config.head_dim
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.dim, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        """The residual plus attention from x, all `[batch, positions, dim]`."""
        batch, positions, _ = x.shape
        # one product: those of the few key and value heads alone would leave most of a GPU idle
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([projection.weight for projection in projections])
        bias = None if self.q_proj.bias is None else torch.cat([projection.bias for projection in projections])
        sizes = [projection.out_features // self.head_dim for projection in projections]
        heads = self.linear(x, weight, bias).view(batch, positions, -1, self.head_dim)
        if self.rotates_fused:
            q, k, v = RotatedHeads.apply(heads, cos, sin, sizes)
        else:
            q, k, v = heads.split(sizes, dim=2)
            q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attention(q, k, v, mask, self.flash).transpose(1, 2).reshape(batch, positions, -1)
        return self.linear(out, self.o_proj.weight, self.o_proj.bias, residual)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, kernels: Kernels):
        super().__init__()
        self.fused = None
        if kernels.fused_products:
            from tidar.kernels.matmul import gated_mlp

            self.fused = gated_mlp
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The residual plus the MLP of x, all `[batch, positions, dim]`."""
        if self.fused:
            return self.fused(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, residual)
        return residual + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, kernels: Kernels):
        super().__init__()
        self.fused_backward = kernels.fused_backward
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config, kernels)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        normal, x = self.normalized(self.input_layernorm, x)
        x = self.self_attn(normal, x, cos, sin, mask)
        return self.mlp(*self.normalized(self.post_attention_layernorm, x))

    def normalized(self, norm: RMSNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x, and x."""
        return NormWithResidual.apply(x, norm.weight, norm.eps) if self.fused_backward else (norm(x), x)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig, kernels: Kernels = PLAIN):
        super().__init__()
        self.config = config
        # first values are `initialize`'s; random ones on the meta device would import torch's compiler
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.dim, _weight=torch.zeros(config.vocab_size, config.dim)
        )
        self.layers = nn.ModuleList(DecoderLayer(config, kernels) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def output_weight(self) -> Tensor:
        """Weight of the output projection, `[vocab_size, dim]`."""
        return (self.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Mask = None,
        head: Callable[[Tensor, Tensor], object] | None = None,
    ):
        """Logits `[batch, positions, vocab_size]` of tokens `[batch, positions]`.

        position_ids: `[batch, positions]`, by default 0, 1, 2 …; mask: see `tidar.models.attention`, None is causal.
        head: takes the last hidden states `[batch, positions, dim]` and the output weight in place of the projection
        to logits, and its result is returned. It runs inside the model because FSDP has the weight gathered there.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.embed_tokens(input_ids)
        cos, sin = rotary(position_ids, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        x = self.norm(x)
        return (head or F.linear)(x, self.output_weight())
