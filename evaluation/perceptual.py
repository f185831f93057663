"""LPIPS between images and reconstructions, from the files of a published trunk and its heads.

The trunks are torchvision's, the heads those of richzhang/PerceptualSimilarity, version 0.1; smalti
comes with neither. With the published files the number is called `lpips_vgg`, `lpips_alex` or
`lpips_squeeze`; with any others `perceptual_<net>_<hash>`, which compares with itself only.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from smalti.evaluation import conversion, weights
from smalti.networks.perceptual import CHANNELS, Net, Perceptual
from smalti.networks.pixels import to_float

TRUNK, HEADS = 'SMALTI_LPIPS_TRUNK', 'SMALTI_LPIPS_HEADS'
Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8, checked below

# torchvision's files say the first 8 digits of their SHA-256 in their names.
TRUNKS: dict[Net, tuple[str, ...]] = {
    'vgg': ('vgg16-397923af.pth',),
    'alex': ('alexnet-owt-7be5be79.pth', 'alexnet-owt-4df8aa71.pth'),
    'squeeze': ('squeezenet1_1-b8a52dc0.pth', 'squeezenet1_1-f364aa15.pth'),
}
# SHA-256 of the numbers of the heads, little-endian float32, one tap after the other.
PUBLISHED_HEADS: dict[Net, str] = {
    'vgg': '9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78',
    'alex': '718a8b40b0d22f96192d34ab93c0db5c7943558ff6c2407f44812dce2f29b5f4',
    'squeeze': '68f1b1752260e0335c6394983132e210e3ed5c2540e78d239be07671a77130e4',
}


@dataclasses.dataclass(frozen=True, eq=False)
class PerceptualDistance:
  """Distances of pairs of uint8 images, in batches of one size; grey is repeated over the colours.

  Attributes:
    name: what the mean may be called.
    sha256: of the hashes of trunk and heads.
    state: parameters of the network; on one device, or wherever they were put.
    batch: pairs per program run.
  """
  name: str
  sha256: str
  graph: Any
  state: Any
  batch: int = 16
  resize = 'none'

  def __call__(self, images: Images, reconstructions: Images) -> Float[np.ndarray, 'b']:
    """One distance per pair, as float64."""
    for array in (images, reconstructions):
      if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        raise ValueError(f'Images of {array.dtype}{list(array.shape)} must be uint8[B, H, W, 3 or '
                         '1]; round floats with networks.pixels.to_uint8.')
    if images.shape != reconstructions.shape:
      raise ValueError(f'Images {images.shape} and reconstructions {reconstructions.shape} differ.')
    if not len(images):
      raise ValueError('No images to compare; give at least one.')
    parts = []
    for start in range(0, len(images), self.batch):
      pair = [x[start:start + self.batch] for x in (images, reconstructions)]
      missing = self.batch - len(pair[0])
      padded = [np.concatenate([x, np.repeat(x[-1:], missing, 0)]) for x in pair]
      found = _distances(self.graph, self.state, *padded)
      parts.append(np.asarray(found, np.float64)[:self.batch - missing])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=0)
def _distances(graph: Any, state: Any, x: Array, y: Array) -> Float[Array, 'b']:
  colour = lambda z: to_float(jnp.broadcast_to(z, (*z.shape[:3], 3)))  # noqa: E731
  return nnx.merge(graph, state)(colour(x), colour(y))


def load(net: Net, trunk: str | os.PathLike | None = None, heads: str | os.PathLike | None = None,
         *, batch: int = 16) -> PerceptualDistance:
  """The distance with the weights of two files.

  Args:
    net: 'vgg', 'alex' or 'squeeze'.
    trunk: a file of torchvision's; none takes the environment's `SMALTI_LPIPS_TRUNK`.
    heads: lpips/weights/v0.1/<net>.pth, or arrays called <net>_lin0, ...; none takes the
      environment's `SMALTI_LPIPS_HEADS`.
    batch: pairs per program run.

  Raises:
    ValueError: a file was not given, or holds another network.
    FileNotFoundError: no such file.
  """
  if net not in CHANNELS:
    raise ValueError(f'{net=} must be one of {", ".join(CHANNELS)}.')
  trunk, heads = trunk or os.environ.get(TRUNK), heads or os.environ.get(HEADS)
  if not trunk or not heads:
    raise ValueError(
        f'LPIPS ({net}) needs the weights of its trunk and heads, which smalti cannot ship: get '
        f"torchvision's {TRUNKS[net][0]} and lpips/weights/v0.1/{net}.pth, and name them with "
        f'{TRUNK}=FILE and {HEADS}=FILE.')
  files = weights.read(trunk), weights.read(heads)
  try:
    graph, state, digest = restore(net, files[0].tensors, files[1].tensors)
  except ValueError as error:
    raise ValueError(f'{trunk} and {heads} make no {net} of LPIPS: {error}') from error
  sha256 = hashlib.sha256(f'{net} {files[0].sha256} {digest}'.encode()).hexdigest()
  known = any(f'-{files[0].sha256[:8]}.' in name for name in TRUNKS[net])
  name = f'lpips_{net}' if known and digest == PUBLISHED_HEADS[net] else (
      f'perceptual_{net}_{sha256[:8]}')
  return PerceptualDistance(name, sha256, graph, state, batch)


def restore(net: Net, trunk: weights.Tensors, heads: weights.Tensors) -> tuple[Any, Any, str]:
  """(graph, state) of the network with these tensors, and the hash of its heads.

  Raises:
    ValueError: a tensor is missing, of another shape, or not finite; or a head is negative.
  """
  scopes = dict(_scopes(net))
  form = f'{net}_lin{{}}' if f'{net}_lin0' in heads else 'lin{}.model.1.weight'
  digest = hashlib.sha256()

  def take(path: conversion.Path) -> tuple[str, np.ndarray]:
    if path[0] == 'heads':
      name = form.format(path[1])
      value = np.asarray(heads[name]).reshape(-1)
      if (value < 0).any():
        raise ValueError(f'{name} is negative; heads of LPIPS are not.')
      digest.update(np.ascontiguousarray(value, '<f4').tobytes())
      return name, value
    name = f'{scopes[path[2:-1]]}.{"weight" if path[-1] == "kernel" else "bias"}'
    value = np.asarray(trunk[name])
    return name, conversion.from_torch(value) if path[-1] == 'kernel' else value

  graph, state = conversion.fill(lambda: Perceptual(net, rngs=nnx.Rngs(0)), take)
  return graph, state, digest.hexdigest()


# Places of the convolutions, or of the fire modules, in torchvision's `features`, by stage.
_PLACES: dict[Net, tuple[tuple[int, ...], ...]] = {
    'vgg': ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
    'alex': ((0,), (3,), (6,), (8,), (10,)),
    'squeeze': ((0,), (3, 4), (6, 7), (9,), (10,), (11,), (12,)),
}


def _scopes(net: Net) -> Iterator[tuple[conversion.Path, str]]:
  """torchvision's names of the convolutions, by stage, place in it and part of a fire module."""
  for stage, places in enumerate(_PLACES[net]):
    for i, place in enumerate(places):
      yield (stage, i), f'features.{place}'
      for part in ('squeeze', 'expand1x1', 'expand3x3'):
        yield (stage, i, part), f'features.{place}.{part}'
