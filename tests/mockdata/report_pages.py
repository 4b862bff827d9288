"""Runs with scores, peaks and truth, and pages read back as tables, texts and drawings."""
from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
from mockdata.hand_output import write_output
from mockdata.hand_result import COLUMNS, hand_result

from xfel_classify.core import Column


def made_run(directory: Path, run: int = 95, events: int = 60, seed: int = 1, **changes):
    """(summary, truth file) of a run with one damaged event; about a third are hits."""
    rng = np.random.default_rng([seed, run])
    is_hit = rng.random(events) < 0.35
    score = np.clip(0.5 + 0.22 * (2 * is_hit - 1) + rng.normal(0, 0.2, events), 0, 1)
    score = np.round(score, 2).astype(np.float32)           # some ties
    count = np.where(is_hit, rng.integers(3, 9, events), rng.integers(0, 3, events))
    status = np.zeros(events, np.uint8)
    status[1:2] = 2
    bad = status != 0
    score[bad], count[bad] = np.nan, 0
    pieces = [rng.uniform(0, 15, n) for n in count]
    rows = {
        "timestamp": (np.arange(events) + 1_100_000_000) << 32, "index": np.arange(events),
        "status": status, "damage": np.zeros(events, np.int64),
        "hit/score": score, "hit/label": np.where(bad, -1, score >= 0.5).astype(np.int8),
        "peaks/n": np.where(bad, -1, count).astype(np.int32),
        "peaks/hit": np.where(bad, 0, count >= 4).astype(np.uint8),
        "peaks/panel": [np.zeros(len(p)) for p in pieces], "peaks/fs": pieces,
        "peaks/ss": [p / 2.2 for p in pieces],
    }
    columns = {name: column for name, column in COLUMNS.items() if name in rows}
    columns["peaks/hit"] = Column("uint8", missing=0, doc="peaks")
    attributes = {"complete": True, "events_expected": events, "hit_column": "hit/label",
                  "configuration": "[source]\nuse = \"mine:Source\"\n", "peaks_finder": "by hand"}
    fields = {"rows": rows, "columns": columns, "kept": np.nonzero(rows["hit/label"] == 1)[0],
              "attributes": attributes, "totals": hand_result().totals}
    summary = write_output(directory / f"out{run}", hand_result("mfxl1", run, **fields | changes))
    truth = directory / f"mfxl1-r{run:04d}-truth.h5"
    with h5py.File(truth, "w") as file:
        file["is_hit"], file["timestamp"] = is_hit, rows["timestamp"]
    return summary, truth


class Page(HTMLParser):
    """Tables as lists of rows, every reference to elsewhere, ids, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self._rows: list[list[str]] | None = None
        self._small = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append(name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for _, v in attrs))
        if tag == "table":
            name = dict(attrs).get("id") or f"{dict(attrs).get('class')}-{len(self.tables)}"
            self._rows = self.tables.setdefault(name, [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
        self._small = tag == "small"

    def handle_endtag(self, tag):
        self._small = False
        if tag == "table":
            self._rows = None

    def handle_data(self, text):
        self.text += text
        if self._rows and self._rows[-1] and not self._small:
            self._rows[-1][-1] += text.strip()
