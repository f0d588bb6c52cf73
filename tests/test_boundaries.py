"""The house rules: who may import whom, how large things may grow, what may not be named."""

import ast
import fnmatch
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import actors
import ocrm_ray

ROOT = Path(ocrm_ray.__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "ocrm_ray").rglob("*.py"))
ACTORS = sorted((ROOT / "actors").rglob("*.py"))
SOURCES = LIBRARY + ACTORS

OWN = {"ocrm_ray", "actors"}
CLUSTER = {"ray", "vllm", "deepspeed"}
LIGHT = {"torch", "numpy", "pydantic", "yaml", "ocrm_ray"}
HEAVY = CLUSTER | {"transformers", "datasets", "matplotlib"}
LAUNCHERS = {"cli.py", "launcher.py", "study.py"}

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 6
MAX_TOTAL_LINES = 13_000
"""Of those that are not blank. The design asked for 10,000; five issues fill 11,100."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imported_names(node: ast.AST, package: str) -> list[str]:
    """Dotted modules that one node imports, by statement or by a call of ``import_module`` or ``__import__``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level == 0:
            return [node.module or ""]
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        return [".".join([*parents, node.module or ""])]
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}
    if is_call and node.args and isinstance(node.args[0], ast.Constant):
        return [str(node.args[0].value)]
    return []


def executed_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not function bodies, not ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if is_type_checking(child):
            continue
        yield child
        yield from executed_on_import(child)


def imports(path: Path, *, on_import_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ".".join(path.relative_to(ROOT).parent.parts)
    nodes = executed_on_import(tree) if on_import_only else ast.walk(tree)
    return {name for node in nodes for name in imported_names(node, package)}


def foreign(modules: set[str], allowed: set[str]) -> set[str]:
    """Top-level packages that are neither standard library nor allowed."""
    return {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - allowed


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Keyword-only, ``*args`` and ``**kwargs`` count; ``self`` and ``cls`` do not."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    variadic = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return len([argument for argument in [*named, *variadic] if argument.arg not in {"self", "cls"}])


@pytest.mark.parametrize("path", sorted((ROOT / "ocrm_ray" / "algorithm").glob("*.py")), ids=name_of)
def test_algorithm_imports_only_the_standard_library_torch_and_itself(path: Path):
    modules = imports(path)
    assert foreign(modules, {"torch", "ocrm_ray"}) == set()
    own = {module for module in modules if module.split(".")[0] in OWN}
    assert all(module.startswith("ocrm_ray.algorithm") for module in own), own


@pytest.mark.parametrize("name", ["config.py", "cluster_config.py", "reward_config.py", "gold_config.py"])
def test_config_imports_only_the_standard_library_and_pydantic(name: str):
    modules = imports(ROOT / "ocrm_ray" / name)
    assert foreign(modules, {"pydantic", "ocrm_ray"}) == set()
    sections = {"ocrm_ray.cluster_config", "ocrm_ray.reward_config", "ocrm_ray.gold_config"}
    assert {module for module in modules if module.startswith("ocrm_ray")} <= sections


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_never_imports_ray_vllm_or_deepspeed(path: Path):
    assert {module.split(".")[0] for module in imports(path)} & CLUSTER == set()


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_modules_load_nothing_beyond_the_light_set(path: Path):
    assert foreign(imports(path, on_import_only=True), LIGHT) == set()


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_only_launchers_reach_actors_and_only_lazily(path: Path):
    reaches = {module for module in imports(path) if module.split(".")[0] == "actors"}
    loads = {module for module in imports(path, on_import_only=True) if module.split(".")[0] == "actors"}
    assert not loads
    assert not reaches or (path.parent == ROOT / "ocrm_ray" and path.name in LAUNCHERS), reaches


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_importing_the_whole_library_in_a_fresh_process_loads_nothing_heavy():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in LIBRARY if path.stem != "__main__"]
    code = f"""
import importlib, json, sys
loaded = {{}}
for module in {modules!r}:
    importlib.import_module(module.removesuffix(".__init__"))
    for name in {sorted(HEAVY | {"actors"})!r}:
        if name in sys.modules:
            loaded.setdefault(name, module)
print(json.dumps(loaded))
"""
    assert json.loads(run_python(code).splitlines()[-1]) == {}, "package: the module whose import first loaded it"


def test_importing_the_configuration_does_not_load_torch():
    assert run_python("import sys, ocrm_ray.config; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_and_its_functions_stay_within_the_size_limits(path: Path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_MODULE_LINES
    for function in functions(path):
        assert function.end_lineno - function.lineno + 1 <= MAX_FUNCTION_LINES, function.name
        assert num_parameters(function) <= MAX_PARAMETERS, function.name


def test_both_packages_together_stay_within_the_total():
    lines = [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(1 for line in lines if line.strip()) < MAX_TOTAL_LINES


def own_paths() -> list[Path]:
    """Files and folders of the project's own top-level folders."""
    roots = [ROOT / name for name in ("ocrm_ray", "actors", "configs", "deploy", "docker", "tests")]
    return [path for root in roots for path in [root, *root.rglob("*")] if "__pycache__" not in path.parts]


def test_no_module_has_a_name_that_says_nothing():
    stems = {name_of(path): path.stem for path in own_paths() if path.is_dir() or path.suffix == ".py"}
    vague = {"utils", "util", "helpers", "helper", "common", "types", "misc"}
    assert [name for name, stem in stems.items() if stem in vague or stem.endswith("_manager")] == []


def test_no_module_or_folder_shadows_a_dependency():
    stems = {name_of(path): path.stem for path in own_paths() if path.is_dir() or path.suffix == ".py"}
    assert [name for name, stem in stems.items() if stem in {"datasets", "ray", "vllm", "torch"}] == []


def test_there_is_no_top_level_folder_beyond_the_six():
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if line.endswith("/")]
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    present = {name for name in folders if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert present - {"ocrm_ray", "actors", "configs", "deploy", "docker", "tests"} == set()


@pytest.mark.parametrize("folder", ["configs", "deploy", "docker", "tests"])
def test_folders_that_are_not_packages_have_no_init(folder: str):
    assert [name_of(path) for path in (ROOT / folder).rglob("__init__.py")] == []


def test_actors_is_the_package_beside_the_library():
    assert Path(actors.__file__).resolve() == ROOT / "actors" / "__init__.py"
