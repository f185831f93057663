"""The Inception extractor: names of three libraries, exact conversion, batches, refusals."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from smalti.evaluation import features, inception, resize, weights
from smalti.networks.inception import Inception


@functools.cache
def leaves():
  state = nnx.state(nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0))))
  return nnx.to_flat_state(state)


@pytest.fixture(scope='module')
def graph_tensors():
  """Random tensors under the graph's names, of sizes that keep activations finite."""
  random = np.random.default_rng(0)
  tensors = {}
  for path, leaf in leaves():
    name, shape = inception.names(path)['tensorflow'], leaf.shape
    if len(shape) > 1:
      scale = (2 / np.prod(shape[:-1])) ** 0.5
      tensors[name] = random.standard_normal(shape, np.float32) * np.float32(scale)
    else:
      tensors[name] = random.uniform(0.8, 1.2, shape).astype(np.float32)
  return tensors


@pytest.fixture(scope='module')
def file(graph_tensors, tmp_path_factory):
  path = tmp_path_factory.mktemp('inception') / 'graph.safetensors'
  save_file(graph_tensors, path)
  return path


def test_names_are_those_of_the_published_files():
  """From torch-fidelity's util_convert_inception_weights.py, and of NVIDIA's TorchScript file."""
  names = [inception.names(path) for path, _ in leaves()]
  found = {name['tensorflow']: (name['torch'], name['torchscript']) for name in names}
  for scope, torch, script in (
      ('conv', 'Conv2d_1a_3x3', 'conv'),
      ('conv_4', 'Conv2d_4a_3x3', 'conv_4'),
      ('mixed/conv', 'Mixed_5b.branch1x1', 'mixed.conv'),
      ('mixed/tower/conv_1', 'Mixed_5b.branch5x5_2', 'mixed.tower.conv_1'),
      ('mixed_2/tower_1/conv_2', 'Mixed_5d.branch3x3dbl_3', 'mixed_2.tower_1.conv_2'),
      ('mixed_3/conv', 'Mixed_6a.branch3x3', 'mixed_3.conv'),
      ('mixed_3/tower/conv_2', 'Mixed_6a.branch3x3dbl_3', 'mixed_3.tower.conv_2'),
      ('mixed_5/tower_1/conv_3', 'Mixed_6c.branch7x7dbl_4', 'mixed_5.tower_1.conv_3'),
      ('mixed_6/conv', 'Mixed_6d.branch1x1', 'mixed_6.conv'),
      ('mixed_7/tower_2/conv', 'Mixed_6e.branch_pool', 'mixed_7.tower_2.conv'),
      ('mixed_8/tower/conv_1', 'Mixed_7a.branch3x3_2', 'mixed_8.tower.conv_1'),
      ('mixed_8/tower_1/conv', 'Mixed_7a.branch7x7x3_1', 'mixed_8.tower_1.conv'),
      ('mixed_9/tower/conv', 'Mixed_7b.branch3x3_1', 'mixed_9.tower_conv'),
      ('mixed_9/tower/mixed/conv', 'Mixed_7b.branch3x3_2a', 'mixed_9.tower_mixed_conv'),
      ('mixed_10/tower_1/conv_1', 'Mixed_7c.branch3x3dbl_2', 'mixed_10.tower_1_conv_1'),
      ('mixed_10/tower_1/mixed/conv_1', 'Mixed_7c.branch3x3dbl_3b',
       'mixed_10.tower_1_mixed_conv_1')):
    for graph_leaf, torch_leaf, script_leaf in (
        ('conv2d_params', 'conv.weight', 'weight'), ('batchnorm/beta', 'bn.bias', 'beta'),
        ('batchnorm/moving_mean', 'bn.running_mean', 'mean'),
        ('batchnorm/moving_variance', 'bn.running_var', 'var')):
      assert found[f'{scope}/{graph_leaf}'] == (f'{torch}.{torch_leaf}',
                                                f'layers.{script}.{script_leaf}')
    assert found[f'{scope}/batchnorm/gamma'][0] == f'{torch}.bn.weight'
  assert found['softmax/weights'] == ('fc.weight', 'output.weight')
  assert found['softmax/biases'] == ('fc.bias', 'output.bias')
  for column in zip(*(name.values() for name in names)):
    assert len(set(column)) == 94 * 5 + 2


def test_conversion_is_exact_both_ways(graph_tensors):
  _, state = inception.restore(graph_tensors)
  torch = inception.export(state, 'torch')
  np.testing.assert_array_equal(torch['Mixed_6c.branch7x7_2.conv.weight'][5, 6, 0, 3],
                                graph_tensors['mixed_5/tower/conv_1/conv2d_params'][0, 3, 6, 5])
  assert torch['Mixed_6c.branch7x7_2.conv.weight'].shape == (160, 160, 1, 7)
  np.testing.assert_array_equal(torch['fc.weight'], graph_tensors['softmax/weights'].T)
  script = inception.export(inception.restore(torch)[1], 'torchscript')
  back = inception.export(inception.restore(script)[1], 'tensorflow')
  assert back.keys() == graph_tensors.keys()
  for name, value in graph_tensors.items():
    np.testing.assert_array_equal(back[name], value)
  bare = {name: value for name, value in script.items() if not name.endswith('.gamma')}
  scale = inception.export(inception.restore(bare)[1], 'torch')['Mixed_7c.branch_pool.bn.weight']
  np.testing.assert_array_equal(scale, np.ones(192))


def test_rows_do_not_depend_on_their_batch(file, monkeypatch):
  monkeypatch.setenv(inception.VARIABLE, str(file))
  extractor = inception.load(resize='none', batch=2)
  images = np.random.default_rng(0).integers(0, 256, (5, 75, 80, 3), np.uint8)
  found = extractor(images)
  assert {k: v.shape for k, v in found.items()} == {
      'features': (5, 2048), 'logits': (5, 1008), 'spatial': (5, 3 * 3 * 7)}
  assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in found.values())
  again = extractor(images[3:4])
  for name, value in found.items():
    np.testing.assert_array_equal(again[name][0], value[3])
  assert features.identity(extractor) == f'inception:{weights.read(file).sha256}:none'
  assert not inception.published(extractor.sha256)
  assert isinstance(extractor, features.Extractor)


def test_levels_are_scaled_as_each_mode_does():
  images = np.random.default_rng(0).integers(0, 256, (1, 20, 20, 3), np.uint8)
  x = images.astype(np.float32)
  np.testing.assert_allclose(inception.prepare(images, 'none'), (x - 128) / 128)
  np.testing.assert_allclose(
      inception.prepare(images, 'tf1'), (resize.tf1(x, 299) - 128) / 128, atol=1e-6)
  np.testing.assert_allclose(
      inception.prepare(images, 'legacy_pytorch'), 2 * resize.legacy_pytorch(x / 255, 299) - 1,
      atol=1e-6)
  grey = inception.prepare(images[..., :1], 'tf1')
  np.testing.assert_array_equal(
      grey, inception.prepare(np.repeat(images[..., :1], 3, -1), 'tf1'))
  extremes = inception.prepare(np.uint8([0, 255]).reshape(1, 1, 2, 1), 'none')
  assert (extremes.min(), extremes.max()) == (-1, 0.9921875)


def test_refusals_say_what_to_get(file, graph_tensors, monkeypatch, tmp_path):
  monkeypatch.delenv(inception.VARIABLE, raising=False)
  with pytest.raises(ValueError, match='--inception_weights=FILE') as error:
    inception.load()
  assert '\n' not in str(error.value)
  for name in (*inception.PUBLISHED.values(), inception.VARIABLE):
    assert name in str(error.value)
  with pytest.raises(ValueError, match="resize='bicubic' must be one of tf1, clean"):
    inception.load(file, resize='bicubic')
  with pytest.raises(FileNotFoundError):
    inception.load(tmp_path / 'absent.pth')
  path = tmp_path / 'other.npz'
  np.savez(path, **{'features.0.weight': np.zeros(3)})
  with pytest.raises(ValueError, match='no Inception network of FID: it has none of'):
    inception.load(path)

  def refused(match, **changes):
    tensors = {**graph_tensors, **changes}
    with pytest.raises(ValueError, match=match):
      inception.restore({k: v for k, v in tensors.items() if v is not None})

  refused(r'softmax/weights.* is float32\[2048, 1000\]',  # torchvision's
          **{'softmax/weights': np.zeros((2048, 1000), np.float32)})
  refused('lacks mixed_7/conv/batchnorm/gamma', **{'mixed_7/conv/batchnorm/gamma': None})
  refused('is not finite', **{'conv/batchnorm/beta': np.full(32, np.inf, np.float32)})


def test_images_of_other_forms_are_refused(unchecked):
  extractor = inception.InceptionExtractor('0' * 64, 'none', None, None)
  for shape, dtype, match in (((2, 80, 80, 3), np.float32, 'must be uint8'),
                              ((2, 80, 80, 4), np.uint8, 'must be uint8'),
                              ((80, 80, 3), np.uint8, 'must be uint8'),
                              ((2, 74, 80, 3), np.uint8, 'too small'),
                              ((0, 80, 80, 3), np.uint8, 'at least one')):
    with pytest.raises(ValueError, match=match):
      extractor(np.zeros(shape, dtype))


def test_the_three_hashes_agree_with_what_is_known_of_them():
  """torch's file says 8 digits in its name."""
  for sha256, name in inception.PUBLISHED.items():
    assert len(sha256) == 64 and inception.published(sha256)
    if name.startswith('pt_'):
      assert name.endswith(f'-{sha256[:8]}.pth')


@pytest.mark.slow
def test_files_of_two_libraries_are_one_extractor(file, graph_tensors, tmp_path):
  """At 299 pixels, in every mode; and over eight devices as on one."""
  path = tmp_path / 'torch.npz'
  np.savez(path, **inception.export(inception.restore(graph_tensors)[1], 'torch'))
  images = np.random.default_rng(0).integers(0, 256, (8, 32, 40, 3), np.uint8)
  of_graph, of_torch = (inception.load(p, batch=4) for p in (file, path))
  want = of_graph(images)
  assert {k: v.shape for k, v in want.items()} == {
      'features': (8, 2048), 'logits': (8, 1008), 'spatial': (8, 2023)}
  for name, value in of_torch(images).items():
    np.testing.assert_array_equal(value, want[name])
  for mode in ('clean', 'legacy_pytorch'):
    found = inception.load(file, resize=mode, batch=4)(images)['features']
    error = np.abs(found - want['features']).mean() / np.abs(want['features']).mean()
    assert 1e-4 < error < 0.5  # another resize, the same network
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put(images, jax.NamedSharding(mesh, jax.P('data')))
  for name, value in of_graph(spread).items():
    np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.needs_data
def test_the_golden_pair():
  """With the published weights: features of a photograph, fed unresized as 2 x / 255 - 1."""
  path = os.environ.get(inception.VARIABLE)
  if not path:
    pytest.skip(f'{inception.VARIABLE} names no file of Inception weights')
  folder = Path(os.environ['SMALTI_DATA_DIR']) / 'weights'
  image = np.asarray(Image.open(folder / 'fid-inception-golden-image.jpg').convert('RGB'))
  want = np.load(folder / 'fid-inception-golden-output.npy', allow_pickle=False).reshape(-1)
  found = weights.read(path)
  assert inception.published(found.sha256)
  x = 2 * jnp.asarray(image[None], jnp.float32) / 255 - 1
  graph, state = inception.restore(found.tensors)
  got = jax.jit(lambda s, x: nnx.merge(graph, s)(x).features)(state, x)[0]
  assert np.abs(got - want).mean() < 1e-5
