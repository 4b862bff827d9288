"""Say what of MPI, psana, HDF5, GPUs, models and caches is here, and how to get the rest.

Packages that are optional, or that load a device or a network stack, are imported in a child
process with a time limit: one that crashes or hangs is a line of the report, not its end.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
PROBE_S = 120.0       # a cold import of psana or torch from a shared file system takes this long

# variables by which a launcher tells a process that it is a rank; a child must not believe it
LAUNCHER = re.compile(r"^(OMPI_|PMIX_|PMI_|PMI2_|HYDRA_|MPI_LOCAL|PALS_)")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    ``state`` is "ok", "absent" (an optional part is not there) or "fault" (the basic job, a run
    over HDF5 files on CPU, will not work).  ``remedy`` says how to get what is missing.
    """

    subject: str
    state: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok  ", "absent": "-   ", "fault": "FAIL"}[self.state]
        line = f"{mark} {self.subject:<17} {self.found}"
        return line + (f"\n{'':<22} -> {self.remedy}" if self.remedy else "")


# --- child processes ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Probe:
    """What a child process reported: ``values``, or None and the ``failure`` in words."""

    values: Mapping[str, Any] | None
    failure: str = ""


def child_environment() -> dict[str, str]:
    """This process's environment for a child that is no MPI rank and can import this package."""
    environment = {k: v for k, v in os.environ.items() if not LAUNCHER.match(k)}
    paths = [str(PACKAGE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    return environment


def probe(code: str, timeout_s: float = PROBE_S) -> Probe:
    """Run ``code`` in a child Python; its last line of output is a JSON object.

    The working directory is not on the child's import path.  Never raises for what the child does.
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s,
                              env=child_environment(), stdin=subprocess.DEVNULL,
                              errors="replace", check=False)
    except subprocess.TimeoutExpired:
        return Probe(None, f"no answer within {timeout_s:.0f} s")
    if done.returncode < 0:
        return Probe(None, f"crashed with {signal.Signals(-done.returncode).name}")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            return Probe(json.loads(lines[-1]))
        except json.JSONDecodeError:
            return Probe(None, f"unreadable answer: {lines[-1][:100]}")
    errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return Probe(None, errors[-1][:200])


# --- MPI ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Mpirun:
    """The ``mpirun`` on the path: its ``flavour`` ("Open MPI", "MPICH", ...) and ``version``."""

    path: str
    flavour: str
    version: str

    def command(self, ranks: int) -> list[str]:
        """The start of a command line that runs a program on ``ranks`` ranks of this machine."""
        oversubscribe = ["--oversubscribe"] if self.flavour == "Open MPI" else []
        return [self.path, "-n", str(ranks), *oversubscribe]

    def environment(self) -> dict[str, str]:
        """The environment to start it with; Open MPI refuses root unless told twice."""
        environment = child_environment()
        if self.flavour == "Open MPI" and os.geteuid() == 0:
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return environment


def find_mpirun() -> Mpirun | None:
    """The ``mpirun`` (or ``mpiexec``) on the path, or None."""
    path = shutil.which("mpirun") or shutil.which("mpiexec")
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30,
                              env=child_environment(), check=False)
    except (subprocess.TimeoutExpired, OSError):
        return None
    text = done.stdout + done.stderr
    if "Open MPI" in text or "OpenRTE" in text:
        flavour = "Open MPI"
    elif "HYDRA" in text or "MPICH" in text:
        flavour = "MPICH"
    elif "Intel" in text:
        flavour = "Intel MPI"
    else:
        flavour = "unknown MPI"
    number = re.search(r"\d+\.\d+(\.\d+)?", text)
    return Mpirun(path, flavour, number.group() if number else "")


def ranks_on_node() -> tuple[int, int]:
    """(ranks of this job on this node, ranks of this job), 1 and 1 when not started in parallel."""
    def count(*names: str) -> int:
        for name in names:
            text = os.environ.get(name, "")
            if text.isdigit():
                return int(text)
        return 1

    total = count("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
    return count("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"), total


def mpi() -> Iterator[Finding]:
    get = ("apt-get install openmpi-bin libopenmpi-dev (or load the site's MPI module), then "
           "pip install 'xfel-classify[mpi]'")
    cores = len(os.sched_getaffinity(0))
    mpirun = find_mpirun()
    seen = probe("""
        import json, mpi4py
        mpi4py.rc.initialize = False
        from mpi4py import MPI
        print(json.dumps({"mpi4py": mpi4py.__version__,
                          "library": MPI.Get_library_version().split(",")[0].splitlines()[0]}))
    """)
    if seen.values is None:
        yield Finding("mpi4py", "absent", seen.failure, get)
    else:
        yield Finding("mpi4py", "ok", f"{seen.values['mpi4py']} with {seen.values['library']}")
    if mpirun is None:
        yield Finding("mpirun", "absent", "not on the path; runs are serial", get)
        return
    found = f"{mpirun.flavour} {mpirun.version}, {mpirun.path}; {cores} cores here"
    if seen.values is None:
        yield Finding("mpirun", "ok", found)
        return
    if os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE"):
        yield Finding("mpirun", "ok", f"{found}; this is one of {ranks_on_node()[1]} ranks")
        return
    yield _two_ranks(mpirun, found)


def _two_ranks(mpirun: Mpirun, found: str) -> Finding:
    """Start two ranks for real: with an mpi4py of another MPI, each would think itself alone."""
    code = "from mpi4py import MPI; print('size', MPI.COMM_WORLD.size)"
    try:
        done = subprocess.run([*mpirun.command(2), sys.executable, "-P", "-c", code],
                              capture_output=True, text=True, timeout=PROBE_S,
                              env=mpirun.environment(), stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        return Finding("mpirun", "absent", f"{found}; two ranks did not start in {PROBE_S:.0f} s",
                       "try: mpirun -n 2 hostname; runs without mpirun are serial and work")
    sizes = re.findall(r"size (\d+)", done.stdout)
    if sizes == ["2", "2"]:
        return Finding("mpirun", "ok", f"{found}; two ranks started")
    if sizes:
        return Finding("mpirun", "absent", f"{found}; ranks do not see each other (sizes "
                       f"{', '.join(sizes)}): mpi4py belongs to another MPI",
                       "pip install --force-reinstall --no-binary mpi4py mpi4py")
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding("mpirun", "absent", f"{found}; two ranks failed: {reason[:120]}",
                   "try: mpirun -n 2 hostname; runs without mpirun are serial and work")


# --- libraries ---------------------------------------------------------------------------------

def python() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("xfel-classify")
    except PackageNotFoundError:
        own = "not installed, run from its source tree"
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding("python", "ok" if supported else "fault",
                  f"{sys.version.split()[0]}, xfel-classify {own}",
                  "" if supported else "Python 3.11, 3.12 or 3.13 is needed")


def hdf5() -> Iterator[Finding]:
    seen = probe("""
        import json, h5py
        missing = []
        try:
            import hdf5plugin
        except ImportError:
            missing.append("hdf5plugin")
        filters = {"gzip": 1, "lz4": 32004, "bitshuffle": 32008, "zstd": 32015}
        print(json.dumps({"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version,
                          "there": [n for n, i in filters.items() if h5py.h5z.filter_avail(i)],
                          "missing": [n for n, i in filters.items()
                                      if not h5py.h5z.filter_avail(i)]}))
    """)
    if seen.values is None:
        yield Finding("hdf5", "fault", seen.failure, "pip install h5py hdf5plugin")
        return
    missing = seen.values["missing"]
    yield Finding("hdf5", "ok", f"HDF5 {seen.values['hdf5']}, h5py {seen.values['h5py']}")
    yield Finding("hdf5 filters", "fault" if missing else "ok", ", ".join(seen.values["there"])
                  + (f"; missing {', '.join(missing)}" if missing else ""),
                  "pip install hdf5plugin" if missing else "")


def psana() -> Iterator[Finding]:
    seen = probe("""
        import json, psana
        from importlib.metadata import PackageNotFoundError, version
        try:
            number = version("psana")
        except PackageNotFoundError:
            number = getattr(psana, "__version__", "")
        print(json.dumps({"generation": 2 if getattr(psana, "xtc_version", 1) == 2 else 1,
                          "version": number, "path": psana.__file__}))
    """)
    if seen.values is None:
        yield Finding("psana", "absent", seen.failure,
                      "psana2: apt-get install libkrb5-dev libopenmpi-dev g++, then pip install "
                      "'xfel-classify[psana]' (Python 3.11-3.13); HDF5 runs need none")
    elif seen.values["generation"] == 2:
        yield Finding("psana", "ok", f"psana2 {seen.values['version']} (LCLS-II, xtc2 files)")
    else:
        yield Finding("psana", "absent", f"psana1 {seen.values['version']} (LCLS-I, xtc files), "
                      f"{seen.values['path']}; this release reads xtc2 files only",
                      "use an environment with psana2, or HDF5 files")


def runtimes() -> Iterator[Finding]:
    seen = probe("""
        import json, onnxruntime
        print(json.dumps({"version": onnxruntime.__version__,
                          "providers": onnxruntime.get_available_providers()}))
    """)
    if seen.values is None:
        yield Finding("onnxruntime", "fault", seen.failure, "pip install onnxruntime")
    else:
        providers = [p.removesuffix("ExecutionProvider") for p in seen.values["providers"]]
        yield Finding("onnxruntime", "ok", f"{seen.values['version']}, {', '.join(providers)}")
    seen = probe("""
        import json, torch
        print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
                          "devices": torch.cuda.device_count()}))
    """)
    if seen.values is None:
        yield Finding("torch", "absent", seen.failure, "only for training and --backend torch: "
                      "pip install 'xfel-classify[learn]'")
    else:
        cuda = seen.values["cuda"]
        yield Finding("torch", "ok", f"{seen.values['version']}, " + (
            f"CUDA {cuda}, {seen.values['devices']} devices" if cuda else "CPU build"))


def gpus() -> Iterator[Finding]:
    """The driver is asked through ctypes, in a child: cuInit may hang on a broken driver."""
    seen = probe("""
        import ctypes, json
        cuda = ctypes.CDLL("libcuda.so.1")
        error = cuda.cuInit(0)
        driver, count, names = ctypes.c_int(), ctypes.c_int(), []
        cuda.cuDriverGetVersion(ctypes.byref(driver))
        if error == 0:
            cuda.cuDeviceGetCount(ctypes.byref(count))
        for number in range(count.value):
            device, name = ctypes.c_int(), ctypes.create_string_buffer(100)
            cuda.cuDeviceGet(ctypes.byref(device), number)
            cuda.cuDeviceGetName(name, 100, device)
            names.append(name.value.decode())
        print(json.dumps({"error": error, "driver": driver.value, "names": names}))
    """, timeout_s=60)
    smi = shutil.which("nvidia-smi")
    if seen.values is None:
        tool = f"; {smi} is there" if smi else ""
        yield Finding("gpu", "absent", f"no NVIDIA driver ({seen.failure}){tool}",
                      "none needed: networks run on the CPU with onnxruntime")
        return
    driver = seen.values["driver"]
    cuda = f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
    if seen.values["error"]:
        yield Finding("gpu", "absent", f"{cuda}, but cuInit fails with {seen.values['error']}",
                      "see nvidia-smi; networks run on the CPU meanwhile")
        return
    names = seen.values["names"]
    kinds = ", ".join(f"{names.count(n)} x {n}" for n in sorted(set(names))) or "no device"
    yield Finding("gpu", "ok" if names else "absent", f"{kinds}, {cuda}")


def tensorrt() -> Iterator[Finding]:
    """Looked up, not imported: importing would create a device context."""
    from importlib.metadata import distributions

    wanted = re.compile(r"^(tensorrt(_rtx)?(_cu\d+)?|pycuda)$")
    there = sorted({f"{d.name} {d.version}" for d in distributions()
                    if d.name and wanted.match(d.name.replace("-", "_"))})
    yield Finding("tensorrt", "ok" if there else "absent", ", ".join(there) or "not installed",
                  "" if there else "of use only with an NVIDIA GPU; see docs/gpu.md")


# --- the package's own parts -------------------------------------------------------------------

def kernels() -> Iterator[Finding]:
    names = sorted(path.stem for path in (PACKAGE / "native").glob("*.cpp"))
    names += sorted({path.name.split(".")[0] for path in (PACKAGE / "native").glob("*.so")}
                    - set(names))
    seen = probe(f"""
        import importlib, json
        there, missing = [], []
        for name in {names!r}:
            try:
                importlib.import_module("xfel_classify.native." + name)
                there.append(name)
            except ImportError:
                missing.append(name)
        print(json.dumps({{"there": there, "missing": missing}}))
    """)
    again = "pip install -e . (or pip install xfel-classify) builds them; needs a C++ compiler"
    if seen.values is None:
        yield Finding("compiled kernels", "fault", seen.failure, again)
        return
    missing = seen.values["missing"]
    found = f"{', '.join(seen.values['there']) or 'none'} using {instruction_set()}"
    yield Finding("compiled kernels", "fault" if missing else "ok",
                  found + (f"; not built: {', '.join(missing)}" if missing else ""),
                  again if missing else "")


def instruction_set() -> str:
    """The version of the kernels that this processor is given at run time."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "an unknown instruction set"
    flags = set(re.findall(r"^flags\s*:(.*)$", text, re.MULTILINE)[:1][0].split()) \
        if "flags" in text else set()
    return "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "the baseline"


def models() -> Iterator[Finding]:
    """Every model found, its hash, and whether ONNX Runtime gives the answers it should."""
    seen = probe("""
        import json, logging
        from xfel_classify.core import XfelClassifyError
        from xfel_classify.engines.cards import check_model, survey
        logging.disable()
        rows = []
        for directory, found in survey():
            if isinstance(found, XfelClassifyError):
                rows.append([directory.name, str(found), True])
                continue
            label = f"{found.name} {found.version}, sha256 {found.sha256[:12]} as its card says"
            try:
                report = check_model(found.directory, "onnxruntime")
                said = str(report).splitlines()[-1].strip()
                rows.append([label, said, not report.passed])
            except XfelClassifyError as error:
                rows.append([label, str(error), True])
        print(json.dumps({"rows": rows}))
    """)
    get = "reinstall the package, or point XFEL_CLASSIFY_MODELS at a folder of models"
    if seen.values is None:
        yield Finding("models", "fault", seen.failure, get)
        return
    if not seen.values["rows"]:
        yield Finding("models", "fault", "none found", get)
    for label, said, wrong in seen.values["rows"]:
        said = re.sub(r"\s+", " ", said)
        yield Finding("model", "fault" if wrong else "ok", f"{label}: {said}", get if wrong else "")


def caches() -> Iterator[Finding]:
    from ..engines.plans import SUFFIX, cache_root

    path = cache_root()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        free_GB = shutil.disk_usage(nearest).free / 1e9
        plans = sum(1 for _ in path.rglob(f"*{SUFFIX}")) if path.is_dir() else 0
        yield Finding("cache", "ok", f"{path}, writable, {free_GB:.1f} GB free, {plans} compiled "
                      "plans")
    else:
        yield Finding("cache", "absent", f"{path} cannot be written",
                      "export XFEL_CLASSIFY_CACHE=/a/writable/directory")
    memory = Path("/dev/shm")
    if memory.is_dir():
        free_GB = shutil.disk_usage(memory).free / 1e9
        small = free_GB < 1
        yield Finding("shared memory", "absent" if small else "ok", f"{free_GB:.1f} GB free",
                      "psana and MPI exchange constants there (0.25 GB per Jungfrau 4M); in a "
                      "container: --shm-size 4g" if small else "")


def threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    here, _ = ranks_on_node()
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    values = {n: os.environ[n] for n in names if n in os.environ}
    said = ", ".join(f"{n}={v}" for n, v in values.items()) or "OMP_NUM_THREADS not set"
    found = f"{cores} cores, {here} rank{'s' if here > 1 else ''} on this node; {said}"
    asked = max((int(v) for v in values.values() if v.isdigit()), default=0)
    if asked * here > cores:
        yield Finding("threads per rank", "absent", found,
                      f"export OMP_NUM_THREADS={max(1, cores // here)} (more only slows ranks)")
    else:
        yield Finding("threads per rank", "ok", found + "; networks use one thread per rank")


SECTIONS = (python, hdf5, runtimes, kernels, models, mpi, psana, gpus, tensorrt, caches, threads)


def examine() -> Iterator[Finding]:
    """Every finding, in the order of the sections; two child processes at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        answers: list[Future[list[Finding]]] = [pool.submit(_findings, s) for s in SECTIONS]
        for answer in answers:
            yield from answer.result()


def _findings(section: Callable[[], Iterator[Finding]]) -> list[Finding]:
    return list(section())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def execute(args: argparse.Namespace) -> int:
    """Print the report; 1 when the basic job would not work, else 0."""
    del args
    faults = 0
    for finding in examine():
        faults += finding.state == "fault"
        print(finding, flush=True)
    print("\nthe basic job works here" if not faults else
          f"\n{faults} part(s) that the basic job needs are missing or broken")
    return 1 if faults else 0
