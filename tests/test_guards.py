"""The rules of the house, read from the files themselves."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fleetgym.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "core": "src/fleetgym/core/",
    "cli": "src/fleetgym/cli/",
    "envs": "envs/",
    "agents": "agents/",
    "merging": "merging/",
    "benchmarks": "benchmarks/",
    "assets": "assets/",
}
# Who may import whom, at any level.
MAY_IMPORT = {
    "core": {"core"},
    "assets": set(),
    "envs": {"core", "assets", "envs"},
    "agents": {"core", "agents"},
    "merging": {"core", "merging"},
    "benchmarks": {"core", "envs", "agents", "merging", "benchmarks"},
    "cli": set(PARTS),
    "root": {"envs", "cli"},
}
# Other packages: at the top of a module, and (further ones) inside functions, where they cost only those who call.
PACKAGES = {
    "core": (
        {"numpy", "torch", "gymnasium", "safetensors", "minari"},
        {"rich", "tensorboard", "moviepy", "imageio", "imageio_ffmpeg", "PIL", "OpenGL", "mujoco", "h5py"},
    ),
    "assets": (set(), set()),
    "envs": (
        {"numpy", "gymnasium"},
        {"mujoco", "metaworld", "scipy", "numba", "OpenGL"},
    ),
    "agents": ({"numpy", "torch", "gymnasium", "tyro"}, {"stable_baselines3", "sb3_contrib"}),
    "merging": ({"numpy", "torch", "scipy"}, {"numba"}),
    "benchmarks": (
        {"numpy", "torch", "gymnasium", "tyro"},
        {"rich", "matplotlib", "PIL", "mujoco", "metaworld", "scipy"}
        | {"minigrid", "mlxtend", "nfn", "rebasin", "robosuite", "sklearn"},  # of extras
    ),
    "cli": ({"tyro"}, None),  # None: anything
    "root": (set(), set()),
}
# A world's own folder may import its simulator at the top: whoever imports it wants that world. So may Flower's, and
# what is compiled.
WORLDS = {
    "envs/fields/nerfstudio.py": {"nerfstudio", "torch"},
    "envs/fields/": {"numba", "torch"},
    "envs/fleet_tools/": {"mujoco", "numba", "PIL", "scipy"},
    "envs/grasping/": {"PIL", "numba", "pybullet", "scipy"},
    "envs/meta_world/": {"mujoco", "metaworld", "scipy", "numba"},
    "envs/office_nav/torch_": {"torch"},
    "envs/office_nav/": {"numba"},
    "envs/rendering.py": {"mujoco"},
    "merging/federated.py": {"flwr", "safetensors"},
    "merging/fleet_link.py": {"cryptography", "flwr", "httpx", "uvicorn"},
    "merging/functionals/products.py": {"llvmlite", "numba"},
}


def files() -> list[str]:
    """Files that are, or are about to be, under version control."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, text=True)
    if done.returncode == 0:
        return sorted({name for name in done.stdout.splitlines() if (ROOT / name).is_file()})
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())  # an unpacked sdist
    return sorted(str(path) for path in found if not {".venv", "__pycache__"} & set(path.parts))


FILES = files()
SOURCES = [name for name in FILES if name.endswith(".py")]
CODE = [name for name in SOURCES if name.startswith(("src/", *PARTS.values()))]


def part_of(name: str) -> str:
    return next((part for part, folder in PARTS.items() if name.startswith(folder)), "root")


def imports(tree: ast.Module, package: list[str]) -> list[tuple[str, bool, int]]:
    """Every import of a module: dotted name, whether it runs when the module is imported, and its line."""
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                # `from fleetgym import envs` names a part in the second place
                found.extend((f"{module}.{alias.name}", top, child.lineno) for alias in child.names)
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                visit(child, top and not function and not typing)

    visit(tree, True)
    return found


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def package_of(name: str) -> list[str]:
    inside = name.removeprefix("src/fleetgym/").removeprefix("src/")
    return ["fleetgym", *Path(inside).parent.parts]


def test_there_is_something_to_guard():
    assert len(CODE) > 20 and "src/fleetgym/core/files.py" in CODE and "pyproject.toml" in FILES


@pytest.mark.parametrize("part", [*PARTS, "root"])
def test_who_imports_whom(part):
    wrong = []
    top_level, lazy = PACKAGES[part]
    for name in CODE:
        if part_of(name) != part:
            continue
        world = next((extra for folder, extra in WORLDS.items() if name.startswith(folder)), set())
        for module, top, line in imports(parse(name), package_of(name)):
            root, _, rest = module.partition(".")
            if root in sys.stdlib_module_names:
                continue
            if root == "fleetgym":
                other = rest.partition(".")[0]
                fine = other not in PARTS or other in MAY_IMPORT[part]
                if part == "cli" and top:
                    fine = other in ("core", "cli")
            else:
                fine = root in top_level | world or (not top and (lazy is None or root in lazy))
            if not fine:
                wrong.append(f"{name}:{line} imports {module}{' at the top' if top else ''}")
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_imports_sees_them():
    tree = ast.parse(
        "import a.b\nfrom . import c\nfrom ..d import e\nif TYPE_CHECKING:\n    import f\n"
        "try:\n    import g\nexcept ImportError:\n    pass\ndef h():\n    from i import j\nclass K:\n    import l\n"
    )
    assert imports(tree, ["fleetgym", "envs"]) == [
        ("a.b", True, 1),
        ("fleetgym.envs.c", True, 2),
        ("fleetgym.d.e", True, 3),
        ("f", False, 5),
        ("g", True, 7),
        ("i.j", False, 11),
        ("l", True, 13),
    ]


def forbidden(tree: ast.Module) -> list[tuple[int, str]]:
    """Calls that can run code from a file they read."""
    bad = {"pickle": {"load", "Unpickler"}, "torch": {"load"}, "yaml": {"load", "unsafe_load", "full_load"}}
    bad |= {"cPickle": bad["pickle"], "dill": bad["pickle"], "cloudpickle": bad["pickle"], "joblib": {"load"}}
    names = {alias: module for module in bad for alias in (module,)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname and alias.name in bad}
        elif isinstance(node, ast.ImportFrom) and node.module in bad:
            found += [(node.lineno, a.name) for a in node.names if a.name in bad[node.module]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if module and node.attr in bad[module]:
                found.append((node.lineno, f"{module}.{node.attr}"))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append((node.value.lineno, "allow_pickle"))
    return found


def test_no_file_that_we_read_can_run_code():
    wrong = [f"{name}:{line} {call}" for name in SOURCES for line, call in forbidden(parse(name))]
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_calls_sees_them():
    text = (
        "import torch as t, pickle\nfrom yaml import load\nt.load(x)\npickle.load(f)\nnp.load(f, allow_pickle=True)\n"
    )
    assert sorted(line for line, _ in forbidden(ast.parse(text))) == [2, 3, 4, 5]
    assert forbidden(ast.parse("import pickle\npickle.loads(pickle.dumps(f))\nnp.load(f, allow_pickle=False)")) == []


def test_no_path_of_a_machine():
    # Written in pieces, so that this file does not find itself.
    places = [
        "/wo" + "rk/",
        "/ro" + "ot/",
        "/ho" + "me/",
        "/Use" + "rs/",
        "/opt/wh" + "eels",
        "/tm" + "p/",
    ]
    pattern = re.compile("|".join(rf"(?<![\w.$}}]){re.escape(place)}" for place in places))
    wrong = []
    for name in FILES:
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                wrong.append(f"{name}:{number} {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_import_is_silent_and_light():
    heavy = "torch mujoco metaworld scipy numba matplotlib tyro rich pybullet stable_baselines3 minari moviepy".split()
    code = f"import sys, fleetgym; print(sorted(set({heavy}) & set(sys.modules)), file=sys.stderr)"
    done = python(code, "-W", "error")
    assert done.returncode == 0 and done.stdout == "" and done.stderr.strip() == "[]", done.stderr


def test_import_is_quick():
    code = "import time, gymnasium\nbegin = time.process_time()\nimport fleetgym\nprint(time.process_time() - begin)"
    assert min(float(python(code).stdout) for _ in range(3)) < 0.5


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom fleetgym.cli import main\nassert main(['--help']) == 0 and main(['--version']) == 0\n"
        "assert main(['nonsense']) == 2\n"
        "sys.exit(str({'torch', 'mujoco', 'metaworld', 'tyro', 'scipy'} & set(sys.modules) or ''))"
    )
    done = python(code)
    assert done.stderr.strip().splitlines()[1:] == [] and all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("part", ["envs", "agents", "merging", "benchmarks", "assets"])
def test_a_part_has_one_name(part):
    """From the checkout's root, where Python finds the folder, the short name is refused."""
    done = python(f"import {part}", cwd=ROOT)
    assert done.returncode != 0 and f"import 'fleetgym.{part}', not '{part}'" in done.stderr
    assert python(f"import fleetgym.{part}", cwd=ROOT).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    done = subprocess.run(
        [sys.executable, "-m", "fleetgym", verb, "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and f"fleetgym {verb}" in done.stdout, done.stderr
    assert done.stderr == ""


def test_every_module_of_the_cli_is_a_verb_or_known():
    helpers = {"__init__", "options", "catalogue", "targets"}
    assert {Path(name).stem for name in CODE if part_of(name) == "cli"} - helpers <= set(VERBS)


def test_the_extras_are_those_of_the_package():
    from fleetgym.core.optional import EXTRAS

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    assert set(re.findall(r"^(\w+) = ", section, re.M)) == set(EXTRAS)


def test_the_pinned_set_covers_what_the_package_names():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    block += text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    named = set(re.findall(r'"([A-Za-z][\w-]*)', block))
    pinned = {name.lower() for name in re.findall(r"^([\w.-]+)==", pins, re.M)}
    assert {name.lower() for name in named} <= pinned, named - pinned
    assert "+" not in pins and "://" not in pins


def test_the_wheel_has_the_modules_of_the_checkout(tmp_path):
    """Builds a wheel without the network; hatchling is in the extra ``dev``."""
    code = f"import hatchling.build as build; print(build.build_wheel({str(tmp_path)!r}))"
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {"fleetgym/" + name.removeprefix("src/fleetgym/") for name in FILES if name.startswith("src/fleetgym/")}
    for part in ("envs", "agents", "merging", "benchmarks", "assets"):
        expected |= {f"fleetgym/{name}" for name in FILES if name.startswith(f"{part}/")}
    expected = {name for name in expected if not name.startswith("fleetgym/benchmarks/results/")}
    assert built == expected
