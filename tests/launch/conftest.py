"""A page of HTML, taken apart: what the tests of reports and sweeps hold every page to."""

import html.parser
import re
import urllib.parse

import pytest

VOID = {'meta', 'img', 'br', 'wbr', 'hr', 'link', 'input'}


class Page(html.parser.HTMLParser):
  """Collects links, ids and tags, and checks that tags nest."""

  def __init__(self, path):
    super().__init__()
    self.path, self.links, self.ids, self.tags, self.open = path, [], [], [], []
    self.text, self.attributes = '', []
    self.source = path.read_text(encoding='utf-8')
    self.feed(self.source)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attributes):
    self.handle_startendtag(tag, attributes)
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes
    for name, value in attributes:
      if name in ('src', 'href', 'xlink:href', 'srcset', 'action', 'data', 'poster'):
        self.links.append(value)
      if name == 'id':
        self.ids.append(value)
      self.links += re.findall(r'url\(([^)]*)\)', value or '')

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, tag

  def handle_data(self, data):
    if self.open and self.open[-1] == 'style':
      self.links += re.findall(r'url\(([^)]*)\)', data) + re.findall(r'@import[^;]*', data)
    self.text += data

  def check(self):
    """Nothing remote, nothing broken, nothing that runs."""
    for link in self.links:
      parts = urllib.parse.urlsplit(link)
      assert not parts.scheme and not parts.netloc, link
      if parts.path:
        assert (self.path.parent / urllib.parse.unquote(parts.path)).is_file(), link
      else:
        assert parts.fragment in self.ids, link
    assert len(self.ids) == len(set(self.ids))
    assert not {'script', 'iframe', 'object', 'embed', 'link', 'base', 'form'} & set(self.tags)
    assert not [name for name, _ in self.attributes if name.startswith('on')]
    assert '://' not in self.source
    return self


@pytest.fixture
def read_page():
  """path -> the page, checked."""
  return lambda path: Page(path).check()
