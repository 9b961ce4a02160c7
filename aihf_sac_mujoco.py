"""AIHF with SAC: one reward from demonstrations and preferences, one policy aligned to it.

"Joint Demonstration and Preference Learning Improves Policy Alignment with Human Feedback", Li et
al., arXiv 2406.06874: Algorithm 1 on MuJoCo robots (6.1, A.2.1). Equation numbers are the paper's.

    python aihf_sac_mujoco.py --env Hopper-v4

learns to hop from 10 demonstrations and 2,000 preferences between 50-step segments in some 10
minutes on a CPU core; prints the true return, which training never uses; writes runs/<run_name>/.

Departures from the paper that matter, beside evaluating averaged weights (README.md has more):
- g1 (demonstrations, Lemma 5.1) is linear in r and unbounded. Here r is bounded, positive where a
  fall ends an episode, so that a fall costs, and slopes above 1 are penalised (as in WGAN-LP).
- R(τ) in g1 is r's mean in an episode / (1 - γ): a discounted sum forgets the later steps.
- g2 (preferences) weighs 10, else g1 dominates, and reads returns divided by 5, else σ saturates.
- g1's rollouts are the ten latest policies', so that the reward does not forget earlier ones.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map
from tqdm import tqdm

from data_gen import read


@dataclass
class Args:
    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "Hopper-v4"  # a gymnasium robot
    seed: int = 1  # of networks, exploration, batches, rollouts; evaluation has seeds of its own
    total_timesteps: int | None = None  # SAC steps; None: 100,000 for each dimension of actions
    data_dir: str = ""  # high.npz, medium.npz, low.npz, pairs.csv; "": data_gen/assets/mujoco/<env>

    # Upper level: the reward
    demo_weight: float = 1.0  # α of Algorithm 1: (8a)'s α divided by β; 0: preferences alone
    preference_weight: float = 10.0  # of (11); 0: inverse reinforcement learning (paper: 1)
    preference_temperature: float = 5.0  # divides the difference of returns in (11) (paper: 1)
    reward_updates_per_iteration: int = 100  # Adam steps (the authors' code: 1, in longer runs)
    demo_batch_size: int = 2_000  # demonstrated steps, and as many of rollouts, in each update
    rollout_steps_per_iteration: int = 2_000  # of fresh whole episodes for g1, at least
    return_form: Literal["discounted", "mean"] = "mean"  # R(τ) in g1 (paper: discounted)
    segment_length: int = 50  # steps of each side of a preference
    preference_batch_size: int = 64  # pairs in each reward update
    rollout_memory: int = 10  # latest policies whose rollouts g1 sees (Algorithm 1: 1)
    reward_learning_rate: float = 1e-3  # Adam's (paper: 1e-4)
    reward_range: tuple[float, float] | None = None  # of r; None: (0, 4) if robots fall, else ±10
    gradient_penalty: float = 1000.0  # weight of the penalty on slopes of r above 1 (paper: none)

    # Lower level: the policy
    policy_steps_per_iteration: int = 5_000  # SAC steps in an iteration, which begins with a reset
    demos_in_replay: bool | None = None  # SAC learns from D too (paper: no); None: if robots fall
    learning_starts: int = 5_000  # steps of uniformly random actions before the first update
    learning_rate: float = 1e-3  # Adam's (paper: 3e-3; the authors' code: 1e-3)
    anneal: bool = True  # let both learning rates fall to 0 at --total-timesteps (paper: no)
    batch_size: int = 256  # transitions in an update (the authors' code: 100)
    entropy_coefficient: float | None = None  # β; None: tuned to an entropy of -dim(A) (code: 0.2)
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the Q networks that goes into their targets at each update
    hidden: tuple[int, ...] = (64, 64)  # hidden layers of every network (the paper's)

    # Running
    eval_every: int = 5  # iterations between evaluations on the true reward
    eval_episodes: int = 10  # deterministic episodes in each
    checkpoint_every: int = 10  # iterations between checkpoints
    runs_dir: str = "runs"  # where run folders go
    run_name: str = ""  # the run's folder; "": from environment, method, seed and time
    resume: str = ""  # a run folder to carry on with its arguments; most flags beside it win
    evaluate: str = ""  # a run folder whose policy to evaluate instead of training; beats --resume
    compile: bool = True  # compile the SAC update (needs a C++ compiler)
    cuda: bool = True  # use a GPU when there is one; networks this small can be faster on a core
    threads: int = 1  # CPU threads of torch
    track: bool = False  # log to Weights & Biases too (WANDB_PROJECT, WANDB_ENTITY ...)


SCRIPT = Path(__file__).name
BLOCK = 50  # environment steps, then as many updates: Spinning Up's update_every
LOSSES = tuple(f"losses/{x}" for x in ("q", "policy", "entropy", "q_mean", "beta"))  # SAC's
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # of the policy
PENALTY_POINTS = 500  # points at which each reward update measures the slope of r


# --------------------------------------------------------------------- the reward, in equations
def mlp(*sizes: int) -> nn.Sequential:
    """ReLU network (batch, sizes[0]) -> (batch, sizes[-1])."""
    layers = [(nn.Linear(*pair), nn.ReLU()) for pair in zip(sizes, sizes[1:])]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


class Reward(nn.Module):
    """r(s, a; θ) in (low, high): a sigmoid of slope 1 in the middle; unlike a clamp it has a
    gradient everywhere. obs (N, obs_dim), the data's observations, standardise its inputs."""

    def __init__(self, obs: np.ndarray, act_dim: int, hidden: tuple, bounds: tuple[float, float]):
        super().__init__()
        self.net = mlp(obs.shape[1] + act_dim, *hidden, 1)
        self.low, self.high = bounds
        mean, std = torch.from_numpy(obs.mean(0)), torch.from_numpy(obs.std(0))
        self.register_buffer("obs_mean", mean)
        self.register_buffer("obs_std", torch.where(std < 1e-3, 1.0, std))  # 1 for constants

    def features(self, obs, actions) -> Tensor:
        """x (..., obs_dim + act_dim): observations in standard deviations, clipped, and actions."""
        obs, actions = (torch.as_tensor(x, device=self.obs_mean.device) for x in (obs, actions))
        return torch.cat([((obs - self.obs_mean) / self.obs_std).clamp(-10, 10), actions], -1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., obs_dim + act_dim) -> (...,)"""
        width = self.high - self.low
        return self.low + width * torch.sigmoid(4 / width * self.net(x).squeeze(-1))


def step_weights(lengths: Tensor, form: str, gamma: float) -> Tensor:
    """A weight for each step (N,) of trajectories of these lengths: Σ weight · r is mean R(τ),
    R(τ) = Σ_t γ^t r_t (discounted; 0 after a fall) or Σ_t r_t / (T (1 - γ)) (mean)."""
    t, length = torch.cat([torch.arange(n) for n in lengths]), lengths.repeat_interleave(lengths)
    weight = gamma**t if form == "discounted" else 1 / (length * (1 - gamma))
    return weight.float() / len(lengths)


def demonstration_gap(reward, demos, rollouts) -> Tensor:
    """Mean R(τ) of demonstrations minus mean R(τ') of rollouts, (), both given as features (N,
    obs_dim + act_dim) and step_weights (N,). If discounted, its ∇ is g1 of (28), β times (9)'s."""
    (x_demos, w_demos), (x_policy, w_policy) = demos, rollouts
    return (w_demos * reward(x_demos)).sum() - (w_policy * reward(x_policy)).sum()


def draw(x: Tensor, weights: Tensor, count: int, rng: np.random.Generator) -> tuple:
    """Features and equal weights of count steps, to estimate Σ weight · r of all N without bias."""
    shares = weights.double().cpu() / weights.double().sum().cpu()
    return x[rng.choice(len(x), count, p=shares.numpy())], (weights.sum() / count).expand(count)


def preference_log_likelihood(reward, preferred, other, temperature: float = 1.0) -> Tensor:
    """L2, (11): mean log σ((R(τ_w) - R(τ_l)) / temperature) over pairs of segments, (pairs, steps,
    obs_dim + act_dim) each, R a sum (paper: discounted): (). Its gradient in θ is g2, (27)."""
    return F.logsigmoid((reward(preferred) - reward(other)).sum(-1) / temperature).mean()


def slope_penalty(reward, x: Tensor) -> Tensor:
    """Mean max(0, ‖∂r/∂x‖ - 1)² over x (N, d): 0 where r is 1-Lipschitz (Petzka et al. 2018)."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(reward(x).sum(), x, create_graph=True)
    return ((slope.square().sum(-1) + 1e-12).sqrt() - 1).clamp(min=0).square().mean()


def between(a: Tensor, b: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Random points (count, d) on lines from a step of one set to a step of the other."""
    i, j = (torch.from_numpy(rng.integers(len(x), size=count)) for x in (a, b))
    share = torch.from_numpy(rng.random((count, 1), np.float32)).to(a.device)
    return torch.lerp(a[i], b[j], share)


# ----------------------------------------------------------------------------------- Algorithm 1
def main() -> None:
    with read.input_errors():  # around set-up: what is wrong with the input is said in one line
        args, state = parse_args()
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)  # of networks
        rng = np.random.default_rng(args.seed)  # of batches, exploration and resets
        device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        env = make_env(args.env)
        (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
        args.total_timesteps = args.total_timesteps or 100_000 * act_dim

        data_dir = Path(args.data_dir or f"data_gen/assets/mujoco/{args.env}")
        used = ["high"] * (args.demo_weight > 0) + ["medium", "low"] * (args.preference_weight > 0)
        # High holds the demonstrations D, P compares segments of medium and low; env.env: unscaled
        tiers = {tier: read.episodes(data_dir / f"{tier}.npz", env.env) for tier in used}
        pairs = read.pairs(data_dir, tiers, args.segment_length) if args.preference_weight else []
        data_hash = read.fingerprint(*(x for tier in tiers.values() for x in tier), pairs)

        actor = Actor(obs_dim, act_dim, args.hidden).to(device)
        # Evaluated: averaged weights, the n-th ~ n⁹: last tenth 65 % (Shamir and Zhang 2013)
        averaged = AveragedModel(actor, avg_fn=lambda a, b, n: a.lerp(b, 10 / (10 + n)))
        critics = Critics(obs_dim, act_dim, args.hidden).to(device)
        sac = init_sac(actor, critics, args.entropy_coefficient or 1.0)  # shares their memory
        target_entropy = None if args.entropy_coefficient else -act_dim
        update = make_sac_update(actor, critics, args.gamma, args.tau, target_entropy)
        *_, lengths, _ = play(env, actor, range(3), rng=np.random.default_rng(0))  # 3 episodes
        can_fall = lengths.min().item() < env.spec.max_episode_steps  # if it can, untrained it does
        args.reward_range = args.reward_range or ((0.0, 4.0) if can_fall else (-10.0, 10.0))
        args.demos_in_replay = can_fall if args.demos_in_replay is None else args.demos_in_replay
        all_obs = np.concatenate([tier.obs for tier in tiers.values()])
        reward = Reward(all_obs, act_dim, args.hidden, args.reward_range).to(device)
        reward_optimizer = torch.optim.Adam(reward.parameters())  # its rate: in each iteration
        modules = {"averaged": averaged, "reward": reward, "reward_optimizer": reward_optimizer}
        widths = (obs_dim, act_dim, obs_dim, 1)  # a transition: s, a, s', whether it ended there
        demo_steps = len(tiers["high"].obs) if args.demos_in_replay and args.demo_weight else 0
        replay = np.zeros((demo_steps + args.total_timesteps, sum(widths)), np.float32)
        if demo_steps:  # demonstrated transitions before SAC's own: all fields but [2], lengths
            replay[:demo_steps] = np.column_stack([*tiers["high"][:2], *tiers["high"][3:]])
        recent = []  # rollouts of the latest policies: observations, actions, lengths
        counts = ("charts/iteration", "charts/sac_steps", "charts/env_steps", "charts/wall_seconds")
        log = [dict.fromkeys(counts, 0)]  # rows of metrics.csv: zeros, then one an iteration

        if state:
            if state["data_hash"] != data_hash:
                raise ValueError(f"the run had other data than {data_dir}, or other weights of 0")
            read.check_steps(len(state["replay"]), args, "total_timesteps")
            tree_map(Tensor.copy_, sac, state["sac"])
            for name, learned in modules.items():
                learned.load_state_dict(state[name])
            replay[demo_steps : demo_steps + len(state["replay"])] = state["replay"]
            recent, log, rng.bit_generator.state = state["recent"], state["log"], state["rng"]
        run_dir, track = read.open_run(args, SCRIPT)

    def features_and_weights(obs, actions, lengths) -> tuple[Tensor, Tensor]:
        weights = step_weights(torch.as_tensor(lengths), args.return_form, args.gamma)
        return reward.features(obs, actions), weights.to(device)

    data = {tier: features_and_weights(*episodes[:3]) for tier, episodes in tiers.items()}
    x_data = data["high"][0] if args.demo_weight else torch.cat([x for x, _ in data.values()])
    segments = [  # preferred and other, (pairs, segment_length, obs_dim + act_dim) each
        torch.stack([data[tier][0][start : start + args.segment_length] for tier, start in side])
        for side in zip(*pairs)
    ]
    step, last_step = log[-1]["charts/sac_steps"], (0 if args.evaluate else args.total_timesteps)
    if args.compile and step < last_step:
        update = compile_update(update, sac, obs_dim, act_dim, args.batch_size)
    bar = tqdm(total=last_step, initial=step, desc=args.env, unit="step", disable=last_step == 0)

    while step < last_step:  # --evaluate: not at all
        started, first_step = time.perf_counter(), step
        share_left = 1 - step / args.total_timesteps if args.anneal else 1.0

        # ================================ LOWER LEVEL (8b): align the policy to r(·; θ_k) by SAC
        learning_rate = torch.tensor(args.learning_rate * share_left, device=device)
        losses = torch.full((len(LOSSES),), math.nan)  # until --learning-starts
        before = tree_map(Tensor.clone, averaged.state_dict())  # to leave this iteration out
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        iteration_end = min(step + args.policy_steps_per_iteration, last_step)
        while step < iteration_end:
            block = min(BLOCK, iteration_end - step)
            for _ in range(block):
                if step < args.learning_starts:
                    action = rng.uniform(-1, 1, act_dim).astype(np.float32)
                else:
                    action = actor.act(obs, rng.standard_normal(act_dim, np.float32))
                next_obs, _, terminated, truncated, _ = env.step(action)  # the first _: true reward
                replay[demo_steps + step] = np.concatenate([obs, action, next_obs, [terminated]])
                obs = env.reset()[0] if terminated or truncated else next_obs
                step += 1
            if step >= args.learning_starts:
                index = rng.integers(demo_steps + step, size=(block, args.batch_size))
                batches = torch.from_numpy(replay[index]).to(device).split(widths, dim=-1)
                s, a, next_s, terminations = (field.contiguous() for field in batches)
                with torch.no_grad():  # relabelled: today's reward for transitions of any age
                    rewards = reward(reward.features(s, a)).float()  # compiled code checks no dtype
                noise = rng.standard_normal((block, 2, args.batch_size, act_dim), np.float32)
                noise = torch.from_numpy(noise).to(device)
                for batch in zip(s, a, rewards, next_s, terminations.squeeze(-1), noise):
                    losses = update(sac, learning_rate, *batch)
                averaged.update_parameters(actor)
                read.check_finite(step, run_dir, rewards=rewards, sac_losses=losses, **sac["actor"])
            bar.update(block)
        fall_rate = float(replay[demo_steps:][first_step:step, -1].mean())  # falls per SAC step
        fewest = min(row.get("charts/fall_rate", 1.0) for row in log[-9:])  # 1: random actions
        if fall_rate > fewest and args.reward_range[0] >= 0:  # falls cost
            averaged.load_state_dict(before)  # left out: it fell more often than the best of ten

        # ========================================= SAMPLE: τ' ~ π_{k+1}; g1 sees the ten latest
        seeds = rng.integers(2**31, size=args.rollout_steps_per_iteration)  # enough for play
        fresh = play(env, actor, seeds, args.rollout_steps_per_iteration, rng)[:3]
        recent = [*recent, fresh][-args.rollout_memory :]
        x, weights = zip(*(features_and_weights(*rollout) for rollout in recent))
        rollouts = torch.cat(x), torch.cat(weights) / len(recent)  # each policy weighs alike

        # ================ UPPER LEVEL (8a): θ_{k+1} = θ_k + η (α g1 + g2), with a slope penalty
        reward_optimizer.param_groups[0]["lr"] = args.reward_learning_rate * share_left
        for _ in range(args.reward_updates_per_iteration):
            objective = torch.zeros((), device=device)
            if args.demo_weight:  # g1
                drawn = (draw(*z, args.demo_batch_size, rng) for z in (data["high"], rollouts))
                objective += args.demo_weight * demonstration_gap(reward, *drawn)
            if args.preference_weight:  # g2
                index = torch.from_numpy(rng.integers(len(pairs), size=args.preference_batch_size))
                drawn = (side[index] for side in segments)
                likelihood = preference_log_likelihood(reward, *drawn, args.preference_temperature)
                objective += args.preference_weight * likelihood
            points = between(x_data, rollouts[0], PENALTY_POINTS, rng)  # D (α = 0: P) to τ'
            objective -= args.gradient_penalty * slope_penalty(reward, points)
            reward_optimizer.zero_grad()
            (-objective).backward()  # Adam descends
            reward_optimizer.step()
        read.check_finite(step, run_dir, objective=objective, reward=reward(x_data))

        # ======================================================================= LOG and EVALUATE
        iteration, finished = len(log), step >= last_step
        env_steps = log[-1]["charts/env_steps"] + step - first_step + len(fresh[0])
        row = dict(zip(counts, (iteration, step, env_steps))) | dict(zip(LOSSES, losses.tolist()))
        row |= reward_metrics(reward, data, reward.features(*fresh[:2]), segments, args)
        row |= {"charts/fall_rate": fall_rate} if first_step >= args.learning_starts else {}
        row["charts/SPS"] = (step - first_step) / (time.perf_counter() - started)  # steps a second
        if iteration % args.eval_every == 0 or finished:
            row |= evaluate(env, averaged.module, args.eval_episodes, reward)
            bar.set_postfix_str(f"true return {row['eval/return_mean']:.0f}")
        row["charts/wall_seconds"] = log[-1]["charts/wall_seconds"] + time.perf_counter() - started
        log.append(row)
        read.write_csv(run_dir / "metrics.csv", log)
        track(row, step=step)

        # ============================================================================= CHECKPOINT
        if iteration % args.checkpoint_every == 0 or finished:
            state = {"script": SCRIPT, "args": asdict(args), "data_hash": data_hash, "log": log}
            state |= {name: learned.state_dict() for name, learned in modules.items()}
            state |= {"sac": sac, "rng": rng.bit_generator.state, "recent": recent}
            state["replay"] = torch.from_numpy(replay[demo_steps : demo_steps + step])
            read.write_whole(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))
    bar.close()
    mean, std, *_ = evaluate(env, averaged.module, args.eval_episodes, reward).values()
    print(f"final true return {mean:.0f} ± {std:.0f}; python benchmark/plot.py {run_dir} draws it")


# ---------------------------------------------------------------------------- the policy: SAC
class Actor(nn.Module):
    """π(a|s): tanh(u), u ~ N(mean, std); actions lie in (-1, 1)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: tuple[int, ...]):
        super().__init__()
        self.net = mlp(obs_dim, *hidden, 2 * act_dim)

    def gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of u, (..., act_dim) each."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (batch, act_dim) and their log π (batch,) from standard normal noise; log(1 -
        tanh(u)²) in the stable form of Spinning Up (Haarnoja et al. 2018, appendix C)."""
        mean, log_std = self.gaussian(obs)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_det_tanh = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_det_tanh).sum(-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """One action (act_dim,) for obs (obs_dim,); noise 0 gives tanh(mean)."""
        x = torch.as_tensor(obs, dtype=torch.float32, device=self.net[0].weight.device)
        mean, log_std = torch.stack(self.gaussian(x)).cpu().numpy()
        return np.tanh(mean + np.exp(log_std) * noise)


class Critics(nn.Module):
    """The twin Q(s, a): (batch, 2)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: tuple[int, ...]):
        super().__init__()
        self.q1, self.q2 = (mlp(obs_dim + act_dim, *hidden, 1) for _ in range(2))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)
        return torch.cat([self.q1(x), self.q2(x)], -1)


def init_sac(actor: Actor, critics: Critics, beta: float) -> dict[str, dict[str, Tensor]]:
    """All that an update changes, in place: {"actor": {name: parameter, in the module's own
    memory}, "critics": the same, "beta": {"log": log β}}, Adam's moments, target networks."""
    sac = {"actor": dict(actor.state_dict()), "critics": dict(critics.state_dict())}  # detached
    sac["beta"] = {"log": torch.tensor(math.log(beta), device=actor.net[0].weight.device)}
    for net in list(sac):  # Adam's moments
        for moment in ("mean", "square"):
            sac[f"{net}_{moment}"] = {key: torch.zeros_like(p) for key, p in sac[net].items()}
    sac["targets"] = {key: p.clone() for key, p in sac["critics"].items()}
    sac["updates"] = {"count": torch.zeros_like(sac["beta"]["log"])}
    return sac


def adam_(sac: dict, net: str, gradients: dict[str, Tensor], learning_rate: Tensor) -> None:
    """A step of Adam (Kingma and Ba 2015) in place; torch.optim would break the compiled graph."""
    updates = sac["updates"]["count"]
    for key, gradient in gradients.items():
        mean, square = sac[f"{net}_mean"][key], sac[f"{net}_square"][key]
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient * gradient, 0.001)
        scale = (square / (1 - 0.999**updates)).sqrt() + 1e-8
        sac[net][key].sub_(learning_rate * mean / (1 - 0.9**updates) / scale)


def make_sac_update(actor, critics, gamma: float, tau: float, target_entropy: float | None):
    """The SAC update (Haarnoja et al. 2018), fit to be compiled; target_entropy None fixes β."""

    def update(sac, learning_rate, obs, action, rewards, next_obs, terminated, noise) -> Tensor:
        """A step on a batch; noise (2, batch, act_dim). Returns LOSSES, (5,)."""
        sac["updates"]["count"].add_(1)
        beta = sac["beta"]["log"].exp()  # no graph: all of sac is detached

        # Q networks: the soft Bellman backup goes on past a truncation, not past a termination.
        next_action, next_log_prob = functional_call(actor, sac["actor"], (next_obs, noise[0]))
        next_q = functional_call(critics, sac["targets"], (next_obs, next_action)).amin(-1)
        backup = rewards + gamma * (1 - terminated) * (next_q - beta * next_log_prob)

        def critic_loss(params):
            q = functional_call(critics, params, (obs, action))
            return ((q - backup[:, None]) ** 2).mean(0).sum(), q.mean()

        gradients, (q_loss, mean_q) = grad_and_value(critic_loss, has_aux=True)(sac["critics"])
        adam_(sac, "critics", gradients, learning_rate)

        # Policy: maximise Q + β · entropy.
        def actor_loss(params):
            new_action, log_prob = functional_call(actor, params, (obs, noise[1]))
            q = functional_call(critics, sac["critics"], (obs, new_action)).amin(-1)
            return (beta * log_prob - q).mean(), -log_prob.mean()

        gradients, (pi_loss, entropy) = grad_and_value(actor_loss, has_aux=True)(sac["actor"])
        adam_(sac, "actor", gradients, learning_rate)

        if target_entropy is not None:
            adam_(sac, "beta", {"log": entropy - target_entropy}, learning_rate)  # β falls if > 0
        for key, target in sac["targets"].items():
            target.lerp_(sac["critics"][key], tau)
        return torch.stack([q_loss, pi_loss, entropy, mean_q, beta])

    return update


def compile_update(update, sac: dict, obs_dim: int, act_dim: int, n: int):
    """The update compiled for batches of n, without guards, as shapes never change, with a C++
    wrapper on CPUs; as it is, after a printed line, if a trial run on copies fails."""
    shapes = [(), (n, obs_dim), (n, act_dim), (n,), (n, obs_dim), (n,), (2, n, act_dim)]
    inputs = [torch.zeros(shape, device=sac["beta"]["log"].device) for shape in shapes]
    options = {"cpp_wrapper": inputs[0].is_cpu, "guard_filter_fn": lambda g: [False] * len(g)}
    torch._dynamo.reset()  # without guards the code of an earlier update would do for this one
    compiled = torch.compile(update, fullgraph=True, dynamic=False, options=options)
    print("compiling the SAC update: a minute the first time", flush=True)
    try:
        compiled(tree_map(Tensor.clone, sac), *inputs)
    except Exception as error:  # whatever the compiler lacks, eager mode does not need it
        print(f"torch.compile failed ({read.one_line(error)[:80]}): eager. No C++ compiler?")
        return update
    return compiled


# --------------------------------------------------------------------------- play and evaluate
def make_env(name: str) -> gym.Env:
    """A robot, actions in [-1, 1], observations copied, as it may overwrite them; or ValueError."""
    gym.logger.min_level = gym.logger.ERROR  # it warns of v4 at every make
    env = gym.wrappers.TransformObservation(gym.make(name, disable_env_checker=True), np.copy, None)
    spaces = env.observation_space, env.action_space
    vectors = all(len(space.shape or ()) == 1 and space.dtype.kind == "f" for space in spaces)
    if not (vectors and env.action_space.is_bounded() and env.spec.max_episode_steps):
        raise ValueError(f"{name} needs a time limit, vectors, bounded actions: {spaces}")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def play(env: gym.Env, actor: Actor, seeds, steps=math.inf, rng=None) -> tuple[Tensor, ...]:
    """An episode for each seed until N ≥ steps; deterministic without an rng. Observations (N,
    obs_dim), actions (N, act_dim), lengths (episodes,), and true rewards (N,) for evaluate."""
    observations, actions, lengths, true_rewards = [], [], [], []
    while len(actions) < steps and len(lengths) < len(seeds):
        obs, _ = env.reset(seed=int(seeds[len(lengths)]))
        first, done = len(actions), False
        while not done:
            noise = rng.standard_normal(env.action_space.shape, np.float32) if rng else 0.0
            observations.append(obs)
            actions.append(actor.act(obs, noise))
            obs, true_reward, terminated, truncated, _ = env.step(actions[-1])
            true_rewards.append(true_reward)
            done = terminated or truncated
        lengths.append(len(actions) - first)
    observations, actions = np.array(observations, np.float32), np.array(actions)
    return tuple(map(torch.as_tensor, (observations, actions, lengths, true_rewards)))


@torch.no_grad()
def evaluate(env: gym.Env, actor: Actor, episodes: int, reward: Reward) -> dict[str, float]:
    """The only user of the true reward: episodes of fixed seeds, no noise; correlation with r."""
    obs, actions, lengths, true_rewards = play(env, actor, range(10_000, 10_000 + episodes))
    returns = torch.stack([part.double().sum() for part in true_rewards.split(lengths.tolist())])
    learned_rewards = reward(reward.features(obs, actions)).cpu()
    correlation = torch.corrcoef(torch.stack([learned_rewards, true_rewards]))[0, 1]
    row = {"return_mean": returns.mean(), "return_std": returns.std(correction=0)}
    row |= {"length_mean": lengths.double().mean(), "reward_correlation": correlation}
    return {f"eval/{name}": value.item() for name, value in row.items()}


@torch.no_grad()
def reward_metrics(reward, data: dict, x_policy: Tensor, segments: list, args: Args) -> dict:
    """Mean r of demonstrations and of the latest policy's steps (N, d); how R ranks segments."""
    row = {"reward/policy": reward(x_policy).mean().item()}
    if "high" in data:
        row["reward/demonstrations"] = reward(data["high"][0]).mean().item()
        row["reward/gap"] = row["reward/demonstrations"] - row["reward/policy"]
    if segments:
        accuracy = ((reward(segments[0]) - reward(segments[1])).sum(-1) > 0).float().mean().item()
        loss = -preference_log_likelihood(reward, *segments, args.preference_temperature).item()
        row |= {"reward/preference_accuracy": accuracy, "reward/preference_loss": loss}
    return row


def parse_args() -> tuple[Args, dict]:
    """The arguments: a given run's, then the command line's; and that run's checkpoint, or {}."""
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    state = read.checkpoint(args.evaluate or args.resume, SCRIPT, go_on=not args.evaluate)
    args = tyro.cli(Args, default=Args(**state.get("args", {})))
    read.check_numbers(args, "seed demo_weight preference_weight gradient_penalty", "reward_range")
    if args.demo_weight == args.preference_weight == 0:
        raise ValueError("--demo-weight and --preference-weight are 0: there is nothing to learn")
    low, high = args.reward_range or (0.0, 1.0)
    if args.gamma >= 1 or args.tau > 1 or not -math.inf < low < high < math.inf:
        raise ValueError("--gamma must be below 1, --tau at most 1, --reward-range ascending")
    args.run_name = args.run_name or f"{Path(args.env).name}__aihf__{args.seed}__{time.time_ns()}"
    return args, state


if __name__ == "__main__":
    main()
