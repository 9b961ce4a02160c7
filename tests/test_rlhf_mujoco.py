"""rlhf_baseline.py mujoco: its equations, its three stages against a slow reference in float64, and
runs as a user's; benchmark/figure3_data.py.

What it repeats letter by letter from aihf_sac_mujoco.py is compared here and tested there.
"""

import copy
import inspect
import json
import shutil
from pathlib import Path

import gymnasium as gym
import helpers
import numpy as np
import pytest
import slow_robot as slow
import torch
import tyro
from helpers import ROOT, assert_one_line_error, compare_checkpoints, load, run_script
from slow_robot import close
from torch.distributions import TanhTransform, TransformedDistribution, kl_divergence

import aihf_sac_mujoco as aihf
import rlhf_baseline as rlhf
from data_gen import read

FIGURE3_DATA = ROOT / "benchmark" / "figure3_data.py"
FLAGS = """--env helpers:Drift-v0 --seed 8 --bc-updates 17 --bc-batch-size 9 --bc-learning-rate 0.2
--reward-updates 13 --reward-learning-rate 0.1 --preference-batch-size 6 --segment-length 4
--held-out-share 0.3 --reward-range 0 3 --total-timesteps 180
--policy-steps-per-iteration 70 --critic-warmup-steps 60 --learning-rate 1e-3 --batch-size 8
--hidden 8 7 --gamma 0.9 --tau 0.05 --eval-every 2 --eval-episodes 3 --checkpoint-every 1
--run-name run --demos-in-replay True --no-compile --no-cuda""".split()
pytestmark = pytest.mark.filterwarnings("ignore")  # Gymnasium's, on v4 robots


def execute(cwd, data, *flags) -> tuple[int, str, str]:
    return run_script(rlhf, ["mujoco", *FLAGS, "--data-dir", data, *flags], cwd)


def run(cwd, data, *flags) -> Path:
    """A tiny run that has to end well; returns its folder."""
    code, out, err = execute(cwd, data, *flags)
    assert code == 0, (out, err)
    return cwd / "runs" / "run"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Of demonstrations that fall, and where the constant is nearly one."""
    folder = helpers.falling_data(tmp_path_factory.mktemp("data"))
    observations = helpers.read_arrays(folder / "high.npz")["observations"]
    observations[:, 2] += 2e-3 * observations[:, 0]
    helpers.save_arrays(folder / "high.npz", observations=observations)
    return folder


# ------------------------------------------------------------------------------------ equations
def new_actor(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return rlhf.Actor(3, 2, (8, 7)).to(dtype)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameters(actor):
    return {key: p.detach() for key, p in actor.named_parameters()}


def test_kl_divergence():
    """That of torch.distributions before tanh, whose deviations are clipped, of any parameters."""
    actor, wide, narrow, obs = *map(new_actor, (0, 2, 3)), draw(16, 3)
    wide.net[-1].bias.data[2:], narrow.net[-1].bias.data[2:] = 9.0, -1.0
    wide.net[-1].bias.data[3] = -40.0
    for one, other in ((wide, narrow), (narrow, wide), (actor, narrow)):
        found = rlhf.kl_divergence(actor, parameters(one), parameters(other), obs)
        policies = (slow.gaussian(net, obs) for net in (one.net, other.net))
        close(found / found.mean(), kl_divergence(*policies).sum(-1) / found.mean(), 1e-9)


@pytest.mark.parametrize("share, held_out", [(0.1, 1), (0.3, 3), (0.001, 1), (0.9, 9)])
def test_hold_out(share, held_out):
    parts = rlhf.hold_out(10, share, np.random.default_rng(0))
    assert len(parts[1]) == held_out and sorted(torch.cat(parts).tolist()) == list(range(10))
    assert torch.cat(parts).tolist() != list(range(10))
    with pytest.raises(ValueError, match=f"--held-out-share {share} of 1 "):
        rlhf.hold_out(1, share, np.random.default_rng(0))


# ------------------------------------------- the three stages against a slow reference in float64
TOLERANCE = 1e-3  # relative and absolute: the script computes in float32
CHECK_EVERY = 5


def slow_fit(a, net, updates, learning_rate, loss, held_out_loss):
    """Adam; (updates, parameters) of the lowest held-out loss, and where it was measured."""
    adam, losses, kept = torch.optim.Adam(net.parameters()), {}, {}
    for done in range(updates):
        slow.descend(adam, learning_rate * ((updates - done) / updates if a.anneal else 1), loss())
        if done + 1 in {*range(CHECK_EVERY, updates, CHECK_EVERY), updates}:
            losses[done + 1] = held_out_loss().item()
            kept[done + 1] = copy.deepcopy(net.state_dict())
    best = min(losses, key=losses.get)
    net.load_state_dict(kept[best])
    return best, losses[best]


def slow_rlhf(a: rlhf.MujocoArgs, folder: Path):
    """The stages from their definitions, a state after each and after each iteration, with the
    script's random numbers in its order."""
    torch.manual_seed(a.seed)
    actor = slow.network(3, *a.hidden, 4)
    *critics, net = (slow.network(5, *a.hidden, 1) for _ in range(3))
    tuned, beta, rng = not a.kl_coefficient, a.kl_coefficient or 0.05, np.random.default_rng(a.seed)
    sac = slow.SAC(actor, critics, beta, tuned, a.gamma, a.tau, a.critic_warmup_steps)
    for p in net.parameters():
        p.data *= slow.SCALE

    tiers = {t: slow.episodes(folder / f"{t}.npz") for t in ("high", "medium", "low")}
    replay = slow.transitions(folder / "high.npz") if a.demos_in_replay else []
    r = slow.Reward(net, tiers, a.reward_range)
    features = r.features

    def scores():
        return slow.scores(helpers.mean_policy(policies), r, a.eval_episodes)

    def split(count, rng):
        order, held_out = rng.permutation(count), max(1, round(a.held_out_share * count))
        return order[:-held_out], order[-held_out:]

    pairs = slow.pairs(folder, tiers, features, a.segment_length)
    demos, step, iteration, policies = tiers["high"], 0, 0, []
    known, pair_rng = len(replay), np.random.default_rng([a.seed, 1])
    episode_split, pair_split = split(len(demos), rng), split(len(pairs), pair_rng)

    def state(**row):
        counts = {"charts/iteration": iteration, "charts/sac_steps": step, "charts/env_steps": step}
        reward = {f"reward.net.{key}": p.detach().clone() for key, p in net.named_parameters()}
        reward |= {"reward.obs_mean": r.mean, "reward.obs_std": r.std}
        log = {f"log.{key}": float(value) for key, value in (counts | row).items()}
        mean = helpers.mean_policy(policies).named_parameters()
        reward |= {f"averaged.module.net.{key}": p.detach() for key, p in mean}
        reward["averaged.n_averaged"] = torch.tensor(len(policies)).double()
        rest = {"replay": torch.tensor(replay[known:]).double().view(-1, 9)}
        its_sac = {f"sac.{key}": p for key, p in sac.state().items()}
        return its_sac | reward | log | rest, copy.deepcopy(rng.bit_generator.state)

    # 1. Behaviour cloning
    of_demos = np.concatenate([obs for obs, _ in demos])
    mean, std = of_demos.mean(0), np.append(of_demos.std(0, ddof=1)[:2], 1.0)
    nearest_to_1 = float(np.float32(1 - 1e-6))
    rows = [[(s, u) for e in sorted(part) for s, u in zip(*demos[e])] for part in episode_split]

    def cloning_loss(steps):
        obs, actions = (torch.from_numpy(np.array(column)) for column in zip(*steps))
        policy = slow.gaussian(actor, (obs - torch.from_numpy(mean)) / torch.from_numpy(std))
        squashed = TransformedDistribution(policy, TanhTransform())
        return -squashed.log_prob(actions.clamp(-nearest_to_1, nearest_to_1)).sum(-1).mean()

    def batch_loss():
        return cloning_loss([rows[0][i] for i in rng.integers(len(rows[0]), size=a.bc_batch_size)])

    fitting = a, actor, a.bc_updates, a.bc_learning_rate, batch_loss
    kept, loss = slow_fit(*fitting, lambda: cloning_loss(rows[1]))
    row = {"bc/updates": kept, "bc/held_out_log_likelihood": -loss}
    with torch.no_grad():
        weight = actor[0].weight.clone()
        for i in range(3):
            actor[0].weight[:, i] = weight[:, i] / std[i]
            actor[0].bias -= weight[:, i] * mean[i] / std[i]
    sac.cloned = copy.deepcopy(actor)
    policies.append(sac.cloned)
    row |= scores()
    del row["eval/reward_correlation"]
    yield state(**row)

    # 2. The reward model
    def margins(index):
        return torch.stack([r(pairs[i][0]).sum() - r(pairs[i][1]).sum() for i in index])

    def preference_loss(index):
        return torch.log(1 + torch.exp(-margins(index))).mean()

    def batch_loss():
        size = a.preference_batch_size
        return preference_loss(pair_split[0][rng.integers(len(pair_split[0]), size=size)])

    fitting = a, net, a.reward_updates, a.reward_learning_rate, batch_loss
    kept, loss = slow_fit(*fitting, lambda: preference_loss(pair_split[1]))
    row = {"reward/updates": kept, "reward/held_out_loss": loss}
    row["reward/held_out_accuracy"] = (margins(pair_split[1]) > 0).double().mean()
    yield state(**row)

    # 3. RL
    while step < a.total_timesteps:
        losses = slow.iterate(a, sac, r, rng, replay, known, policies, rlhf.BLOCK)
        first, step = step, len(replay) - known
        iteration += 1
        names = "q policy entropy q_mean beta kl".split()
        row = {f"losses/{name}": loss for name, loss in zip(names, losses.tolist())}
        row["charts/fall_rate"] = np.mean([row[8] for row in replay[known:][first:]])
        if iteration % a.eval_every == 0 or step == a.total_timesteps:
            row |= scores()
        yield state(**row)


CHANGES = {  # stage 1 keeps the policy of update 10 of 17, stage 2 the reward of 10, 13, 13 of 13
    "penalty to the clone": "",
    "SAC's entropy bonus": """--kl-coefficient 0 --critic-warmup-steps 0 --eval-every 3
    --reward-learning-rate 0.2""",
    "no annealing": """--no-anneal --checkpoint-every 2
    --demos-in-replay False --seed 11 --reward-learning-rate 0.05""",
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_stages_equal_a_slow_reference(tmp_path, data, monkeypatch, changes):
    """Checkpoint, metrics and random numbers after stages 1 and 2 and after each iteration."""
    args = tyro.cli(rlhf.MujocoArgs, args=[*FLAGS, *changes.split()])
    assert rlhf.CHECK_EVERY == 50
    monkeypatch.setattr(rlhf, "CHECK_EVERY", CHECK_EVERY)
    states = slow.record(monkeypatch, rlhf)
    code, out, err = execute(tmp_path, data, *changes.split())
    assert code == 0 and "180/180" in err, err
    for number, (expected, random_state) in enumerate(slow_rlhf(args, data)):
        iteration = max(number - 1, 0)
        if iteration % args.checkpoint_every and iteration < 3:
            continue
        state = states.pop(0)
        assert state["rng"] == random_state  # the same random numbers were drawn
        actual = {key: state[key] for key in ("sac", "averaged", "reward", "replay")}
        actual = helpers.leaves(actual | {"log": state["log"][number]})
        assert actual.pop("log.charts/wall_seconds") == 2 * (number + 1)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            close(actual[name], value, TOLERANCE, f"{name} in row {number}")
    assert not states and number == len(state["log"]) - 1 == 4
    assert 3 < expected["replay"][:, 8].sum() < 180 / 4  # falls, and ends by the time limit


# ---------------------------------------------------------------------------------------- warm-up


def test_policy_and_beta_stand_still_in_warm_up(tmp_path, data):
    flags = ["--kl-coefficient", 0, "--critic-warmup-steps", 50]
    state = load(run(tmp_path, data, *flags, "--total-timesteps", 50))
    mean, state = state["averaged"], state["sac"]
    assert not compare_checkpoints(state["actor"], state["cloned"])
    for name, p in state["cloned"].items():
        assert (mean[f"module.{name}"] == p).all()
    assert all(moment.any() for moment in state["actor_mean"].values())  # but Adam goes on
    assert state["beta"]["log"].exp().item() == pytest.approx(0.05)
    shutil.rmtree(tmp_path / "runs")
    state = load(run(tmp_path, data, *flags, "--total-timesteps", 51))["sac"]
    assert compare_checkpoints(state["actor"], state["cloned"])


# ------------------------------------------------------------------------ not a number, arguments
def test_not_finite(tmp_path, data):
    """With steps so large that the policy overflows in stage 1."""
    code, out, err = execute(tmp_path, data, "--bc-learning-rate", 10**15)
    assert code == 1 and "held_out_loss is not finite" in err, (out, err)


@pytest.mark.parametrize("script", [aihf, rlhf])
def test_defaults_follow_from_the_robot(tmp_path, data, monkeypatch, script):
    """Drift falls and has two actions; one that starts far from the edge does not fall."""
    asked = []

    def refuse(args, *rest):
        asked.append((args.total_timesteps, args.reward_range, args.demos_in_replay))
        raise ValueError("enough")

    class High(helpers.Drift):
        def step(self, action):
            obs, reward, _, truncated, info = super().step(action)
            return obs, reward, False, truncated, info

    gym.register("High-v0", High, max_episode_steps=12)
    monkeypatch.setattr(script.read, "open_run", refuse)
    world = ["mujoco"] if script is rlhf else []
    common = ["--hidden", 8, "--segment-length", 4, "--data-dir", data]
    given = ["--reward-range", -2, 1, "--total-timesteps", 5, "--demos-in-replay", "True"]
    for more in (["helpers:Drift-v0"], ["High-v0"], ["High-v0", *given]):
        flags = [*world, *common, "--env", *more]
        code, _, err = run_script(script, flags, tmp_path)
        assert (code, err) == (2, "error: enough\n")
    falls, does_not = (200_000, (0.0, 4.0), True), (200_000, (-10.0, 10.0), False)
    assert asked == [falls, does_not, (5, (-2.0, 1.0), True)]


# ---------------------------------------------------------------------------- repeated on purpose
IDENTICAL = """mlp Reward Actor Critics init_sac adam_ compile_update make_env
play evaluate""".split()


def test_what_the_two_scripts_repeat_is_letter_identical():
    for name in IDENTICAL:
        mine, its = (inspect.getsource(getattr(script, name)) for script in (aihf, rlhf))
        assert mine == its, name
    for name in ("BLOCK", "LOG_STD_MIN", "LOG_STD_MAX"):
        assert getattr(aihf, name) == getattr(rlhf, name), name


# --------------------------------------------------------------------- the data with fewer pairs
def vary(cwd: Path, data: Path, **flags) -> tuple[int, str, str]:
    given = {"data-dir": data, "output-dir": "out"} | flags
    argv = [piece for name, value in given.items() for piece in (f"--{name}", value)]
    return run_script(FIGURE3_DATA, argv, cwd)


@pytest.fixture
def source(tmp_path, data) -> Path:
    folder = Path(shutil.copytree(data, tmp_path / "source"))
    tiers = {tier: {"return_mean": 4.0} for tier in ("low", "medium", "high")}
    (folder / "manifest.json").write_text(json.dumps({"tiers": tiers}))
    return folder


def pairs_of(folder: Path) -> list[str]:
    return (folder / "pairs.csv").read_text().splitlines()[1:]


def test_fewer_pairs_and_flipped_labels(tmp_path, source):
    kept = {}
    half = {"share": 0.5}
    variants = {"whole": {}, "half": half, "some": half | {"flip": 0.3}}
    variants |= {"again": variants["some"], "seed2": variants["some"] | {"seed": 2}}
    for name, flags in variants.items():
        code, out, err = vary(tmp_path, source, **{"output-dir": name}, **flags)
        assert code == 0, (out, err)
        kept[name] = pairs_of(tmp_path / name)
        for tier in ("low", "medium", "high"):
            copied = (tmp_path / name / f"{tier}.npz").read_bytes()
            assert copied == (source / f"{tier}.npz").read_bytes()
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["tiers"]["high"]["return_mean"] == 4
        assert manifest["counts"]["pairs"] == len(kept[name])
    assert kept["whole"] == pairs_of(source) and len(kept["half"]) == 20
    assert set(kept["half"]) <= set(kept["whole"])
    assert [pair[:-1] for pair in kept["some"]] == [pair[:-1] for pair in kept["half"]]
    assert sum(a != b for a, b in zip(kept["half"], kept["some"])) == 6
    assert kept["again"] == kept["some"] != kept["seed2"]
    run(tmp_path, tmp_path / "some", "--total-timesteps", 50)  # it is data as any other


def test_fewer_demonstrations(tmp_path, source):
    code, out, err = vary(tmp_path, source, demos=2)
    assert code == 0, (out, err)
    for name in ("low.npz", "medium.npz", "pairs.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    high = json.loads((tmp_path / "out" / "manifest.json").read_text())["tiers"]["high"]
    with np.load(tmp_path / "out" / "high.npz") as two, np.load(source / "high.npz") as every:
        for name in every:
            np.testing.assert_array_equal(two[name], every[name][: len(two[name])])
        lengths = read.check_episodes(dict(two), "two")
        assert high["episodes"] == len(lengths) == 2 and high["steps"] == lengths.sum()
        assert high["return_mean"] == pytest.approx(two["rewards"].sum() / 2)


def test_variants_are_nested(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    import figure3_data

    pairs = [{"start_a": str(i), "label": str(i % 2)} for i in range(200)]
    small, large = (figure3_data.vary(pairs, share, 0.0, 1) for share in (0.1, 0.3))
    assert len(small) == 20 and len(large) == 60 and all(pair in large for pair in small)
    flipped = (figure3_data.vary(pairs, 1.0, flip, 1) for flip in (0.1, 0.3))
    few, many = ({p["start_a"] for p in variant if p not in pairs} for variant in flipped)
    assert len(few) == 20 and len(many) == 60 and few < many


BAD_VARIANTS = [
    *(({"share": 0}, "--share"), ({"flip": 1.5}, "--flip"), ({"share": 0.001}, "--share")),
    *(({"demos": 0}, "--demos"), ({"demos": 99}, "not 99"), ({"data-dir": "nowhere"}, "nowhere")),
    ({"output-dir": "source"}, "--output-dir"),
]


@pytest.mark.parametrize("flags, fragment", BAD_VARIANTS, ids=str)
def test_bad_variants(tmp_path, source, flags, fragment):
    assert_one_line_error(vary(tmp_path, source, **flags), fragment)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
