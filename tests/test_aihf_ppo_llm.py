"""aihf_ppo_llm.py: g1 and g2 against their definitions, whose responses g1 sees, and runs as a user starts, kills and
resumes them. What it repeats of rlhf_baseline.py is compared letter by letter here and tested in test_rlhf_llm.py.

python -m pytest tests/test_aihf_ppo_llm.py
"""

import inspect
import json
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
from test_rlhf_llm import EOS, PAD, Killed, configuration, kill, make_world, rows, set_argument, weights
from test_sac_mujoco_run import ROOT, assert_refused, files
from test_sac_mujoco_run import execute as execute_script

transformers = pytest.importorskip("transformers")
import aihf_ppo_llm as aihf  # noqa: E402
import rlhf_baseline as rlhf  # noqa: E402

SCRIPT = ROOT / "aihf_ppo_llm.py"
FLAGS = {
    "--num-demonstrations": 0,
    "--num-preferences": 0,
    "--demo-weight": 0.7,
    "--preference-weight": 1.3,
    "--reward-updates-per-iteration": 3,
    "--reward-batch-size": 8,
    "--reward-learning-rate": 0.003,
    "--policy-steps-per-iteration": 2,
    "--ppo-steps": 4,
    "--ppo-epochs": 2,
    "--batch-size": 16,
    "--minibatch-size": 8,
    "--micro-batch-size": 8,
    "--learning-rate": 0.001,
    "--value-learning-rate": 0.001,
    "--response-length": 8,
    "--max-prompt-length": 8,
    "--temperature": 0.8,
    "--missing-eos-penalty": 0.1,
    "--eval-prompts": 8,
    "--eval-every": 2,
    "--checkpoint-every": 1,
    "--threads": 1,
}
UPPER, LOWER = 3, 2 * 2 * 2  # Adam steps of an upper level, and of a PPO step


def command(world: Path, runs: Path, *flags, **changes) -> list[str]:
    given = FLAGS | {"--model-name-or-path": world / "model", "--ground-truth-path": world / "classifier"}
    given |= {f"--{name}": world / f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")}
    given |= {"--runs-dir": runs, "--run-name": "run"}
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


# ------------------------------------------------------------------------------------------------------ mathematics
def tiny_scorer() -> aihf.Scorer:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(configuration("gpt2", num_labels=1)).eval()
    model.score.weight.data *= 20

    class Tokenizer:
        model_max_length = 48

    return aihf.Scorer(model.double(), Tokenizer(), PAD)


TEXTS = {  # token ids of three rows each
    "demos": [[7, 8, 9, 10], [11, 12], [13, 14, 15]],
    "policy": [[7, 8, 20], [11, 21, 22], [13, 23]],
    "chosen": [[30, 31], [32, 33, 34], [35]],
    "rejected": [[30, 36, 37], [32, 38], [35, 39, 40]],
}


def gradient_of(scorer: aihf.Scorer, scalar: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(scalar, list(scorer.parameters()), allow_unused=True)
    pairs = zip(gradients, scorer.parameters())
    return torch.cat([(g if g is not None else torch.zeros_like(p)).flatten() for g, p in pairs])


@pytest.mark.parametrize("demo_loss", ["linear", "logistic"])
@pytest.mark.parametrize("alpha, weight, penalty", [(0.7, 1.3, 0.25), (1, 0, 0), (0, 1, 0.25), (2, 1, 0)])
def test_upper_level_is_alpha_g1_plus_g2(demo_loss, alpha, weight, penalty):
    """The gradient that Adam gets, against ∇R of each text alone put together by (26), (27) and (28)."""
    scorer = tiny_scorer()
    together = {}
    for name, texts in TEXTS.items():
        ids, mask = aihf.pad_rows(texts, PAD)
        together[name] = aihf.at_last(scorer(ids, mask), mask)
    losses = aihf.reward_losses(*together.values(), alpha, weight, demo_loss, penalty)
    assert losses.shape == (3,)
    found = gradient_of(scorer, -losses.mean())

    value, slope = {}, {}
    for name, texts in TEXTS.items():
        alone = [scorer(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0, -1] for ids in texts]
        value[name] = [x.item() for x in alone]
        slope[name] = [gradient_of(scorer, x) for x in alone]
    expected = torch.zeros_like(found)
    for i in range(3):
        demo, own, won, lost = (slope[name][i] for name in TEXTS)
        r_demo, r_own, r_won, r_lost = (value[name][i] for name in TEXTS)
        share = 1.0 if demo_loss == "linear" else 1 / (1 + np.exp(r_demo - r_own))
        g1 = share * (demo - own) - penalty * 2 * (r_demo * demo + r_own * own)
        g2 = (won - lost) / (1 + np.exp(r_won - r_lost))
        expected += (alpha * g1 + weight * g2) / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # the scorer's numbers are float32


def test_a_term_of_weight_0_is_left_out():
    """Whatever stands in its place."""
    x, nan = torch.randn(4), torch.full((4,), float("nan"))
    only_pairs = aihf.reward_losses(nan, nan, x, -x, 0, 1, "linear", 0.25)
    torch.testing.assert_close(only_pairs, -F.logsigmoid(2 * x))
    only_demos = aihf.reward_losses(x, -x, nan, nan, 1, 0, "linear", 0.25)
    torch.testing.assert_close(only_demos, -2 * x + 0.5 * x**2)


def test_the_penalty_bounds_what_g1_wants():
    """Ascent on α g1 alone over a table of R: (p_E - p_π) / 2λ(p_E + p_π), as the header says."""
    expert, policy, penalty = torch.tensor([0.7, 0.3, 0.0]), torch.tensor([0.2, 0.3, 0.5]), 0.25
    r = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([r], lr=0.5)
    nothing = torch.zeros(9)
    weight = (expert[:, None] * policy).flatten()  # every pair of a demonstration and a response
    for _ in range(500):
        optimizer.zero_grad()
        r_demos, r_policy = r.repeat_interleave(3), r.repeat(3)
        (aihf.reward_losses(r_demos, r_policy, nothing, nothing, 1, 0, "linear", penalty) * weight).sum().backward()
        optimizer.step()
    torch.testing.assert_close(r.detach(), (expert - policy) / (2 * penalty * (expert + policy)))


def test_remax_advantages():
    rewards = torch.tensor([[1.0, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = aihf.remax_advantages(rewards, mask, torch.tensor([2.0, 10.0]))
    assert found.tolist() == [[4, 3, 1], [-1, -5, 0]]


# -------------------------------------------------------------------------------------------------------- whole runs
def test_a_run(world, plain):
    """Rows, files, and that all three networks moved."""
    table = rows(plain)
    assert [row["charts/step"] for row in table] == ["0", "1", "2", "3", "4"]
    assert [row["charts/iteration"] for row in table] == ["0", "1", "1", "2", "2"]
    assert [row["charts/reward_updates"] for row in table] == ["0", "3", "3", "6", "6"]
    assert [row["charts/episodes"] for row in table] == ["0", "16", "32", "48", "64"]
    assert [bool(row["eval/gt_score"]) for row in table] == [True, False, True, False, True]
    assert table[0]["eval/kl"] == "0" and table[0]["eval/win_rate"] == "0.5"
    assert table[4]["eval/kl"] == table[4]["eval/kl_base"] != "0"
    for row in table[1:]:
        assert float(row["losses/ratio"]) == pytest.approx(1, abs=1e-5)
        assert float(row["losses/approx_kl"]) > 0
    for row in table[1:4:2]:  # those with an upper level
        assert float(row["reward/gap"]) > 0
        margin = float(row["rewards/chosen"]) - float(row["rewards/rejected"])
        assert margin == pytest.approx(float(row["rewards/margins"]), abs=1e-5)
    assert table[2]["reward/gap"] == table[2]["rewards/loss"] == ""
    names = {"args.json", "metrics.csv", "checkpoint.pt", "reward", "policy", "samples.jsonl"}
    assert {path.name for path in plain.iterdir()} == names
    samples = [json.loads(line) for line in (plain / "samples.jsonl").read_text().splitlines()]
    for name in ("gt_score", "learned_score", "kl"):
        mean = np.mean([row[name] for row in samples])
        assert mean == pytest.approx(float(table[-1][f"eval/{name}"]), rel=1e-4, abs=1e-5)
    state = torch.load(plain / "checkpoint.pt", weights_only=True)["parts"]
    lm = transformers.AutoModelForCausalLM.from_pretrained(plain / "policy")
    before = transformers.AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    assert torch.equal(state["policy"]["lm.transformer.wte.weight"], lm.transformer.wte.weight)
    assert not torch.equal(before.transformer.wte.weight, lm.transformer.wte.weight)
    reward, _ = aihf.load_scorer(str(plain / "reward"), "reward", True, torch.device("cpu"))
    assert torch.equal(state["reward"]["model.score.weight"], reward.model.score.weight)
    for name in ("reward", "value"):
        assert not torch.equal(state[name]["model.transformer.wte.weight"], before.transformer.wte.weight)
    assert not torch.equal(state["value"]["model.score.weight"], reward.model.score.weight)
    assert transformers.AutoTokenizer.from_pretrained(plain / "policy").eos_token_id == EOS


def test_g1_sees_responses_of_the_current_policy(tmp_path, world, monkeypatch):
    """Everything that the reward reads in an upper level, and the policy as each step left it: the responses are those
    that this policy, and no other one, gives to the prompts of the demonstrations drawn."""
    seen, policies, save = [], {}, torch.save
    call = transformers.PreTrainedTokenizerFast.__call__

    def record(self, text, *args, **kwargs):
        seen.append(text)
        return call(self, text, *args, **kwargs)

    def keep(state, path):
        policies[state["progress"]["step"]] = {n: x.clone() for n, x in state["parts"]["policy"].items()}
        save(state, path)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", record)
    monkeypatch.setattr(torch, "save", keep)
    changes = {"reward_updates_per_iteration": 1, "preference_weight": 0, "temperature": 1, "response_memory": 1}
    run(tmp_path, world, **changes)
    monkeypatch.undo()
    demos = [json.loads(line) for line in (world / "demonstrations.jsonl").read_text().splitlines()]
    tokenizer, eos, pad = aihf.load_tokenizer(str(world / "model"), "model-name-or-path")
    policy = aihf.Policy(aihf.load_pretrained("AutoModelForCausalLM", str(world / "model"), "x").float())
    for k, step in enumerate((0, 2)):
        drawn = [demos[i] for i in aihf.draw(len(demos), 8, k, (1, 1))]
        prompts = tokenizer([row["prompt"] for row in drawn], truncation=True, max_length=8)["input_ids"]
        texts = {}
        for which in (step, 1):
            policy.load_state_dict(policies[which])
            uniform = torch.from_numpy(np.random.default_rng([1, 3, k]).random((8, 8)))
            own = policy.sample(*aihf.pad_rows(prompts, pad, left=True), uniform, 1.0, eos, pad)
            lengths = aihf.response_mask(own, eos).sum(-1).tolist()
            own = [tokenizer.decode(y[:n], skip_special_tokens=True) for y, n in zip(own.tolist(), lengths)]
            order = np.random.default_rng([1, 4, k]).permutation(8)
            texts[which] = [drawn[i]["prompt"] + own[i] for i in order]
        read = [texts[8:] for texts in seen if len(texts) == 16]  # demonstrations, then responses
        assert texts[step] in read and texts[1] not in read


def test_the_memory_holds_the_latest_responses(tmp_path, world):
    """Of as many policies as it may, the current one's among them, in the checkpoint; g1 draws from all of them."""
    for memory, kept in ((1, [1]), (10, [0, 1])):
        folder = run(tmp_path, world, response_memory=memory, run_name=f"run{memory}").with_name(f"run{memory}")
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        rows_of = [[i for i, _ in responses] for responses in state["memory"]]
        assert rows_of == [aihf.draw(40, 24, k, (1, 1)).tolist() for k in kept]
    first, second = (rows(tmp_path / "runs" / f"run{memory}") for memory in (1, 10))
    assert first[1] == second[1] and first[3]["rewards/loss"] != second[3]["rewards/loss"]


def test_demo_weight_0_is_rlhfs_reward_learning(tmp_path, world):
    """The reward after an upper level against a loop of rlhf_baseline.py's parts; demonstrations are not even read."""
    changes = {"demo_weight": 0, "preference_weight": 1, "ppo_steps": 1, "demonstrations": "nowhere.jsonl"}
    folder = run(tmp_path, world, **changes, reward_learning_rate=0.003)
    pairs = rlhf.read_texts(str(world / "preferences.jsonl"), "preferences", ("prompt", "chosen", "rejected"))
    train, _ = rlhf.hold_out(len(pairs), 0.1, "", np.random.default_rng([1, 0]))
    torch.manual_seed(1)
    reward, _ = rlhf.load_scorer(str(world / "model"), "reward-model-path", False, torch.device("cpu"))
    optimizer = torch.optim.Adam(reward.parameters(), lr=0.003)
    for rows_now in rlhf.in_parts(train[rlhf.draw(len(train), 24, 0, (1, 2))], 8):
        ids, mask = reward.encode([pairs[i][0] + pairs[i][side] for side in (1, 2) for i in rows_now])
        chosen, rejected = rlhf.at_last(reward(ids, mask), mask).chunk(2)
        (-F.logsigmoid(chosen - rejected).mean()).backward()
        torch.nn.utils.clip_grad_norm_(reward.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    learned, _ = aihf.load_scorer(str(folder / "reward"), "reward", True, torch.device("cpu"))
    for name, tensor in reward.model.state_dict().items():
        torch.testing.assert_close(learned.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert rows(folder)[1]["reward/gap"] == "" != rows(folder)[1]["rewards/accuracies"]


def test_preference_weight_0_is_inverse_rl(tmp_path, world):
    """Without reading a preference."""
    table = rows(run(tmp_path, world, preference_weight=0, preferences="nowhere.jsonl"))
    assert table[3]["reward/gap"] != "" and table[3]["rewards/accuracies"] == ""


def test_learning(tmp_path):
    """On the embedded models and data the ground truth goes up by a good deal in a few steps."""
    assets = ROOT / aihf.ASSETS
    given = {f"--{name}": assets / f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")}
    given |= {"--model-name-or-path": assets / "model", "--ground-truth-path": assets / "classifier"}
    given |= {"--ppo-steps": 8, "--reward-updates-per-iteration": 12, "--eval-prompts": 64, "--threads": 1}
    given |= {"--reward-batch-size": 16, "--batch-size": 32, "--minibatch-size": 16, "--eval-every": 8}
    code, out, err = execute(tmp_path, [f"{flag}={value}" for flag, value in given.items()] + ["--run-name=run"])
    assert code == 0, (out, err)
    table = rows(tmp_path / "runs" / "run")
    assert float(table[-1]["eval/gt_score"]) > float(table[0]["eval/gt_score"]) + 0.5
    assert float(table[-1]["eval/win_rate"]) > 0.6 and float(table[-1]["objective/scores"]) > 0.1


def test_from_sft_over_an_opponent(tmp_path, world, plain):
    """The start is the reference; KL to the base model and win rates are of other models."""
    table = rows(run(tmp_path, world, sft_model_path=plain / "policy"))
    assert table[0]["eval/kl"] == "0" != table[0]["eval/kl_base"] and table[0]["eval/win_rate"] == "0.5"
    assert table[0]["eval/gt_score"] == rows(plain)[-1]["eval/gt_score"]
    table = rows(run(tmp_path, world, opponent_path=plain / "policy", run_name="run2").with_name("run2"))
    assert float(table[0]["eval/win_rate"]) == 1 - float(rows(plain)[-1]["eval/win_rate"])
    assert table[1]["eval/kl"] == rows(plain)[1]["eval/kl"]


@pytest.mark.parametrize("changes", [{"policy_optimizer": "remax"}, {"demo_loss": "logistic"}], ids=str)
def test_options(tmp_path, world, plain, changes):
    table, ppo = rows(run(tmp_path, world, **changes)), rows(plain)
    assert table[0] == ppo[0] and table[4]["eval/kl"] not in ("0", ppo[4]["eval/kl"])
    if "policy_optimizer" in changes:  # the first upper level does not know of it
        assert table[1]["rewards/loss"] == ppo[1]["rewards/loss"] and float(table[4]["losses/value"]) == 0
        assert all(float(row["losses/ratio"]) == pytest.approx(1, abs=1e-5) for row in table[1:])


def test_gpt_neox(tmp_path):
    run(tmp_path, make_world(tmp_path / "w", "gpt_neox"), ppo_steps=2)


def test_a_reward_model_with_another_tokenizer(tmp_path, world):
    """It reads text; the value network, which reads tokens, comes from the policy instead."""
    other = Path(shutil.copytree(world / "classifier", tmp_path / "other"))
    raw = json.loads((other / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    a, b = list(vocabulary)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    run(tmp_path, world, reward_model_path=other, ppo_steps=2)


def test_no_ground_truth_and_adaptive_kl(tmp_path, world, plain):
    """Training does not see the ground truth: without it everything else is the same."""
    folder = run(tmp_path, world, ground_truth_path="")
    seen_by_truth = ("eval/gt_score", "eval/gt_score_std", "eval/win_rate", "eval/reward_correlation")
    for row, other in zip(rows(folder), rows(plain), strict=True):
        assert {**other, **dict.fromkeys(seen_by_truth, "")} == row
    folder = run(
        tmp_path, world, "--adaptive-kl", run_name="run2", kl_coefficient=0.05, target_kl=0.001, kl_horizon=16
    ).with_name("run2")
    beta = [float(row["objective/kl_coefficient"]) for row in rows(folder)[1:]]
    assert beta == pytest.approx([0.05, 0.04, *beta[2:]]) and beta[2] != beta[1]


def test_long_demonstrations_are_cut(tmp_path, world):
    """To what the policy can write."""
    lines = [json.loads(line) for line in (world / "demonstrations.jsonl").read_text().splitlines()]
    long = [{**row, "completion": " great" + " film awful story" * 20} for row in lines]
    for name, rows_of_file in (("long", long), ("short", [{**r, "completion": r["completion"][:40]} for r in long])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_file))
    tokenizer, *_ = aihf.load_tokenizer(str(world / "model"), "x")
    assert len(tokenizer(long[0]["completion"][:40])["input_ids"]) > 8
    a = rows(run(tmp_path, world, demonstrations=tmp_path / "long.jsonl", run_name="run"))
    b = rows(run(tmp_path, world, demonstrations=tmp_path / "short.jsonl", run_name="run2").with_name("run2"))
    assert a == b


def at_adam_step(monkeypatch, when: int, do) -> None:
    """do() after so many Adam steps of any of the three networks."""
    adam, calls = torch.optim.Adam.step, [0]

    def step(self, *args, **kwargs):
        adam(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == when:
            do()

    monkeypatch.setattr(torch.optim.Adam, "step", step)


def at_save(monkeypatch, when: int, do) -> None:
    """do() in the n-th checkpoint, half written."""
    save, calls = torch.save, [0]

    def half(state, path):
        calls[0] += 1
        if calls[0] == when:
            Path(path).write_bytes(b"half")
            do()
        save(state, path)

    monkeypatch.setattr(torch, "save", half)


MOMENTS = {
    "first upper level": (at_adam_step, 2),
    "first lower level": (at_adam_step, UPPER + 3),
    "second lower step": (at_adam_step, UPPER + LOWER + 3),
    "second upper level": (at_adam_step, UPPER + 2 * LOWER + 2),
    "first save": (at_save, 2),
    "save before an upper level": (at_save, 3),
    "last save": (at_save, 5),
}


@pytest.mark.parametrize("when, number", MOMENTS.values(), ids=MOMENTS)
def test_kill_and_resume(tmp_path, world, plain, monkeypatch, when, number):
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patched:
        when(patched, number, kill)
        with pytest.raises(Killed):
            execute(tmp_path, command(world, tmp_path / "runs"))
    code, out, err = execute(tmp_path, ["--resume", folder])
    assert code == 0, (out, err)
    assert rows(folder) == rows(plain) and weights(folder) == weights(plain)


@pytest.mark.parametrize("number", [2, UPPER + LOWER + 3], ids=["upper level", "lower level"])
def test_interrupt_and_resume(tmp_path, world, plain, monkeypatch, number):
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patched:
        at_adam_step(patched, number, lambda: signal.raise_signal(signal.SIGINT))
        code, out, err = execute(tmp_path, command(world, tmp_path / "runs", checkpoint_every=100))
    assert code == 130 and f"aihf_ppo_llm.py --resume {folder}" in out, (out, err)
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
    code, out, err = execute(tmp_path, ["--resume", finished, "--ppo-steps", 5])
    assert code == 0 and rows(finished)[:5] == rows(plain) and rows(finished)[5]["charts/step"] == "5", (out, err)


def test_two_processes_are_one(tmp_path, world, plain):
    """torchrun with 2 processes and half the rows each: what is logged is the same up to rounding."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command(world, tmp_path / "runs")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)  # pytest shows this whole when the next line fails, and cuts a long message short
    assert done.returncode == 0
    assert_close(rows(tmp_path / "runs" / "run"), rows(plain))


def assert_close(table: list[dict], other: list[dict]) -> None:
    for row, its in zip(table, other, strict=True):
        assert [name for name in row if row[name]] == [name for name in its if its[name]]
        for name, value in row.items():
            if value:
                assert float(value) == pytest.approx(float(its[name]), rel=1e-3, abs=1e-4), name


def test_micro_batches_change_nothing(tmp_path, world, plain):
    assert_close(rows(run(tmp_path, world, micro_batch_size=3)), rows(plain))


@pytest.mark.parametrize("name", ["reward_learning_rate", "learning_rate"])
def test_not_finite(tmp_path, world, name):
    code, out, err = execute(tmp_path, command(world, tmp_path / "runs", **{name: 1e30}))
    assert code == 1 and "is not finite at step" in err, (out, err)
    assert torch.load(tmp_path / "runs" / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 0


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"model_name_or_path": "./nowhere"}, "./nowhere"),
        ({"model_name_or_path": "data_gen/assets/imdb/model"}, "python data_gen/imdb_data.py pretrain"),
        ({"ground_truth_path": "MODEL"}, "--ground-truth-path"),
        ({"opponent_path": "./nowhere"}, "--opponent-path"),
        ({"demonstrations": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"demonstrations": "PROMPTS"}, "completion"),
        ({"preferences": "PROMPTS"}, "chosen"),
        ({"prompts": "MODEL"}, "--prompts"),
        ({"num_demonstrations": 1000}, "--num-demonstrations"),
        ({"eval_prompts": 60}, "--eval-prompts"),
        ({"response_length": 47}, "--response-length"),
        ({"batch_size": 12}, "--batch-size"),
        ({"held_out_share": 1}, "--held-out-share"),
        ({"demo_weight": 0, "preference_weight": 0}, "--demo-weight"),
        ({"gamma": 1.5}, "--gamma"),
        ({"reward_learning_rate": "nan"}, "--reward-learning-rate"),
        ({"resume": "nowhere"}, "args.json"),
        ({"evaluate": "nowhere"}, "args.json"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, world, changes, fragment):
    places = {"MODEL": world / "model", "PROMPTS": world / "prompts.jsonl"}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    assert_refused(execute(tmp_path, command(world, tmp_path / "runs", **changes)), fragment)
    assert not (tmp_path / "runs").exists()


GOOD = aihf.Args()
NUMBERS = [f.name for f in fields(GOOD) if type(getattr(GOOD, f.name)) in (int, float)]


def test_numbers(capsys):
    aihf.check_args(GOOD)
    for preset in aihf.PRESETS.values():
        aihf.check_args(aihf.Args(**preset))
    for name in NUMBERS:
        for value in (-1, float("nan"), float("inf"), *(() if name in aihf.MAY_BE_ZERO else (0,))):
            with pytest.raises(SystemExit) as stop:
                aihf.check_args(replace(GOOD, **{name: value}))
            captured = capsys.readouterr()
            assert_refused((stop.value.code, captured.out, captured.err), f"--{name.replace('_', '-')}")


def test_presets_are_the_papers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--preset", "imdb", "--batch-size", "64"])
    args = aihf.parse_args()
    assert (args.model_name_or_path, args.reward_batch_size, args.batch_size) == ("gpt2", 128, 64)
    assert (args.policy_steps_per_iteration, args.reward_updates_per_iteration) == (20, 12)
    assert (args.reward_learning_rate, args.learning_rate) == (1e-5, 1.41e-5)
    monkeypatch.setattr(sys, "argv", ["x", "--preset", "hh"])
    args = aihf.parse_args()
    assert (args.policy_steps_per_iteration, args.reward_updates_per_iteration) == (6000, 20)
    assert (args.reward_learning_rate, args.learning_rate) == (1e-5, 1e-6)
    assert (args.reward_batch_size, args.batch_size) == (8, 4)


BAD_RUNS = {
    "no checkpoint": (lambda f, w: (f / "checkpoint.pt").unlink(), [], "checkpoint.pt"),
    "half a checkpoint": (lambda f, w: (f / "checkpoint.pt").write_bytes(b"PK"), [], "checkpoint.pt"),
    "no metrics": (lambda f, w: (f / "metrics.csv").unlink(), [], "metrics.csv"),
    "other data": (lambda f, w: set_argument(f, prompts=str(w / "demonstrations.jsonl")), [], "other data"),
    "another script's": (lambda f, w: set_argument(f, script="rlhf_baseline"), [], "args.json"),
    "its own arguments": (lambda f, w: None, ["--seed", 2], "--seed"),
    "fewer steps": (lambda f, w: None, ["--ppo-steps", 2], "--ppo-steps"),
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
def defined_in(module) -> set[str]:
    members = inspect.getmembers(module, lambda value: inspect.isfunction(value) or inspect.isclass(value))
    return {name for name, value in members if value.__module__ == module.__name__}


def assert_letter_identical(a, b, but: set[str]) -> set[str]:
    """Functions and classes of the same name in two scripts; returns these names."""
    shared = defined_in(a) & defined_in(b)
    same = {n for n in shared if inspect.getsource(getattr(a, n)) == inspect.getsource(getattr(b, n))}
    assert shared - same == but
    return shared


def test_what_the_two_scripts_repeat_is_letter_identical():
    shared = assert_letter_identical(aihf, rlhf, {"check_args", "load_checkpoint"})
    assert shared >= {"Policy", "Scorer", "generalised_advantages", "policy_losses", "read_texts", "draw"}


def test_shared_flags_have_the_same_defaults():
    """The same PPO for both methods."""
    ours, theirs = ({f.name: f.default for f in fields(kind)} for kind in (aihf.Args, rlhf.LlmArgs))
    both = set(ours) & set(theirs)
    assert len(both) > 40 and {name for name in both if ours[name] != theirs[name]} == set()
    for preset, values in aihf.PRESETS.items():
        its = rlhf.PRESETS[preset]
        assert {name for name in values if name in its and values[name] != its[name]} <= {"ppo_steps"}
