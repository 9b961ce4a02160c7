"""aihf_dpo_llm.py: equation (13) against slow references, what the loss may not see, and runs as a user starts, kills
and resumes them. What it repeats of the other scripts is compared letter by letter here and tested there.

python -m pytest tests/test_aihf_dpo_llm.py
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_aihf_ppo_llm import assert_close, assert_letter_identical, at_adam_step, at_save
from test_rlhf_llm import EOS, Killed, kill, make_world, rows, set_argument, weights
from test_sac_mujoco_run import ROOT, assert_refused, files
from test_sac_mujoco_run import execute as execute_script

transformers = pytest.importorskip("transformers")
import aihf_dpo_llm as dpo  # noqa: E402
import aihf_ppo_llm as ppo  # noqa: E402
import rlhf_baseline as rlhf  # noqa: E402

SCRIPT = ROOT / "aihf_dpo_llm.py"
FLAGS = {
    "--num-demonstrations": 0,
    "--num-preferences": 0,
    "--demo-weight": 0.7,
    "--preference-weight": 1.3,
    "--dpo-steps": 4,
    "--batch-size": 8,
    "--micro-batch-size": 8,
    "--learning-rate": 0.003,
    "--response-length": 8,
    "--max-prompt-length": 8,
    "--eval-prompts": 8,
    "--eval-every": 2,
    "--checkpoint-every": 1,
    "--threads": 1,
}
CPU = torch.device("cpu")


def command(world: Path, runs: Path, *flags, **changes) -> list[str]:
    given = FLAGS | {"--model-name-or-path": world / "model", "--ground-truth-path": world / "classifier"}
    given |= {f"--{name}": world / f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")}
    given |= {"--runs-dir": runs, "--run-name": "run", "--cache-dir": runs / "cache"}
    given |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [*(f"{flag}={value}" for flag, value in given.items()), "--no-cuda", *map(str, flags)]


def execute(cwd: Path, argv: list) -> tuple[int, str, str]:
    return execute_script(cwd, argv, SCRIPT)


def run(cwd: Path, world: Path, *flags, **changes) -> Path:
    code, out, err = execute(cwd, command(world, cwd / "runs", *flags, **changes))
    assert code == 0, (out, err)
    return cwd / "runs" / "run"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world") / "w")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, world) -> Path:
    """An undisturbed run; read only."""
    return run(tmp_path_factory.mktemp("plain"), world)


@pytest.fixture(scope="module")
def with_self_play(tmp_path_factory, world) -> Path:
    return run(tmp_path_factory.mktemp("self_play"), world, self_play_weight=0.5, self_play_every=3)


# ------------------------------------------------------------------------------------------------------ mathematics
@pytest.mark.parametrize("normalisation", ["token", "sequence"])
@pytest.mark.parametrize(
    "alpha, weight, smoothing", [(0.7, 1.3, 0.0), (1.0, 1.0, 0.1), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)]
)
def test_the_loss_is_13(normalisation, alpha, weight, smoothing):
    """Value and gradient in float64 against (13) written with plain numbers and finite differences."""
    beta, lengths = 0.3, torch.tensor([5, 1, 9])
    generator = torch.Generator().manual_seed(0)
    logs = -10 * torch.rand(5, 3, generator=generator, dtype=torch.float64)  # demos, chosen, rejected, their references

    def reference(demos, chosen, rejected, ref_chosen, ref_rejected) -> float:
        total = 0.0
        for i in range(3):
            likelihood = demos[i] / (lengths[i].item() if normalisation == "token" else 1)
            z = beta * math.log(math.exp(chosen[i]) / math.exp(ref_chosen[i]))
            z -= beta * math.log(math.exp(rejected[i]) / math.exp(ref_rejected[i]))
            prefer = (1 - smoothing) * math.log(1 / (1 + math.exp(-z))) + smoothing * math.log(1 / (1 + math.exp(z)))
            total -= (alpha * likelihood + weight * prefer) / 3
        return total

    def loss(logs):
        demos, *pairs = logs
        return dpo.aihf_dpo_losses(demos, lengths, *pairs, alpha, weight, beta, normalisation, smoothing).mean()

    assert loss(logs).item() == pytest.approx(reference(*logs.tolist()), abs=1e-12)
    found = torch.func.grad(loss)(logs)
    for i, j in np.ndindex(5, 3):
        moved = [logs.clone(), logs.clone()]
        moved[0][i, j] += 1e-5
        moved[1][i, j] -= 1e-5
        slope = (reference(*moved[0].tolist()) - reference(*moved[1].tolist())) / 2e-5
        assert found[i, j].item() == pytest.approx(slope, abs=1e-8)


def test_alpha_0_is_dpo():
    """Equation (7) of Rafailov et al. 2023, whatever stands in the place of demonstrations."""
    chosen, rejected, ref_chosen, ref_rejected = -torch.rand(4, 6) * 9
    nan = torch.full((6,), math.nan)
    found = dpo.aihf_dpo_losses(nan, nan, chosen, rejected, ref_chosen, ref_rejected, 0, 1, 0.1, "token", 0)
    expected = -F.logsigmoid(0.1 * ((chosen - rejected) - (ref_chosen - ref_rejected)))
    torch.testing.assert_close(found, expected)


def test_equal_responses_cost_log_2():
    x, demos = -torch.rand(3), torch.zeros(3)
    found = dpo.aihf_dpo_losses(demos, torch.ones(3), x, x, 2 * x, 2 * x, 0, 1, 0.1, "token", 0)
    assert found.tolist() == pytest.approx([math.log(2)] * 3)


def test_self_play():
    """log 2 where the policy is π_k; less where it has moved towards the demonstrations."""
    demos, own = -torch.rand(2, 3) * 9
    assert dpo.self_play_losses(demos, own, demos, own, 0.1).tolist() == pytest.approx([math.log(2)] * 3)
    found = dpo.self_play_losses(demos + 2, own - 1, demos, own, 0.1)
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-0.3))] * 3, rel=1e-5)


def test_bucketed_batches():
    """Every 16 batches hold what draw gives, each batch holds rows of about the same length, two streams in the same
    order of lengths."""
    lengths = np.random.default_rng(0).integers(1, 100, 320)
    batches = [dpo.bucketed(lengths, 5, step, 3, 1) for step in range(16)]
    assert sorted(np.concatenate(batches)) == sorted(dpo.draw(320, 80, 0, (3, 1)))
    spread = np.mean([np.ptp(lengths[rows_now]) for rows_now in batches])
    assert spread < 15 < 60 < np.mean([np.ptp(lengths[dpo.draw(320, 5, step, (3, 1))]) for step in range(16)])
    others = [dpo.bucketed(lengths, 5, step, 3, 2) for step in range(16)]
    means = [[lengths[rows_now].mean() for rows_now in stream] for stream in (batches, others)]
    assert np.corrcoef(means)[0, 1] > 0.95 and list(np.argsort(means[0])) != list(range(16))
    assert not np.array_equal(dpo.bucketed(lengths, 5, 16, 3, 1), batches[0])


# -------------------------------------------------------------------------------------------------------- whole runs
def test_a_run(world, plain):
    table = rows(plain)
    assert [row["charts/step"] for row in table] == ["0", "1", "2", "3", "4"]
    assert [row["charts/pairs"] for row in table] == ["0", "8", "16", "24", "32"]
    assert [bool(row["eval/gt_score"]) for row in table] == [True, False, True, False, True]
    assert [bool(row["held_out/margins"]) for row in table] == [True, False, True, False, True]
    assert table[0]["held_out/margins"] == "0" and table[0]["eval/kl"] == "0" and table[0]["eval/win_rate"] == "0.5"
    first = table[1]  # of the reference itself: no reward yet
    assert float(first["rewards/chosen"]) == pytest.approx(0, abs=1e-5)
    assert float(table[4]["rewards/chosen"]) != 0 > float(table[4]["logps/demonstrations"])
    assert float(table[4]["held_out/demonstrations"]) > float(table[0]["held_out/demonstrations"])
    assert table[4]["eval/kl"] == table[4]["eval/kl_base"] != "0"
    assert {p.name for p in plain.iterdir()} == {
        "args.json", "metrics.csv", "checkpoint.pt", "policy", "samples.jsonl",
    }  # fmt: skip
    samples = [json.loads(line) for line in (plain / "samples.jsonl").read_text().splitlines()]
    for name in ("gt_score", "kl"):
        mean = np.mean([row[name] for row in samples])
        assert mean == pytest.approx(float(table[-1][f"eval/{name}"]), rel=1e-4, abs=1e-5)
    state = torch.load(plain / "checkpoint.pt", weights_only=True)["parts"]
    lm = transformers.AutoModelForCausalLM.from_pretrained(plain / "policy")
    before = transformers.AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    assert torch.equal(state["policy"]["lm.transformer.wte.weight"], lm.transformer.wte.weight)
    assert not torch.equal(before.transformer.wte.weight, lm.transformer.wte.weight)
    assert transformers.AutoTokenizer.from_pretrained(plain / "policy").eos_token_id == EOS


def test_the_first_loss_counts_responses_only(tmp_path, world):
    """The first step's numbers against each text alone through the model, without padding: neither prompts nor padding
    leak into the loss, and batches of one length do not matter."""
    table = rows(run(tmp_path, world, dpo_steps=1, micro_batch_size=3))
    tokenizer, *_ = dpo.load_tokenizer(str(world / "model"), "x")
    lm = transformers.AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)

    def log_prob(prompt: str, response: str) -> tuple[float, int]:
        x = tokenizer(prompt, truncation=True, max_length=8)["input_ids"]
        y = tokenizer(response)["input_ids"][:8]
        with torch.no_grad():
            logs = lm(torch.tensor([x + y])).logits[0].double().log_softmax(-1)
        return sum(logs[len(x) + t - 1, token].item() for t, token in enumerate(y)), len(y)

    texts = {
        name: [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        for name in ("demonstrations", "preferences")
    }
    rng = np.random.default_rng([1, 0])
    rows_of = {name: dpo.hold_out(len(texts[name]), 0.1, "", rng)[0] for name in texts}
    lengths = {
        "demonstrations": [log_prob(row["prompt"], row["completion"])[1] for row in texts["demonstrations"]],
        "preferences": [
            max(log_prob(row["prompt"], row[side])[1] for side in ("chosen", "rejected"))
            for row in texts["preferences"]
        ],
    }
    drawn = {
        name: [texts[name][i] for i in rows_of[name][dpo.bucketed(np.array(lengths[name])[rows_of[name]], 8, 0, 1, s)]]
        for s, name in enumerate(texts, 1)
    }
    demos = [log_prob(row["prompt"], row["completion"]) for row in drawn["demonstrations"]]
    assert np.mean([x for x, _ in demos]) == pytest.approx(float(table[1]["logps/demonstrations"]), rel=1e-4)
    for side in ("chosen", "rejected"):
        mean = np.mean([log_prob(row["prompt"], row[side])[0] for row in drawn["preferences"]])
        assert mean == pytest.approx(float(table[1][f"logps/{side}"]), rel=1e-4)
    expected = 0.7 * -np.mean([x / n for x, n in demos]) + 1.3 * math.log(2)
    assert float(table[1]["losses/total"]) == pytest.approx(expected, rel=1e-4)


def test_cached_reference_equals_fresh(tmp_path, world, plain):
    """A second run reads the cache, and would read a wrong one; other data or another reference have another key."""
    folder = run(tmp_path, world, run_name="first").with_name("first")
    (cache,) = (tmp_path / "runs" / "cache").iterdir()
    assert rows(folder) == rows(plain)
    sides = dpo.load_file(cache)
    assert sides["chosen"].shape == (40,) and not torch.equal(sides["chosen"], sides["rejected"])
    again = run(tmp_path, world, run_name="again").with_name("again")
    assert rows(again) == rows(plain) and weights(again) == weights(plain)
    dpo.save_file({name: x - 1 * (name == "chosen") for name, x in sides.items()}, cache)
    spoiled = run(tmp_path, world, run_name="spoiled").with_name("spoiled")
    assert float(rows(spoiled)[1]["rewards/chosen"]) == pytest.approx(0.1, abs=1e-4)
    cache.write_bytes(b"half")
    assert_refused(execute(tmp_path, command(world, tmp_path / "runs", run_name="damaged")), str(cache))
    run(tmp_path, world, run_name="sft", sft_model_path=plain / "policy")
    run(tmp_path, world, run_name="fewer", num_preferences=30)
    assert len(list((tmp_path / "runs" / "cache").iterdir())) == 3


def test_demo_weight_0_does_not_read_demonstrations(tmp_path, world):
    table = rows(run(tmp_path, world, demo_weight=0, demonstrations="nowhere.jsonl"))
    assert table[4]["logps/demonstrations"] == table[4]["held_out/demonstrations"] == ""
    assert float(table[1]["losses/total"]) == pytest.approx(1.3 * math.log(2), rel=1e-5)


def test_preference_weight_0_is_sft(tmp_path, world):
    """One step against rlhf_baseline.py's parts; preferences are not read and nothing is cached."""
    folder = run(tmp_path, world, preference_weight=0, demo_weight=1, preferences="nowhere.jsonl", dpo_steps=1)
    assert not list((tmp_path / "runs" / "cache").iterdir())
    policy = rlhf.Policy(rlhf.load_pretrained("AutoModelForCausalLM", str(world / "model"), "x").float()).eval()
    tokenizer, _, pad = rlhf.load_tokenizer(str(world / "model"), "x")
    demos = rlhf.read_texts(str(world / "demonstrations.jsonl"), "demonstrations", ("prompt", "completion"))
    prompts = tokenizer([x for x, _ in demos], truncation=True, max_length=8)["input_ids"]
    completions = [ids[:8] for ids in tokenizer([y for _, y in demos], add_special_tokens=False)["input_ids"]]
    train, _ = rlhf.hold_out(len(demos), 0.1, "", np.random.default_rng([1, 0]))
    drawn = train[dpo.bucketed(np.array([len(ids) for ids in completions])[train], 8, 0, 1, 1)]
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.003)
    loss = 0
    for i in drawn:
        ids = torch.tensor([prompts[i] + completions[i]])
        loss = loss - policy(ids, torch.ones_like(ids), len(completions[i])).mean() / 8
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    learned = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy")
    moved = total = 0.0
    for name, tensor in policy.lm.state_dict().items():
        moved += (learned.state_dict()[name] - tensor).abs().sum().item()
        total += tensor.numel()
    assert moved / total < 3e-5  # where Adam's first step is 0.003


def test_learning(tmp_path):
    """On the embedded models and data the ground truth goes up."""
    assets = ROOT / dpo.ASSETS
    given = {f"--{name}": assets / f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")}
    given |= {"--model-name-or-path": assets / "model", "--ground-truth-path": assets / "classifier"}
    given |= {"--dpo-steps": 16, "--learning-rate": 3e-4, "--eval-prompts": 64, "--eval-every": 16, "--threads": 1}
    given |= {"--num-preferences": 300, "--num-demonstrations": 300, "--batch-size": 16}
    code, out, err = execute(tmp_path, [f"{flag}={value}" for flag, value in given.items()] + ["--run-name=run"])
    assert code == 0, (out, err)
    table = rows(tmp_path / "runs" / "run")
    assert float(table[-1]["eval/gt_score"]) > float(table[0]["eval/gt_score"]) + 0.5
    assert float(table[-1]["eval/win_rate"]) > 0.6


def test_self_play_run(world, plain, with_self_play):
    """π_k is the policy of steps 0 and 3."""
    table, without = rows(with_self_play), rows(plain)
    assert float(table[1]["losses/self_play"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(table[2]["losses/self_play"]) != pytest.approx(math.log(2), abs=1e-5)
    assert float(table[4]["losses/self_play"]) == pytest.approx(math.log(2), abs=1e-5)
    expected = float(without[1]["losses/total"]) + 0.5 * math.log(2)
    assert float(table[1]["losses/total"]) == pytest.approx(expected, rel=1e-5)
    assert all(row["losses/self_play"] == "" for row in without)


def test_from_sft_over_an_opponent(tmp_path, world, plain):
    """The start is the reference; KL to the base model and win rates are of other models."""
    table = rows(run(tmp_path, world, sft_model_path=plain / "policy"))
    assert table[0]["eval/kl"] == "0" != table[0]["eval/kl_base"] and table[0]["eval/win_rate"] == "0.5"
    assert table[0]["eval/gt_score"] == rows(plain)[-1]["eval/gt_score"]
    table = rows(run(tmp_path, world, opponent_path=plain / "policy", run_name="run2").with_name("run2"))
    assert float(table[0]["eval/win_rate"]) == 1 - float(rows(plain)[-1]["eval/win_rate"])
    assert table[1]["eval/kl"] == rows(plain)[1]["eval/kl"]


@pytest.mark.parametrize(
    "changes", [{"sft_normalisation": "sequence"}, {"label_smoothing": 0.2}, {"flags": "--append-eos"}], ids=str
)
def test_options(tmp_path, world, plain, changes):
    flags = [changes["flags"]] if "flags" in changes else []
    table = rows(run(tmp_path, world, *flags, **{k: v for k, v in changes.items() if k != "flags"}))
    assert table[4]["eval/kl"] not in ("0", rows(plain)[4]["eval/kl"])
    if flags:  # an end token costs something
        assert float(table[1]["logps/chosen"]) < float(rows(plain)[1]["logps/chosen"])


def test_gpt_neox(tmp_path):
    run(tmp_path, make_world(tmp_path / "w", "gpt_neox"), dpo_steps=2)


def test_no_ground_truth(tmp_path, world, plain):
    """Training does not see the ground truth: without it everything else is the same."""
    folder = run(tmp_path, world, ground_truth_path="")
    seen_by_truth = ("eval/gt_score", "eval/gt_score_std", "eval/win_rate", "eval/reward_correlation")
    for row, other in zip(rows(folder), rows(plain), strict=True):
        assert {**other, **dict.fromkeys(seen_by_truth, "")} == row


MOMENTS = {
    "first step": (at_adam_step, 1), "third step": (at_adam_step, 3), "first save": (at_save, 2),
    "third save": (at_save, 4), "last save": (at_save, 5),
}  # fmt: skip


@pytest.mark.parametrize("when, number", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("kind", ["plain", "with_self_play"])
def test_kill_and_resume(tmp_path, world, request, monkeypatch, kind, when, number):
    whole, folder = request.getfixturevalue(kind), tmp_path / "runs" / "run"
    changes = {} if kind == "plain" else {"self_play_weight": 0.5, "self_play_every": 3}
    with monkeypatch.context() as patched:
        when(patched, number, kill)
        with pytest.raises(Killed):
            execute(tmp_path, command(world, tmp_path / "runs", **changes))
    code, out, err = execute(tmp_path, ["--resume", folder])
    assert code == 0, (out, err)
    assert rows(folder) == rows(whole) and weights(folder) == weights(whole)


def test_interrupt_and_resume(tmp_path, world, plain, monkeypatch):
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patched:
        at_adam_step(patched, 2, lambda: signal.raise_signal(signal.SIGINT))
        code, out, err = execute(tmp_path, command(world, tmp_path / "runs", checkpoint_every=100))
    assert code == 130 and f"aihf_dpo_llm.py --resume {folder}" in out, (out, err)
    code, out, err = execute(tmp_path, ["--resume", folder])
    assert code == 0, (out, err)
    assert rows(folder) == rows(plain) and weights(folder) == weights(plain)


def test_evaluate_and_resume_of_a_finished_run_change_nothing(tmp_path, plain):
    finished = Path(shutil.copytree(plain, tmp_path / "finished"))
    score = float(rows(finished)[-1]["eval/gt_score"])
    before = files(finished)
    code, out, err = execute(tmp_path, ["--evaluate", finished])
    assert code == 0 and f"ground truth {score:.2f}" in out and files(finished) == before, (out, err)
    code, out, err = execute(tmp_path, ["--resume", finished])
    assert code == 0 and f"final: ground truth {score:.2f}" in out and files(finished) == before, (out, err)
    code, out, err = execute(tmp_path, ["--resume", finished, "--dpo-steps", 5])
    assert code == 0 and rows(finished)[:5] == rows(plain) and rows(finished)[5]["charts/step"] == "5", (out, err)


def test_two_processes_are_one(tmp_path, world, with_self_play):
    """torchrun with 2 processes and half the rows each: what is logged is the same up to rounding."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = command(world, tmp_path / "runs", self_play_weight=0.5, self_play_every=3)
    done = subprocess.run([*torchrun, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)  # pytest shows this whole when the next line fails, and cuts a long message short
    assert done.returncode == 0
    assert_close(rows(tmp_path / "runs" / "run"), rows(with_self_play))


def test_micro_batches_change_nothing(tmp_path, world, plain):
    assert_close(rows(run(tmp_path, world, micro_batch_size=3)), rows(plain))


def test_not_finite(tmp_path, world):
    code, out, err = execute(tmp_path, command(world, tmp_path / "runs", learning_rate=1e30))
    assert code == 1 and "is not finite at step" in err, (out, err)


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"model_name_or_path": "./nowhere"}, "./nowhere"),
        ({"model_name_or_path": "data_gen/assets/imdb/model"}, "python data_gen/imdb_data.py pretrain"),
        ({"ground_truth_path": "MODEL"}, "--ground-truth-path"),
        ({"opponent_path": "./nowhere"}, "--opponent-path"),
        ({"demonstrations": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"preferences": "PROMPTS"}, "chosen"),
        ({"num_preferences": 1000}, "--num-preferences"),
        ({"eval_prompts": 61}, "--eval-prompts"),
        ({"response_length": 47}, "--response-length"),
        ({"held_out_share": 1}, "--held-out-share"),
        ({"label_smoothing": 0.6}, "--label-smoothing"),
        ({"demo_weight": 0, "preference_weight": 0}, "--demo-weight"),
        ({"demo_weight": 0, "self_play_weight": 1}, "--self-play-weight"),
        ({"beta": 0}, "--beta"),
        ({"cache_dir": "FILE"}, "--cache-dir"),
        ({"resume": "nowhere"}, "args.json"),
        ({"evaluate": "nowhere"}, "args.json"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, world, changes, fragment):
    (tmp_path / "file").touch()
    places = {"MODEL": world / "model", "PROMPTS": world / "prompts.jsonl", "FILE": tmp_path / "file" / "x"}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    assert_refused(execute(tmp_path, command(world, tmp_path / "runs", **changes)), fragment)
    assert not (tmp_path / "runs").exists()


GOOD = dpo.Args()
NUMBERS = [f.name for f in fields(GOOD) if type(getattr(GOOD, f.name)) in (int, float)]


def test_numbers(capsys):
    dpo.check_args(GOOD)
    for preset in dpo.PRESETS.values():
        dpo.check_args(dpo.Args(**preset))
    for name in NUMBERS:
        for value in (-1, float("nan"), float("inf"), *(() if name in dpo.MAY_BE_ZERO else (0,))):
            with pytest.raises(SystemExit) as stop:
                dpo.check_args(replace(GOOD, **{name: value}))
            captured = capsys.readouterr()
            assert_refused((stop.value.code, captured.out, captured.err), f"--{name.replace('_', '-')}")


BAD_RUNS = {
    "no checkpoint": (lambda f, w: (f / "checkpoint.pt").unlink(), [], "checkpoint.pt"),
    "half a checkpoint": (lambda f, w: (f / "checkpoint.pt").write_bytes(b"PK"), [], "checkpoint.pt"),
    "no metrics": (lambda f, w: (f / "metrics.csv").unlink(), [], "metrics.csv"),
    "other data": (lambda f, w: set_argument(f, prompts=str(w / "demonstrations.jsonl")), [], "other data"),
    "another script's": (lambda f, w: set_argument(f, script="rlhf_baseline"), [], "args.json"),
    "its own arguments": (lambda f, w: None, ["--seed", 2], "--seed"),
    "fewer steps": (lambda f, w: None, ["--dpo-steps", 2], "--dpo-steps"),
    "both": (lambda f, w: None, ["--evaluate", "."], "--evaluate"),
}


@pytest.mark.parametrize("spoil, flags, fragment", BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_run_folder(tmp_path, world, plain, spoil, flags, fragment):
    finished = Path(shutil.copytree(plain, tmp_path / "finished"))
    spoil(finished, world)
    before = files(finished)
    assert_refused(execute(tmp_path, ["--resume", finished, *flags]), fragment)
    assert files(finished) == before


def test_an_existing_run_is_not_overwritten(tmp_path, world, plain):
    before = files(plain)
    assert_refused(execute(tmp_path, command(world, plain.parent)), "--resume")
    assert files(plain) == before


def test_help_and_copied_alone(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run([sys.executable, SCRIPT.name], cwd=tmp_path, capture_output=True, text=True)
    assert_refused((done.returncode, done.stdout, done.stderr), "python data_gen/imdb_data.py pretrain")
    code, out, _ = execute(tmp_path, ["--help"])
    assert code == 0 and "--demo-weight" in out
    assert [p.name for p in tmp_path.iterdir()] == [SCRIPT.name]


# ---------------------------------------------------------------------------------------------- repeated on purpose
def test_what_the_scripts_repeat_is_letter_identical():
    shared = assert_letter_identical(dpo, rlhf, {"check_args", "load_checkpoint"})
    assert shared >= {"Policy", "Scorer", "read_texts", "draw"}
    assert_letter_identical(dpo, ppo, {"Args", "check_args", "load_checkpoint"})


def test_shared_flags_have_the_same_defaults():
    ours, theirs = ({f.name: f.default for f in fields(kind)} for kind in (dpo.Args, ppo.Args))
    both = set(ours) & set(theirs)
    differ = {"run_name", "demo_weight", "batch_size", "learning_rate", "eval_every", "checkpoint_every"}
    assert len(both) > 25 and {name for name in both if ours[name] != theirs[name]} <= differ
