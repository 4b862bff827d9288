"""Draw what ``measure.py`` measured: python benchmarks/gpu/chart.py gpu.json gpu.svg (matplotlib).

One panel per network: images/s from device memory against the batch, one line per runtime and
precision (the best round; a bar down to the median one), with device and date in the title.
"""
from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def lines_of(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float, float]]]:
    """{runtime and precision: [(batch, best, median images/s)]} of the rows that were measured."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        if "not_measured" not in row:
            rounds = row["device_images_per_s"]
            found.setdefault(f"{row['runtime']} {row['precision']}", []).append(
                (row["batch"], max(rounds), statistics.median(rounds)))
    return {name: sorted(points) for name, points in found.items()}


def main(source: str, target: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = json.loads(Path(source).read_text())
    networks = {name: found for name, found in results["networks"].items()
                if lines_of(found["rows"])}
    if not networks:
        sys.exit(f"{source} holds no measurement")
    figure, panels = pyplot.subplots(1, len(networks), figsize=(4.5 * len(networks), 4.2),
                                     squeeze=False)
    for panel, (name, found) in zip(panels[0], networks.items(), strict=True):
        for label, points in lines_of(found["rows"]).items():
            batches, best, median = zip(*points, strict=True)
            panel.errorbar(batches, best, yerr=[[b - m for b, m in zip(best, median, strict=True)],
                                                [0] * len(best)],
                           marker="o" if label.startswith("tensorrt") else "x", label=label,
                           linestyle="-" if label.startswith("tensorrt") else ":", capsize=2)
        panel.set(title=name, xscale="log", yscale="log", xlabel="batch", ylabel="images/s")
        panel.legend(fontsize=6)
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, {machine['tensorrt']}, {machine['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
