"""Change a script one place at a time and list the changes that its tests do not notice.

    python tests/mutate.py aihf_sac_mujoco.py tests/test_sac_mujoco.py FIRST LAST -k loop

Each change is tried by `pytest -x -q` on a copy of the repository in a temporary folder, in a fork
of this process, which has run the tests once. Without FIRST and LAST, lines: the whole script.
"""

import ast
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
    """Functions that change the node in place, or return another to stand in its place."""
    for field, op in (("op", getattr(node, "op", None)), ("ops", getattr(node, "ops", [None])[0])):
        for new in filter(None, (SWAP.get(type(op)), FLIP.get(type(op)))):
            yield lambda n, f=field, new=new(): setattr(n, f, [new] if f == "ops" else new)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value = not node.value if type(node.value) is bool else node.value + 1
        for new in {value, 2 * node.value or 1} if type(value) is not bool else {value}:
            yield lambda n, new=new: setattr(n, "value", new)
    if isinstance(node, ast.UnaryOp):
        yield lambda n: n.operand
    if isinstance(node, ast.IfExp):
        yield from (lambda n: n.body, lambda n: n.orelse)
    for field in ("args", "elts"):  # two neighbours change places
        values = getattr(node, field, None)
        symmetric = isinstance(node, ast.Call) and ast.unparse(node.func) in ("min", "max")
        for i in range(len(values) - 1 if isinstance(values, list) and not symmetric else 0):
            yield lambda n, f=field, i=i: getattr(n, f).insert(i, getattr(n, f).pop(i + 1))
    if isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign)):
        yield lambda n: ast.Pass()
    if isinstance(node, (ast.If, ast.While)):
        for new in (False, True)[: 1 + isinstance(node, ast.If)]:
            yield lambda n, new=new: setattr(n, "test", ast.Constant(new))


def mutants(source: str, first: int, last: int):
    """(line, old text, new text, whole new source) of every change between these lines."""
    for number, node in enumerate(ast.walk(ast.parse(source))):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for change in changes(node) if first <= getattr(node, "lineno", 0) <= last else ():
            nodes = list(ast.walk(tree := ast.parse(source)))
            node, before = nodes[number], ast.unparse(nodes[number]).split("\n")[0]
            if (new := change(node)) is not None:
                for parent in nodes:
                    for field, value in ast.iter_fields(parent):
                        if value is node:
                            setattr(parent, field, new)
                        elif isinstance(value, list) and node in value:
                            value[value.index(node)] = new
            if not text:
                after = ast.unparse(new or node).split("\n")[0]
                yield node.lineno, before, after, ast.unparse(ast.fix_missing_locations(tree))


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
