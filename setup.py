"""Builds one extension module per ``native/*.cpp``; maps ``engines/`` into the package.

No ``-march`` flag: the kernels carry AVX2 and AVX-512 versions and choose at run time.
"""
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NATIVE = ROOT / "xfel_classify" / "native"
HEADERS = sorted(str(path.relative_to(ROOT)) for path in NATIVE.glob("*.h"))
SOURCES = sorted(NATIVE.glob("*.cpp"))


class BuildWithModels(build_py):
    """Copies the shipped models next to the code, as ``xfel_classify/shipped_engines``."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "xfel_classify" / "shipped_engines"
        for source in sorted((ROOT / "engines").rglob("*")):
            if source.is_file():
                destination = target / source.relative_to(ROOT / "engines")
                self.mkpath(str(destination.parent))
                self.copy_file(str(source), str(destination))


ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()
setup(
    ext_modules=[
        Pybind11Extension(
            f"xfel_classify.native.{path.stem}",
            [str(path.relative_to(ROOT))],
            cxx_std=17,
            depends=HEADERS,
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"],
        )
        for path in SOURCES
    ],
    cmdclass={"build_ext": build_ext, "build_py": BuildWithModels},
)
