"""Scores of tokenizers: how many images each is of, whatever their size."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smalti.data.arrays import ArraysSource
from smalti.evaluation import baselines, language, reconstruction
from smalti.evaluation.subset import subset
from smalti.launch import fidelity
from smalti.launch.scores import Scores
from smalti.tokenizers.spec import TokenSpec

IMAGES = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 1), np.uint8)
SPEC = TokenSpec(grid=(2, 2), vocab=(256,))


def encoded(loaded, images, **_):
  return images[:, ::4, ::4, 0].reshape(-1, 4, 1).astype(np.int32)


def decoded(loaded, tokens, **_):  # each token is the value of its quarter
  return np.asarray(tokens).reshape(-1, 2, 2, 1).repeat(4, 1).repeat(4, 2).astype(np.uint8)


@pytest.fixture
def scored(monkeypatch):
  """beside -> (scores of 80 held-out images by name, images given to the baselines, tokens given
  to the statistics of language), where memory holds 20 images."""
  given: dict[str, Any] = {}
  monkeypatch.setattr(fidelity, 'PIXELS', 20 * 64)
  monkeypatch.setattr(fidelity, 'BATCH', 16)
  monkeypatch.setattr(fidelity, 'encoded', encoded)
  monkeypatch.setattr(fidelity, 'decoded', decoded)
  monkeypatch.setattr(fidelity, '_add_frechet', lambda *_: None)
  monkeypatch.setattr(fidelity, '_add_stability', lambda *_: None)
  monkeypatch.setattr(fidelity, 'accumulate', lambda judge, batches, *_: (
      list(batches), SimpleNamespace(finish=list))[1])
  monkeypatch.setattr(baselines, 'baselines', lambda train, images, **_: (
      given.update(images=images), SimpleNamespace(
          at=[SimpleNamespace(curve='jpeg', psnr=3.0)], points=[]))[1])
  monkeypatch.setattr(language, 'report_language', lambda spec, *tokens: (
      given.update(tokens=tokens), {})[1])
  data: Any = SimpleNamespace(open=lambda split: ArraysSource({'image': IMAGES}))
  judge: Any = SimpleNamespace(held_out=[SimpleNamespace(n=80)])
  loaded: Any = SimpleNamespace(spec=SPEC, model=None, fingerprint='')

  def score(beside):
    scores = Scores(None, 'none', quiet=True)
    fidelity.tokenizer_scores(loaded, scores, judge, data, beside=beside)
    return {row.name: row for row in scores.rows}, given
  return score


@pytest.mark.parametrize('beside', [True, False])
def test_codes_are_of_all_images_where_pixels_fill_the_memory(scored, beside):
  found, given = scored(beside)
  assert found['usage'].samples == found['perplexity'].samples == 90
  assert found['usage'].beside['tokens'] == 360
  if beside:
    for tokens in given['tokens']:
      np.testing.assert_array_equal(tokens, encoded(None, IMAGES))


def test_baselines_and_the_tokenizer_are_compared_on_the_same_images(scored):
  found, given = scored(True)
  few = IMAGES[subset(90, 20)]
  np.testing.assert_array_equal(given['images'], few)
  own = reconstruction.compare(few, decoded(None, encoded(None, few))).psnr
  score = found['psnr_over_baselines']
  assert (score.value, score.samples) == (pytest.approx(own - 3), 20)
  assert found['psnr'].samples == 80 and found['psnr'].value != pytest.approx(own)
