"""rlhf_baseline.py mujoco: its mathematics against references, and its three stages as a user runs, kills and resumes
them; benchmark/figure3_data.py.

python -m pytest tests/test_rlhf_mujoco.py

Helpers, and the tiny environment and data, are those of test_sac_mujoco_run.py; blocks that both scripts have are
compared letter by letter here and tested there.
"""

import csv
import importlib.util
import inspect
import json
import shutil
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_sac_mujoco_run import (
    ENV,
    ROOT,
    assert_refused,
    assert_same_run,
    change_arrays,
    checkpoint,
    files,
    make_data,
    process,
    rows,
)
from test_sac_mujoco_run import execute as execute_script
from torch import distributions

import aihf_sac_mujoco as aihf
import rlhf_baseline as rlhf

SCRIPT = ROOT / "rlhf_baseline.py"
FIGURE3_DATA = ROOT / "benchmark" / "figure3_data.py"
FLAGS = {  # 20 updates of cloning and of reward; 4 iterations of 50 SAC steps, the first two of them warm-up
    "--env": ENV,
    "--bc-updates": 20,
    "--bc-batch-size": 8,
    "--reward-updates": 20,
    "--reward-learning-rate": 0.01,
    "--preference-batch-size": 8,
    "--penalty-batch-size": 16,
    "--segment-length": 4,
    "--total-timesteps": 200,
    "--policy-steps-per-iteration": 50,
    "--critic-warmup-steps": 100,
    "--batch-size": 16,
    "--hidden": 8,
    "--eval-every": 2,
    "--eval-episodes": 2,
    "--checkpoint-every": 1,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # Gymnasium's, on v4 environments


def command(data: Path, runs: Path, *flags, **changes) -> list[str]:
    """Arguments of a tiny run named `run`; changes are flags by their Python names, and None leaves one out."""
    given = FLAGS | {"--data-dir": data, "--runs-dir": runs, "--run-name": "run"}
    given |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    pieces = ["mujoco"]
    for flag, value in given.items():
        if isinstance(value, tuple):
            pieces += [flag, *map(str, value)]
        elif value is not None:
            pieces.append(f"{flag}={value}")  # = lets the value begin with -
    return [*pieces, "--no-cuda", *(() if "--compile" in flags else ("--no-compile",)), *map(str, flags)]


def execute(cwd: Path, argv: list) -> tuple[int, str, str]:
    return execute_script(cwd, argv, SCRIPT)


def run(cwd: Path, data: Path, *flags, **changes) -> Path:
    """A tiny run that has to end well; returns its folder."""
    code, out, err = execute(cwd, command(data, cwd / "runs", *flags, **changes))
    assert code == 0, (out, err)
    return cwd / "runs" / "run"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "pendulum", seed=0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, data):
    """(folder, checkpoints in the order they were saved) of an undisturbed run; read only."""
    states, save = [], torch.save
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "save", lambda state, path: (save(state, path), states.append(torch.load(path))))
        folder = run(tmp_path_factory.mktemp("plain"), data)
    return folder, states


@pytest.fixture(scope="module")
def plain(recorded) -> Path:
    return recorded[0]


@pytest.fixture
def finished(plain, tmp_path) -> Path:
    """A copy of the undisturbed run, to spoil."""
    return Path(shutil.copytree(plain, tmp_path / "finished"))


# ------------------------------------------------------------------------------------------------------ mathematics
SIZES = (3, 8, 7, 4)


def policy(scale=1.0):
    actor = rlhf.init_mlp(SIZES, np.random.default_rng(0)).double() * scale
    return actor, torch.from_numpy(np.random.default_rng(1).standard_normal((500, 3)))


def test_log_likelihood_is_sample_actions():
    actor, obs = policy()
    noise = torch.from_numpy(np.random.default_rng(2).standard_normal((500, 2)))
    actions, log_prob = rlhf.sample_action(actor, obs, noise, SIZES)
    torch.testing.assert_close(rlhf.log_likelihood(actor, obs, actions, SIZES), log_prob, rtol=1e-9, atol=1e-9)


def test_log_likelihood_is_that_of_a_squashed_gaussian():
    actor, obs = policy()
    actions = torch.linspace(-0.99, 0.99, 1000).double().view(500, 2)
    mean, log_std = rlhf.mlp(actor, obs, SIZES).chunk(2, -1)
    squashed = distributions.TransformedDistribution(
        distributions.Normal(mean, log_std.exp()), distributions.TanhTransform()
    )
    expected = squashed.log_prob(actions).sum(-1)
    torch.testing.assert_close(rlhf.log_likelihood(actor, obs, actions, SIZES), expected, rtol=1e-9, atol=1e-9)


def test_kl_divergence():
    """That of torch.distributions before tanh, and after it the mean of log π - log π⁰ over samples; 0 of a policy to
    itself, even where float32 rounds all of its actions to ±1."""
    rng = np.random.default_rng(0)
    sizes, obs = (4, 8, 4), torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    actor, reference = rlhf.init_mlp(sizes, rng), rlhf.init_mlp(sizes, rng)
    normals = []
    for policy in (actor, reference):
        mean, log_std = rlhf.mlp(policy, obs, sizes).chunk(2, -1)
        normals.append(torch.distributions.Normal(mean, log_std.exp()))
    kl = rlhf.kl_divergence(actor, reference, obs, sizes)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(*normals).sum(-1))
    many = obs.repeat(20_000, 1)
    noise = torch.randn(len(many), 2, generator=torch.Generator().manual_seed(1))
    actions, log_prob = rlhf.sample_action(actor, many, noise, sizes)
    estimate = (log_prob - rlhf.log_likelihood(reference, many, actions, sizes)).reshape(-1, 16).mean(0)
    torch.testing.assert_close(kl, estimate, atol=0.02, rtol=0.02)
    rlhf.layers(actor, sizes)[-1][1][0, :2] = 40.0  # the means
    assert (rlhf.sample_action(actor, obs, noise[:16], sizes)[0] == 1).all()
    assert (rlhf.kl_divergence(actor, actor, obs, sizes) == 0).all()


def test_log_likelihood_of_actions_at_the_bound_is_finite():
    actor, obs = policy()
    for dtype in (torch.float32, torch.float64):
        at_bound = torch.ones(500, 2, dtype=dtype) * torch.tensor([1, -1])
        gradient = torch.func.grad(lambda a: rlhf.log_likelihood(a, obs.to(dtype), at_bound, SIZES).mean())(
            actor.to(dtype)
        )
        assert gradient.isfinite().all() and gradient.any()


def test_standardised_inputs():
    actor, obs = policy()
    mean, std, raw = obs.mean(0), obs.std(0), actor.clone()
    expected = rlhf.mlp(actor, (obs - mean) / std, SIZES)
    rlhf.standardise_inputs_(raw, mean, std, SIZES)
    torch.testing.assert_close(rlhf.mlp(raw, obs, SIZES), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share, held_out", [(0.1, 1), (0.3, 3), (0.001, 1), (0.99, 9)])
def test_hold_out(share, held_out):
    parts = rlhf.hold_out(10, share, "", np.random.default_rng(0))
    assert len(parts[1]) == held_out and sorted(np.concatenate(parts)) == list(range(10))


def write_episodes(path: Path, obs: np.ndarray, actions: np.ndarray, episodes: int) -> None:
    """Observations (steps + episodes, ·) and actions (steps, ·) as episodes of one length, cut off by their ends."""
    ends = np.arange(1, len(actions) + 1) % (len(actions) // episodes) == 0
    np.savez(path, observations=obs, actions=actions, terminations=np.zeros(len(actions), bool), truncations=ends)


def test_cloning_recovers_a_squashed_gaussian(tmp_path, data):
    """Demonstrations of a known policy, on observations of unequal scale: the clone's distribution is the policy's."""
    sizes, rng = (4, 16, 2), np.random.default_rng(3)
    teacher, scale = 2 * rlhf.init_mlp(sizes, rng), np.array([0.1, 1, 5, 20])
    obs = (scale * rng.standard_normal((6010, 4)) + 0.5 * scale).astype(np.float32)
    steps = np.delete(obs, np.arange(600, 6010, 601), axis=0)
    noise = torch.from_numpy(rng.standard_normal((6000, 1), np.float32))
    rlhf.standardise_inputs_(teacher, *(torch.from_numpy(a.astype(np.float32)) for a in (0.5 * scale, scale)), sizes)
    actions, _ = rlhf.sample_action(teacher, torch.from_numpy(steps), noise, sizes)
    shutil.copytree(data, tmp_path / "data")
    write_episodes(tmp_path / "data" / "high.npz", obs, 3 * actions.numpy(), episodes=10)
    changes = {"bc_updates": 1500, "bc_batch_size": 128, "bc_learning_rate": 1e-2, "hidden": 16, "reward_updates": 1}
    folder = run(tmp_path, tmp_path / "data", total_timesteps=1, **changes)

    cloned = load_file(folder / "model.safetensors")["cloned_actor"]
    fresh = torch.from_numpy((scale * rng.standard_normal((2000, 4)) + 0.5 * scale).astype(np.float32))
    (mean, log_std), (true_mean, true_log_std) = (rlhf.mlp(a, fresh, sizes).chunk(2, -1) for a in (cloned, teacher))
    kl = log_std - true_log_std + (true_log_std.exp() ** 2 + (true_mean - mean) ** 2) / (2 * log_std.exp() ** 2) - 0.5
    assert kl.median() < 0.03 and kl.mean() < 0.1
    assert true_mean.std() > 0.5 and true_log_std.std() > 0.5  # it was not easy
    assert (mean - true_mean).abs().median() < 0.1 * true_mean.std()
    row = rows(folder)[0]
    sampled = rlhf.log_likelihood(teacher, torch.from_numpy(steps), actions, sizes).mean().item()
    assert float(row["bc/held_out_log_likelihood"]) == pytest.approx(sampled, abs=0.1)


def test_reward_model_ranks_held_out_pairs_of_the_embedded_data(tmp_path):
    (tmp_path / "data_gen").symlink_to(ROOT / "data_gen")
    changes = {"env": None, "data_dir": None, "segment_length": 50, "total_timesteps": 1, "eval_episodes": 1}
    changes |= {"bc_updates": 1, "reward_updates": 150, "preference_batch_size": 64, "hidden": 32}
    folder = run(tmp_path, Path(), **changes)
    row = rows(folder)[1]
    assert float(row["reward/held_out_accuracy"]) > 0.6 and float(row["reward/held_out_loss"]) < 0.68


# ---------------------------------------------------------------------------------------------------------- whole runs
def test_smoke_as_a_user(tmp_path, data):
    done = process(tmp_path, [SCRIPT, *command(data, Path("runs"), run_name=None, seed=3)])
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{ENV}__rlhf_baseline__3__")
    for line in ("cloned policy after", "reward model after", "final true return"):
        assert line in done.stdout
    saved = json.loads((folder / "args.json").read_text())
    assert saved.pop("script") == "rlhf_baseline"
    assert set(saved) == {field.name for field in fields(rlhf.MujocoArgs)}
    assert {p.name for p in folder.iterdir()} - {"learning_curve.png"} == {
        *("args.json", "checkpoint.pt", "metrics.csv", "model.safetensors")
    }
    assert (folder / "learning_curve.png").is_file() == bool(importlib.util.find_spec("matplotlib"))


def test_metrics(plain):
    with open(plain / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == rlhf.METRICS
    filled = [{key for key, value in row.items() if value} for row in table]
    always = {"charts/iteration", "charts/sac_steps", "charts/env_steps", "charts/wall_seconds"}
    evaluated = {"eval/return_mean", "eval/return_std", "eval/length_mean"}
    cloning = {"bc/updates", "bc/log_likelihood", "bc/held_out_log_likelihood"}
    pairs = {f"reward/{k}" for k in "updates held_out_accuracy held_out_loss preference_accuracy".split()}
    pairs |= {"reward/preference_loss", "reward/demonstrations", "eval/reward_correlation"}
    assert filled[:2] == [always | evaluated | cloning, always | pairs]
    rl = set(rlhf.METRICS) - cloning - pairs - evaluated | {"reward/demonstrations"}
    assert filled[2:] == [rl, rl | evaluated | {"eval/reward_correlation"}] * 2
    assert [(row["charts/iteration"], row["charts/sac_steps"]) for row in table] == [
        *(("0", "0"), ("0", "0"), ("1", "50"), ("2", "100"), ("3", "150"), ("4", "200"))
    ]


def test_what_moves_in_which_stage(recorded):
    """Checkpoints: at the start, after cloning, after the reward model, and after each iteration (two of warm-up)."""
    _, states = recorded
    assert [state["progress"]["stage"] for state in states] == [1, 2, 3, 3, 3, 3, 3]
    sacs = [rlhf.SAC(*state["sac"]) for state in states]
    moves = {
        "actor": [True, False, False, False, True, True],
        "critics": [False, False, True, True, True, True],
        "targets": [False, False, True, True, True, True],
        "actor_m": [False, False, True, True, True, True],
    }
    for name, expected in moves.items():
        assert [not torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(sacs, sacs[1:])] == expected, name
    for name, expected in (("theta", [False, True] + 4 * [False]), ("cloned", [True] + 5 * [False])):
        assert [not torch.equal(a[name], b[name]) for a, b in zip(states, states[1:])] == expected, name
    assert all(sac.log_beta.exp().item() == pytest.approx(rlhf.MujocoArgs.kl_coefficient) for sac in sacs)
    assert torch.equal(sacs[1].actor, states[1]["cloned"])
    assert [len(state["replay"]) for state in states] == [0, 0, 0, 50, 100, 150, 200]
    assert [sac.updates.item() for sac in sacs] == [0, 0, 0, 50, 100, 150, 200]


@pytest.mark.parametrize("beta", ["0.2", "auto"])
@pytest.mark.parametrize("warm_up", [0, 50])
def test_without_a_penalty_to_the_clone(tmp_path, data, beta, warm_up):
    """π⁰ is uniform: SAC with its entropy bonus, a fixed one or one that is tuned as soon as the policy moves."""
    flags = {"kl_coefficient": 0, "entropy_coefficient": beta, "critic_warmup_steps": warm_up, "total_timesteps": 50}
    folder = run(tmp_path, data, **flags)
    state = torch.load(folder / "checkpoint.pt")
    assert torch.equal(rlhf.SAC(*state["sac"]).actor, state["cloned"]) == (warm_up == 50)
    begins = 0.05 if beta == "auto" else 0.2
    stays = beta == "0.2" or warm_up == 50
    assert (rlhf.SAC(*state["sac"]).log_beta.exp().item() == pytest.approx(begins)) == stays
    assert {row["losses/kl"] for row in rows(folder)} == {""}


def test_stage_3_sees_the_frozen_reward(tmp_path, data, monkeypatch):
    batches = []
    monkeypatch.setattr(torch, "compile", lambda update, **_: lambda *args: (batches.append(args), update(*args))[1])
    folder = run(tmp_path, data, "--compile", total_timesteps=100, critic_warmup_steps=50)
    model = load_file(folder / "model.safetensors")
    for _, _, obs, action, reward, *_ in batches[1:]:  # the first one is the compiler's
        x = torch.cat([((obs - model["obs_mean"]) / model["obs_std"]).clamp(-10, 10), action], -1)
        torch.testing.assert_close(reward, rlhf.reward(model["reward"], x, (5, 8, 1), 0.0, 4.0), rtol=1e-4, atol=1e-4)
    assert len(batches) == 101


@pytest.mark.parametrize("to_clone", [True, False])
def test_update_against_autograd_of_its_definition(to_clone):
    """With a learning rate of 0 nothing moves but Adam's m, a tenth of each gradient. Uniform π⁰: AIHF's update."""
    rng = np.random.default_rng(0)
    actor_sizes, critic_sizes, beta, gamma = (4, 8, 4), (6, 8, 1), 0.3, 0.9
    sac, cloned = rlhf.init_sac(actor_sizes, critic_sizes, beta, rng, "cpu"), rlhf.init_mlp(actor_sizes, rng)
    obs, next_obs, reward = torch.randn(32, 4), torch.randn(32, 4), torch.randn(32)
    action, ends, noise = torch.rand(32, 2) * 2 - 1, (torch.rand(32) < 0.3).float(), torch.randn(2, 32, 2)
    batch = (torch.tensor(0.0), obs, action, reward, next_obs, ends, noise)

    def q(critics, obs, action):
        return rlhf.mlp(critics, torch.cat([obs, action], -1), critic_sizes).squeeze(-1)

    def soft(actor, obs, noise):  # E[Q] - β KL for one sample of the action
        action, log_prob = rlhf.sample_action(actor, obs, noise, actor_sizes)
        kl = rlhf.kl_divergence(actor, cloned, obs, actor_sizes) if to_clone else log_prob
        return q(sac.critics, obs, action).amin(0) - beta * kl

    with torch.enable_grad():
        critics, actor = sac.critics.clone().requires_grad_(), sac.actor.clone().requires_grad_()
        backup = (reward + gamma * (1 - ends) * soft(sac.actor, next_obs, noise[0])).detach()
        q_loss = ((q(critics, obs, action) - backup) ** 2).mean(-1).sum()
        actor_loss = -soft(actor, obs, noise[1]).mean()
        (critics_grad,), (actor_grad,) = torch.autograd.grad(q_loss, critics), torch.autograd.grad(actor_loss, actor)
    other = rlhf.SAC(*(tensor.clone() for tensor in sac))
    reference = cloned if to_clone else None
    update = rlhf.make_sac_update(actor_sizes, critic_sizes, gamma, 0.005, not to_clone, -2.0, reference)
    losses = update(sac, *batch)
    torch.testing.assert_close(losses[:2], torch.stack([q_loss, actor_loss]).detach())
    torch.testing.assert_close(sac.critics_m, 0.1 * critics_grad)
    torch.testing.assert_close(sac.actor_m, 0.1 * actor_grad)
    if not to_clone:
        assert torch.equal(
            losses[:4], aihf.make_sac_update(actor_sizes, critic_sizes, gamma, 0.005, True, -2.0)(other, *batch)
        )
        assert all(torch.equal(a, b) for a, b in zip(sac, other))


def test_copied_alone_to_an_empty_folder(tmp_path, data):
    (tmp_path / "alone").mkdir()
    shutil.copy(SCRIPT, tmp_path / "alone")
    done = process(tmp_path / "alone", [SCRIPT.name, *command(data, Path("runs"), total_timesteps=50)])
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "alone" / "runs" / "run")) == 3


def test_training_cannot_see_the_true_reward(tmp_path, data, plain, monkeypatch):
    make = gym.make

    class Liar(gym.Wrapper):
        def step(self, action):
            obs, _, *rest = self.env.step(action)
            return obs, float("nan"), *rest

    monkeypatch.setattr(gym, "make", lambda *args, **kwargs: Liar(make(*args, **kwargs)))
    shutil.copytree(data, tmp_path / "data")
    for tier in ("low", "medium", "high"):
        change_arrays(tmp_path / "data" / f"{tier}.npz", rewards=None)
    folder = run(tmp_path, tmp_path / "data")
    assert_same_run(folder, plain, without="eval/")
    assert rows(folder)[0]["eval/return_mean"] == "nan"


def test_another_seed_differs(tmp_path, data, plain):
    folder = run(tmp_path, data, seed=2, total_timesteps=50)
    assert checkpoint(folder)["cloned"] != checkpoint(plain)["cloned"]
    assert checkpoint(folder)["theta"] != checkpoint(plain)["theta"]


# --------------------------------------------------------------------------------------------- kill, resume, evaluate
class Killed(BaseException):
    """Ends the script where it stands: nothing catches it, so that the run folder stays as SIGKILL would leave it."""


def at(monkeypatch, moment: str, do) -> None:
    """do() at a stage's update 7 (stages 1 and 2) or 130 (3), or when half of the fourth checkpoint is written."""
    adam, save, calls = torch.optim.Adam.step, torch.save, {"1": 0, "2": 0, "3": 0, "save": 0}

    def counted(name, number):
        calls[name] += 1
        if moment == name and calls[name] == number:
            do()

    def step(self, *args):
        counted("1" if self.defaults["lr"] == rlhf.MujocoArgs.bc_learning_rate else "2", 7)
        return adam(self, *args)

    def half_save(state, path):
        path.write_bytes(b"half of it")
        counted("save", 4)
        save(state, path)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(torch, "save", half_save)
    monkeypatch.setattr(torch, "compile", lambda update, **_: lambda *args: (counted("3", 131), update(*args))[1])


def kill():
    raise Killed


@pytest.mark.parametrize("moment, rows_then", [("1", 0), ("2", 1), ("3", 4), ("save", 3)])
def test_kill_and_resume(tmp_path, data, plain, monkeypatch, moment, rows_then):
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patched:
        at(patched, moment, kill)
        with pytest.raises(Killed):
            execute(tmp_path, command(data, tmp_path / "runs", "--compile"))
    assert len(rows(folder)) == rows_then
    code, out, err = execute(tmp_path, ["mujoco", "--resume", folder, "--no-compile"])
    assert code == 0, (out, err)
    assert_same_run(folder, plain)
    assert {path.name for path in folder.iterdir()} == {path.name for path in plain.iterdir()}


@pytest.mark.parametrize("moment, stage", [("1", 1), ("2", 2), ("3", 3)])
def test_interrupt_and_resume(tmp_path, data, plain, monkeypatch, moment, stage):
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patched:
        at(patched, moment, lambda: signal.raise_signal(signal.SIGINT))
        code, out, err = execute(tmp_path, command(data, tmp_path / "runs", "--compile"))
    assert code == 130 and f"mujoco --resume {folder}" in out, (out, err)
    state = torch.load(folder / "checkpoint.pt")
    assert (state["progress"]["stage"], state["progress"]["sac_steps"]) == (stage, 150 if stage == 3 else 0)
    code, out, err = execute(tmp_path, ["mujoco", "--resume", folder, "--no-compile"])
    assert code == 0, (out, err)
    assert_same_run(folder, plain)


def test_evaluate_and_resume_of_a_finished_run_change_nothing(tmp_path, finished):
    before = files(finished)
    code, out, err = execute(tmp_path, ["mujoco", "--evaluate", finished])
    assert code == 0 and files(finished) == before, (out, err)
    true_return = float(rows(finished)[-1]["eval/return_mean"])
    assert f"true return {true_return:.0f} ±" in out
    code, out, err = execute(tmp_path, ["mujoco", "--resume", finished])
    assert code == 0 and f"final true return {true_return:.0f}" in out, (out, err)
    before.pop("learning_curve.png", None)
    assert {name: content for name, content in files(finished).items() if name in before} == before


def test_stages_reload(tmp_path, data, monkeypatch, recorded):
    """A run killed in stage 2 has a cloned policy to evaluate, and the finished one has it still; one killed in stage 1
    has none."""
    with monkeypatch.context() as patched:
        at(patched, "2", kill)
        with pytest.raises(Killed):
            execute(tmp_path, command(data, tmp_path / "runs", "--compile"))
    folder, (whole, states) = tmp_path / "runs" / "run", recorded
    code, out, err = execute(tmp_path, ["mujoco", "--evaluate", folder])
    assert code == 0 and f"true return {float(rows(whole)[0]['eval/return_mean']):.0f} ±" in out, (out, err)
    model, last = load_file(whole / "model.safetensors"), states[-1]
    assert torch.equal(load_file(folder / "model.safetensors")["actor"], model["cloned_actor"])
    assert torch.equal(model["actor"], last["sac"][0]) and torch.equal(model["reward"], last["theta"])

    torch.save(states[0], folder / "checkpoint.pt")
    assert_refused(execute(tmp_path, ["mujoco", "--evaluate", folder]), "--resume")


def test_resuming_with_more_steps_goes_on(tmp_path, finished, plain):
    code, out, err = execute(tmp_path, ["mujoco", "--resume", finished, "--total-timesteps", 250])
    assert code == 0, (out, err)
    assert rows(finished)[:6] == rows(plain) and rows(finished)[6]["charts/sac_steps"] == "250"


# ---------------------------------------------------------------------------------------- not a number, and bad input
@pytest.mark.parametrize("moment, step", [("1", 0), ("2", 0), ("3", 150)])
def test_not_finite(tmp_path, data, monkeypatch, moment, step):
    adam = torch.optim.Adam.step
    calls = {"1": 0, "2": 0, "3": 0}

    def spoiled_step(self, *args):
        adam(self, *args)
        stage = "1" if self.defaults["lr"] == rlhf.MujocoArgs.bc_learning_rate else "2"
        if stage == moment:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    def compile(update, **kwargs):
        def spoiled_update(sac, *batch):
            calls["3"] += 1
            return update(sac, *batch) * (float("nan") if moment == "3" and calls["3"] == 151 else 1)

        return spoiled_update

    monkeypatch.setattr(torch.optim.Adam, "step", spoiled_step)
    monkeypatch.setattr(torch, "compile", compile)
    code, out, err = execute(tmp_path, command(data, tmp_path / "runs", "--compile"))
    assert code == 1 and f"is not finite at step {step};" in err, (out, err)
    state = torch.load(tmp_path / "runs" / "run" / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in (*state["sac"], state["theta"]))


@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"env": "NoSuchRobot-v4"}, "NoSuchRobot-v4"),
        ({"env": "Pendulum-v1"}, "Pendulum-v1"),
        ({"data_dir": "nowhere"}, f"python data_gen/mujoco_data.py --env {ENV}"),
        ({"env": "Hopper-v4"}, "Hopper-v4"),  # with the pendulum's data
        ({"segment_length": 5}, "--segment-length"),
        ({"gamma": 1}, "--gamma"),
        ({"held_out_share": 1}, "--held-out-share"),
        ({"reward_range": (4, 0)}, "--reward-range"),
        ({"hidden": 0}, "--hidden"),
        ({"entropy_coefficient": "automatic"}, "--entropy-coefficient"),
        ({"entropy_coefficient": "0.2"}, "--kl-coefficient 0"),
        ({"total_timesteps": 10**14}, "--total-timesteps"),
        ({"bc_updates": 0}, "--bc-updates"),
        ({"bc_learning_rate": "nan"}, "--bc-learning-rate"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, data, changes, fragment):
    assert_refused(execute(tmp_path, command(data, tmp_path / "runs", **changes)), fragment)
    assert not (tmp_path / "runs").exists()


GOOD = rlhf.MujocoArgs(total_timesteps=400, data_dir="x", run_name="x", reward_range=(0.0, 4.0))
NUMBERS = {f.name for f in fields(GOOD) if type(getattr(GOOD, f.name)) in (int, float)}
ZERO_IS_FINE = {"seed", "gradient_penalty", "critic_warmup_steps", "kl_coefficient"}


def test_numbers(capsys):
    for name in ZERO_IS_FINE:
        rlhf.check_args(replace(GOOD, **{name: 0}))
    for name in NUMBERS:
        for value in (-1, float("nan"), float("inf"), *(() if name in ZERO_IS_FINE else (0,))):
            with pytest.raises(SystemExit) as stop:
                rlhf.check_args(replace(GOOD, **{name: value}))
            captured = capsys.readouterr()
            assert_refused((stop.value.code, captured.out, captured.err), f"--{name.replace('_', '-')}")


def one_episode(folder: Path) -> None:
    write_episodes(folder / "high.npz", np.zeros((31, 4)), np.zeros((30, 1)), episodes=1)


def one_pair(folder: Path) -> None:
    lines = (folder / "pairs.csv").read_text().splitlines()
    (folder / "pairs.csv").write_text("\n".join(lines[:2]) + "\n")


@pytest.mark.parametrize(
    "spoil, name",
    [
        (one_episode, "high.npz"),
        (one_pair, "pairs.csv"),
        *((lambda folder, name=name: (folder / name).unlink(), name) for name in ("high.npz", "low.npz", "pairs.csv")),
        (lambda folder: (folder / "medium.npz").write_bytes(b"no zip"), "medium.npz"),
    ],
)
def test_bad_data_leaves_no_run_folder(tmp_path, data, spoil, name):
    spoil(Path(shutil.copytree(data, tmp_path / "data")))
    assert_refused(execute(tmp_path, command(tmp_path / "data", tmp_path / "runs")), name)
    assert not (tmp_path / "runs").exists()


BAD_RUNS = {  # id: (what is done to the run folder, what the message has to say)
    "no folder": (lambda f: shutil.rmtree(f), "args.json"),
    "another script's": (lambda f: set_argument(f, script="aihf_sac_mujoco"), "args.json"),
    "a foreign argument": (lambda f: set_argument(f, model="gpt2"), "args.json"),
    "other networks": (lambda f: set_argument(f, hidden=[16]), "checkpoint.pt"),
    "no checkpoint": (lambda f: (f / "checkpoint.pt").unlink(), "checkpoint.pt"),
    "half a checkpoint": (lambda f: (f / "checkpoint.pt").write_bytes(b"PK"), "checkpoint.pt"),
    "another checkpoint": (lambda f: torch.save({"sac": []}, f / "checkpoint.pt"), "checkpoint.pt"),
    "no metrics": (lambda f: (f / "metrics.csv").unlink(), "metrics.csv"),
    "other data": (lambda f: set_argument(f, data_dir=str(make_data(f.with_name("other"), seed=1))), "other data"),
}


def set_argument(folder: Path, **changes) -> None:
    saved = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**saved, **changes}))


@pytest.mark.parametrize("spoil, fragment", BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_run_folder(tmp_path, finished, spoil, fragment):
    spoil(finished)
    before = files(finished) if finished.exists() else None
    assert_refused(execute(tmp_path, ["mujoco", "--resume", finished]), fragment)
    assert (files(finished) if finished.exists() else None) == before


@pytest.mark.parametrize(
    "flags", [("--seed", 9), ("--bc-updates", 9), ("--critic-warmup-steps", 0), ("--evaluate", ".")]
)
def test_a_run_keeps_its_arguments(tmp_path, plain, flags):
    assert_refused(execute(tmp_path, ["mujoco", "--resume", plain, *flags]), flags[0])


@pytest.mark.parametrize("argv", [[], ["--seed", "1"], ["robots"], ["mujoco", "--no-such-flag"]], ids=str)
def test_the_subcommand_is_mandatory(tmp_path, argv):
    assert execute(tmp_path, argv)[0] == 2
    assert not list(tmp_path.iterdir())


def test_help(tmp_path):
    code, out, _ = execute(tmp_path, ["--help"])
    assert code == 0 and "mujoco" in out
    code, out, _ = execute(tmp_path, ["mujoco", "--help"])
    assert code == 0 and "--critic-warmup-steps" in out and "--env" in out


# -------------------------------------------------------------------------------------------------- repeated on purpose
def defined_in(module):
    members = inspect.getmembers(module, lambda value: inspect.isfunction(value) or inspect.isclass(value))
    return {name for name, value in members if value.__module__ == module.__name__}


def test_what_the_two_scripts_repeat_is_letter_identical():
    shared = defined_in(aihf) & defined_in(rlhf)
    assert shared >= {"adam_", "Replay", "load_pairs", "reward", "preference_gradient", "between", "evaluate"}
    same = {n for n in shared if inspect.getsource(getattr(aihf, n)) == inspect.getsource(getattr(rlhf, n))}
    assert shared - same == {"make_sac_update", "make_run_dir", "load_checkpoint", "draw_learning_curve", "check_args"}
    for name in ("LOG_STD_MIN", "LOG_STD_MAX", "BLOCK", "ENV_DEFAULTS", "MAY_CHANGE"):
        assert getattr(aihf, name) == getattr(rlhf, name)


def test_shared_flags_have_the_same_defaults():
    both = {f.name: f.default for f in fields(rlhf.MujocoArgs)}.items() & {
        f.name: f.default for f in fields(aihf.Args)
    }.items()
    names = {f.name for f in fields(rlhf.MujocoArgs)} & {f.name for f in fields(aihf.Args)}
    assert {name for name, _ in both} == names - {"learning_rate"} and len(names) > 30


# -------------------------------------------------------------------------------------------- the data with fewer pairs
def figure3_data(cwd: Path, data: Path, **flags) -> tuple[int, str, str]:
    given = {"data_dir": data, "output_dir": "out", **flags}
    argv = [piece for name, value in given.items() for piece in (f"--{name.replace('_', '-')}", value)]
    return execute_script(cwd, argv, FIGURE3_DATA)


@pytest.fixture
def with_manifest(tmp_path, data) -> Path:
    folder = Path(shutil.copytree(data, tmp_path / "source"))
    (folder / "manifest.json").write_text(
        json.dumps({"tiers": {tier: {"return_mean": 4.0} for tier in ("low", "medium", "high")}})
    )
    return folder


def pairs_of(folder: Path) -> list[list[str]]:
    return [line.split(",") for line in (folder / "pairs.csv").read_text().splitlines()[1:]]


def test_fewer_pairs_and_flipped_labels(tmp_path, with_manifest):
    kept = {}
    for name, flags in {"whole": {}, "half": {"share": 0.5}, "some": {"share": 0.5, "flip": 0.3}}.items():
        code, out, err = figure3_data(tmp_path, with_manifest, output_dir=name, **flags)
        assert code == 0, (out, err)
        kept[name] = pairs_of(tmp_path / name)
        for tier in ("low", "medium", "high"):
            assert (tmp_path / name / f"{tier}.npz").read_bytes() == (with_manifest / f"{tier}.npz").read_bytes()
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["tiers"]["high"]["return_mean"] == 4 and manifest["counts"]["pairs"] == len(kept[name])
    assert (tmp_path / "whole" / "pairs.csv").read_bytes() == (with_manifest / "pairs.csv").read_bytes()
    assert len(kept["half"]) == 20 and all(pair in kept["whole"] for pair in kept["half"])
    assert [pair[:-1] for pair in kept["some"]] == [pair[:-1] for pair in kept["half"]]
    assert sum(a != b for a, b in zip(kept["half"], kept["some"])) == 6
    figure3_data(tmp_path, with_manifest, output_dir="again", share=0.5, flip=0.3)
    figure3_data(tmp_path, with_manifest, output_dir="seed2", share=0.5, flip=0.3, seed=2)
    assert pairs_of(tmp_path / "again") == kept["some"] != pairs_of(tmp_path / "seed2")
    run(tmp_path, tmp_path / "some", total_timesteps=50)  # it is data as any other


def test_fewer_demonstrations(tmp_path, with_manifest):
    code, out, err = figure3_data(tmp_path, with_manifest, output_dir="two", demos=2)
    assert code == 0, (out, err)
    for name in ("low.npz", "medium.npz", "pairs.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (with_manifest / name).read_bytes()
    env = rlhf.make_env(ENV)
    whole, two = (rlhf.load_trajectories(folder / "high.npz", env, "") for folder in (with_manifest, tmp_path / "two"))
    assert len(two.lengths) == 2 < len(whole.lengths)
    for kept, every in zip(two, whole):
        np.testing.assert_array_equal(kept, every[: len(kept)])
    high = json.loads((tmp_path / "two" / "manifest.json").read_text())["tiers"]["high"]
    with np.load(tmp_path / "two" / "high.npz") as file:
        assert high["episodes"] == 2 and high["steps"] == len(file["rewards"]) == two.lengths.sum()
        assert high["return_mean"] == pytest.approx(file["rewards"].sum() / 2)


def test_variants_are_nested():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import figure3_data

    pairs = [{"start_a": str(i), "label": str(i % 2)} for i in range(200)]
    small, large = (figure3_data.vary(pairs, share, 0.0, 1) for share in (0.1, 0.3))
    assert len(small) == 20 and len(large) == 60 and all(pair in large for pair in small)
    few, many = ({p["start_a"] for p in figure3_data.vary(pairs, 1.0, f, 1) if p not in pairs} for f in (0.1, 0.3))
    assert len(few) == 20 and len(many) == 60 and few < many


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ({"share": 0}, "--share"),
        ({"flip": 1.5}, "--flip"),
        ({"share": 0.001}, "--share"),
        ({"demos": 0}, "--demos"),
        ({"demos": 99}, "not 99"),
        ({"data_dir": "nowhere"}, "nowhere"),
        ({"output_dir": "source"}, "--output-dir"),
    ],
    ids=str,
)
def test_bad_variants(tmp_path, with_manifest, flags, fragment):
    assert_refused(figure3_data(tmp_path, with_manifest, **flags), fragment)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
