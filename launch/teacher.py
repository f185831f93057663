"""The frozen network that a decoder's features are aligned with, as its config names it."""

from typing import Any

from smalti.evaluation import dinov2
from smalti.launch import extractors
from smalti.launch.progress import say
from smalti.networks.teacher import ClassifierPatches
from smalti.tokenizers.alignment import FEATURES


def load(config: Any) -> Any:
  """(images, grid) -> float[B, n, features], a module; None where none is asked for.

  Raises:
    ValueError: its weights were not given, or are of another network or for other images.
    FileNotFoundError: no such file.
  """
  options = getattr(config, 'alignment', None)
  if options is None:
    return None
  network: Any
  if options.teacher.startswith('dinov2'):
    try:
      name, network = dinov2.load(dtype=config.dtype)
    except ValueError as error:
      raise ValueError(f'{error} Or set model.alignment=none.') from error
    if network.width != FEATURES[options.teacher]:
      raise ValueError(f'{dinov2.FILE} names a DINOv2 of width {network.width}, and '
                       f'alignment.teacher={options.teacher} has {FEATURES[options.teacher]}.')
  else:
    shape = *config.image_size, config.channels
    if extractors.default_for(shape) != options.teacher:
      raise ValueError(f'alignment.teacher={options.teacher} does not see images of {shape} '
                       '(height, width, channels); set model.alignment=none.')
    packaged: Any = extractors.load(options.teacher)
    name, network = f'{packaged.name}_{packaged.sha256[:8]}', ClassifierPatches(packaged.model)
  say(f'alignment: {name}')
  return network
