"""The extractor of FID: Inception-v3 with the weights of one of the three files that circulate.

  pt_inception-2015-12-05-6726825d.pth   pytorch-fid and torch-fidelity
  inception-2015-12-05.pt                TorchScript, of NVIDIA's metrics and clean-fid
  classify_image_graph_def.pb            the original TensorFlow graph, of the ADM evaluator

None comes with smalti: a user names one, by flag or by `SMALTI_INCEPTION_WEIGHTS`. Parameters are
called here as in the graph, `mixed_5/tower/conv_1/conv2d_params`; the other names are made by rule.
"""

import dataclasses
import functools
import hashlib
import os
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from smalti.evaluation import conversion, resize as resizing, weights
from smalti.evaluation.features import Given, Outputs
from smalti.evaluation.manifest import INCEPTION
from smalti.networks.inception import FEATURES, SIDE, SMALLEST, Inception

VARIABLE = 'SMALTI_INCEPTION_WEIGHTS'
# Another file may hold the same network, but nothing here says so.
PUBLISHED = dict(zip(INCEPTION, (
    'pt_inception-2015-12-05-6726825d.pth', 'inception-2015-12-05.pt',
    'classify_image_graph_def.pb')))
Convention = Literal['tensorflow', 'torch', 'torchscript']


@dataclasses.dataclass(frozen=True, eq=False)
class InceptionExtractor:
  """uint8 images of any size to 'features' [B, 2048], 'logits' [B, 1008], 'spatial' [B, 2023].

  Arrays of numpy go through in batches of one size, padded, so that one program serves every count
  and a row does not depend on what came with it. An array of jax goes through whole, wherever it
  is: the weights, an argument of the program, follow it. Grey images are repeated over the colours.

  Attributes:
    sha256: of the weight file.
    resize: one of `evaluation.resize.MODES`; `legacy_pytorch` also scales levels to 2 x / 255 - 1,
      as pytorch-fid does, and not to (x - 128) / 128.
    state: parameters and statistics of the network; on one device, or wherever they were put.
    batch: images per program run.
  """
  sha256: str
  resize: str
  graph: Any
  state: Any
  batch: int = 32
  name = 'inception'
  dim = FEATURES

  def __call__(self, images: Given) -> Outputs:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
      raise ValueError(f'Images of {images.dtype}{list(images.shape)} must be uint8[B, H, W, 3 or '
                       '1]; round floats with networks.pixels.to_uint8.')
    if self.resize == 'none' and min(images.shape[1:3]) < SMALLEST:
      raise ValueError(f'Images of {images.shape[1]} x {images.shape[2]} are too small for '
                       f'Inception unresized; {SMALLEST} pixels a side is the least.')
    if isinstance(images, jax.Array):
      return self._run(images)
    parts = []
    for start in range(0, len(images), self.batch):
      part = images[start:start + self.batch]
      missing = self.batch - len(part)
      padded = np.concatenate([part, np.repeat(part[-1:], missing, 0)]) if missing else part
      parts.append({k: v[:len(part)] for k, v in self._run(padded).items()})
    if not parts:
      raise ValueError('No images to extract features from; give at least one.')
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

  def random(self, seed: int = 0) -> 'InceptionExtractor':
    """The control: the same network with untrained weights."""
    state = nnx.state(Inception(rngs=nnx.Rngs(seed)))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
      digest.update(np.asarray(leaf, '<f4').tobytes())
    return dataclasses.replace(self, sha256=digest.hexdigest(), state=state)

  def _run(self, images: Given) -> Outputs:
    if self.resize == 'clean':  # on the host: its kernel is Pillow's
      resized = resizing.clean(np.asarray(images), SIDE)
      images = jax.device_put(resized, getattr(images, 'sharding', None))
    taps = _taps(self.graph, self.state, images, self.resize)
    return {k: np.asarray(v) for k, v in taps._asdict().items()}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _taps(graph: Any, state: Any, images: Array, mode: str):
  return nnx.merge(graph, state)(prepare(images, mode))


def prepare(images: Array, mode: str) -> Float[Array, 'b _h _w 3']:
  """What the network sees of levels 0..255, resized (except by `clean`, done before) and scaled."""
  x = jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))
  if mode == 'legacy_pytorch':
    return 2 * resizing.legacy_pytorch(x / 255, SIDE) - 1
  return ((resizing.tf1(x, SIDE) if mode == 'tf1' else x) - 128) / 128


def load(path: str | os.PathLike | None = None, *, resize: str = 'tf1', batch: int = 32
         ) -> InceptionExtractor:
  """The extractor with the weights of a file.

  Args:
    path: one of the three files, or another with the same names; none takes the environment's.
    resize: one of `evaluation.resize.MODES`.
    batch: images per program run.

  Raises:
    ValueError: no weights were given, or those of another network.
    FileNotFoundError: no such file.
  """
  if resize not in resizing.MODES:
    raise ValueError(f'{resize=} must be one of {", ".join(resizing.MODES)}.')
  path = path or os.environ.get(VARIABLE)
  if not path:
    raise ValueError(
        'FID, sFID and IS need the Inception weights of 2015-12-05, which smalti cannot ship: get '
        f'one of {", ".join(PUBLISHED.values())} and name it with --inception_weights=FILE or '
        f'{VARIABLE}=FILE.')
  file = weights.read(path)
  try:
    graph, state = restore(file.tensors)
  except ValueError as error:
    raise ValueError(f'{path} is no Inception network of FID: {error}') from error
  return InceptionExtractor(file.sha256, resize, graph, state, batch)


def published(sha256: str) -> bool:
  """Whether a hash is of one of the three files: the condition for a score to be called FID."""
  return sha256 in PUBLISHED


def restore(tensors: weights.Tensors) -> tuple[Any, Any]:
  """(graph, state) of the network with these tensors, whose names say their convention.

  Raises:
    ValueError: a tensor is missing, of another shape, or not finite.
  """
  convention = _convention(tensors)

  def take(path: conversion.Path) -> tuple[str, np.ndarray]:
    name = names(path)[convention]
    if name not in tensors and convention == 'torchscript' and path[-1] == 'scale':
      return name, np.ones_like(tensors[names((*path[:-1], 'bias'))[convention]])  # left out: all 1
    value = np.asarray(tensors[name])
    return name, value if convention == 'tensorflow' else conversion.from_torch(value)

  return conversion.fill(lambda: Inception(rngs=nnx.Rngs(0)), take)


def export(state: Any, convention: Convention) -> dict[str, np.ndarray]:
  """The tensors of a state under the names and in the layout of another library."""
  turn = np.asarray if convention == 'tensorflow' else conversion.to_torch
  return {names(path)[convention]: turn(np.asarray(leaf[...]))
          for path, leaf in nnx.to_flat_state(state)}


def names(path: conversion.Path) -> dict[Convention, str]:
  """What the graph, torch's state dict and the TorchScript file call the leaf at `path`."""
  *scopes, leaf = path
  scope = '/'.join(scopes)
  if scope == 'softmax':
    ends = {'kernel': ('weights', 'weight'), 'bias': ('biases', 'bias')}[leaf]
    return {'tensorflow': f'softmax/{ends[0]}', 'torch': f'fc.{ends[1]}',
            'torchscript': f'output.{ends[1]}'}
  graph, torch, script = _LEAVES[leaf]
  # the last two blocks of the TorchScript file have no towers: mixed_9.tower_1_conv
  dotted = re.sub(r'^(mixed_9|mixed_10)/', r'\1.', scope)
  dotted = dotted.replace('/', '_' if dotted != scope else '.')
  return {'tensorflow': f'{scope}/{graph}', 'torch': f'{_torch_scope(scope)}.{torch}',
          'torchscript': f'layers.{dotted}.{script}'}


_LEAVES = {
    'kernel': ('conv2d_params', 'conv.weight', 'weight'),
    'scale': ('batchnorm/gamma', 'bn.weight', 'gamma'),
    'bias': ('batchnorm/beta', 'bn.bias', 'beta'),
    'mean': ('batchnorm/moving_mean', 'bn.running_mean', 'mean'),
    'var': ('batchnorm/moving_variance', 'bn.running_var', 'var'),
}
_STEM = {'conv': 'Conv2d_1a_3x3', 'conv_1': 'Conv2d_2a_3x3', 'conv_2': 'Conv2d_2b_3x3',
         'conv_3': 'Conv2d_3b_1x1', 'conv_4': 'Conv2d_4a_3x3'}
_TOWERS = {  # torch's name of each tower, by block
    '5': {'conv': 'branch1x1', 'tower': 'branch5x5', 'tower_1': 'branch3x3dbl'},
    '6a': {'conv': 'branch3x3', 'tower': 'branch3x3dbl'},
    '6': {'conv': 'branch1x1', 'tower': 'branch7x7', 'tower_1': 'branch7x7dbl'},
    '7a': {'tower': 'branch3x3', 'tower_1': 'branch7x7x3'},
    '7': {'conv': 'branch1x1', 'tower': 'branch3x3', 'tower_1': 'branch3x3dbl'},
}
_BLOCKS = ('5b', '5c', '5d', '6a', '6b', '6c', '6d', '6e', '7a', '7b', '7c')  # mixed, mixed_1, ...


def _torch_scope(scope: str) -> str:
  if scope in _STEM:
    return _STEM[scope]
  block, tower, *rest = scope.split('/')
  block = _BLOCKS[_count(block)]
  if tower == 'tower_2':
    return f'Mixed_{block}.branch_pool'
  branch = f'Mixed_{block}.{_TOWERS.get(block, _TOWERS.get(block[0]))[tower]}'
  if not rest:
    return branch
  if rest[0] == 'mixed':  # a row and a column, after one convolution or after two
    return f'{branch}_{2 if tower == "tower" else 3}{"ab"[_count(rest[1])]}'
  return f'{branch}_{_count(rest[0]) + 1}'


def _count(name: str) -> int:
  """0 for 'conv', 2 for 'conv_2'."""
  return int(name.rpartition('_')[2]) if '_' in name else 0


def _convention(tensors: weights.Tensors) -> Convention:
  first: dict[Convention, str] = names(('conv', 'kernel'))
  for convention, name in first.items():
    if name in tensors:
      return convention
  some = ', '.join(sorted(tensors)[:3])
  raise ValueError(f'it has none of {", ".join(first.values())}, but {some}, ...')

