"""What the GPU tests share; without a GPU all of them are skipped with the first cause found."""
from pathlib import Path

import pytest

from xfel_classify.engines.gpu_driver import no_gpu
from xfel_classify.engines.tensorrt import Engine
from xfel_classify.engines.tensorrt_build import installed

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    reason = no_gpu() or ("" if installed() else "TensorRT is not installed")
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=f"no GPU test: {reason}"))


@pytest.fixture(scope="session", autouse=True)
def own_plans(tmp_path_factory):
    """Plans of the tests are built anew, once for the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path_factory.mktemp("plans")))
        yield


@pytest.fixture
def opened():
    """``opened(model, precision, max_batch)`` -> an engine that is closed at the end."""
    engines = []

    def make(model, precision="float32", max_batch=64, **options):
        engine = Engine(model, None, max_batch, precision, **options)
        engine.open()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
