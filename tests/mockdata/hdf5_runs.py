"""Miniature HDF5 runs in the layouts of other programs, and the ways they are broken."""
from __future__ import annotations

from pathlib import Path

import h5py
import hdf5plugin
import numpy as np

PANELS, SLOW, FAST = 2, 8, 16
"""The tiny detector of the tests."""

GEOMETRY = """\
clen = 0.1
res = 10000
photon_energy = 9000

p0/min_fs = 0
p0/max_fs = 15
p0/min_ss = 0
p0/max_ss = 7
p0/fs = +1.0x
p0/ss = +1.0y
p0/corner_x = -8.0
p0/corner_y = 1.0
p0/dim0 = %
p0/dim1 = 0
p0/dim2 = ss
p0/dim3 = fs

p1/min_fs = 0
p1/max_fs = 15
p1/min_ss = 0
p1/max_ss = 7
p1/fs = +1.0x
p1/ss = +1.0y
p1/corner_x = -8.0
p1/corner_y = -9.0
p1/dim0 = %
p1/dim1 = 1
p1/dim2 = ss
p1/dim3 = fs
"""


def write_geometry(path: Path) -> Path:
    """A CrystFEL geometry of the tiny detector."""
    path.write_text(GEOMETRY, encoding="ascii")
    return path


def frames(events: int, dtype: str = "f4", seed: int = 1, panels: int = PANELS) -> np.ndarray:
    """(N, P, S, F) values, different in every event and pixel."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 5000, (events, panels, SLOW, FAST))
    return values.astype(dtype)


def stamps(events: int, start: int = 1_100_000_000) -> np.ndarray:
    """(N,) uint64 psana-like times at 120 Hz, increasing."""
    nanoseconds = np.arange(events, dtype=np.uint64) * np.uint64(8_333_333)
    return (np.uint64(start) << np.uint64(32)) | nanoseconds


def write_stack(path: Path, frames_NPSF: np.ndarray, dataset: str = "data",
                stamps_N: np.ndarray | None = None, compression: str | None = None) -> Path:
    """A plain stack, one chunk per event when ``compression`` is given."""
    options: dict = {}
    if compression is not None:
        filters = {"gzip": {"compression": "gzip"}, "lz4": hdf5plugin.LZ4(),
                   "bitshuffle": hdf5plugin.Bitshuffle(), "zstd": hdf5plugin.Zstd()}
        options = {"chunks": (1, *frames_NPSF.shape[1:]), **filters[compression]}
    with h5py.File(path, "w") as file:
        file.create_dataset(dataset, data=frames_NPSF, **options)
        if stamps_N is not None:
            file["timestamp"] = stamps_N
    return path


def write_cxi(path: Path, frames_NPSF: np.ndarray, *, mask: np.ndarray | None = None,
              energy_eV: float = 9500.0, start: int = 1_100_000_000) -> Path:
    """As LUTE and Cheetah write: panels stacked along rows, masks 0 = good, machine time."""
    events, panels, slow, fast = frames_NPSF.shape
    with h5py.File(path, "w") as file:
        file["cxi_version"] = 140
        data = frames_NPSF.reshape(events, panels * slow, fast)
        file.create_dataset("entry_1/data_1/data", data=data, chunks=(1, panels * slow, fast))
        if mask is not None:
            file["entry_1/data_1/mask"] = mask
        file["entry_1/data_1/powderHits"] = data.max(axis=0)
        file["entry_1/experiment_identifier"] = np.array(["cxitst95"] * events, dtype="S8")
        file["LCLS/machineTime"] = np.full(events, start, np.int64)
        file["LCLS/machineTimeNanoSeconds"] = np.arange(events, dtype=np.int64) * 8_333_333
        file["LCLS/photon_energy_eV"] = energy_eV + np.arange(events)
        file["LCLS/detector_1/EncoderValue"] = np.full(events, 150.0)
        file["LCLS/eventCodes"] = np.eye(events, 4, dtype=np.uint8)
    return path


def write_linked_cxi(path: Path, target: Path) -> Path:
    """The EXtra-data way: ``data_1`` is a soft link, its pixels an external link."""
    with h5py.File(path, "w") as file:
        file.create_group("entry_1/instrument_1/detector_1")
        file["entry_1/instrument_1/detector_1/data"] = h5py.ExternalLink(target.name, "data")
        file["entry_1/data_1"] = h5py.SoftLink("/entry_1/instrument_1/detector_1")
    return path


def write_nexus(path: Path, parts: list[Path]) -> Path:
    """An Eiger-like master: data_000001, data_000002, ... are links to other files."""
    with h5py.File(path, "w") as file:
        group = file.create_group("entry/data")
        for number, part in enumerate(parts, 1):
            group[f"data_{number:06d}"] = h5py.ExternalLink(part.name, "data")
        beam = file.create_dataset("entry/instrument/beam/incident_wavelength", data=1.2)
        beam.attrs["units"] = "angstrom"
        distance = file.create_dataset("entry/instrument/detector/detector_distance", data=123.0)
        distance.attrs["units"] = "mm"
    return path


def write_virtual(path: Path, parts: list[Path], shape: tuple[int, ...],
                  dtype: str = "f4") -> Path:
    """A virtual dataset that joins ``parts`` (each a stack "data" of equal length)."""
    each = shape[0] // len(parts)
    layout = h5py.VirtualLayout(shape=shape, dtype=dtype)
    for number, part in enumerate(parts):
        source = h5py.VirtualSource(part.name, "data", shape=(each, *shape[1:]))
        layout[number * each:(number + 1) * each] = source
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("data", layout, fillvalue=-1)
    return path


def truncate(path: Path, fraction: float) -> Path:
    """Cut the file off."""
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(int(size * fraction))
    return path


def corrupt_chunk(path: Path, event: int, dataset: str = "data") -> Path:
    """Overwrite the stored bytes of one event's chunk."""
    with h5py.File(path, "r") as file:
        found = file[dataset]
        info = found.id.get_chunk_info_by_coord((event, *[0] * (found.ndim - 1)))
        at, size = info.byte_offset, info.size
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(b"\xa5" * size)
    return path
