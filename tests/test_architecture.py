"""The house rules that a machine can check: who imports whom, and what no file may do.

The table is the one in docs/design.md, "What may import what". Every file of the
package is parsed, none is imported, so imports inside functions count too.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "m2mkd_ray"

DOMAIN = {"errors", "blueprint"}
BELOW_STAGES = DOMAIN | {"execution", "data", "models", "training", "reporting", "evaluation"}
ABOVE_STAGES = BELOW_STAGES | {"stages", "recipe", "recipes", "slices", "pipeline", "preflight"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "blueprint": set(),
    "yaml_files": {"errors"},
    "execution": {"errors"},
    "data": DOMAIN,
    "models": DOMAIN,
    "training": DOMAIN,
    "reporting": DOMAIN,
    "evaluation": DOMAIN | {"data", "models"},
    "stages": BELOW_STAGES,
    "recipe": DOMAIN | {"execution.stage", "stages", "data", "training", "yaml_files"},
    "recipes": DOMAIN | {"execution.stage", "stages", "data", "models", "recipe"},
    "slices": DOMAIN | {"execution.stage", "stages", "data", "models", "evaluation", "recipe"},
    "pipeline": DOMAIN | {"execution.stage", "stages", "recipe", "recipes", "slices"},
    "preflight": BELOW_STAGES | {"stages", "recipe", "recipes", "slices", "pipeline"},
    "submission": {"errors", "yaml_files"},
    "sweeps": ABOVE_STAGES | {"yaml_files"},
    "cli": ABOVE_STAGES | {"yaml_files", "submission", "sweeps", "commands"},
}
"""What each room may import of ours, besides itself (but see `stages`). A dotted name is that file only."""

NO_STAGE: set[str] = {"stages.group", "stages.pair", "stages.parts", "stages.ranks"}
"""Files in `stages/` that hold no stage, which stages may therefore import (`stages.<file>`)."""

OF_CLI = re.compile(r"cli(_\w+)?|commands|__main__")
"""Files and folders that are part of the room `cli`."""

ONLY_IN = {
    "ray": (
        "execution/",
        "submission/",
        "sweeps/",
        *(f"stages/{file}.py" for file in ("finetune", "group", "pair", "ranks")),
    ),
    "deepspeed": ("training/engine.py",),
}
"""Who may import the heavy libraries, besides the room `cli`; the domain runs without them."""

MAX_LINES = 400


@dataclass(frozen=True)
class Import:
    """An import statement's target."""

    name: str
    line: int
    in_function: bool


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT / PACKAGE).as_posix()


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def room(file: Path) -> str | None:
    """The room that a file belongs to; None for the package's own `__init__.py`."""
    first = file.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
    if OF_CLI.fullmatch(first):
        return "cli"
    return None if first == "__init__" else first


@cache
def imports(file: Path) -> tuple[Import, ...]:
    """Every import of a file, relative ones made absolute; of `from a import b` it is `a.b`."""
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[Import]:
    package = (PACKAGE, *file.relative_to(ROOT / PACKAGE).parts[:-1])
    in_functions = {
        id(inner)
        for function in ast.walk(tree(file))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(function)
    }
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, id(node) in in_functions)


def ours(file: Path) -> Iterator[tuple[str, Import]]:
    """A file's imports from the package, as dotted names below it: `data.feed.Batches`."""
    for found in imports(file):
        if found.name.startswith(f"{PACKAGE}."):
            yield found.name.removeprefix(f"{PACKAGE}."), found


def is_within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


def complain(problems: Iterable[str]) -> None:
    """Fail with all problems of all files."""
    if problems := list(problems):
        pytest.fail("\n".join(problems), pytrace=False)


def test_files_are_in_a_known_room() -> None:
    complain(
        f"{relative(file)} is in the room {room(file)!r}, which the table MAY_IMPORT does not have: "
        f"{', '.join(MAY_IMPORT)}. Put it in one of these, or add a row here and in docs/design.md."
        for file in FILES
        if room(file) is not None and room(file) not in MAY_IMPORT
    )


def test_rooms_import_only_what_the_table_allows() -> None:
    def may(file: Path) -> set[str]:
        home = room(file)
        return set() if home is None else {home, "__version__", *MAY_IMPORT.get(home, ())}

    complain(
        f"{relative(file)}:{found.line} imports {name}, allowed: {', '.join(sorted(may(file))) or 'nothing of ours'}"
        for file in FILES
        for name, found in ours(file)
        if not any(is_within(name, entry) for entry in may(file))
    )


def test_stages_import_no_other_stage() -> None:
    complain(
        f"{relative(file)}:{found.line} imports {name}, allowed: no other stage file"
        for file in FILES
        if room(file) == "stages" and file.stem != "__init__"
        for name, found in ours(file)
        if is_within(name, "stages")
        and not any(is_within(name, entry) for entry in (*NO_STAGE, f"stages.{file.stem}"))
    )


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_where_they_belong(library: str) -> None:
    complain(
        f"{relative(file)}:{found.line} imports {found.name}, allowed in: {', '.join(ONLY_IN[library])}"
        for file in FILES
        if room(file) != "cli" and not relative(file).startswith(ONLY_IN[library])
        for found in imports(file)
        if is_within(found.name, library)
    )


def test_deepspeed_is_imported_inside_the_function_that_needs_it() -> None:
    complain(
        f"{relative(file)}:{found.line} imports deepspeed at the top of the file; it takes seconds and looks for "
        f"a compiler, and Ray's controller would do so on a head without GPU (ray-project/ray#50406)"
        for file in FILES
        for found in imports(file)
        if is_within(found.name, "deepspeed") and not found.in_function
    )


def test_only_the_command_line_prints() -> None:
    complain(
        f"{relative(file)}:{node.lineno} calls print(); use logger, context.report, or return a value"
        for file in FILES
        if room(file) != "cli"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    )


def undocumented(file: Path) -> Iterator[str]:
    """The file itself, and its public functions, classes and their methods, where they have no docstring."""
    if ast.get_docstring(tree(file)) is None:
        yield f"{relative(file)}:1 has no file docstring"
    if file.stem.startswith("_"):
        return
    for name, node in public(tree(file).body):
        if ast.get_docstring(node) is None:
            yield f"{relative(file)}:{node.lineno} {name} has no docstring"


def public(body: list[ast.stmt], of: str = "") -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Functions, classes and, inside of these, methods whose names do not start with an underscore."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield of + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{of}{node.name}.")


def test_what_is_public_has_a_docstring() -> None:
    complain(problem for file in FILES for problem in undocumented(file))


def test_files_can_be_read_in_one_sitting() -> None:
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    complain(
        f"{relative(file)} has {count} lines, more than {MAX_LINES}: cut it by topic"
        for file, count in lines.items()
        if count > MAX_LINES
    )


def test_weights_are_never_loaded_partially() -> None:
    complain(
        f"{relative(file)}:{node.value.lineno} says strict=False; `fill` lists every misfit instead"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.keyword) and node.arg == "strict" and ast.unparse(node.value) == "False"
    )


def test_no_exception_is_swallowed() -> None:
    complain(
        f"{relative(file)}:{node.lineno} catches {ast.unparse(node.type) if node.type else 'everything'} and "
        f"says nothing; catch what can be handled, near to where it happens"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    )
