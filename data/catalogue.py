"""The catalogue of TensorFlow Datasets, read without TensorFlow.

A data set that was prepared as array_record has random access and needs no TensorFlow to read;
most builders need it once, to prepare (`pip install smalti[tfds-prepare]`). TFDS itself answers a
missing data set with minutes of downloads or with a misleading error about formats, so the prepared
folder is checked here first. Encoded images are decoded by the rules and caps of `data.images`.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any, Literal

import numpy as np

from smalti.data import images
from smalti.data.augment import AugmentConfig
from smalti.data.source import DataConfig, Split

VARIABLE = 'TFDS_DATA_DIR'


@dataclasses.dataclass(kw_only=True, slots=True)
class TFDSConfig(DataConfig):
  """A prepared data set of the catalogue: `image: uint8[size, size, channels]`, `label: int32`.

  Attributes:
    name: NAME, NAME:VERSION, NAME/CONFIG or NAME/CONFIG:VERSION; without a version, the newest.
    data_dir: where it was prepared; None takes $TFDS_DATA_DIR, else TFDS's own default,
      ~/tensorflow_datasets.
    train, eval: splits in TFDS's language, such as 'train[:90%]'.
    size: shorter side and centre crop, in pixels; None keeps images that all have one size.
    channels: 1 (grey) or 3 (RGB).
    image_key, label_key: names of the features; no label is read where label_key is None.
    threads: batches decoded at once.
    augment: what training images go through.
  """
  name: str | None = None
  data_dir: str | None = None
  train: str = 'train'
  eval: str = 'test'
  size: int | None = None
  channels: Literal[1, 3] = 3
  image_key: str = 'image'
  label_key: str | None = 'label'
  threads: int = 4
  augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

  def open(self, split: Split) -> 'TFDSSource':
    if not self.name:
      raise ValueError('data.name is not set; name a prepared data set, --config.data.name=NAME.')
    path = prepared(self.name, self.data_dir)
    return TFDSSource(path, self.train if split == 'train' else self.eval, self)


class TFDSSource:
  """One split of a prepared folder.

  Raises:
    ValueError: a split, feature or kind of feature that is not there, with what is.
  """

  def __init__(self, path: pathlib.Path, split: str, config: TFDSConfig):
    import tensorflow_datasets as tfds  # imports for a second; only who opens pays
    builder = tfds.builder_from_directory(str(path))
    features = builder.info.features
    keys = [key for key in (config.image_key, config.label_key) if key]
    if missing := [key for key in keys if key not in features]:
      there = ', '.join(sorted(features))
      raise ValueError(f'{path} has no feature {missing[0]!r}; it has {there}: set '
                       'data.image_key and data.label_key (none for no label).')
    feature = features[config.image_key]
    encoded = isinstance(feature, tfds.features.Image)
    if not encoded and (feature.np_dtype != np.uint8 or len(feature.shape) != 3):
      raise ValueError(f'Feature {config.image_key!r} of {path} is {feature!r}; '
                       'images are Image features, or uint8 tensors [height, width, channels].')
    if config.size is None and None in feature.shape[:2]:
      raise ValueError(f'The images of {path} vary in size; set --config.data.size=PIXELS.')
    if not encoded and feature.shape[2] != config.channels:
      raise ValueError(f'The images of {path} have {feature.shape[2]} channels; '
                       'set --config.data.channels to that.')
    as_bytes = {key: tfds.decode.SkipDecoding() for key, value in features.items()
                if isinstance(value, tfds.features.Image)}
    try:
      self._rows = builder.as_data_source(split, decoders=as_bytes)
    except (ValueError, KeyError) as error:
      raise ValueError(f'{path} has no split {split!r}; its splits are '
                       f'{", ".join(builder.info.splits)}.') from error
    self.path, self.split, self.config, self.encoded = path, split, config, encoded
    self.threads = config.threads
    names = getattr(features[config.label_key], 'names', None) if config.label_key else None
    self.classes = tuple(names or ())

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    rows = self._rows.__getitems__([int(i) for i in indices])
    batch = {'image': np.stack([self._image(row, i) for row, i in zip(rows, indices)])}
    if self.config.label_key:
      batch['label'] = np.array([row[self.config.label_key] for row in rows], np.int32)
    return batch

  def _image(self, row: dict[str, Any], index: int) -> np.ndarray:
    image, config = row[self.config.image_key], self.config
    try:
      if self.encoded:
        image = images.decode(image, config.channels)
      return image if config.size is None else images.fit(image, config.size)
    except images.Refused as refusal:
      raise ValueError(f'Image {index} of {self.split} in {self.path} is refused ({refusal}); '
                       'leave it out with a split such as train[:100].') from refusal


def prepared(name: str, data_dir: str | None) -> pathlib.Path:
  """The folder of a prepared data set, newest version first; checked before TFDS is asked.

  Raises:
    FileNotFoundError: it was never prepared there.
    ValueError: not a name, or prepared in a format without random access.
  """
  if not re.fullmatch(r'\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?', name):
    raise ValueError(f'data.name={name!r} is not NAME[/CONFIG][:1.2.3].')
  root = pathlib.Path(data_dir or os.environ.get(VARIABLE) or '~/tensorflow_datasets').expanduser()
  stem, _, version = name.partition(':')
  command = (f'pip install "smalti[tfds-prepare]" && tfds build {name} '
             f'--file_format=array_record --data_dir={root}')
  found = {path.parent.name: path.parent for path in (root / stem).glob('*/dataset_info.json')
           if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)}
  chosen = version or max(found, key=lambda v: tuple(map(int, v.split('.'))), default=None)
  if chosen not in found:
    configs = sorted({p.parts[-3] for p in (root / stem).glob('*/*/dataset_info.json')})
    there = f' (it has the configs {", ".join(f"{stem}/{c}" for c in configs)})' if configs else (
        f' (it has {", ".join(sorted(found))})' if found else '')
    raise FileNotFoundError(f'{name} is not prepared in {root}{there}; prepare it once: {command}')
  info = json.loads((found[chosen] / 'dataset_info.json').read_text())
  if (kind := info.get('fileFormat', 'tfrecord')) != 'array_record':
    raise ValueError(f'{found[chosen]} was prepared as {kind}, which has no random access; remove '
                     f'it and prepare it again: {command}')
  return found[chosen]
