"""Rate-distortion curves: bits counted by hand, exact limits, and order on real photographs."""

import dataclasses
import io
import json
import math
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from smalti.evaluation import baselines, reconstruction


def waves(count, side, channels, seed=0):
  """Smooth images: a few waves of random phase, with a little noise."""
  rng = np.random.default_rng(seed)
  i, j = np.indices((side, side))[:, None, ..., None] / side
  a, b, phase = rng.normal(0, 4, (3, count, 1, 1, channels))
  image = 127 + 70 * np.sin(a * i + b * j + phase) + rng.normal(0, 4, (count, side, side, channels))
  return np.clip(image, 0, 255).round().astype(np.uint8)


def test_scan_bits_of_a_flat_grey_image():
  """Annex K: a DC difference of category c costs its code and c bits, then EOB 1010, 4 bits."""
  flat = np.full((16, 16), 128, np.uint8)  # four blocks of zero: DC code 00, 2 bits
  file = io.BytesIO()
  Image.fromarray(flat).save(file, 'JPEG', quality=50)
  assert baselines.scan_bits(file.getvalue()) == 4 * (2 + 4)
  point, = baselines.jpeg(np.full((3, 16, 16, 1), 128, np.uint8), sampling='grey', qualities=(50,))
  assert (point.bits, point.error.exact, point.curve) == (24, 3, 'jpeg_grey')


def test_scan_bits_leave_out_stuffing_and_tables():
  rng = np.random.default_rng(0)
  file = io.BytesIO()
  Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, 'JPEG', quality=95)
  stream = file.getvalue()
  start = stream.index(b'\xff\xda')
  data = stream[start + 2 + 12:-2]  # SOS of three components has a header of 12 bytes
  assert b'\xff\x00' in data
  assert baselines.scan_bits(stream) == 8 * len(data.replace(b'\xff\x00', b'\xff'))
  comment = b'\xff\xfe' + (2 + 999).to_bytes(2) + b'\xff\xda\xff' * 333
  assert baselines.scan_bits(stream[:2] + comment + stream[2:]) == baselines.scan_bits(stream)
  for broken in (b'', stream[:start], stream[2:], stream[:-2], b'\xff\xd8\xff\xd9'):
    with pytest.raises(ValueError, match='no JPEG'):
      baselines.scan_bits(broken)


def test_shrunken_images_cost_less_and_keep_their_means():
  images = waves(8, 32, 3)
  whole, half, quarter = (baselines.jpeg(images, sampling='444', shrink=k, qualities=(50,))[0]
                          for k in (1, 2, 4))
  assert whole.bits > half.bits > quarter.bits and half.curve == 'jpeg_444_by2'
  assert whole.error.psnr > half.error.psnr > quarter.error.psnr > 20
  squares = np.repeat(np.repeat(waves(8, 8, 1), 4, 1), 4, 2)[:, :30, :28]  # sides that 4 splits not
  point, = baselines.jpeg(squares, sampling='grey', shrink=4, qualities=(95,))
  assert point.error.images == 8


def test_patches_come_back():
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 2), np.uint8)
  for side in (1, 2, 4, None):
    rows = baselines._patches(images, side)
    assert rows.shape[1] == (side * side if side else 96) * 2
    back = baselines._assembled(rows.astype(np.uint8), images.shape, side)
    np.testing.assert_array_equal(back, images)
  np.testing.assert_array_equal(baselines._patches(images, 4)[1].reshape(4, 4, 2),
                                images[0, :4, 4:8])
  with pytest.raises(ValueError, match='side=3'):
    baselines._patches(images, 3)


@pytest.mark.parametrize('side', [4, None])
def test_principal_components_in_the_limit_of_small_steps(side):
  """Exact with all components; with a few, the error is the energy of the others."""
  images = waves(60, 8, 1)
  fine, coarse = baselines.pca(images, images, side=side, steps=(.25, 200))
  assert fine.error.exact == 60 and coarse.error.psnr < 30 and fine.bits > 4 * coarse.bits > 0
  few = baselines.pca(images, images, side=side, steps=(.25,), components=3)[0]
  rows = baselines._patches(images, side)
  values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
  expected = values[:-3].sum() / rows.shape[1]  # the energy left out
  found = 10 ** (-few.error.psnr_of_mean / 10) * 255 ** 2
  assert found == pytest.approx(expected + 1 / 12, rel=.02)  # and what rounding to uint8 adds


def test_bits_of_principal_components_are_the_entropy_of_gaussians():
  """h(X) - log2 step per component, for a step small beside the deviation."""
  rng = np.random.default_rng(0)
  scale = np.array([32., 16, 8, 4])
  rows = rng.normal(0, scale, (12_000, 4))
  images = np.clip(rows + 128, 0, 255).round().astype(np.uint8).reshape(-1, 2, 2, 1)
  point, = baselines.pca(images[:6000], images[6000:], steps=(2,))
  expected = (np.log2(scale * math.sqrt(2 * math.pi * math.e)) - 1).sum()
  assert point.bits == pytest.approx(expected, rel=.02)
  assert point.fixed_bits is None and point.error.images == 6000


def test_kmeans_recovers_its_patches():
  rng = np.random.default_rng(0)
  book = rng.integers(0, 256, (4, 4, 4, 3))
  tokens = rng.choice(4, (200, 2, 2), p=[.5, .25, .125, .125])
  images = book[tokens].transpose(0, 1, 3, 2, 4, 5).reshape(200, 8, 8, 3).astype(np.uint8)
  point, = baselines.kmeans(images, images, side=4, codes=(4,))
  assert point.error.exact == 200 and point.error.psnr is None
  assert point.fixed_bits == 4 * 2
  share = np.bincount(tokens.ravel()) / 800  # entropy 1.75 but for chance
  assert point.bits == pytest.approx(-4 * (share * np.log2(share)).sum(), rel=.001)
  with pytest.raises(ValueError, match='fewer codes'):
    baselines.kmeans(images[:1], images, side=4, codes=(5,))


def test_batches_and_the_grid_do_not_matter(monkeypatch):
  images = waves(60, 16, 1)
  whole = baselines.baselines(images, images, sides=(8,), bits=500.)
  monkeypatch.setattr(baselines, 'BATCH', 7)
  parts = baselines.baselines(images, images, sides=(8,), bits=500.)
  for a, b in zip(whole.points, parts.points, strict=True):
    assert a.curve == b.curve and a.error == b.error
    assert a.bits == pytest.approx(b.bits, rel=1e-12)
  assert {p.curve for p in whole.points} == {
      'jpeg_grey', 'jpeg_grey_by2', 'pca_whole', 'pca_8', 'kmeans_8'}
  assert [p.setting for p in whole.points if p.curve == 'kmeans_8'] == [16]  # of 240 patches
  json.dumps(dataclasses.asdict(whole), allow_nan=False)


def test_reading_a_curve():
  error = reconstruction.compare(*(waves(2, 16, 1, seed) for seed in (0, 1)))
  points = [baselines.Point('x', 1, bits, None, dataclasses.replace(error, psnr=psnr))
            for bits, psnr in ((400, 30.), (100, 20.), (6400, None))]
  assert baselines.at_bits(points, 200).psnr == pytest.approx(25)  # half way in log2
  assert baselines.at_bits(points, 100).psnr == 20
  assert baselines.at_bits(points, 99) is None and baselines.at_bits(points, 401) is None
  assert baselines.at_bits([], 100) is None
  fixed = [dataclasses.replace(p, bits=p.bits - 90, fixed_bits=p.bits) for p in points]
  assert baselines.at_bits(fixed, 200) == baselines.at_bits(points, 200)


def test_refusals():
  with pytest.raises(ValueError, match="'grey'"):
    baselines.jpeg(waves(1, 8, 3), sampling='grey')
  with pytest.raises(ValueError, match="'422'"):
    baselines.jpeg(waves(1, 8, 3), sampling='422')


@pytest.mark.slow
@pytest.mark.needs_data
def test_curves_of_real_photographs():
  path = pathlib.Path(os.environ['SMALTI_DATA_DIR']) / 'images/openimages-v6-photos-256.npz'
  if not path.exists():
    pytest.skip(f'{path.name} is not among the data sets')
  with np.load(path, allow_pickle=False) as file:
    data, offsets = file['data'], file['offsets']
  images = np.stack([np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert('RGB'))
                     for a, b in zip(offsets[:-1], offsets[1:])])
  train, held_out = images[:100], images[100:120]
  bits = 256 * 14.  # 16 x 16 tokens of 16,384 codes
  result = baselines.baselines(train, held_out, bits=bits, sides=(8, 16))
  curves = {p.curve: [q for q in result.points if q.curve == p.curve] for p in result.points}
  for name, points in curves.items():
    points.sort(key=lambda p: p.bits)
    for p in points:
      print(f'{name:10} {p.setting:6g} {p.bits:10.0f} bits  {p.error.psnr:6.2f} dB  '
            f'ssim {p.error.ssim:.4f}  ms-ssim {p.error.ms_ssim:.4f}  l1 {p.error.l1:.4f}')
    for better in ('psnr', 'ssim', 'ms_ssim'):  # every curve rises
      values = [getattr(p.error, better) for p in points]
      assert all(b > a - 1e-3 for a, b in zip(values, values[1:])), (name, better)
  print(*result.at, sep='\n')
  # colour at half the resolution is worth it at low rates, and costs at high ones
  at = lambda name, bits: baselines.at_bits(curves[name], bits).psnr  # noqa: E731
  assert {x.curve for x in result.at} >= {'jpeg_420_by4', 'pca_8', 'pca_16'}
  assert at('jpeg_420', 20_000) > at('jpeg_444', 20_000)
  assert at('jpeg_444', 200_000) > at('jpeg_420', 200_000)
