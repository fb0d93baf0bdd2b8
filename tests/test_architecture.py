"""Who may import whom, read from the source files; the table of docs/ARCHITECTURE.md."""

import ast
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "evaluation", "pruning", "search")
SCRIPT_MODULES = ("run_prune", "run_search")

# What the files of each package may not import. Later rows add to earlier ones.
FORBIDDEN = {
    "prunevolve/": (*PACKAGES, *SCRIPT_MODULES, "torch", "transformers"),
    "configs/": ("evaluation", "pruning", "search", "torch", "transformers"),
    "pruning/": ("configs", "search", *SCRIPT_MODULES),
    "evaluation/": ("configs", "pruning", "search", *SCRIPT_MODULES),
    "search/": SCRIPT_MODULES,
    "search/evolution.py": ("evaluation", "torch", "pathlib", "os"),
}
# Modules that only the files named may import.
RESERVED = {
    "ray": ("search/pool/",),
    "deap": ("search/breeding/",),
    "datasets": ("evaluation/",),
    "evaluation": ("evaluation/", "pruning/run/", "pruning/api.py", "search/", "run_prune.py"),
    "lm_eval": ("evaluation/zero_shot.py",),
}
TENSOR_READER = "pruning/run/result.py"
"""The module that may call torch.load: with weights_only=True, written out."""

PUBLIC_NAMES = "prunevolve/__init__.py"
"""The package file that hands out the public names."""

UNSAFE_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "builtins.eval", "builtins.exec", "gp.compile"),
    *("torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("gp.PrimitiveTree.from_string", "PrimitiveTree.from_string"),
}


def files(*patterns: str) -> list[str]:
    """Return the files of some patterns, relative to the root."""
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    # prunevolve/ has links to the scripts.
    return [path.relative_to(ROOT).as_posix() for path in found if not path.is_symlink()]


OURS = files(*(f"{package}/**/*.py" for package in (*PACKAGES, "prunevolve")), "run_*.py")


@cache
def syntax(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            yield from (str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for such an expression; what is not a name reads `?`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@cache
def imported_by(file: str) -> set[str]:
    """Return what a file imports; of our own, without the name of the package around all."""
    return {name.removeprefix("prunevolve.") for name in imports(syntax(file))}


def packages_imported_by(file: str) -> set[str]:
    return {name.partition(".")[0] for name in imported_by(file)}


@cache
def files_imported_by(file: str) -> set[str]:
    """Return our files that a file imports, at its beginning or later."""
    paths = [name.replace(".", "/") for name in imported_by(file)]
    found = (f"{path}{end}" for path in paths for end in (".py", "/__init__.py"))
    parents = (f"{path.rpartition('/')[0]}.py" for path in paths)
    return {*found, *parents} & set(OURS)


def reached_from(file: str) -> set[str]:
    """Return our files that are loaded with this one, itself included."""
    reached, waiting = set(), [file]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += files_imported_by(current)
    return reached


def test_imports_are_none_that_a_files_place_forbids():
    for file, (place, forbidden) in product(OURS, FORBIDDEN.items()):
        if file.startswith(place) and file != PUBLIC_NAMES:
            assert packages_imported_by(file) & set(forbidden) == set(), file


def test_reserved_modules_are_imported_only_where_they_belong():
    for file, (module, places) in product(OURS, RESERVED.items()):
        assert module not in packages_imported_by(file) or file.startswith(places), file


def test_no_file_imports_itself_by_way_of_others_not_even_inside_functions():
    for file in OURS:
        if file != PUBLIC_NAMES:  # it hands out names of files that need not know it
            circle = {x for x in files_imported_by(file) if file in reached_from(x)}
            assert circle == set(), file


def test_run_prune_loads_neither_the_search_nor_configs_even_indirectly():
    loaded = reached_from("run_prune.py")
    assert "pruning/metric.py" in loaded
    assert [file for file in loaded if file.startswith(("search/", "configs/"))] == []


def test_files_neither_evaluate_text_nor_unpickle_nor_trust_remote_code():
    for file in OURS + files("benchmarks/**/*.py", "scripts/**/*.py"):
        assert packages_imported_by(file) & UNSAFE_IMPORTS == set(), file
        for node in ast.walk(syntax(file)):
            if isinstance(node, ast.Call) and dotted(node.func) in UNSAFE_CALLS:
                assert (file, dotted(node.func)) == (TENSOR_READER, "torch.load")
                assert "weights_only=True" in ast.unparse(node)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, file
