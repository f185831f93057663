"""What `--help` prints: verbs, options, and the fields of a config with what their class says."""

import dataclasses
import inspect
import re
from typing import Any

from absl import flags


def verbs(table: dict[str, str]) -> str:
  """One line per verb."""
  width = max(map(len, table))
  return '\n'.join([
      'smalti VERB --name=value ...', '',
      *(f'  {verb:{width}}  {text}' for verb, text in table.items()), '',
      '`smalti VERB --help` lists its options; SMALTI_TRACEBACK=1 shows where an error arose.'])


def options(values: flags.FlagValues, choices: list[str], common: list[str]) -> list[str]:
  """One line per option, those of all verbs last, with defaults in brackets."""
  lines = []
  for name in sorted(values, key=lambda name: (name in common, name)):
    flag = values[name]
    default = '' if flag.default in (None, []) else f' [{flag.default}]'
    dashes = '' if name in choices else '--'
    lines.append(f'  {dashes}{name}: {" ".join(flag.help.split())}{default}')
  return lines


def fields(config: Any, path: str = 'config') -> list[str]:
  """One line per field of a config tree: its path, its value, and what its class says about it."""
  lines, docs = [], _docs(type(config))
  for field in dataclasses.fields(config):
    here, value = f'{path}.{field.name}', getattr(config, field.name)
    doc = docs.get(field.name, '')
    if dataclasses.is_dataclass(value):
      lines += [f'  --{here}: {type(value).__name__}  {doc}'.rstrip(), *fields(value, here)]
    else:
      lines.append(f'  --{here}={"none" if value is None else value}  {doc}'.rstrip())
  return lines


def settings(workdir: str) -> list[str]:
  """The sampling settings of a run, each with its value and what its class says about it."""
  from smalti.launch import run  # which imports jax
  outline = run.outline(run.split_reference(workdir)[0])
  own = outline.experiment.settings
  if own is None and hasattr(outline.model, 'settings'):
    own = outline.model.settings()
  return ['Settings:', *fields(own, 'settings')] if own else [f'{workdir} has no settings.']


def _docs(cls: type) -> dict[str, str]:
  """The `Attributes:` (or `Args:`) of a class docstring, whose entries are `name, name: text`.

  What it does not say of inherited fields, its bases do.
  """
  docs = {}
  for base in reversed(cls.__mro__):
    text = inspect.cleandoc(base.__doc__ or '')
    section = re.split(r'(?m)^(?:Attributes|Args):\n', text, maxsplit=1)[1:] or ['']
    for names, words in re.findall(
        r'(?m)^  ([a-z_][\w, ]*): ((?:.|\n(?:    |\s*$))*)', section[0]):
      docs |= {name.strip(): ' '.join(words.split()) for name in names.split(',')}
  return docs
