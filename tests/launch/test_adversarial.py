"""What 1,000 steps against a discriminator give: the arithmetic of the comparison."""

from smalti.launch.adversarial import compare


def row(arm, seed, psnr):
  return {'arm': arm, 'seed': seed, 'psnr': psnr, 'images': 7}


def test_means_are_over_seeds_and_differences_seed_by_seed():
  rows = [row('l2', 0, 20.0), row('more', 0, 21.0), row('gan', 0, 19.0), row('l2', 1, 22.0),
          row('more', 1, 23.5)]
  found = compare(rows)
  assert found['l2']['psnr'] == {'mean': 21.0, 'each': [20.0, 22.0]}
  assert found['more']['psnr']['each'] == [21.0, 23.5]
  assert found['gan - more']['psnr'] == {'mean': -2.0, 'each': [-2.0]}  # the other is unfinished
  assert compare(rows[:1])['gan'] == {'state': 'not run'}
  assert 'gan - more' not in compare(rows[:1])
