"""DINOv2 from files of its weights, against transformers 5.24 with the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from smalti.evaluation import dinov2
from smalti.networks.vision import interpolate

BLOCK = {
    **{f'norm{i}.{leaf}': (64,) for i in (1, 2) for leaf in ('weight', 'bias')},
    **{f'attention.attention.{name}.{leaf}': shape for name in ('query', 'key', 'value')
       for leaf, shape in (('weight', (64, 64)), ('bias', (64,)))},
    'attention.output.dense.weight': (64, 64), 'attention.output.dense.bias': (64,),
    'layer_scale1.lambda1': (64,), 'layer_scale2.lambda1': (64,),
    'mlp.fc1.weight': (256, 64), 'mlp.fc1.bias': (256,),
    'mlp.fc2.weight': (64, 256), 'mlp.fc2.bias': (64,)}
# What Dinov2Model and Dinov2WithRegistersModel say of patches 0, 700 and 1368, first four values.
GOLDEN = {
    0: [[-.46771, -1.24518, -2.01035, 1.09529], [1.04984, -.97203, -1.31381, .49681],
        [.75061, -1.13929, -.95323, -.80223]],
    4: [[-.46917, -1.20325, -1.97089, 1.10848], [1.04984, -.97203, -1.31381, .49681],
        [.75061, -1.13929, -.95323, -.80223]]}


@functools.cache
def tensors(registers):
  """Random weights of two blocks of one head, as `transformers` names them."""
  rng, order = np.random.default_rng(0), [
      'norm1.weight', 'norm1.bias', 'norm2.weight', 'norm2.bias', *list(BLOCK)[4:]]
  shapes = {
      'embeddings.cls_token': (1, 1, 64), 'embeddings.position_embeddings': (1, 1370, 64),
      'embeddings.patch_embeddings.projection.weight': (64, 3, 14, 14),
      'embeddings.patch_embeddings.projection.bias': (64,),
      'layernorm.weight': (64,), 'layernorm.bias': (64,),
      **{f'encoder.layer.{i}.{name}': BLOCK[name] for i in range(2) for name in order}}
  if registers:
    shapes['embeddings.register_tokens'] = (1, registers, 64)
  out = {}
  for name, shape in shapes.items():
    std = 4 if 'token' in name or 'position' in name else (
        1 if 'query' in name or 'key' in name else 0.2)
    mean = name.endswith(('lambda1', 'norm.weight', 'norm1.weight', 'norm2.weight'))
    out[name] = (std * rng.normal(size=shape) + mean).astype(np.float32)
  return out


def original(registers):
  """The same weights as facebookresearch/dinov2 names them."""
  renamed, kept = {
      'embeddings.cls_token': 'cls_token', 'embeddings.position_embeddings': 'pos_embed',
      'embeddings.register_tokens': 'register_tokens', 'layernorm': 'norm',
      'embeddings.patch_embeddings.projection': 'patch_embed.proj', 'encoder.layer': 'blocks',
      'attention.output.dense': 'attn.proj', 'layer_scale1.lambda1': 'ls1.gamma',
      'layer_scale2.lambda1': 'ls2.gamma'}, dict(tensors(registers))
  for i in range(2):
    for leaf in ('weight', 'bias'):
      kept[f'blocks.{i}.attn.qkv.{leaf}'] = np.concatenate([
          kept.pop(f'encoder.layer.{i}.attention.attention.{name}.{leaf}')
          for name in ('query', 'key', 'value')])
  for old, new in renamed.items():
    kept = {name.replace(old, new): value for name, value in kept.items()}
  return kept


def images():
  i = np.arange(518)
  return np.stack([np.sin(i[:, None] / 9 + i / 23), np.cos(i[:, None] / 17 - i / 5),
                   np.sin(i[:, None] * i / 4000)], -1)[None].astype(np.float32)


features = jax.jit(lambda model, x: model(x, (37, 37)))


@pytest.mark.parametrize('registers,named', [(0, tensors), (4, tensors), (0, original),
                                             (4, original)])
def test_features_are_those_of_the_published_code(tmp_path, registers, named):
  save_file(named(registers), tmp_path / 'model.safetensors')
  name, model = dinov2.load(tmp_path / 'model.safetensors')
  assert name.startswith('dinov2_64_')
  found = features(model, images())
  assert found.shape == (1, 37 * 37, 64) and found.dtype == jnp.float32
  np.testing.assert_allclose(found[0, jnp.array([0, 700, 1368]), :4], GOLDEN[registers], atol=2e-5)


def test_images_of_any_size_become_the_grid_that_is_asked_for():
  """A picture of one colour has it at every size; a grid of patches is row-major."""
  model = dinov2.restore(tensors(0))
  at = jax.jit(lambda x: model(x, (2, 3)))
  flat = at(jnp.full((1, 40, 30, 1), 0.3))
  np.testing.assert_allclose(flat, at(jnp.full((1, 28, 42, 3), 0.3)), atol=1e-4)
  corner = jnp.full((1, 28, 42, 3), 0.3).at[:, 14:, :14].set(-1)  # the patch in row 1, column 0
  moved = np.abs(at(corner) - flat).max(-1)[0]
  assert moved.argmax() == 3


def test_places_are_interpolated_as_timm_does():
  """Bicubic with a = -1/2 and smoothing: torch's interpolate(antialias=True), arXiv 2410.06940."""
  table = np.sin(np.arange(37)[:, None] / 3 + np.arange(37) ** 2 / 50).reshape(-1, 1)
  found = interpolate(jnp.asarray(table, jnp.float32), (37, 37), (16, 16))[:, 0]
  weights = np.zeros((16, 37))
  for i in range(16):
    t = np.abs((np.arange(37) + 0.5) / (37 / 16) - (i + 0.5))
    w = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1,
                 np.where(t < 2, -.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
    weights[i] = w / w.sum()
  np.testing.assert_allclose(
      found, (weights @ table.reshape(37, 37) @ weights.T).reshape(-1), atol=1e-5)


@pytest.mark.parametrize('change,message', [
    (lambda t: t.pop('encoder.layer.1.mlp.fc1.bias'), 'lacks encoder.layer.1.mlp.fc1.bias'),
    (lambda t: t.pop('embeddings.position_embeddings'), 'lacks embeddings.position_embeddings'),
    (lambda t: t.update({'layernorm.bias': np.full(64, np.nan, np.float32)}), 'not finite'),
    (lambda t: t.update({'embeddings.position_embeddings': np.zeros((1, 257, 64), np.float32)}),
     'another network'),
    (lambda t: t.clear() or t.update(x=np.zeros(3, np.float32)), 'lacks pos_embed')])
def test_other_files_are_refused(tmp_path, change, message):
  found = dict(tensors(0))
  change(found)
  save_file(found, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match=f'is no DINOv2: .*{message}'):
    dinov2.load(tmp_path / 'model.safetensors')


def test_without_a_file_the_message_says_which(monkeypatch):
  monkeypatch.delenv(dinov2.FILE, raising=False)
  with pytest.raises(ValueError, match='SMALTI_DINOV2=FILE'):
    dinov2.load()
