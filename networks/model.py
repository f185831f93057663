"""What everything that is trained has in common: a config that builds it, and a loss."""

import dataclasses


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelConfig:
  """Base of the configs of whatever is trained; the type of a config selects the class.

  The model it builds is an `nnx.Module` with

    loss(batch, *, step, key, train) -> (scalar, aux)

  aux = `metrics` (flat dict of scalars), `weight` (what the scalar was averaged over: accumulation
  forms `sum(w_i g_i) / sum(w_i)`) and `statistics` (for codebooks, or None). It may have
  `prepare(batch, *, key)`, run once before step 0. Parameters are `nnx.Param`; every other
  `nnx.Variable` is a buffer, which no gradient reaches.
  """

  def released(self) -> 'ModelConfig':
    """The config of what is used once training is over: without a discriminator, say."""
    return self
