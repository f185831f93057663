"""Every test runs on the CPU, on eight simulated devices; compiled programs are cached between runs."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8').strip()
os.environ.setdefault('WANDB_MODE', 'offline')

import jax  # noqa: E402
import pytest  # noqa: E402

DATA = os.environ.get('SMALTI_DATA_DIR')


def pytest_collection_modifyitems(items):
  skip = pytest.mark.skip(reason='SMALTI_DATA_DIR names no folder of data sets')
  for item in items:
    if 'needs_data' in item.keywords and not DATA:
      item.add_marker(skip)


@pytest.fixture
def key():
  return jax.random.key(0)
