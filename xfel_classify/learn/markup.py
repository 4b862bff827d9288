"""HTML that cannot be broken by what is written into it.

:func:`tag` escapes every text; only :class:`Markup` goes through as it is.
"""
from __future__ import annotations

import html
from typing import Any

__all__ = ["Markup", "join", "svg", "table", "tag"]

VOID = ("br", "hr", "img", "link", "meta", "col", "image", "circle", "rect")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """An element; ``class_`` is written ``class``, underscores in names become hyphens.

    Content that is None is left out, as are attributes that are None.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items() if value is not None)
    if name in VOID:
        return Markup(f"<{name}{written}>" if name not in ("image", "circle", "rect")
                      else f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(*content)}</{name}>")


def join(*content: Any) -> Markup:
    """Elements and texts one after another; lists are taken apart."""
    pieces: list[str] = []
    for piece in content:
        if isinstance(piece, (list, tuple)):
            pieces.append(join(*piece))
        elif piece is not None:
            pieces.append(piece if isinstance(piece, Markup) else html.escape(str(piece)))
    return Markup("".join(pieces))


def svg(width: float, height: float, *content: Any, label: str, **attributes: Any) -> Markup:
    """An inline drawing of ``width`` x ``height`` user units, with a name for screen readers."""
    options = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria_label": label}
    return tag("svg", tag("title", label), *content, **(options | attributes))


def table(head: list[Any], rows: list[list[Any]], *, caption: Any = None,
          **attributes: Any) -> Markup:
    """A table whose first column names the rows; a cell that is a ``<th>`` or ``<td>`` stays."""
    def cell(value: Any, name: str, **more: Any) -> Markup:
        whole = isinstance(value, Markup) and value.startswith(("<th", "<td"))
        return value if whole else tag(name, value, **more)

    return tag("table", tag("caption", caption) if caption is not None else None,
               tag("thead", tag("tr", *[cell(h, "th", scope="col") for h in head])),
               tag("tbody", *[tag("tr", cell(row[0], "th", scope="row"),
                                  *[cell(value, "td") for value in row[1:]]) for row in rows]),
               **attributes)
