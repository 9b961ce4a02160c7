"""Algorithm 1 of the AIHF paper (arXiv 2406.06874) where everything can be computed exactly: small
tabular MDPs.

    python benchmark/tabular_mdp.py      # a minute on one core

First it measures how far the ways of forming R(τ) in g1 (--return-form of aihf_sac_mujoco.py) point
from the exact ∇L1. Then it runs Algorithm 1, with exact policy alignment and that script's own
gradients from sampled trajectories, on demonstrations that never show one of the actions and
preferences that do, and compares its limit with SFT and RLHF: results/tabular_mdp.csv,
results/tabular_mdp_forms.csv and figures/tabular_mdp.png, beside this file.

S states, A actions; everything is float64. What tests/test_theory.py proves with these functions
about Lemma 5.1:
- ∇L1 = (E[∇R(τ^E)] - E[∇R(τ')]) / β exactly, with R(τ) = Σ γ^t r, if τ^E and τ' begin in the same
  distribution and obey the same dynamics: log π_θ = log π⁰ + (Q - V) / β telescopes along τ,
  because E[Q] = E[r + γ V(next)].
- On a finite set of demonstrations that is exact only if the dynamics are deterministic. Otherwise
  the mean of Σ γ^t log π_θ over the set also holds the luck of its transitions, V(next) -
  E[V(next)], whose mean is 0.
- Undiscounted sums and per-step means are 0 at π_θ = π^E as well, but are no gradient, of L1 or of
  anything else.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from llm_speed import write_table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aihf_sac_mujoco import demonstration_gap, preference_log_likelihood, step_weights

FORMS = ("discounted", "sum", "mean")  # the second is no longer a --return-form, but is measured


class MDP(NamedTuple):
    # (S, A, S); what is missing to 1 ends the episode, after which all is worth 0
    transitions: Tensor
    start: Tensor  # (S,)
    gamma: float


def random_mdp(
    states: int, actions: int, end: float, gamma: float, rng: np.random.Generator, stay: float = 0.0
) -> MDP:
    """Any state may follow, but with probability `stay` the same does; an end has a probability
    from 0 to 2 end."""
    go_on = 1 - rng.uniform(0, 2 * end, (states, actions, 1))
    anywhere = rng.dirichlet(np.ones(states), (states, actions))
    moves = torch.from_numpy(go_on * (stay * np.eye(states)[:, None] + (1 - stay) * anywhere))
    return MDP(moves, torch.from_numpy(rng.dirichlet(np.ones(states))), gamma)


# --------------------------------------------------------------------------------- exact quantities
def soft_value_iteration(
    mdp: MDP, reward: Tensor, prior: Tensor, beta: float, value: Tensor | None = None
):
    """The policy (S, A) that maximises (10) for this reward (S, A), and its value (S,); autograd
    goes through it."""
    value, change = torch.zeros_like(mdp.start) if value is None else value, 1.0
    while change > 1e-12:
        q = reward + mdp.gamma * mdp.transitions @ value
        old, value = value, beta * torch.logsumexp(prior.log() + q / beta, -1)
        change = (value - old).abs().max().item()
    return prior * torch.exp((q - value[:, None]) / beta), value  # (5)


def occupancy(mdp: MDP, policy: Tensor) -> Tensor:
    """E[Σ_t γ^t 1{s_t = s, a_t = a}], (S, A): the gradient of E[R(τ)] in a tabular reward."""
    moves = torch.einsum("sa,sat->st", policy, mdp.transitions)
    visits = torch.linalg.solve((torch.eye(len(moves)).double() - mdp.gamma * moves).T, mdp.start)
    return visits[:, None] * policy


def expected_weights(mdp: MDP, policy: Tensor, horizon: int) -> dict[str, Tensor]:
    """{form: what step_weights gives (s, a) in expectation over trajectories cut off at horizon,
    (S, A)}."""
    here, left, time = mdp.start, 1 - mdp.transitions.sum(-1), torch.arange(horizon).double()
    # E[visit at t]; probability of exactly 1, 2, ... steps from (s, a) to the end
    visits, remaining = [], []
    for _ in range(horizon):
        visits.append(here[:, None] * policy)
        remaining.append(left)
        here = torch.einsum("sa,sat->t", visits[-1], mdp.transitions)
        left = mdp.transitions @ (policy * left).sum(-1)
    visits, remaining = torch.stack(visits), torch.stack(remaining)
    # T of a trajectory with time + 1 steps left at t
    length = (time[:, None] + time + 1).clamp(max=horizon)
    # E[1/T | s_t, a_t]
    inverse_length = torch.tensordot(1 / length, remaining, 1) + (1 - remaining.sum(0)) / horizon
    return {
        "discounted": (mdp.gamma ** time[:, None, None] * visits).sum(0),
        "sum": visits.sum(0) / horizon / (1 - mdp.gamma),
        "mean": (inverse_length * visits).sum(0) / (1 - mdp.gamma),
    }


def soft_return(mdp: MDP, reward: Tensor, prior: Tensor, beta: float, policy: Tensor) -> float:
    """(10): E[R(τ)] - β E[Σ γ^t KL(π ‖ π⁰)], exactly."""
    log_ratio = torch.where(policy > 0, (policy / prior).log(), 0.0)
    return (occupancy(mdp, policy) * (reward - beta * log_ratio)).sum().item()


# ------------------------------------------------------------------------------------------ samples
def sample(
    mdp: MDP, policy: Tensor, count: int, horizon: int, rng: np.random.Generator
) -> np.ndarray:
    """Trajectories (count, horizon) of numbers s A + a, and -1 after the end."""
    (states, actions), steps = policy.shape, np.full((count, horizon), -1)
    act = policy.detach().cumsum(-1).numpy()
    move = mdp.transitions.cumsum(-1).numpy().reshape(-1, states)
    alive, state = np.arange(count), rng.choice(states, count, p=mdp.start.numpy())
    for t in range(horizon):
        action = (rng.random((len(state), 1)) > act[state]).sum(-1).clip(max=actions - 1)
        steps[alive, t] = pair = state * actions + action
        state = (rng.random((len(state), 1)) > move[pair]).sum(-1)  # S: the episode has ended
        alive, state = alive[state < states], state[state < states]
        if not len(alive):
            break
    return steps


def weighted(steps: np.ndarray, form: str, mdp: MDP) -> tuple[Tensor, Tensor]:
    """What aihf_sac_mujoco.py makes of trajectories: x (N, S A), one-hot, so that a tabular reward
    is x @ θ, and weights (N,). "sum" is Σ_t r_t / (horizon (1 - γ)): the same whichever step of the
    trajectory it begins at."""
    on = torch.from_numpy(steps >= 0)
    if form == "sum":
        weights = torch.full((int(on.sum()),), 1 / (on.numel() * (1 - mdp.gamma)))
    else:
        weights = step_weights(on.sum(1), form, mdp.gamma)
    return torch.eye(mdp.transitions[..., 0].numel()).double()[steps[on]], weights.double()


def gradient(objective, theta: Tensor, reward, *data) -> Tensor:
    """∇ in θ (P,) of the script's demonstration_gap (then g1) or preference_log_likelihood (then
    g2) on these data, for the reward x -> reward(θ, x)."""
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(objective(partial(reward, theta), *data), theta)[0]


def discounted_visits(steps: np.ndarray, mdp: MDP) -> Tensor:
    """φ(τ) = Σ γ^t one_hot(s_t, a_t) for each trajectory, (count, S A): R(τ) = φ(τ) · θ for a
    tabular reward."""
    count, pairs = len(steps), mdp.transitions[..., 0].numel()
    rows, times = np.nonzero(steps >= 0)
    flat = np.bincount(rows * pairs + steps[rows, times], mdp.gamma**times, count * pairs)
    return torch.from_numpy(flat.reshape(count, pairs))


def linear_reward(theta: Tensor, x: Tensor) -> Tensor:
    return x @ theta


# -------------------------------------------------------------------------------------- the methods
class Problem(NamedTuple):
    """Data and constants of (8). α weighs L1, as a mean over trajectories; L2 is a mean over
    pairs."""

    mdp: MDP
    prior: Tensor  # π⁰ (S, A)
    beta: float
    alpha: float
    demos: np.ndarray  # (trajectories, horizon), from sample
    preferred: Tensor  # (pairs, S A), discounted_visits
    other: Tensor  # (pairs, S A)


def objective(problem: Problem, theta: Tensor) -> float:
    """(8a) on the data: α mean Σ γ^t log π_θ(a_t | s_t) + mean log σ(R(τ_w) - R(τ_l))."""
    policy, _ = soft_value_iteration(
        problem.mdp, theta.view_as(problem.prior), problem.prior, problem.beta
    )
    log_likelihood = discounted_visits(problem.demos, problem.mdp).mean(0) @ policy.log().flatten()
    margin = (problem.preferred - problem.other) @ theta
    return (problem.alpha * log_likelihood + torch.nn.functional.logsigmoid(margin).mean()).item()


def algorithm_1(problem: Problem, iterations: int, rollouts: int, pairs: int, eta: float, rng):
    """Yields θ_k and the policy aligned to it, exactly; the step along the ESTIMATED gradient falls
    as 1/sqrt(k)."""
    mdp, prior, beta, alpha, demos, preferred, other = problem
    theta, value = torch.zeros(prior.numel()).double(), None
    demos_x = weighted(demos, "discounted", mdp)
    for k in range(iterations + 1):
        # LOWER LEVEL
        policy, value = soft_value_iteration(mdp, theta.view_as(prior), prior, beta, value)
        yield theta, policy
        # SAMPLE
        rollouts_x = weighted(sample(mdp, policy, rollouts, demos.shape[1], rng), "discounted", mdp)
        batch = rng.integers(len(preferred), size=pairs)
        # UPPER LEVEL
        g1 = gradient(demonstration_gap, theta, linear_reward, demos_x, rollouts_x) / beta
        segments = preferred[batch, None], other[batch, None]
        g2 = gradient(preference_log_likelihood, theta, linear_reward, *segments)
        theta = theta + eta / (1 + k) ** 0.5 * (alpha * g1 + g2)


def exact_limit(problem: Problem) -> Tensor:
    """Where the expectation of Algorithm 1's gradient is 0, to 1e-8, by damped Newton steps: θ (S
    A,).

    It maximises the concave function α/β (mean R(τ) over the demonstrations - E[V_θ(s_0)]) + L2.
    """
    mdp, prior, beta, alpha, demos, preferred, other = problem
    shown, gap = discounted_visits(demos, mdp).mean(0), preferred - other
    identity = torch.eye(prior.numel()).double()
    theta = torch.zeros(prior.numel()).double()
    for _ in range(100):
        policy, _ = soft_value_iteration(mdp, theta.view_as(prior), prior, beta)
        visits, right = occupancy(mdp, policy), torch.sigmoid(gap @ theta)
        gradient = alpha / beta * (shown - visits.flatten()) + ((1 - right)[:, None] * gap).mean(0)
        if gradient.abs().max() < 1e-8:
            return theta
        # ∇V and ∇Q by θ, then ∇²V = Σ_s visits(s) Cov_a(∇Q(s, a)) / β
        moves = torch.einsum("sa,sat->st", policy, mdp.transitions)
        table = (policy[..., None] * identity.view(*policy.shape, -1)).sum(1)
        grad_v = torch.linalg.solve(torch.eye(len(moves)).double() - mdp.gamma * moves, table)
        grad_q = identity.view(*policy.shape, -1) + mdp.gamma * mdp.transitions @ grad_v
        centred = grad_q - grad_v[:, None]
        curvature = alpha / beta**2 * torch.einsum("sa,sai,saj->ij", visits, centred, centred)
        curvature += (right * (1 - right) * gap.T) @ gap / len(gap)
        step = torch.linalg.pinv(curvature, hermitian=True) @ gradient
        d = max((gap @ step).abs().max(), (centred @ step).abs().max() / beta) + 1e-300
        theta = theta + step * torch.log1p(d) / d
    raise ArithmeticError(f"Newton's method stopped at a gradient of {gradient.abs().max():.1e}")


def baselines(problem: Problem) -> dict[str, Tensor]:
    """SFT, RLHF and RLHF's reward without its SFT: policies (S, A)."""
    mdp, prior, beta = problem[:3]
    counts = np.bincount(problem.demos[problem.demos >= 0], minlength=prior.numel())
    counts = torch.from_numpy(counts).double().view_as(prior)
    shown = counts.sum(-1, keepdim=True)
    sft = torch.where(shown > 0, counts / shown, prior)
    reward = exact_limit(problem._replace(alpha=0.0)).view_as(prior)  # (12)
    return {
        "SFT": sft,
        "preferences only": soft_value_iteration(mdp, reward, prior, beta)[0],
        "RLHF": soft_value_iteration(mdp, reward, sft, beta)[0],
    }


# ----------------------------------------------------------------------------------- the experiment
STATES, ACTIONS, GAMMA, BETA, HORIZON = 6, 5, 0.95, 0.5, 200


def make_problem(
    demonstrations: int, preferences: int, rng: np.random.Generator
) -> tuple[Problem, Tensor]:
    """A random MDP, data as in numerical example 2, and the true reward (S, A).

    The expert never takes the last action and is optimal (10) without it. Preferences are between
    trajectories of the uniform policy. α = |D| / |P| weighs every trajectory and every pair alike,
    as in (23).
    """
    mdp = random_mdp(STATES, ACTIONS, 0.1, GAMMA, rng)
    prior = torch.from_numpy(rng.dirichlet(np.full(ACTIONS, 5.0), STATES))
    reward = torch.from_numpy(rng.normal(0, 0.5, (STATES, ACTIONS)))
    covered = prior * (torch.arange(ACTIONS) < ACTIONS - 1)
    expert, _ = soft_value_iteration(mdp, reward, covered / covered.sum(-1, keepdim=True), BETA)
    demos = sample(mdp, expert, demonstrations, HORIZON, rng)
    uniform = torch.full_like(prior, 1 / ACTIONS)
    a, b = (
        discounted_visits(sample(mdp, uniform, preferences, HORIZON, rng), mdp) for _ in range(2)
    )
    a_wins = torch.from_numpy(rng.random(preferences)) < torch.sigmoid((a - b) @ reward.flatten())
    preferred, other = torch.where(a_wins[:, None], a, b), torch.where(a_wins[:, None], b, a)
    return Problem(mdp, prior, BETA, demonstrations / preferences, demos, preferred, other), reward


def scores(problem: Problem, reward: Tensor, policy: Tensor) -> dict[str, float]:
    """The policy beside the optimal one, in (10), for the true reward; averages are over the states
    that one visits.

    true_return leaves out the KL: it also grows by betting harder on the best action than the human
    would.
    """
    mdp, prior, beta = problem[:3]
    optimal, value = soft_value_iteration(mdp, reward, prior, beta)
    states = occupancy(mdp, optimal).sum(-1)
    states = states / states.sum()
    return {
        "uncovered_mass": (states @ policy[:, -1]).item(),
        "total_variation": (states @ (policy - optimal).abs().sum(-1) / 2).item(),
        "regret": (mdp.start @ value).item() - soft_return(mdp, reward, prior, beta, policy),
        "true_return": (occupancy(mdp, policy) * reward).sum().item(),
    }


def cosines(
    gamma: float, end: float, stay: float, horizon: int, rng: np.random.Generator
) -> dict[str, float]:
    """Between g1 of each form, in expectation, and ∇L1, on one random MDP with a random expert and
    a random θ."""
    mdp = random_mdp(STATES, ACTIONS, end, gamma, rng, stay)
    prior = torch.full((STATES, ACTIONS), 1 / ACTIONS).double()
    rewards = torch.from_numpy(rng.normal(0, 0.5, (2, STATES, ACTIONS)))
    expert, policy = (soft_value_iteration(mdp, reward, prior, BETA)[0] for reward in rewards)
    exact = (occupancy(mdp, expert) - occupancy(mdp, policy)).flatten()
    of_expert, of_policy = (expected_weights(mdp, pi, horizon) for pi in (expert, policy))
    return {
        form: torch.cosine_similarity(
            (of_expert[form] - of_policy[form]).flatten(), exact, dim=0
        ).item()
        for form in FORMS
    }


COLORS = {
    "SFT": "tab:gray",
    "preferences only": "tab:green",
    "RLHF": "tab:blue",
    "AIHF": "tab:orange",
    "Algorithm 1": "tab:red",
}


def draw(rows: list[dict], path: Path) -> None:
    iterations = sorted({row["iteration"] for row in rows if row["method"] == "Algorithm 1"})
    curves = {
        key: np.array([[row[key] for row in rows if row["iteration"] == k] for k in iterations])
        for key in ("objective_gap", "regret")
    }
    of = {
        method: [row for row in rows if row["method"] == method and row["iteration"] == ""]
        for method in COLORS
    }
    of["Algorithm 1"] = [row for row in rows if row["iteration"] == iterations[-1]]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    left.plot(
        iterations, curves["objective_gap"], color=COLORS["Algorithm 1"], alpha=0.3, linewidth=1
    )
    left.plot(iterations, curves["objective_gap"].mean(1), color=COLORS["Algorithm 1"], linewidth=2)
    left.axhline(0, color="black", linestyle="--", linewidth=1)
    left.set_title("L(θ) of Algorithm 1, less its value at the exact limit", fontsize=10)
    for method in list(COLORS)[:-1]:
        level = np.mean([row["regret"] for row in of[method]])
        middle.axhline(level, color=COLORS[method], linestyle="--", linewidth=1, label=method)
    middle.plot(
        iterations,
        curves["regret"].mean(1),
        color=COLORS["Algorithm 1"],
        linewidth=2,
        label="Algorithm 1",
    )
    middle.set(ylim=(0, None))
    middle.set_title("regret in (10) with the true reward", fontsize=10)
    middle.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.6))
    for axis in (left, middle):
        axis.set_xscale("symlog", linthresh=1)
        axis.set(
            xlabel="iteration k",
            xlim=(0, iterations[-1]),
            xticks=(0, 1, 10, 100),
            xticklabels=(0, 1, 10, 100),
        )
    for position, (method, results) in enumerate(of.items()):
        mass = [row["uncovered_mass"] for row in results]
        right.plot(
            np.full(len(mass), position), mass, "o", color=COLORS[method], alpha=0.4, markersize=4
        )
        right.plot(position, np.mean(mass), "_", color="black", markersize=18)
    right.axhline(
        np.mean([row["uncovered_mass"] for row in rows if row["method"] == "optimal"]),
        color="black",
        linestyle="--",
        linewidth=1,
        label="optimal policy, mean",
    )
    right.set_xticks(
        range(len(COLORS)), [method.replace(" ", "\n") for method in COLORS], fontsize=8
    )
    right.set_title("probability of the action never demonstrated", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def write(path: Path, rows: list[dict]) -> None:
    rounded = [
        {k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows
    ]
    write_table(path, rounded)


def summary(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{np.mean(values).round(3) + 0:.3f} ± {np.std(values):.3f}"  # + 0: no -0.000


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    torch.set_num_threads(1)  # the tensors are tiny

    print("cosine between the expectation of g1 and the exact gradient of L1,")
    print("lowest and median of 10 random MDPs")
    print("gamma  end   stay ", *(f"{form:>14}" for form in FORMS))
    forms = []
    for gamma, end, stay, horizon in (
        (0.9, 0.1, 0.0, 200),
        (0.99, 0.02, 0.99, 1000),
        (0.99, 0.0, 0.99, 1000),
    ):
        found = [
            cosines(gamma, end, stay, horizon, np.random.default_rng(seed)) for seed in range(10)
        ]
        values = ([row[form] for row in found] for form in FORMS)
        print(
            f"{gamma:<5}  {end:<4}  {stay:<4} ",
            *(f"{min(c):7.3f} {np.median(c):6.3f}" for c in values),
        )
        forms += [
            {"gamma": gamma, "end": end, "stay": stay, "mdp": n, **row}
            for n, row in enumerate(found)
        ]
    write(here / "results/tabular_mdp_forms.csv", forms)

    rows = []
    for repeat in range(10):
        rng = np.random.default_rng(repeat)
        problem, reward = make_problem(demonstrations=50, preferences=6000, rng=rng)
        limit = exact_limit(problem)
        best, align = (
            objective(problem, limit),
            partial(soft_value_iteration, problem.mdp, beta=BETA),
        )

        def record(method, policy, iteration="", objective_gap=""):
            row = {
                "repeat": repeat,
                "method": method,
                "iteration": iteration,
                "objective_gap": objective_gap,
            }
            rows.append(row | scores(problem, reward, policy))

        for method, policy in baselines(problem).items():
            record(method, policy)
        record("AIHF", align(limit.view_as(reward), problem.prior)[0])
        record("optimal", align(reward, problem.prior)[0])
        for k, (theta, policy) in enumerate(
            algorithm_1(problem, 150, rollouts=50, pairs=64, eta=4.0, rng=rng)
        ):
            if k in (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150):
                record("Algorithm 1", policy, k, objective(problem, theta) - best)
    write(here / "results/tabular_mdp.csv", rows)
    draw(rows, here / "figures/tabular_mdp.png")

    print(f"\n{'10 random MDPs':16}  never shown     distance        regret          true return")
    for method in (*COLORS, "optimal"):
        of = [row for row in rows if row["method"] == method and row["iteration"] in ("", 150)]
        keys = ("uncovered_mass", "total_variation", "regret", "true_return")
        print(f"{method:16}", *(f" {summary(of, key)}" for key in keys))
    gaps = [[row["objective_gap"] for row in rows if row["iteration"] == k] for k in (0, 150)]
    start, end = (f"{-np.mean(gap):.4f}" for gap in gaps)
    print(f"L(θ) below the exact limit: {start} at k = 0, {end} at k = 150")
