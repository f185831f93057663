"""What a generator finds real tokens to cost, beside what frequencies of codes say of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smalti.evaluation import codes
from smalti.evaluation.subset import subset
from smalti.launch import run as runs, state as states
from smalti.launch.real import Split
from smalti.launch.sample import TEXT
from smalti.launch.scores import Scores

SCORED = 4_000  # examples of each split whose likelihood is measured: a bound takes eight passes


def add_likelihood(loaded: runs.Loaded, scores: Scores, real: tuple[np.ndarray, np.ndarray],
                    splits: tuple[Split, Split], kind: str, *, seed: int, settings: Any) -> None:
  """Bits per token of the training and of the held-out examples, `SCORED` of each, beside what
  frequencies of the training codes say of these held-out ones.

  Per dimension they are spread over the values of an image: of tokens that are its values, its
  likelihood; of a tokenizer's, what the tokens alone cost.
  """
  key, rows = states.stream(seed, 'eval'), [subset(len(tokens), SCORED) for tokens in real]
  compared = real[0], real[1][rows[1]]
  unigram = codes.unigram_bits(loaded.spec, *compared)
  positional = codes.unigram_bits(loaded.spec, *compared, positional=True)
  neighbours = codes.neighbour_bits(loaded.spec, *compared)
  for name, tokens, split, chosen in zip(('train', 'held_out'), real, splits, rows):
    given = {entry: values[chosen] for entry, values in _given(loaded, split).items()}
    tokens = tokens[chosen]
    bits, error = bits_per_token(loaded, tokens, given, key=key, settings=settings)
    scores.add(f'bits_per_token_{name}', bits, unit='bits per token', higher=False, likelihood=kind,
               samples=len(tokens), reference=split.fingerprint, reference_samples=len(tokens),
               standard_error=error, bits_per_dimension=bits * float(
                   np.asarray(loaded.spec.valid(tokens)).sum()) / split.images[chosen].size,
               unigram=unigram, positional_unigram=positional, neighbours=neighbours)


def bits_per_token(loaded: runs.Loaded, tokens: np.ndarray, given: dict[str, np.ndarray], *,
                   key: jax.Array, settings: Any = None, batch_size: int = 256
                   ) -> tuple[float, float]:
  """(mean bits per valid token, its standard error over examples).

  Args:
    given: the entries of the batch beside `tokens`: `label`, or `text` and `text_mask`.
    settings: of a sampler whose law has a likelihood of its own: random orders, a shorter chain.
  """
  # one compiled function per kind, so that all batches but the last share a program
  function = jax.jit(lambda model, batch, key: (
      model.nats(batch, key=key, settings=settings)))
  nats = []
  for i in range(0, len(tokens), batch_size):
    batch = {name: jnp.asarray(rows[i:i + batch_size])
             for name, rows in {'tokens': tokens, **given}.items()}
    nats.append(np.asarray(function(loaded.model, batch, jax.random.fold_in(key, i)), np.float64))
  valid = np.asarray(loaded.spec.valid(tokens)).sum((1, 2))
  bits = -np.concatenate(nats) / np.log(2)
  mean = bits.sum() / valid.sum()
  error = np.std(bits - mean * valid) / valid.mean() / len(bits)**0.5
  return float(mean), float(error)


def _given(loaded: runs.Loaded, split: Split) -> dict[str, np.ndarray]:
  """What the generator reads of real examples."""
  given = {} if getattr(loaded.config, 'text', None) is None else {
      name: split.texts[name] for name in TEXT}
  if getattr(loaded.config, 'classes', 0) and split.labels is not None:
    given['label'] = split.labels
  return given
