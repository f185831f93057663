"""The report: opens from disk, links only to what is there, survives what is missing or hostile."""

import json
import re
import shutil

import numpy as np
import pytest

from smalti.evaluation.manifest import Score, versions, write_scores
from smalti.launch import charts, cli, pictures, report

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)> & \'quotes\''


def score(name, value, **changes):
  return Score(**{**dict(
      name=name, value=value, unit='share', higher_is_better=True, samples=64, seeds=(0,),
      settings={'steps': 4}, weights='ema', model='0123 run@20', extractor=None, sha256=None,
      resize=None, uint8='round', reference='abcd', reference_samples=100, versions=versions(),
      beside={'floor': 0.25}), **changes})


@pytest.fixture
def run(tmp_path):
  """A run folder with everything, and a torn last line."""
  folder = tmp_path / 'run'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps({'format': 1, 'version': '0.1.0', 'experiment': {
      'type': 'smalti.launch.experiment:Experiment', 'steps': 20, 'batch_size': 64,
      'model': {'type': 'smalti.tokenizers.autoencoder:AutoencoderConfig', 'width': 32},
      'data': {'type': 'smalti.data.digits:DigitsConfig'}}}))
  lines = []
  for step in range(1, 21):
    lines.append({'step': step, 'loss': 2 / step, 'rate': 1e-3, 'examples/second': 900.0,
                  'seconds/step': .5, 'usage_0': .5, 'usage_1': .25})
    if step % 5 == 0:
      lines.append({'step': step, 'eval/loss': 2.5 / step, 'eval/examples': 360})
  lines.append({'step': 21, 'loss': 'nan'})
  text = '\n'.join(map(json.dumps, lines)) + '\n{"step": 22, "lo'
  (folder / 'metrics.jsonl').write_text(text)
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
  for step in (5, 10, 20):
    pictures.save_grid(folder / 'samples' / f'step{step}_seed0.png', images)
  (folder / 'samples' / 'step20_seed0.json').write_text(json.dumps(
      {'n': 4, 'seed': 0, 'settings': {'steps': 4, 'temperature': 0.5, 'top_k': None}}))
  pictures.save_grid(folder / 'reconstructions' / 'step20.png', images)
  write_scores(folder / 'scores.json', [score('class_agreement', .875)])
  return folder


def test_a_whole_run(run, read_page):
  path = report.write_report(run)
  assert path == run / 'report' / 'index.html'
  page = read_page(path)
  for text in ('Loss', 'held out', 'Learning rate', 'Usage', 'Samples', 'Reconstructions',
               'class_agreement', '0.875', 'floor 0.25', 'model.width', 'temperature 0.5',
               'Sampled with steps 4.',
               'Autoencoder on Digits, 20 steps, 64 examples per step', '10 s',
               '1 unreadable line was left out', 'loss was not finite, first at step 21'):
    assert text in page.text, text
  images = [link for link in page.links if link.endswith('.png')]
  assert images[0].endswith('samples-step20_seed0.png')  # the newest first, and large
  assert len(set(images)) == 4
  assert page.tags.count('figure') == 4 + 5  # loss, usage of two depths, rate and two speeds
  assert str(run) not in page.source
  assert report.write_report(run).read_text() == page.source  # the same run, the same page


def test_several_runs_on_one_page(run, tmp_path, read_page):
  other = tmp_path / 'other'
  shutil.copytree(run, other)
  write_scores(other / 'scores.json', [
      score('class_agreement', .5), score('copies', .1, higher_is_better=False, samples=9)])
  write_scores(run / 'scores_guided.json', [score('copies', .2, higher_is_better=False)])
  path = report.write_report(tmp_path / 'demo', [('First', run), ('Second', other)],
                             title='Both', text='One.\n\nTwo.')
  page = read_page(path)
  assert page.path == tmp_path / 'demo' / 'report' / 'index.html'
  assert {'#run0', '#run1'} <= set(page.links) and {'run0', 'run1'} <= set(page.ids)
  table = page.source[page.source.index('Side by side'):page.source.index('</table>')]
  assert table.count('value best') == 1  # class_agreement is ranked,
  assert '<span class="value best">0.875' in table
  assert '<th scope="col">First, guided</th>' in table and 'Scores, guided' in page.text
  assert 'not ranked: unlike samples' in table  # copies of 9 and of 64 samples are not


def test_what_people_write_is_text(run, tmp_path, read_page):
  config = json.loads((run / 'config.json').read_text())
  config['experiment']['model'][EVIL] = EVIL
  config['experiment']['model']['type'] = EVIL
  (run / 'config.json').write_text(json.dumps(config))
  with open(run / 'metrics.jsonl', 'w') as file:
    for step in (1, 2, 3):
      file.write(json.dumps({'step': step, EVIL: 1.5, f'eval/{EVIL}': 2.5, 'loss': 1}) + '\n')
    file.write(json.dumps({'step': 4, EVIL: 'inf'}) + '\n')
  write_scores(run / 'scores.json', [score(
      'copies', 1.0, unit=EVIL, reference=EVIL, model=EVIL, beside={EVIL: EVIL},
      settings={EVIL: EVIL})])
  name = EVIL.replace('/', '')
  shutil.copy(run / 'samples' / 'step20_seed0.png', run / 'samples' / f'step30{name}.png')
  (run / 'samples' / f'step30{name}.json').write_text(json.dumps({EVIL: EVIL, 'settings': {}}))
  page = read_page(report.write_report(tmp_path / 'out', [(EVIL, run)], title=EVIL, text=EVIL))
  assert page.text.count('<script>alert(1)') >= 8


@pytest.mark.parametrize('missing', ['config.json', 'metrics.jsonl', 'scores.json', 'samples',
                                     'reconstructions'])
def test_without_one_piece(run, missing, read_page):
  path = run / missing
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  read_page(report.write_report(run))


def test_an_empty_run(tmp_path, read_page):
  (tmp_path / 'metrics.jsonl').write_text('')
  assert 'logged nothing yet' in read_page(report.write_report(tmp_path)).text


@pytest.mark.parametrize('content', ['\n\n', '{}\n', '[1]\n{"step": "x"}\n', '{"step": 1}\n',
                                     '{"step": 1, "loss": 2}\n', '{"step": 1e999, "loss": 1}\n',
                                     '{"step": 1, "loss": [1], "a": null, "b": {}}\n', '\x00\xff'])
def test_odd_metrics(tmp_path, content, read_page):
  (tmp_path / 'metrics.jsonl').write_text(content, encoding='latin-1')
  read_page(report.write_report(tmp_path))


def test_damaged_pieces_are_named(run, read_page):
  (run / 'config.json').write_text('{"format": 1')
  (run / 'scores.json').write_text('{"format": 7, "scores": []}')
  (run / 'samples' / 'step99.png').write_bytes(b'GIF89a not a picture')
  page = read_page(report.write_report(run))
  for text in ('config.json could not be read', 'scores.json could not be read',
               'samples/step99.png is no picture'):
    assert text in page.text
  assert str(run) not in page.source


def test_a_missing_folder_is_one_line(tmp_path):
  with pytest.raises(FileNotFoundError, match='is no folder; give the --workdir'):
    report.write_report(tmp_path / 'nowhere')
  assert not (tmp_path / 'nowhere').exists()


def test_a_folder_that_is_no_run_keeps_the_page_it_has(tmp_path, capsys):
  page = tmp_path / 'report' / 'index.html'
  page.parent.mkdir()
  page.write_text('of a sweep')
  assert cli.main(['report', f'--workdir={tmp_path}']) == 2
  assert 'is no run' in capsys.readouterr().err and page.read_text() == 'of a sweep'


def test_long_curves_are_thinned_and_keep_their_ends():
  steps = np.arange(1, 10_001)
  few, values = charts.thin(steps, steps * 2.0)
  assert len(few) <= charts.POINTS and few[-1] == 10_000
  np.testing.assert_allclose(values, 2 * few, atol=2 * 25)
  spike = np.where(steps == 5000, 1e9, 1.0)
  assert charts.thin(steps, spike)[1].max() == 1  # a median: one bad step does not set the axis


@pytest.mark.parametrize('value, text', [
    (0.0, '0'), (3.0, '3'), (1234567.0, '1,234,567'), (1234.56, '1,235'),
    (0.000123456, '0.0001235'), (-2.5, '-2.5'), (float('inf'), 'inf')])
def test_numbers(value, text):
  assert charts.number(value) == text


def test_the_page_takes_its_colours_from_css():
  lines = [charts.Line('a', np.array([1, 2, 3]), np.array([1.0, 10.0, 100.0])),
           charts.Line('b', np.array([1, 3]), np.array([5.0, 5.0]), held_out=True)]
  out = charts.chart('Loss', lines, 'x')
  assert {'var(--line0)', 'var(--line1)', 'var(--rule)', 'currentColor'} <= set(
      re.findall(r'var\(--\w+\)|currentColor', out))
  assert not re.search(r'#[0-9a-f]{6}', out)
