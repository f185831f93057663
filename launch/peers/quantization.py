"""Peers of `smalti bench quantizers`: vector-quantize-pytorch, and torch's convolutions.

Imported by `pytorch.py` of this folder; both get our codebooks and weights as .npz files.
"""

import numpy as np
import torch
from torch.nn import functional


def vector_quantizer(path):
  """A training step of VectorQuantize, or of ResidualVQ where there are several codebooks.

  Straight-through, as ours: the library's default for moving averages is the rotation trick.
  """
  from vector_quantize_pytorch import ResidualVQ, VectorQuantize
  with np.load(path, allow_pickle=False) as arrays:
    z = torch.from_numpy(arrays['z']).requires_grad_()
    tables = torch.from_numpy(arrays['codebooks'])
  levels, codes, dim = tables.shape
  options = {'dim': dim, 'codebook_size': codes, 'decay': 0.99, 'commitment_weight': 0.25,
             'rotation_trick': False}
  if levels == 1:
    model = VectorQuantize(**options)
    layers = [model]
  else:
    model = ResidualVQ(num_quantizers=levels, **options)
    layers = model.layers
  for layer, table in zip(layers, tables):
    book = layer._codebook
    book.embed.data.copy_(table[None])
    book.embed_avg.data.copy_(table[None])
    book.cluster_size.data.fill_(1.0)
  model.train()

  def run():
    z.grad = None
    q, tokens, loss = model(z)
    (q.sum() + loss.sum()).backward()
    return tokens

  return run, lambda tokens: tokens.reshape(-1, levels).tolist()


class Stack:
  """Our convolutional encoder and decoder in torch, with our weights, channels last."""

  def __init__(self, arrays):
    self.weights = {}
    for name in arrays.files:
      value = torch.from_numpy(arrays[name])
      if value.ndim == 4 and name != 'x':  # [h, w, in, out]
        value = value.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
      self.weights[name] = value if name == 'x' else value.requires_grad_()

  def conv(self, name, x, stride=1):
    kernel, bias = self.weights[f'{name}/kernel'], self.weights[f'{name}/bias']
    if kernel.ndim == 2:
      return functional.conv2d(x, kernel.T[..., None, None], bias)
    if stride == 2:
      return functional.conv2d(functional.pad(x, (0, 1, 0, 1)), kernel, bias, stride=2)
    return functional.conv2d(x, kernel, bias, padding=1)

  def norm(self, name, x):
    scale, bias = self.weights[f'{name}/scale'], self.weights[f'{name}/bias']
    groups = int(np.gcd(32, x.shape[1]))
    return functional.silu(functional.group_norm(x, groups, scale, bias, eps=1e-6))

  def block(self, name, x):
    y = self.conv(f'{name}/conv1', self.norm(f'{name}/norm1', x))
    y = self.conv(f'{name}/conv2', self.norm(f'{name}/norm2', y))
    skip = f'{name}/skip'
    return y + (self.conv(skip, x) if f'{skip}/kernel' in self.weights else x)

  def level(self, name, x):
    i = 0
    while f'{name}/blocks/{i}/conv1/kernel' in self.weights:
      x = self.block(f'{name}/blocks/{i}', x)
      i += 1
    return x

  def middle(self, name, x):
    return self.block(f'{name}/middle/second', self.block(f'{name}/middle/first', x))

  def encode(self, x, levels):
    x = self.conv('encoder/input', x)
    for i in range(levels):
      x = self.level(f'encoder/levels/{i}', x)
      if i < levels - 1:
        x = self.conv(f'encoder/levels/{i}/resize/conv', x, stride=2)
    return self.conv('encoder/output', self.norm('encoder/norm', self.middle('encoder', x)))

  def decode(self, x, levels):
    x = self.middle('decoder', self.conv('decoder/input', x))
    for i in range(levels):
      x = self.level(f'decoder/levels/{i}', x)
      if i < levels - 1:
        x = functional.interpolate(x, scale_factor=2, mode='nearest')
        x = self.conv(f'decoder/levels/{i}/resize/conv', x)
    return self.conv('decoder/output', self.norm('decoder/norm', x))


def autoencoder(path, levels):
  """Mean squared error of decode(encode(x)), and its gradient by all weights."""
  with np.load(path, allow_pickle=False) as arrays:
    stack = Stack(arrays)
  x = stack.weights.pop('x').permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

  def run():
    for value in stack.weights.values():
      value.grad = None
    loss = functional.mse_loss(stack.decode(stack.encode(x, levels), levels), x)
    loss.backward()
    return loss

  def check(loss):
    squares = sum(float(value.grad.square().sum()) for value in stack.weights.values())
    return [float(loss.detach()), squares**0.5]

  return run, check


CASES = {'vector_quantizer': vector_quantizer, 'autoencoder': autoencoder}
