"""Feature extractors that need no downloaded weights: uint8 images to feature rows.

None of them is the FID Inception network, and none may be called so: a score made with them is
named `fd_<extractor>_<hash>` by `score_name`. Values of different extractors do not compare.
"""

import dataclasses
import functools
import hashlib
import json
import os
import warnings
import zipfile
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Shaped
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from smalti.evaluation.files import whole
from smalti.evaluation.frechet import Moments
from smalti.evaluation.subset import subset

FORMAT = 1
SIDE = 32  # pixels that larger images are averaged to
FITTED = 2048  # images that principal components are fitted on, at most
Images = Shaped[np.ndarray, '_b _h _w _c']  # uint8, checked below: floats are refused
Given = Shaped[Any, '_b _h _w _c']  # the same, or a jax.Array, perhaps over several devices
Outputs = dict[str, Float[Any, '_b _c']]  # float32
Shape = tuple[int, int, int]


@runtime_checkable
class Extractor(Protocol):
  """Images to features, with everything that a score must say about it.

  A call takes uint8 images and returns float32 rows by name: 'features' always, and where it has
  them 'logits' of classes (Inception score) and 'spatial' (features of places, for sFID).

  Attributes:
    name: what it is, part of the score's name.
    sha256: of the weights, or of the definition where there are none.
    dim: length of a row of 'features'.
    resize: how images reach the size it works at; 'none' is at their own.
  """
  @property
  def name(self) -> str: ...

  @property
  def sha256(self) -> str: ...

  @property
  def dim(self) -> int: ...

  @property
  def resize(self) -> str: ...

  def __call__(self, images: Given) -> Outputs: ...


def score_name(extractor: Extractor) -> str:
  """The only name of a Frechet distance with this extractor."""
  return f'fd_{extractor.name}_{extractor.sha256[:8]}'


def identity(extractor: Extractor) -> str:
  """What moments carry, so that features of different extractors never mix."""
  return f'{extractor.name}:{extractor.sha256}:{extractor.resize}'


def moments(extractor: Extractor, images: Images, chunk: int = 1024) -> Moments:
  """Streamed moments of the features of many images."""
  total = Moments.empty(extractor.dim, identity(extractor))
  for start in range(0, len(images), chunk):
    total = total.add(extractor(images[start:start + chunk])['features'])
  return total


@dataclasses.dataclass(frozen=True)
class Pixels:
  """The pixels themselves in [0, 1], flattened: sees first and second moments of images only."""
  shape: Shape
  name = 'pixels'
  resize = 'none'

  @property
  def dim(self) -> int:
    return int(np.prod(self.shape))

  @property
  def sha256(self) -> str:
    return _digest({'extractor': 'pixels', 'shape': list(self.shape), 'scale': 255})

  def __call__(self, images: Given) -> Outputs:
    return _outputs(_flatten(np.asarray(images), self.shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Principal:
  """The first principal components of the pixels of the images it was fitted on, not whitened.

  Larger images are averaged to at most `SIDE` pixels a side first, and `resize` says so: it sees
  colours and coarse shapes, no texture.
  """
  shape: Shape
  mean: Float[np.ndarray, 'p']
  components: Float[np.ndarray, 'p c']

  @classmethod
  def fit(cls, images: Images, dim: int) -> 'Principal':
    """Fits on all images, or on `FITTED` of more."""
    small = shrink(images[subset(len(images), FITTED)])
    x = _flatten(small, small.shape[1:])
    if not 1 <= dim <= min(x.shape):
      raise ValueError(f'{dim=} must be in 1..{min(x.shape)} for {len(x)} images of '
                       f'{x.shape[1]} values.')
    mean = x.mean(0)
    _, _, directions = np.linalg.svd(x - mean, full_matrices=False)
    components = directions[:dim].T
    largest = components[np.abs(components).argmax(0), np.arange(dim)]
    # one sign and float16: the last bits of a linear algebra library make no other extractor
    return cls(images.shape[1:], _rounded(mean), _rounded(components * np.sign(largest)))

  @property
  def name(self) -> str:
    return f'pca{self.dim}'

  @property
  def dim(self) -> int:
    return self.components.shape[1]

  @property
  def resize(self) -> str:
    height, width = _shrunk(self.shape)
    return 'none' if (height, width) == self.shape[:2] else f'box_{height}x{width}'

  def random(self, seed: int = 0) -> 'Principal':
    """The control: as many random orthonormal directions, which know nothing of the images."""
    directions, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=self.components.shape))
    return RandomDirections(self.shape, self.mean, _rounded(directions))

  @functools.cached_property
  def sha256(self) -> str:
    return _digest({'extractor': 'principal', 'shape': list(self.shape)},
                   self.mean, self.components)

  def __call__(self, images: Given) -> Outputs:
    images = np.asarray(images)
    _check(images, self.shape)
    small = shrink(images)
    return _outputs(
        (_flatten(small, small.shape[1:]) - self.mean) @ self.components.astype(np.float64))


class RandomDirections(Principal):
  """The control of principal components: random directions."""

  @property
  def name(self) -> str:
    return f'pca{self.dim}_untrained'


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
  """The hidden layer of a small classifier fitted on real images: relu(pixels W + b).

  The proxy for tiny images: its features separate the classes, as Inception's do for photographs.

  Attributes:
    name: says what it was fitted on, such as 'digits_mlp64'.
    weights, bias: of the hidden layer, stored in float16.
    accuracy: on the held-out images given to `fit`.
  """
  name: str
  shape: Shape
  weights: Float[np.ndarray, 'p c']
  bias: Float[np.ndarray, 'c']
  accuracy: float
  resize = 'none'

  @classmethod
  def fit(cls, name: str, train: tuple[Images, Int[np.ndarray, '_b']],
          held_out: tuple[Images, Int[np.ndarray, '_b']], *, width: int = 64, epochs: int = 60,
          seed: int = 0) -> 'Classifier':
    """Fits scikit-learn's perceptron with one hidden layer; seconds for a few thousand digits."""
    shape = train[0].shape[1:]
    model = MLPClassifier((width,), max_iter=epochs, tol=0.0, n_iter_no_change=epochs,
                          random_state=seed)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', ConvergenceWarning)  # the number of epochs is the definition
      model.fit(_flatten(train[0], shape), train[1])
    accuracy = float(model.score(_flatten(held_out[0], shape), held_out[1]))
    # float16: the last bits of a linear algebra library make no other extractor
    return cls(name, shape, _rounded(model.coefs_[0]), _rounded(model.intercepts_[0]), accuracy)

  @property
  def dim(self) -> int:
    return len(self.bias)

  @functools.cached_property
  def sha256(self) -> str:
    return _digest({'extractor': 'classifier', 'shape': list(self.shape)}, self.weights, self.bias)

  def random(self, seed: int = 0) -> 'Classifier':
    """The untrained twin, a control: the same layer with random weights."""
    random = np.random.default_rng(seed)
    fan_in = len(self.weights)
    return Classifier(f'{self.name}_untrained', self.shape, _rounded(
        random.normal(0, fan_in ** -0.5, self.weights.shape)), _rounded(0 * self.bias), 0.0)

  def __call__(self, images: Given) -> Outputs:
    x = _flatten(np.asarray(images), self.shape)
    return _outputs(np.maximum(x @ self.weights.astype(np.float64) + self.bias, 0))

  def save(self, path: str | os.PathLike) -> None:
    """Writes the weights, for scores on other machines with exactly this extractor."""
    with whole(path) as file:
      np.savez(file, format=FORMAT, name=np.array(self.name), shape=np.array(self.shape),
               weights=self.weights, bias=self.bias, accuracy=self.accuracy)

  @classmethod
  def load(cls, path: str | os.PathLike, sha256: str | None = None) -> 'Classifier':
    """Reads `save`. Raises ValueError for a damaged file or, where given, another hash."""
    try:
      with np.load(path, allow_pickle=False) as file:
        if int(file['format']) != FORMAT:
          raise ValueError(f'format {int(file["format"])}, this version reads {FORMAT}')
        height, width, channels = (int(v) for v in file['shape'])
        shape = height, width, channels
        found = cls(str(file['name']), shape, file['weights'], file['bias'],
                    float(file['accuracy']))
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(f'{path} holds no extractor ({error}); fit it again.') from error
    if found.weights.shape != (int(np.prod(shape)), found.dim):
      raise ValueError(f'{path} holds weights that do not fit shape={shape}; fit it again.')
    if sha256 is not None and found.sha256 != sha256:
      raise ValueError(f'{path} has hash {found.sha256[:8]}, not {sha256[:8]}; scores would not '
                       'compare.')
    return found


def shrink(images: Images, side: int = SIDE) -> Images:
  """Images averaged to at most `side` pixels a side, as uint8; smaller ones pass unchanged."""
  height, width = _shrunk(images.shape[1:], side)
  if (height, width) == images.shape[1:3]:
    return images
  out = np.empty((len(images), height, width, images.shape[3]), np.uint8)
  for i, image in enumerate(images):
    for c in range(images.shape[3]):
      plane = Image.fromarray(image[..., c])
      out[i, ..., c] = np.asarray(plane.resize((width, height), Image.Resampling.BOX))
  return out


def _shrunk(shape: tuple[int, ...], side: int = SIDE) -> tuple[int, int]:
  height, width = shape[:2]
  factor = min(1, side / max(height, width))
  return max(1, round(height * factor)), max(1, round(width * factor))


def _flatten(images: Images, shape: Shape) -> Float[np.ndarray, 'b p']:
  _check(images, shape)
  return images.reshape(len(images), -1).astype(np.float64) / 255


def _check(images: Images, shape: Shape) -> None:
  if images.dtype != np.uint8 or images.shape[1:] != tuple(shape):
    raise ValueError(f'Images of {images.dtype}{list(images.shape[1:])} must be '
                     f'uint8{list(shape)}: this extractor takes no other size.')


def _outputs(features: Float[np.ndarray, 'b c']) -> Outputs:
  return {'features': features.astype(np.float32)}


def _rounded(x: np.ndarray) -> Float[np.ndarray, '...']:
  return x.astype(np.float16)


def _digest(definition: dict, *arrays: np.ndarray) -> str:
  digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode())
  for x in arrays:
    digest.update(np.ascontiguousarray(x, x.dtype.newbyteorder('<')).tobytes())
  return digest.hexdigest()
