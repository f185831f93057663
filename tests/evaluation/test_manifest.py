"""Scores: nothing may be left out, and a proxy cannot take a published name."""

import json

import pytest

from smalti.evaluation.manifest import (
    FORMAT,
    INCEPTION,
    Score,
    canonical,
    read_file,
    read_scores,
    seal,
    versions,
    write_scores,
)

HASH = '1a2b3c4d' * 8
FIELDS = dict(
    name='fd_pixels_1a2b3c4d', value=1.5, unit='', higher_is_better=False, samples=1000,
    seeds=(0, 1), settings={'steps': 8, 'guidance': 2.0, 'top_k': None}, weights='ema',
    model='runs/digits_masked@2000 fingerprint 0123456789abcdef', extractor='pixels', sha256=HASH,
    resize='none', uint8='round', reference='digits eval sha256 77', reference_samples=360,
    versions=versions('scikit-learn'), beside={'floor': 0.4})


def sealed(**fields):
  fields = {'format': FORMAT, 'request': None, **fields}
  return json.dumps({**fields, 'sha256': seal(fields)})


def test_round_trip(tmp_path):
  scores = [Score(**FIELDS), Score(**{**FIELDS, 'name': 'bits_per_token', 'extractor': None})]
  write_scores(tmp_path / 'run' / 'scores.json', scores, {'n': 1000})
  assert read_file(tmp_path / 'run' / 'scores.json') == (scores, {'n': 1000})
  assert read_scores(tmp_path / 'run' / 'scores.json') == scores
  assert [p.name for p in (tmp_path / 'run').iterdir()] == ['scores.json']
  assert set(FIELDS['versions']) == {'python', 'smalti', 'numpy', 'scikit-learn'}


@pytest.mark.parametrize('field', sorted(FIELDS))
def test_no_field_may_be_left_out(field, tmp_path):
  rest = {k: v for k, v in FIELDS.items() if k != field}
  with pytest.raises(TypeError, match=field):
    Score(**rest)
  path = tmp_path / 'scores.json'
  path.write_text(sealed(scores=[rest]))
  with pytest.raises(ValueError, match=f'missing or unknown fields: {field}'):
    read_scores(path)


@pytest.mark.parametrize('change, message', [
    ({'name': 'fid'}, 'published weights'),
    ({'name': 'fid_50k'}, 'published weights'),
    ({'name': 'lpips', 'extractor': None, 'sha256': None}, 'published weights'),
    ({'name': 'fd_pixels'}, 'must be fd_'),
    ({'name': 'fd_digits_1a2b3c4d'}, 'must be fd_'),
    ({'name': 'fd_pixels_00000000'}, 'must be fd_'),
    ({'name': 'FID'}, 'named in a-z'),
    ({'value': float('nan')}, 'finite'),
    ({'value': float('inf')}, 'finite'),
    ({'samples': 0}, '1 or more'),
    ({'weights': 'best'}, 'not one of'),
    ({'resize': None}, 'needs resize'),
    ({'reference': None, 'reference_samples': None}, 'needs reference, reference_samples'),
    ({'sha256': '1a2b3c4d'}, '64 hex'),
    ({'versions': {}}, 'versions'),
    ({'beside': {'floor': float('nan')}}, 'JSON'),
    ({'settings': {'steps': object()}}, 'JSON'),
])
def test_what_a_score_may_not_be(change, message):
  with pytest.raises(ValueError, match=message):
    Score(**{**FIELDS, **change})


def test_fid_takes_the_inception_weights_and_nothing_else():
  for sha256 in INCEPTION:
    assert Score(**{**FIELDS, 'name': 'fid', 'extractor': 'inception', 'sha256': sha256}).value
  for name in ('fid', 'sfid', 'kid', 'is', 'fid_50k'):
    for sha256 in (INCEPTION[0][:8] + '0' * 56, HASH):
      with pytest.raises(ValueError, match='published weights'):
        Score(**{**FIELDS, 'name': name, 'extractor': 'inception', 'sha256': sha256})
  assert Score(**{**FIELDS, 'name': 'is_pixels_1a2b3c4d'}).value


def test_files_that_are_no_scores(tmp_path):
  path = tmp_path / 'scores.json'
  for text, message in [('{"format": 2', 'holds no scores'), ('[]', 'holds no scores'),
                        ('{"format": 1, "scores": []}', 'holds no scores'),
                        (sealed(format=9, scores=[]), 'format 9'),
                        (sealed(scores=[3]), 'unknown fields')]:
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      read_scores(path)
  with pytest.raises(ValueError, match='Two scores'):
    write_scores(path, [Score(**FIELDS)] * 2)


@pytest.mark.parametrize('old, new', [
    ('"value": 1.5', '"value": 1.4'), ('"floor": 0.4', '"floor": 0.5'), ('"n": 1000', '"n": 999'),
    ('"seeds": [\n    0', '"seeds": [\n    2')])
def test_a_file_edited_by_hand_is_refused(old, new, tmp_path):
  path = tmp_path / 'scores.json'
  write_scores(path, [Score(**FIELDS)], {'n': 1000})
  text = path.read_text()
  assert text.count(old) == 1
  path.write_text(text.replace(old, new))
  with pytest.raises(ValueError, match='was edited'):
    read_scores(path)


def test_the_hash_is_over_content_and_not_over_layout(tmp_path):
  assert canonical({'b': 1.0, 'a': [True, None]}) == b'{"a":[true,null],"b":1.0}'
  path = tmp_path / 'scores.json'
  write_scores(path, [Score(**FIELDS)], None)
  path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
  assert read_scores(path) == [Score(**FIELDS)]
