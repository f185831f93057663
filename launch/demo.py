"""The whole path on embedded real data: `smalti demo --workdir=runs/demo`.

Digits -> VQ tokenizer -> masked and autoregressive generators -> class-conditional samples,
reconstructions, scores, and one page `report/index.html`. Minutes on two cores; the same command
again goes on where it stopped.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from smalti.evaluation.manifest import Score
from smalti.launch import cli, evaluate as scoring, pictures, provenance, report, run as runs, trees
from smalti.launch.judge import references
from smalti.launch.progress import say
from smalti.launch.reconstruct import pairs, reconstruct
from smalti.launch.sample import draw, record, resolve_settings, write
from smalti.launch.train import train

GUIDANCE = '2.0'
SAMPLES = 1000
KINDS = {'digits_masked': 'Masked diffusion', 'digits_ar': 'Autoregressive'}


def demo(workdir: pathlib.Path, size: str = 'base', *, results: pathlib.Path | None = None) -> None:
  """Trains, samples, scores and reports into `workdir`.

  Args:
    size: of the three configs; 'debug' runs through in seconds and learns nothing.
    results: where a JSON of the numbers, with their provenance, is written too.
  """
  clock = provenance.Clock()
  experiment = trees.load_config(f'digits_vq:{size}')
  say('1/3  a VQ tokenizer of 8 x 8 digits')
  tokenizer_run = workdir / 'digits_vq'
  train(experiment, tokenizer_run)
  tokenizer = runs.load(tokenizer_run)
  images = experiment.data.open('eval').read(np.arange(64))['image']
  remade, _ = reconstruct(tokenizer, images)
  pictures.save_grid(tokenizer_run / 'reconstructions' / f'step{tokenizer.step}.png',
                     pairs(images, remade, 16), columns=16, band=2)
  real = references(workdir)
  tables = {'digits_vq': scoring.evaluate(str(tokenizer_run), kept=real)}
  for i, (name, title) in enumerate(KINDS.items(), 2):
    say(f'{i}/3  {title} over its tokens')
    generator = dataclasses.replace(
        trees.load_config(f'{name}:{size}'), tokenizer=str(tokenizer_run))
    train(generator, workdir / name)
    for label, overrides in (('', {}), ('guided', {'guidance': GUIDANCE})):
      tables[f'{name} {label}'.strip()] = _sample_and_score(
          workdir / name, tokenizer, label, overrides, real)
  training = [('Tokenizer', tokenizer_run)] + [(t, workdir / n) for n, t in KINDS.items()]
  page = report.write_report(workdir, training, title='smalti demo', text=_words(tables))
  if results is not None:
    provenance.record(results, f'smalti demo --workdir={workdir}', {
        name: scoring.table(rows) for name, rows in tables.items()}, clock=clock, seed=0)
  say(f'Done in {clock.seconds:.0f} s. Open {page}')


def _sample_and_score(run: pathlib.Path, tokenizer: runs.Loaded, label: str,
                      overrides: dict[str, str], real: pathlib.Path) -> list[Score]:
  """Ten rows of ten digits for the eye, and the scores of a thousand."""
  loaded = runs.load(run)
  settings = resolve_settings(loaded, overrides)
  samples = draw(loaded, tokenizer, n=100, seed=0, settings=settings, batch_size=100)
  write(run / 'samples', f'step{loaded.step}{"_" + label if label else ""}', samples,
        {**record(loaded, settings, n=100, seed=0), 'nfe': samples.nfe}, columns=10)
  rows = scoring.evaluate(str(run), n=SAMPLES, name=label or None, settings=overrides,
                          kept=real)
  jax.clear_caches()
  return rows


def _words(tables: dict[str, list[Score]]) -> str:
  """What the page says first: the numbers by which to judge the pictures below."""
  value = {name: {row.name: row for row in rows} for name, rows in tables.items()}
  tokenizer = value['digits_vq']
  lines = [
      'Everything on this page was trained on the 1,437 training digits of scikit-learn and judged '
      'on the 360 held out.',
      f'The tokenizer reconstructs held-out digits at {tokenizer["psnr"].value:.1f} dB and uses '
      f'{tokenizer["usage"].value:.0%} of its codes.']
  for name, title in KINDS.items():
    plain, guided = value[name], value[f'{name} guided']
    bits, agree = plain['bits_per_token_held_out'], plain['class_agreement']
    lines.append(
        f'{title}: {bits.value:.2f} bits per held-out token, '
        f'{plain["bits_per_token_train"].value:.2f} on the training set, '
        f'{bits.beside["unigram"]:.2f} for the unigram. Of {agree.samples:,} samples a support '
        f'vector machine ({agree.beside["judge_accuracy"]:.1%} right on held-out digits) gives '
        f'{agree.value:.1%} the class asked for, {guided["class_agreement"].value:.1%} with '
        f'guidance {float(GUIDANCE):g}. {plain["copies"].value:.1%} of the samples are token for '
        f'token in the training set; so are {plain["copies"].beside["held_out"]:.1%} of the '
        'held-out digits.')
  return '\n\n'.join(lines)


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', 'runs/demo', 'Where everything goes.', flag_values=values)
  flags.DEFINE_enum('size', 'base', ['base', 'debug'], 'debug learns nothing, in seconds.',
                    flag_values=values)
  flags.DEFINE_string('results', None, 'Also writes the numbers to this JSON file.',
                      flag_values=values)


def main(values: Any) -> int:
  demo(pathlib.Path(values.workdir), values.size,
       results=values.results and pathlib.Path(values.results))
  return 0


if __name__ == '__main__':
  cli.run('demo')
