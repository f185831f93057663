"""Multi-scale residual quantization: the resizes, the pyramid, whole scales as prefixes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.gumbel import GumbelConfig
from smalti.tokenizers.multiscale import MultiScaleConfig, area, bicubic, blend_of_scale
from smalti.tokenizers.projected import ProjectedConfig
from smalti.tokenizers.registers import RegisterTokenizerConfig
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.vq import VQConfig

BOOK = VQConfig(codes=16, dim=3, revival=0, init='normal')
PUBLISHED = (1, 5, 14, 30, 55, 91, 155, 255, 424, 680)


def build(**fields):
  return MultiScaleConfig(**{'quantizer': BOOK, 'scales': (1, 2, 4), **fields}).build(
      rngs=nnx.Rngs(0))


def test_resizes_are_those_of_pytorch():
  """Values of torch.nn.functional.interpolate in float64."""
  x = np.array([0.0, 1, 4, 9, 3])
  np.testing.assert_allclose(area(5, 3) @ x, [0.5, 14 / 3, 6], rtol=1e-6)
  np.testing.assert_allclose(area(5, 2) @ x, [5 / 3, 16 / 3], rtol=1e-6)
  np.testing.assert_allclose(bicubic(3, 7) @ x[:3], [
      -0.10932944606414008, 0.08163265306122625, 0.26530612244897966, 1.0, 2.3644314868804637,
      3.650145772594752, 4.327988338192423], rtol=1e-5)
  np.testing.assert_allclose(bicubic(5, 8) @ x, [
      -0.09283447265625, 0.18756103515625, 1.176513671875, 2.619384765625, 6.09625244140625,
      9.00701904296875, 5.98260498046875, 2.4429931640625], rtol=1e-5)
  for small in (1, 2, 3, 5, 10, 13):
    np.testing.assert_allclose(bicubic(small, 16).sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(area(16, small).sum(1), 1, rtol=1e-6)


def test_published_scales():
  assert blend_of_scale(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
  q = MultiScaleConfig(quantizer=BOOK).build(rngs=nnx.Rngs(0))
  assert q.budgets == PUBLISHED and q.grid == (680,) and len(q.blends) == 4
  assert (q.vocab, q.order) == ((16,), 'scale')


def test_one_scale_is_a_quantizer_and_a_convolution():
  """s / (S - 1) is 0 / 0 there: the first tick is taken."""
  assert blend_of_scale(1, 4) == blend_of_scale(1, 1) == (0,)
  q = build(scales=(4,))
  z = jax.random.normal(jax.random.key(1), (2, 16, 3))
  out = jax.jit(lambda z: q(z, train=True))(z)
  np.testing.assert_array_equal(out.tokens, q.coder(z).tokens)
  assert (q.budgets, len(q.blends)) == ((16,), 1)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


@functools.cache
def output():
  q = build(dropout=0.5)
  z = jax.random.normal(jax.random.key(1), (24, 16, 3))
  return q, z, jax.jit(lambda z: q(z, key=jax.random.key(2), train=True))(z)


def convolve(x, kernel, bias):
  """3x3, zero padding, from the definition."""
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  side = x.shape[1]
  return bias + sum(padded[:, i:i + side, j:j + side] @ kernel[i, j]
                    for i in range(3) for j in range(3))


def pyramid(q, z):
  """(tokens, sums after each scale) in NumPy: VAR, algorithm 1."""
  e, side = np.asarray(q.coder.codes(), np.float64), q.scales[-1]
  z = np.asarray(z, np.float64).reshape(-1, side, side, z.shape[-1])
  total, tokens, sums = np.zeros_like(z), [], []
  for i, p in enumerate(q.scales):
    down, up = np.eye(side), np.eye(side)
    if p < side:
      down, up = area(side, p).astype(float), bicubic(p, side).astype(float)
    seen = np.einsum('yh,xw,bhwc->byxc', down, down, z - total)
    t = np.argmin(np.square(seen[..., None, :] - e).sum(-1), -1)
    h = np.einsum('yh,xw,bhwc->byxc', up, up, e[t])
    conv = q.blends[q.chosen[i]]
    total = total + 0.5 * h + 0.5 * convolve(
        h, np.asarray(conv.kernel[...], np.float64), np.asarray(conv.bias[...], np.float64))
    tokens.append(t.reshape(len(t), -1))
    sums.append(total.reshape(len(t), -1, z.shape[-1]))
  return np.concatenate(tokens, 1), sums


def test_the_pyramid_is_that_of_the_paper():
  q, z, out = output()
  tokens, sums = pyramid(q, z)
  np.testing.assert_array_equal(out.tokens[..., 0], tokens)
  errors = np.stack([np.abs(s - out.vectors).max((1, 2)) for s in sums])
  keep = 1 + errors.argmin(0)
  np.testing.assert_allclose(errors.min(0), 0, atol=1e-5)
  assert set(keep) == {1, 2, 3} and np.mean(keep == 3) > 0.5  # half of the examples are cut
  loss = sum(np.square(s - np.asarray(z))[keep > i].sum() for i, s in enumerate(sums)) / z.size / 3
  np.testing.assert_allclose(out.losses['commitment'], loss, rtol=1e-5)
  np.testing.assert_allclose(out.losses['codebook'], loss, rtol=1e-5)
  starts, kept = [0, *q.budgets], np.zeros(16)
  for i in range(3):
    kept += np.bincount(tokens[keep > i, starts[i]:starts[i + 1]].ravel(), minlength=16)
  np.testing.assert_array_equal(out.statistics['coder'].count, kept)
  np.testing.assert_allclose(out.metrics['usage'], np.unique(tokens).size / 16)
  np.testing.assert_allclose(
      out.metrics['relative_commitment_1'],
      np.square(sums[1] - np.asarray(z)).mean() / np.square(z).mean(), rtol=1e-5)


def test_the_codebook_term_trains_codes_and_convolutions_the_other_the_encoder():
  q = build(quantizer=dataclasses.replace(BOOK, update='gradient'), scales=(1, 4))
  z = jax.random.normal(jax.random.key(5), (4, 16, 3))
  structure, params, rest = nnx.split(q, nnx.Param, ...)

  @jax.jit
  def gradients(params, z):
    return {name: jax.grad(lambda p, z, name=name: nnx.merge(structure, p, rest)(z).losses[name],
                           (0, 1))(params, z) for name in ('commitment', 'codebook')}

  found = {name: jax.tree.map(lambda x: bool(np.any(x)), g)
           for name, g in gradients(params, z).items()}
  assert not any(jax.tree.leaves(found['commitment'][0])) and found['commitment'][1]
  assert all(jax.tree.leaves(found['codebook'][0])) and not found['codebook'][1]


def test_prefixes_are_whole_scales():
  q, z, out = output()
  tokens = np.asarray(out.tokens)
  sums = pyramid(q, z)[1]
  look = jax.jit(lambda t, keep: q.lookup(t, jnp.arange(21)[None, :, None] < keep[:, None, None]))
  for n, want in ((1, sums[0]), (4, sums[0]), (5, sums[1]), (20, sums[1]), (21, sums[2])):
    got = look(tokens, np.full(24, n))
    np.testing.assert_allclose(got, want, atol=1e-5)
    whole = max(b for b in q.budgets if b <= n)
    other = np.where(np.arange(21)[:, None] < whole, tokens, (tokens + 5) % 16)
    np.testing.assert_array_equal(look(other, np.full(24, n)), got)


def test_preparation_takes_vectors_and_residuals():
  @jax.jit
  def prepare(z):
    q = build(quantizer=VQConfig(codes=64, dim=3, revival=0), scales=(1, 4))
    before = q(z).metrics['relative_commitment']
    q.prepare(z, key=jax.random.key(3))
    return before, q(z).metrics

  before, after = prepare(5 * jax.random.normal(jax.random.key(4), (16, 16, 3)))
  assert after['usage'] > 0.9 and after['relative_commitment'] < 0.7 * before


@pytest.mark.parametrize('fields,message', [
    (dict(scales=(2, 1)), 'positive and increase'),
    (dict(blends=0), 'must be 1 or more'),
    (dict(dropout=2.0), 'fraction of the examples'),
    (dict(quantizer=GumbelConfig(codes=16, dim=3)), 'learns from the image alone'),
    (dict(quantizer=ProjectedConfig(quantizer=BOOK, dim=4)), 'put a projection outside'),
    (dict(quantizer=ResidualConfig(quantizer=BOOK)), 'two orders')])
def test_what_cannot_be_scaled_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    build(**fields)


def test_other_grids_are_refused():
  with pytest.raises(ValueError, match='25 vectors are not the 4 x 4'):
    build()(jnp.zeros((1, 25, 3)))
  inside = ProjectedConfig(dim=8, quantizer=MultiScaleConfig(quantizer=BOOK, scales=(1, 2, 4)))
  with pytest.raises(ValueError, match='these lie on 2 x 8'):  # 16 vectors, but no square
    AutoencoderConfig(image_size=(4, 16), multipliers=(1, 2), width=8, quantizer=inside).build(
        rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='these lie on 16;'):
    RegisterTokenizerConfig(image_size=(8, 8), patch=4, registers=16, quantizer=inside).build(
        rngs=nnx.Rngs(0))


def test_dead_codes_move_to_vectors_of_the_finest_scale():
  q = build(quantizer=VQConfig(codes=64, dim=3), scales=(1, 4))
  z = 5 + jax.random.normal(jax.random.key(1), (8, 16, 3))
  out = jax.jit(lambda z: q(z, key=jax.random.key(2), train=True))(z)
  counted, spare = out.statistics['coder'].count, out.statistics['coder'].spare
  assert jnp.sum(counted) == 8 * 17 and spare.shape == (64, 3)
  apart = jnp.min(jnp.linalg.norm(spare[:, None] - jnp.mean(z, 1), axis=-1), 1)  # of scale 1
  assert jnp.median(apart) > 0.3
