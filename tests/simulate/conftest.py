"""Volumes of particles are made once per session, in a directory of the session's own."""
import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def volume_cache(tmp_path_factory):
    before = os.environ.get("XFEL_CLASSIFY_CACHE")
    os.environ["XFEL_CLASSIFY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XFEL_CLASSIFY_CACHE"]
    else:
        os.environ["XFEL_CLASSIFY_CACHE"] = before
