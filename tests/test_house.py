"""The rooms of the package stand on floors: an import points down or along a floor, never up, never in a circle.

All that is public has types, and an import needs no optional package.
"""

import ast
import json
import re
import subprocess
import sys

import pytest
from helpers.files import ROOT

PACKAGE = "guided_diffusion"
# from the ground up; names below the package: a room (a folder) or a module at the top
FLOORS = [
    ["system"],
    ["presets", "pretrained"],
    ["logger"],
    ["dist_util"],
    ["shards"],
    ["energy_score", "gaussian_diffusion", "learning_rate", "losses", "metrics", "muon", "nn", "predictions",
     "resample", "respace", "samplers", "unet"],
    ["data"],
    ["prepare"],
    ["networks"],
    ["methods"],
    ["flags"],
    ["script_util"],
    ["draw"],
    ["checkpoint"],
    ["sampling"],
    ["scoring"],
    ["training"],
    ["live"],
    ["train_util"],
    [""],  # the package itself, which hands on what users import
    ["commands"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules(root):
    """Dotted name -> path of every module of the package, folders by their __init__.py."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name, path, known):
    """(line, module) of everything of the package that a module imports, also inside its functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:1 - node.level or None] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            wanted = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for what in wanted:
            if what.split(".")[0] == PACKAGE:
                while what not in known:  # a name in a module rather than a module
                    what = what.rpartition(".")[0]
                yield node.lineno, what


def floor_of(name):
    return FLOOR[(name.split(".") + [""])[1]]


def graph(root):
    """Module -> {module that it imports: line}."""
    known = modules(root)
    return {name: {what: line for line, what in imports(name, path, known) if what != name}
            for name, path in known.items()}


def climbs(edges):
    """What points from a module to a higher floor."""
    return [f"{name}:{line} imports {what}" for name, wanted in edges.items() for what, line in wanted.items()
            if floor_of(what) > floor_of(name)]


def circles(edges):
    """One path of modules, its first one again at the end, for every circle that a walk along the imports meets."""
    found, done = [], set()

    def walk(name, path):
        if name in path:
            found.append(" -> ".join([*path[path.index(name):], name]))
        elif name not in done:
            for what in edges[name]:
                walk(what, [*path, name])
            done.add(name)

    for name in edges:
        walk(name, [])
    return found


@pytest.fixture(scope="module")
def house():
    return graph(ROOT)


def test_every_module_has_a_floor(house):
    assert {(name.split(".") + [""])[1] for name in house} == FLOOR.keys()


def test_no_import_points_to_a_higher_floor(house):
    assert climbs(house) == []


def test_no_modules_import_each_other_in_a_circle(house):
    assert circles(house) == []


@pytest.mark.parametrize("line, what", [
    ("import guided_diffusion.live.monitor", "live.monitor"),
    ("from guided_diffusion.live import monitor", "live.monitor"),
    ("from ..live import monitor as m, views", "live.monitor"),
    ("from ..live.monitor import Monitor", "live.monitor"),
    ("def f():\n    if True:\n        from .. import live", "live"),
    ("from .. import Segmenter", "")])
def test_an_import_upwards_is_found_in_every_spelling(tmp_path, line, what):
    files = {"__init__": "", "data/__init__": "", "data/cases": line, "live/__init__": "", "live/monitor": "",
             "live/views": ""}
    for name, text in files.items():
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = climbs(graph(tmp_path))
    assert any(re.fullmatch(rf"{PACKAGE}\.data\.cases:\d imports {PACKAGE}{'.' * bool(what)}{what}", climb)
               for climb in found), found


def test_a_circle_is_found_within_a_floor(tmp_path):
    files = {"__init__": "", "data/__init__": "", "data/a": "from . import b", "data/b": "from .c import x",
             "data/c": "def f():\n    from guided_diffusion.data.a import y", "data/d": "from . import a"}
    (tmp_path / PACKAGE / "data").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / PACKAGE / f"{name}.py").write_text(text)
    names = [f"{PACKAGE}.data.{letter}" for letter in "abca"]
    assert circles(graph(tmp_path)) == [" -> ".join(names)]


def test_no_test_file_imports_another():
    """Nor does code in a string, for a process of its own."""
    importing = re.compile(r"^\s*(?:from|import)\s+(?:[\w.]*\.)?(?:test_\w+|conftest)\b.*", re.M)
    found = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in sorted((ROOT / "tests").rglob("*.py"))
             for line in importing.findall(path.read_text(encoding="utf-8"))]
    assert found == []


# ---- what a signature says ----

def untyped(source):
    """What has no type among all that is public in a module, special methods too: "Class.function: parameter", or
    "Class.function: return"."""
    def look(body, owner):
        for node in body:
            special = getattr(node, "name", "").endswith("__")
            if getattr(node, "name", "_").startswith("_") and not special:
                continue
            if isinstance(node, ast.ClassDef):
                yield from look(node.body, f"{owner}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                args = node.args
                parameters = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg, args.kwarg])]
                for parameter in parameters:
                    if parameter.annotation is None and parameter.arg not in ("self", "cls"):
                        yield f"{owner}{node.name}: {parameter.arg}"
                if node.returns is None and node.name != "__init__":
                    yield f"{owner}{node.name}: return"

    return list(look(ast.parse(source).body, ""))


def test_every_parameter_and_return_that_is_public_has_its_type():
    found = {name: untyped(path.read_text(encoding="utf-8")) for name, path in modules(ROOT).items()}
    assert {name: missing for name, missing in found.items() if missing} == {}


@pytest.mark.parametrize("source, missing", [
    ("def f(a, b: int = 1, *, c) -> None: ...", ["f: a", "f: c"]),
    ("def f(*args, **options) -> None: ...", ["f: args", "f: options"]),
    ("def f(a: int, /): ...", ["f: return"]),
    ("class A:\n    def __init__(self, a): ...\n    @classmethod\n    def f(cls): ...",
     ["A.__init__: a", "A.f: return"]),
    ("class A:\n    class B:\n        def __call__(self, a) -> None: ...", ["A.B.__call__: a"]),
    ("def f() -> None:\n    def inside(a): ...", []),
    ("def _f(a): ...\nclass _A:\n    def f(self, a): ...\nclass A:\n    def _f(self, a): ...", [])])
def test_what_has_no_type_is_found_unless_it_is_private(source, missing):
    assert untyped(source) == missing


# ---- what an import needs ----

BARE = """
import importlib, json, pkgutil, sys

for name in ("visdom", "matplotlib", "blobfile", "s3fs", "mpi4py", "requests", "h5py", "nibabel", "pydicom",
             "highdicom"):
    sys.modules[name] = None  # as if it were not installed
connections = []
sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.bind", "socket.getaddrinfo")
                 and connections.append(event))

import guided_diffusion
failed, count = {}, 0
for module in pkgutil.walk_packages(guided_diffusion.__path__, "guided_diffusion."):
    count += 1
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = error.name
import torch.distributed
print(json.dumps([count, failed, connections, torch.distributed.is_initialized()]))
"""


def test_all_but_charts_is_imported_without_optional_packages_and_reaches_for_no_network(environment, house):
    done = subprocess.run([sys.executable, "-c", BARE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, failed, connections, joined = json.loads(done.stdout)
    assert set(failed) == {f"{PACKAGE}.draw.plots"}, failed  # matplotlib's
    assert count == len(house) - 1 and connections == [] and not joined
