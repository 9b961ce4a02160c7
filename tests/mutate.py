"""Change a script one place at a time and list the changes that its tests do not notice.

    python tests/mutate.py aihf_sac_mujoco.py tests/test_sac_mujoco.py FIRST LAST -k loop

Each change is tried by `pytest -x -q` on a copy of the repository in a temporary folder, in a fork
of this process, which has run the tests once. Without FIRST and LAST, lines: the whole script.
"""

import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT, SECONDS = Path(__file__).resolve().parents[1], 100  # after which an endless loop is noticed
SWAP = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.And: ast.Or, ast.BitOr: ast.BitAnd}
SWAP |= {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq} | {b: a for a, b in SWAP.items()}
SWAP |= {ast.GtE: ast.Gt, ast.LtE: ast.Lt, ast.Pow: ast.Mult, ast.Mod: ast.Add}
FLIP = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}


def changes(node):
    """Pairs: this node, or the condition of an if or a while, and what is to stand in its place."""

    def with_field(name: str, value) -> ast.AST:
        new = copy.copy(node)
        setattr(new, name, value)
        return new

    if new := SWAP.get(type(getattr(node, "op", None))):
        yield node, with_field("op", new())
    for i, op in enumerate(getattr(node, "ops", [])):
        for new in filter(None, (SWAP.get(type(op)), FLIP.get(type(op)))):
            yield node, with_field("ops", [*node.ops[:i], new(), *node.ops[i + 1 :]])
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value = not node.value if type(node.value) is bool else node.value + 1
        for new in {value, 2 * node.value or 1} if type(value) is not bool else {value}:
            yield node, ast.Constant(new)
    if isinstance(node, ast.UnaryOp):
        yield node, node.operand
    if isinstance(node, ast.IfExp):
        yield from ((node, node.body), (node, node.orelse))
    for field in ("args", "elts"):  # two neighbours change places
        values = getattr(node, field, None)
        symmetric = isinstance(node, ast.Call) and ast.unparse(node.func) in ("min", "max")
        for i in range(len(values) - 1 if isinstance(values, list) and not symmetric else 0):
            swapped = [*values[:i], values[i + 1], values[i], *values[i + 2 :]]
            yield node, with_field(field, swapped)
    if isinstance(node, (ast.Assign, ast.AugAssign)) or is_statement(node):
        yield node, ast.Pass()
    if isinstance(node, (ast.If, ast.While)):
        for new in (False, True)[: 1 + isinstance(node, ast.If)]:
            yield node.test, ast.Constant(new)


def is_statement(node) -> bool:
    return isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)


def outside_texts(node):
    """All nodes but those inside f-strings, whose places Python does not know before 3.12."""
    yield node
    for child in ast.iter_child_nodes(node) if not isinstance(node, ast.JoinedStr) else ():
        yield from outside_texts(child)


def mutants(source: str, first: int, last: int):
    """(line, old text, new text, whole new source) of every change between these lines."""
    lines = source.encode().splitlines(keepends=True)
    for node in outside_texts(ast.parse(source)):
        for old, new in changes(node) if first <= getattr(node, "lineno", 0) <= last else ():
            before, after = ast.unparse(old), ast.unparse(new)
            slices = any(isinstance(part, ast.Slice) for part in getattr(new, "elts", []))
            inserted = (
                after if isinstance(new, ast.stmt) else after[1:-1] if slices else f"({after})"
            )
            head = b"".join(lines[: old.lineno - 1]) + lines[old.lineno - 1][: old.col_offset]
            tail = lines[old.end_lineno - 1][old.end_col_offset :] + b"".join(
                lines[old.end_lineno :]
            )
            yield node.lineno, before, after, (head + inserted.encode() + tail).decode()


def passes(arguments: list[str]) -> bool:
    if (child := os.fork()) == 0:
        signal.alarm(SECONDS)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
    return os.waitpid(child, 0)[1] == 0


def main(script: str, tests: str, *rest: str) -> None:
    numbers = rest and rest[0].isdigit()
    lines, rest = ([*map(int, rest[:2])], rest[2:]) if numbers else ([1, 10**9], rest)
    arguments = [tests, *rest]
    folder = Path(tempfile.mkdtemp()) / "copy"
    ignored = shutil.ignore_patterns(".*", "runs", "wandb", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    os.chdir(folder)
    if pytest.main(["-x", "-q", *arguments]):  # here, which leaves the libraries ready for forks
        raise SystemExit("the tests fail on the script as it is")
    sys.modules.pop("data_gen", None)  # a namespace, which has no file
    for name, module in list(sys.modules.items()):
        if str(folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]
    count, unnoticed = 0, 0
    for count, mutant in enumerate(mutants((ROOT / script).read_text(), *lines), start=1):
        (folder / script).write_text(mutant[-1])
        shutil.rmtree((folder / script).parent / "__pycache__", ignore_errors=True)
        if passes(arguments):
            unnoticed += 1
            print("{}: {}  ->  {}".format(*mutant), flush=True)
    print(f"{unnoticed} of {count} changes went unnoticed")
    shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main(*sys.argv[1:])
