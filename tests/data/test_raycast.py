"""The ray caster: solids against brute force, and factors that change only what they should."""

import numpy as np
import pytest

from smalti.data import raycast
from smalti.data.raycast import HUES, SCALES, SHAPES, SOLIDS, Scene

SIZE = 32
FLOOR, WALL, OBJECT, SCALE, SHAPE, TURN = range(6)
solids = pytest.mark.parametrize('shape', SHAPES)


@pytest.fixture(scope='module')
def scene():
  return Scene.of(SIZE)


def base(**changes):
  names = ('floor', 'wall', 'object', 'scale', 'shape', 'turn')
  values = {'floor': 3, 'wall': 6, 'object': 0, 'scale': 4, 'shape': 0, 'turn': 5, **changes}
  return [values[name] for name in names]


def changed(scene, factors, position, value):
  """bool[H, W]: the pixels that differ once one factor has another value."""
  other = list(factors)
  other[position] = value
  one, two = scene.render(np.array([factors, other]))
  return (one != two).any(-1)


def interior(mask):
  """Pixels whose eight neighbours belong to `mask` too."""
  padded = np.pad(mask, 1, constant_values=True)
  views = [padded[i:i + SIZE, j:j + SIZE] for i in range(3) for j in range(3)]
  return np.logical_and.reduce(views)


# --- solids ----------------------------------------------------------------------------------

INSIDE = {  # of a solid of size 1
    'cube': lambda p: (np.abs(p - [0, 0, 0.75]) <= 0.75).all(-1),
    'sphere': lambda p: np.linalg.norm(p - [0, 0, 0.9], axis=-1) <= 0.9,
    'cylinder': lambda p: (np.hypot(p[..., 0], p[..., 1]) <= 0.72) & (
        0 <= p[..., 2]) & (p[..., 2] <= 1.55),
    'capsule': lambda p: np.linalg.norm(
        p - np.stack([0 * p[..., 2], 0 * p[..., 2], np.clip(p[..., 2], 0.55, 1.55)], -1),
        axis=-1) <= 0.55,
}


def rays(n=3000):
  """From a ball of radius 5 above the floor to somewhere around the object."""
  rng = np.random.default_rng(0)
  origin = rng.normal(size=(n, 3))
  origin = 5 * origin / np.linalg.norm(origin, axis=-1, keepdims=True)
  origin[:, 2] = np.abs(origin[:, 2])
  ray = rng.uniform([-1.2, -1.2, 0], [1.2, 1.2, 2.2], (n, 3)) - origin
  return origin, ray / np.linalg.norm(ray, axis=-1, keepdims=True)


@solids
def test_a_ray_meets_a_solid_where_it_first_is_inside(shape):
  origin, ray = rays()
  t, normal = SOLIDS[shape](origin, ray, size=1.0)
  steps = np.linspace(2, 9, 1401)
  inside = INSIDE[shape](origin[:, None] + steps[:, None] * ray[:, None])
  hit = np.isfinite(t)
  # a graze shorter than a step may be missed by brute force, never the other way round
  assert not np.any(inside.any(1) & ~hit) and np.mean(hit & ~inside.any(1)) < 0.01
  both = hit & inside.any(1)
  first = steps[np.argmax(inside[both], 1)]
  assert 0.25 < both.mean() < 0.9
  assert np.all((first >= t[both] - 1e-9) & (first - t[both] <= 0.005 + 1e-9))
  np.testing.assert_allclose(np.linalg.norm(normal[hit], axis=-1), 1, atol=1e-9)
  assert np.all(np.sum(normal * ray, -1)[hit] < 1e-9)
  # just outside along the normal, just inside against it
  point = origin[both] + t[both, None] * ray[both]
  assert not INSIDE[shape](point + 1e-5 * normal[both]).any()
  assert INSIDE[shape](point - 1e-5 * normal[both]).mean() > 0.999  # edges of cube and cylinder


@solids
@pytest.mark.parametrize('size', [0.75, 1.25])
def test_the_ball_around_a_solid_hides_nothing(shape, size):
  origin, ray = rays()
  want = SOLIDS[shape](origin, ray, size=size)[0]
  np.testing.assert_array_equal(raycast.meet(SOLIDS[shape], size, origin, ray)[0], want)
  scaled = SOLIDS[shape](origin / size, ray, size=1.0)[0] * size
  np.testing.assert_allclose(np.where(np.isinf(want), -1, want),
                             np.where(np.isinf(scaled), -1, scaled), atol=1e-9)


def test_every_ray_of_the_camera_meets_the_room_from_inside():
  for turn in (0, 7, 14):
    origin, ray = raycast.camera(40, np.radians(45 + raycast.DEGREES[turn]))
    np.testing.assert_allclose(np.linalg.norm(ray, axis=-1), 1)
    t, surface = raycast.room(origin, ray)
    point = origin + t[:, None] * ray
    low = np.array([raycast.WALL, raycast.WALL, 0])
    np.testing.assert_allclose(
        np.take_along_axis(point, surface[:, None], 1)[:, 0], low[surface], atol=1e-9)
    assert np.all(t > 0) and np.all(point >= low - 1e-9)


# --- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', range(4))
@pytest.mark.parametrize('scale, turn', [(0, 2), (7, 12)])
def test_a_hue_colours_its_own_surface_alone(scene, shape, scale, turn):
  factors = base(shape=shape, scale=scale, turn=turn)
  masks = [changed(scene, factors, i, 8) for i in (FLOOR, WALL, OBJECT)]
  assert np.logical_or.reduce(masks).all()  # every pixel is of some surface
  for i, own in enumerate(masks):
    assert interior(own).any()
    for j, other in enumerate(masks):
      if i != j:
        assert not (interior(own) & other).any()  # two surfaces share pixels on an edge alone


def test_the_camera_looks_at_the_object_with_the_floor_below_and_walls_above(scene):
  for shape in range(4):
    floor, wall, thing = (
        changed(scene, base(shape=shape), i, 8) for i in (FLOOR, WALL, OBJECT))
    assert thing[SIZE // 2, SIZE // 2] and floor[-1].all() and wall[0].all()
    assert not thing[0].any() and not thing[-1].any() and not thing[:, [0, -1]].any()


def coverage(scene, scale, shape, turn):
  return scene.layers(scale, shape, turn)[:, 2].reshape(SIZE, SIZE) > 0


@pytest.mark.parametrize('shape', range(4))
def test_a_larger_scale_covers_more(scene, shape):
  area = [coverage(scene, scale, shape, 7).sum() for scale in (0, 2, 5, 7)]
  assert np.all(np.diff(area) > 0)
  assert area[-1] / area[0] == pytest.approx((SCALES[7] / SCALES[0])**2, rel=0.25)


def test_the_sphere_covers_the_cone_that_geometry_says(scene):
  origin, ray = raycast.camera(SIZE, np.radians(45))
  radius = 0.9 * SCALES[4]
  to = np.array([0, 0, radius]) - origin
  away = np.linalg.norm(to)
  want = (np.arccos(ray @ to / away) <= np.arcsin(radius / away)).reshape(SIZE, SIZE)
  got = coverage(scene, 4, SHAPES.index('sphere'), 7)
  assert want.sum() > 80 and not (want & ~got).any()
  assert (got & ~want).sum() < 40  # pixels that the outline touches, their middles outside


@pytest.mark.parametrize('shape', ['sphere', 'cylinder', 'capsule'])
def test_a_solid_of_revolution_keeps_its_outline_as_the_camera_turns(scene, shape):
  outlines = [coverage(scene, 4, SHAPES.index(shape), turn) for turn in (0, 7, 14)]
  for other in outlines[1:]:
    assert (outlines[0] ^ other).sum() <= 2


def test_the_corner_of_the_room_moves_as_the_camera_turns(scene):
  places = []
  for turn in range(0, 15, 2):
    top = scene.layers(0, 2, turn)[:, 1].reshape(SIZE, SIZE)[1]
    places.append(int(np.argmax(abs(np.diff(top)))))
  assert np.all(np.diff(places) > 0)
  assert places[0] + places[-1] == pytest.approx(SIZE - 2, abs=2)  # -30 and 30 degrees mirror


@pytest.mark.parametrize('position, values', [
    (FLOOR, 10), (WALL, 10), (OBJECT, 10), (SCALE, 8), (SHAPE, 4), (TURN, 15)])
def test_all_values_of_a_factor_look_different(scene, position, values):
  rows = np.array([base()] * values)
  rows[:, position] = np.arange(values)
  image = scene.render(rows).astype(int).reshape(values, -1)
  apart = abs(image[:, None] - image[None]).max(-1)
  assert apart[~np.eye(values, dtype=bool)].min() > 20


def test_hues_are_apart():
  apart = np.linalg.norm(HUES[:, None] - HUES[None], axis=-1)
  assert apart[~np.eye(10, dtype=bool)].min() > 0.3


def test_what_is_far_from_the_object_hardly_sees_it(scene):
  # a ball hides a little of the sky: nothing else of the object reaches the top of the walls
  one, two = scene.render(np.array([base(shape=0, scale=0), base(shape=3, scale=7)])).astype(int)
  assert abs(one - two)[:4].max() <= 8 < 100 < abs(one - two).max()


def test_pictures_are_averages_of_finer_ones():
  fine = raycast.cast(SIZE * raycast.RAYS, 2, 1, 3)
  layers = Scene.of(SIZE).layers(2, 1, 3).reshape(SIZE, SIZE, 4)
  np.testing.assert_allclose(layers.mean((0, 1)), fine.mean(0), rtol=1e-5)
  double = Scene.of(2 * SIZE).layers(2, 1, 3).reshape(SIZE, 2, SIZE, 2, 4).mean((1, 3))
  assert abs(layers - double).mean() < 0.003


def test_layers_are_cast_once():
  assert Scene.of(SIZE) is Scene.of(SIZE)
  assert Scene.of(SIZE).layers(2, 1, 3) is Scene.of(SIZE).layers(2, 1, 3)


def test_pictures_too_small_are_refused():
  with pytest.raises(ValueError, match='size=4'):
    Scene.of(4)


def test_no_light_is_negative_or_unbounded(scene):
  for shape in range(4):
    layers = scene.layers(7, shape, 14)
    assert layers.min() >= 0 and np.all(layers.sum(-1) <= 1.35)
