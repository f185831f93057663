"""The transformer under every generator and vision network: pre-norm, causal or not.

RMSNorm, RoPE, QK-norm and SwiGLU, unless the config says otherwise: published vision transformers
have LayerNorm, biases and a plain MLP.

Blocks are stacked (every leaf of `blocks` has a leading layer axis) and scanned for training, so
that compile time does not grow with depth; for decoding they are unstacked once, outside the token
loop, because a scan over stacked layers copies the whole cache for every token. Fused weights keep
heads an axis: a mesh splits [width, heads, f] on heads.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.networks.attention import Entries, attend, write
from smalti.networks.int8 import Int8
from smalti.networks.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
    constrain,
    deviation,
    dropout,
    rotate,
    rotation,
)

Module = TypeVar('Module', bound=nnx.Module)
ACTIVATIONS: dict[str, Any] = {
    # as PyTorch has it; the complementary error function of jax.nn.gelu costs a step 6 % on CPU
    'gelu': lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5 ** 0.5)), 'tanh': jnp.tanh}
Rotations = tuple[Float[Array, '... p'], Float[Array, '... p']]
Cache = list[tuple[Entries, Entries]]
Memory = tuple[Float[Array, 'b s w'], Bool[Array, 'b s']]  # vectors, and which may be attended to
Memories = list[tuple[Float[Array, 'b j s f'], Float[Array, 'b j s f'], Bool[Array, 'b s']]]


@dataclasses.dataclass(kw_only=True, slots=True)
class TransformerConfig:
  """Sizes of a transformer.

  Args:
    kv_heads: heads of keys and values, a divisor of `heads` (GQA); None is `heads`.
    hidden: width of the MLP; None is 4 width, for 'swiglu' 8/3 width rounded up to a multiple of 32
      (LlamaGen: of 256).
    axes: coordinates of a position that rotate queries and keys; 0 is no position at all.
    norm: 'rms' with a gain, 'layer' without gain or shift (FlexTok), or 'affine', a layer norm with
      both (ViT-VQGAN, TiTok); for queries and keys too.
    epsilon: of the norms; 1e-6 in DINOv2.
    mlp: 'swiglu', or one hidden layer of exact 'gelu' (TiTok) or 'tanh' (enhancing-transformers'
      ViT-VQGAN).
    bias: of the MLP and of attention's output (ViT-VQGAN, TiTok).
    qkv_bias: of queries, keys and values (TiTok).
    init: kernels N(0, 0.02), or N(0, 2 / (inputs + outputs)) of each matrix ('xavier', FlexTok).
    modulated: adaLN-zero from a vector [b, width] (arXiv 2212.09748); norms then have no gain.
    streams: lengths of consecutive stretches of positions whose blocks have a modulation each
      (FlexTok: patches and registers); () is one for all positions.
    memory: width of vectors that every block attends to after itself, by cross-attention (Vaswani
      et al. 2017, arXiv 1706.03762, section 3.2.3); 0 is none.
    remat: recompute blocks in the backward pass: a fifth of the memory, 17 % slower on a CPU.
      Small models do without.
    dtype: of products and activations; parameters, norms, softmax and logits are float32.
  """
  layers: int
  width: int
  heads: int
  kv_heads: int | None = None
  hidden: int | None = None
  axes: int = 1
  qk_norm: bool = True
  norm: Literal['rms', 'layer', 'affine'] = 'rms'
  epsilon: float = 1e-5
  mlp: Literal['swiglu', 'gelu', 'tanh'] = 'swiglu'
  bias: bool = False
  qkv_bias: bool = False
  init: Literal['normal', 'xavier'] = 'normal'
  modulated: bool = False
  streams: tuple[int, ...] = ()
  dropout: float = 0.0
  memory: int = 0
  remat: bool = True
  dtype: Literal['float32', 'bfloat16'] = 'float32'


class Heads(nnx.Module):
  """The maps of grouped-query attention from x to what is `source` wide, heads first."""

  def __init__(self, config: TransformerConfig, source: int, *, rngs: nnx.Rngs):
    width, heads, features = config.width, config.heads, config.width // config.heads
    kv_heads = config.kv_heads or heads
    whole, shared = std(config, width, width), std(config, source, kv_heads * features)
    options: Any = dict(dtype=config.dtype, rngs=rngs)
    self.query = Linear(width, (heads, features), bias=config.qkv_bias, std=whole, **options)
    self.key_value = Linear(
        source, (2, kv_heads, features), bias=config.qkv_bias, std=shared, **options)
    self.out = Linear((heads, features), width, bias=config.bias, std=whole, **options)
    self.query_norm = norm(config, features) if config.qk_norm else None
    self.key_norm = norm(config, features) if config.qk_norm else None


class Attention(Heads):
  """Grouped-query self-attention: [b, k, n, f]."""

  def __call__(self, x: Float[Array, 'b n c'], *, table: Any, causal: bool, mask: Array | None,
               cache: Any = None, index: Array | None = None) -> tuple[Array, Any]:
    query, key, value = (constrain(y, 'b k n f') for y in self.heads(x, table))
    if cache is not None:
      written = tuple(write(c, y, index) for c, y in zip(cache, (key, value)))
      # without it XLA on CPU writes a second cache that has no axis for a batch of one, and copies
      # both for every token: a third of the time
      key, value = cache = jax.lax.optimization_barrier(written)
    y = attend(query, key, value, causal=causal, mask=mask, index=index)
    return self.out(jnp.swapaxes(y, 1, 2)), cache

  def heads(self, x: Float[Array, 'b n c'], table: Any) -> tuple[Array, Array, Array]:
    """Queries, keys and values, normed and rotated, heads first."""
    # transposed after the product: an einsum to 'bknf' transposes the weights, for every token
    query = jnp.swapaxes(self.query(x), 1, 2)
    key, value = (jnp.swapaxes(y, 1, 2) for y in jnp.moveaxis(self.key_value(x), 2, 0))
    if self.query_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    if table is not None:
      query, key = rotate(query, table), rotate(key, table)
    return query, key, value


class JointAttention(Attention):
  """`Attention` with one product, one norm and one rotation: a small batch pays for every kernel.

  A group of queries is beside its key and its value, so that a mesh splits them as it did apart.
  """

  def __init__(self, attention: Attention):
    kv_heads = attention.key_value.kernel.shape[2]
    groups = attention.query.kernel.shape[1] // kv_heads

    def beside(query: Array, key_value: Array) -> Array:  # [.. k f], [.. 2 j f] to [.. j g+2 f]
      query = query.reshape(*query.shape[:-2], kv_heads, groups, query.shape[-1])
      return jnp.concatenate([query, jnp.moveaxis(key_value, -3, -2)], -2)

    def rows(query: Array, key: Array) -> Array:  # [f], [f] to [g+1 1 f]
      return jnp.stack([query] * groups + [key])[:, None]

    self.joint = _merged(attention.query, attention.key_value, beside)
    self.norm = None if attention.query_norm is None else _merged(
        attention.query_norm, attention.key_norm, rows)
    self.out = attention.out

  def heads(self, x, table):
    y = jnp.moveaxis(self.joint(x), 1, -2)  # b j g+2 n f
    turned, value = y[:, :, :-1], y[:, :, -1]
    if self.norm is not None:
      turned = self.norm(turned)
    if table is not None:
      merged = turned.reshape(len(x), -1, *turned.shape[-2:])
      turned = rotate(merged, table).reshape(turned.shape)
    query, key = turned[:, :, :-1], turned[:, :, -1]
    return query.reshape(len(x), -1, *query.shape[-2:]), key, value


class CrossAttention(Heads):
  """Grouped-query attention to a memory, whose keys and values are read once: no positions."""

  def read(self, vectors: Float[Array, 'b t c']) -> tuple[Array, Array]:
    """Keys and values of a memory, heads first: [b, k, t, f]."""
    key, value = (jnp.swapaxes(y, 1, 2) for y in jnp.moveaxis(self.key_value(vectors), 2, 0))
    key = key if self.key_norm is None else self.key_norm(key)
    return constrain(key, 'b k t f'), constrain(value, 'b k t f')

  def __call__(self, x: Float[Array, 'b n c'], key: Array, value: Array, mask: Bool[Array, 'b t']
               ) -> Float[Array, 'b n c']:
    query = jnp.swapaxes(self.query(x), 1, 2)
    query = query if self.query_norm is None else self.query_norm(query)
    seen = jnp.broadcast_to(mask[:, None, None], (len(mask), 1, x.shape[1], mask.shape[1]))
    y = attend(constrain(query, 'b k n f'), key, value, causal=False, mask=seen)
    return self.out(jnp.swapaxes(y, 1, 2))


class Cross(nnx.Module):
  """attention(norm(x), memory): what a block adds between self-attention and the MLP."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    self.norm = norm(config, config.width)
    self.attention = CrossAttention(config, config.memory, rngs=rngs)

  def __call__(self, x: Float[Array, 'b n c'], memory: tuple[Array, Array, Array]
               ) -> Float[Array, 'b n c']:
    return self.attention(self.norm(x), *memory)


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); adaLN-zero where modulated.

  With a memory, x + attention(norm(x), memory) comes between; it is not modulated (PixArt-alpha,
  arXiv 2310.00426, section 2.3).
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    width, hidden = config.width, hidden_size(config)
    inside = std(config, width, hidden)
    self.attention_norm = norm(config, width, gain=not config.modulated)
    self.attention = Attention(config, config.width, rngs=rngs)
    self.cross = Cross(config, rngs=rngs) if config.memory else None
    self.mlp_norm = norm(config, width, gain=not config.modulated)
    options: Any = dict(bias=config.bias, std=inside, dtype=config.dtype, rngs=rngs)
    if config.mlp == 'swiglu':
      self.gate_up = Linear(width, (2, hidden), **options)
    else:
      self.up = Linear(width, hidden, **options)
    self.down = Linear(hidden, width, **options)
    self.mlp = config.mlp
    self.streams = config.streams
    self.modulation = Linear(
        width, 6 * width * max(1, len(config.streams)), bias=True, std=0,
        rngs=rngs) if config.modulated else None
    self.dropout = config.dropout

  def __call__(self, x: Float[Array, 'b n c'], *, modulation: Array | None = None,
               key: Array | None = None, memory: tuple[Array, Array, Array] | None = None,
               **attention: Any) -> tuple[Array, Any]:
    keys = (None, None) if key is None else jax.random.split(key)
    gate_a: Any
    gate_m: Any
    if self.modulation is None:
      shift_a = scale_a = shift_m = scale_m = None
      gate_a = gate_m = 1
    else:
      shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
          part.astype(x.dtype) for part in jnp.split(
              self._spread(_over_slots(self.modulation(jax.nn.silu(modulation)))), 6, -1))
    y = modulate(self.attention_norm(x), shift_a, scale_a)
    y, cache = self.attention(y, **attention)
    x = constrain(x + gate_a * dropout(y, self.dropout, keys[0]), 'b n c')
    if self.cross is not None:
      between = None if key is None else jax.random.fold_in(key, 2)
      x = constrain(x + dropout(self.cross(x, memory), self.dropout, between), 'b n c')
    y = modulate(self.mlp_norm(x), shift_m, scale_m)
    if self.mlp == 'swiglu':
      gate, up = jnp.moveaxis(self.gate_up(y), -2, 0)
      y = jax.nn.silu(gate) * up
    else:
      y = ACTIVATIONS[self.mlp](self.up(y))
    y = self.down(y)
    return constrain(x + gate_m * dropout(y, self.dropout, keys[1]), 'b n c'), cache

  def _spread(self, y: Float[Array, 'b _n m']) -> Float[Array, 'b n c6']:
    """Every stretch's own modulation at all its positions; one modulation broadcasts as it is."""
    if not self.streams:
      return y
    parts = jnp.split(y, len(self.streams), -1)
    # not by indices: the gradient of a broadcast is a sum, that of a gather a scatter
    return jnp.concatenate([jnp.broadcast_to(part, (part.shape[0], n, part.shape[2]))
                            for n, part in zip(self.streams, parts)], 1)


class Transformer(nnx.Module):
  """A stack of blocks and a final norm: [b, n, c] to [b, n, c]."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    check(config)
    # plain values, not the config: a module's static part must hash
    self.layers, self.axes, self.modulated = config.layers, config.axes, config.modulated
    self.kv_heads, self.features = config.kv_heads or config.heads, config.width // config.heads
    self.dropout, self.remat, self.dtype = config.dropout, config.remat, config.dtype
    self.memory = config.memory

    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs) -> Block:
      return Block(config, rngs=rngs)

    self.blocks = stacked(rngs)
    self.norm = norm(config, config.width, gain=not config.modulated)
    self.modulation = Linear(
        config.width, 2 * config.width, bias=True, std=0, rngs=rngs) if config.modulated else None

  def __call__(self, x: Float[Array, 'b n c'], *,
               positions: Int[Array, '... n a'] | Rotations | None = None, causal: bool = False,
               mask: Bool[Array, 'b n'] | Bool[Array, '#b 1 n n'] | None = None,
               modulation: Float[Array, 'b *slots c'] | None = None, memory: Memory | None = None,
               key: Array | None = None, train: bool = False, part: tuple[int, int] | None = None
               ) -> Float[Array, 'b n c']:
    """All positions at once.

    Args:
      positions: the coordinates that rotate queries and keys, or `rotations` of them; unused (may
        be None) for axes=0.
      causal: position i attends to 0..i only.
      mask: which positions may be attended to; each may always attend to itself. Four axes state
        which keys (last) every query sees, as it is.
      modulation: the condition vector of adaLN, of an example or of each of its positions, needed
        if and only if the config is modulated.
      memory: vectors of the config's width `memory` and which of them may be attended to, one or
        more per row.
      key: for dropout, needed to train with it.
      part: (a, b), the blocks after the a-th up to the b-th alone; the norm follows the last.
    """
    self._check_modulation(modulation)
    self._check_memory(memory)
    first, last = part or (0, self.layers)
    if not 0 <= first < last <= self.layers:
      raise ValueError(f'{part=} must be (a, b), blocks after the a-th up to the b-th of '
                       f'{self.layers}.')
    if train and self.dropout and key is None:
      raise ValueError(f'Training with dropout={self.dropout} needs a key.')
    key = key if train and self.dropout else None
    graph, params = nnx.split(self.blocks)
    table = self.rotations(positions)

    def body(x, layer):
      params, i = layer
      block = nnx.merge(graph, params)
      x, _ = block(
          x, modulation=modulation, key=None if key is None else jax.random.fold_in(key, i),
          memory=memory and (*block.cross.attention.read(memory[0]), memory[1]),
          table=table, causal=causal, mask=mask)
      return x, None

    if self.remat:
      body = jax.checkpoint(body, prevent_cse=False)
    x = constrain(x.astype(self.dtype), 'b n c')
    if part is not None:
      params = jax.tree.map(lambda leaf: leaf[first:last], params)
    x, _ = jax.lax.scan(body, x, (params, jnp.arange(first, last)))
    return self._last(x, modulation) if last == self.layers else x

  def hidden(self, x: Float[Array, 'b n c'], *, blocks: tuple[int, ...],
             positions: Int[Array, '... n a'] | Rotations | None = None, causal: bool = False,
             modulation: Float[Array, 'b *slots c'] | None = None, memory: Memory | None = None
             ) -> list[Float[Array, 'b n c']]:
    """The residual stream after the numbered blocks, 1 the first; no later ones are computed.

    Raises:
      ValueError: no block, or one that is not there.
    """
    if not blocks or not all(1 <= i <= self.layers for i in blocks):
      raise ValueError(f'{blocks=} must be some of 1..{self.layers}.')
    self._check_modulation(modulation)
    table, x, states = self.rotations(positions), constrain(x.astype(self.dtype), 'b n c'), {}
    layers = self.unstack()[:max(blocks)]
    for i, (block, read) in enumerate(zip(layers, self.read(memory, layers)), 1):
      x, _ = block(x, modulation=modulation, memory=read, table=table, causal=causal, mask=None)
      states[i] = x
    return [states[i] for i in blocks]

  def cache(self, batch: int, length: int, dtype: Literal['int8'] | None = None) -> Cache:
    """Empty keys and values of every layer, for `length` positions.

    Args:
      dtype: None keeps them as they are computed, 'int8' in a quarter of float32 and a scale for
        every token and head.
    """
    if dtype == 'int8':
      shape = (batch, self.kv_heads, length)
      quantized = Int8(constrain(jnp.zeros((*shape, self.features), jnp.int8), 'b k n f'),
                       constrain(jnp.zeros((*shape, 1)), 'b k n f'))
      return [(quantized, quantized) for _ in range(self.layers)]
    if dtype is not None:
      raise ValueError(f'a cache of {dtype=} is not known; say int8, or None for floats.')
    # XLA on CPU would convert a bfloat16 cache to float32, as a whole, for every token
    dtype = 'float32' if jax.default_backend() == 'cpu' else self.dtype
    empty = constrain(jnp.zeros((batch, self.kv_heads, length, self.features), dtype), 'b k n f')
    return [(empty, empty) for _ in range(self.layers)]

  def grow(self, cache: list, length: int) -> list:
    """The cache with room for `length` positions: a loop over short caches reads less."""
    return jax.tree.map(lambda entry: jnp.pad(
        entry, [(0, 0), (0, 0), (0, length - entry.shape[2]), (0, 0)]), cache)

  def segments(self, batch: int, start: int, length: int) -> list[int]:
    """Lengths that `grow` gives a cache on the way from `start` to `length` positions.

    Attention reads all of a cache, so short ones save up to 3/8 of that. At most four (each is a
    program of its own within the compiled one), none shorter than 64; and one where the caches of
    `batch` rows are less than a quarter of the weights, which every token reads too.
    """
    weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.blocks)))
    entries = 2 * self.layers * batch * self.kv_heads * self.features * length
    count = max(1, min(4, length // 64)) if 4 * entries >= weights else 1
    ends = [length * (i + 1) // count for i in range(count)]
    return [end for end in ends if end > start]

  def unstack(self) -> list[Block]:
    """The blocks one by one, joint in attention; call it once, outside the token loop."""
    graph, params = nnx.split(self.blocks)
    blocks = [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], params))
              for i in range(self.layers)]
    for block in blocks:
      block.attention = JointAttention(block.attention)
    return blocks

  def read(self, memory: Memory | None, layers: list[Block]) -> Memories | list[None]:
    """What each of the `layers` attends to; read it once, outside the token loop."""
    self._check_memory(memory)
    if memory is None:
      return [None] * len(layers)
    return [(*block.cross.attention.read(memory[0]), memory[1]) for block in layers]

  def extend(self, x: Float[Array, 'b m c'], cache: Cache, *,
             positions: Int[Array, '... m a'] | Rotations | None = None,
             index: Int[Array, '...'] | int = 0,
             mask: Bool[Array, 'b t'] | Bool[Array, '#b 1 m t'] | None = None,
             modulation: Float[Array, 'b *slots c'] | None = None,
             layers: list[Block] | None = None,
             memories: Memories | list[None] | None = None) -> tuple[Float[Array, 'b m c'], Cache]:
    """Decoding: writes m entries at `index`, of which each attends to all up to itself.

    Args:
      index: where the m entries go, one place for all rows or one per row (ragged prefixes).
      mask: which cache entries may be attended to; each may always attend to itself. Four axes
        state which entries (last) every query sees, as it is, and nothing is causal.
      layers: `unstack()`, sliced once.
      memories: `read(memory, layers)`, where there is a memory.
    """
    self._check_modulation(modulation)
    layers = self.unstack() if layers is None else layers
    memories = self.read(None, layers) if memories is None else memories
    table, x = self.rotations(positions), constrain(x.astype(self.dtype), 'b n c')
    written = []
    for block, entry, read in zip(layers, cache, memories, strict=True):
      x, entry = block(x, modulation=modulation, memory=read, table=table, causal=True, mask=mask,
                       cache=entry, index=jnp.asarray(index))
      written.append(entry)
    return self._last(x, modulation), written

  def rotations(self, positions: Int[Array, '... n a'] | Rotations | None) -> Rotations | None:
    """(cos, sin) of positions; made once, outside the token loop, they need no cosines in it."""
    if not self.axes:
      return None
    if isinstance(positions, tuple):
      return positions
    if positions is None or positions.shape[-1] != self.axes:
      raise ValueError(
          f'positions of shape {getattr(positions, "shape", None)} must end in '
          f'axes={self.axes} coordinates.')
    return rotation(positions, self.features)

  def _last(self, x: Array, modulation: Array | None) -> Array:
    x = self.norm(x)
    if self.modulation is None:
      return x
    shift, scale = jnp.split(_over_slots(self.modulation(jax.nn.silu(modulation))), 2, -1)
    return modulate(x, shift.astype(x.dtype), scale.astype(x.dtype))

  def _check_modulation(self, modulation: Array | None) -> None:
    if (modulation is not None) != self.modulated:
      raise ValueError(
          f'modulated={self.modulated} does not go with modulation='
          f'{"None" if modulation is None else "an array"}.')

  def _check_memory(self, memory: Memory | None) -> None:
    width = 0 if memory is None else memory[0].shape[-1]
    if width != self.memory:
      raise ValueError(f'A memory of width {width} (0 is none) does not go with '
                       f'memory={self.memory} of the config.')


def _over_slots(y: Float[Array, '...']) -> Float[Array, 'b _n m']:
  return y[:, None] if y.ndim == 2 else y


def _merged(one: Module, other: nnx.Module, function: Callable[[Array, Array], Array]) -> Module:
  """`one` with every array merged with that of `other`."""
  graph, state = nnx.split(one)
  return nnx.merge(graph, jax.tree.map(function, state, nnx.state(other)))


def norm(config: TransformerConfig, width: int, gain: bool = True) -> RMSNorm | LayerNorm:
  if config.norm == 'rms':
    return RMSNorm(width, gain=gain, epsilon=config.epsilon)
  return LayerNorm(width if gain and config.norm == 'affine' else None, epsilon=config.epsilon)


def std(config: TransformerConfig, inputs: int, outputs: int) -> float:
  """The deviation of a kernel at initialisation."""
  return deviation(inputs, outputs) if config.init == 'xavier' else 0.02


def check(config: TransformerConfig) -> None:
  """Raises ValueError where the sizes do not divide."""
  if config.streams and not config.modulated:
    raise ValueError(f'streams={config.streams} say who is modulated; set modulated=True.')
  if config.width % config.heads:
    raise ValueError(f'width={config.width} must be a multiple of heads={config.heads}.')
  if config.heads % (config.kv_heads or config.heads):
    raise ValueError(f'kv_heads={config.kv_heads} must divide heads={config.heads}.')
  features = config.width // config.heads
  if config.axes and (features % 2 or features < 2 * config.axes):
    raise ValueError(
        f'width / heads = {features} must be even and at least 2 * axes = {2 * config.axes}.')


def hidden_size(config: TransformerConfig, multiple: int = 32) -> int:
  """MLP width: as given, or 4 width, for SwiGLU int(2/3 * 4 * width) rounded up to a multiple."""
  if config.mlp != 'swiglu':
    return config.hidden or 4 * config.width
  return config.hidden or multiple * math.ceil(int(2 * 4 * config.width / 3) / multiple)


def modulate(x: Array, shift: Array | None, scale: Array | None) -> Array:
  return x if shift is None else x * (1 + scale) + shift
