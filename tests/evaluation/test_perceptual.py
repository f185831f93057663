"""LPIPS from files: laws with the published heads, names that files earn, refusals."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from smalti.evaluation import perceptual, weights
from smalti.networks.perceptual import CHANNELS, Perceptual

PLACES = (0, 3, 6, 8, 10)  # of AlexNet's convolutions in torchvision's `features`


def trunk(seed=0):
  """AlexNet as torchvision calls it, with a classifier that is not needed."""
  random = np.random.default_rng(seed)
  shapes = ((64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3))
  tensors = {'classifier.6.weight': np.zeros((10, 3), np.float32)}
  for place, shape in zip(PLACES, shapes):
    scale = (2 / np.prod(shape[1:])) ** 0.5
    tensors[f'features.{place}.weight'] = random.normal(0, scale, shape).astype(np.float32)
    tensors[f'features.{place}.bias'] = random.normal(0, 0.1, shape[0]).astype(np.float32)
  return tensors


def heads(seed=0):
  random = np.random.default_rng(seed)
  return {f'lin{k}.model.1.weight': random.uniform(0, 1, (1, c, 1, 1)).astype(np.float32)
          for k, c in enumerate(CHANNELS['alex'])}


@pytest.fixture
def files(tmp_path):
  paths = tmp_path / 'trunk.safetensors', tmp_path / 'heads.safetensors'
  save_file(trunk(), paths[0])
  save_file(heads(), paths[1])
  return paths


def test_tensors_go_where_torchvision_has_them():
  graph, state, _ = perceptual.restore('alex', trunk(), heads())
  model = nnx.merge(graph, state)
  for stage, place in zip(model.trunk.stages, PLACES):
    want = trunk()[f'features.{place}.weight']
    np.testing.assert_array_equal(stage[0].kernel[...], want.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(stage[0].bias[...], trunk()[f'features.{place}.bias'])
  for k, head in enumerate(model.heads):
    np.testing.assert_array_equal(
        head.scale[...], heads()[f'lin{k}.model.1.weight'].reshape(-1))


@pytest.mark.parametrize('net', CHANNELS)
def test_every_convolution_has_a_name(net):
  state = nnx.state(nnx.eval_shape(lambda: Perceptual(net, rngs=nnx.Rngs(0))))
  paths = {path[2:-1] for path, _ in nnx.to_flat_state(state) if path[0] == 'trunk'}
  scopes = dict(perceptual._scopes(net))
  assert paths <= set(scopes)
  assert len({scopes[path] for path in paths}) == len(paths)
  assert ('features.12.expand3x3' in [scopes[p] for p in paths]) == (net == 'squeeze')


def test_distances_of_images(files):
  distance = perceptual.load('alex', *files, batch=2)
  random = np.random.default_rng(0)
  x = random.integers(0, 256, (5, 40, 40, 3), np.uint8)
  y = np.clip(x + random.normal(0, 20, x.shape), 0, 255).astype(np.uint8)
  z = np.clip(x + random.normal(0, 80, x.shape), 0, 255).astype(np.uint8)
  near, far = distance(x, y), distance(x, z)
  assert near.dtype == np.float64 and near.shape == (5,) and (0 < near).all()
  assert (near < far).all()
  np.testing.assert_allclose(distance(x, x), 0, atol=1e-12)  # products are fused, and round once
  np.testing.assert_allclose(distance(y, x), near, rtol=1e-5)
  np.testing.assert_array_equal(distance(x[3:4], y[3:4]), near[3:4])  # whatever the batch


def test_only_published_files_are_called_lpips(files, monkeypatch):
  distance = perceptual.load('alex', *files)
  assert distance.name == f'perceptual_alex_{distance.sha256[:8]}'
  prefix = weights.read(files[0]).sha256[:8]
  lins = [heads()[f'lin{k}.model.1.weight'] for k in range(5)]
  digest = hashlib.sha256(b''.join(lin.tobytes() for lin in lins)).hexdigest()
  monkeypatch.setitem(perceptual.TRUNKS, 'alex', (f'alexnet-owt-{prefix}.pth',))
  assert perceptual.load('alex', *files).name.startswith('perceptual_alex_')  # the heads are not
  monkeypatch.setitem(perceptual.PUBLISHED_HEADS, 'alex', digest)
  assert perceptual.load('alex', *files).name == 'lpips_alex'
  save_file(trunk(seed=1), files[0])
  other = perceptual.load('alex', *files)
  assert other.name.startswith('perceptual_alex_') and other.sha256 != distance.sha256


def test_refusals(files, monkeypatch, tmp_path):
  for name in (perceptual.TRUNK, perceptual.HEADS):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(ValueError, match='SMALTI_LPIPS_TRUNK=FILE') as error:
    perceptual.load('vgg', heads=files[1])
  assert 'vgg16-397923af.pth' in str(error.value) and '\n' not in str(error.value)
  with pytest.raises(ValueError, match='must be one of'):
    perceptual.load('vgg19', *files)
  with pytest.raises(ValueError, match='make no vgg of LPIPS: lin1.*float32.192.'):
    perceptual.load('vgg', *files)
  with pytest.raises(ValueError, match='lin2.model.1.weight is negative'):
    perceptual.restore('alex', trunk(), heads() | {
        'lin2.model.1.weight': -heads()['lin2.model.1.weight']})
  bare = {k: v for k, v in trunk().items() if k != 'features.8.bias'}
  with pytest.raises(ValueError, match='lacks features.8.bias'):
    perceptual.restore('alex', bare, heads())
  monkeypatch.setenv(perceptual.TRUNK, str(files[0]))
  monkeypatch.setenv(perceptual.HEADS, str(files[1]))
  distance = perceptual.load('alex')
  good = np.zeros((2, 40, 40, 3), np.uint8)
  for x, y, match in ((good[..., :2], good, 'must be uint8'), (good, good / 255, 'must be uint8'),
                      (good, good[:1], 'differ'), (good[:0], good[:0], 'at least one'),
                      (good[:, :20], good[:, :20], 'too small')):
    with pytest.raises(ValueError, match=match):
      distance(x, y)


@pytest.mark.needs_data
@pytest.mark.parametrize('net', CHANNELS)
def test_the_published_heads(net):
  """Their hash, non-negative weights, and the example images of the paper's code."""
  folder = Path(os.environ['SMALTI_DATA_DIR']) / 'weights'
  found = weights.read(folder / 'lpips-v0.1-lin.npz').tensors
  pth = weights.read(folder / f'lpips-v0.1-{net}-lin.pth').tensors
  lins = [found[f'{net}_lin{k}'] for k in range(len(CHANNELS[net]))]
  assert [lin.shape for lin in lins] == [(c,) for c in CHANNELS[net]]
  digest = hashlib.sha256(b''.join(lin.tobytes() for lin in lins)).hexdigest()
  assert digest == perceptual.PUBLISHED_HEADS[net]
  for lin in lins:
    assert (lin >= 0).all() and lin.max() > 0
  if net != 'alex':
    return
  for tensors in (found, pth):
    graph, state, restored = perceptual.restore(net, trunk(), tensors)
    assert restored == digest
  distance = perceptual.PerceptualDistance('perceptual_alex', '0' * 64, graph, state, batch=2)
  ref, p0, p1 = (np.asarray(Image.open(folder / f'lpips-ex_{name}.png').convert('RGB'))[None]
                 for name in ('ref', 'p0', 'p1'))
  assert distance(ref, ref) < 1e-12
  assert 0 < distance(p0, ref) and 0 < distance(ref, p1)  # with a random trunk in no order
  np.testing.assert_allclose(distance(p0, ref), distance(ref, p0), rtol=1e-5)
