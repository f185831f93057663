"""Our autoregressive transformer as HuggingFace's Llama: the same function, weight for weight.

Without QK-norm and with one rotary coordinate a block of ours is a Llama block; BOS is one more row
of its table. `smalti bench` times both on the same weights, after comparing their likelihoods.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smalti.generators.autoregressive import Autoregressive, AutoregressiveConfig
from smalti.networks.transformer import TransformerConfig, hidden_size
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(frozen=True)
class Sizes:
  """21 million weights in the trunk: what two cores decode in seconds."""
  layers: int = 12
  width: int = 384
  heads: int = 6
  vocab: int = 4096
  length: int = 256
  remat: bool = True

  @property
  def transformer(self) -> TransformerConfig:
    return TransformerConfig(layers=self.layers, width=self.width, heads=self.heads,
                             qk_norm=False, remat=self.remat)

  @property
  def spec(self) -> TokenSpec:
    return TokenSpec(grid=(self.length,), vocab=(self.vocab,))

  def flops(self, batch: int) -> int:
    """Of the products in a training step: 6 x weights x codes + 12 x layers x width x N x codes.

    Twice a forward pass for the backward one; nothing that is recomputed counts, and attention as
    if it were not causal.
    """
    codes, width = batch * self.length, self.width
    weights = self.layers * (4 * width**2 + 3 * width * hidden_size(self.transformer))
    return codes * (6 * (weights + width * self.vocab) + 12 * self.layers * width * self.length)

  def build(self, seed: int = 0) -> Autoregressive:
    """A model with random weights, its head too: zeros would make every draw uniform."""
    config = AutoregressiveConfig(transformer=self.transformer)
    model = config.build(self.spec, rngs=nnx.Rngs(seed))
    kernel = model.head.kernel
    kernel[...] = 0.02 * jax.random.normal(jax.random.key(seed + 1), kernel.shape)
    return model

  def peer(self) -> dict[str, int]:
    """What the script of the peer needs to know."""
    return dict(layers=self.layers, width=self.width, heads=self.heads, vocab=self.vocab,
                hidden=hidden_size(self.transformer))


def weights(model: Autoregressive) -> dict[str, Any]:
  """The state dict of `LlamaForCausalLM`, as numpy arrays."""
  trunk = model.transformer
  if trunk.modulated or trunk.axes != 1 or trunk.blocks.attention.query_norm is not None:
    raise ValueError('A Llama has one rotary coordinate, no modulation and no QK-norm.')

  def matrix(kernel: Any, inputs: int) -> np.ndarray:  # [*inputs, *outputs] to [outputs, inputs]
    kernel = np.asarray(kernel)
    size = int(np.prod(kernel.shape[:inputs]))
    return np.ascontiguousarray(kernel.reshape(size, -1).T)

  table = np.concatenate([model.token.embedding[...], model.label.embedding[...]])
  head = np.asarray(model.head.kernel[...]).T
  found = {'model.embed_tokens.weight': table,
           'model.norm.weight': np.asarray(trunk.norm.scale[...]),
           'lm_head.weight': np.concatenate([head, np.zeros_like(head[:1])])}  # none for BOS
  blocks = trunk.blocks
  for i in range(trunk.layers):
    keys, values = np.moveaxis(np.asarray(blocks.attention.key_value.kernel[...][i]), 1, 0)
    gate, up = np.moveaxis(np.asarray(blocks.gate_up.kernel[...][i]), 1, 0)
    layer = {
        'self_attn.q_proj': matrix(blocks.attention.query.kernel[...][i], 1),
        'self_attn.k_proj': matrix(keys, 1), 'self_attn.v_proj': matrix(values, 1),
        'self_attn.o_proj': matrix(blocks.attention.out.kernel[...][i], 2),
        'mlp.gate_proj': matrix(gate, 1), 'mlp.up_proj': matrix(up, 1),
        'mlp.down_proj': matrix(blocks.down.kernel[...][i], 1),
        'input_layernorm': np.asarray(blocks.attention_norm.scale[...][i]),
        'post_attention_layernorm': np.asarray(blocks.mlp_norm.scale[...][i]),
    }
    found |= {f'model.layers.{i}.{name}.weight': value for name, value in layer.items()}
  return found


def uncached(model: Autoregressive, keys: jax.Array) -> jax.Array:
  """Sampling without a cache, a full pass per code: the same codes as `generate`, slower."""
  from smalti.generators import logits
  length = model.flat.length
  label = jnp.full(keys.shape, model.classes, jnp.int32)

  def step(i, tokens):
    column = jax.lax.dynamic_index_in_dim(model._logits(tokens, label, None), i, 1, keepdims=False)
    new = logits.draw(column, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
    return jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], i, 1)

  return jax.lax.fori_loop(0, length, step, jnp.zeros((*keys.shape, length), jnp.int32))
