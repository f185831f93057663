"""Studies: rows that are trained once, recorded, completed later, and summarised over seeds."""

import dataclasses
import json

import pytest

from smalti.configs import digits_fsq
from smalti.launch import cli, locks, provenance, study, trees
from smalti.launch.study import Study, definition, execute, summarize
from smalti.tokenizers.scalar import FSQConfig

CONFIG = '''
import dataclasses
from smalti.configs import digits_fsq
SIZES = {'debug': None}
def get_sweep(size='debug'):
  row = digits_fsq.get_config(size)
  return {'fsq': row, 'fsq/1': dataclasses.replace(row, seed=1),
          'wide': dataclasses.replace(row, batch_size=32)}
'''


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'rows.py'
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture
def scored(monkeypatch):
  """Rows are not trained: each is worth ten times its seed, and one more."""
  run = []

  def fake(self, row, judge):
    experiment = self.rows[row]
    run.append(row)
    if experiment.batch_size == 999:
      raise ValueError('broken')
    provenance.record(self.path(row), 'x', {
        'row': row.partition('/')[0], 'seed': experiment.seed, 'bits': 32.0,
        'psnr': 1 + 10. * experiment.seed, 'rfd_net_0': 2.0,
        'curve': [{'step': 200, 'usage': .1}, {'step': 400, 'usage': .2 + .2 * experiment.seed}],
    }, definition=self.definition(row))

  monkeypatch.setattr(Study, 'run', fake)
  monkeypatch.setattr(study, 'open_judge', lambda *_, **__: None)
  return run


def plan(tmp_path, **changes):
  rows = trees.load_sweep(str(tmp_path / 'rows.py'))
  return Study('rows', {**rows, **changes}, tmp_path / 'out', tmp_path / 'results')


def test_a_row_is_run_once_and_again_when_it_means_something_else(tmp_path, config, scored):
  first = plan(tmp_path)
  assert execute(first, list(first.rows)) == 0 and scored == ['fsq', 'fsq/1', 'wide']
  assert execute(first, list(first.rows)) == 0 and len(scored) == 3
  longer = dataclasses.replace(first.rows['wide'], steps=3)
  execute(plan(tmp_path, wide=longer), ['wide'])
  assert scored[3:] == ['wide']


def test_other_tokens_are_another_row_of_the_generator(tmp_path, config):
  from smalti.configs import generators
  rows = generators.get_sweep()
  study = Study('x', rows, tmp_path, tmp_path)
  longer = dataclasses.replace(rows['tokens vq'], steps=7)
  other = Study('x', {**rows, 'tokens vq': longer}, tmp_path, tmp_path)
  changed = {row for row in rows if study.definition(row) != other.definition(row)}
  assert changed == {'tokens vq', *(row for row in rows if rows[row].tokenizer == 'row:tokens vq')}
  assert len(changed) > 5
  assert study.definition('masked halton', settings=False) == study.definition(
      'masked', settings=False) != study.definition('masked halton')


def test_tables_have_means_over_seeds_and_rows_that_were_not_run(tmp_path, config, scored):
  asked = plan(tmp_path)
  execute(asked, ['fsq', 'fsq/1'])
  rows = json.loads((tmp_path / 'results.json').read_text())['results']
  assert rows['fsq']['psnr'] == {'mean': 6.0, 'deviation': 50 ** 0.5, 'text': '6.000 ± 7.071'}
  assert rows['fsq']['rfd']['name'] == 'rfd_net_0' and rows['fsq']['seeds'] == 2
  first, last = rows['fsq']['curve']
  assert (first['step'], first['usage']['text'], last['step']) == (200, '0.100 ± 0.000', 400)
  assert last['usage']['mean'] == pytest.approx(.3)
  assert rows['wide'] == {'seeds': 0, 'planned': 1, 'state': 'not run'}


def test_a_row_that_fails_leaves_the_others(tmp_path, config, scored):
  asked = plan(tmp_path)
  asked.rows['fsq'].batch_size = 999
  assert execute(asked, list(asked.rows)) == 1 and scored == ['fsq', 'fsq/1', 'wide']
  assert 'broken' in (tmp_path / 'out' / 'errors' / 'fsq.txt').read_text()
  rows = summarize(asked)
  assert rows['fsq']['seeds'] == 1 and rows['fsq']['planned'] == 2 and rows['wide']['seeds'] == 1


def test_workers_share_the_rows(tmp_path, config, scored):
  asked = plan(tmp_path)
  for worker in (1, 0):
    execute(asked, list(asked.rows), worker=worker, workers=2)
  assert scored == ['fsq/1', 'fsq', 'wide']


def test_definitions_are_of_what_differs_from_the_defaults():
  @dataclasses.dataclass(kw_only=True)
  class FSQConfigLater(FSQConfig):
    added: int = 0

  FSQConfigLater.__name__ = 'FSQConfig'
  row = digits_fsq.get_config('debug')
  same, other = (dataclasses.replace(row, model=dataclasses.replace(
      row.model, quantizer=FSQConfigLater(levels=row.model.quantizer.levels, added=added)))
      for added in (0, 1))
  assert definition(same) == definition(row) != definition(other)


def test_mistakes_are_one_line(tmp_path, config, capsys):
  assert cli.main(['sweep', f'--config={config}', '--rows=no']) == 2
  assert 'no are not in' in capsys.readouterr().err
  assert cli.main(['sweep', '--config=digits_fsq']) == 2
  assert 'has no get_sweep(size)' in capsys.readouterr().err
  assert cli.main(['sweep', f'--config={config}', '--config.steps=3']) == 2
  assert 'no place in a sweep' in capsys.readouterr().err
  assert cli.main(['sweep', f'--config={config}', '--workdir=runs/x']) == 2
  assert 'not both' in capsys.readouterr().err
  assert cli.main(['sweep', f'--config={config}', '--dry_run', f'--out={tmp_path}']) == 0
  assert 'to do' in capsys.readouterr().err


@pytest.mark.slow
def test_rows_are_trained_scored_and_gone_on_with(tmp_path, config):
  out = tmp_path / 'out'
  assert cli.main(['sweep', f'--config={config}', f'--out={out}', '--rows=fsq']) == 0
  found = json.loads((out / 'results' / 'fsq.json').read_text())
  assert {'psnr', 'ssim_w7', 'usage', 'perplexity', 'bits'} <= set(found['results'])
  assert found['experiment']['steps'] == 2 and len(found['definition']) == 12
  rows = json.loads((out / 'results.json').read_text())['results']
  assert rows['wide']['state'] == 'not run' and rows['mean image']['state'] == 'baseline'


def test_samplers_of_one_model_share_its_run(tmp_path, monkeypatch):
  from smalti.configs import digits_masked
  from smalti.generators.unmasking import MaskedSettings
  row = digits_masked.get_config('debug')
  rows = {'masked': row,
          'ancestral': dataclasses.replace(row, settings=MaskedSettings(sampler='ancestral')),
          'more': dataclasses.replace(row, steps=3)}
  monkeypatch.setattr(study, 'train', lambda *_: None)
  folders = [Study('rows', rows, tmp_path, tmp_path).trained(name) for name in rows]
  assert folders[0] == folders[1] != folders[2]


def test_a_worker_comes_back_to_rows_that_another_holds(tmp_path, config, monkeypatch, capsys):
  monkeypatch.setattr(study, 'open_judge', lambda *_, **__: None)
  asked, run = plan(tmp_path), []

  def fake(self, row, judge):
    if row == 'fsq':  # the first worker trains the tokenizer of a row of the second
      with pytest.raises(pytest.fail.Exception, match='not for ever'):
        with monkeypatch.context() as patch:
          patch.setattr(locks.time, 'sleep', lambda _: pytest.fail('not for ever', pytrace=False))
          patch.setattr(Study, '_run', record)
          execute(asked, ['wide', 'fsq', 'fsq/1'])
    record(self, row, judge)

  def record(self, row, judge):
    run.append(row)
    provenance.record(self.path(row), 'x', {'psnr': 1.0}, definition=self.definition(row))

  monkeypatch.setattr(Study, '_run', fake)
  assert execute(asked, ['fsq', 'fsq/1']) == 0
  assert run == ['wide', 'fsq/1', 'fsq']
  assert 'is held by process' in capsys.readouterr().err


def test_a_summary_names_the_commits_and_the_time_of_its_rows(tmp_path, config, scored):
  asked = plan(tmp_path)
  execute(asked, ['fsq', 'wide'])
  for row, commit, seconds in (('fsq', 'a' * 40, 600), ('wide', 'b' * 40, 30)):
    found = provenance.load(asked.path(row))
    asked.path(row).write_text(json.dumps({**found, 'commit': commit, 'modified': False,
                                           'seconds': seconds, 'date': f'2001-01-0{len(row)}'}))
  summarize(asked)
  found = provenance.load(asked.summary)
  assert found['commits'] == ['a' * 10, 'b' * 10]
  assert (found['seconds'], found['date']) == (630, '2001-01-04')
  assert provenance.commits(found) == f'commits {"a" * 10}, {"b" * 10}'


@pytest.mark.slow
def test_a_generator_waits_for_its_tokenizer_and_samplers_share_its_run(tmp_path, monkeypatch):
  from smalti.configs import digits_masked, digits_vq
  from smalti.generators.unmasking import MaskedSettings
  monkeypatch.setattr(study, 'IMAGES', 96)
  masked = dataclasses.replace(digits_masked.get_config('debug'), tokenizer='row:tokens')
  rows = {'tokens': digits_vq.get_config('debug'), 'masked': masked,
          'masked ancestral': dataclasses.replace(
              masked, settings=MaskedSettings(sampler='ancestral', steps=5))}
  asked = Study('rows', rows, tmp_path / 'out', tmp_path / 'results')
  assert execute(asked, ['masked ancestral', 'masked']) == 0
  assert len(list((tmp_path / 'out' / 'runs').iterdir())) == 2  # one tokenizer, one generator
  found = {row: provenance.load(asked.path(row))['results'] for row in list(rows)[1:]}
  for row in found.values():
    assert {'fd', 'fd_floor', 'unigram', 'neighbours', 'class_agreement',
            'nearest_train_ratio', 'images_per_second'} <= set(row)
    assert row['likelihood'] == 'bound'
  same = [row['bits_per_token_held_out'] for row in found.values()]
  assert same[0] == same[1]  # the likelihood is the model's, the samples are the sampler's
  assert found['masked']['fd'] != found['masked ancestral']['fd']
  assert found['masked ancestral']['nfe'] == 5
  assert asked.path('masked').with_suffix('.png').exists()
  table = summarize(asked)
  assert table['tokens']['state'] == 'not run' and table['masked']['likelihood'] == 'bound'
  with pytest.raises(ValueError, match='not among the rows'):
    Study('rows', {'masked': masked}, tmp_path / 'out', tmp_path).trained('masked')


def test_a_row_with_budgets_is_that_of_all_codes():
  row = {'seed': 0, 'psnr_keep1': 9.0, 'psnr_keep14': 20.0, 'rfd_x_keep1': 3.0, 'rfd_x_keep14': 1.0}
  assert study._whole(row) == {'seed': 0, 'psnr': 20.0, 'rfd_x': 1.0}
  assert study._whole({'psnr': 1.0}) == {'psnr': 1.0}
