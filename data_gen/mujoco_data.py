"""MuJoCo demonstrations and preferences, made as in the AIHF paper (A.2.1, Brown et al. 2019).

    python data_gen/mujoco_data.py --env Hopper-v5

trains SAC on the TRUE reward, keeps the policy of every 10,000 steps, picks three of them (low,
medium, high) by their return, lets each act (stochastic policy, whole episodes) and writes, into
data_gen/assets/mujoco/<env>/ (formats: data_gen/README.md),

    low.npz  medium.npz  high.npz    episodes; high = demonstrations, medium preferred over low
    pairs.csv                        preferences between segments of those episodes
    manifest.json                    what made them: command, versions, returns, SHA-256 of files

It can be interrupted: the same command carries on. Other tiers, pairs or segments of a finished
training (other --segment-length, --num-pairs, --tier-targets ...) need no new training; a larger
--total-timesteps carries it on.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils._pytree import tree_map
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aihf_sac_mujoco import (
    BLOCK,
    Actor,
    Critics,
    compile_update,
    init_sac,
    make_env,
    make_sac_update,
)
from data_gen import read, write


@dataclass
class Args:
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "Hopper-v4"  # a MuJoCo robot
    seed: int = 1  # of the expert's training, the episodes and the pairs
    output_dir: str = ""  # where the data go; "": data_gen/assets/mujoco/<env>
    work_dir: str = ""  # the training's state; "": runs/mujoco_data__<env>__<seed>

    # Tiers and pairs
    tier_targets: tuple[float, ...] = ()  # mean returns: low medium high; default: see pick_tiers
    episodes_per_tier: int = 10  # whole episodes of each tier
    segment_length: int = 50  # steps of each side of a preference
    num_pairs: int = 2_000  # preferences, each a random segment of a medium and of a low episode

    # The expert
    total_timesteps: int = 0  # SAC steps; 0: 400k Hopper, 1.2M HalfCheetah, 2M Walker2d, else 1M
    checkpoint_every: int = 10_000  # steps, from a reset on, between policies for the tiers
    learning_starts: int = 5_000  # steps of uniformly random actions before the first update
    batch_size: int = 256  # transitions in an update
    hidden: tuple[int, ...] = (64, 64)  # hidden layers of every network (the paper's)
    learning_rate: float = 1e-3  # Adam's (paper: 3e-3, unstable on HalfCheetah and Walker2d)
    compile: bool = True  # compile the SAC update (needs a C++ compiler)
    threads: int = 1  # CPU threads of torch


SCRIPT = "data_gen/mujoco_data.py"
TIERS = ("low", "medium", "high")
GAMMA, TAU = 0.99, 0.005  # discount; share of the Q networks in their targets at each update
ROBOTS = {  # Table 1: low's and medium's share of high's return, that return; then our SAC steps
    "Hopper": (0.66, 0.85, 3560, 400_000),
    "HalfCheetah": (0.62, 0.81, 11635, 1_200_000),
    "Walker2d": (0.72, 0.93, 5453, 2_000_000),
}
Episode = dict[str, np.ndarray]  # the arrays of an episode file, of T steps and T + 1 observations


# ----------------------------------------------------------------------------------- 1. the expert
def train(args: Args, env, actor: Actor, work_dir: Path, state: dict) -> list:
    """SAC on the true reward. Returns candidates: (step, mean return, the policy's parameters)."""
    (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
    device = actor.net[0].weight.device
    critics = Critics(obs_dim, act_dim, args.hidden).to(device)
    sac = init_sac(actor, critics, 1.0)
    widths = (obs_dim, act_dim, 1, obs_dim, 1)  # a transition: s, a, r, s', whether it ended there
    rng, step, candidates = np.random.default_rng([args.seed, 4]), 0, []
    with read.input_errors():
        replay = np.zeros((args.total_timesteps, sum(widths)), np.float32)
    if state:
        tree_map(torch.Tensor.copy_, sac, state["sac"])
        step, candidates, rng.bit_generator.state = map(state.get, ("step", "candidates", "rng"))
        replay[:step] = state["replay"]

    update = make_sac_update(actor, critics, GAMMA, TAU, -act_dim)
    if args.compile and step < args.total_timesteps:
        update = compile_update(update, sac, obs_dim, act_dim, args.batch_size)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    bar = tqdm(total=args.total_timesteps, initial=step, desc=f"1/2 expert {args.env}", unit="step")
    while step < args.total_timesteps:
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        for _ in range(args.checkpoint_every // BLOCK):
            for _ in range(BLOCK):
                if step < args.learning_starts:
                    action = rng.uniform(-1, 1, act_dim).astype(np.float32)
                else:
                    action = actor.act(obs, rng.standard_normal(act_dim, np.float32))
                next_obs, reward, terminated, truncated, _ = env.step(action)
                replay[step] = np.concatenate([obs, action, [reward], next_obs, [terminated]])
                obs = env.reset()[0] if terminated or truncated else next_obs
                step += 1
            if step >= args.learning_starts:
                index = rng.integers(step, size=(BLOCK, args.batch_size))
                batches = torch.from_numpy(replay[index]).to(device).split(widths, dim=-1)
                s, a, r, next_s, ended = (field.contiguous() for field in batches)
                noise = rng.standard_normal((BLOCK, 2, args.batch_size, act_dim), np.float32)
                noise = torch.from_numpy(noise).to(device)
                for batch in zip(s, a, r.squeeze(-1), next_s, ended.squeeze(-1), noise):
                    losses = update(sac, learning_rate, *batch)
                read.check_finite(step, work_dir, sac_losses=losses)
            bar.update(BLOCK)
        score = returns([record(env, actor, rng) for _ in range(3)]).mean().item()
        policy = {key: parameter.cpu().clone() for key, parameter in sac["actor"].items()}
        candidates.append((step, score, policy))
        bar.set_postfix(true_return=f"{score:.0f}", best=f"{max(c[1] for c in candidates):.0f}")
        between = min(5, max(1, 50_000 // args.checkpoint_every))  # candidates from save to save
        if len(candidates) % between == 0 or step == args.total_timesteps:
            state = {"script": SCRIPT, "recipe": recipe(args), "sac": sac, "step": step}
            state |= {"candidates": candidates, "replay": torch.from_numpy(replay[:step])}
            state["rng"] = rng.bit_generator.state
            read.write_whole(work_dir / "checkpoint.pt", lambda path: torch.save(state, path))
    bar.close()
    return candidates


def robot(args: Args) -> tuple:
    """The row of ROBOTS; other robots have Hopper's shares and no return to aim at."""
    return ROBOTS.get(args.env.split("-v")[0], (0.66, 0.85, math.inf, 1_000_000))


def recipe(args: Args) -> dict:
    """The arguments that a training depends on; tiers and pairs of it, and its length, may vary."""
    names = "env seed checkpoint_every learning_starts batch_size hidden learning_rate"
    return {key: getattr(args, key) for key in names.split()}


def record(env: gym.Env, actor: Actor | None, rng: np.random.Generator) -> Episode:
    """A whole episode of the stochastic policy, or of uniformly random actions without one."""
    shape = env.action_space.shape
    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    observations, steps, done = [obs], [], False
    while not done:
        if actor is None:
            action = rng.uniform(-1, 1, shape).astype(np.float32)
        else:
            action = actor.act(obs, rng.standard_normal(shape, np.float32))
        obs, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        observations.append(obs)
        steps.append((env.action(action), reward, terminated, truncated and not terminated))
    names = ("actions", "rewards", "terminations", "truncations")
    return {"observations": np.stack(observations)} | dict(zip(names, map(np.array, zip(*steps))))


def returns(episodes: list[Episode]) -> np.ndarray:
    """True returns, (episodes,)."""
    return np.array([episode["rewards"].sum() for episode in episodes])


# ------------------------------------------------------------------------------ 2. tiers and pairs
def pick_tiers(args: Args, env, actor: Actor, candidates: list) -> tuple[dict, dict, float]:
    """The tiers' episodes, the steps of the candidates that played them, a random policy's return.

    Targets: high the paper's return, or the best candidate's if that is less; low and medium
    Table 1's shares of the way from the random policy's return to the one that high has reached.
    Random is 20 on Hopper and 4 on Walker2d, so that these are the paper's shares of a return, and
    -290 on HalfCheetah, 1 to 2 % below them; unlike those they are in order below 0 too.

    A tier's shortlist is the ten candidates whose three-episode return is nearest to its target;
    the one whose own episodes come nearest is taken, a quarter of their standard deviation counted
    as distance. ValueError if none of another policy than medium's keeps low <
    medium <= high in mean return.
    """
    rng, random_rng = (np.random.default_rng([args.seed, stream]) for stream in (1, 2))
    random = returns([record(env, None, random_rng) for _ in range(20)]).mean().item()
    *shares, paper, _ = robot(args)
    target = min(paper, max(score for _, score, _ in candidates))
    tiers, steps, mean = {}, {}, math.inf
    for tier, share in zip(("high", "medium", "low"), (None, *reversed(shares))):
        if args.tier_targets:
            target = args.tier_targets[TIERS.index(tier)]
        elif tier != "high":
            target = random + share * (returns(tiers["high"]).mean() - random)
        above, nearest = mean, math.inf
        shortlist = sorted(candidates, key=lambda candidate: abs(candidate[1] - target))[:10]
        for step, _, policy in tqdm(shortlist, desc=f"2/2 {tier} tier, target {target:.1f}"):
            actor.load_state_dict(policy)
            episodes = [record(env, actor, rng) for _ in range(args.episodes_per_tier)]
            scores = returns(episodes)
            distance = abs(scores.mean() - target) + scores.std() / 4
            in_order = scores.mean() < above or tier == "medium" and scores.mean() == above
            in_order &= tier != "low" or step != steps["medium"]  # the same policy's would be noise
            if in_order and distance < nearest:
                nearest, mean, tiers[tier], steps[tier] = distance, scores.mean(), episodes, step
        if tier not in tiers:
            found = f"none near {target:.1f} is below the next tier's {above:.1f}"
            hint = f"a random policy has {random:.1f}; train longer, or give --tier-targets"
            raise ValueError(f"no policy for the {tier} tier: {found}; {hint}")
    return {tier: tiers[tier] for tier in TIERS}, {tier: steps[tier] for tier in TIERS}, random


def draw_pairs(lengths: dict, segment_length: int, count: int, rng) -> list:
    """Rows of pairs.csv for tiers with episodes of these lengths: a or b, at random, is a segment
    of a medium episode and is preferred. ValueError if no episode is as long as a segment."""

    def segment(tier: str) -> dict:
        starts = np.maximum(np.array(lengths[tier]) - segment_length + 1, 0)
        if not starts.any():
            found = f"the longest {tier} episode has {max(lengths[tier])} steps"
            raise ValueError(f"{found}; give a smaller --segment-length than {segment_length}")
        episode = int(rng.choice(len(starts), p=starts / starts.sum()))
        start = int(rng.integers(starts[episode]))
        return {"tier": tier, "episode": episode, "start": start, "length": segment_length}

    pairs = []
    for _ in range(count):
        sides = [segment("medium"), segment("low")]
        label = int(rng.integers(2))  # 1: a is preferred
        sides = dict(zip("ab", sides if label else sides[::-1]))
        pair = {f"{key}_{side}": x for side, columns in sides.items() for key, x in columns.items()}
        pairs.append({**pair, "label": label})
    return pairs


def write_dataset(output_dir: Path, tiers: dict, pairs: list, args: Args, found: dict) -> None:
    """Each file whole or not at all; the manifest, which has their hashes, last."""
    for tier, episodes in tiers.items():
        arrays = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}
        for key in ("observations", "actions", "rewards"):
            arrays[key] = arrays[key].astype(np.float32)
        write.arrays(output_dir / f"{tier}.npz", arrays)
        mean, std = returns(episodes).mean().item(), returns(episodes).std().item()
        row = {"return_mean": mean, "return_std": std, "episodes": len(episodes)}
        found["tiers"][tier] = row | {"steps": len(arrays["actions"])}
        print(f"{tier:>6}: return {mean:8.1f} ± {std:.1f}")
    lines = [",".join(pairs[0]), *(",".join(map(str, pair.values())) for pair in pairs), ""]
    read.write_whole(output_dir / "pairs.csv", lambda path: path.write_text("\n".join(lines)))
    files = [*(f"{tier}.npz" for tier in tiers), "pairs.csv"]
    write.manifest(output_dir, files, args, "gymnasium mujoco", found)


def check_args(args: Args) -> None:
    read.check_numbers(args, "seed", unchecked="tier_targets")
    every, steps = args.checkpoint_every, args.total_timesteps
    if every % BLOCK or args.learning_starts % BLOCK or steps % every:
        text = f"--checkpoint-every and --learning-starts must be multiples of {BLOCK}"
        raise ValueError(f"{text}, --total-timesteps one of --checkpoint-every")
    if steps < 2 * every:
        raise ValueError("--total-timesteps must be at least twice --checkpoint-every")
    if args.tier_targets:
        low, medium, high = args.tier_targets if len(args.tier_targets) == 3 else [math.nan] * 3
        if not -math.inf < low < medium <= high < math.inf:
            raise ValueError("--tier-targets takes three ascending returns: low medium high")


def main() -> None:
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        args.total_timesteps = args.total_timesteps or robot(args)[-1]
        check_args(args)
        torch.set_num_threads(args.threads)
        torch.manual_seed(10**6 + args.seed)  # of networks, others than a learner's of this seed
        env = make_env(args.env)
        (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        actor = Actor(obs_dim, act_dim, args.hidden).to(device)
        work_dir = Path(args.work_dir or f"runs/mujoco_data__{args.env}__{args.seed}")
        state = read.checkpoint(work_dir, SCRIPT) if (work_dir / "checkpoint.pt").exists() else {}
        if state and (state.get("recipe") != recipe(args) or state["step"] > args.total_timesteps):
            found = "a longer training, or one with other arguments"
            raise ValueError(f"{work_dir} holds {found}; see --work-dir")
        output_dir = Path(args.output_dir or f"data_gen/assets/mujoco/{args.env}")
        write.open_folders(work_dir, output_dir)

    candidates = train(args, env, actor, work_dir, state)
    with read.input_errors():  # what only the finished training can tell
        tiers, chosen, random = pick_tiers(args, env, actor, candidates)
        lengths = {tier: [len(e["actions"]) for e in tiers[tier]] for tier in TIERS}
        rng = np.random.default_rng([args.seed, 3])
        pairs = draw_pairs(lengths, args.segment_length, args.num_pairs, rng)
    found = {"env_id": args.env, "checkpoint_steps": chosen, "random_return": random, "tiers": {}}
    found["counts"] = {"pairs": len(pairs), "segment_length": args.segment_length}
    write_dataset(output_dir, tiers, pairs, args, found)
    print(f"wrote {output_dir}/{{low,medium,high}}.npz, pairs.csv and manifest.json")


if __name__ == "__main__":
    main()
