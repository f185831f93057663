"""A room with one object, as layers of light that any three hues colour.

A ray caster in numpy. What is seen depends on the geometry (scale, shape, orientation) and on the
hues, and the two separate: an image is floor * colour_f + wall * colour_w + object * colour_o +
gloss, with four layers per geometry that hold coverage times shading, averaged over a grid of rays
per pixel. The layers of a geometry are cast once; an image costs one small product. A hue can
therefore change only the pixels that its surface covers: light does not bounce here.
"""

import colorsys
import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Int, UInt8

SHAPES = ('cube', 'cylinder', 'sphere', 'capsule')
SCALES = np.linspace(0.75, 1.25, 8)
DEGREES = np.linspace(-30, 30, 15)  # of the camera around the object and the corner behind it
HUES = np.array([colorsys.hsv_to_rgb(i / 10, 0.72, 0.98) for i in range(10)])

RAYS = 3          # per pixel and axis
WALL = -2.9       # the walls are x = WALL and y = WALL, the floor is z = 0
EYE = (8.2, 3.7)  # distance from the axis and height of the camera
TARGET = 1.05     # height of the point on the axis that it looks at
ZOOM = 3.1        # focal length over half the side of the picture
LIGHT = np.array([0.28, 0.62, 0.73]) / np.linalg.norm([0.28, 0.62, 0.73])  # in the room's frame
SPREAD = 0.07     # of the lamps around it, which makes shadows soft
AMBIENT, DIFFUSE, GLOSS = 0.52, 0.50, 0.30

Points = Float[np.ndarray, 'n 3']
# what a ray meets first: distance (inf where nothing) and the normal there
Hit = tuple[Float[np.ndarray, 'n'], Points]


@dataclasses.dataclass(frozen=True)
class Scene:
  """Pictures of `size` x `size` pixels."""
  size: int

  @staticmethod
  @functools.cache
  def of(size: int) -> 'Scene':
    """One scene per size, so that its layers are cast once.

    Raises:
      ValueError: fewer than 8 pixels show no object.
    """
    if size < 8:
      raise ValueError(f'{size=} pixels show nothing; take 8 or more.')
    return Scene(size)

  def render(self, factors: Int[np.ndarray, 'b 6']) -> UInt8[np.ndarray, 'b h w 3']:
    """Images of (floor hue, wall hue, object hue, scale, shape, orientation)."""
    factors = np.asarray(factors)
    geometry = [self.layers(*map(int, row)) for row in factors[:, 3:]]
    colours = np.ones((len(factors), 4, 3), np.float32)  # gloss is white
    colours[:, :3] = 255 * HUES[factors[:, :3]]
    colours[:, 3] = 255
    image = np.empty((len(factors), self.size**2, 3), np.uint8)
    for row, layers, colour in zip(image, geometry, colours):
      np.rint(np.minimum(layers @ colour, 255), out=row, casting='unsafe')
    return image.reshape(-1, self.size, self.size, 3)

  @functools.cache  # noqa: B019 - scenes live as long as the process
  def layers(self, scale: int, shape: int, orientation: int) -> Float[np.ndarray, 'p 4']:
    """Light from floor, walls and object and the object's gloss, per pixel, before colouring."""
    fine = cast(self.size * RAYS, scale, shape, orientation)
    fine = fine.reshape(self.size, RAYS, self.size, RAYS, 4).mean((1, 3))
    return np.ascontiguousarray(fine.reshape(-1, 4), np.float32)


def cast(side: int, scale: int, shape: int, orientation: int) -> Float[np.ndarray, 'n 4']:
  """The four layers on a grid of side x side rays."""
  origin, ray = camera(side, math.radians(45 + DEGREES[orientation]))
  size = SCALES[scale]
  solid = functools.partial(meet, SOLIDS[SHAPES[shape]], size)
  near, normal = solid(np.broadcast_to(origin, ray.shape), ray)
  far, surface = room(origin, ray)
  hit = near < far
  layers = np.zeros((len(ray), 4))
  layers[~hit, :2] = backdrop(solid, size, origin, ray[~hit], far[~hit], surface[~hit])
  light = np.maximum(normal[hit] @ LIGHT, 0)
  # the floor hides the lower half of the sky from steep and hanging surfaces
  layers[hit, 2] = AMBIENT * (0.72 + 0.28 * normal[hit, 2]) + DIFFUSE * light
  half = LIGHT - ray[hit]
  half /= np.linalg.norm(half, axis=-1, keepdims=True)
  layers[hit, 3] = GLOSS * np.maximum(np.sum(normal[hit] * half, -1), 0)**40 * (light > 0)
  return layers


def backdrop(solid, size: float, origin: np.ndarray, ray: Points, distance: Float[np.ndarray, 'n'],
             surface: Int[np.ndarray, 'n']) -> Float[np.ndarray, 'n 2']:
  """Floor and walls: lamps behind the object are hidden, and less sky is seen near other surfaces.

  `surface` is the axis of the plane, 2 for the floor.
  """
  point = origin + distance[:, None] * ray
  normal = np.eye(3)[surface]
  open_sky = np.ones(len(point))
  for axis, place in enumerate((WALL, WALL, 0.0)):
    away = point[:, axis] - place
    open_sky *= np.where(surface == axis, 1, 1 - 0.30 * np.exp(-away / 0.55))
  # as if the object were a ball: cos(angle) (radius / distance)^2 of the sky
  to = np.array([0, 0, 0.9 * size]) - point
  length = np.linalg.norm(to, axis=-1)
  ball = np.sum(normal * to, -1) / length * np.minimum((0.9 * size / length)**2, 1)
  open_sky *= 1 - 0.75 * np.maximum(ball, 0)
  lit = np.mean([
      np.isinf(solid(point, np.broadcast_to(lamp, point.shape))[0]) for lamp in lamps()], 0)
  light = AMBIENT * open_sky + DIFFUSE * lit * (normal @ LIGHT)
  return np.where(surface == 2, [[1], [0]], [[0], [1]]).T * light[:, None]


def lamps() -> Points:
  """Directions of five lamps: LIGHT, and four around it."""
  side = np.cross(LIGHT, [0, 0, 1.0])
  side /= np.linalg.norm(side)
  turn = 2 * np.pi * np.arange(4)[:, None] / 4
  ring = LIGHT + SPREAD * (np.cos(turn) * side + np.sin(turn) * np.cross(side, LIGHT))
  lamp = np.concatenate([LIGHT[None], ring])
  return lamp / np.linalg.norm(lamp, axis=-1, keepdims=True)


def camera(side: int, azimuth: float) -> tuple[np.ndarray, Points]:
  """(place, directions of length 1) of the rays through a grid of side x side points, row-major."""
  place = np.array([EYE[0] * math.cos(azimuth), EYE[0] * math.sin(azimuth), EYE[1]])
  forward = np.array([0, 0, TARGET]) - place
  forward /= np.linalg.norm(forward)
  right = np.cross(forward, [0, 0, 1.0])
  right /= np.linalg.norm(right)
  grid = (2 * np.arange(side) + 1) / side - 1
  ray = (ZOOM * forward + grid[None, :, None] * right
         - grid[:, None, None] * np.cross(right, forward)).reshape(-1, 3)
  return place, ray / np.linalg.norm(ray, axis=-1, keepdims=True)


def room(origin: np.ndarray, ray: Points) -> tuple[Float[np.ndarray, 'n'], Int[np.ndarray, 'n']]:
  """Distance to the nearest of the three planes, and its axis; from inside one is always ahead."""
  with np.errstate(divide='ignore'):
    distance = (np.array([WALL, WALL, 0.0]) - origin) / ray
  distance = np.where(distance > 0, distance, np.inf)
  surface = np.argmin(distance, -1)
  return np.take_along_axis(distance, surface[:, None], -1)[:, 0], surface


# --- solids, standing on the floor around the axis -------------------------------------------

NEAR = 1e-6  # a ray that starts on a surface does not meet it again
MIDDLE, REACH = 0.9, 1.4  # of a ball around every solid of size 1: height and radius


def meet(solid, size: float, origin: Points, ray: Points) -> Hit:
  """Where rays meet a solid; only those through the ball around it are worth asking."""
  to = np.array([0, 0, MIDDLE * size]) - origin
  along = np.sum(to * ray, -1)
  maybe = np.sum(to * to, -1) - along**2 <= (REACH * size)**2
  distance, normal = np.full(len(ray), np.inf), np.zeros(ray.shape)
  distance[maybe], normal[maybe] = solid(origin[maybe], ray[maybe], size=size)
  return distance, normal


def cube(origin: Points, ray: Points, *, size: float) -> Hit:
  """Sides of 1.5, along the walls: from the middle of its turn the camera sees an edge."""
  half = 0.75 * size
  with np.errstate(divide='ignore', invalid='ignore'):
    first, second = ((s * half - (origin - [0, 0, half])) / ray for s in (-1, 1))
  enter = np.nan_to_num(np.minimum(first, second), nan=-np.inf)
  leave = np.nan_to_num(np.maximum(first, second), nan=np.inf)
  axis, t = np.argmax(enter, -1), enter.max(-1)
  normal = -np.sign(ray) * np.eye(3)[axis]
  return np.where((t < leave.min(-1)) & (t > NEAR), t, np.inf), normal


def ball(origin: Points, ray: Points, *, radius: float, height: float) -> Hit:
  centre = np.array([0, 0, height])
  t = nearest_root(1.0, np.sum((origin - centre) * ray, -1),
                   np.sum((origin - centre)**2, -1) - radius**2)
  return t, _at(origin, ray, t) / radius - centre / radius


def tube(origin: Points, ray: Points, *, radius: float, low: float, high: float) -> Hit:
  """The side of a cylinder between two heights, seen from outside."""
  flat, start = ray[:, :2], origin[:, :2]
  t = nearest_root(np.sum(flat * flat, -1), np.sum(start * flat, -1),
                   np.sum(start * start, -1) - radius**2)
  point = _at(origin, ray, t)
  t = np.where((point[:, 2] >= low) & (point[:, 2] <= high), t, np.inf)
  return t, point / radius * [1, 1, 0]


def lid(origin: Points, ray: Points, *, radius: float, height: float) -> Hit:
  """A horizontal disk, seen from above or below."""
  with np.errstate(divide='ignore', invalid='ignore'):
    t = (height - origin[:, 2]) / ray[:, 2]
  t = np.where(t > NEAR, t, np.inf)
  point = _at(origin, ray, t)
  normal = np.zeros_like(ray)
  normal[:, 2] = -np.sign(ray[:, 2])
  return np.where(np.sum(point[:, :2]**2, -1) <= radius**2, t, np.inf), normal


def cylinder(origin: Points, ray: Points, *, size: float) -> Hit:
  return nearest(tube(origin, ray, radius=0.72 * size, low=0, high=1.55 * size),
                 lid(origin, ray, radius=0.72 * size, height=1.55 * size))


def sphere(origin: Points, ray: Points, *, size: float) -> Hit:
  return ball(origin, ray, radius=0.9 * size, height=0.9 * size)


def capsule(origin: Points, ray: Points, *, size: float) -> Hit:
  radius, high = 0.55 * size, 1.55 * size
  return nearest(tube(origin, ray, radius=radius, low=radius, high=high),
                 ball(origin, ray, radius=radius, height=radius),
                 ball(origin, ray, radius=radius, height=high))


SOLIDS = {'cube': cube, 'cylinder': cylinder, 'sphere': sphere, 'capsule': capsule}


def nearest(*hits: Hit) -> Hit:
  """The first of several hits of the same rays."""
  distance = np.stack([t for t, _ in hits])
  first = np.argmin(distance, 0)
  normal = np.take_along_axis(np.stack([n for _, n in hits]), first[None, :, None], 0)[0]
  return distance.min(0), normal


def nearest_root(a, b, c) -> Float[np.ndarray, 'n']:
  """The smaller root of a t^2 + 2 b t + c where it is real and ahead, else infinity."""
  with np.errstate(divide='ignore', invalid='ignore'):
    t = (-b - np.sqrt(b * b - a * c)) / a
  return np.where(t > NEAR, t, np.inf)


def _at(origin: Points, ray: Points, t: Float[np.ndarray, 'n']) -> Points:
  return origin + np.where(np.isfinite(t), t, 0)[:, None] * ray
