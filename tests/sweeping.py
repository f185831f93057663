"""Kills a sweep ten times and compares its tables with those of a sweep nobody killed.

  python tests/sweeping.py      # some minutes on two cores; writes docs/results/sweep.json

24 cells: two checkpoints x three guidances x two temperatures x two numbers of steps. The kills
fall in the middle of a batch, before a file of the accumulators takes its name, and before a table.
Afterwards the tables must be byte for byte those of the sweep that was left alone, and no more than
one batch per kill may have been drawn twice. Before it runs, the sweep predicts its time.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
N, BATCH, CELLS = 256, 64, 24
AXES = ['--checkpoint=all', '--settings.guidance=1,1.5,2', '--settings.temperature=1,0.8',
        '--settings.steps=4,8', f'--n={N}', f'--batch_size={BATCH}']
# Where, and at which time it comes by; counted anew in every process.
KILLS = (('sampling', 7), ('part0', 9), ('results.csv', 2), ('sampling', 13), ('cursor.json', 11),
         ('results.jsonl', 3), ('part1', 6), ('sampling', 2), ('scores.json', 2), ('DONE', 2))


def child(arguments: list[str]) -> None:
  """`smalti sweep` that kills itself at a moment named in SWEEPING_KILL."""
  from smalti.launch import cli, sample
  moment, _, number = os.environ.get('SWEEPING_KILL', '').partition(':')
  left = int(number or 0)

  def passed(name: str) -> None:
    nonlocal left
    if moment and name.startswith(moment):
      left -= 1
      if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

  replace = os.replace

  def replacing(source, target, **kwargs):
    passed(pathlib.Path(target).name)
    replace(source, target, **kwargs)
  os.replace = replacing
  batches = sample.Sampler.batches

  def drawing(self, *args, **kwargs):
    for batch in batches(self, *args, **kwargs):
      passed('sampling')  # the program was called, and nothing of it was counted
      yield batch
  sample.Sampler.batches = drawing
  sys.exit(cli.main(['sweep', *arguments]))


def smalti(*arguments: str, kill: str = '', child: bool = False,
           cwd: pathlib.Path) -> tuple[int, str]:
  """Runs a command; (exit code, what it said)."""
  head = [sys.executable, __file__, 'child'] if child else [
      sys.executable, '-m', 'smalti.launch.' + arguments[0]]
  done = subprocess.run([*head, *arguments[0 if child else 1:]], cwd=cwd, capture_output=True,
                        text=True, env=os.environ | {'SWEEPING_KILL': kill})
  return done.returncode, done.stderr


def batches(out: pathlib.Path) -> int:
  """Batches drawn in all, as the logs of the sweep count them."""
  return sum(json.loads(line)['event'] == 'batch' for path in (out / 'logs').glob('*.jsonl')
             for line in path.read_text().splitlines())


def tables(out: pathlib.Path) -> dict[str, bytes]:
  return {name: (out / name).read_bytes() for name in ('results.csv', 'results.jsonl')}


def experiment(folder: pathlib.Path) -> dict:
  """The whole comparison, in an empty folder."""
  short = ['--config.log.every=20', '--config.eval.every=40']
  for name, extra in (('digits_vq', []), ('digits_masked', ['--config.tokenizer=digits_vq'])):
    code, said = smalti('train', f'--config={name}', f'--workdir={name}', '--config.steps=80',
                        '--config.checkpoint.every=40', *short, *extra, cwd=folder)
    assert code == 0, said
  asked = ['--workdir=digits_masked', *AXES]
  code, said = smalti('sweep', *asked, '--out=alone', '--dry_run', cwd=folder)
  assert code == 0, said
  predicted = float(said.split(' h (')[-1].split(' s)')[0])
  begin = time.perf_counter()
  code, said = smalti('sweep', *asked, '--out=alone', cwd=folder)
  wall = time.perf_counter() - begin
  assert code == 0, said
  last = said.strip().splitlines()[-1]
  took = float(last.split(' programs compiled, ')[1].split(' s')[0])
  programs = int(last.split(' batches drawn in all, ')[1].split(' ')[0])
  met = {}
  for moment, number in KILLS:
    code, said = smalti(*asked, '--out=killed', kill=f'{moment}:{number}', child=True, cwd=folder)
    met[f'{moment} {number}'] = code == -signal.SIGKILL
    print(f'{moment} {number}: exit {code}, {batches(folder / "killed")} batches', flush=True)
  code, said = smalti(*asked, '--out=killed', child=True, cwd=folder)
  assert code == 0, said
  alone, killed = folder / 'alone', folder / 'killed'
  per_cell = -(-N // BATCH)
  steps = len({json.loads(line)['steps'] for line in
               (alone / 'results.jsonl').read_text().splitlines()})
  return {
      'cells': len((alone / 'results.jsonl').read_text().splitlines()), 'samples_per_cell': N,
      'kills': sum(met.values()), 'moments': met,
      'tables_identical': tables(alone) == tables(killed),
      'batches_alone': batches(alone), 'batches_killed': batches(killed),
      'batches_allowed': CELLS * per_cell + len(KILLS),
      'programs_compiled': programs, 'distinct_shapes': steps,
      'predicted_seconds': predicted, 'seconds': took, 'prediction_ratio': predicted / took,
      'seconds_with_start': round(wall, 1)}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', default=HERE.parent / 'docs' / 'results' / 'sweep.json')
  arguments = parser.parse_args()
  from smalti.launch import provenance
  clock = provenance.Clock()
  with tempfile.TemporaryDirectory() as folder:
    found = experiment(pathlib.Path(folder))
  provenance.record(arguments.out, 'python tests/sweeping.py', found, clock=clock)
  print(json.dumps(found, indent=1))
  return 0 if found['tables_identical'] and found['kills'] == len(KILLS) and (
      found['batches_killed'] <= found['batches_allowed']) else 1


if __name__ == '__main__':
  if sys.argv[1:2] == ['child']:
    child(sys.argv[2:])
  sys.exit(main())
