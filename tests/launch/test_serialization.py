"""JSON of configs: round trips, checks by annotation, and hostile files."""

import dataclasses
import importlib
import json
import math
import sys
from typing import Literal

import pytest

from smalti.data.source import DataConfig
from smalti.launch import trees
from smalti.launch.experiment import Experiment, OptimizerConfig
from smalti.launch.serialization import check, describe, differences, from_json, to_json
from smalti.networks.model import ModelConfig
from smalti.tokenizers.spec import TokenSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class PartConfig:
  width: int = 8
  inner: 'PartConfig | None' = None


@dataclasses.dataclass(kw_only=True, slots=True)
class DeepPartConfig(PartConfig):
  depth: int = 2


@dataclasses.dataclass(kw_only=True, slots=True)
class ProbeConfig(ModelConfig):
  sizes: tuple[int, ...] = (8, 5)
  betas: tuple[float, float] = (0.9, 0.95)
  pairs: tuple[tuple[int, int], ...] = ((1, 2),)
  kind: Literal['a', 'b'] = 'a'
  order: Literal[1, 2] = 1
  clip: float | None = None
  part: PartConfig = dataclasses.field(default_factory=DeepPartConfig)
  parts: tuple[PartConfig, ...] = ()
  flag: bool = False
  name: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSettings:
  steps: int = 8
  temperature: float = 1.0


@dataclasses.dataclass(kw_only=True, slots=True)
class StrangeConfig(ModelConfig):
  table: dict[str, int] = dataclasses.field(default_factory=dict)


PLUGINS = (__name__,)
LOCAL = OptimizerConfig  # an import of this module, which is not its own


def probe(**fields) -> Experiment:
  return Experiment(model=ProbeConfig(**fields), data=DataConfig(), settings=ProbeSettings())


def written(**fields) -> dict:
  return json.loads(json.dumps(to_json(probe(**fields)), allow_nan=False))


def test_json_round_trip_keeps_every_value_and_class():
  experiment = probe(
      sizes=(), pairs=((1, 2), (3, 4)), clip=0.5, kind='b', flag=True, name='é "quoted"\n',
      part=PartConfig(inner=DeepPartConfig(depth=7)), parts=(PartConfig(), DeepPartConfig(depth=3)))
  experiment.discriminator = OptimizerConfig(rate=1e-30)
  experiment.published.spec = TokenSpec(grid=(4, 4), vocab=(16,), eos=15)
  back = from_json(json.loads(json.dumps(to_json(experiment))), Experiment, PLUGINS)
  assert back == experiment
  assert [type(p) for p in back.model.parts] == [PartConfig, DeepPartConfig]
  assert type(back.model.part.inner) is DeepPartConfig
  assert to_json(back) == to_json(experiment)


def test_whole_numbers_in_float_fields_become_floats():
  item = to_json(probe(betas=(0, 1), clip=2))
  assert [type(v) for v in (*item['model']['betas'], item['model']['clip'])] == [float] * 3
  item['model']['clip'] = 3
  assert type(from_json(item, Experiment, PLUGINS).model.clip) is float


def test_missing_fields_take_their_defaults():
  item = written(kind='b')
  del item['model']['sizes'], item['optimizer'], item['seed']
  assert from_json(item, Experiment, PLUGINS) == probe(kind='b')


@pytest.mark.parametrize('name', trees.packaged())
def test_packaged_configs_round_trip(name):
  """Every size of every packaged config passes the check and survives JSON unchanged."""
  module = importlib.import_module(f'smalti.configs.{name}')
  for size in module.SIZES:
    experiment = trees.load_config(f'{name}:{size}')
    check(experiment)
    item = to_json(experiment)
    back = from_json(json.loads(json.dumps(item, allow_nan=False)), Experiment)
    assert back == experiment
    assert differences(item, to_json(back)) == []


@pytest.mark.parametrize('path, value, fragment', [
    ('model.sizes', [1.5], 'model.sizes[0] must be a whole number, got 1.5'),
    ('model.sizes', [True], 'model.sizes[0]'),
    ('model.sizes', '12', 'model.sizes must be a tuple of whole numbers'),
    ('model.betas', [0.1], 'tuple of length 2'),
    ('model.betas', [0.1, 'x'], 'model.betas[1]'),
    ('model.pairs', [[1, 2], [1]], 'model.pairs[1] must be a tuple of length 2'),
    ('model.kind', 'c', 'one of a, b'),
    ('model.order', True, 'one of 1, 2'),
    ('model.order', 1.0, 'one of 1, 2'),
    ('model.clip', 'none', 'a finite number or none'),
    ('model.clip', math.inf, 'model.clip'),
    ('model.clip', math.nan, 'model.clip'),
    ('model.flag', 1, 'true or false'),
    ('model.part', None, 'model.part must be a PartConfig'),
    ('model.part', 3, 'model.part must be a PartConfig'),
    ('steps', 10.0, 'steps must be a whole number'),
    ('steps', True, 'steps must be a whole number'),
    ('steps', None, 'steps must be a whole number'),
    ('optimizer.rate', '1e-3', 'optimizer.rate must be a finite number'),
])
def test_fields_are_checked_live_and_in_json(path, value, fragment):
  """The same rule and message for a live tree and for JSON."""
  *parents, name = path.split('.')
  item, live = written(), probe()
  node, holder = item, live
  for parent in parents:
    node, holder = node[parent], getattr(holder, parent)
  node[name] = value
  setattr(holder, name, _tuples(value))
  for attempt in (lambda: from_json(item, Experiment, PLUGINS), lambda: check(live),
                  lambda: to_json(live)):
    with pytest.raises(ValueError) as info:
      attempt()
    assert fragment.partition(', got')[0] in str(info.value)
    assert '\n' not in str(info.value)


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def test_unknown_fields_are_refused_with_the_nearest():
  item = written()
  item['optimizer']['rat'] = 1.0
  with pytest.raises(ValueError, match="optimizer has no field 'rat'.*did you mean 'rate'"):
    from_json(item, Experiment, PLUGINS)


def test_missing_required_fields_are_named():
  item = written()
  del item['data']
  with pytest.raises(ValueError, match='lacks data of Experiment'):
    from_json(item, Experiment, PLUGINS)


def test_a_class_that_checks_itself_is_told_where_it_sits():
  item = written()
  item['published']['spec'] = {'type': 'smalti.tokenizers.spec:TokenSpec', 'grid': [4], 'vocab': []}
  with pytest.raises(ValueError, match=r'published\.spec: vocab=\(\)'):
    from_json(item, Experiment, PLUGINS)


@pytest.mark.parametrize('hostile', [
    'os:system', 'subprocess:Popen', 'builtins:exec', 'antigravity:X', 'this:X',
    'smalti.setup:setup', 'smalti:data', 'smalti.launch.cli:os', 'smalti.launch.cli:main',
    'smalti.launch.experiment:TokenSpec',             # imported there, not defined there
    'smalti.launch.experiment:OptimizerConfig',       # of ours, but no ModelConfig
    'smalti.launch.nowhere:X', 'smalti.launch.experiment:Nothing',
    'smalti.networks..model:ModelConfig', 'smalti.networks.model:ModelConfig.__init__',
    '../evil:X', 'a b:c', ':X', 'x:', '', None, 7, ['os:system'], {'type': 'os:system'},
])
def test_hostile_types_are_refused_without_import(hostile):
  item = written()
  item['model']['type'] = hostile
  before = set(sys.modules)
  with pytest.raises(ValueError) as info:
    from_json(item, Experiment, PLUGINS)
  assert '\n' not in str(info.value) and str(info.value).startswith('model ')
  assert not {'antigravity', 'this', 'smalti.setup'} & (set(sys.modules) - before)


def test_other_modules_need_a_plugin(tmp_path, monkeypatch):
  """Without --plugin the module is not even imported; with it, only config classes are taken."""
  (tmp_path / 'probe_hostile.py').write_text(
      'import dataclasses, pathlib\n'
      'from smalti.networks.model import ModelConfig\n'
      f'pathlib.Path({str(tmp_path / "executed")!r}).touch()\n'
      'def f(): raise SystemExit\n'
      '@dataclasses.dataclass(kw_only=True, slots=True)\n'
      'class Mine(ModelConfig):\n  width: int = 1\n'
      '@dataclasses.dataclass\n'
      'class Foreign:\n  width: int = 1\n')
  monkeypatch.syspath_prepend(tmp_path)
  item = written()
  item['model'] = {'type': 'probe_hostile:Mine', 'width': 3}
  with pytest.raises(ValueError, match='--plugin=probe_hostile'):
    from_json(item, Experiment, PLUGINS)
  assert not (tmp_path / 'executed').exists()
  assert from_json(item, Experiment, (*PLUGINS, 'probe_hostile')).model.width == 3
  for name in ('f', 'Foreign', 'pathlib', 'ModelConfig'):
    item['model'] = {'type': f'probe_hostile:{name}'}
    with pytest.raises(ValueError, match='model'):
      from_json(item, Experiment, (*PLUGINS, 'probe_hostile'))


def test_classes_that_cannot_be_found_again_are_refused():
  @dataclasses.dataclass(kw_only=True, slots=True)
  class Hidden(ModelConfig):
    pass

  with pytest.raises(ValueError, match='could not be found again'):
    to_json(Experiment(model=Hidden(), data=DataConfig()))


def test_annotations_outside_the_agreement_are_our_mistake():
  with pytest.raises(TypeError, match='model.table'):
    check(Experiment(model=StrangeConfig(), data=DataConfig()))


def test_differences_name_paths_and_both_values():
  a, b = written(), written(sizes=(8, 6), parts=(PartConfig(),))
  b['steps'], b['model']['part']['depth'] = 7, 9
  del b['seed']
  found = differences(a, b)
  assert found == [
      'model.sizes: [8, 5] -> [8, 6]', 'model.part.depth: 2 -> 9',
      f"model.parts: [] -> {b['model']['parts']}",
      'steps: 1000 -> 7', 'seed: 0 -> absent']
  assert [line.partition(':')[0] for line in differences(b, a)] == [
      'model.sizes', 'model.part.depth', 'model.parts', 'steps', 'seed']
  b['model'] = {'type': 'other:Model', 'width': 1}
  assert f'model.type: {__name__}:ProbeConfig -> other:Model' in differences(a, b)
  assert differences({'x': 1}, {'x': 1.0}) == []
  assert differences({'x': 1}, {'x': True}) == ['x: 1 -> True']


def test_annotations_in_words():
  assert describe(tuple[int, ...] | None) == 'a tuple of whole numbers or none'
  assert describe(Literal['x', 'y']) == 'one of x, y'
