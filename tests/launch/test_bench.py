"""The bench measures what it says: rows with goals, judged by the upper quartile; a smoke test."""

import numpy as np
import pytest

from smalti.launch import bench, bench_generators, bench_quantizers, timing
from smalti.tokenizers.vq import VQConfig


@pytest.mark.parametrize(('quartile', 'goal', 'met'), [
    (0.69, 0.7, True), (0.71, 0.7, False), (0.71, None, None)])
def test_a_goal_is_met_by_the_upper_quartile(quartile, goal, met):
  row = bench.Row('case', 'peer', {'cpu_ratio': {'median': 0.5, 'q1': 0.4, 'q3': quartile}}, goal)
  assert row.to_json()['met'] is met


def test_without_a_peer_nothing_is_met_or_missed():
  row = bench.Row('case', 'peer', {'our_time': {'cpu_seconds': {'median': 1.0}}}, 0.7).to_json()
  assert row['met'] is None and '1.0000 s' in bench._line(row)


def test_the_pipeline_is_timed_against_numpy(tmp_path):
  [row] = bench.data(bench.Bench(rounds=2, seconds=0.02, peer=None, folder=tmp_path))
  found = row.to_json()
  assert 0.1 < found['cpu_ratio']['median'] < 100 and found['goal'] == 2.0
  assert found['our_time']['cpu_seconds']['median'] > 0


def test_the_step_that_is_timed_trains_a_codebook():
  step = bench_quantizers.Step(VQConfig(codes=16, dim=3, init='normal', revival=0.0), 40)
  z, codes = step.z[0], step.codebooks[0]
  np.testing.assert_array_equal(
      step.tokens[:, 0], np.square(z[:, None] - codes).sum(-1).argmin(-1))
  assert not np.array_equal(step.state['codebook'][...], codes)
  (_, by_z), _, _ = step.run()
  assert np.any(np.asarray(by_z) != 1) and step.bytes > 0 and step.measure(2).cpu > 0


def test_the_network_runs_as_often_as_there_are_steps():
  assert [bench_generators._passes(steps) for steps in (1, 5)] == [1, 5]


def test_codes_without_a_cache_may_part_at_a_tie_alone():
  full = np.array([4, 7, 2, 9])
  bench_generators._check_uncached(full, full)
  bench_generators._check_uncached(full, np.array([4, 8, 0, 0]))  # what follows a tie is another
  with pytest.raises(RuntimeError, match='code 1 is 7, with it 9'):
    bench_generators._check_uncached(full, np.array([4, 9, 2, 9]))


def test_a_falling_function_of_a_ratio_keeps_the_order_of_quartiles():
  found = bench_generators._mapped({'median': 2.0, 'q1': 1.0, 'q3': 4.0}, lambda ratio: 1 / ratio)
  assert found == {'median': 0.5, 'q1': 0.25, 'q3': 1.0}


def test_a_program_says_what_it_costs():
  import jax
  import jax.numpy as jnp
  program = timing.Program(jax.jit(lambda x: jnp.sort(x * 2)), jnp.arange(4.0))
  ours = timing.Ours(lambda: program(jnp.arange(4.0)), program)
  assert ours.first > program.seconds > 0 and set(program.costs) == {
      'compile_seconds', 'temporary_mib'}
  np.testing.assert_array_equal(ours.run(), [0, 2, 4, 6])
