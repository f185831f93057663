"""Laws that several generators share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats


@pytest.fixture
def fits():
  """Chi-square of counts of outcomes, p > 1e-3; what the law excludes must not occur."""
  def fits(counts, law) -> bool:
    law = np.asarray(law, np.float64).reshape(-1)
    possible = law > 0
    if counts[~possible].any():
      return False
    return stats.chisquare(
        counts[possible], law[possible] / law.sum() * counts.sum()).pvalue > 1e-3

  return fits


@pytest.fixture
def check_dropped():
  """Of 256 labels of 4 classes, which a network notes in `seen`, half are dropped in training."""
  def check(model, batch, seen):
    label = np.asarray(batch['label'])
    assert label.shape == (256,) and model.classes == 4 and model.label_dropout == 0.5
    for train in (True, False):
      model.loss(batch, step=jnp.array(0), key=jax.random.key(0), train=train)
    dropped, kept = seen
    assert 90 < (dropped == 4).sum() < 166
    np.testing.assert_array_equal(dropped[dropped < 4], label[dropped < 4])
    np.testing.assert_array_equal(kept, label)

  return check


@pytest.fixture
def check_token_mean():
  """Of strings of up to 4 codes, 3 ends them, whose table the model has: tokens count, not strings.
  """
  def check(model):
    table = np.array(model.tables[0]).reshape((4,) * 4)
    rows = np.argwhere(table > 0)
    nats, valid = -np.log(table[tuple(rows.T)]), np.minimum((rows < 3).sum(-1) + 1, 4)
    batch = {'tokens': jnp.asarray(rows)[..., None]}
    draws = jax.jit(lambda keys: jax.lax.map(lambda key: model.loss(
        batch, step=jnp.array(0), key=key, train=False)[0], keys))(
            jax.random.split(jax.random.key(3), 256))
    error = np.std(draws) / 16
    assert abs(np.mean(draws) - nats.sum() / valid.sum()) < 4 * error
    assert abs(np.mean(draws) - np.mean(nats / valid)) > 8 * error

  return check
