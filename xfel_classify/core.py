"""The nouns every part of ``xfel_classify`` speaks, and the errors it raises.

Array names end in their axes: ``raw_PSF``, ``images_BHW``, ``scores_BK``.
P panel, S slow axis, F fast axis, G gain stage, B batch, H window row,
W window column, K class.  Physical quantities end in their unit.

The error tree (every leaf is also the builtin a caller would expect)::

    XfelClassifyError
    ├── ConfigurationError (ValueError)      wrong option, key or value
    │   └── UnknownComponent (LookupError)   no source, model, ... of that name
    ├── MissingDependency (ImportError)      an optional package is not there
    ├── SourceError                          the run cannot be read
    │   ├── RunNotFound (FileNotFoundError)
    │   ├── DetectorNotFound (LookupError)
    │   └── RunDamaged (OSError)             files are truncated or inconsistent
    ├── ConstantsError (ValueError)          constants missing or of the wrong shape
    ├── GeometryError (ValueError)           geometry unreadable or not for this detector
    ├── ModelError
    │   ├── ModelNotFound (LookupError)
    │   └── ModelInvalid (ValueError)        card, weights and check values disagree
    ├── EngineError (RuntimeError)           a runtime refused or failed
    ├── OutputError (OSError)                the output cannot be written or read
    │   ├── OutputExists (FileExistsError)
    │   ├── OutputFull                       no space left; what is written stays resumable
    │   └── OutputDamaged (ValueError)       a part or a summary is not what it should be
    └── EventError                           one event is unusable: it becomes a row with a status

Messages have three parts: what was asked, what was found, what to do next.
Only :class:`EventError` is caught by the event loop.
"""
from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

__all__ = [
    "MISSING_INT", "Analysis", "Batch", "CalibratedFrame", "Column", "ConfigurationError",
    "Constants", "ConstantsError", "DetectorNotFound", "Engine", "EngineError", "EventError",
    "EventSource", "EventStatus", "Frame", "Geometry", "GeometryError", "MissingDependency",
    "ModelError", "ModelInvalid", "ModelNotFound", "OutputDamaged", "OutputError",
    "OutputExists", "OutputFull", "Panel", "RunDamaged", "RunInfo", "RunNotFound", "RunResult",
    "Shard", "Sink",
    "SourceError", "Total", "UnknownComponent", "Window", "XfelClassifyError",
]

MISSING_INT = -1
"""Missing value of integer columns; floating-point columns use NaN."""


# --- errors -----------------------------------------------------------------------------------

class XfelClassifyError(Exception):
    """Root of every error this package raises on purpose.

    ``everywhere`` is True when all ranks of a job know of the failure and end by themselves.
    """

    everywhere = False


class ConfigurationError(XfelClassifyError, ValueError):
    """An option, key or value of the configuration is wrong."""


class UnknownComponent(ConfigurationError, LookupError):
    """No component of that kind has the name that was asked for."""


class MissingDependency(XfelClassifyError, ImportError):
    """An optional package is needed and absent; the message says how to install it."""


class SourceError(XfelClassifyError):
    """The run cannot be read."""


class RunNotFound(SourceError, FileNotFoundError):
    """No file of the run is where it was looked for."""


class DetectorNotFound(SourceError, LookupError):
    """The run does not hold the detector that was asked for."""


class RunDamaged(SourceError, OSError):
    """The run's files are truncated, unreadable or do not fit together."""


class ConstantsError(XfelClassifyError, ValueError):
    """Calibration constants are missing, or do not fit the detector."""


class GeometryError(XfelClassifyError, ValueError):
    """A geometry cannot be read, or does not fit the detector."""


class ModelError(XfelClassifyError):
    """A model cannot be used."""


class ModelNotFound(ModelError, LookupError):
    """No model of that name on the search path."""


class ModelInvalid(ModelError, ValueError):
    """A model's card, weights and check values do not belong together."""


class EngineError(XfelClassifyError, RuntimeError):
    """A runtime refused a model, or failed while running it."""


class OutputError(XfelClassifyError, OSError):
    """Results cannot be written, or written results cannot be read."""


class OutputExists(OutputError, FileExistsError):
    """The output is already there and neither resuming nor overwriting was asked for."""


class OutputFull(OutputError):
    """The disk is full; everything up to the last checkpoint is kept and resumable."""


class OutputDamaged(OutputError, ValueError):
    """A part file or a summary is not what it should be."""


class EventError(XfelClassifyError):
    """One event cannot be analysed; the loop turns it into a row with ``status``."""

    def __init__(self, status: EventStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class EventStatus(enum.IntEnum):
    """What became of an event.  Every event of a run ends in one row with one of these."""

    OK = 0
    NO_DETECTOR = 1        # the event carries no image of the detector
    DAMAGED = 2            # the data acquisition flagged the image
    WRONG_SHAPE = 3        # fewer or other panels than the run's constants describe
    NOT_FINITE = 4         # no finite pixel is left under the mask
    UNREADABLE = 5         # the file holds the event, but its bytes cannot be decoded

    @property
    def reason(self) -> str:
        return _REASONS[self]


_REASONS = {
    EventStatus.OK: "analysed",
    EventStatus.NO_DETECTOR: "no image of the detector in the event",
    EventStatus.DAMAGED: "image flagged damaged by the data acquisition",
    EventStatus.WRONG_SHAPE: "image has not the shape of the run's constants",
    EventStatus.NOT_FINITE: "no finite, unmasked pixel in the image",
    EventStatus.UNREADABLE: "image bytes cannot be read from the file",
}


# --- detector and run ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Panel:
    """A flat, regular piece of detector (one ASIC or module) and where it sits.

    ``corner_m`` is the outer corner of its first pixel; ``fs_m`` and ``ss_m`` are the steps of
    one pixel along the fast and slow axis, all in the laboratory frame: z along the beam, y up,
    x so that the frame is right-handed, sample at the origin (z may be 0 when the distance is
    carried separately).  Rows ``min_ss..max_ss`` and columns ``min_fs..max_fs`` (inclusive)
    are those of plane ``index`` of the (P, S, F) array.
    """

    name: str
    index: int
    min_ss: int
    max_ss: int
    min_fs: int
    max_fs: int
    corner_m: tuple[float, float, float]
    fs_m: tuple[float, float, float]
    ss_m: tuple[float, float, float]


@dataclass(frozen=True)
class Geometry:
    """Where every pixel centre is: ``x_m_PSF``, ``y_m_PSF`` relative to the beam, float32 metres.

    ``z_m_PSF`` is the offset along the beam from the nominal detector plane; the sample to
    detector distance is ``distance_m`` (None when the geometry does not state it).
    ``panels`` describe the same as flat pieces, for writing CrystFEL files; ``bad_PSF`` is True
    where the geometry itself declares pixels unusable (or None).  ``wavelength_A`` and
    ``photon_energy_eV`` are None unless the geometry file states a number.
    """

    x_m_PSF: np.ndarray
    y_m_PSF: np.ndarray
    z_m_PSF: np.ndarray
    pixel_size_m: float
    panels: tuple[Panel, ...] = ()
    distance_m: float | None = None
    photon_energy_eV: float | None = None
    bad_PSF: np.ndarray | None = None
    name: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        p, s, f = self.x_m_PSF.shape
        return p, s, f


@dataclass(frozen=True)
class Constants:
    """What turns a raw frame into calibrated values; fixed for a run.

    ``pedestals_GPSF`` (ADU) and ``gain_GPSF`` (ADU per keV, psana's ``pixel_gain``) are float32
    with one plane per gain stage; None when the source delivers calibrated frames.
    ``offset_GPSF`` (ADU) is optional.  ``good_PSF`` is bool, False = never use this pixel.
    ``noise_PSF`` is the rms of an empty pixel in ADU (stage 0), or None.
    ``gain_bits`` names how a raw word encodes its gain stage: "none" or "top2" (Jungfrau,
    bits 15-14 = 00, 01, 11 for stages 0, 1, 2) or "bit14" (ePix10ka).
    ``unit`` is the unit of calibrated values: "keV", "photon" or "ADU".
    ``identity`` is a hash over everything above.
    """

    good_PSF: np.ndarray
    geometry: Geometry
    pedestals_GPSF: np.ndarray | None = None
    gain_GPSF: np.ndarray | None = None
    offset_GPSF: np.ndarray | None = None
    noise_PSF: np.ndarray | None = None
    gain_bits: str = "none"
    unit: str = "keV"
    identity: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        p, s, f = self.good_PSF.shape
        return p, s, f

    @property
    def calibrated(self) -> bool:
        """True when frames of this run need no pedestal and gain."""
        return self.pedestals_GPSF is None


@dataclass(frozen=True)
class RunInfo:
    """A run as the source found it.

    ``panel_shape`` is (P, S, F) of one frame; ``raw_dtype`` that of its pixels.  ``notes`` are
    sentences for the user about what was missing or assumed (fallback photon energy, ...).
    ``provenance`` goes into the summary as root attributes (file names, sizes, versions).
    """

    exp: str
    run: int
    detector: str
    detector_kind: str
    panel_shape: tuple[int, int, int]
    raw_dtype: str
    source: str
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """One event as the source delivers it.

    ``raw_PSF`` may be a view that is valid only until the next frame is asked for, unless the
    source sets ``keeps_raw``; None when the event has no image (``status`` then says why).
    ``index`` is the position of the event in the run, in time order, from 0: the identity of
    the event.  ``timestamp`` is psana2's 64-bit stamp where there is one (seconds << 32 | ns),
    else what the file gives, else ``index``.  ``damage`` holds the DAQ's damage bits.
    """

    raw_PSF: np.ndarray | None
    timestamp: int
    index: int
    damage: int = 0
    scalars: Mapping[str, float] = field(default_factory=dict)
    event_codes: tuple[int, ...] = ()
    status: EventStatus = EventStatus.OK


class CalibratedFrame(Protocol):
    """What an analysis sees of one event while its pixels are at hand.

    ``earlier(column)`` is this event's value of a column that the analysis declared in ``uses``.
    """

    frame: Frame
    photon_energy_eV: float

    def earlier(self, column: str) -> Any: ...

    @property
    def raw_PSF(self) -> np.ndarray:
        """Pixels as delivered; do not keep."""

    @property
    def calibrated_PSF(self) -> np.ndarray:
        """float32 in ``Constants.unit``, 0 where masked; computed once; do not keep or write."""

    @property
    def good_PSF(self) -> np.ndarray:
        """bool; False where the run masks the pixel."""


@dataclass(frozen=True)
class Window:
    """The part of a frame a network sees, and its scaling; stated by the model's card.

    ``kind`` is "crop" (centred on the beam, at pixel resolution), "downsample" (the whole
    detector, pooled) or "quadrant" (one beam-cornered quadrant, rotated so that the beam is
    at pixel (0, 0)).  ``pool`` is the pooling factor f; the window covers
    (height f) x (width f) detector pixels, each window pixel the largest (``pool_by = "max"``) or
    the mean ("mean") of its unmasked detector pixels.  ``unit`` of the values before ``normalize``:
    "photon", "keV" or "ADU" ("ADU" = calibrated values whatever their unit).  ``normalize``:
    "none", "clip" (to +- ``clip``), "sqrt_floor" (clip to [0, ``clip``], square root, floor) or
    "standardize" (zero mean, unit variance over the unmasked pixels).
    Masked pixels and gaps are 0 after normalization.
    """

    kind: str = "crop"
    height: int = 350
    width: int = 350
    pool: int = 1
    quadrant: str = "A"
    unit: str = "photon"
    normalize: str = "clip"
    clip: float = 5e4
    pool_by: str = "max"

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width


# --- columns, batches, totals ----------------------------------------------------------------

@dataclass(frozen=True)
class Column:
    """One value (or small array) per event.

    ``shape`` is that of one row; a length of -1 as the only dimension makes the column ragged
    (1-D of any length per row), which sinks store as values plus ``n``.  ``missing`` fills rows
    that have no answer.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    missing: Any = float("nan")
    unit: str = ""
    doc: str = ""
    names: tuple[str, ...] = ()     # of the values 0, 1, ... of an enumeration

    @property
    def ragged(self) -> bool:
        return self.shape == (-1,)


@dataclass(frozen=True)
class Total:
    """A reduction over the events of a run: ``how`` is "sum" or "max".

    Sums are kept as int64 fixed point, ``value = int64 * scale``, because integer addition gives
    the same bits in any order and thus for any number of ranks.  ``events`` counts what went in.
    """

    values: np.ndarray
    how: str
    events: int = 0
    scale: float = 1.0
    unit: str = ""
    doc: str = ""


@dataclass
class Batch:
    """The rows of one batch: identities, status, and the columns of the analyses so far.

    ``selected_B`` is the row mask of the analysis being asked: usable events that pass its gate.
    Rows outside of it are filled with the column's missing value by the loop.
    """

    timestamps_B: np.ndarray
    indices_B: np.ndarray
    status_B: np.ndarray
    selected_B: np.ndarray
    columns: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.timestamps_B)


@dataclass(frozen=True)
class Shard:
    """The share of a run that one rank reads.

    ``todo`` holds the event indices (sorted) that are still to be done, or None for all of the
    run.  ``claim(n)`` hands out the next at most ``n`` positions of ``todo`` (or of the run) to
    this rank and nobody else; an empty range means there is nothing left.  Sources that deal
    events themselves ignore ``claim``.  ``stopping()`` becomes True once the run is interrupted:
    the source then ends its iteration as cleanly as it can.  ``panels`` lists the only panels
    that anybody will look at (None = all): a source may leave the others zero.
    """

    claim: Callable[[int], range]
    todo: np.ndarray | None = None
    stopping: Callable[[], bool] = lambda: False
    panels: tuple[int, ...] | None = None

    def indices(self, chunk: int = 1) -> Iterator[int]:
        """Event indices of this rank, one by one, claimed ``chunk`` at a time."""
        while not self.stopping():
            claimed = self.claim(chunk)
            if not claimed:
                return
            for position in claimed:
                yield int(self.todo[position]) if self.todo is not None else position


# --- protocols ------------------------------------------------------------------------------

@runtime_checkable
class EventSource(Protocol):
    """A run that can be read.  A context manager; opening it reads no pixels.

    ``distributes`` is True when the source deals events to ranks itself (psana2).
    ``keeps_raw`` is True when a frame's pixels stay valid after the next one was read.
    """

    distributes: bool
    keeps_raw: bool

    @property
    def run(self) -> RunInfo: ...

    def constants(self) -> Constants: ...

    def expected_events(self) -> int | None:
        """Events the run holds, counted without reading pixels; None when unknowable."""

    def scalar_columns(self) -> Mapping[str, Column]:
        """The names that may occur in ``Frame.scalars``, with unit and doc."""

    def works(self) -> bool:
        """False on ranks that only serve others (psana2's smd0, event builder and servers)."""

    def frames(self, shard: Shard) -> Iterator[Frame]: ...

    def __enter__(self) -> EventSource: ...

    def __exit__(self, *exc: object) -> None: ...


class Engine(Protocol):
    """A runtime executing one model.  Construction stores; ``open`` touches the device."""

    name: str
    precision: str

    def open(self) -> None: ...

    def infer(self, images_BHW: np.ndarray,
              geometry_B4: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Named outputs, fresh arrays with B rows; any B >= 0.

        ``geometry_B4`` (distance in mm, pixel in mm, wavelength in angstrom, pooling factor) goes
        to models whose card declares a geometry input.
        """

    def close(self) -> None: ...


class Analysis(Protocol):
    """One question asked of every event.

    ``take`` is called while the pixels are at hand, once per usable event that passes the gate,
    with the row it will have in the batch; ``process`` then returns the columns of the batch.
    ``only`` names an earlier column that gates this analysis (rows where it is > 0), or "".
    ``uses`` names earlier columns it wants to see per event.  ``full_frame`` is False when it
    looks only at ``panels`` of the raw frame (None = all), known after ``start``.
    """

    name: str
    only: str
    uses: tuple[str, ...]
    full_frame: bool
    panels: tuple[int, ...] | None
    columns: Mapping[str, Column]

    def start(self, run: RunInfo, constants: Constants, batch: int) -> None:
        """Prepare for at most ``batch`` events per batch; called only on ranks that work."""

    def take(self, frame: CalibratedFrame, row: int) -> None: ...

    def process(self, batch: Batch) -> Mapping[str, Any]:
        """{column: array of len(batch) rows, or a list of 1-D arrays when ragged}.

        Rows outside ``batch.selected_B`` are replaced by the column's missing value.
        """

    def totals(self) -> Mapping[str, Total]:
        """Reductions over the events so far on this rank; {} for most."""

    def attributes(self) -> Mapping[str, Any]:
        """What the summary's root should say of this analysis (model, version, sha256, ...)."""

    def close(self) -> None: ...


@dataclass
class RunResult:
    """The joined rows of a run, sorted by (timestamp, index): what sinks write.

    ``rows`` maps each column name to an array of N rows, or to a list of N 1-D arrays when the
    column is ragged; "timestamp", "index", "status" and "damage" are always there.  ``kept`` are
    the row numbers whose calibrated pixels were kept (hits), and ``pixels(row)`` returns them as
    float32 (P, S, F).  ``locate(row)`` is (file, dataset, position) of the event's pixels in the
    source, where the source is a file.  ``attributes`` become root attributes of the summary;
    ``timing`` is {name: array} and the only content that differs from run to run.
    """

    run: RunInfo
    columns: Mapping[str, Column]
    rows: Mapping[str, Any]
    totals: Mapping[str, Total]
    attributes: Mapping[str, Any]
    constants: Constants | None = None
    timing: Mapping[str, Any] = field(default_factory=dict)
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pixels: Callable[[int], np.ndarray] | None = None
    locate: Callable[[int], tuple[str, str, int]] | None = None

    def __len__(self) -> int:
        return len(self.rows["timestamp"])

    @property
    def stem(self) -> str:
        return f"{self.run.exp}_r{self.run.run:04d}"


class Sink(Protocol):
    """Writes one kind of output from the joined rows of a run; called on rank 0.

    Two optional capabilities: ``wants_pixels`` (True when the loop must keep the calibrated
    pixels of hits for it) and ``check(run, constants, locate)``, called before the first event,
    which raises :class:`ConfigurationError` when this run cannot be written as configured.
    """

    name: str

    def write(self, result: RunResult, directory: Path) -> list[str]:
        """Write ``<name>.tmp`` files in ``directory`` and return the final names (without .tmp).

        The caller renames all of them together once every sink has succeeded.
        """
