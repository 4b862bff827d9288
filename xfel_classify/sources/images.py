"""Image files, one frame each, that fabio reads: mini-CBF (also .bz2, .gz), TIFF, EDF, MarCCD, ...

Events are numbered in the order of the files' names.  The header of the first readable file states
pixel size, wavelength, distance and beam centre where it is a mini-CBF (Dectris), unless they are
configured.  In images of photon counters negative values are no counts (-1 gap, -2 bad pixel) and
values above the count cut-off are overflows: both are delivered as NaN, that is masked.
"""
from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .. import detectors
from ..core import (
    Column,
    ConfigurationError,
    Constants,
    EventStatus,
    Frame,
    MissingDependency,
    RunDamaged,
    RunInfo,
    Shard,
)
from .run_constants import (
    HC_EV_A,
    FrameKind,
    Stated,
    expand,
    plausible,
    run_constants,
    scalar_columns,
    word,
)

__all__ = ["CbfHeader", "Source", "read_cbf_header"]

log = logging.getLogger(__name__)

# what fabio and the decompressors raise over damaged files
_FABIO_ERRORS = (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, TypeError,
                 AttributeError, AssertionError, zlib.error, OverflowError)
_NUMBER = r"([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)"
_LINES = {
    "wavelength_A": re.compile(rf"Wavelength\s+{_NUMBER}\s*A"),
    "distance_m": re.compile(rf"Detector_distance\s+{_NUMBER}\s*m"),
    "pixel_size_m": re.compile(rf"Pixel_size\s+{_NUMBER}\s*m"),
    "count_cutoff": re.compile(rf"Count_cutoff\s+{_NUMBER}"),
}
_BEAM = re.compile(rf"Beam_xy\s+\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_DETECTOR = re.compile(r"Detector:\s*(.+)")


@dataclass(frozen=True)
class CbfHeader:
    """What a mini-CBF header states; None where it does not.

    ``beam_center_px`` is (fast, slow) from the outer corner of the first pixel.
    """

    detector: str | None = None
    wavelength_A: float | None = None
    distance_m: float | None = None
    pixel_size_m: float | None = None
    count_cutoff: float | None = None
    beam_center_px: tuple[float, float] | None = None


def read_cbf_header(text: str) -> CbfHeader:
    """The values of a mini-CBF header that are believable (a zero is not)."""
    limits = {"wavelength_A": (0.01, 1e3), "distance_m": (1e-3, 1e3), "pixel_size_m": (1e-7, 1e-2),
              "count_cutoff": (1.0, 1e12)}
    found: dict[str, Any] = {}
    for name, pattern in _LINES.items():
        match = pattern.search(text)
        if match and plausible(match[1], *limits[name]):
            found[name] = float(match[1])
    if (match := _BEAM.search(text)) and plausible(match[1], -1e6, 1e6) and float(match[1]):
        found["beam_center_px"] = float(match[1]), float(match[2])
    if match := _DETECTOR.search(text):
        found["detector"] = match[1].strip()
    return CbfHeader(**found)


class Source:
    """Events of image files; see the module.  Implements :class:`core.EventSource`."""

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Values stated here win over those of the files' headers."""

        files: list[str] = []               # files and globs; together one run
        detector: str = "assembled"
        kind: str = ""
        exp: str | None = None
        run: int | None = None
        geometry: str | None = None
        mask: str | None = None
        edge_width: int = 0
        unit: str | None = None             # photon for photon counters, else ADU
        photon_energy_eV: float | None = None
        wavelength_A: float | None = None
        distance_m: float | None = None
        pixel_size_m: float | None = None
        beam_center_px: tuple[float, float] | None = None   # [fast, slow] from the image's corner
        mask_negative: bool | None = None   # None: in mini-CBF files only
        overflow: float | None = None       # values above are masked; None: the header's cut-off
        max_events: int | None = None

    distributes = False
    keeps_raw = False

    def __init__(self, config: Config) -> None:
        self.config = config
        if not config.files:
            raise ConfigurationError("source images was given no files; name image files or globs")
        if config.photon_energy_eV is not None and config.wavelength_A is not None:
            raise ConfigurationError("both source.photon_energy_eV and source.wavelength_A are "
                                     "stated; state one of them")
        self._files: list[Path] = []
        self._run: RunInfo | None = None
        self._constants: Constants | None = None

    def __enter__(self) -> Source:
        try:
            import fabio  # noqa: F401
        except ImportError as error:
            raise MissingDependency(
                f"image files are read with fabio, which cannot be imported ({error}); install it "
                "with: pip install 'xfel-classify[images]'") from error
        config = self.config
        self._files = expand(config.files)
        image, header_text, failures = None, "", []
        for path in self._files:
            try:
                image, header_text = _read(path)
                break
            except _FABIO_ERRORS as error:
                failures.append(f"{path}: {error}")
        if image is None:
            raise RunDamaged(f"none of {len(self._files)} image files can be read "
                             f"({failures[0]}); give files in a format that fabio knows")
        header = read_cbf_header(header_text)
        counts = header.detector is not None or header.count_cutoff is not None
        self._mask_negative = counts if config.mask_negative is None else config.mask_negative
        self._overflow = config.overflow if config.overflow is not None else header.count_cutoff
        self._good_SF = image >= 0 if self._mask_negative else None
        kind = config.kind or (config.detector if config.detector in detectors.kinds()
                               else "assembled")
        self._kind = FrameKind(kind, True, config.unit or ("photon" if counts else "ADU"))
        self._stated = Stated(
            config.geometry, None, config.mask, _first(config.distance_m, header.distance_m),
            _first(config.pixel_size_m, header.pixel_size_m),
            _first(config.beam_center_px, header.beam_center_px), config.edge_width)
        self._scalars = self._constant_scalars(header)
        notes = [f"{failure.strip()}" for failure in failures[:3]]
        if "photon_energy_eV" not in self._scalars:
            notes.append("the images state no photon energy, so one is assumed; state "
                         "source.photon_energy_eV or source.wavelength_A")
        if self._stated.beam_center_px is None and not config.geometry:
            notes.append("no beam centre was stated: the centre of the image is taken")
        for note in notes:
            log.info("%s", note)
        self._shape = (1, *image.shape)
        self._run = RunInfo(
            exp=config.exp or word(self._files[0].name.split(".")[0]),
            run=0 if config.run is None else config.run,
            detector=config.detector, detector_kind=kind, panel_shape=self._shape,
            raw_dtype="float32", source="images", notes=tuple(notes), provenance={
                "source_files": "\n".join(str(f.resolve()) for f in self._files),
                "source_bytes": "\n".join(str(f.stat().st_size) for f in self._files),
                "detector_header": header.detector or "",
            })
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    @property
    def run(self) -> RunInfo:
        if self._run is None:
            raise RuntimeError("the source is not open; use it in a with statement")
        return self._run

    def works(self) -> bool:
        return True

    def expected_events(self) -> int:
        events = len(self._files)
        return events if self.config.max_events is None else min(events, self.config.max_events)

    def scalar_columns(self) -> Mapping[str, Column]:
        return scalar_columns()

    def constants(self) -> Constants:
        if self._constants is None:
            good = None if self._good_SF is None else self._good_SF[None]
            self._constants = run_constants(self._kind, self.run.detector, self._shape,
                                            self._stated, good_PSF=good)
        return self._constants

    def frames(self, shard: Shard) -> Iterator[Frame]:
        buffer_PSF = np.zeros(self._shape, np.float32)
        for index in shard.indices():
            if index >= self.expected_events():
                break
            status = EventStatus.OK
            try:
                image, _ = _read(self._files[index])
                if image.shape != self._shape[1:]:
                    status = EventStatus.WRONG_SHAPE
                else:
                    self._fill(buffer_PSF[0], image)
            except _FABIO_ERRORS as error:
                log.warning("event %d: %s cannot be read (%s)", index, self._files[index], error)
                status = EventStatus.UNREADABLE
            yield Frame(buffer_PSF if status is EventStatus.OK else None, index, index,
                        scalars=self._scalars, status=status)

    def _fill(self, out_SF: np.ndarray, image: np.ndarray) -> None:
        np.copyto(out_SF, image, casting="unsafe")
        if self._mask_negative:
            out_SF[image < 0] = np.nan
        if self._overflow is not None:
            out_SF[image > self._overflow] = np.nan

    def _constant_scalars(self, header: CbfHeader) -> dict[str, float]:
        config = self.config
        energy = config.photon_energy_eV
        wavelength = _first(config.wavelength_A, header.wavelength_A)
        if energy is None and wavelength is not None:
            energy = HC_EV_A / wavelength
        distance = _first(config.distance_m, header.distance_m)
        return {name: float(value) for name, value in (
            ("photon_energy_eV", energy), ("distance_m", distance)) if value is not None}


def _first(stated: Any, found: Any) -> Any:
    return found if stated is None else stated


class _Complaints(logging.Handler):
    """fabio only logs that the checksum of a CBF's pixels is wrong; this remembers it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _read(path: Path) -> tuple[np.ndarray, str]:
    """(image (S, F), text of its header); one of ``_FABIO_ERRORS`` when it cannot be read."""
    import fabio

    heard = _Complaints()
    logger = logging.getLogger("fabio.cbfimage")
    level, spreads = logger.level, logger.propagate
    logger.addHandler(heard)
    logger.setLevel(logging.ERROR)
    logger.propagate = False            # what it says becomes the error of this file
    try:
        with fabio.open(str(path)) as found:
            image = np.asarray(found.data)
            text = str(found.header.get("_array_data.header_contents", ""))
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level)
        logger.propagate = spreads
    if any("hecksum" in message for message in heard.messages):
        raise ValueError(heard.messages[0])
    if image.ndim != 2:
        raise ValueError(f"holds an array of {image.ndim} dimensions, not one image")
    return image, text
