"""The house keeps its shape: file sizes, import directions, lazy imports, verbs with help."""
from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xfel_classify"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "psana", "mpi4py", "tensorrt", "pycuda", "matplotlib", "onnxruntime", "gemmi",
         "fabio", "scipy", "pandas")

# Each outside world has one address.  "top" says whether it may be imported at module level there.
ADDRESSES = {
    "mpi4py": ("pipeline/schedule.py",),
    "psana": ("sources/psana*.py", "analyses/psana*.py", "simulate/*.py"),
    "torch": ("learn/*.py", "learn/networks/*.py", "learn/lessons/*.py", "simulate/*.py",
              "engines/torch.py", "commands/train.py"),
    "tensorrt": ("engines/tensorrt*.py",),
    "pycuda": ("engines/tensorrt*.py",),
    "onnxruntime": ("engines/onnxruntime.py", "engines/cards.py", "engines/lowering.py",
                    "learn/*.py"),
    "matplotlib": ("learn/*.py", "learn/reproductions/*.py"),
}


def own_files(*suffixes: str) -> list[Path]:
    """Files of the project: what git tracks or would, else everything that is not built."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT,
                                capture_output=True, text=True, check=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*")
                 if not {".venv", "build", "__pycache__"} & set(p.relative_to(ROOT).parts)]
    return sorted(p for p in paths if p.is_file() and (p.suffix in suffixes or not suffixes))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """(top-level package, statement) of every absolute import below ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node


def test_no_file_is_over_600_lines() -> None:
    long = {name_of(path): lines for path in own_files(".py", ".cpp", ".h", ".hpp", ".sh")
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 600}
    assert not long


def test_imports_point_down() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed (pip install 'xfel-classify[check]')")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_pulls_in_nothing_heavy() -> None:
    code = (f"import sys, xfel_classify, xfel_classify.cli; heavy = {HEAVY!r}; "
            "print(sorted(h for h in heavy if h in sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_says_what_it_is_and_imports_late(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    inside = path.relative_to(PACKAGE)
    late_only = set(HEAVY) - ({"torch"} if inside.parts[0] == "learn" else set())
    if path == PACKAGE / "engines" / "torch.py":
        late_only -= {"torch"}
    top = {name for statement in tree.body for name, node in imports(statement)
           if node is statement}
    assert not top & late_only, f"{name_of(path)} imports {top & late_only} at module level"
    for name, node in imports(tree):
        addresses = ADDRESSES.get(name)
        assert addresses is None or any(inside.match(a) for a in addresses), (
            f"{name_of(path)}:{node.lineno} imports {name}; its address is {addresses}")


def broad(handler: ast.ExceptHandler) -> bool:
    """True for ``except:``, ``except Exception`` and ``except BaseException`` that swallow."""
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {getattr(c, "id", getattr(c, "attr", None)) for c in caught}
    last = handler.body[-1]
    raises_again = isinstance(last, ast.Raise) and last.exc is None
    return bool(names & {None, "Exception", "BaseException"}) and not raises_again


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_error_is_swallowed_unseen(path: Path) -> None:
    handlers = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(n, ast.ExceptHandler)]
    assert not [f"{name_of(path)}:{h.lineno}" for h in handlers if broad(h)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_pickle_no_eval_and_no_print_in_the_library(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {"pickle", "cPickle", "dill", "marshal"} & {name for name, _ in imports(tree)}
    called = {n.func.id for n in ast.walk(tree)
              if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    forbidden = {"eval", "exec"}
    inside = path.relative_to(PACKAGE)
    if inside.name != "cli.py" and inside.parts[0] not in ("commands", "learn"):
        forbidden |= {"print", "exit", "quit"}
    assert not called & forbidden, f"{name_of(path)} calls {called & forbidden}"


def test_nothing_names_this_machine_or_a_registry() -> None:
    slash = "/"
    patterns = [slash + "work" + slash, slash + "root" + slash, "py" + "pi.org",
                "pythonhosted" + ".org", "deb." + "debian.org", "download.py" + "torch.org"]
    found = [(name_of(path), pattern)
             for path in own_files(".py", ".cpp", ".h", ".hpp", ".md", ".toml", ".txt", ".sh", "")
             for pattern in patterns if pattern in path.read_text(encoding="utf-8")]
    assert not found


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# --- the command line --------------------------------------------------------------------------

def verbs() -> list[str]:
    found = [path.stem.replace("_", "-") for path in (PACKAGE / "commands").glob("*.py")
             if not path.stem.startswith("_")]
    return sorted({"run", *found})


def help_of(*words: str) -> str:
    from xfel_classify.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as exit_:
        main([*words, "--help"])
    assert exit_.value.code == 0
    return shown.getvalue()


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_has_help_and_is_in_the_readme(verb: str) -> None:
    assert f"xfel-classify {verb}" in help_of(verb)
    assert re.search(rf"\b{re.escape(verb)}\b", help_of())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"xfel-classify {re.escape(verb)}\b", readme), f"{verb} is not in README.md"


@pytest.mark.parametrize("verb", [v for v in verbs() if v != "run"])
def test_a_verb_is_one_file_with_two_functions(verb: str) -> None:
    path = PACKAGE / "commands" / f"{verb.replace('-', '_')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert {"add_arguments", "execute"} <= functions
    first = (ast.get_docstring(tree) or "").splitlines()[0]
    assert first.endswith(".") and len(first) < 100
