"""The Generator contract: tokens to a distribution over tokens, and samples of it."""

import dataclasses
import math
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from smalti.generators import logits as ids, schedules
from smalti.networks.model import ModelConfig
from smalti.tokenizers.spec import TokenSpec


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type) -> type:
  """Makes a frozen dataclass a pytree of sampling settings.

  Fields annotated as float (or `float | None`) are traced leaves, so that a sweep over them
  compiles once; None is no leaf, so switching a setting on or off is another program. All other
  fields (counts, kinds, top-k) are static.
  """
  cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
  floats = [f.name for f in dataclasses.fields(cls) if f.type in (float, float | None)]
  static = [f.name for f in dataclasses.fields(cls) if f.name not in floats]
  return jax.tree_util.register_dataclass(cls, data_fields=floats, meta_fields=static)


class Settings:
  """Base of all sampling settings; arguments of `sample`, never fields of a model."""


@settings
class DrawSettings(Settings):
  """What is done to logits before a draw.

  Args:
    temperature, top_k, typical, top_p, min_p: see `generators.logits.process`; None is off.

  Raises:
    ValueError: a temperature below 0, or a mass or fraction outside 0..1.
  """
  temperature: float = 1.0
  top_k: int | None = None
  typical: float | None = None
  top_p: float | None = None
  min_p: float | None = None

  def __post_init__(self):
    check_floats(self, 'temperature', above=0)
    check_floats(self, 'typical', 'top_p', 'min_p', above=0, below=1)

  def process(self, logits: Float[Array, '*b v'], *, temperature: ids.Scalar | None = None
              ) -> Float[Array, '*b v']:
    """Logits of the distribution that is sampled; a temperature is instead of that of these."""
    return ids.process(
        logits, temperature=self.temperature if temperature is None else temperature,
        top_k=self.top_k, typical=self.typical, top_p=self.top_p, min_p=self.min_p)


@settings
class GuidanceSettings(Settings):
  """Classifier-free guidance.

  Args:
    guidance: scale s of u + s (c - u), 1 is unguided, on a doubled batch; None is one pass without
      the null label.
    guidance_schedule: s over the steps, see `schedules.guidance`, with its power, start and stop.
  """
  guidance: float | None = None
  guidance_schedule: schedules.Guidance = 'constant'
  guidance_power: float = 1.0
  guidance_start: float = 0.0
  guidance_stop: float = 1.0

  def scales(self, steps: int, own: int | Int[Array, 'b'] | None = None
             ) -> Float[Array, 't *b'] | None:
    """s of every step, None without guidance; for each row where they have steps of their `own`."""
    if self.guidance is None:
      return None
    progress = schedules.progress(jnp.arange(steps), steps if own is None else own)
    return schedules.guidance(
        self.guidance_schedule, self.guidance, progress, power=self.guidance_power,
        start=self.guidance_start, stop=self.guidance_stop)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """What a generator draws.

  Attributes:
    tokens: int32[B, N, D], codes only: never MASK, BOS or a condition.
    nfe: passes of the network per example (guided passes count twice).
    exact: bool[B], whether the draw is from the model's own conditional given `known`.
    log_prob: float32[B] in nats of the drawn tokens under the sampling distribution, or None.
    steps: int32[T, B, N, D], the states on the way, or None.
  """

  tokens: Int[Array, 'b n d']
  nfe: Int[Array, ''] | int
  exact: Bool[Array, 'b']
  log_prob: Float[Array, 'b'] | None = None
  steps: Int[Array, 't b n d'] | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class GeneratorConfig(ModelConfig):
  """Base of all generator configs; the type of a config selects the generator."""

  def build(self, spec: TokenSpec, *, rngs: nnx.Rngs) -> 'Generator':
    raise TypeError(f'{type(self).__name__} does not say what it builds.')


class Generator(nnx.Module):
  """Base of generators over tokens of `spec`.

  `keys` holds one typed key per example and fixes the batch size; every draw folds step and
  purpose into the example's own key, so a sample does not depend on its neighbours or the mesh.
  """

  spec: TokenSpec

  def loss(self, batch: dict[str, Array], *, step: Array, key: Array, train: bool = True
           ) -> tuple[Array, dict[str, Any]]:
    """Mean nats per valid token; aux holds `metrics`, `weight` and `statistics`.

    A loss that draws a time per example takes it from `schedules.strata(batch, key)`, so that
    micro-batches share the strata of their batch.
    """
    raise TypeError(f'{type(self).__name__} has no loss.')

  def likelihood(self, settings: Any = None) -> Literal['exact', 'bound'] | None:
    """What `nats` says of the law that `settings` draw from; None of a model that has no bits."""
    del settings  # a model has one, but where it says otherwise
    return 'exact' if hasattr(self, 'log_prob') else 'bound' if hasattr(self, 'elbo') else None

  def nats(self, batch: dict[str, Array], *, key: Array, settings: Any = None
           ) -> Float[Array, 'b']:
    """log p(tokens | condition) of every example, exact or a lower bound: see `likelihood`.

    Temperature, truncation, guidance and fewer passes of a masked model change the law and have no
    likelihood of their own: this is the trained model's.
    """
    model: Any = self  # which of the two it has, `likelihood` says
    exact = self.likelihood(settings) == 'exact'
    return model.log_prob(batch) if exact else model.elbo(batch, key=key)

  def sample(self, condition: dict[str, Array] | None, *, keys: Array, settings: Any,
             known: Int[Array, 'b n d'] | None = None,
             known_mask: Bool[Array, 'b n d'] | None = None) -> Sample:
    raise TypeError(f'{type(self).__name__} does not sample.')


@jax.jit
def generate(model: Generator, condition: dict[str, Array] | None, *, keys: Array, settings: Any,
             known: Array | None = None, known_mask: Array | None = None) -> Sample:
  """Jitted `model.sample`; labels, seeds and float settings share one program."""
  return model.sample(
      condition, keys=keys, settings=settings, known=known, known_mask=known_mask)


def read_labels(classes: int, condition: dict[str, Array] | None, size: int
                ) -> Int[Array, 'b'] | None:
  """Rows of a label table whose last, `classes`, is the null label; None where classes is 0.

  Negative labels and a missing condition are the null label.

  Raises:
    ValueError: a condition without `label`.
  """
  if not classes:
    return None
  if not condition:
    return jnp.full(size, classes)
  if 'label' not in condition:
    raise ValueError(
        f'classes={classes} needs an entry `label`, got {", ".join(condition) or "none"}.')
  label = jnp.asarray(condition['label'], jnp.int32)
  return jnp.where(label < 0, classes, label)


def read_first(classes: int, condition: dict[str, Array] | None, size: int) -> Int[Array, 'b']:
  """`read_labels` of a model whose first slot is a row of the label table: without classes, 0."""
  labels = read_labels(classes, condition, size)
  return jnp.zeros(size, jnp.int32) if labels is None else labels


def drop_labels(model: Any, labels: Int[Array, 'b'] | None, key: Array) -> Int[Array, 'b'] | None:
  """Labels of training: the share `label_dropout` of them is the null label that guidance needs."""
  if labels is None or not model.classes:
    return labels
  dropped = jax.random.bernoulli(key, model.label_dropout, labels.shape)
  return jnp.where(dropped, model.classes, labels)


def check_request(model: Any, condition: dict[str, Array] | None, known: Array | None,
                  known_mask: Array | None, guidance: Any) -> None:
  """What `sample` of a model with `classes` and `label_dropout` cannot do.

  Raises:
    ValueError: known tokens without their mask, or a label or guidance without classes.
  """
  if (known is None) != (known_mask is None):
    raise ValueError('known and known_mask go together: give both or neither.')
  if condition and 'label' in condition and not model.classes:
    raise ValueError('This model was built with classes=0; sample it without a label.')
  if guidance is not None:
    if not model.classes or not condition:
      raise ValueError('guidance needs a model with classes and a condition with `label`.')
    check_guided(model.label_dropout)


def check_guided(label_dropout: float) -> None:
  """Raises ValueError where the null condition, which guidance leads away from, was not trained."""
  if not label_dropout:
    raise ValueError('guidance leads away from the null condition, which label_dropout=0 never '
                     'trains; sample with guidance=none, or train with label_dropout=0.1.')


def check_null(model: Any, remedy: str) -> None:
  """Raises ValueError where a model is asked without the label or text that it was always told.

  Args:
    remedy: what to do instead of training again.
  """
  told = getattr(model, 'classes', 0) or getattr(model, 'text', None) is not None
  if told and getattr(model, 'label_dropout', None) == 0:
    raise ValueError('This generator is asked without a condition, and label_dropout=0 never '
                     f'trains the null condition; {remedy}, or train with label_dropout=0.1.')


def check_floats(settings: Settings, *names: str, above: float, below: float = math.inf) -> None:
  """Raises ValueError where a setting is beyond its range; None and what is traced are not."""
  for name in names:
    value = getattr(settings, name)
    if isinstance(value, (int, float)) and not above <= value <= below:
      raise ValueError(f'{name}={value} must be ' + (
          f'within {above}..{below}.' if below < math.inf else f'{above} or more.'))


def check_shares(**shares: float) -> None:
  """Raises ValueError where a chance or share, given by its name, is not within 0..1."""
  for name, share in shares.items():
    if not 0 <= share <= 1:
      raise ValueError(f'{name}={share} must be within 0..1.')


def example_keys(seed: int | Array, index: Int[Array, 'b']) -> Array:
  """One key per example from a seed (or key) and the examples' global indices."""
  root = jax.random.key(seed) if not hasattr(seed, 'dtype') else seed
  return jax.vmap(lambda i: jax.random.fold_in(root, i))(index)


def fold(keys: Array, data: Array | int) -> Array:
  """Every example's key with a step or purpose folded in."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def rank(score: Float[Array, '*b n'] | Int[Array, '*b n']) -> Int[Array, '*b n']:
  """The place of every entry when the row is sorted; ties have places of their own."""
  return jnp.argsort(jnp.argsort(score, -1), -1)
