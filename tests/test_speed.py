"""benchmark/sac_speed.py, llm_speed.py, llm_steps.py and llm_memory.py, without other libraries:
their tables, what they ask of our scripts, the arithmetic of memory against what is easily counted.

python -m pytest tests/test_speed.py      (a minute)
"""

import importlib.util
import sys
from pathlib import Path

import llm_memory
import llm_speed
import llm_steps
import pytest
import sac_speed
import torch
import transformers
import tyro
from helpers import ROOT, assert_one_line_error, metrics, run_script
from torch.utils.flop_counter import FlopCounterMode

import aihf_sac_mujoco as aihf


# ------------------------------------------------------------------------------------------ robots
def rows(**speeds: list[float]) -> list[dict]:
    """Rows of three rounds; libraries not named run at 1 step a second."""
    found = []
    for name in sac_speed.TURNS:
        for number, value in enumerate(speeds.get(name.replace("-", "_"), [1.0, 1.0, 1.0]), 1):
            found.append(dict(zip(sac_speed.COLUMNS, (name, number, value))))
    return found


def test_summary_takes_the_median_of_the_rounds_ratios():
    text = sac_speed.summary(rows(aihf=[100, 400, 900], sb3=[10, 200, 100]))
    cells = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert cells["aihf"] == ["400", "100", "900"] and cells["sb3"] == ["100", "10", "200"]
    assert cells["aihf / sb3"] == ["9.00", "10.00", "2.00", "9.00"]  # not 400 / 100
    assert cells["aihf / sbx"] == ["400.00", "100.00", "400.00", "900.00"]


@pytest.mark.parametrize(("library", "iteration"), [("aihf", 5_000), ("aihf-lower-level", 10_000)])
def test_our_side_is_the_shipped_script_with_flags_it_has(monkeypatch, library, iteration):
    ours = aihf.BLOCK, aihf.Args.policy_steps_per_iteration
    assert (sac_speed.BLOCK, sac_speed.ITERATION) == ours
    assert sac_speed.WARM_UP == ours[1] * aihf.Args.rollout_memory  # the memory is full after it

    def run(script, *flags):
        """Stands in for the run: what it would log, at 1 step a second while it warms up, then at
        300 and 600."""
        asked = tyro.cli(aihf.Args, args=flags)
        assert (ROOT / script).is_file() and asked.compile and asked.threads == 1
        assert (asked.policy_steps_per_iteration, asked.batch_size) == (iteration, 256)
        assert (asked.hidden, asked.seed, asked.env) == ((64, 64), 7, "HalfCheetah-v4")
        first = asked.total_timesteps - 10_000
        assert asked.learning_starts == 49_000 < 50_000 == first and first % iteration == 0
        folder = Path(asked.runs_dir) / asked.run_name
        folder.mkdir()
        rows = ("charts/sac_steps,charts/SPS", "0,", f"{first},1", f"{first + 1},300")
        (folder / "metrics.csv").write_text("\n".join((*rows, f"{first + 2},600\n")))
        return ""

    monkeypatch.setattr(sac_speed, "run", run)
    # 2 iterations of n steps in n / 300 + n / 600 seconds
    assert sac_speed.measure_ours(library, seed=7) == pytest.approx(400)


def test_the_floor_has_the_matrix_products_of_an_update():
    shapes = sac_speed.products(obs_dim=5, act_dim=2, hidden=(8, 4), batch_size=16)
    actor, critics = aihf.Actor(5, 2, (8, 4)), aihf.Critics(5, 2, (8, 4))
    sac = aihf.init_sac(actor, critics, 0.1)
    update = aihf.make_sac_update(actor, critics, 0.99, 0.005, -2.0)
    batch = [torch.randn(16, *shape) for shape in ([5], [2], [], [5], [])]
    with FlopCounterMode(display=False) as counter:
        update(sac, torch.tensor(1e-3), *batch, torch.randn(2, 16, 2))
    assert sum(2 * m * k * n for m, k, n in shapes) == counter.get_total_flops()
    assert sac_speed.measure_floor(steps=20) > 0


@pytest.mark.parametrize(("script", "library"), [("sac_speed", "sbx"), ("llm_speed", "trl")])
def test_missing_libraries_are_one_line_and_exit_code_2(monkeypatch, script, library):
    find_spec = importlib.util.find_spec
    without = lambda name: None if name == library else find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    result = run_script(ROOT / "benchmark" / f"{script}.py", [], ROOT)
    assert_one_line_error(result, "pip install -e '.[speed]'", library)


# ---------------------------------------------------------------------------------- language models
def test_table_of_trainings():
    seconds = {"dpo": (1, 2, 9), "trl-dpo": (10, 4, 9)}
    table = [(what, x) for what, numbers in seconds.items() for x in numbers]
    rows = [{"training": "dpo", "what": what, "seconds_per_step": x} for what, x in table]
    cells = {line[:34].strip(): line[34:].split() for line in llm_speed.summary(rows).splitlines()}
    assert cells["dpo"] == ["2.000", "1.000", "9.000"]
    assert cells["trl-dpo"] == ["9.000", "4.000", "10.000", "2.00:", "10.00", "2.00", "1.00"]


@pytest.mark.parametrize("training", ["dpo", "remax", "ppo"])
def test_our_training_is_the_shipped_script_with_flags_it_has(monkeypatch, training):
    def run(script, *flags):
        """Stands in for the run: steps of 2 seconds after a first one of 50, a last one of 90."""
        module = importlib.import_module(script.removesuffix(".py"))
        asked = tyro.cli(module.Args, args=flags)
        assert (asked.demo_weight, asked.learning_rate, asked.threads) == (0, llm_speed.RATE, 1)
        if training == "dpo":
            steps, size = asked.dpo_steps, asked.batch_size
            assert size == llm_speed.PAIRS
        else:
            steps, size = asked.ppo_steps, asked.batch_size
            assert asked.policy_steps_per_iteration > steps and size == llm_speed.RESPONSES
            assert (asked.minibatch_size, asked.ppo_epochs) == (32, 2)
            assert asked.policy_optimizer == training
        assert asked.eval_every > steps and steps == llm_speed.STEPS[training] + 2
        times = [0, *(50 + 2 * i for i in range(steps - 1)), 140]
        folder = Path(asked.runs_dir) / asked.run_name
        folder.mkdir()
        rows = ["charts/wall_seconds", *map(str, times)]
        (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
        return ""

    monkeypatch.setattr(llm_speed, "run", run)
    assert llm_speed.measure_ours(training, seed=1) == 2


@pytest.mark.parametrize(
    ("training", "change"),
    [
        ("dpo", "unfused_adam"),
        ("dpo", "logits_of_prompts_too"),
        ("dpo", "bfloat16_fused_attention"),
        ("ppo", "nothing_cached"),
    ],
)
def test_a_changed_step_is_another_way_to_the_same_numbers(tmp_path, monkeypatch, training, change):
    """But for rounding; of bfloat16 the effect alone; compiled is left to the benchmark."""
    script, adam = importlib.import_module(f"aihf_{training}_llm"), torch.optim.Adam
    forward, seen = transformers.GPT2LMHeadModel.forward, []

    def recorded(self, input_ids, logits_to_keep, use_cache, **others):
        seen.append((input_ids.shape, logits_to_keep, use_cache))
        seen.append(("attention", self.config._attn_implementation))
        return forward(
            self, input_ids, logits_to_keep=logits_to_keep, use_cache=use_cache, **others
        )

    def recorded_adam(parameters, fused=None):
        seen.append(("fused", fused))
        return adam(parameters, fused=fused)

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", recorded)
    monkeypatch.setattr(torch.optim, "Adam", recorded_adam)
    monkeypatch.chdir(ROOT)
    places = [(torch.optim, "Adam"), (script.Policy, "forward")]
    for owner, name in [*places, (transformers.PreTrainedModel, "set_attn_implementation")]:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # as it is now, afterwards
    flags = f"""--eval-prompts 2 --{training}-steps 2 --batch-size 24 --no-cuda --threads 1
        --learning-rate 1e-5 --num-preferences 40 --ground-truth-path= --runs-dir {tmp_path} """
    flags += "--demo-weight 0 --run-name"
    if training == "ppo":
        flags = f"""--minibatch-size 24 --reward-updates-per-iteration 1 --reward-batch-size 4
            --value-learning-rate 1e-5 --reward-learning-rate 1e-5 {flags}"""
    monkeypatch.setitem(llm_steps.CHANGES, "none", (None, llm_steps.CHANGES[change][1]))
    rows, passes = [], []
    for name in ("none", change):
        llm_steps.change_and_run(name, f"aihf_{training}_llm.py", *flags.split(), name)
        rows.append(metrics(tmp_path / name)[-1])
        passes.append(seen.copy())
        seen.clear()
    for row in rows:
        del row["charts/wall_seconds"]
    shipped, changed = ({key: float(x or 0) for key, x in row.items()} for row in rows)
    if "bfloat16" not in change:  # which rounds as large as this
        assert changed == pytest.approx(shipped, rel=1e-3, abs=1e-4)
    effects = {
        "unfused_adam": lambda seen: ("fused", True) not in seen,
        "logits_of_prompts_too": lambda seen: all(x[0][1] == x[1] for x in seen if len(x) == 3),
        "nothing_cached": lambda seen: not any(x[2] for x in seen if len(x) == 3),
        "bfloat16_fused_attention": lambda seen: ("attention", "eager") not in seen,
    }
    assert [effects[change](found) for found in passes] == [False, True]


def test_floor_of_each_training_is_measured():
    assert all(llm_speed.measure_floor(training, repeats=1) > 0 for training in llm_speed.TURNS)


def test_parameters_are_those_of_the_hub():
    """124, 135, 162 million, 1.01 and 1.41 billion, with the head where it is not tied; a reward
    has one of a number a unit instead, or with GPT-2 beside the embeddings."""
    configs = llm_memory.CONFIGS
    found = [llm_memory.parameters(config, "CausalLM")[0] for config in configs.values()]
    assert found == [124_439_808, 134_515_008, 162_322_944, 1_011_781_632, 1_414_647_808]
    reward = llm_memory.parameters(configs["Pythia-1.4B"], "SequenceClassification")[0]
    assert found[-1] - reward == (50_304 - 2) * 2048  # two labels, as a configuration has


def test_memory_of_one_block(monkeypatch):
    """Ten layers and eight rows as foretold from one or two of each; with checkpointing ten inputs
    and one block."""
    config = type(llm_memory.CONFIGS["GPT-2"])(n_embd=64, n_head=4, n_layer=10, vocab_size=97)
    monkeypatch.setitem(llm_memory.CONFIGS, "small", config)
    whole, kept = llm_memory.activations("small", 8, 32, 5)
    assert whole == llm_memory.saved_bytes(config, 10, 8, 32, 5) > 5 * kept
    one_block = llm_memory.saved_bytes(config, 1, 8, 32, 5)
    assert kept == one_block + 10 * 4 * 8 * 32 * 64
    _, block, outside = llm_memory.parameters(config, "CausalLM")
    assert block == 12 * 64**2 + 13 * 64 and outside == (97 + config.n_positions + 2) * 64


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "benchmark/README.md").read_text()
    assert "\n".join(llm_memory.table()) in page


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_run_is_measured():
    flags = """--ppo-steps 4 --num-demonstrations 8 --num-preferences 8 --batch-size 4
        --minibatch-size 4 --reward-updates-per-iteration 1 --reward-batch-size 4 --ppo-epochs 1"""
    (peak,), seconds = llm_memory.run(flags)
    assert 0.1 < peak < 8 and seconds > 0
