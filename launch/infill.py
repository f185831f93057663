"""Completes parts of held-out examples: `smalti infill --workdir=GENERATOR --hide=right`.

Each example is encoded, a share of its tokens is hidden, and the generator draws them again given
the rest; known tokens come back unchanged, whatever the generator. Writes `infills/NAME.png` (the
example, what is known of it, completions), `NAME.npz` (`arr_0` completions, `tokens`, `known_mask`)
and `NAME.json`. Where the examples have classes, a fixed classifier reads the class off the
completions, beside those of the true tokens and of tokens from another example; the generator is
not told the class unless --conditional is given.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from smalti.evaluation import agreement
from smalti.evaluation.subset import subset
from smalti.generators.generator import check_null, example_keys, generate
from smalti.launch import (
    cli,
    evaluate,
    pictures,
    provenance,
    real,
    run as runs,
    sample as sampling,
    state as states,
)
from smalti.launch.judge import BATCH, agreeing, classifies, open_extractor, references
from smalti.launch.progress import say, track
from smalti.launch.reconstruct import decoded, tokenized
from smalti.tokenizers.spec import TokenSpec

HIDE = ('center', 'border', 'left', 'right', 'top', 'bottom', 'last', 'random', 'depth')
SHOWN = 16  # examples of the picture


def known_mask(spec: TokenSpec, hide: str, share: float, index: Int[np.ndarray, 'b'],
               seed: int = 0) -> Bool[np.ndarray, 'b n d']:
  """Which codes stay.

  Args:
    hide: a region of the last two axes of the grid ('center', and 'border' around it, 'left',
      'right', 'top', 'bottom'; rows and columns are those of a grid of one axis too); the 'last'
      positions; 'random' ones, drawn for every example; or, of several codes per position, the
      finer ones ('depth').
    share: of the positions (of the codes of each position for 'depth') that is hidden, 0..1.
    index: of the examples, for 'random'.

  Raises:
    ValueError: an unknown region, a share out of range, or one that hides nothing or all.
  """
  if hide not in HIDE:
    raise ValueError(f'hide={hide!r} is not one of {", ".join(HIDE)}.')
  if not 0 < share < 1:
    raise ValueError(f'share={share} must be above 0 and below 1.')
  shape, number = (len(index), spec.length, spec.depth), round(share * spec.length)
  if hide == 'depth':
    kept = spec.depth - round(share * spec.depth)
    known = np.broadcast_to(np.arange(spec.depth) < kept, shape)
  elif hide == 'random':
    keys = example_keys(states.stream(seed, 'eval'), jnp.asarray(index))
    order = jax.vmap(lambda key: jax.random.permutation(key, spec.length))(keys)
    known = np.broadcast_to(np.asarray(order)[..., None] >= number, shape)
  else:
    sizes = np.array(spec.grid[-2:])
    place = (spec.coordinates()[:, -2:] + 0.5) / sizes - 0.5  # -0.5..0.5
    inner = {'center': share, 'border': 1 - share}.get(hide, 0.0) ** (1 / len(sizes)) / 2
    inside = np.max(np.abs(place), -1) < inner
    regions = {
        'center': inside, 'border': ~inside, 'last': np.arange(spec.length) >= spec.length - number,
        'top': place[:, 0] < share - 0.5, 'bottom': place[:, 0] >= 0.5 - share,
        'left': place[:, -1] < share - 0.5, 'right': place[:, -1] >= 0.5 - share}
    known = np.broadcast_to(~regions[hide][:, None], shape)
  if known.all() or not known.any():
    raise ValueError(f'hide={hide} with {share=} hides {"nothing" if known.all() else "all"} of '
                     f'grid={spec.grid} with {spec.depth} codes; change the share.')
  return known.copy()


def complete(generator: runs.Loaded, tokens: Int[np.ndarray, 'b n d'],
             mask: Bool[np.ndarray, 'b n d'], labels: np.ndarray | None, *, settings: Any,
             seed: int, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray, int]:
  """(tokens with the hidden ones drawn, whether each draw is exact, passes of the network)."""
  root, parts, exact, nfe = states.stream(seed, 'sample'), [], [], 0
  size = min(batch_size, len(tokens))
  for first in track(range(0, len(tokens), size), -(-len(tokens) // size), 'batch'):
    rows = np.minimum(np.arange(first, first + size), len(tokens) - 1)  # one shape, one program
    found = generate(
        generator.model, None if labels is None else {'label': jnp.asarray(labels[rows])},
        keys=example_keys(root, jnp.asarray(rows)), settings=settings,
        known=jnp.asarray(tokens[rows]), known_mask=jnp.asarray(mask[rows]))
    parts.append(np.asarray(found.tokens))
    exact.append(np.asarray(found.exact))
    nfe = int(found.nfe)
  drawn = np.concatenate(parts)[:len(tokens)]
  if (drawn != tokens)[mask].any():
    raise RuntimeError('a known token was changed: this generator breaks its contract.')
  return drawn, np.concatenate(exact)[:len(tokens)], nfe


def blanked(spec: TokenSpec, images: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
  """Images, gray where no code of the pixel's position is known; None where cells have no place."""
  if len(spec.grid) != 2 or spec.order not in ('raster', 'depth'):
    return None
  there = mask.any(-1).reshape(len(mask), *spec.grid)
  scales = [size // cells for size, cells in zip(images.shape[1:3], spec.grid)]
  there = there.repeat(scales[0], 1).repeat(scales[1], 2)
  return np.where(there[..., None], images, 128).astype(np.uint8)


def others(x: np.ndarray) -> np.ndarray:
  """Rows of another example each: of the one that is half of them further on."""
  return np.roll(x, (len(x) + 1) // 2, 0)


def agreements(data: Any, folder: pathlib.Path, labels: np.ndarray,
               sets: dict[str, np.ndarray]) -> dict[str, float] | None:
  """The share of each set of images that a fixed classifier puts into their class.

  The classifier is the packaged network for such images, otherwise a support vector machine on the
  training images where those are small; None where there is neither.
  """
  network = open_extractor(data, references(folder))
  if classifies(network, data.open('eval')):
    return {name: agreeing(network, x, labels) / len(x) for name, x in sets.items()}
  train, held_out = (real.Split.read(data, split) for split in ('train', 'eval'))
  if train.images[0].size > evaluate.SMALL or len(train.images) > agreement.LARGEST:
    return None
  return {name: agreement.class_agreement(
      (x, labels), (train.images, train.labels), (held_out.images, held_out.labels)).agreement
          for name, x in sets.items()}


def _whole(settings: Any, conditional: bool) -> Any:
  """Settings that draw all that is hidden, and are guided only where there is a condition."""
  if getattr(settings, 'keep', None) is not None:
    settings = dataclasses.replace(settings, keep=None)
  if not conditional and getattr(settings, 'guidance', None) is not None:
    settings = dataclasses.replace(settings, guidance=None)
  return settings


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run folder of a generator.', flag_values=values)
  flags.DEFINE_enum('hide', 'right', HIDE, 'Which tokens are drawn again.', flag_values=values)
  flags.DEFINE_float('share', 0.5, 'How much of the tokens that is.', flag_values=values)
  flags.DEFINE_integer('n', 64, 'How many held-out examples.', flag_values=values, lower_bound=1)
  flags.DEFINE_integer('draws', 3, 'Completions of each.', flag_values=values, lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'Of the draws; example i depends on (seed, i).',
                       flag_values=values)
  flags.DEFINE_boolean('conditional', False, 'Tell the generator the class of each example.',
                       flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Where the tokenizer was moved to.', flag_values=values)
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'Averaged or last weights.',
                    flag_values=values)
  flags.DEFINE_string('results', None, 'Also records the numbers in this JSON file.',
                      flag_values=values)
  cli.define_settings(values)


def main(values: Any) -> int:
  if values.workdir is None:
    raise ValueError('infill needs --workdir=DIR, the run of a generator.')
  generator = runs.load(values.workdir, weights=values.weights)
  if not hasattr(generator.model, 'sample'):
    raise ValueError(f'{values.workdir} is a {runs.kind(generator.model)}; infill with a '
                     'generator.')
  if not values.conditional:
    check_null(generator.model, 'tell it the classes, where it has some, with --conditional')
  data, tokenizer = generator.data, runs.load_tokenizer(generator, values.tokenizer)
  settings = _whole(sampling.resolve_settings(generator, values.settings), values.conditional)
  data = runs.pixels(data, tokenizer)
  source = data.open('eval')
  rows = subset(len(source), values.n)
  batch = source.read(rows)
  if 'image' not in batch:
    raise ValueError(f'{tokenizer.path} is an exported file and knows no images; name the run it '
                     'is from with --tokenizer=RUN.')
  images, classes = batch['image'], batch.get('label')
  if values.conditional and (classes is None or not getattr(generator.config, 'classes', 0)):
    raise ValueError('--conditional needs examples with labels and a generator with classes.')
  tokens = tokenized(tokenizer, images, batch_size=BATCH)
  mask = known_mask(tokenizer.spec, values.hide, values.share, np.arange(len(tokens)), values.seed)
  labels = classes if values.conditional else None

  def show(x: np.ndarray) -> np.ndarray:
    return np.concatenate([decoded(tokenizer, x[i:i + BATCH], first=i, seed=values.seed)
                           for i in range(0, len(x), BATCH)])

  drawn, exact, nfe = [], None, 0
  for j in range(values.draws):
    found, exact, nfe = complete(generator, tokens, mask, labels, settings=settings,
                                 seed=values.seed + j)
    drawn.append(found)
  completed = [show(x) for x in drawn]
  true = show(tokens)
  item = {**sampling.record(generator, settings, n=len(tokens), seed=values.seed), 'nfe': nfe,
          'hide': values.hide, 'share': values.share, 'conditional': values.conditional,
          'exact': float(exact.mean()),
          'hidden_tokens_as_they_were': float((drawn[0] == tokens)[~mask].mean())}
  say(f'{item["hidden_tokens_as_they_were"]:.1%} of the hidden tokens came out as they were; '
      f'{"the draw is" if exact.all() else "the draw is not"} from the model\'s own conditional')
  folder = runs.split_reference(values.workdir)[0]
  if classes is not None:
    sets = {'completed': completed[0], 'true': true}
    if len(tokens) > 1:  # of one example there is no other
      sets['another'] = show(np.where(mask, tokens, others(tokens)))
    item['agreement'] = agreements(data, folder, classes, sets)
    if item['agreement']:
      say('class read off: ' + ', '.join(f'{name} {value:.3f}'
                                         for name, value in item['agreement'].items()))
  text = json.dumps([item['settings'], values.hide, values.share, values.conditional])
  name = f'step{generator.step}_{values.hide}_{hashlib.sha256(text.encode()).hexdigest()[:8]}'
  (folder / 'infills').mkdir(parents=True, exist_ok=True)
  np.savez(folder / 'infills' / f'{name}.npz', arr_0=completed[0], tokens=drawn[0],
           known_mask=mask)
  columns = {'example': images, 'known': blanked(tokenizer.spec, true, mask), 'decoded': true,
             **{f'draw {j + 1}': x for j, x in enumerate(completed)}}
  shown = {key: x[:SHOWN] for key, x in columns.items() if x is not None}
  tiles = np.stack(list(shown.values()), 1)
  path = folder / 'infills' / f'{name}.png'
  pictures.save_grid(path, tiles.reshape(-1, *tiles.shape[2:]), columns=len(shown),
                     labels=list(shown) * len(tiles))
  runs.write_json(folder / 'infills' / f'{name}.json', item)
  if values.results:
    provenance.record(values.results, None, {'infilling': item}, config=generator.stored)
  say(f'{path}')
  return 0


if __name__ == '__main__':
  cli.run('infill')
