"""DINOv2 from a file of its published weights, which smalti does not ship.

`model.safetensors` of facebook/dinov2-small, -base or -large, or of their versions with registers
(`transformers`' names), or dinov2_vit*14_pretrain.pth of facebookresearch/dinov2.
"""

import math
import os
import re

import numpy as np
from flax import nnx

from smalti.evaluation import conversion, weights
from smalti.networks.teacher import PATCH, DINOv2

FILE = 'SMALTI_DINOV2'


def load(path: str | os.PathLike | None = None, *, dtype: str = 'float32') -> tuple[str, DINOv2]:
  """(name, network) of a file; the name has the first digits of its SHA-256.

  Args:
    path: none takes the environment's `SMALTI_DINOV2`.
    dtype: of products and activations.

  Raises:
    ValueError: a file was not given, or holds another network.
    FileNotFoundError: no such file.
  """
  path = path or os.environ.get(FILE)
  if not path:
    raise ValueError(
        'DINOv2 needs its weights, which smalti cannot ship: get model.safetensors of '
        f'facebook/dinov2-large (or -base, -small), and name it with {FILE}=FILE.')
  file = weights.read(path)
  try:
    model = restore(file.tensors, dtype=dtype)
  except ValueError as error:
    raise ValueError(f'{path} is no DINOv2: {error}') from error
  return f'dinov2_{model.width}_{file.sha256[:8]}', model


def restore(tensors: weights.Tensors, *, dtype: str = 'float32') -> DINOv2:
  """The network with these tensors, of either naming.

  Raises:
    ValueError: a tensor is missing, of another shape, or not finite.
  """
  names = _PORT if 'embeddings.cls_token' in tensors else _ORIGINAL
  if names['table'] not in tensors:
    raise ValueError(f'it lacks {names["table"]}, and holds another network.')
  found = [re.match(names['block'].format(r'(\d+)'), name) for name in tensors]
  layers = 1 + max((int(match[1]) for match in found if match), default=-1)
  width = np.shape(tensors[names['table']])[-1]
  registers = np.shape(tensors[names['registers']])[1] if names['registers'] in tensors else 0

  def blocks(name: str, leaf: str) -> np.ndarray:
    """[layers, ...] of one leaf of all blocks, linear maps as [layers, inputs, outputs]."""
    leaves = [tensors[f'{names["block"].format(i)}{names[name]}.{leaf}'] for i in range(layers)]
    return np.stack([conversion.from_torch(np.asarray(x)) if leaf == 'weight' and x.ndim > 1
                     else np.asarray(x) for x in leaves])

  def queries_keys_values(leaf: str) -> np.ndarray:
    """[layers, (inputs,) 3, heads, 64] of kernels or biases."""
    if 'qkv' in names:
      whole = blocks('qkv', leaf)
    else:
      whole = np.concatenate([blocks(name, leaf) for name in ('query', 'key', 'value')], -1)
    return whole.reshape(*whole.shape[:-1], 3, width // 64, 64)

  def scaled(name: str, leaf: str) -> np.ndarray:
    scale = np.stack([np.asarray(tensors[f'{names["block"].format(i)}{names[name + "_scale"]}'])
                      for i in range(layers)])
    value = blocks(name, leaf)
    return value * (scale if leaf == 'bias' else scale[:, None])

  def take(path: conversion.Path) -> tuple[str, np.ndarray]:
    place, leaf = '.'.join(map(str, path)), 'weight' if path[-1] in ('kernel', 'scale') else 'bias'
    table = np.asarray(tensors[names['table']])[0]
    if place == 'first':
      first = np.asarray(tensors[names['class']])[0] + table[:1]
      return place, np.concatenate(
          [first, np.asarray(tensors[names['registers']])[0]]) if registers else first
    if place == 'patches.positions.table.embedding':
      return names['table'], table[1:]
    if path[:2] == ('patches', 'input'):
      value = np.asarray(tensors[f'{names["patches"]}.{leaf}'])
      return names['patches'], value if leaf == 'bias' else conversion.from_torch(value).reshape(
          3 * PATCH**2, -1)
    if path[:2] == ('transformer', 'norm'):
      return names['norm'], np.asarray(tensors[f'{names["norm"]}.{leaf}'])
    part = '.'.join(path[2:-1])
    if part in ('attention.query', 'attention.key_value'):
      whole = queries_keys_values(leaf)
      return part, np.take(whole, 0, -3) if part.endswith('query') else whole[..., 1:, :, :]
    if part in ('attention.out', 'down'):
      value = scaled(part, leaf)
      return part, value if leaf == 'bias' or part == 'down' else value.reshape(
          layers, -1, 64, width)
    return part, blocks(part, leaf)

  if not layers or width % 64 or math.isqrt(np.shape(tensors[names['table']])[1] - 1) != 37:
    raise ValueError(f'{layers} blocks, width {width} and a table of '
                     f'{np.shape(tensors[names["table"]])} are of another network.')
  graph, state = conversion.fill(lambda: DINOv2(
      layers, width, registers=registers, dtype=dtype, rngs=nnx.Rngs(0)), take)
  return nnx.merge(graph, state)


_PORT = {  # transformers
    'class': 'embeddings.cls_token', 'table': 'embeddings.position_embeddings',
    'registers': 'embeddings.register_tokens', 'patches': 'embeddings.patch_embeddings.projection',
    'norm': 'layernorm', 'block': 'encoder.layer.{}.', 'query': 'attention.attention.query',
    'key': 'attention.attention.key', 'value': 'attention.attention.value',
    'attention_norm': 'norm1', 'mlp_norm': 'norm2', 'up': 'mlp.fc1', 'down': 'mlp.fc2',
    'attention.out': 'attention.output.dense', 'attention.out_scale': 'layer_scale1.lambda1',
    'down_scale': 'layer_scale2.lambda1'}
_ORIGINAL = {  # facebookresearch/dinov2
    'class': 'cls_token', 'table': 'pos_embed', 'registers': 'register_tokens',
    'patches': 'patch_embed.proj', 'norm': 'norm', 'block': 'blocks.{}.', 'qkv': 'attn.qkv',
    'attention_norm': 'norm1', 'mlp_norm': 'norm2', 'up': 'mlp.fc1', 'down': 'mlp.fc2',
    'attention.out': 'attn.proj', 'attention.out_scale': 'ls1.gamma', 'down_scale': 'ls2.gamma'}
