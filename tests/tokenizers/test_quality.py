"""Every quantizer learns: 200 steps of a small net against components of patches, at equal bits.

Digits of 8 x 8 as four patches of about 8 bits. The baseline rounds the principal components of 4 x
4 patches, fitted on the training images, and is entropy-coded; k-means, JPEG and 2,000 steps of a
larger net on photographs are `smalti sweep --config=quantizers`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smalti.data.digits import DigitsConfig
from smalti.evaluation import baselines, reconstruction
from smalti.launch import optimizer as optimizers, state as states
from smalti.launch.experiment import OptimizerConfig
from smalti.launch.step import train_step
from smalti.networks.pixels import to_float, to_uint8
from smalti.tokenizers.autoencoder import AutoencoderConfig
from smalti.tokenizers.bernoulli import BernoulliConfig
from smalti.tokenizers.binary import BSQConfig, LFQConfig
from smalti.tokenizers.clustering import ClusteringConfig
from smalti.tokenizers.grouped import GroupedConfig
from smalti.tokenizers.gumbel import GumbelConfig
from smalti.tokenizers.ibq import IBQConfig
from smalti.tokenizers.image import LossWeights
from smalti.tokenizers.multiscale import MultiScaleConfig
from smalti.tokenizers.partitioned import PartitionedConfig
from smalti.tokenizers.recurrent import RecurrentConfig
from smalti.tokenizers.residual import ResidualConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.simvq import SimVQConfig
from smalti.tokenizers.sinkhorn import SinkhornConfig
from smalti.tokenizers.sparse import SparseConfig
from smalti.tokenizers.vq import VQConfig

BOOK, SMALL = dict(codes=256, dim=8), VQConfig(codes=16, dim=8)
ROWS = {
    'vq': (VQConfig(**BOOK), {}),
    'vq_gradient': (VQConfig(**BOOK, update='gradient'), {}),
    'vq_rotation': (VQConfig(**BOOK, estimator='rotation'), {}),
    'vq_clustering': (
        VQConfig(**BOOK, update='gradient', revival=0.0, clustering=ClusteringConfig()), {}),
    'vq_sinkhorn': (VQConfig(**BOOK, update='gradient', assignment=SinkhornConfig()), {}),
    'simvq': (SimVQConfig(**BOOK), {}),
    'ibq': (IBQConfig(**BOOK), dict(commitment=1.0, entropy=0.05)),
    'fsq': (FSQConfig(levels=(8, 6, 5)), {}),
    'lfq': (LFQConfig(bits=8), dict(reconstruction=4.0, entropy=0.02, entropy_boost=3.0)),
    'bsq': (BSQConfig(bits=8), dict(commitment=0.0, entropy_boost=3.0)),
    'bernoulli': (BernoulliConfig(bits=8, dim=16), {}),
    'gumbel': (GumbelConfig(codes=256, dim=16, steps=200), dict(entropy=5e-4)),
    'residual': (ResidualConfig(quantizer=SMALL, levels=2), {}),
    'product': (GroupedConfig(quantizer=SMALL), {}),
    'grvq': (GroupedConfig(quantizer=ResidualConfig(
        quantizer=VQConfig(codes=4, dim=8), levels=2)), {}),
    'mcrvq': (PartitionedConfig(
        quantizer=VQConfig(codes=6, dim=8), levels=3, split=2, dropout=0.0), {}),
    'multiscale': (MultiScaleConfig(
        quantizer=VQConfig(codes=84, dim=8, update='gradient'), scales=(1, 2)), {}),
    'sparse': (SparseConfig(codes=16, dim=16, active=2), {}),
    'recurrent': (RecurrentConfig(dim=16, bits=4, levels=2, hidden=32), {}),
}
TRAIN, BATCH, STEPS = 1437, 128, 200


@functools.cache
def images(split, count):
  return DigitsConfig().open(split).read(np.arange(count))['image']


@functools.cache
def components():
  return baselines.pca(images('train', TRAIN), images('eval', 360), side=4)


# The least part of the codes that patches of the training images take; measured: VQ 0.94, Sinkhorn
# 0.99, SimVQ 1.00, FSQ 0.81, LFQ 0.98, BSQ 0.93; all of 1,024 in 2,000 steps on photographs.
USED = {'vq': 0.9, 'vq_sinkhorn': 0.95, 'simvq': 0.95, 'fsq': 0.75, 'lfq': 0.95, 'bsq': 0.9}
# What draws its codes or scores them begins late: 12.7, 14.7 and 12.0 dB where 14.9 is the bar.
LATE = ('ibq', 'bernoulli', 'gumbel')


@pytest.mark.parametrize('row', [
    row if row == 'fsq' else pytest.param(row, marks=[pytest.mark.slow, *(
        [pytest.mark.xfail(reason='not in 200 steps')] if row in LATE else [])]) for row in ROWS])
def test_a_small_net_beats_components_of_patches(row):
  quantizer, weights = ROWS[row]
  config = AutoencoderConfig(
      image_size=(8, 8), channels=1, width=32, multipliers=(1,), blocks=0, patch=4,
      quantizer=quantizer, weights=LossWeights(**weights))
  build = lambda rngs: config.build(rngs=rngs)  # noqa: E731
  rule = optimizers.make(OptimizerConfig(rate=2e-3, warmup=50), None, STEPS)
  structure = states.structure(lambda: build(nnx.Rngs(0)))
  state = states.init(build, rule, jax.random.key(0), ema=False)
  model = structure.merge(state['params'], state['buffers'])
  train = images('train', TRAIN)
  model.prepare({'image': to_float(jnp.asarray(train[:BATCH]))}, key=jax.random.key(0))
  params, buffers = structure.split(model)
  state = {**state, 'params': params, 'buffers': buffers}
  step = jax.jit(functools.partial(train_step, structure=structure, optimizer=rule))
  rows = np.random.default_rng(0).integers(0, TRAIN, (STEPS, BATCH))
  for chosen in rows:
    state, _ = step(state, {'image': jnp.asarray(train[chosen])}, jax.random.key(1))
  model, held_out = structure.merge(state['params'], state['buffers']), images('eval', 360)
  tokens = np.asarray(jax.jit(lambda m, x: m.encode(to_float(x)))(model, train))
  used = np.mean([np.unique(tokens[..., i]).size / v for i, v in enumerate(model.spec.vocab)])
  remade = jax.jit(lambda m, x: to_uint8(m.decode(m.encode(to_float(x)))))(model, held_out)
  found = float(reconstruction.measure(held_out, np.asarray(remade)).psnr.mean())
  bar = baselines.at_bits(components(), model.spec.bits)
  print(f'{row}: {found:.2f} dB at {model.spec.bits:.1f} bits; components {bar.psnr:.2f}; '
        f'{used:.2f} of the codes')
  assert 31 <= model.spec.bits <= 33 and found > bar.psnr
  assert used > USED.get(row, 0.0)
