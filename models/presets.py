"""Named model shapes.

`tiny` and `small` train on two CPU cores. The `paper_*` shapes are those of the
evaluation in "Sparse Checkpointing for Fast and Reliable MoE Training": for
clusters and cost models.
"""

from __future__ import annotations

from models import config as model_config
from moetion_jax import errors

PRESETS: dict[str, model_config.ModelConfig] = {
  # About a minute on 2 cores.
  'tiny': model_config.ModelConfig(),
  # Tens of millions of parameters, sparse enough to train in minutes.
  'small': model_config.ModelConfig(
    sequence_length=256,
    num_layers=6,
    model_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    num_experts=16,
    experts_per_token=2,
    expert_dim=512,
    shared_dim=512,
    dense_dim=1024,
  ),
  # MoE-LLaVa-1.6B x 4 experts, top-2, on StableLM-2-1.6B: the language model,
  # 2.9B parameters (arXiv 2401.15947, table 1).
  'paper_moe_llava': model_config.ModelConfig(
    vocab_size=100352,
    sequence_length=2048,
    num_layers=24,
    model_dim=2048,
    num_heads=32,
    num_kv_heads=32,
    head_dim=64,
    num_experts=4,
    experts_per_token=2,
    expert_dim=5632,
    shared_dim=0,
    dense_dim=5632,
    first_dense_layers=0,
    moe_every=2,
    remat=True,
  ),
  # GPT-MoE with 32 experts. The paper names no widths: these are ours, chosen
  # so that the count comes to its 7.3B.
  'paper_gpt_moe': model_config.ModelConfig(
    vocab_size=50304,
    sequence_length=2048,
    num_layers=12,
    model_dim=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=32,
    experts_per_token=4,
    expert_dim=2816,
    shared_dim=2816,
    dense_dim=8192,
    first_dense_layers=0,
    remat=True,
  ),
  # Qwen1.5-MoE-A2.7B: 14.3B parameters.
  'paper_qwen_moe': model_config.ModelConfig(
    vocab_size=151936,
    sequence_length=2048,
    num_layers=24,
    model_dim=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=60,
    experts_per_token=4,
    expert_dim=1408,
    shared_dim=5632,
    dense_dim=5632,
    first_dense_layers=0,
    normalize_gates=False,
    remat=True,
  ),
  # DeepSeek-MoE 16.4B (arXiv 2401.06066): 2 shared experts of 1408.
  'paper_deepseek_moe': model_config.ModelConfig(
    vocab_size=102400,
    sequence_length=4096,
    num_layers=28,
    model_dim=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    experts_per_token=6,
    expert_dim=1408,
    shared_dim=2816,
    dense_dim=10944,
    first_dense_layers=1,
    normalize_gates=False,
    remat=True,
  ),
}


def get(name: str) -> model_config.ModelConfig:
  """Returns the preset called `name`.

  Raises:
    errors.ConfigError: there is none.
  """
  if name not in PRESETS:
    raise errors.ConfigError(
      'preset', name, f'unknown; known are {", ".join(PRESETS)}'
    )
  return PRESETS[name]
