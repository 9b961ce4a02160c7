"""benchmark/llm_speed.py and llm_memory.py, without the library that one measures: their tables,
what they ask of our scripts, and the arithmetic of memory against what is easily counted.

python -m pytest tests/test_llm_speed.py      (half a minute; nothing is trained)
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmark" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def speed():
    return load("llm_speed")


@pytest.fixture(scope="module")
def memory():
    return load("llm_memory")


def test_summary_takes_the_median_of_the_rounds_ratios(speed):
    seconds = {"dpo": (1, 2, 9), "trl-dpo": (10, 4, 9)}
    rows = [
        {"training": "dpo", "what": what, "seconds_per_step": x}
        for what, numbers in seconds.items()
        for x in numbers
    ]
    cells = {line[:34].strip(): line[34:].split() for line in speed.summary(rows).splitlines()}
    assert cells["dpo"] == ["2.000", "1.000", "9.000"]
    assert cells["trl-dpo"] == ["9.000", "4.000", "10.000", "2.00:", "10.00", "2.00", "1.00"]


@pytest.mark.parametrize("training", ["dpo", "remax", "ppo"])
def test_our_side_is_the_shipped_script_with_flags_it_has(speed, monkeypatch, training):
    def run(script, *flags):
        """Stands in for the run: steps of 2 seconds after a first one of 50, a last one of 90."""
        module = importlib.import_module(script.removesuffix(".py"))
        asked = tyro.cli(module.Args, args=flags)
        assert asked.demo_weight == 0 and asked.learning_rate == speed.RATE and asked.threads == 1
        if training == "dpo":
            steps, size = asked.dpo_steps, asked.batch_size
            assert size == speed.PAIRS
        else:
            steps, size = asked.ppo_steps, asked.batch_size
            assert asked.policy_steps_per_iteration > steps and size == speed.RESPONSES
            assert (asked.minibatch_size, asked.ppo_epochs) == (32, 2)
            assert asked.policy_optimizer == training
        assert asked.eval_every > steps and steps == speed.STEPS[training] + 2
        times = [0, *(50 + 2 * i for i in range(steps - 1)), 140]
        folder = Path(asked.runs_dir) / asked.run_name
        folder.mkdir()
        rows = ["charts/wall_seconds", *map(str, times)]
        (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
        return ""

    monkeypatch.setattr(speed, "run", run)
    assert speed.measure_ours(training, seed=1) == 2


def test_floor_of_each_training_is_measured(speed):
    assert all(speed.measure_floor(training, repeats=1) > 0 for training in speed.TURNS)


def test_parameters_are_those_of_the_hub(memory):
    """124, 135, 162 million, 1.01 and 1.41 billion, with the head where it is not tied."""
    found = {name: memory.parameters(config)[0] for name, config in memory.CONFIGS.items()}
    expected = (124_439_808, 134_515_008, 162_322_944, 1_011_781_632, 1_414_647_808)
    assert tuple(found.values()) == expected


def test_memory_of_one_block(memory, monkeypatch):
    """Ten layers and eight rows as foretold from one or two of each; with checkpointing ten inputs
    and one block."""
    config = type(memory.CONFIGS["GPT-2"])(n_embd=64, n_head=4, n_layer=10, vocab_size=97)
    monkeypatch.setitem(memory.CONFIGS, "small", config)
    whole, kept = memory.activations("small", 8, 32, 5)
    assert whole == memory.saved_bytes(config, 10, 8, 32, 5) > 5 * kept
    one_block = memory.saved_bytes(config, 1, 8, 32, 5)
    assert kept == one_block + 10 * 4 * 8 * 32 * 64
    _, block, outside = memory.parameters(config)
    assert block == 12 * 64**2 + 13 * 64 and outside == (97 + config.n_positions + 2) * 64


def test_the_page_shows_what_the_script_prints(memory):
    page = (ROOT / "benchmark/README.md").read_text()
    assert "\n".join(memory.table()) in page


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_run_is_measured(memory):
    flags = """--ppo-steps 4 --num-demonstrations 8 --num-preferences 8 --batch-size 4
        --minibatch-size 4 --reward-updates-per-iteration 1 --reward-batch-size 4 --ppo-epochs 1"""
    (peak,), seconds = memory.run(flags)
    assert 0.1 < peak < 8 and seconds > 0
