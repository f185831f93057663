"""Infilling of a run's held-out examples: regions, known tokens, what is written."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from smalti.configs import digits_masked, digits_vq
from smalti.data.tokens import TokensConfig
from smalti.generators.autoregressive import AutoregressiveSettings
from smalti.launch import cli, history, infill, provenance
from smalti.launch.train import train
from smalti.tokenizers.spec import TokenSpec

GRID = TokenSpec(grid=(4, 6), vocab=(8,))
ROW = TokenSpec(grid=(8,), vocab=(4,), order='nested')
DEEP = TokenSpec(grid=(2, 2), vocab=(4, 4, 4, 4), order='depth')


def hidden(spec, hide, share, n=3, seed=0):
  mask = infill.known_mask(spec, hide, share, np.arange(n), seed)
  assert mask.shape == (n, spec.length, spec.depth) and mask.dtype == bool
  return ~mask


def test_regions_are_where_their_names_say():
  def cells(hide, share=0.5):
    return hidden(GRID, hide, share)[0, :, 0].reshape(4, 6)

  rows, columns = np.mgrid[:4, :6]
  np.testing.assert_array_equal(cells('top'), rows < 2)
  np.testing.assert_array_equal(cells('bottom', 0.25), rows == 3)
  np.testing.assert_array_equal(cells('left'), columns < 3)
  np.testing.assert_array_equal(cells('right', 1 / 3), columns >= 4)
  np.testing.assert_array_equal(
      cells('center', 0.25), (rows > 0) & (rows < 3) & (columns > 1) & (columns < 4))
  np.testing.assert_array_equal(cells('border', 0.75), ~cells('center', 0.25))
  np.testing.assert_array_equal(
      hidden(ROW, 'last', 0.25)[0, :, 0], np.arange(8) >= 6)
  np.testing.assert_array_equal(hidden(ROW, 'right', 0.25), hidden(ROW, 'last', 0.25))
  np.testing.assert_array_equal(
      hidden(DEEP, 'depth', 0.75)[0], np.broadcast_to(np.arange(4) >= 1, (4, 4)))


def test_random_positions_are_of_the_example_and_of_one_number():
  found = hidden(GRID, 'random', 0.25, n=40)
  assert (found.sum((1, 2)) == 6).all()
  assert len(np.unique(found.reshape(40, -1), axis=0)) > 30
  alone = ~infill.known_mask(GRID, 'random', 0.25, np.array([7]))
  np.testing.assert_array_equal(alone[0], found[7])
  assert (hidden(GRID, 'random', 0.25, seed=1) != found[:3]).any()
  assert 5 < found.mean(0).max() * 40 < 22  # every position has its turn: 10 of 40 on average


@pytest.mark.parametrize('hide, share, message', [
    ('middle', 0.5, "hide='middle' is not one of center"), ('left', 0.0, 'above 0'),
    ('left', 1.0, 'below 1'), ('center', 0.01, 'hides nothing'), ('depth', 0.1, 'hides nothing')])
def test_what_hides_nothing_is_refused(hide, share, message):
  with pytest.raises(ValueError, match=message):
    infill.known_mask(GRID, hide, share, np.arange(2))


def test_hidden_pixels_are_gray_and_known_ones_as_they_were():
  images = np.random.default_rng(0).integers(0, 100, (2, 8, 12, 3), np.uint8)
  mask = infill.known_mask(GRID, 'left', 0.5, np.arange(2))
  found = infill.blanked(GRID, images, mask)
  assert (found[:, :, :6] == 128).all()
  np.testing.assert_array_equal(found[:, :, 6:], images[:, :, 6:])
  assert infill.blanked(ROW, images, np.ones((2, 8, 1), bool)) is None


@pytest.fixture(scope='module')
def generator(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  train(digits_vq.get_config('debug'), folder / 'tokenizer')
  experiment = digits_masked.get_config('debug')
  experiment.tokenizer = str(folder / 'tokenizer')
  train(experiment, folder / 'generator')
  return folder / 'generator'


def test_a_run_completes_its_held_out_examples(generator, capfd):
  assert cli.main(['infill', f'--workdir={generator}', '--n=20', '--draws=2', '--hide=bottom',
                   '--settings.sampler=first_hitting', '--settings.guidance=2',
                   f'--results={generator}/infilling.json']) == 0
  assert 'class read off' in capfd.readouterr().err
  (path,) = (generator / 'infills').glob('*.png')
  item = json.loads(path.with_suffix('.json').read_text())
  recorded = provenance.load(generator / 'infilling.json')['results']['infilling']
  assert recorded == {**item, 'generator': '.../generator'}
  assert item['exact'] == 1.0 and item['hide'] == 'bottom' and item['n'] == 20
  shares = item['agreement']
  assert set(shares) == {'completed', 'true', 'another'}
  arrays = np.load(path.with_suffix('.npz'))
  assert arrays['arr_0'].shape == (20, 8, 8, 1) and arrays['tokens'].shape == (20, 16, 1)
  assert arrays['known_mask'].sum() == 20 * 8
  assert Image.open(path).size[0] > 5 * 64  # example, known, decoded and two draws
  assert history.read('run', generator).pictures['infills'] == [path]


def test_all_that_is_hidden_is_drawn_and_guided_only_by_a_condition():
  asked = AutoregressiveSettings(keep=2, guidance=3.0, temperature=0.5)
  assert infill._whole(asked, True) == dataclasses.replace(asked, keep=None)
  assert infill._whole(asked, False) == AutoregressiveSettings(temperature=0.5)


@pytest.mark.parametrize('n', [2, 3, 4, 5, 64])
def test_another_example_is_never_the_same(n):
  found = infill.others(np.arange(n))
  assert sorted(found) == list(range(n)) and (found != np.arange(n)).all()


def test_one_example_has_no_other(generator, capfd, tmp_path):
  assert cli.main(['infill', f'--workdir={generator}', '--n=1', '--draws=1', '--share=0.25',
                   f'--results={tmp_path}/infilling.json']) == 0
  item = provenance.load(tmp_path / 'infilling.json')['results']['infilling']
  assert set(item['agreement']) == {'completed', 'true'}


def test_help_lists_the_settings_of_a_run(generator, capfd):
  for verb in ('sample', 'sweep'):
    assert cli.main([verb, f'--workdir={generator}', '--help']) == 0
    assert '--settings.temperature=1.0  see' in capfd.readouterr().out
  assert cli.main(['reconstruct', f'--workdir={generator.parent}/tokenizer', '--help']) == 0
  assert 'tokenizer has no settings.' in capfd.readouterr().out
  assert cli.main(['sample', '--help']) == 0
  assert 'With --workdir=RUN its settings' in capfd.readouterr().out


def test_known_tokens_that_change_are_an_error_of_ours(generator, monkeypatch):
  from smalti.launch import run as runs
  loaded = runs.load(generator)
  tokens = np.zeros((4, 16, 1), np.int32)
  mask = infill.known_mask(loaded.spec, 'left', 0.5, np.arange(4))
  real = infill.generate
  monkeypatch.setattr(infill, 'generate', lambda *a, known_mask, **k: real(
      *a, known_mask=~known_mask, **k))
  settings = loaded.model.settings(temperature=3.0)
  with pytest.raises(RuntimeError, match='known token'):
    infill.complete(loaded, tokens, mask, None, settings=settings, seed=0)


@pytest.mark.parametrize('verb, remedy', [
    ('infill', 'with --conditional'), ('probe', 'probe its tokenizer')])
def test_a_generator_that_was_always_told_the_class_is_told_it(
    generator, capfd, monkeypatch, verb, remedy):
  from smalti.launch import run as runs
  load = runs.load

  def told(*arguments, **options):
    loaded = load(*arguments, **options)
    if hasattr(loaded.model, 'label_dropout'):
      loaded.model.label_dropout = 0.0
    return loaded

  monkeypatch.setattr(runs, 'load', told)
  assert cli.main([verb, f'--workdir={generator}']) == 2
  line = capfd.readouterr().err.strip().splitlines()[-1]
  assert 'label_dropout=0 never trains the null condition' in line and remedy in line


def test_refusals_are_one_line(generator, capfd):
  assert cli.main(['infill']) == 2
  assert cli.main(['infill', f'--workdir={generator}', '--share=1.5']) == 2
  tokenizer = generator.parent / 'tokenizer'
  assert cli.main(['infill', f'--workdir={tokenizer}']) == 2
  lines = capfd.readouterr().err.strip().splitlines()
  assert [bool(word in line) for word, line in zip(
      ('--workdir', 'below 1', 'infill with a generator'), lines)] == [True] * 3


def test_stored_tokens_whose_tokenizer_is_a_file_need_its_run(generator, capfd, tmp_path):
  run = generator.parent / 'tokenizer'
  path, tokens = tmp_path / 'tokenizer.safetensors', tmp_path / 'tokens'
  assert cli.main(['export', f'--workdir={run}', f'--out={path}']) == 0
  assert cli.main(['tokenize', f'--workdir={path}', '--data=digits_vq', f'--out={tokens}']) == 0
  experiment = digits_masked.get_config('debug')
  experiment.tokenizer, experiment.data = str(path), TokensConfig(path=str(tokens))
  train(experiment, tmp_path / 'run')
  capfd.readouterr()
  assert cli.main(['infill', f'--workdir={tmp_path / "run"}', '--n=2', '--draws=1']) == 2
  line = capfd.readouterr().err.strip().splitlines()[-1]
  assert 'tokenizer.safetensors is an exported file and knows no images; name the run' in line
  assert cli.main(['infill', f'--workdir={tmp_path / "run"}', '--n=2', '--draws=1',
                   f'--tokenizer={run}']) == 0
