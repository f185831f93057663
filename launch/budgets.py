"""What a tokenizer's prefixes are worth: `python -m smalti.launch.budgets --workdir=RUN`.

At every budget: PSNR, SSIM and the Frechet distance of held-out reconstructions, with the deviation
over noise seeds where decoding draws and the standard error over images; what it costs to give an
image the tokens of another; how much the images of different seeds differ; Euler steps against
quality. Writes `budgets/strips.png` and `budgets/seeds.png` into the run, and the numbers to
`budgets/budgets.json` or to --out. For One-D-Piece and residual codes as for FlexTok.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Shaped

from smalti.evaluation import features
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.reconstruction import measure
from smalti.evaluation.subset import subset
from smalti.launch import cli, pictures, provenance, run as runs
from smalti.launch.judge import BATCH, Judge, accumulate, open_judge, references
from smalti.launch.progress import say
from smalti.launch.reconstruct import decoded, lengths, settings_of, tokenized
from smalti.launch.serialization import to_json

Images = Shaped[np.ndarray, '_b _h _w _c']
SHOWN = 8  # images of a strip


class Measured:
  """A tokenizer's prefixes on `n` held-out images, which are encoded once."""

  def __init__(self, loaded: runs.Loaded, images: Images, judge: Judge, settings: Any):
    self.loaded, self.images, self.judge, self.settings = loaded, images, judge, settings
    self.shown: dict[int, list[Images]] = {}  # the first images at every budget, by seed
    self.tokens = tokenized(loaded, images, batch_size=BATCH)

  def decode(self, keep: int | None, seed: int, *, tokens: np.ndarray | None = None,
             settings: Any = None) -> Images:
    tokens = self.tokens if tokens is None else tokens
    return np.concatenate([
        decoded(self.loaded, tokens[i:i + BATCH], keep=keep, first=i, seed=seed,
                settings=settings or self.settings) for i in range(0, len(tokens), BATCH)])

  def score(self, found: Images) -> dict[str, float]:
    """PSNR, SSIM and Frechet distance of reconstructions, and the standard error of the PSNR."""
    errors = measure(self.images, found)
    values = errors.psnr[np.isfinite(errors.psnr)]
    parts = (found[i:i + BATCH] for i in range(0, len(found), BATCH))
    summary = accumulate(self.judge, parts, len(found), self.loaded.fingerprint).finish()[0]
    return {'psnr': float(values.mean()), 'psnr_se': float(values.std() / len(values) ** 0.5),
            'ssim': float(errors.ssim.mean()),
            'rfd': frechet_distance(summary.moments, self.judge.held_out[0].moments)}


def measured(work: Measured, *, seeds: int, steps: tuple[int, ...]) -> dict[str, Any]:
  """All numbers. Decoders that draw nothing have one seed and no steps."""
  drawn, budgets = work.settings is not None, lengths(work.loaded.spec)
  seeds = seeds if drawn else 1
  rows, full = [], []
  for keep in budgets:
    images = [work.decode(keep, seed) for seed in range(seeds)]
    work.shown[keep] = [x[:SHOWN] for x in images]
    found = [work.score(x) for x in images]
    row: dict[str, Any] = {'keep': keep}
    for name in ('psnr', 'ssim', 'rfd'):
      values = [x[name] for x in found]
      row[name] = float(np.mean(values))
      row[f'{name}_sd'] = float(np.std(values, ddof=1)) if seeds > 1 else 0.0
    row['psnr_se'] = found[0]['psnr_se']
    row['between_seeds'] = _between(images)
    rows.append(row)
    full = found
    say(f'{keep} tokens: PSNR {row["psnr"]:.2f} +- {row["psnr_sd"]:.2f} dB  '
        f'rFD {row["rfd"]:.3f} +- {row["rfd_sd"]:.3f}  between seeds {row["between_seeds"]:.4f}')
  last = budgets[-1]
  wrong = work.score(work.decode(last, 0, tokens=np.roll(work.tokens, 1, 0)))
  say(f'tokens of another image: PSNR {wrong["psnr"]:.2f} dB, {full[0]["psnr"]:.2f} with its own')
  out: dict[str, Any] = {'rows': rows, 'shuffled': {**wrong, 'own': full[0]['psnr'],
                                    'cost': full[0]['psnr'] - wrong['psnr']}}
  if drawn:
    out['steps'] = []
    for count in steps:
      one = work.score(work.decode(
          last, 0, settings=dataclasses.replace(work.settings, steps=count)))
      out['steps'].append({'steps': count, **one})
      say(f'{count} steps: PSNR {one["psnr"]:.2f} dB  rFD {one["rfd"]:.3f}')
  return {**out, 'holds': _verdicts(rows, out['shuffled'], drawn)}


def _between(images: list[Images]) -> float:
  """Root mean square over pixels of the deviation over seeds, of values in [0, 1]."""
  if len(images) == 1:
    return 0.0
  deviation = np.stack([x.astype(np.float32) / 255 for x in images]).std(0, ddof=1)
  return float(np.sqrt(np.square(deviation).mean()))


def _verdicts(rows: list[dict], shuffled: dict, drawn: bool) -> dict[str, bool]:
  """What nested tokens that are used must show."""
  first, last = rows[0], rows[-1]
  deviation = max(x[name] for x in (first, last) for name in ('psnr_sd', 'psnr_se'))
  holds = {
      'more tokens, more than three deviations': last['psnr'] - first['psnr'] > 3 * deviation,
      'PSNR rises with every budget': all(
          b['psnr'] >= a['psnr'] for a, b in zip(rows, rows[1:])),
      'tokens of another image cost 3 dB': shuffled['cost'] > 3}
  if drawn:
    holds['seeds differ more at the first budget'] = (
        first['between_seeds'] > last['between_seeds'])
  return holds


def draw_strips(work: Measured, folder: pathlib.Path) -> None:
  """One row per image: the original, then every budget; and seeds of the first and last."""
  keeps = sorted(work.shown)
  columns = [work.images[:SHOWN], *(work.shown[keep][0] for keep in keeps)]
  _save(folder / 'strips.png', columns, ['image', *(str(keep) for keep in keeps)])
  if work.settings is not None:
    chosen = [(keep, seed) for keep in (keeps[0], keeps[-1])
              for seed in range(len(work.shown[keep]))]
    columns = [work.images[:SHOWN], *(work.shown[keep][seed] for keep, seed in chosen)]
    _save(folder / 'seeds.png', columns,
          ['image', *(f'{keep}, seed {seed}' for keep, seed in chosen)])


def _save(path: pathlib.Path, columns: list[Images], names: list[str]) -> None:
  tiles = np.stack(columns, 1)
  labels = [name for _ in range(len(tiles)) for name in names]
  pictures.save_grid(path, tiles.reshape(-1, *tiles.shape[2:]), columns=len(columns),
                     labels=labels)
  say(f'{path}')


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run of a tokenizer with budgets.', flag_values=values)
  flags.DEFINE_integer('n', 512, 'Held-out images.', flag_values=values, lower_bound=2)
  flags.DEFINE_integer('seeds', 3, 'Noise seeds, where decoding draws.', flag_values=values,
                       lower_bound=1)
  flags.DEFINE_list('steps', ['1', '2', '4', '8', '16', '32', '64'], 'Euler steps to compare.',
                    flag_values=values)
  flags.DEFINE_string('extractor', None, 'Of the Frechet distance; default by the images.',
                      flag_values=values)
  flags.DEFINE_string('out', None, 'A .json for the numbers; default in the run.',
                      flag_values=values)
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'Averaged or last weights.',
                    flag_values=values)
  cli.define_settings(values)


def main(values: Any) -> int:
  if values.workdir is None:
    raise ValueError('budgets needs --workdir=RUN, the run of a tokenizer.')
  if values.n < 2 or values.seeds < 1 or not all(x.isdigit() and int(x) for x in values.steps):
    raise ValueError(f'n={values.n} must be 2 or more, seeds={values.seeds} and '
                     f'steps={",".join(values.steps)} 1 or more.')
  loaded = runs.load(values.workdir, weights=values.weights)
  if not getattr(loaded.spec, 'budgets', ()) or not hasattr(loaded.model, 'encode'):
    raise ValueError(f'{values.workdir} is a {runs.kind(loaded.model)} without budgets; name a '
                     'tokenizer that was trained on prefixes.')
  folder = runs.split_reference(values.workdir)[0]
  data = loaded.data
  source = data.open('eval')
  count = min(values.n, len(source))
  images = source.read(subset(len(source), count))['image']
  judge = open_judge(data, references(folder), n=count, extractor=values.extractor)
  work = Measured(loaded, images, judge, settings_of(loaded, values.settings))
  found = measured(work, seeds=values.seeds, steps=tuple(int(x) for x in values.steps))
  for claim, holds in found['holds'].items():
    say(f'{"holds" if holds else "DOES NOT HOLD"}: {claim}')
  draw_strips(work, folder / 'budgets')
  path = pathlib.Path(values.out) if values.out else folder / 'budgets' / 'budgets.json'
  provenance.record(path, None, {
      'run': f'{folder.name}@{loaded.step}', 'fingerprint': loaded.fingerprint,
      'config': loaded.stored, 'images': count, 'bits': loaded.spec.bits,
      'seeds': values.seeds, 'settings': work.settings and to_json(work.settings),
      'extractor': features.identity(judge.extractor),
      'rfd': f'rfd_{judge.extractor.name}_{judge.extractor.sha256[:8]}', **found})
  say(f'{path}')
  return 0


if __name__ == '__main__':
  cli.run('budgets')
