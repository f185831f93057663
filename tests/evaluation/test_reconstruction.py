"""PSNR and SSIM: published formulas, golden values, and scikit-image."""

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


def test_floats_and_unlike_shapes_are_refused():
  x, y = pair((2, 12, 12, 1))
  with pytest.raises(ValueError, match='to_uint8'):
    reconstruction.psnr(x / 255, y / 255)
  with pytest.raises(ValueError, match='differ'):
    reconstruction.compare(x, y[:1])
  with pytest.raises(ValueError, match='at least one'):
    reconstruction.compare(x[:0], y[:0])
