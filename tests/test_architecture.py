"""Imports go down: the folders and files of the package form floors, without circles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lpo_fast"
FLOORS = 12
LINES, LOCALS = 90, 35  # of a loop's _train


def modules() -> dict[str, Path]:
    """Return the modules of the package by their dotted names below it; kernels/ is a link, and part of it.
    """
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}


def imported(tree: ast.Module, names: dict[str, Path]) -> set[str]:
    """Return the modules of the package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lpo_fast":
            base = node.module.removeprefix("lpo_fast").lstrip(".")
            found |= {full if (full := f"{base}.{a.name}".lstrip(".")) in names else base for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("lpo_fast.") for a in node.names if a.name.startswith("lpo_fast.")}
    return {name if name in names else f"{name}.__init__" for name in found if name}


NAMES = modules()
FILES = {name: imported(ast.parse(file.read_text(encoding="utf-8")), NAMES) for name, file in NAMES.items()}
FILES = {name: targets - {name} for name, targets in FILES.items()}


def folders() -> dict[str, set[str]]:
    """Return which folders (or files of the top floor) import from which."""
    graph: dict[str, set[str]] = {}
    for name, targets in FILES.items():
        own = name.split(".")[0]
        graph.setdefault(own, set()).update({target.split(".")[0] for target in targets} - {own})
    return graph


def floors(graph: dict[str, set[str]]) -> int:
    """Return the number of floors; raises CycleError for a circle."""
    sorter, count = TopologicalSorter(graph), 0
    sorter.prepare()
    while sorter.is_active():
        sorter.done(*sorter.get_ready())
        count += 1
    return count


def test_every_import_is_found() -> None:
    assert (len(NAMES) > 60 and "method.schedule" in FILES["lpo.sampling"]
            and "kernels.pair_loss" in FILES["lpo.steps"])
    assert all(target in NAMES for targets in FILES.values() for target in targets), FILES


def test_no_circle_of_files_or_folders() -> None:
    """At most 12 floors of folders, so that a reader can say what stands on what."""
    try:
        floors(FILES)
        assert floors(folders()) <= FLOORS
    except CycleError as error:
        raise AssertionError(f"these import each other: {' -> '.join(error.args[1])}") from None


def test_folders_import_only_from_those_below() -> None:
    """The order is the one that lpo_fast/__init__.py and docs/design.md list."""
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    order = [words[0] for line in text.splitlines()
             if (words := line.split()) and (PACKAGE / words[0]).is_dir()]
    assert set(order) == {name.split(".")[0] for name in NAMES if "." in name}
    graph = folders()
    upward = [(own, other) for own in order for other in graph[own]
              if other in order and order.index(other) < order.index(own)]
    assert not upward, upward


def test_the_package_lists_its_folders() -> None:
    """What pyproject.toml installs is what there is."""
    listed = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    inside = {f"lpo_fast.{name.split('.')[0]}" for name in NAMES if "." in name}
    assert all(f'"{name}"' in listed for name in inside)


def test_the_loops_read_in_one_screen() -> None:
    for stage in ("train_lpo", "train_lrm"):
        loop, = (node for node in ast.parse(NAMES[stage].read_text(encoding="utf-8")).body
                 if isinstance(node, ast.FunctionDef) and node.name == "_train")
        names = {node.id for node in ast.walk(loop)
                 if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        names |= {argument.arg for argument in loop.args.args}
        closures = [node for node in ast.walk(loop) if isinstance(node, ast.FunctionDef | ast.Lambda)]
        assert loop.end_lineno - loop.lineno < LINES and len(names) <= LOCALS and closures == [loop], stage


def test_a_module_that_call_sites_name_needs_no_alias() -> None:
    """Its name is plural or ends in -ing, so no variable takes it.
    Two of one name, as lpo/steps and lrm/steps, may."""
    aliases = {}
    for name, file in NAMES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lpo_fast"):
                aliases |= {f"{name}: {a.name} as {a.asname}": node.module for a in node.names if a.asname}
    twice = {"lpo_fast.official", "lpo_fast.lrm", "lpo_fast.lpo", "lpo_fast.preflight", "lpo_fast.method"}
    assert not {alias for alias, module in aliases.items() if module not in twice}, aliases
