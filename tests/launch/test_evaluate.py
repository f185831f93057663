"""`smalti evaluate`: files of anybody's images, references, and asking again."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smalti.data.digits import DigitsConfig
from smalti.evaluation.manifest import read_file, read_scores
from smalti.evaluation.subset import subset
from smalti.evaluation.summary import Accumulator
from smalti.launch import cli, evaluate, judge as judges, provenance, real, trees
from smalti.launch.sample import Samples
from smalti.launch.scores import Scores
from smalti.launch.train import train

FITTED = judges._fitted  # before it is patched


@pytest.fixture(scope='module', autouse=True)
def quick():
  """The extractor is fitted once for all tests."""
  with pytest.MonkeyPatch.context() as patch:
    fit, known = judges._fitted, {}
    patch.setattr(judges, '_fitted', lambda data, shape, folder: known.setdefault(
        shape, known.get(shape) or fit(data, shape, folder)))
    yield


@pytest.fixture
def digits():
  source = DigitsConfig().open('train')
  rows = source.read(np.arange(200))
  return rows['image'], rows['label']


def values(path):
  return {score.name.split('_')[0]: score for score in read_scores(path)}


def test_an_npz_and_a_folder_of_the_same_images_score_the_same(digits, tmp_path):
  images, labels = digits
  np.savez(tmp_path / 'a.npz', arr_0=images, arr_1=labels)
  (tmp_path / 'b').mkdir()
  for i, image in enumerate(images):
    Image.fromarray(image[..., 0]).save(tmp_path / 'b' / f'{i}.png')
  for name in ('a.npz', 'b'):
    assert cli.main(['evaluate', f'--samples={tmp_path / name}', '--data=digits_vq']) == 0
  a, b = (values(tmp_path / f'{name}.scores.json') for name in 'ab')
  assert {'fd', 'kd', 'precision', 'recall', 'density', 'coverage', 'nearest', 'class'} <= set(a)
  for name in set(a) & set(b):
    assert a[name].value == pytest.approx(b[name].value, rel=1e-12), name
  assert set(a) - set(b) == {'class'}  # pictures have no labels
  # training images against the training set: nothing is nearer, nothing more precise
  assert a['precision'].value == 1.0 and a['nearest'].value == 0.0
  assert a['fd'].beside['floor'] > 0 and a['fd'].beside['untrained'] != a['fd'].value


def test_noise_scores_worse_than_the_floor(digits, tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, digits[0].shape, np.uint8)
  np.savez(tmp_path / 'noise.npz', arr_0=noise)
  evaluate.evaluate_file(tmp_path / 'noise.npz', 'digits_vq')
  found = values(tmp_path / 'noise.scores.json')
  assert found['fd'].value > 50 * found['fd'].beside['floor']
  assert found['recall'].value < 0.01 and found['nearest'].value > 2


def test_samples_are_judged_by_random_ones_of_them(digits, tmp_path, monkeypatch):
  images, labels = digits
  np.savez(tmp_path / 'a.npz', arr_0=images, arr_1=labels)
  seen = []
  monkeypatch.setattr(evaluate, 'KEPT', 30)
  monkeypatch.setattr(evaluate, 'BATCH', 64)  # rows are gathered over batches
  monkeypatch.setattr(evaluate, 'evaluate_samples', lambda _, __, *rows: seen.extend(rows[:2]))
  evaluate.evaluate_file(tmp_path / 'a.npz', 'digits_vq', write=False)
  rows = subset(200, 30)
  np.testing.assert_array_equal(seen[0], images[rows])
  np.testing.assert_array_equal(seen[1], labels[rows])


def test_it_is_said_how_much_of_the_training_data_was_looked_at(digits, tmp_path, monkeypatch):
  np.savez(tmp_path / 'a.npz', arr_0=digits[0])
  monkeypatch.setattr(real, 'LARGEST', 479)
  evaluate.evaluate_file(tmp_path / 'a.npz', 'digits_vq')
  found = values(tmp_path / 'a.scores.json')['nearest']
  assert found.reference_samples == 479 and found.beside['train_share'] == 479 / 1437
  train, held_out = (real.Split.read(DigitsConfig(), name) for name in ('train', 'eval'))
  tokens = np.zeros((5, 4, 1), np.int32)
  monkeypatch.setattr(evaluate, 'tokenized', lambda *_: tokens)
  loaded: Any = SimpleNamespace(model=SimpleNamespace(likelihood=lambda settings: None))
  scores = Scores(None, 'none', quiet=True)
  evaluate.evaluate_generator(loaded, loaded, scores, train, held_out,
                              Samples(tokens, held_out.images[:5], None, 1), seed=0)
  assert scores.rows[0].beside['train_share'] == 479 / 1437


def test_a_fitted_judge_of_some_rows_is_not_that_of_older_ones(tmp_path, monkeypatch):
  fitted = []
  monkeypatch.setattr(judges.features.Classifier, 'load', lambda path: fitted.append(path.name))
  monkeypatch.setattr(judges.features.Classifier, 'fit', lambda *args: type(
      'Fitted', (), {'save': lambda self, path: path.touch()})())
  key = lambda **more: judges.seal({  # noqa: E731
      'data': judges.serialization.to_json(DigitsConfig()), 'of': 1437, **more})[:16]
  for most in (10**9, 100):  # all of them; fewer, once the first and now drawn at random
    monkeypatch.setattr(judges, 'FIT', most)
    FITTED(DigitsConfig(), (8, 8, 1), tmp_path)
  assert fitted == [f'fitted-{key()}.npz', f'fitted-{key(rows="random")}.npz']


class Logits:
  """An extractor that knows the classes: a perceptron's features, and ten logits of the truth."""
  name, resize, classes = 'judge', 'none', tuple('0123456789')

  def __init__(self, inner):
    self.inner, self.sha256, self.dim = inner, inner.sha256, inner.dim

  def random(self, seed):
    return Logits(self.inner.random(seed))

  def __call__(self, images):
    rows = DigitsConfig().open('train').read(np.arange(1437))
    known = {image.tobytes(): label for image, label in zip(rows['image'], rows['label'])}
    truth = np.array([known.get(np.asarray(image).tobytes(), 0) for image in images])
    return {**self.inner(images), 'logits': np.eye(10, dtype=np.float32)[truth] * 5}


def test_an_extractor_with_classes_judges_labels_and_gives_an_inception_score(
    digits, tmp_path, monkeypatch):
  images, labels = digits
  wrong = np.where(np.arange(200) < 50, 9 - labels, labels)
  np.savez(tmp_path / 'a.npz', arr_0=images, arr_1=wrong)
  inner = judges._fitted(DigitsConfig(), (8, 8, 1), tmp_path / 'fit')
  monkeypatch.setattr(judges, '_fitted', lambda *_: Logits(inner))
  evaluate.evaluate_file(tmp_path / 'a.npz', 'digits_vq')
  found = values(tmp_path / 'a.scores.json')
  assert found['agreement'].value == 0.75 and 0 < found['agreement'].beside['judge_accuracy'] < 0.3
  assert 5 < found['is'].value < 10 and found['is'].beside['of_reference'] > 5
  assert found['is'].name == f'is_judge_{inner.sha256[:8]}'


def test_it_is_asked_again_and_gives_the_same(digits, tmp_path, capfd):
  np.savez(tmp_path / 'a.npz', arr_0=digits[0])
  evaluate.evaluate_file(tmp_path / 'a.npz', 'digits_vq')
  path = tmp_path / 'a.scores.json'
  before = path.read_bytes()
  assert cli.main(['evaluate', f'--repeat={path}']) == 0
  assert f'{len(read_scores(path))} scores, 0 differ' in capfd.readouterr().err
  assert path.read_bytes() == before  # it prints, and changes nothing
  # the images were exchanged since: both numbers are printed, and the code says so
  np.savez(tmp_path / 'a.npz', arr_0=255 - digits[0])
  assert cli.main(['evaluate', f'--repeat={path}']) == 1
  assert 'DIFFERS' in capfd.readouterr().err
  fields = json.loads(before)
  fields['scores'][0]['value'] += 1
  path.write_text(json.dumps(fields))
  assert cli.main(['evaluate', f'--repeat={path}']) == 2
  assert 'was edited' in capfd.readouterr().err


def test_a_reference_file_takes_the_place_of_the_training_images(digits, tmp_path):
  images = digits[0]
  np.savez(tmp_path / 'a.npz', arr_0=images[:100])
  judge = judges.open_judge(DigitsConfig(), tmp_path / 'references', n=100)
  part = Accumulator(judge.reference[0].extractor, 100)
  part.add(judge.extractor(images[:100]), np.arange(100))
  part.finish().save(tmp_path / 'reference.npz')
  evaluate.evaluate_file(tmp_path / 'a.npz', 'digits_vq', reference=tmp_path / 'reference.npz')
  scores, request = read_file(tmp_path / 'a.scores.json')
  assert abs(scores[0].value) < 1e-6 and scores[0].reference_samples == 100
  assert request['reference'] == str(tmp_path / 'reference.npz')
  part = Accumulator('other:' + 64 * '0' + ':none', 100)
  part.add(judge.extractor(images[:100]), np.arange(100))
  part.finish().save(tmp_path / 'reference.npz')
  with pytest.raises(ValueError, match="made with extractor 'other'"):
    evaluate.evaluate_file(tmp_path / 'a.npz', 'digits_vq', reference=tmp_path / 'reference.npz')


@pytest.mark.parametrize('arguments, message', [
    (['--samples=a.npz'], 'needs --data=CONFIG'),
    (['--samples=gone.npz', '--data=digits_vq'], 'gone.npz'),
    (['--samples=large.npz', '--data=digits_vq'], 'name data of the same size'),
    (['--samples=a.npz', '--data=digits_vq', '--extractor=vgg'], 'is no extractor'),
    (['--samples=a.npz', '--data=digits_vq', '--extractor=gone.safetensors'], 'No extractor at'),
    (['--samples=a.npz', '--reference=a.npz'], 'No extractor is known'),
    (['--repeat=a.npz'], 'holds no scores'),
    ([], 'needs --workdir'),
])
def test_mistakes_are_one_line(arguments, message, digits, tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  np.savez('a.npz', arr_0=digits[0][:20])
  np.savez('large.npz', arr_0=np.zeros((4, 9, 9, 1), np.uint8))
  assert cli.main(['evaluate', *arguments]) == 2
  err = capfd.readouterr().err.strip().splitlines()
  assert message in err[-1] and err[-1].startswith('smalti: ')


def test_a_run_that_is_trained_further_is_asked_for_what_was_scored(tmp_path, monkeypatch, capfd):
  def train_to(steps):
    train(trees.load_config('digits_vq:debug', [('mesh.data', '1'), ('steps', str(steps)),
                                              ('optimizer.schedule', 'constant'),
                                              ('optimizer.warmup', '0')]), tmp_path / 'run')

  monkeypatch.setattr(evaluate, 'open_judge', lambda *args, **kwargs: None)
  monkeypatch.setattr(evaluate, 'tokenizer_scores', lambda loaded, scores, *args, **kwargs: (
      scores.add('psnr', float(loaded.step), samples=1)))
  train_to(1)
  assert cli.main(['evaluate', f'--workdir={tmp_path}/run', f'--results={tmp_path}/r.json']) == 0
  assert provenance.load(tmp_path / 'r.json')['results'] == {'psnr': {'value': 1.0}}
  scores = str(tmp_path / 'run' / 'scores.json')
  train_to(2)
  assert evaluate.repeat(scores) == 0
  moved = (tmp_path / 'run').rename(tmp_path / 'moved')
  assert cli.main(['evaluate', f'--repeat={moved / "scores.json"}', f'--workdir={moved}']) == 0
  assert evaluate.repeat(moved / 'scores.json', f'{moved}@2') == 1
  assert 'DIFFERS' in capfd.readouterr().err


@pytest.mark.parametrize('order', ['sorted', 'in turn'])
def test_a_floor_of_fewer_images_has_all_classes(order, tmp_path, monkeypatch):
  images = np.arange(200, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
  labels = np.arange(200) // 20 if order == 'sorted' else np.arange(200) % 10

  class Source:  # a folder per class, or a file in which classes take turns
    classes = tuple(map(str, range(10)))

    def __len__(self):
      return len(images)

    def read(self, indices):
      return {'image': images[indices], 'label': labels[indices].astype(np.int32)}

  monkeypatch.setattr(DigitsConfig, 'open', lambda self, split: Source())
  judge = judges.open_judge(DigitsConfig(), tmp_path, n=40)
  assert judge.held_out[0].n == 40
  rows = subset(200, 40)  # every fifth of 200 in turn would be of two classes
  assert len(set(rows)) == 40 and set(labels[rows]) == set(range(10))
  expected = judge.extractor(images[rows])['features']
  np.testing.assert_allclose(judge.held_out[0].moments.mean, expected.mean(0), rtol=1e-5)
  split = real.Split.read(DigitsConfig(), 'train')
  np.testing.assert_array_equal(split.images, images)


def test_real_images_are_summarised_anew_when_their_content_changed(tmp_path, monkeypatch):
  class Source:
    classes = ('a', 'b')

    def __init__(self, images, content):
      self.images, self.content = images, content

    def __len__(self):
      return len(self.images)

    def read(self, indices):
      return {'image': self.images[indices], 'label': np.zeros(len(indices), np.int32)}

  def judged(seed, content):
    images = np.random.default_rng(seed).integers(0, 256, (20, 4, 4, 1), np.uint8)
    monkeypatch.setattr(DigitsConfig, 'open', lambda self, split: Source(images, content))
    return judges.open_judge(DigitsConfig(), tmp_path, n=10).definition

  first = judged(0, 'x')
  assert judged(1, 'x') == first  # kept: it is said to be the same
  assert judged(1, 'y') != first
