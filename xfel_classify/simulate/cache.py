"""Where what was simulated is kept between calls."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """``$XFEL_CLASSIFY_CACHE``, else a folder of the user's in the temporary directory."""
    named = os.environ.get("XFEL_CLASSIFY_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(tempfile.gettempdir()) / f"xfel_classify_cache_{os.getuid()}"
