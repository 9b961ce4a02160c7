"""README.md against the code: its commands parse, its links lead somewhere, its extras exist.

python -m pytest tests/test_readme.py
"""

import ast
import contextlib
import importlib.util
import io
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings this one along
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
TEXT = README.read_text() if README.is_file() else ""
BLOCKS = [body for language, body in FENCE.findall(TEXT) if language in ("bash", "sh", "shell", "console")]
PROSE = re.sub(r"`[^`\n]*`", "``", FENCE.sub("", TEXT))  # without code
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def commands(block: str) -> list[list[str]]:
    """The words of each command of a bash block; a `for` loop's variable takes each of its values in turn."""
    block = re.sub(r"\\\n\s*", " ", block)
    loops = {name: values.split() for name, values in re.findall(r"\bfor (\w+) in ([^;\n]+?)\s*[;\n]\s*do\b", block)}
    found = []
    for line in block.splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        separators = {"&&", "||", ";", "&", "|", "do"}
        parts = [list(part) for end, part in itertools.groupby(lexer, separators.__contains__) if not end]
        for part in parts:
            while part and (re.fullmatch(r"\w+=.*", part[0]) or part[0] in ("do", "nohup", "time", "")):
                part = part[1:]
            used = [name for name in loops if re.search(rf"\$\{{?{name}\b", " ".join(part))]
            for values in itertools.product(*(loops[name] for name in used)):
                filled = part
                for name, value in zip(used, values):
                    filled = [re.sub(rf"\$(?:{name}\b|\{{{name}\}})", value, word) for word in filled]
                found.append(filled)
    return [words for words in found if words]


COMMANDS = [words for block in BLOCKS for words in commands(block)]
SCRIPTS = [words[1:] for words in COMMANDS if words[0] in ("python", "python3") and words[1:] and words[1][0] != "-"]
PIPS = [words for words in COMMANDS if "pip" in words[:3] and "install" in words]


def test_readme_has_commands():
    assert README.is_file(), "there is no README.md"
    assert BLOCKS, "README.md has no ```bash block"
    assert SCRIPTS, "no ```bash block of README.md has a line that begins with `python <script>.py`"
    assert PIPS, "no ```bash block of README.md installs anything with pip"


def test_nothing_is_left_to_fill_in():
    """Neither in README.md nor in a script's header: no line that is a placeholder in capitals, no TODO."""
    for path in (README, *ROOT.glob("*.py"), *ROOT.glob("data_gen/*.py")):
        left = re.findall(r"^[ \t]*[A-Z]+(?:_[A-Z]+)+[ \t]*$|\bTODO\b|_TODO\b", path.read_text(), re.MULTILINE)
        assert not left, f"{path.name} still holds {left}"


def test_commands_are_read_as_bash_would():
    """The reader above, on what it has to understand."""
    block = """# a comment
for s in 1 2; do
  A=1 python x.py --seed $s \\
    --name 'a b'  # twice
done
cd x && pip install y; ls
"""
    assert commands(block) == [
        ["for", "s", "in", "1", "2"],
        ["python", "x.py", "--seed", "1", "--name", "a b"],
        ["python", "x.py", "--seed", "2", "--name", "a b"],
        ["done"],
        ["cd", "x"],
        ["pip", "install", "y"],
        ["ls"],
    ]
    one_line = "for e in A B; do python x.py --env ${e}-v4; done"
    assert [words for words in commands(one_line) if words[0] == "python"] == [
        ["python", "x.py", "--env", "A-v4"],
        ["python", "x.py", "--env", "B-v4"],
    ]


def parse(path: Path, argv: list[str]):
    """What the script's own first call of tyro.cli would make of these arguments; the script is not run."""
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tyro.cli"
    ]
    assert calls, f"{path.name} does not read its arguments with tyro"
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their types
    try:
        spec.loader.exec_module(module)
        return tyro.cli(eval(ast.unparse(calls[0].args[0]), vars(module)), args=argv)
    finally:
        del sys.modules[spec.name]


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_command_parses(words):
    path = ROOT / words[0]
    assert path.is_file(), f"README.md runs {words[0]}, which is not there"
    argv = list(itertools.takewhile(lambda word: not re.fullmatch(r"\d?>.*|<.*", word), words[1:]))
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            parse(path, argv)
    except SystemExit as stop:
        assert stop.code == 0, f"python {' '.join(words)}\n{err.getvalue()}"  # 0 is --help


def test_unknown_flags_are_noticed():
    """The test above can fail."""
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()):
        parse(ROOT / "aihf_sac_mujoco.py", ["--no-such-flag", "1"])
    assert stop.value.code == 2
    assert parse(ROOT / "aihf_sac_mujoco.py", ["--seed", "7"]).seed == 7


@pytest.mark.parametrize("words", PIPS, ids=" ".join)
def test_extras_exist(words):
    extras = PYPROJECT["project"]["optional-dependencies"]
    for word in words:
        named = re.fullmatch(r"(?:\.|aihf)\[([^\]]*)\]", word)
        for extra in named[1].split(",") if named else ():
            assert extra.strip() in extras, f"pyproject.toml has no extra {extra!r}: {', '.join(extras)}"


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


LINKS = [*re.findall(r"\]\(\s*<?([^)\s>]+)", PROSE), *re.findall(r"(?:src|href)=[\"']([^\"']+)", PROSE)]
LINKS += re.findall(r"^\[[^\]]+\]:\s*(\S+)", PROSE, re.MULTILINE)
INSIDE = sorted({link for link in LINKS if not re.match(r"[a-z]+:", link)})


@pytest.mark.parametrize("link", INSIDE)
def test_link_leads_somewhere(link):
    path, _, anchor = link.partition("#")
    target = README if not path else ROOT / path
    assert target.exists(), f"README.md links to {path}, which is not there"
    assert target.resolve().is_relative_to(ROOT.resolve()), f"README.md links to {path}, outside the repository"
    if anchor and target.suffix == ".md":
        headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", target.read_text()), re.MULTILINE)
        assert anchor in map(slug, headings), f"README.md links to {link}, but there is no such heading"


def test_scripts_are_installed_as_no_module(tmp_path):
    """`pip install -e .` brings the dependencies and nothing to import: neither a package nor the scripts."""
    assert PYPROJECT["tool"]["setuptools"]["py-modules"] == []
    setuptools_dist = pytest.importorskip("setuptools.dist")
    distribution = setuptools_dist.Distribution({"src_root": str(ROOT)})
    distribution.parse_config_files([str(ROOT / "pyproject.toml")])
    distribution.set_defaults()
    assert not distribution.packages and not distribution.py_modules and not distribution.ext_modules
    scripts = [path.stem for path in ROOT.glob("*.py")]
    assert scripts
    code = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    argv = [sys.executable, "-I", "-c", code, "aihf", "data_gen", "benchmark", *scripts]
    assert subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip() == "[]"
