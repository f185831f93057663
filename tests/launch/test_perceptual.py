"""Which frozen network a perceptual loss gets: the policy, its names and its refusals."""

import pytest

from smalti.evaluation import perceptual as weights
from smalti.launch import extractors, perceptual
from smalti.tokenizers.autoencoder import AutoencoderConfig

PROXY = 'perceptual_cifar10net_433e2195'


@pytest.fixture(autouse=True)
def unnamed(monkeypatch):
  for name in (weights.TRUNK, weights.HEADS):
    monkeypatch.delenv(name, raising=False)


def config(policy, size=(32, 32), channels=3):
  return AutoencoderConfig(perceptual=policy, image_size=size, channels=channels)


@pytest.mark.parametrize('policy', ['auto', 'proxy'])
def test_the_proxy_is_named_after_its_network_and_hash(policy, capsys):
  judge = perceptual.load(config(policy, (40, 48)))
  assert judge.name == PROXY and judge.channels == 3
  said = capsys.readouterr()
  assert (said.out + said.err).strip() == f'perceptual: {PROXY}, a proxy: no LPIPS'


def test_where_no_network_sees_the_images_auto_is_none_with_a_line_and_proxy_an_error(capsys):
  assert perceptual.load(config('none')) is None
  assert perceptual.load(object()) is None  # a generator's config
  said = capsys.readouterr()
  assert not said.out + said.err
  for size, channels in (((16, 16), 3), ((32, 32), 1)):
    assert perceptual.load(config('auto', size, channels)) is None
    said = capsys.readouterr()
    assert (said.out + said.err).startswith('perceptual: none: no network trained here')
    with pytest.raises(ValueError, match='No network trained here sees .*set model.perceptual=no'):
      perceptual.load(config('proxy', size, channels))
  with pytest.raises(ValueError, match='sides are multiples of 8'):
    perceptual.load(config('proxy', (36, 32)))


def test_lpips_demands_its_weights_in_one_line(monkeypatch):
  with pytest.raises(ValueError, match='LPIPS .vgg. needs the weights') as error:
    perceptual.load(config('lpips'))
  assert '\n' not in str(error.value)
  with pytest.raises(ValueError, match='LPIPS sees images from 32 pixels'):
    perceptual.load(config('lpips', (16, 16)))
  for name in (weights.TRUNK, weights.HEADS):
    monkeypatch.setenv(name, '/nowhere/weights.pth')
  for policy in ('lpips', 'auto'):  # files that were named and are not there are no reason for less
    with pytest.raises(FileNotFoundError):
      perceptual.load(config(policy))


def test_only_published_weights_are_called_lpips(monkeypatch):
  import flax.nnx as nnx

  from smalti.networks.perceptual import Perceptual
  graph, state = nnx.split(nnx.eval_shape(lambda: Perceptual('alex', rngs=nnx.Rngs(0))))
  for found, want in (('lpips_vgg', 'lpips'), ('perceptual_vgg_01234567',) * 2):
    distance = weights.PerceptualDistance(found, '', graph, state)
    monkeypatch.setattr(weights, 'load', lambda net, distance=distance: distance)
    assert perceptual.load(config('lpips')).name == want


def test_without_the_packaged_files_there_is_no_proxy(monkeypatch, tmp_path):
  monkeypatch.setattr(extractors, 'FOLDER', tmp_path)
  assert perceptual.load(config('auto')) is None
