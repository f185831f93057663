"""The frozen network of a perceptual loss, by the policy of a tokenizer's config.

  lpips   VGG16 and heads as published, from the files that SMALTI_LPIPS_TRUNK and
          SMALTI_LPIPS_HEADS name; the metric is `lpips`
  proxy   the classifier trained here for images of this kind (docs/results/extractors); the metric
          is called after it and its hash, such as `perceptual_cifar10net_433e2195`
  auto    lpips where both files are named, else the proxy where there is one, else none
  none    no such loss

Random weights are none of these.
"""

import os
from typing import Any

from flax import nnx

from smalti.evaluation import perceptual
from smalti.launch import extractors
from smalti.launch.progress import say
from smalti.networks.perceptual import SMALLEST, ClassifierTaps, Judge


def load(config: Any) -> Judge | None:
  """The judge that the config of a model asks for; None where it asks for none.

  Raises:
    ValueError: what it asks for cannot be had; one line says what is missing.
    FileNotFoundError: no such file.
  """
  policy = getattr(config, 'perceptual', 'none')
  if policy == 'none':
    return None
  shape = *config.image_size, config.channels
  if policy == 'lpips':
    return _lpips(shape)
  named = all(os.environ.get(name) for name in (perceptual.TRUNK, perceptual.HEADS))
  if policy == 'auto' and named and min(shape[:2]) >= SMALLEST:
    return _lpips(shape)
  proxy = extractors.default_for(shape)
  if proxy is not None:
    return _proxy(proxy, shape)
  if policy == 'proxy':
    raise ValueError(
        f'No network trained here sees images of {shape} (height, width, channels): there is one '
        'for colours from 32 x 32 on and one for grey 28 x 28; set model.perceptual=none.')
  say(f'perceptual: none: no network trained here sees images of {shape}, and LPIPS was not named '
      f'with {perceptual.TRUNK} and {perceptual.HEADS}')
  return None


def _lpips(shape: tuple[int, ...]) -> Judge:
  if min(shape[:2]) < SMALLEST:
    raise ValueError(f'LPIPS sees images from {SMALLEST} pixels a side on, not {shape}; set '
                     'model.perceptual=proxy or none.')
  loaded = perceptual.load('vgg')
  name = 'lpips' if loaded.name.startswith('lpips') else loaded.name
  say(f'perceptual: {name}')
  return Judge(name, nnx.merge(loaded.graph, loaded.state))


def _proxy(reference: str, shape: tuple[int, ...]) -> Judge:
  network: Any = extractors.load(reference)
  name = f'perceptual_{network.name}_{network.sha256[:8]}'
  factor = network.model.patch * 2 ** (len(network.model.widths) - 1)
  if any(side % factor for side in shape[:2]):
    raise ValueError(f'{name} sees images whose sides are multiples of {factor}, not {shape}; set '
                     'model.perceptual=none.')
  say(f'perceptual: {name}, a proxy: no LPIPS')
  return Judge(name, ClassifierTaps(network.model), channels=network.model.channels)
