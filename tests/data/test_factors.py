"""Lattices, splits, and the sprites of `shapes2d`: one factor changes only what it should."""

import numpy as np
import pytest

from smalti.data import factors, pipeline
from smalti.data.factors import (
  EVAL,
  RADIUS,
  SHAPES2D,
  SHAPES3D,
  Lattice,
  Shapes2DConfig,
  Shapes3DLikeConfig,
  sprites,
)

LATTICES = pytest.mark.parametrize('lattice, size', [(SHAPES2D, 737_280), (SHAPES3D, 480_000)])
HEART = 2


def draws(lattice, n, seed=0):
  rng = np.random.default_rng(seed)
  return np.stack([rng.integers(0, size, n) for size in lattice.sizes], -1)


@LATTICES
def test_index_and_factors_are_inverse(lattice, size):
  assert len(lattice) == size
  index = np.r_[0:70, size - 70:size, np.random.default_rng(0).integers(0, size, 1000)]
  digits = lattice.factors(index)
  assert digits.dtype == np.int32 and digits.min() >= 0
  assert np.all(digits < lattice.sizes)
  np.testing.assert_array_equal(lattice.index(digits), index)


def test_the_last_factor_is_the_fastest():
  small = Lattice(('a', 'b'), (2, 3))
  assert small.factors(np.arange(6)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_a_digit_outside_its_factor_is_refused():
  with pytest.raises(ValueError):
    SHAPES3D.index(np.array([[0, 0, 0, 8, 0, 0]]))
  with pytest.raises(ValueError):
    SHAPES3D.factors(np.array([480_000]))


# --- sprites ---------------------------------------------------------------------------------


def test_sprites_are_binary_and_inside_the_image():
  image = sprites(draws(SHAPES2D, 500))
  assert image.shape == (500, 64, 64, 1) and image.dtype == np.uint8
  assert set(np.unique(image)) == {0, 255}
  x, y = np.meshgrid(*[np.linspace(-1.5, 1.5, 601)] * 2)
  for shape in (factors.square, factors.ellipse, factors.heart):
    inside = shape(x, y)
    radius = np.hypot(x, y)[inside].max()
    assert 0.97 < radius <= 1 + 1e-12, shape  # in the unit circle, and filling it
  assert RADIUS < factors.WINDOW / 2  # so that a window cuts nothing off


def test_a_position_moves_the_sprite_by_one_pixel():
  base = draws(SHAPES2D, 200)
  base[:, 3:] = np.minimum(base[:, 3:], 30)
  image = sprites(base)
  right, up = base.copy(), base.copy()
  right[:, 3] += 1
  up[:, 4] += 1
  np.testing.assert_array_equal(sprites(right), np.roll(image, 1, 2))
  np.testing.assert_array_equal(sprites(up), np.roll(image, -1, 1))


@pytest.mark.parametrize('shape, area', [(0, 2.0), (1, np.pi / 2), (2, 3.6620 * 0.748**2)])
def test_the_area_is_that_of_the_shape_at_its_scale(shape, area):
  # of the unit circle's square, ellipse and heart: the curve's area is 3.6620
  everywhere = np.array([[shape, scale, o, 16, 16] for scale in range(6) for o in range(39)])
  pixels = (sprites(everywhere) > 0).sum((1, 2, 3)).reshape(6, 39).mean(1)
  np.testing.assert_allclose(
      pixels, area * (RADIUS * np.linspace(0.5, 1, 6))**2, rtol=0.02)


def test_a_quarter_turn_is_ten_even_steps():
  turn = [[HEART, 5, o, 16, 16] for o in range(40)]
  sheet = factors.sheet(False)[HEART, 5]
  image = sprites(np.array(turn), duplicate=False)[..., 0]
  assert len({x.tobytes() for x in image}) == 40
  for o in range(30):
    np.testing.assert_array_equal(sheet[o + 10], np.rot90(sheet[o]))  # counter-clockwise


def test_the_last_orientation_repeats_the_first_where_asked():
  for shape in range(3):
    ends = np.array([[shape, 3, 0, 5, 9], [shape, 3, 39, 5, 9]])
    first, last = sprites(ends, duplicate=True)
    np.testing.assert_array_equal(first, last)
  first, last = sprites(ends, duplicate=False)
  assert (first != last).any()


def test_an_upright_heart_stands_on_its_tip():
  image = sprites(np.array([[HEART, 5, 0, 16, 16]]))[0, :, :, 0] > 0
  rows = np.flatnonzero(image.any(1))
  assert image[rows[-1]].sum() <= 2 < 10 < image[rows[len(rows) // 3]].sum()
  columns = np.flatnonzero(image.any(0))
  np.testing.assert_array_equal(image[:, columns], image[:, columns[::-1]])


# --- sources ---------------------------------------------------------------------------------


@pytest.mark.parametrize('config, lattice', [
    (Shapes2DConfig(), SHAPES2D), (Shapes3DLikeConfig(size=16), SHAPES3D)])
def test_the_splits_share_no_image_and_leave_none_out(config, lattice):
  train, held_out = config.open('train'), config.open('eval')
  assert len(held_out) == EVAL and len(train) + EVAL == len(lattice)
  seen = np.zeros(len(lattice), int)
  np.add.at(seen, np.concatenate([train.rows, held_out.rows]), 1)
  assert np.all(seen == 1)
  np.testing.assert_array_equal(config.open('eval').rows, held_out.rows)


@pytest.mark.parametrize('rows', [slice(None), slice(0, 2000)])
def test_held_out_factors_are_uniform(rows):
  digits = SHAPES3D.factors(Shapes3DLikeConfig().open('eval').rows[rows])
  for values, size in zip(digits.T, SHAPES3D.sizes):
    expected = len(values) / size
    chi = ((np.bincount(values, minlength=size) - expected)**2 / expected).sum()
    assert chi < size - 1 + 4 * (2 * (size - 1))**0.5


@pytest.mark.parametrize('config', [Shapes2DConfig(), Shapes3DLikeConfig(size=16)])
def test_what_is_read_does_not_depend_on_the_batch(config):
  source = config.open('eval')
  rows = source.read(np.array([7, 3, 7]))
  assert rows['image'].dtype == np.uint8 and rows['factors'].dtype == np.int32
  one = source.read(np.array([3]))
  np.testing.assert_array_equal(rows['image'][1], one['image'][0])
  np.testing.assert_array_equal(rows['image'][0], rows['image'][2])
  np.testing.assert_array_equal(rows['factors'], source.lattice.factors(source.rows[[7, 3, 7]]))
  np.testing.assert_array_equal(rows['image'], source.render(rows['factors']))


def test_batches_carry_the_factors():
  source = Shapes2DConfig().open('train')
  batch = next(pipeline.batches(source, batch_size=8, seed=0))
  np.testing.assert_array_equal(batch['image'], sprites(batch['factors']))
  assert batch['image'].shape == (8, 64, 64, 1)
