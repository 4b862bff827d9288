"""The frame of a report: one HTML file that asks for nothing else, on screen and on paper."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .markup import Markup, join, tag

__all__ = ["figure", "notice", "page", "section"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser itself refuses whatever is not in the file."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 "DejaVu Sans", Verdana, Arial, sans-serif; color: #111; background: #fff;
       max-width: 1120px; margin: 0 auto; padding: 1.2rem 1.5rem 3rem; }
h1 { font-size: 1.55rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; border-bottom: 2px solid #0072b2; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p, li { max-width: 78ch; }
p.lead, .muted, figcaption, caption { color: #444; font-size: .87rem; }
nav ul { padding-left: 1.1rem; margin: .5rem 0; columns: 2; font-size: .9rem; }
a { color: #004f7c; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .84rem;
        font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .2rem; }
th, td { padding: .25rem .55rem; border-bottom: 1px solid #ccc; text-align: left;
         vertical-align: top; }
thead th { border-bottom: 1.5px solid #333; font-weight: 600; }
table.numbers td, table.numbers thead th:not(:first-child) { text-align: right; }
table.numbers td.text { text-align: left; }
table.numbers thead th[colspan] { text-align: center; border-left: 1px solid #ccc; }
tbody th { font-weight: 600; white-space: nowrap; }
td small { color: #444; white-space: nowrap; font-size: .76rem; display: block; }
td.paper { background: #f3f3f3; }
.wide { overflow-x: auto; }
.grid { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.confusion td { text-align: right; min-width: 6.2em; border: 1px solid #999; }
.confusion td.right { background: #dcebf6; }
.confusion td.wrong { background: #fff; outline: 2px dashed #d55e00; outline-offset: -3px; }
.confusion .value { font-size: 1.05rem; font-weight: 600; }
.provenance td { overflow-wrap: anywhere; }
figure { margin: .6rem 0 1rem; }
figure svg { width: 100%; height: auto; display: block; }
figure.half { flex: 1 1 24rem; max-width: 32rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr));
           gap: .8rem; }
.gallery figure { margin: 0; }
.gallery svg { border: 1px solid #999; max-height: 24rem; }
.notice { border-left: 5px solid #d55e00; background: #fdf3ec; padding: .45rem .8rem;
          margin: .5rem 0; max-width: 82ch; }
pre { background: #f5f5f5; border: 1px solid #ddd; padding: .6rem .8rem; font-size: .78rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; border-top: 1px solid #999; color: #444; font-size: .82rem; }
@page { size: A4; margin: 13mm; }
@media print {
  html { font-size: 9.5pt; }
  body { font-size: 1rem; max-width: none; padding: 0; print-color-adjust: exact;
         -webkit-print-color-adjust: exact; }
  nav { display: none; }
  h2, h3, caption { break-after: avoid; }
  figure, .confusion, .notice, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 7.4pt; }
  th, td { padding: 1.5pt 3pt; }
  td small { font-size: 6.2pt; }
  .grid { display: block; }
  .grid > * { display: inline-table; vertical-align: top; margin-right: 5mm; }
  .grid > figure.half { display: inline-block; width: 46%; max-width: 46%; }
  figcaption, p.muted { break-before: avoid; }
  .gallery { grid-template-columns: repeat(4, 1fr); gap: 3mm; }
  .gallery svg { max-height: none; }
  figcaption { font-size: 7.5pt; }
}
"""


def section(heading: str, *content: Any, id: str) -> Markup:
    return tag("section", tag("h2", heading, id=id), *content)


def figure(drawing: Markup, caption: Any, class_: str | None = None) -> Markup:
    return tag("figure", drawing, tag("figcaption", caption), class_=class_)


def notice(text: Any) -> Markup:
    """A sentence that the reader must not miss."""
    return tag("p", text, class_="notice", role="note")


def page(title: str, lead: Any, contents: Sequence[tuple[str, str]], *sections: Any,
         footer: Any = "") -> str:
    """The whole file; ``contents`` are (id, heading) of the sections."""
    head = tag(
        "head", tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup('<link rel="icon" href="data:,">'),
        tag("title", title), tag("style", Markup(STYLE)))
    links = tag("nav", tag("ul", *[tag("li", tag("a", text, href=f"#{id}"))
                                   for id, text in contents]), aria_label="sections")
    body = tag("body", tag("header", tag("h1", title), tag("p", lead, class_="lead"), links),
               tag("main", *sections), tag("footer", tag("p", footer)))
    return join(Markup("<!doctype html>\n"), tag("html", head, body, lang="en"), "\n")
