"""The shape of the project: who imports whom, what is never used, how long modules may grow, what is documented."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "veiltune"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 350

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLING_CALLS = {"torch.load", "torch.save", "torch.package", "torch.jit.load", "pandas.read_pickle"}

# Written so that they do not match themselves: home and working directories, and the places packages come from.
MACHINE_PATHS = re.compile(r"(?<![\w.~/-])/(?:work|root|home|Users|opt/pypi|opt/wheels)/[\w.-]|[A-Z]:\\+Users\\")
REGISTRIES = re.compile(r"\b(?:pypi|registry[.]npmjs|crates)[.](?:org|io)\b|pythonhosted[.]org|download[.]pytorch[.]")

# The verbs, frozen: a new one is a decision, written down here and in the documentation.
VERBS = (
    *("demo", "tune", "generate", "verify", "inspect", "protect", "attack", "compare", "advise", "party", "keygen"),
    *("attest", "seal"),
)
HEAVY = ("torch", "transformers", "peft", "lm_eval", "datasets", "matplotlib")


def module_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def shipped_files() -> list[Path]:
    """The package and the benchmarks. Tests may pickle, to show that a secret refuses it."""
    return [path for top in ("src", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]


def tracked_files() -> list[Path]:
    """What git tracks, or would if it were added; in an unpacked archive, the project's own files."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.split("\0")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return [path for top in ("src", "tests", "docs", "scripts", "benchmarks") for path in (ROOT / top).rglob("*")]
    return [ROOT / name for name in listed if name]


def readable(path: Path) -> str:
    """The text of a file; empty for what is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, IsADirectoryError, FileNotFoundError):
        return ""


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """``np.random.seed`` as ``numpy.random.seed``, by the module's own imports; empty where it is no plain name."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def unpicklings(source: str) -> list[str]:
    """Every import or use, in Python source, of something that pickles or unpickles, as ``line: name``."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name.split(".")[0]): alias.name for alias in node.names if alias.asname}
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [
            f"{node.lineno}: {name}"
            for name in imported
            if name.split(".")[0] in UNPICKLERS or name in UNPICKLING_CALLS or name.endswith(".ForkingPickler")
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node, names)) in UNPICKLING_CALLS:
            found.append(f"{node.lineno}: {name}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"{node.value.lineno}: allow_pickle")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import cloudpickle as harmless",
        "from pickle import loads",
        "def f():\n    import dill",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.save({}, 'x')",
        "from torch import load",
        "import pandas as pd\npd.read_pickle('x')",
        "import numpy\nnumpy.savez('x', allow_pickle=True)",
        "from multiprocessing.reduction import ForkingPickler",
    ],
)
def test_the_search_finds_what_unpickles(source: str) -> None:
    assert unpicklings(source)


def test_the_search_leaves_what_is_safe() -> None:
    safe = "from safetensors.torch import load_file, save_file\nimport json, torch\njson.load(f)\nmodel.load(x)"
    assert unpicklings(safe) == []
    assert unpicklings("import numpy as np\nnp.load(f, allow_pickle=False)") == []


@pytest.mark.parametrize("path", shipped_files(), ids=module_id)
def test_nothing_pickles(path: Path) -> None:
    assert unpicklings(path.read_text(encoding="utf-8")) == []


def test_import_contracts() -> None:
    """The directions of import written in pyproject.toml hold."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kept, 0 broken" in done.stdout, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def public_definitions(
    body: list[ast.stmt], prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Functions, classes and methods whose names have no leading underscore, at the top or in a public class."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield f"{prefix}{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body, f"{prefix}{node.name}.")


def is_stub(node: ast.AST) -> bool:
    """An overload or a property's setter: described where the function or the getter is."""
    names = {ast.unparse(decorator).split(".")[-1] for decorator in getattr(node, "decorator_list", [])}
    return bool(names & {"overload", "setter", "override"})


def undocumented(source: str) -> list[str]:
    """Public names of a module, itself included, that have no docstring."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    return missing + [
        name for name, node in public_definitions(tree.body) if not is_stub(node) and not ast.get_docstring(node)
    ]


def test_the_search_finds_what_is_undocumented() -> None:
    source = 'def f(): ...\nclass C:\n    """Said."""\n    def m(self): ...\n    def _p(self): ...\ndef _g(): ...'
    assert undocumented(source) == ["the module", "f", "C.m"]


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_every_public_name_is_documented(path: Path) -> None:
    assert undocumented(path.read_text(encoding="utf-8")) == []


def test_every_package_has_an_init() -> None:
    """A folder without one would be left out of the documentation, the import contracts and the shape checks."""
    assert [str(path.parent) for path in MODULES if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see {}home/ada/x", True),
        ("at '{}root/.cache'", True),
        ("~/models and docs/root/x and src/work/y", False),
    ],
)
def test_the_search_finds_machine_paths(text: str, *, found: bool) -> None:
    assert bool(MACHINE_PATHS.search(text.replace("{}", "/"))) is found


def test_the_search_finds_registries() -> None:
    assert REGISTRIES.search("https://files." + "pythonhosted" + ".org/x")
    assert not REGISTRIES.search("a package registry")


def test_no_file_names_a_machine_or_a_registry() -> None:
    offences = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        for number, line in enumerate(readable(path).splitlines(), start=1)
        if MACHINE_PATHS.search(line) or REGISTRIES.search(line)
    ]
    assert offences == []


@pytest.mark.skipif(os.environ.get("VEILTUNE_UNCHECKED", "") not in {"", "0"}, reason="the checks were switched off")
def test_annotations_are_checked_at_run_time() -> None:
    """The suite's import hook is in force: a call that breaks an annotation is refused."""
    nearest = importlib.import_module("veiltune.errors").nearest
    assert nearest("tun", ["tune"]).startswith("did you mean")
    with pytest.raises(TypeCheckError):
        nearest(3, ["tune"])


def has_cli() -> bool:
    return importlib.util.find_spec("veiltune.cli") is not None


@pytest.mark.skipif(not has_cli(), reason="there is no command line yet")
def test_verbs_are_frozen() -> None:
    assert tuple(importlib.import_module("veiltune.cli").VERBS) == VERBS


@pytest.mark.skipif(not has_cli(), reason="there is no command line yet")
def test_help_is_instant() -> None:
    """Asking for help loads none of the heavy libraries."""
    code = f"import sys, veiltune.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
