"""Runs: a folder with `config.json`, `checkpoints/`, `metrics.jsonl`, `samples/`, `report/`.

`load` opens what a tokenizer reference may name: a run folder (`RUN`, `RUN@STEP`), an exported file
(.safetensors), a folder of stored tokens, which names the tokenizer it was made with, or
`pixels:HxWxC`, the levels of an image themselves, for which nothing was trained.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from flax import nnx

import smalti
from smalti.evaluation import files
from smalti.generators.generator import GeneratorConfig
from smalti.launch import manifest, serialization, state as states
from smalti.launch.checkpoint import Checkpoints
from smalti.launch.experiment import Experiment
from smalti.launch.tracker import redact
from smalti.networks.model import ModelConfig
from smalti.tokenizers.pixels import PixelsConfig
from smalti.tokenizers.spec import TokenSpec

FORMAT = 1
# What may differ when a run is continued; everything else defines another run.
FREE = ('steps', 'log', 'checkpoint', 'eval', 'mesh', 'tokenizer')


@dataclasses.dataclass
class Loaded:
  """A trained model and where it came from.

  Attributes:
    model: the module, with averaged weights where the run keeps them.
    config: its component config, as released: without a discriminator.
    stored: the JSON of `config` as the version that trained it wrote it, which is what fingerprints
      are over: a field that a later version adds changes none.
    spec: its tokens; None for what has none, such as a classifier.
    fingerprint: 16 hex digits over config, leaves and spec; for generators, that of the tokenizer
      they were trained on.
    experiment: the run's experiment, or None for an exported file and for pixels.
    step: the checkpoint's step.
    path: the run folder or file; of pixels, the reference.
    weights: 'ema' or 'raw'.
  """
  model: Any
  config: ModelConfig
  stored: dict
  spec: TokenSpec | None
  fingerprint: str
  experiment: Experiment | None
  step: int
  path: pathlib.Path
  weights: str

  @property
  def identity(self) -> str:
    """What names these very weights, in hex: the checkpoint's manifest, or the exported file."""
    if self.experiment is not None:
      return manifest.identity(self.path / 'checkpoints' / str(self.step))
    if self.path.is_file():
      return hashlib.sha256(self.path.read_bytes()).hexdigest()
    return self.fingerprint

  @property
  def data(self) -> Any:
    """The config of the data it was trained on.

    Raises:
      ValueError: an exported file, or pixels, which have none.
    """
    if self.experiment is None:
      raise ValueError(f'{self.path} is an exported file without data; name a run folder.')
    return self.experiment.data


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new one, never half of it."""
  with files.whole(path) as file:
    file.write((json.dumps(value, indent=2, sort_keys=True) + '\n').encode())


def check_format(item: dict, path: Any) -> None:
  """Refuses a format this version does not know, with the version that wrote it."""
  if item.get('format') != FORMAT:
    raise ValueError(
        f'{path} has format {item.get("format")}, written by smalti {item.get("version", "?")}; '
        f'smalti {smalti.__version__} reads format {FORMAT}: use the version that wrote it.')


def read_config(workdir: pathlib.Path) -> dict:
  """The JSON of `config.json`; one line where it is missing or unreadable."""
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    raise FileNotFoundError(f'{workdir} is not a run: it has no config.json; train one into it.')
  try:
    item = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}); restore it from a copy of the run.') from error
  if not isinstance(item, dict):
    raise ValueError(f'{path} is no config of a run; restore it from a copy of the run.')
  check_format(item, path)
  return item


def read_experiment(workdir: pathlib.Path) -> Experiment:
  return serialization.from_json(read_config(workdir)['experiment'], Experiment)


def check_config(workdir: pathlib.Path, experiment: Experiment, *, started: bool
                 ) -> list[str] | None:
  """What `experiment` changes of the run's `config.json`, a line each; None where it is a new run.

  Args:
    started: whether a checkpoint was committed; before that, any config may replace the old one.

  Raises:
    ValueError: the config differs in what defines the run, with the differing fields.
  """
  if not (workdir / 'config.json').exists() or not started:
    return None
  # through the reader, so that fields which the writer did not know have their defaults
  changes = serialization.differences(
      serialization.to_json(read_experiment(workdir)), redact(serialization.to_json(experiment)))
  refused = [c for c in changes if c.split(':')[0].split('.')[0] not in FREE]
  if refused:
    raise ValueError(
        f'{workdir} holds a run with another config ({"; ".join(refused)}); '
        'use another --workdir, or the same config to resume.')
  return changes


def write_config(workdir: pathlib.Path, experiment: Experiment, changes: list[str] | None) -> None:
  """Writes what `check_config` found; changes are appended to `config_history.jsonl`."""
  if jax.process_index() or changes == []:
    return
  new = redact(serialization.to_json(experiment))
  if changes:
    new['model'] = read_config(workdir)['experiment']['model']
    with open(workdir / 'config_history.jsonl', 'a') as file:
      file.write(json.dumps({'version': smalti.__version__, 'changes': changes}) + '\n')
  write_json(workdir / 'config.json',
             {'format': FORMAT, 'version': smalti.__version__, 'experiment': new})


def build(config: Any, spec: TokenSpec | None, rngs: nnx.Rngs) -> Any:
  """The module of a component config; generators are built for the tokens of `spec`."""
  if not isinstance(config, GeneratorConfig):
    return config.build(rngs=rngs)
  if spec is None:
    raise ValueError(
        f'{type(config).__name__} needs the tokens of a tokenizer; '
        'name one with --config.tokenizer=RUN.')
  return config.build(spec, rngs=rngs)


def kind(model: Any) -> str:
  """'tokenizer', 'generator', or for whatever has no tokens the name of its class: 'classifier'."""
  return ('tokenizer' if hasattr(model, 'encode') else
          'generator' if hasattr(model, 'sample') else type(model).__name__.lower())


def fingerprint(stored: dict, spec: TokenSpec | None, *leaves: dict) -> str:
  """16 hex digits of SHA-256 over config JSON, leaves in path order (little-endian), any spec."""
  digest = hashlib.sha256(json.dumps(stored, sort_keys=True).encode())
  for tree in leaves:
    for path, leaf in sorted(states.paths(tree).items()):
      array = np.asarray(leaf)
      digest.update(path.encode() + str(array.dtype).encode() + str(array.shape).encode())
      digest.update(np.ascontiguousarray(
          array.astype(array.dtype.newbyteorder('<'), copy=False)).tobytes())
  if spec is not None:
    digest.update(spec.to_json().encode())
  return digest.hexdigest()[:16]


def load(reference: str | os.PathLike, *, weights: str = 'ema', whole: bool = False) -> Loaded:
  """Opens a run folder (`RUN`, `RUN@STEP`), an exported file, a token folder's tokenizer or pixels.

  `RUN` is its best checkpoint if it tracks a metric, else its newest.

  Args:
    weights: 'ema' takes averaged weights where the run keeps them, 'raw' the last.
    whole: with the discriminator that a tokenizer's run has, to train it further.

  Raises:
    FileNotFoundError: nothing is there, or no checkpoint was committed.
    ValueError: an unknown format, a damaged file, or a tokenizer that was retrained.
  """
  text = str(reference)
  if text.startswith('pixels:'):
    return _pixels(text)
  folder, at = split_reference(text)
  if folder.suffix == '.safetensors' and folder.is_file():
    from smalti.launch import export
    return export.load(folder)
  if (folder / 'index.json').exists() or (folder / 'train' / 'index.json').exists():
    return _load_token_folder(folder, weights)
  if not folder.exists():
    raise FileNotFoundError(
        f'No tokenizer or run at {text}; name a run folder, RUN@STEP, an exported .safetensors '
        'file, a token folder, or pixels:HxWxC.')
  experiment = read_experiment(folder)
  checkpoints = Checkpoints(folder / 'checkpoints', best=experiment.checkpoint.best,
                            mode=experiment.checkpoint.mode)
  try:
    return _load_checkpoint(folder, experiment, checkpoints, at, weights, whole)
  finally:
    checkpoints.close()


@dataclasses.dataclass
class Outline:
  """A run without its weights: what it can be asked, and its checkpoints.

  Attributes:
    experiment, path: as of `Loaded`.
    model: the module over abstract arrays.
    fingerprint: for generators, that of the tokenizer they were trained on.
    steps: the committed checkpoints.
    best: the step that `load` takes.
    last: the newest.
  """
  experiment: Experiment
  path: pathlib.Path
  model: Any
  fingerprint: str
  steps: list[int]
  best: int
  last: int


def outline(workdir: str | os.PathLike) -> Outline:
  """Reads a run folder and restores nothing.

  Raises:
    FileNotFoundError: no run is there, or it has no committed checkpoint.
  """
  folder = pathlib.Path(workdir)
  experiment = read_experiment(folder)
  checkpoints = Checkpoints(folder / 'checkpoints', best=experiment.checkpoint.best,
                            mode=experiment.checkpoint.mode)
  try:
    last = checkpoints.latest()
    if last is None:
      raise FileNotFoundError(f'{folder} has no committed checkpoint yet; train it first.')
    best = checkpoints.best() if experiment.checkpoint.best else last
    item = checkpoints.read_item(last)
    spec = TokenSpec.from_json(item['spec']) if item.get('spec') else None
    model = nnx.eval_shape(lambda: build(experiment.model, spec, nnx.Rngs(0)))
    return Outline(experiment, folder, model, item.get('fingerprint') or '', checkpoints.steps(),
                   last if best is None else best, last)
  finally:
    checkpoints.close()


def split_reference(reference: str | os.PathLike) -> tuple[pathlib.Path, str]:
  """('RUN', 'STEP') of `RUN@STEP`; the step is '' where none is named."""
  text = str(reference)
  path, _, at = text.rpartition('@') if '@' in text and not os.path.exists(text) else (text, '', '')
  return pathlib.Path(path), at


def _load_checkpoint(folder: pathlib.Path, experiment: Experiment, checkpoints: Checkpoints,
                     at: str, weights: str, whole: bool) -> Loaded:
  step = checkpoints.best() if experiment.checkpoint.best else checkpoints.latest()
  if at:
    if not at.isdigit() or int(at) not in checkpoints.steps():
      raise ValueError(f'{folder} has no checkpoint {at}; it has {checkpoints.steps()}.')
    step = int(at)
  if step is None:
    raise FileNotFoundError(f'{folder} has no committed checkpoint yet; train it first.')
  item = checkpoints.read_item(step)
  check_format(item, folder / 'checkpoints' / str(step))
  spec = TokenSpec.from_json(item['spec']) if item.get('spec') else None
  config = experiment.model if whole else experiment.model.released()
  abstract = nnx.eval_shape(lambda: build(config, spec, nnx.Rngs(0)))
  shape = states.Structure.of(abstract)
  params, buffers = shape.split(abstract)
  averaged = states.released(params) if weights == 'ema' and experiment.ema is not None else {}
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), {
      'ema': averaged, 'params': {k: v for k, v in params.items() if k not in averaged},
      'buffers': buffers})
  tree = checkpoints.restore_part(step, target)
  params, buffers = {**tree['params'], **tree['ema']}, tree['buffers']
  model = shape.merge(params, buffers)
  stored = read_config(folder)['experiment']['model']
  if isinstance(config, GeneratorConfig):
    mark = item.get('fingerprint') or ''
  else:
    spec = getattr(model, 'spec', None)
    mark = fingerprint(stored, spec, states.released(params), states.released(buffers))
  return Loaded(model, config, stored, spec, mark, experiment, step, folder,
                'ema' if averaged else 'raw')


def _pixels(reference: str) -> Loaded:
  """The tokenizer of `pixels:HxWxC`."""
  sizes = re.fullmatch(r'pixels:(\d+)x(\d+)x(\d+)', reference)
  if sizes is None:
    raise ValueError(f'{reference!r} is not pixels:HxWxC; say pixels:32x32x3 for 32 x 32 pixels of '
                     'three channels.')
  height, width, channels = map(int, sizes.groups())
  config = PixelsConfig(image_size=(height, width), channels=channels)
  model, stored = config.build(rngs=nnx.Rngs(0)), serialization.to_json(config)
  return Loaded(model, config, stored, model.spec, fingerprint(stored, model.spec), None, 0,
                pathlib.Path(reference), 'raw')


def _load_token_folder(folder: pathlib.Path, weights: str) -> Loaded:
  index = folder if (folder / 'index.json').exists() else folder / 'train'
  item = json.loads((index / 'index.json').read_text())
  check_format(item, index / 'index.json')
  source = item.get('tokenizer')
  if not source:
    raise ValueError(f'{index} does not name its tokenizer; name one with --tokenizer=RUN.')
  loaded = load(source, weights=weights)
  if loaded.fingerprint != item['fingerprint']:
    raise ValueError(
        f'{folder} was tokenized with {item["fingerprint"]}, and {source} is now '
        f'{loaded.fingerprint}: it was retrained; tokenize again or name the old checkpoint.')
  return loaded


def load_tokenizer(loaded: Loaded | Outline, override: str | None = None) -> Loaded:
  """The tokenizer of a generator's run, or the one at `override` (a moved folder).

  Raises:
    ValueError: its fingerprint is not the one the generator was trained on.
  """
  named = None if loaded.experiment is None else loaded.experiment.tokenizer
  reference = override or named
  if reference is None:
    raise ValueError(f'{loaded.path} names no tokenizer; name one with --tokenizer=RUN. Of text, '
                     'which has none, draw in Python: see docs/block.md.')
  try:
    tokenizer = load(reference)
  except FileNotFoundError as error:
    raise FileNotFoundError(
        f'The tokenizer of {loaded.path} is not at {reference}; '
        'where it was moved, say --tokenizer=PATH.') from error
  if tokenizer.fingerprint != loaded.fingerprint:
    raise ValueError(
        f'{loaded.path} was trained on tokenizer {loaded.fingerprint}, and {reference} is '
        f'{tokenizer.fingerprint}: it was retrained or is another one; '
        'name the old one with --tokenizer=RUN@STEP.')
  return tokenizer


def pixels(data: Any, tokenizer: Loaded) -> Any:
  """The images behind a generator's data: its own, or for stored tokens those of the tokenizer."""
  from smalti.data.tokens import TokensConfig
  if isinstance(data, TokensConfig) and tokenizer.experiment is not None:
    return tokenizer.experiment.data
  return data
