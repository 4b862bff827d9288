"""The plan cache: one builder, nothing half-written, nothing that others could have put there."""
import logging
import multiprocessing
import os
import threading
import time
from dataclasses import replace

import pytest

from xfel_classify.engines import plans
from xfel_classify.engines.plans import Key, PlanCache, PlanUnusable, cache_root, obtain

KEY = Key(model="sfx-hit", onnx_sha256="ab", lowering="1", precision="float16", profile="1..64",
          builder="tensorrt 11.4", gpu="NVIDIA H100", capability="sm_90", driver="13000",
          options="workspace 256")


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "plans")


def use(cache, key=KEY, build=lambda: b"plan", start=lambda plan: plan):
    return obtain(cache, key, build, start, lambda opened: {"difference": 0.0})


def never():
    raise AssertionError("built although a plan was there")


def test_where_plans_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path / "given"))
    assert PlanCache().folder == tmp_path / "given" / "plans"
    monkeypatch.delenv("XFEL_CLASSIFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "xfel_classify"


def test_built_once_then_read(cache):
    assert use(cache) == b"plan"
    assert use(cache, build=never) == b"plan"
    [(path, head)] = cache.entries()
    assert head["key"] == KEY.as_table() and head["bytes"] == 4
    assert head["notes"] == {"difference": 0.0}
    assert path.stat().st_mode & 0o777 == 0o600 and cache.folder.stat().st_mode & 0o777 == 0o700
    assert not list(cache.folder.glob("*.tmp"))


@pytest.mark.parametrize("part", list(KEY.as_table()))
def test_every_part_of_the_key_makes_another_plan(cache, part):
    use(cache)
    other = replace(KEY, **{part: "other"})
    assert use(cache, other, build=lambda: b"another") == b"another"
    assert use(cache, build=never) == b"plan"


@pytest.mark.parametrize("content", [b"", b"not a plan", plans.MAGIC + b"{}\nplan",
                                     plans.MAGIC + b"{\"key\""])
def test_files_that_are_no_plans_are_replaced(cache, content, caplog):
    cache.path(KEY).write_bytes(content)
    cache.path(KEY).chmod(0o600)
    assert use(cache) == b"plan" and use(cache, build=never) == b"plan"
    assert "is not used" in caplog.text


def test_a_plan_under_a_wrong_name_is_replaced(cache):
    use(cache, replace(KEY, gpu="NVIDIA A100"), build=lambda: b"foreign")
    cache.path(replace(KEY, gpu="NVIDIA A100")).rename(cache.path(KEY))
    assert use(cache) == b"plan"


def test_a_refused_plan_is_built_again_once(cache):
    cache.write(KEY, b"old", {})
    seen = []

    def start(plan):
        seen.append(plan)
        if plan == b"old":
            raise PlanUnusable("check.npz is missed by 1e-1")
        return plan

    assert use(cache, start=start) == b"plan"
    assert seen == [b"old", b"plan"]


def test_a_fresh_plan_that_is_refused_is_not_kept(cache):
    def start(plan):
        raise PlanUnusable("wrong answers")

    with pytest.raises(PlanUnusable, match="wrong answers"):
        use(cache, start=start)
    assert cache.entries() == []


def test_a_failed_build_leaves_nothing_and_no_lock(cache):
    with pytest.raises(PlanUnusable):
        use(cache, build=lambda: (_ for _ in ()).throw(PlanUnusable("no memory")))
    assert cache.entries() == []
    assert use(cache) == b"plan"


# --- who may write here --------------------------------------------------------------------------

def test_a_plan_that_others_could_have_written_is_not_read(cache, caplog):
    use(cache)
    cache.path(KEY).chmod(0o666)
    assert use(cache, build=lambda: b"new") == b"new"
    assert "can be written by others" in caplog.text


def test_a_link_is_not_followed(cache, tmp_path, caplog):
    use(cache)
    cache.path(KEY).rename(tmp_path / "elsewhere")
    cache.path(KEY).symlink_to(tmp_path / "elsewhere")
    assert use(cache, build=lambda: b"new") == b"new"
    assert (tmp_path / "elsewhere").read_bytes().endswith(b"\nplan")


def test_a_folder_that_was_open_to_others_is_emptied(cache, caplog):
    use(cache)
    cache.folder.chmod(0o777)
    again = PlanCache(cache.folder)
    assert again.why_not == "" and again.entries() == []
    assert again.folder.stat().st_mode & 0o777 == 0o700 and "open to others" in caplog.text


def test_somebody_elses_folder_is_not_used(cache, monkeypatch, caplog):
    use(cache)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    foreign = PlanCache(cache.folder)
    assert "belongs to user" in foreign.why_not
    with caplog.at_level(logging.WARNING):
        assert use(foreign, build=lambda: b"in memory") == b"in memory"
    assert "built in memory by every process" in caplog.text
    assert "$XFEL_CLASSIFY_CACHE" in caplog.text


def test_an_impossible_folder_means_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = PlanCache(tmp_path / "file" / "plans")
    assert use(cache) == b"plan" and use(cache, build=lambda: b"again") == b"again"
    assert "cannot be made" in caplog.text and cache.entries() == []
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert "not a directory of its own" in PlanCache(tmp_path / "link").why_not


def test_a_full_disk_is_said_and_survived(cache, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert use(cache) == b"plan"
    assert "No space left" in caplog.text and not list(cache.folder.glob("*plan*"))


# --- several processes -----------------------------------------------------------------------

def _process(folder, started, answers):
    def build():
        started.put(os.getpid())
        time.sleep(0.5)
        return f"by {os.getpid()}".encode()

    answers.put(use(PlanCache(folder), build=build))


def test_one_of_several_processes_builds(cache):
    context = multiprocessing.get_context("fork")
    started, answers = context.Queue(), context.Queue()
    ranks = [context.Process(target=_process, args=(cache.folder, started, answers))
             for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=20) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert len(set(found)) == 1
    assert found[0] == f"by {started.get(timeout=5)}".encode() and started.empty()


def _dies(folder):
    with PlanCache(folder).lock(KEY):
        os._exit(1)


def test_a_builder_that_dies_does_not_block_the_others(cache):
    dead = multiprocessing.get_context("fork").Process(target=_dies, args=(cache.folder,))
    dead.start()
    dead.join()
    assert use(cache) == b"plan"


def test_who_waits_says_for_whom(cache, monkeypatch, caplog):
    monkeypatch.setattr(plans, "REPORT_S", 0.1)
    held, release = threading.Event(), threading.Event()

    def hold():
        with cache.lock(KEY):
            held.set()
            release.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(20)
    threading.Timer(1.0, release.set).start()
    with caplog.at_level(logging.INFO):
        assert use(cache) == b"plan"
    holder.join()
    assert f"for process {os.getpid()} on " in caplog.text
    assert "to build sfx-hit in float16 for NVIDIA H100" in caplog.text
