"""The peers of `smalti bench`, run by an interpreter that has torch and what a case names.

Reads requests and writes answers, one line of JSON each; `launch/timing.py` says which. Nothing of
ours is imported here; torch is named in this folder alone.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import time

import numpy as np
import quantization
import torch

THREADS = int(os.environ.get('OMP_NUM_THREADS', '2'))


def nearest(codes, dim, rows, seed, form):
  """Nearest of `codes` unit vectors to each of `rows`; with equal norms the largest product."""
  random = np.random.default_rng(seed)
  x = torch.from_numpy(random.standard_normal((rows, dim), np.float32))
  table = random.standard_normal((codes, dim), np.float32)
  table = torch.from_numpy(table / np.linalg.norm(table, axis=-1, keepdims=True))

  @torch.no_grad()
  def run():
    if form == 'cdist':
      return torch.cdist(x, table).argmin(-1)
    return (x @ table.T).argmax(-1)

  return run, lambda result: result.tolist()


def llama(path, layers, width, heads, hidden, vocab):
  """HuggingFace's Llama with the weights of `path`; the last row of its table is BOS."""
  from transformers import LlamaConfig, LlamaForCausalLM
  model = LlamaForCausalLM(LlamaConfig(
      vocab_size=vocab + 1, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
      num_attention_heads=heads, max_position_embeddings=1024, rms_norm_eps=1e-5,
      rope_theta=10000.0, tie_word_embeddings=False, bos_token_id=vocab, eos_token_id=None,
      pad_token_id=0, attention_bias=False))
  with np.load(path, allow_pickle=False) as arrays:
    state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
  model.load_state_dict(state)
  return model


def decode(path, tokens, batch, length, known, compiled, **sizes):
  """Sampling at temperature 1 after `known` codes: `generate` with its cache, or `static`."""
  model = llama(path, **sizes).eval()
  bos = sizes['vocab']
  if compiled:
    return static(model, tokens, batch, length)
  start = torch.tensor([[bos, *tokens[:known]]]).repeat(batch, 1)

  @torch.no_grad()
  def run():
    torch.manual_seed(0)
    return model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, min_new_tokens=length - known, max_new_tokens=length - known, use_cache=True)

  @torch.no_grad()
  def check(result):
    assert result.shape == (batch, length + 1)
    given = torch.tensor([[bos, *tokens[:-1]]])
    places = torch.tensor([[0, *range(len(tokens) - 1)]])  # ours puts BOS and the first code at 0
    logits = model(given, position_ids=places).logits[0, :, :bos]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()

  return run, check


def static(model, tokens, batch, length):
  """A loop over one compiled step, which reads a static cache, and draws."""
  from transformers import StaticCache
  config = model.config
  bos, heads = config.vocab_size - 1, config.num_attention_heads
  cache = StaticCache(config=config, max_cache_len=length)
  cache.early_initialization(batch_size=batch, num_heads=heads, dtype=torch.float32, device='cpu',
                             head_dim=config.hidden_size // heads)
  places = list(torch.arange(length)[:, None, None])  # tensors: numbers would be compiled in

  @torch.compile(fullgraph=True, dynamic=False)
  def step(code, place):
    logits = model(code, position_ids=place, past_key_values=cache, use_cache=True).logits
    logits = logits[:, -1, :bos]
    return torch.multinomial(logits.softmax(-1), 1), logits

  @torch.no_grad()
  def run():
    torch.manual_seed(0)
    cache.reset()
    codes = [torch.full((batch, 1), bos)]
    for place in places:
      codes.append(step(codes[-1], place)[0])
    return torch.cat(codes, 1)

  @torch.no_grad()
  def check(result):
    assert result.shape == (batch, length + 1)
    cache.reset()
    found, given = [], [bos, *tokens]
    for i in range(length):  # ours puts BOS and the first code at 0
      _, logits = step(torch.full((batch, 1), given[i]), places[max(i - 1, 0)])
      found.append(float(logits[0].log_softmax(-1)[tokens[i]]))
    return found

  return run, check


def train_step(path, batch, length, compiled, **sizes):
  """Forward, backward and fused AdamW, eager or with the first two compiled."""
  model = llama(path, **sizes).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  random = np.random.default_rng(0)
  tokens = torch.from_numpy(random.integers(0, sizes['vocab'], (batch, length + 1)))

  def cost(tokens):
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

  if compiled:
    cost = torch.compile(cost, dynamic=False)

  def run():
    loss = cost(tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()

  return run, lambda result: float(result)


CASES = {'nearest': nearest, 'decode': decode, 'train_step': train_step, **quantization.CASES}
LIBRARIES = 'torch', 'transformers', 'vector-quantize-pytorch'


def versions():
  """Of the libraries that are installed."""
  found = {}
  for name in LIBRARIES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name.replace('-', '_')] = importlib.metadata.version(name)
  return found


def answer(request, current):
  """The reply to one request; `current` holds the case that is timed."""
  if 'calls' in request:
    cpu, wall, calls = time.process_time(), time.perf_counter(), request['calls']
    for _ in range(calls):
      current['run']()
    return {'cpu': (time.process_time() - cpu) / calls,
            'wall': (time.perf_counter() - wall) / calls}
  case = request.pop('case')
  if case == 'used':
    return {'cpu': time.process_time()}
  if case == 'versions':
    return {'python': sys.version.split()[0], 'threads': torch.get_num_threads(), **versions()}
  current['run'], check = CASES[case](**request)
  begin = time.perf_counter()
  result = current['run']()
  return {'first': time.perf_counter() - begin, 'check': check(result)}


def main():
  torch.set_num_threads(THREADS)
  answers = os.fdopen(os.dup(1), 'w')  # libraries that print must not spoil the answers
  os.dup2(2, 1)
  current = {}
  for line in sys.stdin:
    try:
      reply = answer(json.loads(line), current)
    except Exception as error:  # the other side raises it
      reply = {'error': f'{type(error).__name__}: {error}'}
    print(json.dumps(reply), file=answers, flush=True)


if __name__ == '__main__':
  main()
