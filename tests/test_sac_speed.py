"""benchmark/sac_speed.py, without the libraries it measures: its tables, its csv, and what it asks
of our own script.

python -m pytest tests/test_sac_speed.py      (seconds; nothing is trained)
"""

import csv
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmark" / "sac_speed.py"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def speed():
    return load(SCRIPT)


def rows(speed, hidden: str, **speeds: list[float]) -> list[dict]:
    """Rows of three rounds; libraries not named run at 1 step a second."""
    table = [(name, speeds.get(name.replace("-", "_"), [1.0, 1.0, 1.0])) for name in speed.TURNS]
    return [
        dict(zip(speed.COLUMNS, (name, hidden, 256, number, value)))
        for name, values in table
        for number, value in enumerate(values, start=1)
    ]


def test_summary_takes_the_median_of_the_rounds_ratios(speed):
    text = speed.summary(rows(speed, "64x64", aihf=[100, 400, 900], sb3=[10, 200, 100]))
    cells = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert cells["aihf"] == ["400", "100", "900"] and cells["sb3"] == ["100", "10", "200"]
    assert cells["aihf / sb3"] == ["9.00", "10.00", "2.00", "9.00"]  # not 400 / 100
    assert cells["aihf / sbx"] == ["400.00", "100.00", "400.00", "900.00"]


def test_save_replaces_only_the_rows_of_the_same_networks_and_batch(speed, tmp_path):
    path = tmp_path / "results" / "sac_speed.csv"
    for hidden, value in (("64x64", 1), ("256x256", 2), ("64x64", 3)):
        speed.save(path, rows(speed, hidden, aihf=[value] * 3))
    assert path.read_text().splitlines()[0] == "library,hidden,batch,round,steps_per_second"
    with open(path, newline="") as file:
        read = [row for row in csv.DictReader(file) if row["library"] == "aihf"]
    assert [(row["hidden"], row["steps_per_second"]) for row in read] == [("256x256", "2")] * 3 + [
        ("64x64", "3")
    ] * 3


@pytest.mark.parametrize(("library", "iteration"), [("aihf", 5_000), ("aihf-lower-level", 20_000)])
def test_our_side_is_the_shipped_script_with_flags_it_has(speed, monkeypatch, library, iteration):
    ours = load(ROOT / "aihf_sac_mujoco.py")
    defaults = ours.Args()
    assert (speed.BLOCK, speed.ITERATION) == (ours.BLOCK, defaults.policy_steps_per_iteration)
    assert speed.MEMORY == defaults.rollout_memory

    def run(script, *flags):
        """Stands in for the run: what it would log, at 1 step a second while it warms up, then at
        300 and 600."""
        asked = tyro.cli(ours.Args, args=flags)
        assert (ROOT / script).is_file() and asked.compile and asked.threads == 1
        assert (asked.policy_steps_per_iteration, asked.hidden, asked.batch_size) == (
            iteration,
            (256, 256),
            64,
        )
        first = asked.total_timesteps - 20_000
        assert asked.learning_starts == 49_000 < 50_000 <= first and first % iteration == 0
        folder = Path(asked.runs_dir) / asked.run_name
        folder.mkdir()
        rows = ("charts/sac_steps,charts/SPS", "0,", f"{first},1", f"{first + 1},300")
        (folder / "metrics.csv").write_text("\n".join((*rows, f"{first + 2},600\n")))
        return ""

    monkeypatch.setattr(speed, "run", run)
    args = speed.Args(hidden=(256, 256), batch_size=64, steps=20_000)
    # 2 iterations of n steps in n / 300 + n / 600 seconds
    assert speed.measure_ours(library, args, seed=1) == pytest.approx(400)


@pytest.mark.parametrize(("script", "library"), [("sac_speed", "sbx"), ("llm_speed", "trl")])
def test_missing_libraries_are_one_line_and_exit_code_2(monkeypatch, capsys, script, library):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else find_spec(name)
    )
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT.with_name(f"{script}.py")), run_name="__main__")
    out, err = capsys.readouterr()
    assert (
        (end.value.code, out, err.count("\n")) == (2, "", 1)
        and "pip install -e '.[speed]'" in err
        and library in err
    )
