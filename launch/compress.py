"""Tokens to few bytes: `smalti compress --workdir=GENERATOR --tokens=FILE --out=FILE.smtc`.

An autoregressive generator says how likely every code is, given those before; a range coder spends
-log2 of that on it. Tokens are those of an .npz (as `smalti sample` writes it) or of a folder of
`smalti tokenize`; `smalti decompress` gives them back. One compiled program says the probabilities
on both sides, code by code: those of a parallel pass differ in their last bits, and one such bit
loses the rest of the message.

Beside the bytes of the file stand those that the tokens take without a generator, and --results
records them all, with what the generator's own likelihood asks for.
"""

import functools
import hashlib
import json
import lzma
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import smalti
from smalti.data.tokens import TokensSource
from smalti.evaluation.archive import Archive
from smalti.evaluation.files import whole
from smalti.generators.autoregressive import Autoregressive
from smalti.generators.coding import Decoder, Encoder, frequencies
from smalti.generators.generator import check_null
from smalti.launch import cli, provenance, run as runs, state as states
from smalti.launch.progress import say, track
from smalti.tokenizers.spec import TokenSpec

MAGIC = b'smalti tokens 1\n'
BATCH = 64  # sequences side by side; part of the program, so that a file names its own
BATCHES = 4096  # and no file asks for more
HEADER = {'smalti': str, 'generator': str, 'sequences': int, 'batch': int, 'labels': bool,
          'backend': str, 'jax': str, 'check': str}


def compress(loaded: runs.Loaded, tokens: np.ndarray, labels: np.ndarray | None = None, *,
             batch: int = BATCH) -> bytes:
  """A file with tokens int32[n, N, D], and labels int32[n] where there are any.

  Raises:
    ValueError: a generator that says no probabilities code by code, tokens that are not its, or no
      labels for one that was always told them.
  """
  model, spec = _model(loaded), loaded.spec
  tokens = _integers('tokens', tokens)
  if tokens.ndim != 3 or tokens.shape[1:] != (spec.length, spec.depth) or (
      tokens.size and not ((tokens >= 0) & (tokens < np.array(spec.vocab))).all()):
    raise ValueError(f'tokens of shape {tokens.shape} are not of this generator: it has '
                     f'{spec.length} x {spec.depth} codes with alphabets {spec.vocab}.')
  tokens = tokens.astype(np.int32)
  flat = np.asarray(spec.to('flat', tokens))[..., 0]
  if not np.array_equal(np.asarray(spec.canonical(tokens)), tokens):
    raise ValueError('tokens go on after their EOS; what follows it must repeat it.')
  null = model.classes
  if labels is None:
    check_null(model, 'give an .npz with labels in `arr_1`, or a folder of tokens with labels')
    rows = np.full(len(flat), null, np.int32)
  else:
    rows = _integers('labels', labels)
    if rows.shape != (len(flat),) or not null or (len(rows) and not (
        (rows >= 0) & (rows < null)).all()):
      raise ValueError(f'labels of shape {rows.shape} do not fit {len(flat)} sequences of a '
                       f'generator with classes={null}.')
    rows = rows.astype(np.int32)
  encoder = Encoder()

  def choose(counts, at):
    symbol = int(at)
    encoder.encode(counts, symbol)
    return symbol

  _walk(model, spec, len(flat), batch, labels is not None,
        lambda counts, n, i: choose(counts, rows[n] if i < 0 else flat[n, i]))
  header = {
      'smalti': smalti.__version__, 'generator': mark(loaded), 'tokenizer': loaded.fingerprint,
      'spec': spec.to_json(), 'sequences': len(flat), 'batch': batch,
      'labels': labels is not None, 'backend': jax.default_backend(), 'jax': jax.__version__,
      'check': _check(flat, rows)}
  text = json.dumps(header, sort_keys=True).encode()
  data = MAGIC + len(text).to_bytes(4, 'little') + text + encoder.finish()
  return data + hashlib.sha256(data).digest()


def decompress(loaded: runs.Loaded, data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
  """Tokens int32[n, N, D] and labels int32[n] (None without any) of `compress`'s bytes.

  Raises:
    ValueError: damaged bytes, another generator, or another program than the one that wrote them.
  """
  model, spec, header = _model(loaded), loaded.spec, read_header(data)
  if header['generator'] != mark(loaded):
    raise ValueError(f'the file was written with generator {header["generator"]}, and '
                     f'{loaded.path} is {mark(loaded)}; name the one that wrote it.')
  start = len(MAGIC) + 4 + int.from_bytes(data[len(MAGIC):len(MAGIC) + 4], 'little')
  decoder, length = Decoder(data[start:-32]), spec.length * spec.depth
  found: list[np.ndarray] = []  # a label and its codes; grows with what is read, not as it is told

  def choose(counts, n, i):
    if n == len(found):
      found.append(np.full(1 + length, 0 if spec.eos is None else spec.eos, np.int32))
      found[n][0] = model.classes
    found[n][1 + i] = symbol = decoder.decode(counts)
    return symbol

  _walk(model, spec, header['sequences'], header['batch'], header['labels'], choose)
  rows, flat = np.split(np.reshape(found, (-1, 1 + length)).astype(np.int32), [1], 1)
  rows = rows[:, 0]
  if _check(flat, rows) != header['check']:
    raise ValueError(
        f'the probabilities here are not those of the writer (jax {header["jax"]} on '
        f'{header["backend"]}; here {jax.__version__} on {jax.default_backend()}); decompress '
        'where it was compressed.')
  tokens = np.asarray(spec.back('flat', flat[..., None]), np.int32)
  return tokens, rows if header['labels'] else None


def read_header(data: bytes) -> dict[str, Any]:
  """The header of a whole file.

  Raises:
    ValueError: not such a file, or not all of it is as it was written.
  """
  if not data.startswith(MAGIC[:len(MAGIC) - 2]):
    raise ValueError('not a file of `smalti compress`.')
  if not data.startswith(MAGIC):
    raise ValueError('the file has another format than this version reads; use its own.')
  if hashlib.sha256(data[:-32]).digest() != data[-32:]:
    raise ValueError('the file is damaged or not whole; copy it again.')
  size = int.from_bytes(data[len(MAGIC):len(MAGIC) + 4], 'little')
  try:
    header = json.loads(data[len(MAGIC) + 4:len(MAGIC) + 4 + size])
    sane = header['sequences'] >= 0 and 1 <= header['batch'] <= BATCHES and all(
        type(header[name]) is kind for name, kind in HEADER.items())
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'the header of the file is none: {error!r}.') from error
  if not sane:
    raise ValueError(f'the header of the file asks for what no file holds: {header}.')
  return header


def rivals(spec: TokenSpec, tokens: np.ndarray) -> dict[str, float]:
  """Bytes of tokens int32[n, N, D] without a generator.

  'packed' is log2 of the alphabets, 'lzma' LZMA at its best over the valid codes in as few bytes
  each as hold them, 'unigram' a coder that counts the codes of each depth as it goes, from one.
  """
  there = np.asarray(spec.valid(tokens))
  width = np.min_scalar_type(max(spec.vocab) - 1).newbyteorder('<')
  bits = 0.0
  for d, vocab in enumerate(spec.vocab):  # of all orders of such counts the price is the same
    count = np.bincount(tokens[..., d][there[..., d]], minlength=vocab)
    nats = special.gammaln(count.sum() + vocab) - special.gammaln(vocab) - special.gammaln(
        count + 1).sum()
    bits += nats / np.log(2)
  return {'packed': spec.bits * len(tokens) / 8,
          'lzma': float(len(lzma.compress(
              tokens[there].astype(width).tobytes(), preset=9 | lzma.PRESET_EXTREME))),
          'unigram': bits / 8}


def likelihood(loaded: runs.Loaded, tokens: np.ndarray, labels: np.ndarray | None = None, *,
               batch: int = BATCH) -> float:
  """Bytes at the likelihood of a parallel pass, the labels' included: what coding can approach."""
  model = _model(loaded)
  score = jax.jit(lambda model, rows: model.log_prob(rows))
  nats = 0.0
  for i in range(0, len(tokens), batch):
    index = np.minimum(np.arange(i, i + batch), len(tokens) - 1)  # one shape, one program
    rows = {'tokens': jnp.asarray(tokens[index])}
    if labels is not None:
      rows['label'] = jnp.asarray(labels[index])
    nats -= np.asarray(score(model, rows), np.float64)[:len(tokens) - i].sum()
  return (nats / np.log(2) + (labels is not None) * len(tokens) * np.log2(
      max(model.classes, 1))) / 8


def mark(loaded: runs.Loaded) -> str:
  """16 hex digits over a generator's config, spec and weights."""
  params, buffers = states.Structure.of(loaded.model).split(loaded.model)
  return runs.fingerprint(loaded.stored, loaded.spec, params, buffers)


def _walk(model: Autoregressive, spec: Any, count: int, batch: int, labelled: bool,
          choose: Callable[[np.ndarray, int, int], int]) -> None:
  """Calls choose(counts, sequence, place) for every code in turn; place -1 is the label."""
  length = spec.length * spec.depth
  even = frequencies(np.full(max(model.classes, 1), 1 / max(model.classes, 1)))
  for first in track(range(0, count, batch), -(-count // batch), 'batch'):
    real = min(batch, count - first)
    label = np.full(batch, model.classes, np.int32)
    if labelled:
      label[:real] = [choose(even, first + n, -1) for n in range(real)]
    previous, done = np.zeros(batch, np.int32), np.zeros(batch, bool)
    cache = jax.tree.map(jnp.copy, model.transformer.cache(batch, length))  # each is given away
    for i in range(length):
      if done[:real].all():
        break
      probability, cache = probabilities(model, cache, previous, label, jnp.int32(i))
      counts = frequencies(np.asarray(probability)[:real])
      for n in range(real):
        if not done[n]:
          previous[n] = choose(counts[n], first + n, i)
          done[n] = spec.eos is not None and previous[n] == spec.eos


@functools.partial(jax.jit, donate_argnums=1)
def probabilities(model: Autoregressive, cache: Any, previous: jax.Array, label: jax.Array,
                  i: jax.Array) -> tuple[jax.Array, Any]:
  logits, cache = model.advance(cache, previous, label, i)
  return jax.nn.softmax(logits, -1), cache


def _model(loaded: runs.Loaded) -> Autoregressive:
  if not isinstance(loaded.model, Autoregressive):
    raise ValueError(f'{loaded.path} is a {runs.kind(loaded.model)}, which does not say how likely '
                     'each code is given those before; compress with an autoregressive generator.')
  if loaded.model.text is not None:
    raise ValueError(f'{loaded.path} reads text, which is not kept with compressed codes; compress '
                     'with a generator of labels, or without a condition.')
  return loaded.model


def _integers(name: str, values: np.ndarray) -> np.ndarray:
  """An array as it is; of floats a cast would make other codes, without a word."""
  values = np.asarray(values)
  if values.dtype.kind not in 'iu':
    raise ValueError(f'{name} of dtype {values.dtype} must be integers; write them as int32.')
  return values


def _check(*arrays: np.ndarray) -> str:
  return hashlib.sha256(b''.join(x.astype('<i4').tobytes() for x in arrays)).hexdigest()[:16]


def read_tokens(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
  """Tokens and labels of an .npz or a token folder.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: what is there is neither, or is damaged.
  """
  if path.is_dir():
    source = TokensSource(path)
    rows = source.read(np.arange(len(source)))
    return np.asarray(rows['tokens']), rows.get('label')
  remedy = 'give an .npz with `tokens`, or a folder of `smalti tokenize`'
  with Archive(path, 'tokens', remedy) as archive:
    return archive.read('tokens'), archive.read('arr_1') if 'arr_1' in archive.names else None


def define(values: Any) -> None:
  from absl import flags
  flags.DEFINE_string('workdir', None, 'The generator: a run, RUN@STEP or an exported file.',
                      flag_values=values)
  flags.DEFINE_string('tokens', None, 'An .npz with `tokens`, or a folder of stored tokens.',
                      flag_values=values)
  flags.DEFINE_string('out', None, 'The file to write.', flag_values=values)
  flags.DEFINE_integer('batch_size', BATCH, 'Sequences side by side.', flag_values=values,
                       lower_bound=1, upper_bound=BATCHES)
  flags.DEFINE_string('results', None, 'Also writes the numbers to this JSON file.',
                      flag_values=values)


def main(values: Any) -> int:
  if None in (values.workdir, values.tokens, values.out):
    raise ValueError('compress needs --workdir=GENERATOR, --tokens=FILE and --out=FILE.')
  loaded = runs.load(values.workdir)
  tokens, labels = read_tokens(pathlib.Path(values.tokens))
  if not getattr(loaded.model, 'classes', 0):
    labels = None
  data = compress(loaded, tokens, labels, batch=values.batch_size)
  tokens, labels = (x if x is None else x.astype(np.int32) for x in (tokens, labels))  # in range
  out = pathlib.Path(values.out)
  with whole(out) as file:
    file.write(data)
  valid, others = int(np.asarray(loaded.spec.valid(tokens)).sum()), rivals(loaded.spec, tokens)
  say(f'{len(tokens)} sequences in {len(data):,} bytes, {8 * len(data) / max(valid, 1):.3f} bits '
      f'per token, labels and header included; packed {others["packed"]:,.0f}, LZMA '
      f'{others["lzma"]:,.0f}, by counts {others["unigram"]:,.0f} bytes: {out}')
  if values.results:
    exact = np.array_equal(decompress(loaded, data)[0], tokens)
    sizes = {'smalti': float(len(data)), 'likelihood': likelihood(loaded, tokens, labels), **others}
    provenance.record(
        values.results, None, {name: {'bytes': size, 'bits_per_token': 8 * size / max(valid, 1)}
                               for name, size in sizes.items()},
        sequences=len(tokens), tokens=valid, labels=labels is not None, exact=exact,
        head_bytes=len(compress(loaded, tokens[:0], None if labels is None else labels[:0])),
        run=f'{loaded.path.name}@{loaded.step}', config=loaded.stored)
    say(f'{values.results}')
  return 0


if __name__ == '__main__':
  cli.run('compress')
