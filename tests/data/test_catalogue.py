"""A catalogue data set prepared in seconds from a package builder, and read without TensorFlow."""

import hashlib
import importlib
import json
import os
import sys

import numpy as np
import pytest

from smalti.data import pipeline
from smalti.data.catalogue import TFDSConfig, prepared
from smalti.data.digits import DigitsConfig

BUILDER = '''
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from smalti.data.digits import DigitsConfig


class Builder(tfds.core.GeneratorBasedBuilder):
  """Digits as PNG bytes; in `odd`, photographs of several sizes."""
  VERSION = tfds.core.Version('1.0.2')
  RELEASE_NOTES = {}

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        'image': tfds.features.Image(shape=(8, 8, 1)),
        'odd': tfds.features.Image(shape=(None, None, 3)),
        'note': tfds.features.Text(),
        'label': tfds.features.ClassLabel(names=[f'digit{i}' for i in range(10)])}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples('train', 300),
            'test': self._generate_examples('eval', 60)}

  def _generate_examples(self, split, count):
    rows = DigitsConfig().open(split).read(np.arange(count))
    for i in range(count):
      odd = Image.new('RGB', (20 + i % 7, 20), (i % 256, 0, 0))
      yield i, {'image': self._png(Image.fromarray(rows['image'][i, ..., 0])),
                'odd': self._png(odd), 'note': f'row {i}', 'label': int(rows['label'][i])}

  def _png(self, image):
    file = io.BytesIO()
    image.save(file, 'PNG')
    file.seek(0)
    return file
'''


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  root = tmp_path_factory.mktemp('catalogue')
  package = root / 'code' / 'digits8'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text('')
  (package / 'digits8_dataset_builder.py').write_text(BUILDER)
  sys.path.insert(0, str(root / 'code'))
  try:
    module = importlib.import_module('digits8.digits8_dataset_builder')
    builder = module.Builder(data_dir=str(root / 'data'), file_format='array_record')
    builder.download_and_prepare()
  finally:
    sys.path.remove(str(root / 'code'))
  return str(root / 'data')


def hashes(image, label) -> list[str]:
  return sorted(hashlib.sha256(i.tobytes() + bytes([n])).hexdigest() for i, n in zip(image, label))


def test_rows_come_back_without_tensorflow(data_dir):
  config = TFDSConfig(name='digits8', data_dir=data_dir, channels=1)
  for split, count in (('train', 300), ('eval', 60)):
    source = config.open(split)
    assert len(source) == count and source.classes[3] == 'digit3'
    batch = source.read(np.arange(count))
    assert batch['image'].dtype == np.uint8 and batch['label'].dtype == np.int32
    expected = DigitsConfig().open(split).read(np.arange(count))
    assert hashes(**batch) == hashes(**expected)
  batch = next(pipeline.batches(config.open('train'), batch_size=16, seed=0))
  assert batch['image'].shape == (16, 8, 8, 1)
  assert 'tensorflow' not in sys.modules


def test_sizes_splits_and_keys_are_chosen(data_dir):
  config = TFDSConfig(name='digits8:1.0.2', data_dir=data_dir, train='train[:10%]', size=12,
                      image_key='odd', label_key=None)
  source = config.open('train')
  assert len(source) == 30 and source.classes == ()
  batch = source.read(np.array([3, 1]))
  assert set(batch) == {'image'} and batch['image'].shape == (2, 12, 12, 3)


@pytest.mark.parametrize('change, message', [
    ({'image_key': 'picture'}, "no feature 'picture'; it has image, label, note, odd"),
    ({'image_key': 'note'}, "Feature 'note'"),
    ({'image_key': 'odd'}, 'vary in size; set --config.data.size=PIXELS'),
    ({'train': 'holdout'}, "no split 'holdout'; its splits are train, test"),
])
def test_a_wrong_choice_lists_the_right_ones(data_dir, change, message):
  with pytest.raises(ValueError, match=message):
    TFDSConfig(name='digits8', data_dir=data_dir, **change).open('train')


def test_an_unprepared_set_is_one_line_with_the_command(tmp_path):
  with pytest.raises(FileNotFoundError) as refusal:
    TFDSConfig(name='cifar10', data_dir=str(tmp_path)).open('train')
  text = str(refusal.value)
  assert text.count('\n') == 0
  assert 'pip install "smalti[tfds-prepare]"' in text
  assert f'tfds build cifar10 --file_format=array_record --data_dir={tmp_path}' in text
  with pytest.raises(ValueError, match='data.name is not set'):
    TFDSConfig().open('train')
  with pytest.raises(ValueError, match='is not NAME'):
    prepared('../etc', str(tmp_path))


def test_versions_configs_and_formats(tmp_path):
  def pretend(path, kind='array_record'):
    os.makedirs(tmp_path / path)
    (tmp_path / path / 'dataset_info.json').write_text(json.dumps({'fileFormat': kind}))
  for version in ('1.9.0', '1.10.0'):
    pretend(f'many/{version}')
  assert prepared('many', str(tmp_path)).name == '1.10.0'
  assert prepared('many:1.9.0', str(tmp_path)).name == '1.9.0'
  with pytest.raises(FileNotFoundError, match=r'it has 1.10.0, 1.9.0'):
    prepared('many:2.0.0', str(tmp_path))
  pretend('deep/small/1.0.0')
  assert prepared('deep/small', str(tmp_path)).parts[-2:] == ('small', '1.0.0')
  with pytest.raises(FileNotFoundError, match='it has the configs deep/small'):
    prepared('deep', str(tmp_path))
  pretend('old/1.0.0', 'tfrecord')
  with pytest.raises(ValueError, match='prepared as tfrecord, which has no random access'):
    prepared('old', str(tmp_path))
