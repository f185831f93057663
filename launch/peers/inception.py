"""Networks of torch-fidelity, lpips and clean-fid with random weights, saved beside their outputs.

    python launch/peers/inception.py FOLDER

runs under an interpreter that has torch, torch-fidelity, torchvision, lpips and clean-fid; it is
the other side of `launch/inception_peers.py`. Weights are drawn so that activations keep their
size; nothing is downloaded and nothing of ours is imported.
"""

import functools
import importlib.metadata
import json
import sys
import warnings
from pathlib import Path

import lpips
import numpy as np
import torch
from cleanfid.resize import build_resizer
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

FEATURES = ['2048', 'logits_unbiased']
NETS = ('vgg', 'alex', 'squeeze')
SIZES = {'small': (6, 32, 32), 'large': (2, 330, 420)}
PAIRS = (5, 64, 64)


def images(count, height, width, seed):
  """Waves and noise: smooth and sharp parts, all levels."""
  random = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width] / 32
  waves = [np.sin(a * x + b * y + c) for a, b, c in random.normal(0, 3, (3 * count, 3))]
  waves = np.stack(waves).reshape(count, 3, height, width).transpose(0, 2, 3, 1)
  return np.clip(128 + 90 * waves + random.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)


def random_state(network, seed):
  """He-normal kernels; scales, means and variances of every size that a trained file has."""
  generator = torch.Generator().manual_seed(seed)
  state = {}
  for name, value in network.state_dict().items():
    draw = functools.partial(torch.rand, value.shape, generator=generator)
    normal = functools.partial(torch.randn, value.shape, generator=generator)
    if value.ndim > 1:
      value = normal() * (2 / value[0].numel()) ** 0.5
    elif name.endswith('running_var'):
      value = 0.5 + draw()
    elif name.endswith('bn.weight'):
      value = 0.8 + 0.4 * draw()
    elif not name.endswith('num_batches_tracked'):
      value = 0.1 * normal()
    state[name] = value
  return state


def network(path, dtype=torch.float32):
  model = fidelity.FeatureExtractorInceptionV3('inception', FEATURES, path)
  model.feature_extractor_internal_dtype = dtype  # 0.4.0 takes 'float64' and means float32
  return model.to(dtype)


class Named(torch.nn.Module):
  """Tensors under dotted names, as modules within modules, so that TorchScript keeps them."""

  def __init__(self, tensors):
    super().__init__()
    inner = {}
    for name, value in tensors.items():
      head, dot, rest = name.partition('.')
      if dot:
        inner.setdefault(head, {})[rest] = value
      else:
        self.register_parameter(head, torch.nn.Parameter(value, requires_grad=False))
    for head, values in inner.items():
      self.add_module(head, Named(values))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x


@torch.no_grad()
def run(model, array):
  """Features, logits, and the spatial tap: the unit `mixed_6/conv` of the graph."""
  taps = []
  handle = model.Mixed_6d.branch1x1.register_forward_hook(lambda *a: taps.append(a[2]))
  features, logits = model(torch.from_numpy(array).permute(0, 3, 1, 2))
  handle.remove()
  spatial = taps[0][:, :7].permute(0, 2, 3, 1).flatten(1)
  return {'features': features, 'logits': logits, 'spatial': spatial}


def resized(array):
  x = torch.from_numpy(array).permute(0, 3, 1, 2).float()
  tf1 = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
  legacy = torch.nn.functional.interpolate(x / 255, (299, 299), mode='bilinear',
                                           align_corners=False)
  clean = build_resizer('clean')
  return {'tf1': tf1.permute(0, 2, 3, 1), 'legacy_pytorch': legacy.permute(0, 2, 3, 1),
          'clean': np.stack([clean(image) for image in array])}


@torch.no_grad()
def perceptual(folder, arrays):
  x, y = images(*PAIRS, seed=3), images(*PAIRS, seed=4)
  y[1] = np.clip(x[1].astype(int) + 9, 0, 255)  # a near pair
  arrays.update({'pairs/x': x, 'pairs/y': y})
  x, y = (torch.from_numpy(z).permute(0, 3, 1, 2) / 127.5 - 1 for z in (x, y))
  for net in NETS:
    torch.manual_seed(0)
    model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = model.state_dict()
    trunk = {f'features.{name.split(".", 2)[2]}': value for name, value in state.items()
             if name.startswith('net.slice')}
    for name, value in trunk.items():  # torchvision's biases start at 0
      if name.endswith('bias'):
        value.copy_(0.1 * torch.randn(value.shape))
    torch.save(trunk, folder / f'{net}_trunk.pth')
    torch.save({k: v for k, v in state.items() if k.startswith('lin') and '.model.' in k and
                k.split('.')[0][3:].isdigit()}, folder / f'{net}_heads.pth')
    arrays[f'lpips/{net}'] = model(x, y).flatten()


def main(folder):
  torch.set_num_threads(2)
  warnings.simplefilter('ignore')  # TorchScript is deprecated, and is what the file is made of
  folder, arrays = Path(folder), {}
  with_random = folder / 'random.pth'
  bare = fidelity.FeatureExtractorInceptionV3
  fidelity.load_state_dict_from_url = lambda *a, **k: {}
  state = random_state(type('Bare', (bare,), {'load_state_dict': lambda *a: None})(
      'bare', FEATURES), seed=0)
  torch.save(state, with_random)
  torch.save(state, folder / 'random_legacy.pth', _use_new_zipfile_serialization=False)
  # the TorchScript file has no scales of batch-norm: they are 1
  plain = {k: torch.ones_like(v) if k.endswith('bn.weight') else v for k, v in state.items()}
  torch.save(plain, folder / 'plain.pth')
  names = json.loads((folder / 'names.json').read_text())
  script = {names[k]: v for k, v in plain.items() if k in names and not k.endswith('bn.weight')}
  torch.jit.script(Named(script)).save(folder / 'plain.pt')

  for size, (count, height, width) in SIZES.items():
    array = arrays[f'{size}/images'] = images(count, height, width, seed=1)
    for kind, value in resized(array).items():
      arrays[f'{size}/{kind}'] = value
    for weights in ('random', 'plain'):
      model = network(folder / f'{weights}.pth')
      for name, value in run(model, array).items():
        arrays[f'{size}/{weights}/{name}'] = value
  exact = run(network(with_random, torch.float64), arrays['small/images'])
  for name, value in exact.items():
    arrays[f'small/exact/{name}'] = value
  perceptual(folder, arrays)
  np.savez(folder / 'outputs.npz', **{k: np.asarray(v) for k, v in arrays.items()})
  versions = {name: importlib.metadata.version(name) for name in (
      'torch', 'torchvision', 'torch-fidelity', 'lpips', 'clean-fid', 'numpy', 'pillow')}
  (folder / 'versions.json').write_text(json.dumps(versions))


if __name__ == '__main__':
  main(sys.argv[1])
