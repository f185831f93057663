"""`smalti bench quantizers`: search, training steps, convolutions beside peers; growth with K.

The peers are torch and vector-quantize-pytorch, where --peer_python has them; they get our
codebooks and weights, and their answers are compared with ours before the clock starts.
"""

import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smalti.launch import timing
from smalti.launch.timing import Bench, Row
from smalti.networks.convnet import ConvDecoder, ConvEncoder
from smalti.tokenizers.binary import BSQConfig, LFQConfig
from smalti.tokenizers.ibq import IBQConfig
from smalti.tokenizers.quantizer import QuantizerConfig, absorb
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.search import nearest
from smalti.tokenizers.simvq import SimVQConfig
from smalti.tokenizers.vq import VQConfig

BITS = (10, 12, 14, 16, 18)  # log2 K
LEVELS = {10: (8, 5, 5, 5), 12: (7, 5, 5, 5, 5), 14: (8, 8, 8, 6, 5), 16: (8, 8, 8, 5, 5, 5),
          18: (8,) * 6}


def quantizers(bench: Bench) -> Iterator[Row]:
  """Search, training steps, convolutions, and how time and memory grow with the codebook."""
  yield from _searches(bench)
  yield from _steps(bench)
  yield _autoencoder(bench)
  yield from _growth(bench)


def _searches(bench: Bench) -> Iterator[Row]:
  """Nearest code."""
  rows = 4096
  for (codes, dim), goal in {(1024, 256): 0.70, (8192, 32): 0.30, (65536, 8): 0.25}.items():
    random = np.random.default_rng(0)
    x = jax.device_put(random.standard_normal((rows, dim), np.float32))
    table = random.standard_normal((codes, dim), np.float32)
    # of one length, so that the peer may leave the norms out
    table = jax.device_put(table / np.linalg.norm(table, axis=-1, keepdims=True))
    search = jax.jit(nearest)
    ours = timing.Ours(functools.partial(search, x, table))
    for form, text in (('product', 'torch (x @ c.T).argmax'), ('cdist', 'torch cdist.argmin')):
      found = bench.against('nearest', codes=codes, dim=dim, rows=rows, seed=0, form=form)
      if found:
        agree = float(np.mean(np.asarray(search(x, table)) == np.asarray(found['check'])))
        if agree < 0.999:  # what is left are ties in the last digit
          raise RuntimeError(f'only {agree:.2%} of the codes agree with {text}.')
      yield Row(f'nearest code, {rows} x {dim} among {codes}', text, bench.run(ours),
                goal if form == 'product' else None)
      if not found:
        break
    if found := bench.against('nearest', codes=codes, dim=dim, rows=rows, seed=0, form='product'):
      # every exact search computes these products: no ratio above can fall much below this one
      product = jax.jit(lambda x, table: x @ table.T)
      yield Row(f'the products alone, {rows} x {dim} by {codes}', 'torch (x @ c.T).argmax',
                bench.run(timing.Ours(functools.partial(product, x, table))))


def _steps(bench: Bench) -> Iterator[Row]:
  """Straight-through and commitment gradients, and the moving averages, of one batch."""
  for (codes, dim, rows), goal in {
      (1024, 256, 4096): 0.15, (8192, 32, 4096): 0.08, (16384, 8, 8192): 0.05}.items():
    config = VQConfig(codes=codes, dim=dim, init='normal', revival=0.0)
    yield _step(bench, f'VQ train step, {rows} x {dim} among {codes}', config, rows, goal)
  level = VQConfig(codes=1024, dim=64, init='normal', revival=0.0)
  rvq = ResidualConfig(quantizer=level, levels=8)
  yield _step(bench, 'RVQ train step, 8 levels, 4096 x 64 among 1024', rvq, 4096, 0.35)
  eight, one = Step(rvq, 4096), Step(ResidualConfig(quantizer=level, levels=1), 4096)
  yield Row('RVQ train step, 8 levels', 'ours with 1 level', bench.compare(eight, one), 8.5)


def _step(bench: Bench, case: str, config: QuantizerConfig, rows: int, goal: float) -> Row:
  ours = Step(config, rows)
  peer = bench.peer and bench.peer.versions.get('vector_quantize_pytorch')
  if not peer:
    return Row(case, 'vector-quantize-pytorch', timing.alone(
        ours, rounds=bench.rounds, seconds=bench.seconds), goal)
  path = bench.folder / 'codebooks.npz'
  np.savez(path, z=ours.z, codebooks=ours.codebooks)
  found = bench.against('vector_quantizer', path=str(path))
  agree = float(np.mean(ours.tokens == np.asarray(found and found['check'])))
  if agree < 0.999:  # what is left are ties in the last digit
    raise RuntimeError(f'only {agree:.2%} of the codes agree with vector-quantize-pytorch.')
  return Row(case, f'vector-quantize-pytorch {peer}', bench.run(ours), goal)


class Step(timing.Ours):
  """A training step of a quantizer alone: losses, gradients by vectors and parameters, `absorb`.

  `first` is what tracing and compiling took, `bytes` the peak of its temporary memory.
  """

  def __init__(self, config: QuantizerConfig, rows: int):
    q = config.build(rngs=nnx.Rngs(0))
    graph, *parts = nnx.split(q, nnx.Param, ...)
    params, buffers = parts
    # a copy: the buffers are donated
    self.codebooks = np.stack([np.array(b.codebook[...]) for b in getattr(q, 'levels', [q])]
                              ) if hasattr(q, 'absorb') or hasattr(q, 'levels') else None
    random = np.random.default_rng(0)
    self.z = jax.device_put(random.standard_normal((1, rows, q.dim), np.float32))

    def step(params, buffers, z, key):
      def loss(params, z):
        out = nnx.merge(graph, params, buffers)(z, key=key, train=True)
        return jnp.sum(out.vectors) + 0.25 * sum(out.losses.values()), out

      gradients, out = jax.grad(loss, (0, 1), has_aux=True)(params, z)
      q = nnx.merge(graph, params, buffers)
      absorb(q, out.statistics)
      return nnx.state(q, nnx.Not(nnx.Param)), gradients, out.tokens, out.losses

    seeds, self.state = itertools.count(), buffers
    begin = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=1).lower(
        params, buffers, self.z, jax.random.key(0)).compile()
    self.first = time.perf_counter() - begin
    self.bytes = compiled.memory_analysis().temp_size_in_bytes

    def run() -> Any:
      self.state, gradients, tokens, losses = compiled(
          params, self.state, self.z, jax.random.key(next(seeds)))
      return gradients, tokens, losses

    self.run, self.tokens = run, np.asarray(run()[1])[0]


def _autoencoder(bench: Bench) -> Row:
  """Encoder and decoder of the VQGAN family, forward and backward."""
  sizes: dict[str, Any] = dict(channels=3, features=8, width=64, multipliers=(1, 2), blocks=1)
  model = nnx.Dict(encoder=ConvEncoder(**sizes, rngs=nnx.Rngs(0)),
                   decoder=ConvDecoder(**sizes, rngs=nnx.Rngs(1)))
  graph, params = nnx.split(model)
  path = bench.folder / 'autoencoder.npz'
  x = np.random.default_rng(0).uniform(-1, 1, (8, 64, 64, 3)).astype(np.float32)
  flat: dict[str, Any] = {'/'.join(map(str, name)): np.asarray(leaf[...])
          for name, leaf in nnx.to_flat_state(params)}
  np.savez(path, x=x, **flat)

  @jax.jit
  @jax.value_and_grad
  def step(params, x):
    model = nnx.merge(graph, params)
    return jnp.mean(jnp.square(model.decoder(model.encoder(x)) - x))

  x = jax.device_put(x)
  ours = timing.Ours(functools.partial(step, params, x))
  found = bench.against('autoencoder', path=str(path), levels=len(sizes['multipliers']))
  if found:
    value, gradients = step(params, x)
    norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients))))
    if not np.allclose(found['check'], [float(value), norm], rtol=1e-3):
      raise RuntimeError(f'the peer has loss and gradient norm {found["check"]}, we have '
                         f'{[float(value), norm]}.')
  return Row('encoder and decoder, 64 x (1, 2), forward and backward, 8 images of 64 pixels',
             'torch, channels last', bench.run(ours), 1.3)


def _growth(bench: Bench, bits: tuple[int, ...] = BITS, rows: int = 4096) -> Iterator[Row]:
  """Training steps with 2^10 to 2^18 codes of 8 channels (binary and scalar codes: their own)."""
  kinds: dict[str, Any] = {
      'VQ': lambda b: VQConfig(codes=2**b, dim=8, init='normal'),
      'SimVQ': lambda b: SimVQConfig(codes=2**b, dim=8),
      'FSQ': lambda b: FSQConfig(levels=LEVELS[b]),
      'LFQ': lambda b: LFQConfig(bits=b),
      'BSQ': lambda b: BSQConfig(bits=b),
      'IBQ': lambda b: IBQConfig(codes=2**b, dim=8),
  }
  for name, config in kinds.items():
    steps = [Step(config(b), rows) for b in bits]
    found = [[step.measure(1) for step in steps] for _ in range(min(bench.rounds, 3))]
    for i, (b, step) in enumerate(zip(bits, steps)):
      own = [round[i] for round in found]
      yield Row(f'{name} train step, {rows} vectors, 2^{b} codes', '', {
          'our_time': timing.summary(step, own), 'compile_seconds': round(step.first, 2),
          'vectors_per_cpu_second': round(rows / np.median([t.cpu for t in own])),
          'temporary_mib': round(step.bytes / 2**20, 2)})
    slopes = [np.polyfit(np.array(bits), np.log2([t.cpu for t in round]), 1)[0]
              for round in found]
    yield Row(f'{name}: exponent of CPU time in K', 'proportional to K',
              {'exponent': timing.spread(slopes)}, 1.05, 'exponent')
    scores = 4 * rows * 2**bits[-1]
    yield Row(f'{name}: temporary memory, 2^{bits[-1]} codes',
              f'the {scores / 2**30:.1f} GiB of all scores',
              {'share': timing.spread([steps[-1].bytes / scores])}, 0.05, 'share')
