"""PSNR, SSIM and MS-SSIM: published formulas, golden values, and scikit-image."""

import numpy as np
import pytest

from smalti.evaluation import reconstruction


def pair(shape, seed=0, noise=20):
  rng = np.random.default_rng(seed)
  x = rng.integers(0, 256, shape, np.uint8)
  y = np.clip(x + rng.normal(0, noise, shape), 0, 255).round().astype(np.uint8)
  return x, y


def test_one_level_everywhere():
  x = np.full((3, 16, 16, 1), 100, np.uint8)
  np.testing.assert_allclose(reconstruction.psnr(x, x + 1), 48.1308, atol=1e-4)


def test_mean_of_psnr_is_not_psnr_of_the_mean():
  x = np.full((3, 16, 16, 1), 100, np.uint8)
  y = np.stack([x[0], x[1] + 1, x[2] + 10])
  result = reconstruction.compare(x, y)
  assert result.exact == 1  # counted, not averaged
  assert result.psnr == pytest.approx((48.1308 + 28.1308) / 2, abs=1e-4)
  assert result.psnr_of_mean == pytest.approx(10 * np.log10(255 ** 2 / ((0 + 1 + 100) / 3)))
  assert result.l1 == pytest.approx(11 / 3 / 255)
  same = reconstruction.compare(x, x)
  assert same.psnr is None and same.psnr_of_mean is None and same.exact == 3 and same.ssim == 1


def test_ssim_of_constants():
  a, b = 51, 153  # exact fifths of 255, so that rounding plays no part
  value = reconstruction.ssim(np.full((1, 32, 32, 3), a, np.uint8),
                              np.full((1, 32, 32, 3), b, np.uint8))
  expected = (2 * .2 * .6 + 1e-4) / (.04 + .36 + 1e-4)
  np.testing.assert_allclose(value, expected, atol=1e-10)
  # .5 against .6 needs floats; the formula itself
  assert (2 * .5 * .6 + 1e-4) / (.25 + .36 + 1e-4) == pytest.approx(0.9836092443861661, abs=1e-15)


@pytest.mark.parametrize('shape', [(4, 48, 48, 3), (2, 28, 28, 1), (2, 11, 17, 3)])
def test_agrees_with_scikit_image(shape):
  metrics = pytest.importorskip('skimage.metrics')
  x, y = pair(shape)
  ours_psnr, ours_ssim = reconstruction.psnr(x, y), reconstruction.ssim(x, y)
  for i in range(len(x)):
    assert ours_psnr[i] == pytest.approx(
        metrics.peak_signal_noise_ratio(x[i], y[i], data_range=255), abs=1e-6)
    assert ours_ssim[i] == pytest.approx(
        metrics.structural_similarity(
            x[i], y[i], gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=255, channel_axis=-1), abs=1e-6)


def test_small_images_have_a_smaller_window_under_another_name():
  x, y = pair((3, 8, 8, 1))
  result = reconstruction.compare(x, y)
  assert (result.window, result.ssim_name) == (7, 'ssim_w7')
  assert reconstruction.window((256, 256)) == reconstruction.window((11, 40)) == 11
  assert [reconstruction.window((s, s)) for s in (10, 9, 2, 1)] == [9, 9, 1, 1]
  # the definition, window by window
  taps = np.exp(-(np.arange(7) - 3) ** 2 / 4.5)
  weights = np.outer(taps, taps) / np.outer(taps, taps).sum()
  values = []
  for i in range(2):
    for j in range(2):
      a, b = (z[0, i:i + 7, j:j + 7, 0] / 255 for z in (x, y))
      ma, mb = (weights * a).sum(), (weights * b).sum()
      va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
      cov = (weights * (a - ma) * (b - mb)).sum()
      values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
                    / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
  assert reconstruction.ssim(x, y)[0] == pytest.approx(np.mean(values), abs=1e-9)


def scene(h, w, c, noise, seed):
  """Waves with a deterministic error: nothing here depends on a generator's version."""
  i, j = np.indices((h, w))
  x = np.stack([127 + 60 * np.sin(i / (7 + k)) + 50 * np.cos(j / (11 + 3 * k)) for k in range(c)],
               -1)
  error = (i[..., None] * 31 + j[..., None] * 17 + np.arange(c) * 7 + seed) % 41 - 20
  return x.round().astype(np.uint8), np.clip(x + noise * error, 0, 255).round().astype(np.uint8)


def test_ms_ssim_golden():
  pairs = [scene(176, 192, 3, .3, 0), scene(176, 192, 3, 1.5, 5)]
  x, y = (np.stack(z) for z in zip(*pairs))
  # pytorch_msssim 1.0.0 in float64 images (its window is float32): 0.99608272, 0.94265603
  np.testing.assert_allclose(reconstruction.ms_ssim(x, y), [.99608272, .94265603], atol=1e-6)
  # an odd side: scales of ceil(h / 2), which that package pads with zeros: 5e-5 apart
  pairs = [scene(181, 203, 1, .3, 0), scene(181, 203, 1, 1.5, 5)]
  x, y = (np.stack(z) for z in zip(*pairs))
  np.testing.assert_allclose(reconstruction.ms_ssim(x, y), [.9968676, .9520064], atol=6e-5)
  assert (reconstruction.ms_ssim(x, x) == 1).all()


def test_ms_ssim_of_constants_is_the_luminance_of_the_last_scale():
  x, y = (np.full((1, 176, 176, 2), level, np.uint8) for level in (51, 153))
  luminance = (2 * .2 * .6 + 1e-4) / (.04 + .36 + 1e-4)
  np.testing.assert_allclose(reconstruction.ms_ssim(x, y), luminance ** .1333, atol=1e-10)


def test_ms_ssim_counts_negative_structure_as_none_and_refuses_small_images():
  x, _ = pair((1, 176, 176, 1))
  assert reconstruction.ssim(x, 255 - x)[0] < 0
  assert reconstruction.ms_ssim(x, 255 - x)[0] == 0
  small = x[:, :175]
  with pytest.raises(ValueError, match='176'):
    reconstruction.ms_ssim(small, small)
  assert reconstruction.compare(small, small).ms_ssim is None
  assert reconstruction.compare(x, x).ms_ssim == 1


@pytest.mark.parametrize('shape', [(7, 20, 24, 3), (3, 176, 177, 1)])
def test_parts_average_to_the_whole(shape, monkeypatch):
  x, y = pair(shape)
  y[1] = x[1]
  whole = reconstruction.compare(x, y)
  assert whole.exact == 1
  monkeypatch.setattr(reconstruction, 'CHUNK', x[0].size)  # one image at a time
  parts = [reconstruction.measure(x[i:j], y[i:j]) for i, j in ((0, 2), (2, len(x)))]
  assert reconstruction.summarize(parts) == whole
  np.testing.assert_array_equal(np.concatenate([p.psnr for p in parts]), reconstruction.psnr(x, y))
  np.testing.assert_array_equal(np.concatenate([p.ssim for p in parts]), reconstruction.ssim(x, y))
  with pytest.raises(ValueError, match='one size'):
    reconstruction.summarize([*parts, reconstruction.measure(*pair((1, 8, 8, 1)))])
  large, small = (reconstruction.measure(*pair((1, side, side, 1))) for side in (176, 100))
  with pytest.raises(ValueError, match='one size'):  # the same window, but no MS-SSIM of one
    reconstruction.summarize([small, large])
  with pytest.raises(ValueError, match='one or more'):
    reconstruction.summarize([])


def test_floats_and_unlike_shapes_are_refused():
  x, y = pair((2, 12, 12, 1))
  with pytest.raises(ValueError, match='to_uint8'):
    reconstruction.psnr(x / 255, y / 255)
  with pytest.raises(ValueError, match='differ'):
    reconstruction.compare(x, y[:1])
  with pytest.raises(ValueError, match='at least one'):
    reconstruction.compare(x[:0], y[:0])
