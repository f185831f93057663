"""FlexTok: an image as registers whose every prefix decodes, by a rectified flow.

Bachmann et al. 2025, arXiv 2502.13967 (apple/ml-flextok). The encoder's registers see the patches
and the registers before them; training replaces all but the first k quantized registers of an
example by one learned vector; the decoder learns the velocity of noised patches given them. What
few tokens leave open the decoder draws, so decoding needs keys, and the error of a reconstruction
is no measure of its worth. With schedule=None, mask='full' and LFQ it is FlowMo's first stage
(arXiv 2503.11056), without its perceptual term.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smalti.networks.flow import FlowTransformer, lean
from smalti.networks.layers import Embedding, Linear, deviation
from smalti.networks.pixels import to_float
from smalti.networks.transformer import TransformerConfig
from smalti.networks.vision import RegisterEncoder, patchify, unpatchify
from smalti.tokenizers import flow
from smalti.tokenizers.alignment import Alignment, AlignmentConfig
from smalti.tokenizers.flow import FlowSettings, Times
from smalti.tokenizers.image import LossWeights, psnr
from smalti.tokenizers.nested import Schedule, budgets, draw_budget
from smalti.tokenizers.quantizer import QuantizerConfig
from smalti.tokenizers.scalar import FSQConfig
from smalti.tokenizers.search import HIGHEST
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.tokenizer import Tokenizer, TokenizerConfig
from smalti.tokenizers.variational import VAEConfig, freeze

DROPPED, NULL = 0, 1  # rows of the learned vectors that stand for registers


@dataclasses.dataclass(kw_only=True, slots=True)
class FlexTokConfig(TokenizerConfig):
  """Images of one size to `registers` codes in an order.

  Attributes:
    image_size: (height, width).
    channels: of the image.
    vae: a trained KL-VAE whose latents take the place of the pixels, as published; its weights come
      by --init_from=vae=RUN and stay as they are. None works on pixels.
    patch: side of a patch, in latents (published: 2) or pixels.
    registers: N (published: 256).
    encoder, decoder: the blocks; their dtype is this config's. Published are `lean(12)` twice,
      `lean(18)` twice, and `lean(18)` with `lean(28)`.
    quantizer: its vectors are a linear map of the registers, and are mapped back linearly.
    reach: length of the rows of the map to the quantizer, whatever is learned: the root mean square
      of a vector over its c channels is about this while rows are orthogonal, and at most sqrt(c)
      times it. Without it FSQ's tanh saturates
      in the first steps where the rate is high, all registers in one corner. None is the published
      linear map.
    mask: 'causal' or 'full' attention among the encoder's registers.
    schedule: which prefixes are trained, see `nested.draw_budget`; None trains no prefix. The mode
      of the released models is not published; 'power' is good at powers of two alone.
    null: share of examples trained without any register, which guidance needs (not published).
    times: the law of noise levels (apple/ml-flextok has 'logit_normal').
    location: of the normal's mean in 'logit_normal'; above 0 more noise, where tokens matter most
      (SD3, arXiv 2403.03206, section 3.1; the published decoder has 0). At 0 one example in 600
      has a level above .95, and short trainings leave the first steps of decoding unlearned.
    stratified: spread the levels of a batch evenly over their law; evaluation always does.
    alignment: draws features of the decoder to those of a frozen network (REPA, arXiv 2410.06940;
      FlexTok has it, with DINOv2-L).
    weights: of the velocity's error ('reconstruction'), the quantizer's terms and `alignment`.
    dtype: compute dtype of the transformers; quantizer, norms and losses are float32.
  """
  image_size: tuple[int, int] = (32, 32)
  channels: int = 3
  vae: VAEConfig | None = None
  patch: int = 4
  registers: int = 16
  encoder: TransformerConfig = dataclasses.field(default_factory=lambda: lean(6, 192))
  decoder: TransformerConfig = dataclasses.field(default_factory=lambda: lean(6, 192))
  quantizer: QuantizerConfig = dataclasses.field(default_factory=FSQConfig)
  reach: float | None = 2.0
  mask: Literal['causal', 'full'] = 'causal'
  schedule: Schedule | None = 'uniform'
  null: float = 0.1
  times: Times = 'logit_normal'
  location: float = 0.0
  stratified: bool = True
  alignment: AlignmentConfig | None = None
  weights: LossWeights = dataclasses.field(default_factory=LossWeights)
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def build(self, *, rngs: nnx.Rngs) -> 'FlexTok':
    return FlexTok(self, rngs=rngs)

  def released(self) -> 'FlexTokConfig':
    return dataclasses.replace(self, alignment=None)


class FlexTok(Tokenizer):
  """Registers, quantized and nested, and a flow decoder that draws.

  Attributes:
    settings: what `decode` follows the flow with, unless it is given others.
    frozen: parts whose weights must come from another run.
  """

  settings = FlowSettings

  def __init__(self, config: FlexTokConfig, *, rngs: nnx.Rngs):
    self.size, self.channels = tuple(config.image_size), config.channels
    self.patch, self.mask, self.schedule = config.patch, config.mask, config.schedule
    self.null, self.times, self.location = config.null, config.times, config.location
    self.stratified = config.stratified
    self.weights = tuple(dataclasses.asdict(config.weights).items())  # hashable, for jit
    vae: Any = freeze(config.vae.build(rngs=rngs)) if config.vae else None
    self.vae = vae
    self.frozen = ('vae',) if config.vae else ()
    _check(config)
    field = vae.grid if config.vae else self.size
    features = vae.features if config.vae else config.channels
    if any(side < 1 or side % config.patch for side in field):
      raise ValueError(f'patch={config.patch} must divide {field}, what is flowed over.')
    self.grid = (field[0] // config.patch, field[1] // config.patch)
    self.features = config.patch ** 2 * features
    q: Any = config.quantizer.build(rngs=rngs)
    down, up = (dataclasses.replace(blocks, dtype=config.dtype)
                for blocks in (config.encoder, config.decoder))
    self.encoder = RegisterEncoder(
        down, channels=features, patch=config.patch, grid=self.grid, registers=config.registers,
        mask=config.mask, spread=0.02, rngs=rngs)
    self.reach = config.reach
    self.reduce = Linear(down.width, q.dim, bias=config.reach is None, dtype=config.dtype,
                         std=deviation(down.width, q.dim), result='float32', rngs=rngs)
    q.fits((config.registers,))
    self.quantizer = q
    self.expand = Linear(q.dim, up.width, bias=True, std=deviation(q.dim, up.width), rngs=rngs)
    self.places = Embedding(config.registers, up.width, rngs=rngs)
    self.absent = Embedding(2, up.width, rngs=rngs)
    self.decoder = FlowTransformer(
        up, grid=self.grid, features=self.features, registers=config.registers, rngs=rngs)
    self.alignment = Alignment(
        config.alignment, up.width, dtype=config.dtype, rngs=rngs) if config.alignment else None
    nested = config.schedule is not None
    self.spec = TokenSpec(
        grid=(config.registers,), vocab=q.vocab, factors=q.factors,
        order='nested' if nested else 'raster',
        budgets=budgets(config.registers, config.schedule) if nested else ())

  def patches(self, x: Array) -> Float[Array, 'b n f']:
    """What the flow leads to: pixels or scaled latents in patches, of uint8 or float images.

    Raises:
      ValueError: images of another size or number of channels.
    """
    if x.shape[1:] != (*self.size, self.channels):
      raise ValueError(
          f'Images of {x.shape[1:]} (height, width, channels) do not fit image_size={self.size}, '
          f'channels={self.channels}; convert them, or build the tokenizer with these.')
    x = to_float(x)
    return patchify(x if self.vae is None else self.vae.encode_latents(x), self.patch)

  def image(self, patches: Float[Array, 'b n f']) -> Float[Array, 'b h w c']:
    """The image of patches, not clipped."""
    x = unpatchify(patches, self.grid, self.patch)
    return x if self.vae is None else self.vae.decode_latents(x)

  def latents(self, x: Array, *, key: Array | None = None, train: bool = False
              ) -> Float[Array, 'b n f']:
    """What the quantizer is given: one vector per register."""
    x = unpatchify(self.patches(x), self.grid, self.patch)
    features = self.encoder(x, key=key, train=train)
    if self.reach is None:
      return self.reduce(features)
    kernel = self.reduce.kernel[...]
    rows = kernel * jax.lax.rsqrt(jnp.maximum(jnp.sum(kernel * kernel, 0), 1e-12))
    # features leave a layer norm, so their length is the root of their number
    length = self.reach * (kernel.shape[1] / kernel.shape[0]) ** 0.5
    return length * jnp.matmul(features.astype(jnp.float32), rows, precision=HIGHEST)

  def encode(self, x: Array, *, keys: Array | None = None) -> Int[Array, 'b n d']:
    keys = keys if self.quantizer.stochastic else None  # else nothing is drawn
    return self.quantizer(self.latents(x), key=keys).tokens

  def lookup(self, tokens: Int[Array, 'b n d']) -> Float[Array, 'b n f']:
    return self.quantizer.lookup(tokens)

  def soft_assign(self, x: Array, tau: float = 1.0) -> Float[Array, 'b n v']:
    """Log-probabilities of the codes of every register, where the quantizer has them."""
    return self.quantizer.soft_assign(self.latents(x), tau)

  def decode(self, tokens: Int[Array, 'b n d'], *, keep: Int[Array, 'b'] | None = None,
             keys: Array | None = None, settings: FlowSettings | None = None
             ) -> Float[Array, 'b h w c']:
    """Images in [-1, 1], drawn given the first `keep` tokens of each example.

    Args:
      keys: one per example, for the noise; the same key draws the same image in any batch.
      settings: steps and guidance; None takes the defaults.

    Raises:
      ValueError: no keys, or `keep` where no prefixes were trained.
    """
    if keys is None:
      raise ValueError('FlexTok draws what it decodes; give keys=, one key per example.')
    if keep is not None:
      self.spec.mask(keep)  # says why not
    vectors = self.lookup(tokens)
    return jnp.clip(self.decode_latents(vectors, keep=keep, keys=keys, settings=settings), -1, 1)

  def decode_latents(self, vectors: Float[Array, 'b n f'], *, keep: Int[Array, 'b'] | None = None,
                     keys: Array | None = None, settings: FlowSettings | None = None
                     ) -> Float[Array, 'b h w c']:
    """Images from vectors, which need not be codes; not clipped.

    Without keys the noise is zero: repeatable, for tests alone, since no such noise was trained on.
    """
    settings = settings or FlowSettings()
    shape = self.grid[0] * self.grid[1], self.features
    noise = (jnp.zeros((vectors.shape[0], *shape)) if keys is None
             else flow.draw_noise(keys, shape))
    registers = self.condition(vectors, keep)
    null = None
    if self.null:
      nothing = self.condition(vectors, keep, jnp.ones(vectors.shape[0], bool))
      null = lambda x, t: self.decoder(x, nothing, t)  # noqa: E731
    return self.image(flow.euler(
        lambda x, t: self.decoder(x, registers, t), noise, settings, null))

  def condition(self, vectors: Float[Array, 'b n f'], keep: Int[Array, 'b'] | None = None,
                null: Array | None = None) -> Float[Array, 'b n c']:
    """The decoder's registers: `keep` of each example as they are, none where `null`."""
    y = self.expand(vectors) + self.places.embedding[...]
    absent = self.absent.embedding[...]
    if keep is not None:
      kept = jnp.arange(y.shape[1]) < keep[:, None]
      y = jnp.where(kept[..., None], y, absent[DROPPED])
    return y if null is None else jnp.where(null[:, None, None], absent[NULL], y)

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Squared error of the velocity of `batch['image']`, and the quantizer's terms.

    Evaluation keeps all tokens. Its `mse` and `psnr` are of the decoder's guess at all noise, the
    mean of the images that have these tokens: what the tokens say, nothing drawn.
    """
    down, quantize, cut, drop, time, draw, up = jax.random.split(key, 7)
    patches = self.patches(batch['image'])
    count = patches.shape[0]
    q = self.quantizer(self.latents(batch['image'], key=down, train=train), key=quantize,
                       train=train)
    keep = null = None
    if train:
      if self.schedule is not None:
        keep = draw_budget(cut, count, self.spec.length, self.schedule)
      null = jax.random.bernoulli(drop, self.null, (count,))
    t = flow.draw_times(time, count, self.times, location=self.location,
                        stratified=self.stratified or not train, strata=batch.get('strata'))
    noise = jax.random.normal(draw, (patches.size,)).reshape(patches.shape)
    given = flow.mix(patches, noise, t), self.condition(q.vectors, keep, null), t
    aligned = {}
    if self.alignment is None:
      velocity = self.decoder(*given, key=up, train=train)
    else:
      velocity, hidden = self.decoder.tapped(*given, self.alignment.block, key=up, train=train)
      aligned = {'alignment': self.alignment(
          hidden, self._teacher(batch)(to_float(batch['image']), self.grid))}
    error = jnp.mean(jnp.square(velocity - (noise - patches)), (1, 2))
    terms = {'reconstruction': jnp.mean(error), **q.losses, **aligned}
    loss = LossWeights(**dict(self.weights)).total(terms, step, train=train)
    metrics = {**terms, **q.metrics, **flow.by_level(error, t)}
    if not train:
      x, y = to_float(batch['image']), self.image(noise - self.decoder(
          noise, self.condition(q.vectors), jnp.ones(count)))
      metrics |= {'mse': jnp.mean(jnp.square(x - jnp.clip(y, -1, 1))), 'psnr': jnp.mean(psnr(x, y))}
    statistics = None if q.statistics is None else {'quantizer': q.statistics}
    return loss, {'metrics': jax.lax.stop_gradient(metrics), 'weight': jnp.float32(count),
                  'statistics': statistics}

  def _teacher(self, batch: dict[str, Any]) -> Any:
    if 'teacher' not in batch:
      raise ValueError('alignment needs a frozen network in the batch, as `teacher`: smalti train '
                       'puts it there.')
    return batch['teacher']

  def prepare(self, batch: dict[str, Array], *, key: Array) -> None:
    """Data-dependent initialisation of the codebooks, from the encoder's first output."""
    self.quantizer.prepare(self.latents(batch['image']), key=key)


def _check(config: FlexTokConfig) -> None:
  if config.reach is not None and config.reach <= 0:
    raise ValueError(f'reach={config.reach} must be positive, or None for no bound.')
  if not 0 <= config.null < 1:
    raise ValueError(f'null={config.null} must be at least 0 and below 1.')
  if config.alignment and not 1 <= config.alignment.block < config.decoder.layers:
    raise ValueError(f'alignment.block={config.alignment.block} must be a block before the last of '
                     f'decoder.layers={config.decoder.layers}.')
  if config.times not in ('logit_normal', 'uniform'):
    raise ValueError(f'times={config.times!r} must be logit_normal or uniform.')
  if config.location and config.times == 'uniform':
    raise ValueError(f'location={config.location} is of times=logit_normal; leave it at 0.')
  vae = config.vae
  if vae and (tuple(vae.image_size), vae.channels) != (tuple(config.image_size), config.channels):
    raise ValueError(
        f'image_size={config.image_size}, channels={config.channels} must be those of the vae, '
        f'{vae.image_size} and {vae.channels}.')
