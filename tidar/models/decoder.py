"""One decoder for the Qwen2, Qwen2.5 and Qwen3 families."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tidar.kernels.float8 import float8_mlp
from tidar.kernels.norm import RMSNorm
from tidar.kernels.norm_rotary import NormWithResidual, RotatedHeads
from tidar.kernels.rotary import RopeScaling, inverse_frequencies, rotary, rotate, split_heads
from tidar.kernels.selection import PLAIN, Kernels
from tidar.models.attention import Attended, FusedStepAttention, attention
from tidar.models.shards import WHOLE, TensorShard


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. qkv_bias: as in Qwen2; qk_norm: as in Qwen3; o_bias: of attention's output projection."""

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
    """Grouped-query self-attention with the residual connection.

    Rows of `qkv_proj` are grouped by key/value head: for each one its `n_heads / n_kv_heads` query heads, then its key
    head, then its value head, of `head_dim` rows each. So whole groups are a range of rows.
    """

    def __init__(self, config: DecoderConfig, kernels: Kernels):
        super().__init__()
        self.flash = kernels.attention == "flash"
        self.rotates_fused = kernels.fused_backward and not config.qk_norm
        self.linear: Callable[..., Tensor] = plain_linear
        if kernels.fused_matmul:
            from tidar.kernels.matmul import linear

            self.linear = partial(linear, dynamic=kernels.dynamic_tiles)
        self.head_dim, self.n_kv_heads = config.head_dim, config.n_kv_heads
        n_heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv_proj = nn.Linear(config.dim, n_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, mask: Attended) -> Tensor:
        """The residual plus attention from x, all `[batch, positions, dim]`.

        residual: None where this has some of the heads only; then the bias of `o_proj` is not added either.
        """
        batch, positions, _ = x.shape
        heads = self.linear(x, self.qkv_proj.weight, self.qkv_proj.bias).view(batch, positions, -1, self.head_dim)
        if isinstance(mask, FusedStepAttention):
            out = mask.attend(heads, (self.q_norm, self.k_norm), cos, sin)
        else:
            if self.rotates_fused:
                q, k, v = RotatedHeads.apply(heads, cos, sin, self.n_kv_heads)
            else:
                q, k, v = split_heads(heads, self.n_kv_heads)
                q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
            out = attention(q, k, v, mask, self.flash).transpose(1, 2).reshape(batch, positions, -1)
        return self.linear(out, self.o_proj.weight, None if residual is None else self.o_proj.bias, residual)


class MLP(nn.Module):
    """Gated MLP with SiLU and the residual connection.

    Rows of `gate_up_proj` are those of the gate, then those of the up projection: the layout that QuACK's kernels read
    in place, as `[2, hidden_dim, dim]`.
    """

    def __init__(self, config: DecoderConfig, kernels: Kernels):
        super().__init__()
        self.fused: Callable[..., Tensor] | None = None
        if kernels.float8:
            self.fused = float8_mlp
        elif kernels.fused_matmul:
            from tidar.kernels.matmul import gated_mlp

            self.fused = partial(gated_mlp, dynamic=kernels.dynamic_tiles)
        self.gate_up_proj = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The residual, if any, plus the MLP of x, all `[batch, positions, dim]`."""
        if self.fused:
            return self.fused(x, self.gate_up_proj.weight, self.down_proj.weight, residual)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out = self.down_proj(F.silu(gate) * up)
        return out if residual is None else residual + out


class DecoderLayer(nn.Module):
    """shard: which heads, and which hidden units of the MLP, it has. Several ranks also divide the positions between
    attention and MLP: norms and residual connections have this rank's, `[1, batch * positions / ranks, dim]`.
    """

    def __init__(self, config: DecoderConfig, kernels: Kernels, shard: TensorShard = WHOLE):
        """config: sizes of this shard."""
        super().__init__()
        self.shard = shard
        self.fused_backward = kernels.fused_backward
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config, kernels)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Attended) -> Tensor:
        normalized, x = self.normalize(self.input_layernorm, x)
        if self.shard.size > 1:
            return self._forward_of_shard(normalized, x, cos, sin, mask)
        x = self.self_attn(normalized, x, cos, sin, mask)
        return self.mlp(*self.normalize(self.post_attention_layernorm, x))

    def _forward_of_shard(self, normalized: Tensor, x: Tensor, cos: Tensor, sin: Tensor, mask: Attended) -> Tensor:
        rows = cos.shape[0], cos.shape[2]  # batch, positions
        attended = self.self_attn(self.shard.gathered(normalized).view(*rows, -1), None, cos, sin, mask)
        x = x + self.shard.summed(attended)
        if self.self_attn.o_proj.bias is not None:
            x = x + self.self_attn.o_proj.bias
        normalized, x = self.normalize(self.post_attention_layernorm, x)
        return x + self.shard.summed(self.mlp(self.shard.gathered(normalized), None))

    def normalize(self, norm: RMSNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x, and x for the residual connection."""
        return NormWithResidual.apply(x, norm.weight, norm.eps) if self.fused_backward else (norm(x), x)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig, kernels: Kernels = PLAIN, shard: TensorShard = WHOLE):
        """shard: the part of its parameters that it has; `config` has the sizes of the whole."""
        super().__init__()
        self.config, self.shard = config, shard
        sizes = shard.sizes(config)
        # `initialize` sets the first values; random ones on the meta device would import torch's compiler
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.dim, _weight=torch.zeros(sizes.vocab_size, sizes.dim))
        self.layers = nn.ModuleList(DecoderLayer(sizes, kernels, shard) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(sizes.dim, sizes.vocab_size, bias=False)

    def output_weight(self) -> Tensor:
        """Weight of the output projection, `[vocab_size, dim]`, or this rank's rows of it."""
        return (self.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Attended | list[Attended] = None,
        head: Callable[[Tensor, Tensor], object] | None = None,
    ):
        """Logits `[batch, positions, vocab_size]` of tokens `[batch, positions]`.

        position_ids: `[batch, positions]`, by default 0, 1, 2 …; mask: see `tidar.models.attention`, None is causal,
        a list has one for each layer. On several ranks both must be given, and logits are of this rank's tokens.
        head: called in place of the projection to logits with the last hidden states `[batch, positions, dim]` and the
        output weight; its result is returned. It runs inside the model, where FSDP has gathered the weight.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, input_ids.device)
        x, cos, sin = self.embed(input_ids, position_ids, frequencies)
        for layer, layer_mask in zip(self.layers, mask if isinstance(mask, list) else repeat(mask)):
            x = layer(x, cos, sin, layer_mask)
        x = self.norm(x)
        if self.shard.size > 1:
            x = self.shard.gathered(x).view(*input_ids.shape, -1)
        return (head or F.linear)(x, self.output_weight())

    def embed(self, input_ids: Tensor, position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, and cosines and sines of the positions, all of one dtype.

        On several ranks the embeddings are of this rank's positions, as in `DecoderLayer`.
        """
        if self.shard.size == 1:
            x = self.embed_tokens(input_ids)
        else:
            n_rows = self.embed_tokens.weight.shape[0]
            row = input_ids - self.shard.rank * n_rows
            is_own = (row >= 0) & (row < n_rows)
            embedded = self.embed_tokens(row.clamp(0, n_rows - 1))
            x = self.shard.summed(embedded.where(is_own[..., None], 0))
        cos, sin = rotary(position_ids, frequencies, self.config.rope_scaling)
        return x, cos.to(x.dtype), sin.to(x.dtype)
