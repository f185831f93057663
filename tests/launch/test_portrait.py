"""The page's part on a tokenizer, from the tables that `evaluate` keeps."""

import dataclasses
import json

import numpy as np

from smalti.evaluation import baselines, language
from smalti.launch import portrait, report
from smalti.tokenizers.spec import TokenSpec


def tables():
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (40, 16, 16, 1), np.uint8)
  spec = TokenSpec(grid=(4, 4), vocab=(8,))
  tokens = random.integers(0, 8, (60, 16, 1))
  found = baselines.baselines(images, images[:8], bits=48.0, sides=(4,))
  return {
      'distortion': {'fingerprint': 'f', 'points': [dataclasses.asdict(p) for p in found.points],
                     'tokenizer': [{'keep': None, 'bits': 48.0, 'psnr': 20.0, 'ssim': 0.8}]},
      'language': {'fingerprint': 'f', 'depths': language.report_language(
          spec, tokens[:40], tokens[40:])}}


def test_the_page_shows_every_curve_with_its_controls(tmp_path, read_page):
  folder = tmp_path / 'evaluation'
  folder.mkdir()
  for name, table in tables().items():
    (folder / f'{name}.json').write_text(json.dumps(table))
  page = read_page(report.write_report(tmp_path))
  for text in ('this tokenizer', 'jpeg grey', 'pca 4', 'kmeans 4', 'shuffled', 'independent',
               'Zipf exponent', 'Held-out perplexity'):
    assert text in page.text, text


def test_tables_of_another_form_are_left_out_with_a_word(tmp_path, read_page):
  folder = tmp_path / 'evaluation'
  folder.mkdir()
  (folder / 'distortion.json').write_text('{"points": 3}')
  (folder / 'language.json').write_text('{')
  text = read_page(report.write_report(tmp_path)).text
  assert 'distortion.json could not be read' in text and 'language.json could not be read' in text
  assert portrait.section({}, 'x') == ''
