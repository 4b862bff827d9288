"""Opening a run with the real psana2, on and off the LCLS network.

psana2 asks the electronic logbook for a run's files and the calibration database for constants,
at start-up and without a guard: away from SLAC both end in a traceback, and behind a firewall that
drops packets the first would wait for ever.  :func:`network_guard` turns a failed request into
"nothing found", for the duration of opening only.  psana2 also leaves through ``sys.exit`` or an
assertion where files are missing; :func:`open_run` says it in this package's errors.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..core import (
    ConfigurationError,
    DetectorNotFound,
    MissingDependency,
    RunDamaged,
    RunNotFound,
)

__all__ = ["Opened", "area_detector", "check_ranks", "import_psana", "network_guard", "open_run",
           "raw_dtype"]

log = logging.getLogger(__name__)

_LOGBOOK_SECONDS = (5.0, 20.0)          # to connect, to answer
# psana's numbering of field types
_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
           "float32", "float64")


class Opened(SimpleNamespace):
    """A run as psana2 opened it.

    ``datasource`` and ``run`` are psana's; ``parallel`` is True when psana2 deals the events to
    ranks; ``works`` is False on ranks that only serve; ``last`` is True on the last rank that
    works; ``notes`` are sentences about what could not be reached.
    """


def import_psana() -> Any:
    """The module ``psana``, when it is psana2.

    Raises :class:`MissingDependency` when it is absent or psana1.
    """
    try:
        import psana
    except ImportError as error:
        raise MissingDependency(
            f"xtc2 runs are read with psana2, which cannot be imported ({error}); install it with: "
            "pip install 'xfel-classify[psana]' (needs an MPI and krb5 headers), or use HDF5 files"
        ) from error
    if getattr(psana, "xtc_version", 1) != 2:
        raise MissingDependency("the psana that is installed is psana1 (LCLS-I); xtc2 runs need "
                                "psana2: activate the environment of lcls2, or set "
                                "source.use = psana1")
    return psana


def check_ranks(exp: str) -> int:
    """Ranks that psana sees; refuses too few, on every rank and before anything is opened.

    ``exp`` "" means that files are read one by one, which any number of ranks may do.  Raises
    :class:`ConfigurationError`.
    """
    counts = {}
    for name, default in (("PS_EB_NODES", 1), ("PS_SRV_NODES", 0)):
        text = os.environ.get(name, str(default))
        if not text.strip().isdigit() or (name == "PS_EB_NODES" and int(text) < 1):
            raise ConfigurationError(f"environment variable {name} = {text!r}; psana2 expects a "
                                     "number of ranks there: unset it, or correct it")
        counts[name] = int(text)
    from psana import datasource

    ranks = int(datasource.world_size)
    if not exp:
        return ranks
    if exp.lower().startswith("mfx"):
        counts["PS_EB_NODES"] = 1       # psana2 sets it itself, at most one for each node
    needed = 2 + counts["PS_EB_NODES"] + counts["PS_SRV_NODES"]
    if 1 < ranks < needed:
        special = ", ".join(f"{k}={v}" for k, v in counts.items())
        raise ConfigurationError(
            f"psana2 was started on {ranks} ranks; it needs 1, or at least {needed} (one reads "
            f"small data, one builds events, the others work; {special}): use mpirun -n {needed} "
            "or more, or no mpirun")
    return ranks


Provider = Callable[..., Mapping[str, Any]]


@contextmanager
def network_guard(provider: Provider | None, notes: list[str]) -> Iterator[None]:
    """While open, psana2 takes constants from ``provider`` (None: its own database, guarded)."""
    import psana.psexp.ds_base as ds_base
    import requests
    from psana.pscalib.calib import MDBWebUtils as web

    failures = (requests.exceptions.RequestException,)
    ask_files = ds_base.DataSourceBase._get_file_info_from_db
    ask_constants = web.calib_constants_all_types
    timed = SimpleNamespace(
        get=partial(requests.get, timeout=_LOGBOOK_SECONDS), exceptions=requests.exceptions)

    def files_or_none(self: Any, runnum: int) -> Any:
        ds_base.requests = timed
        try:
            return ask_files(self, runnum)
        except failures as error:
            log.info("the electronic logbook does not answer (%s); the run's files are taken from "
                     "its directory", type(error).__name__)
            log.debug("%s", error)
            return {}
        finally:
            ds_base.requests = requests

    def constants_or_none(det: str, *args: Any, **options: Any) -> Any:
        if notes:                       # asked in vain once: not again for every detector
            return {}
        try:
            return ask_constants(det, *args, **options)
        except failures as error:
            notes.append("psana's calibration database cannot be reached "
                         f"({type(error).__name__}); give --constants FILE")
            return {}

    ds_base.DataSourceBase._get_file_info_from_db = files_or_none
    web.calib_constants_all_types = constants_or_none if provider is None else provider
    try:
        yield
    finally:
        ds_base.DataSourceBase._get_file_info_from_db = ask_files
        web.calib_constants_all_types = ask_constants


def no_constants(det: str, exp: str | None = None, run: int | None = None,
                 **_: Any) -> dict[str, Any]:
    """The provider used when constants come from a file: psana need not fetch or share any."""
    return {}


def open_run(arguments: Mapping[str, Any], what: str, *, provider: Provider | None) -> Opened:
    """Open a run; ``arguments`` go to ``psana.DataSource``, ``what`` names the run in messages.

    Collective under MPI.  Raises :class:`RunNotFound`, :class:`RunDamaged`.
    """
    psana = import_psana()
    ranks = check_ranks(str(arguments.get("exp", "")))
    notes: list[str] = []
    with network_guard(provider, notes):
        try:
            datasource = psana.DataSource(**arguments, log_level=logging.ERROR)
            runs = datasource.runs()
            run = next(runs, None)
        except SystemExit as error:
            raise RunNotFound(f"{what}: psana2 gave up ({error.code}): a big-data file is missing; "
                              "copy the run's .xtc2 files again") from error
        except (FileNotFoundError, AssertionError) as error:
            raise RunNotFound(f"{what}: {error}; check --exp, --dir and the run number") from error
        except TypeError as error:
            raise RunDamaged(f"{what}: psana2 cannot read the beginning of the run ({error}); copy "
                             "its files again") from error
    if run is None:
        raise RunDamaged(f"{what}: psana2 finds no beginning of a run in the files; copy them "
                         "again")
    parallel = bool(datasource.is_mpi())
    serves = bool(datasource.is_srv())
    role = getattr(getattr(datasource, "comms", None), "_nodetype", None)
    works = not serves and (role == "bd" if role else bool(datasource.is_bd()))
    return Opened(datasource=datasource, runs=runs, run=run, parallel=parallel, works=works,
                  serves=serves, last=works and bool(datasource.unique_user_rank()), notes=notes,
                  ranks=ranks, version=_version())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("psana")
    except PackageNotFoundError:
        return "unknown"


def area_detector(run: Any, name: str, what: str) -> Any:
    """psana's detector ``name``, or the only area detector of the run when ``name`` is "".

    Raises :class:`DetectorNotFound` naming those that there are.
    """
    from psana.detector.areadetector import AreaDetector

    classes = run.dsparms.det_classes["normal"]
    areas = sorted({det for (det, algorithm), cls in classes.items()
                    if algorithm == "raw" and issubclass(cls, AreaDetector)})
    if not name:
        if len(areas) != 1:
            raise DetectorNotFound(
                f"{what} has {len(areas)} area detectors ({', '.join(areas) or 'none'}); choose "
                "one with --detector")
        name = areas[0]
    if name not in run.detnames:
        raise DetectorNotFound(
            f"{what} has no detector {name!r}; it has {', '.join(sorted(run.detnames))} (area "
            f"detectors: {', '.join(areas) or 'none'}). If it should be there, a stream's "
            "small-data file may be missing")
    if name not in areas:
        raise DetectorNotFound(f"{what}: {name!r} has no raw images; the area detectors are "
                               f"{', '.join(areas) or 'none'}: choose one with --detector")
    return run.Detector(name)


def raw_dtype(run: Any, name: str) -> np.dtype:
    """Type of the pixels, from what the run's Configure announces."""
    for config in run.configs:
        segments = getattr(config.software, name, None)
        for segment in (segments or {}).values():
            field = getattr(getattr(segment, "raw", None), "raw", None)
            number = getattr(field, "_type", None)
            if number is not None and number < len(_DTYPES):
                return np.dtype(_DTYPES[number])
    return np.dtype(np.uint16)
