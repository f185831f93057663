"""Inputs above reconstructions: `smalti reconstruct --workdir=TOKENIZER --n=64`.

Writes `reconstructions/stepS.png`, for the budgets that the decoder was trained for. Decoders that
draw take `--settings.steps=10` and the like, and `--seed`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from smalti.evaluation.reconstruction import compare
from smalti.evaluation.subset import subset
from smalti.generators.generator import example_keys
from smalti.launch import cli, pictures, run as runs, state as states, trees
from smalti.launch.progress import say
from smalti.launch.step import encode_keys
from smalti.networks.pixels import to_float, to_uint8
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.tokenizer import decode, encode

LENGTHS = 10  # budgets up to as many are all shown; of more, the powers of two


_keys, _encode_keys = jax.jit(example_keys), jax.jit(encode_keys, static_argnums=1)


def encoded(tokenizer: runs.Loaded, images: np.ndarray, *, first: int = 0, seed: int = 0
            ) -> Int[Array, 'b n d']:
  """Tokens of uint8 images.

  Args:
    first: the index of the first example, for tokenizers that draw, as in `decoded`.
    seed: of those draws.
  """
  keys = _encode_keys(jnp.arange(first, first + len(images)), seed)
  return encode(tokenizer.model, to_float(jnp.asarray(images)), keys=keys)


def tokenized(tokenizer: runs.Loaded, images: np.ndarray, *, batch_size: int = 256
              ) -> Int[np.ndarray, 'b n d']:
  """`encoded` of many images, a batch at a time."""
  return np.concatenate([np.asarray(encoded(tokenizer, images[i:i + batch_size], first=i))
                         for i in range(0, len(images), batch_size)])


def decoded(tokenizer: runs.Loaded, tokens: Any, *, keep: int | None = None, first: int = 0,
            seed: int = 0, settings: Any = None) -> np.ndarray:
  """uint8 images of tokens, or of their prefixes of `keep` entries.

  Args:
    first: the index of the first example, for decoders that draw: example i of a data set is drawn
      from (seed, i), however the data set is cut into batches.
    seed: of those draws.
    settings: of those decoders; None takes their own.
  """
  keeps = None if keep is None else jnp.full(len(tokens), keep, jnp.int32)
  keys = None
  if hasattr(tokenizer.model, 'settings'):
    keys = _keys(states.stream(seed, 'eval'), jnp.arange(first, first + len(tokens)))
    settings = settings or tokenizer.model.settings()
  return np.asarray(to_uint8(decode(
      tokenizer.model, jnp.asarray(tokens), keep=keeps, keys=keys, settings=settings)))


def reconstruct(tokenizer: runs.Loaded, images: np.ndarray, *, batch_size: int = 256,
                keep: int | None = None, seed: int = 0, settings: Any = None
                ) -> tuple[np.ndarray, np.ndarray]:
  """(reconstructions uint8 like `images`, tokens int32[n, N, D]) of uint8 images."""
  parts = []
  for first in range(0, len(images), batch_size):
    tokens = np.asarray(encoded(tokenizer, images[first:first + batch_size], first=first,
                                seed=seed))
    parts.append((decoded(tokenizer, tokens, keep=keep, first=first, seed=seed,
                          settings=settings), tokens))
  remade, tokens = (np.concatenate(part) for part in zip(*parts))
  return remade, tokens


def lengths(spec: TokenSpec) -> tuple[int | None, ...]:
  """The budgets to show: all, or of many the powers of two and the last; (None,) without any."""
  known = spec.budgets
  if len(known) > LENGTHS:
    known = tuple(k for k in known[:-1] if not k & (k - 1)) + known[-1:]
  return known or (None,)


def settings_of(tokenizer: runs.Loaded, overrides: dict[str, str]) -> Any:
  """The settings that a decoder which draws is called with, or None.

  Raises:
    ValueError: overrides for a decoder that has no settings.
  """
  if hasattr(tokenizer.model, 'settings'):
    return trees.apply_settings(tokenizer.model.settings(), overrides)
  if overrides:
    raise ValueError(f'{type(tokenizer.model).__name__} decodes without settings; leave out '
                     f'--settings.{next(iter(overrides))}.')
  return None


def pairs(images: np.ndarray, reconstructions: np.ndarray, columns: int) -> np.ndarray:
  """Rows of inputs, each above the row of their reconstructions."""
  rows = []
  for first in range(0, len(images), columns):
    rows += [*images[first:first + columns], *reconstructions[first:first + columns]]
  return np.stack(rows)


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The run folder of a tokenizer.', flag_values=values)
  flags.DEFINE_integer('n', 64, 'How many held-out examples.', flag_values=values)
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'Averaged or last weights.',
                    flag_values=values)
  flags.DEFINE_integer('seed', 0, 'Of coders that draw; example i depends on (seed, i).',
                       flag_values=values)
  cli.define_settings(values)


def main(values: Any) -> int:
  if values.workdir is None:
    raise ValueError('reconstruct needs --workdir=DIR, the run of a tokenizer.')
  if values.n < 1:
    raise ValueError(f'n={values.n} must be 1 or more.')
  tokenizer = runs.load(values.workdir, weights=values.weights)
  if not hasattr(tokenizer.model, 'encode'):
    raise ValueError(f'{values.workdir} is a {runs.kind(tokenizer.model)}; reconstruct with a '
                     'tokenizer.')
  settings = settings_of(tokenizer, values.settings)
  source = tokenizer.data.open('eval')
  count = min(values.n, len(source))
  images = source.read(subset(len(source), count))['image']
  columns = min(16, count)
  count -= count % columns
  folder = runs.split_reference(values.workdir)[0] / 'reconstructions'
  folder.mkdir(parents=True, exist_ok=True)
  for keep in lengths(tokenizer.spec):
    result, _ = reconstruct(tokenizer, images, keep=keep, seed=values.seed, settings=settings)
    name = f'step{tokenizer.step}' + ('' if keep is None else f'_keep{keep}')
    pictures.save_grid(folder / f'{name}.png', pairs(images[:count], result[:count], columns),
                       columns=columns, band=2)
    psnr = compare(images, result).psnr
    say(f'PSNR {"infinite" if psnr is None else f"{psnr:.2f} dB"} over {len(images)} held-out '
        f'examples: {folder / name}.png')
  return 0


if __name__ == '__main__':
  cli.run('reconstruct')
