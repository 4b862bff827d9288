"""Configuration: what a user writes, what they meant, and what they are told."""
import sys

import pytest

from xfel_classify import config
from xfel_classify.config import apply_setting, build, component, dumps, load, loads, resolve
from xfel_classify.core import ConfigurationError, UnknownComponent

TOML = """
[source]
use = "hdf5"
files = ["a.h5"]

[[analyses]]
use = "peakfinder8"
minimum_snr = 6.0

[loop]
batch = 4
"""


def test_a_file_becomes_a_configuration_and_comes_back_the_same(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    resolved = resolve(load(path))
    assert resolved.loop.batch == 4 and resolved.loop.keep_parts is False
    assert resolved.analyses == [{"use": "peakfinder8", "minimum_snr": 6.0}]
    assert resolve(loads(dumps(resolved), "text")) == resolved


@pytest.mark.parametrize("setting, section, key, value", [
    ("source.run=96", "source", "run", 96),
    ("source.exp=mfxl1", "source", "exp", "mfxl1"),
    ("source.beam_center_px=[10.5, 20]", "source", "beam_center_px", [10.5, 20]),
    ("loop.batch=16", "loop", "batch", 16),
    ("loop.keep_parts=true", "loop", "keep_parts", True),
])
def test_settings_override(setting, section, key, value):
    tables = loads(TOML, "text")
    apply_setting(tables, setting)
    assert tables[section][key] == value


def test_a_component_is_set_by_its_name():
    tables = loads(TOML, "text")
    apply_setting(tables, "peakfinder8.minimum_snr=7")
    assert tables["analyses"][0]["minimum_snr"] == 7


@pytest.mark.parametrize("setting, says", [
    ("batch=4", "SECTION.KEY=VALUE"), ("loop.batch", "SECTION.KEY=VALUE"),
    ("pf8.x=1", "peakfinder8"),
])
def test_a_wrong_setting_says_what_is_expected(setting, says):
    with pytest.raises(ConfigurationError, match=says):
        apply_setting(loads(TOML, "text"), setting)


def test_a_misspelt_key_names_the_nearest():
    with pytest.raises(ConfigurationError, match="(?s)unknown key 'bach'.*did you mean 'batch'"):
        resolve_text("[loop]\nbach = 4")
    with pytest.raises(ConfigurationError, match="valid keys are source, analyses, sinks, loop"):
        resolve_text("[sauce]\nrun = 4")
    with pytest.raises(ConfigurationError, match="batch"):
        resolve_text("[loop]\nbatch = 'many'")


def resolve_text(text):
    from xfel_classify.config import struct

    tables = loads(text, "text")
    if "loop" in tables:
        struct(config.LoopConfig, tables["loop"], "loop")
    return resolve(tables)


def test_broken_toml_and_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match="absent.toml"):
        load(tmp_path / "absent.toml")
    path = tmp_path / "broken.toml"
    path.write_text("[source\n")
    with pytest.raises(ConfigurationError, match="broken.toml is not valid TOML"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="broken.toml cannot be read"):
        load(path)


def test_lookup_by_file_registration_and_user_file(tmp_path, monkeypatch):
    from xfel_classify.analyses.statistics import Analysis

    assert component("analyses", "statistics") is Analysis
    monkeypatch.setitem(config._registered, ("analyses", "mine"), int)
    assert component("analyses", "mine") is int
    (tmp_path / "my_file.py").write_text("class MyClass:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    assert component("analyses", "my_file:MyClass").__name__ == "MyClass"
    with pytest.raises(UnknownComponent, match="no class 'Other'"):
        component("analyses", "my_file:Other")
    with pytest.raises(UnknownComponent, match="absent"):
        component("analyses", "absent:Other")
    sys.modules.pop("xfel_classify_user_my_file", None)


def test_an_unknown_component_names_the_known_ones_and_the_nearest():
    with pytest.raises(UnknownComponent, match="(?s)statistics.*did you mean 'statistics'"):
        component("analyses", "statistic")
    with pytest.raises(UnknownComponent):
        component("analyses", "../core")
    with pytest.raises(ConfigurationError, match="no 'use'"):
        build("sinks", {"link": True})
