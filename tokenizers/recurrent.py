"""Recurrent binarization: bits of a code, refined loop by loop by what is still wrong.

BEBR (Gan et al. 2023, arXiv 2302.08714, section 3.2), made for retrieval: a first layer of bits, a
reconstruction from them, then bits of the remaining error at half the scale, and so on. With
identities for networks it is successive approximation: loop n leaves an error of 2^-n at most.
Here it quantizes features of images: reconstruction terms take the place of the contrastive loss,
and LayerNorm that of BatchNorm, whose statistics differ between training and evaluation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.networks.convnet import kernel_init
from smalti.tokenizers import nested
from smalti.tokenizers.binary import PACKED, bit_use, code_use, pack, unpack
from smalti.tokenizers.quantizer import Quantized, Quantizer, QuantizerConfig, sg, straight_through
from smalti.tokenizers.search import HIGHEST
from smalti.tokenizers.vq import normalize


@dataclasses.dataclass(kw_only=True, slots=True)
class RecurrentConfig(QuantizerConfig):
  """`levels` codes of `bits` bits each, coarse to fine, of vectors with `dim` channels.

  Attributes:
    dim: channels of the vectors, which are l2-normalised.
    bits: m, width of the code; every level refines all of it.
    levels: n + 1, the first bits and n loops.
    hidden: width of the networks between vectors and code (BEBR: 2048).
    dropout: fraction of the training examples that keep only some levels; 0 is off.
    schedule: law of how many levels these keep, see `nested.draw_budget`.
    least: levels that are always kept.
  """
  dim: int = 256
  bits: int = 10
  levels: int = 4
  hidden: int = 2048
  dropout: float = 0.0
  schedule: nested.Schedule = 'uniform'
  least: int = 1

  def build(self, *, rngs: nnx.Rngs) -> 'Recurrent':
    return Recurrent(self, rngs=rngs)


class Recurrent(Quantizer):
  """b_0 = sign(W x), r_i = sign(R_i(x - f_{i-1})), b_i = b_{i-1} + 2^-i r_i, f_i = |B_i(b_i)|.

  x is z l2-normalised, as is f; vectors are f_n, or f_k where a prefix of k + 1 levels is kept.
  Gradients pass signs where |input| <= 1. Losses, each a mean over levels, so that every prefix is
  a reconstruction of its own: `commitment` = mean |x - sg f_i|^2, `codebook` = mean |sg x - f_i|^2.
  """

  order = 'depth'

  def __init__(self, config: RecurrentConfig, *, rngs: nnx.Rngs):
    if min(config.dim, config.levels, config.hidden) < 1 or not 1 <= config.bits <= PACKED:
      raise ValueError(
          f'dim={config.dim}, levels={config.levels} and hidden={config.hidden} must be positive, '
          f'and bits={config.bits} in 1..{PACKED}.')
    if not 0 <= config.dropout <= 1:
      raise ValueError(f'dropout={config.dropout} is a fraction of the examples, in [0, 1].')
    budgets = nested.budgets(config.levels, config.schedule, config.least)
    self.dim, self.depth, self.dropout = config.dim, config.levels, config.dropout
    self.schedule, self.least = config.schedule, config.least
    self.vocab, self.factors = (2**config.bits,) * config.levels, (2,) * config.bits
    self.budgets = budgets if config.dropout else ()
    perceptron = lambda c, f: Perceptron(c, config.hidden, f, rngs=rngs)  # noqa: E731
    self.first = perceptron(config.dim, config.bits)
    self.errors = nnx.List([
        perceptron(config.dim, config.bits) for _ in range(config.levels - 1)])
    self.decoders = nnx.List([perceptron(config.bits, config.dim) for _ in range(config.levels)])

  def __call__(self, z: Float[Array, 'b n c'], *, key: Array | None = None,
               train: bool = False) -> Quantized:
    x = normalize(z.astype(jnp.float32))
    signs, found = binarize(x, self.first, self.errors, self._decoders())
    bits = jnp.concatenate(signs, -1) > 0
    tokens, vectors = pack(bits, self.depth), found[-1]
    if train and self.dropout:
      if key is None:
        raise ValueError('key=None: dropout draws levels in training; pass a key, or dropout=0.')
      vectors = _chosen(found, self._draw_keep(x.shape[0], key)[:, None])
    every = jnp.stack(found)
    losses = {'commitment': jnp.mean(jnp.square(x - sg(every))),
              'codebook': jnp.mean(jnp.square(sg(x) - every))}
    # |x|^2 is 1: these are relative errors already
    left = [jnp.sum(jnp.mean(jnp.square(sg(x - f)), (0, 1))) for f in found]
    metrics = {**code_use(tokens, self.vocab), **bit_use(bits), 'relative_commitment': left[-1],
               **{f'relative_commitment_{i}': e for i, e in enumerate(left)}}
    return Quantized(vectors, tokens, losses, metrics, statistics=None)

  def lookup(self, tokens: Int[Array, 'b n d'], mask: Bool[Array, 'b n d'] | None = None
             ) -> Float[Array, 'b n c']:
    """f of the levels before the first that `mask` leaves out; zeros where it leaves out all."""
    signs = jnp.where(unpack(tokens, len(self.factors)), 1.0, -1.0)
    total, found, decoders = jnp.zeros(()), [], self._decoders()
    for i, level in enumerate(jnp.split(signs, self.depth, -1)):
      total = total + 2.0 ** -i * level
      if mask is not None or i == self.depth - 1:
        found.append(decoders[i](total))
    if mask is None:
      return found[-1]
    return _chosen(found, jnp.sum(jnp.cumprod(mask.astype(jnp.int32), -1), -1))

  def _decoders(self) -> list[Callable[[Array], Array]]:
    return [functools.partial(_onto_sphere, f) for f in self.decoders]

  def _draw_keep(self, batch: int, key: Array) -> Int[Array, 'b']:
    pick, draw = jax.random.split(key)
    keep = nested.draw_budget(draw, batch, self.depth, self.schedule, self.least)
    return jnp.where(jax.random.uniform(pick, (batch,)) < self.dropout, keep, self.depth)


class Perceptron(nnx.Module):
  """Linear, LayerNorm, ReLU, linear; float32."""

  def __init__(self, inside: int, hidden: int, outside: int, *, rngs: nnx.Rngs):
    options: Any = dict(precision=HIGHEST, kernel_init=kernel_init, rngs=rngs)
    self.inner = nnx.Linear(inside, hidden, **options)
    self.norm = nnx.LayerNorm(hidden, rngs=rngs)
    self.outer = nnx.Linear(hidden, outside, **options)

  def __call__(self, x: Float[Array, '*b c']) -> Float[Array, '*b f']:
    return self.outer(jax.nn.relu(self.norm(self.inner(x))))


def binarize(x: Float[Array, '*b c'], first: Callable[[Array], Array],
             errors: Sequence[Callable[[Array], Array]],
             decoders: Sequence[Callable[[Array], Array]]
             ) -> tuple[list[Float[Array, '*b m']], list[Float[Array, '*b c']]]:
  """(signs of every level, reconstruction after every level).

  Args:
    first: from x to what the first signs are of.
    errors: from x minus the reconstruction of a level to what the next signs are of.
    decoders: from the code up to a level, sum_i 2^-i signs_i, to its reconstruction.
  """
  signs, found, total = [], [], jnp.zeros(())
  for i, decode in enumerate(decoders):
    signs.append(sign(first(x) if i == 0 else errors[i - 1](x - found[-1])))
    total = total + 2.0 ** -i * signs[-1]
    found.append(decode(total))
  return signs, found


def sign(x: Float[Array, '*b m']) -> Float[Array, '*b m']:
  """-1 or 1, with gradient 1 where |x| <= 1 and 0 beyond."""
  return straight_through(jnp.clip(x, -1, 1), jnp.where(x > 0, 1.0, -1.0))


def _onto_sphere(decode: Callable[[Array], Array], code: Array) -> Array:
  return normalize(decode(code))


def _chosen(found: list[Float[Array, 'b n c']], keep: Int[Array, 'b #n']) -> Float[Array, 'b n c']:
  """The reconstruction of the first `keep` levels, zeros for none."""
  out = jnp.zeros_like(found[0])
  for i, vectors in enumerate(found, 1):
    out = jnp.where((keep == i)[..., None], vectors, out)
  return out
