"""A page of HTML that opens from disk: one file, its style inside, no script, nothing remote."""

import hashlib
import html
from collections.abc import Sequence

STYLE = """
:root{color-scheme:light dark;
  --paper:#fbfaf7;--card:#fff;--ink:#1d1c1a;--quiet:#6d6963;--rule:#e3dfd6;--accent:#0f6b63;
  --line0:#0f6b63;--line1:#c8572b;--line2:#3f5fb0;--line3:#a8862a;
  --line4:#7c3f8c;--line5:#3d8a3f;--line6:#b23a5b;--line7:#58707c}
@media (prefers-color-scheme:dark){:root{
  --paper:#161514;--card:#1e1d1b;--ink:#ece8e0;--quiet:#9d978d;--rule:#37342f;--accent:#5cc4b5;
  --line0:#5cc4b5;--line1:#f0895e;--line2:#8fabf2;--line3:#dcbb5a;
  --line4:#c48fd4;--line5:#86c987;--line6:#ee829f;--line7:#9fb6c1}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
  font-variant-numeric:tabular-nums}
main,header,footer{max-width:70rem;margin:0 auto;padding:0 clamp(1rem,4vw,2.5rem)}
header{padding-top:clamp(1.5rem,5vw,3.5rem)}
.tiles{display:block;width:100%;max-width:26rem;height:auto;margin-bottom:1.6rem}
h1,h2,h3{font-family:"Iowan Old Style","Palatino Linotype",Palatino,"URW Palladio L",P052,Georgia,
  serif;font-weight:600;line-height:1.15;text-wrap:balance;overflow-wrap:anywhere}
h1{font-size:clamp(1.9rem,5vw,2.9rem);margin:0 0 .7rem;letter-spacing:-.015em}
h2{font-size:clamp(1.5rem,3.4vw,2rem);margin:0}
h3{font-size:1.15rem;margin:2.6rem 0 .9rem}
h4{font-size:.86rem;font-weight:600;margin:0}
p{max-width:44rem;margin:.5rem 0}
a{color:var(--accent);text-decoration-thickness:1px;text-underline-offset:.15em}
nav{margin:1.2rem 0 0;display:flex;flex-wrap:wrap;gap:.4rem 1.3rem}
.run{margin-top:3.2rem;padding-top:2.2rem;border-top:1px solid var(--rule)}
.about{color:var(--quiet);margin:.3rem 0 0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:1px;
  margin:1.5rem 0 0;background:var(--card);border:1px solid var(--rule);border-radius:10px;
  overflow:hidden}
.facts div{box-shadow:0 0 0 1px var(--rule);padding:.8rem 1rem}
.facts dt{color:var(--quiet);font-size:.78rem}
.facts dd{margin:.1rem 0 0;font-size:1.3rem;font-weight:600;line-height:1.25}
.facts small{display:block;font-size:.78rem;font-weight:400;color:var(--quiet)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem}
figure{margin:0}
.chart{background:var(--card);border:1px solid var(--rule);border-radius:10px;
  padding:.9rem .9rem .4rem}
.chart figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:.1rem 1rem}
.chart ul{display:flex;flex-wrap:wrap;gap:0 .9rem;list-style:none;margin:0;padding:0;
  font-size:.78rem;color:var(--quiet)}
.chart b{color:var(--ink);font-weight:600}
.swatch{display:inline-block;width:1.1em;border-top:2px solid var(--c);margin-right:.4em;
  vertical-align:.28em}
.swatch.dotted{border-top-style:dotted}
.chart svg{display:block;width:100%;height:auto;margin-top:.3rem;color:var(--quiet);
  overflow:visible}
.chart svg text{font-family:inherit;font-size:8.5px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));
  gap:0 1.6rem}
.picture{margin:0 0 1.4rem}
.picture img,.strip img{display:block;image-rendering:pixelated;border-radius:4px}
.picture img{max-width:100%;height:auto}
.picture figcaption,.strip figcaption{color:var(--quiet);font-size:.82rem;margin-top:.5rem}
.picture figcaption b{color:var(--ink);font-weight:600}
.strip{display:flex;gap:1rem;overflow-x:auto;padding-bottom:.6rem}
.strip figure{flex:0 0 auto}.strip img{width:9.5rem;height:auto;image-rendering:auto}
.wide{overflow-x:auto;border:1px solid var(--rule);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;vertical-align:top;padding:.5rem .9rem;border-bottom:1px solid var(--rule)}
tr:last-child td,tr:last-child th{border-bottom:0}
thead th{font-size:.76rem;color:var(--quiet);font-weight:500;white-space:nowrap}
tbody th{font-weight:500;min-width:9rem;overflow-wrap:break-word}
td{min-width:4.5rem}
.value{font-weight:600;white-space:nowrap}.value small,.quiet{color:var(--quiet);font-weight:400}
.best{color:var(--accent)}
details{margin-top:1rem}summary{cursor:pointer;color:var(--quiet);font-size:.88rem}
pre{font-size:.78rem;line-height:1.45;overflow-x:auto;padding:.9rem;margin:.6rem 0 0;
  background:var(--card);border:1px solid var(--rule);border-radius:10px}
.config{columns:22rem;column-gap:2.2rem;margin:.8rem 0 0;font-size:.82rem}
.config div{break-inside:avoid;display:flex;justify-content:space-between;gap:1rem;
  border-bottom:1px solid var(--rule);padding:.22rem 0}
.config dt{color:var(--quiet);overflow-wrap:anywhere}
.config dd{margin:0;text-align:right;overflow-wrap:anywhere}
.notes{border-left:3px solid var(--line1);padding:.1rem 0 .1rem 1rem;margin:1.4rem 0 0;
  font-size:.88rem}
footer{color:var(--quiet);font-size:.82rem;margin-top:4rem;padding-bottom:3rem}
@media print{body{background:#fff}.chart,.picture{break-inside:avoid}}
"""


def document(title: str, body: str, links: Sequence[tuple[str, str]] = (), lead: str = '',
             foot: str = '') -> str:
  """The whole page.

  Args:
    title: plain text.
    body: HTML of the sections.
    links: (anchor, plain text) of the sections, for the list at the top.
    lead: plain text below the title; a blank line parts paragraphs.
    foot: plain text at the end.
  """
  list_ = ''.join(f'<a href="#{escape(to)}">{escape(text)}</a>' for to, text in links)
  return (
      '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
      f'<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
      f'<header>{_tiles(title)}<h1>{escape(title)}</h1>{paragraphs(lead)}'
      f'{f"<nav>{list_}</nav>" if list_ else ""}</header>\n'
      f'<main>\n{body}\n</main>\n<footer>{escape(foot)}</footer>\n</body>\n</html>\n')


def escape(text: object) -> str:
  """Plain text as HTML, safe in attributes too."""
  return html.escape(str(text), quote=True)


def paragraphs(text: str) -> str:
  return ''.join(f'<p>{escape(part.strip())}</p>' for part in text.split('\n\n') if part.strip())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table from HTML cells; the first of a row names it."""
  top = ''.join(f'<th scope="col">{cell}</th>' for cell in head)
  body = ''.join(
      f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
      for row in rows)
  return (f'<div class="wide"><table><thead><tr>{top}</tr></thead>'
          f'<tbody>{body}</tbody></table></div>')


def facts(items: Sequence[tuple[str, str, str]]) -> str:
  """The line of numbers at the top of a section: (name, value, remark), plain text."""
  cells = ''.join(
      f'<div><dt>{escape(name)}</dt><dd>{escape(value)}'
      f'{f"<small>{escape(remark)}</small>" if remark else ""}</dd></div>'
      for name, value, remark in items)
  return f'<dl class="facts">{cells}</dl>' if cells else ''


def _tiles(title: str) -> str:
  """A strip of glass tiles whose colours follow from the title, so that pages are told apart."""
  bits = hashlib.sha256(title.encode()).digest()
  cells = ''.join(
      f'<rect x="{i % 26 * 16}" y="{i // 26 * 16}" width="14" height="14" rx="1.5" '
      f'style="fill:var(--line{bits[i % 32] % 8})" opacity="{0.3 + bits[i * 7 % 32] / 364:.2f}"/>'
      for i in range(52))
  return f'<svg class="tiles" viewBox="0 0 414 30" aria-hidden="true">{cells}</svg>'
