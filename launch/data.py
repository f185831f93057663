"""What is in a folder of images: `smalti data --path=DIR [--size=256]`.

Counts by class and by reason of refusal, sizes, exact duplicates, and the split that training will
use. The same rules, caps and cache as `data.folder`, so that what it says is what is read.
"""

import collections

from absl import flags

from smalti.data.folder import Example, FolderConfig, Survey, survey
from smalti.launch import cli

SHOWN = 5  # files named per reason, and duplicates, unless --all
PARTS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'eval'}


def define(values: flags.FlagValues) -> None:
  defaults = FolderConfig()
  flags.DEFINE_string('path', None, 'The folder.', flag_values=values)
  flags.DEFINE_integer('size', defaults.size, 'Pixels of the square that is read.',
                       flag_values=values)
  flags.DEFINE_float('eval_fraction', defaults.eval_fraction, 'Share that is held out.',
                     flag_values=values)
  flags.DEFINE_boolean('all', False, 'Name every refused file and duplicate.', flag_values=values)


def main(values: flags.FlagValues) -> int:
  if values.path is None:
    raise ValueError('`smalti data` needs --path=DIR, a folder of image files.')
  found = survey(values.path, values.size)
  print('\n'.join(describe(found, values.eval_fraction, None if values.all else SHOWN)))
  return 0


def describe(found: Survey, eval_fraction: float, shown: int | None) -> list[str]:
  """Lines of plain text; at most `shown` files are named in each place, None names all."""
  total = len(found.examples)
  classes = f' in {len(found.classes)} classes' if found.classes else ', no class folders'
  lines = [f'{printable(str(found.root))}: {total:,} images{classes}, '
           f'{len(found.refused):,} files refused, {found.hidden:,} hidden or linked passed over']
  if found.classes and {name.lower() for name in found.classes} <= PARTS:
    lines.append(f'The first folders ({", ".join(found.classes)}) look like splits, not classes: '
                 'name one of them with --path.')
  if total:
    lines += ['', *_split(found, eval_fraction), '', *_sizes(found)]
  if found.refused:
    lines += ['', 'refused']
    reasons = collections.defaultdict(list)
    for example in found.refused:
      reasons[example.finding.reason].append(example)
    for reason, files in sorted(reasons.items(), key=lambda item: -len(item[1])):
      lines.append(f'  {len(files):>8,}  {reason}')
      lines += [f'            {printable(_named(e))}' for e in files[:shown]]
      lines += _more(files, shown)
  if groups := found.duplicates:
    copies = sum(len(group) - 1 for group in groups)
    across = sum(len({e.label for e in group}) > 1 for group in groups)
    lines += ['', f'duplicates: {copies:,} files repeat the bytes of {len(groups):,} others, '
              f'{across:,} of them under another class; copies stay on one side of the split']
    lines += ['            ' + ' = '.join(printable(e.path) for e in group)
              for group in groups[:shown]]
    lines += _more(groups, shown)
  return lines


def printable(text: str) -> str:
  """`text` without characters that could steer a terminal; a file's name is a stranger's."""
  return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode()
                 for c in text)


def _split(found: Survey, eval_fraction: float) -> list[str]:
  parts = {name: collections.Counter(e.label for e in found.split(name, eval_fraction))
           for name in ('train', 'eval')}
  names = found.classes or ('',)
  width = max(12, *(len(printable(name)) for name in names))
  lines = [f'{"class":<{width}}  {"images":>9}  {"train":>9}  {"eval":>9}']
  rows = [(printable(name), parts['train'][name], parts['eval'][name]) for name in names if name]
  rows.append(('all', parts['train'].total(), parts['eval'].total()))
  lines += [f'{name:<{width}}  {train + held:>9,}  {train:>9,}  {held:>9,}'
            for name, train, held in rows]
  lines.append(f'The split is by content (eval_fraction={eval_fraction:g}): '
               'it stays when files are added or renamed.')
  return lines


def _sizes(found: Survey) -> list[str]:
  sizes = sorted(((e.finding.width, e.finding.height) for e in found.examples),
                 key=lambda size: size[0] * size[1])
  small = sum(min(size) < found.size for size in sizes)
  text = [f'{w}x{h}' for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
  lines = [f'sizes: smallest {text[0]}, median {text[1]}, largest {text[2]}; '
           f'read as {found.size}x{found.size}']
  if small:
    lines.append(f'{small:,} images are smaller than {found.size} on a side and will be enlarged; '
                 'a smaller --size avoids that.')
  return lines


def _named(example: Example) -> str:
  detail = example.finding.detail.removeprefix(f'{example.finding.reason}: ')
  plain = detail in ('', example.finding.reason)
  return example.path if plain else f'{example.path} ({detail})'


def _more(items: list, shown: int | None) -> list[str]:
  left = len(items) - shown if shown is not None else 0
  return [f'            and {left:,} more; --all names them'] if left > 0 else []


if __name__ == '__main__':
  cli.run('data')
