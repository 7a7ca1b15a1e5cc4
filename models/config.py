"""The shape of a model: one frozen value, validated on construction."""

from __future__ import annotations

import dataclasses

from moetion_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder-only Mixture-of-Experts transformer.

  Attributes:
    vocab_size: number of token ids.
    sequence_length: number of tokens that a sequence is trained on.
    num_layers: number of transformer blocks, dense ones included.
    model_dim: width of the residual stream.
    num_heads: number of query heads.
    num_kv_heads: number of key/value heads; each serves num_heads /
      num_kv_heads query heads (grouped-query attention).
    head_dim: width of one head, even (rotary embedding turns pairs).
    num_experts: number of routed experts of a MoE layer.
    experts_per_token: number of routed experts that a token is sent to (top-k).
    expert_dim: hidden width of one routed expert.
    shared_dim: hidden width of the shared experts together, 0 for none. Several
      shared experts of one width are one SwiGLU of their summed width.
    dense_dim: hidden width of the feed-forward part of a dense layer.
    first_dense_layers: number of first layers that are dense (DeepSeek-MoE).
    moe_every: of the layers after those, every moe_every-th is a MoE layer, the
      others are dense (MoE-LLaVa: 2).
    normalize_gates: whether a token's k gates are scaled to sum to 1.
    capacity_factor: seats of an expert as a multiple of its even share of a
      device's tokens; further tokens are dropped (and counted). 0 is dropless:
      every expert gets a seat for every token of the device, which makes the
      dispatch buffers num_experts / (experts_per_token * factor) times as
      large as with a factor: two of [num_experts, tokens, model_dim] and three
      of [num_experts, tokens, expert_dim] in compute dtype a layer.
    balance: way of balancing the experts: 'loss' adds the auxiliary loss of the
      Switch Transformer, 'bias' steers the choice by a bias that follows the
      load (DeepSeek-V3).
    balance_rate: weight of the auxiliary loss, or step of the bias.
    z_loss_weight: weight of the router's squared logsumexp (ST-MoE).
    dropout_rate: rate of dropout on the outputs of attention and feed-forward
      parts.
    rope_base: base wavelength of the rotary embedding.
    compute_dtype: dtype of activations and compute weights.
    remat: whether a block's activations are recomputed in the backward pass.
  """

  vocab_size: int = 256
  sequence_length: int = 128
  num_layers: int = 4
  model_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 32
  num_experts: int = 8
  experts_per_token: int = 2
  expert_dim: int = 128
  shared_dim: int = 128
  dense_dim: int = 512
  first_dense_layers: int = 1
  moe_every: int = 1
  normalize_gates: bool = True
  capacity_factor: float = 1.5
  balance: str = 'loss'
  balance_rate: float = 0.01
  z_loss_weight: float = 1e-3
  dropout_rate: float = 0.0
  rope_base: float = 10000.0
  compute_dtype: str = 'bfloat16'
  remat: bool = False

  def __post_init__(self) -> None:
    for name in (
      'vocab_size',
      'sequence_length',
      'num_layers',
      'model_dim',
      'num_heads',
      'num_kv_heads',
      'head_dim',
      'num_experts',
      'experts_per_token',
      'expert_dim',
      'dense_dim',
      'moe_every',
    ):
      if getattr(self, name) < 1:
        self._refuse(name, 'must be at least 1')
    for name in ('shared_dim', 'first_dense_layers', 'capacity_factor',
                     'balance_rate', 'z_loss_weight'):  # fmt: skip
      if not getattr(self, name) >= 0:
        self._refuse(name, 'must not be negative')
    if not self.rope_base > 0:
      self._refuse('rope_base', 'must be positive')
    if self.num_heads % self.num_kv_heads:
      self._refuse('num_kv_heads', f'must divide num_heads={self.num_heads}')
    if self.head_dim % 2:
      self._refuse('head_dim', 'must be even (rotary embedding)')
    if self.experts_per_token > self.num_experts:
      self._refuse(
        'experts_per_token', f'exceeds num_experts={self.num_experts}'
      )
    if self.balance not in ('loss', 'bias'):
      self._refuse('balance', "must be 'loss' or 'bias'")
    if not 0 <= self.dropout_rate < 1:
      self._refuse('dropout_rate', 'must be in [0, 1)')
    if self.compute_dtype not in ('bfloat16', 'float32'):
      self._refuse('compute_dtype', "must be 'bfloat16' or 'float32'")

  def is_moe(self, layer: int) -> bool:
    """Tells whether `layer` (from 0) routes its tokens to experts."""
    beyond = layer - self.first_dense_layers
    return beyond >= 0 and (beyond + 1) % self.moe_every == 0

  def capacity(self, tokens: int) -> int:
    """Number of seats of each expert for the `tokens` of one device."""
    if self.capacity_factor == 0:
      return tokens
    share = tokens * self.experts_per_token / self.num_experts
    return min(tokens, max(1, -int(-share * self.capacity_factor // 1)))

  def _refuse(self, name: str, reason: str) -> None:
    raise errors.ConfigError(name, getattr(self, name), reason)
