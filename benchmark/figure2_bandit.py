"""Section 4 of the AIHF paper (arXiv 2406.06874), executable: the estimators, the worked examples
and Figure 2.

    python benchmark/figure2_bandit.py      # seconds on one core

prints the mass that each method puts on the actions without a demonstration and its total-variation
distance to the truth, and writes results/figure2_bandit.csv and figures/figure2_bandit.png, beside
this file.

One state, N actions, one reward r_i for each, and a human who behaves as π ∝ exp(r / β), (15). The
data are counts:

    demos (..., N)      demos[i] = how often action i was demonstrated
    wins  (..., N, N)   wins[i, j] = #{j ≺ i} = how often i was preferred to j

and every estimator returns a policy (..., N); leading dimensions are repeats. Policies do not
depend on β: it only sets the unit of r, since u = r / β = log π up to a constant, and p(i ≻ j) =
π_i / (π_i + π_j) = σ(u_i - u_j).
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# Numerical example 2
# demonstrations show the first COVERED actions only
ACTIONS, COVERED, DEMONSTRATIONS, REPEATS = 50, 45, 2_000, 100
PREFERENCES = (2, 20, 200)  # for every pair of actions; the paper has 200


def softmax(u: np.ndarray) -> np.ndarray:
    exp = np.exp(u - u.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def gradient_and_hessian(
    u: np.ndarray, demos: np.ndarray, wins: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of |D| ℓ_D + |P| ℓ_P = Σ_i demos_i log π_i + Σ_ij wins_ij log σ(u_i - u_j), in u: (..., N),
    (..., N, N)."""
    pi, size, pairs = softmax(u), demos.sum(-1, keepdims=True), wins + wins.swapaxes(-1, -2)
    p = 1 / (1 + np.exp(u[..., None, :] - u[..., :, None]))  # p[i, j] = π_i / (π_i + π_j)
    gradient = demos - size * pi + (wins - pairs * p).sum(-1)  # β |D| (16) + β |P| (19)
    curvature = pairs * p * (1 - p)
    diagonal = (size * pi + curvature.sum(-1))[..., None] * np.eye(u.shape[-1])
    return gradient, size[..., None] * pi[..., :, None] * pi[..., None, :] + curvature - diagonal


def maximum_likelihood(demos: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """The u that maximises |D| ℓ_D + |P| ℓ_P, which is concave, by Newton's method to a gradient
    below 1e-8: (..., N).

    Steps are damped by log(1 + d) / d, d = max step - min step: third derivatives are at most d
    times the second, for which that makes Newton's method converge from anywhere (Sun and Tran-Dinh
    2019), undamped in the end.
    """
    u = np.zeros(demos.shape)
    for _ in range(100):
        gradient, hessian = gradient_and_hessian(u, demos, wins)
        # odds of 5e8, more than data can show: u is on its way to infinity
        if np.ptp(u, axis=-1).max() > 20:
            raise ValueError("no finite maximum: some action always wins or always loses")
        if np.abs(gradient).max() < 1e-8:
            return u
        # adding a constant to u changes nothing
        fixed = hessian - np.abs(hessian).max((-2, -1), keepdims=True)
        step = -np.linalg.solve(fixed, gradient[..., None])[..., 0]
        d = np.ptp(step, axis=-1)[..., None] + 1e-300
        u = u + step * np.log1p(d) / d
    raise ArithmeticError(f"Newton's method stopped at a gradient of {np.abs(gradient).max():.1e}")


def sft(demos: np.ndarray) -> np.ndarray:
    """(21): the frequencies of the demonstrations, where (16) is 0; r = -∞ for what was never
    shown."""
    return demos / demos.sum(-1, keepdims=True)


def preferences_only(wins: np.ndarray) -> np.ndarray:
    """(20), where (19) is 0: the policy of the reward fitted to the preferences alone."""
    return softmax(maximum_likelihood(np.zeros(wins.shape[:-1]), wins))


def rlhf(demos: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """(22): the softmax of the SUM of both rewards. max E[r_P] - β KL(π ‖ π_SFT) gives π ∝ π_SFT
    exp(r_P / β)."""
    product = sft(demos) * preferences_only(wins)
    return product / product.sum(-1, keepdims=True)


def aihf(demos: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """(23): the policy of ONE reward fitted to both, every observation counting once. It satisfies
    (24)."""
    return softmax(maximum_likelihood(demos, wins))


def sample_preferences(
    pi: np.ndarray, per_pair: int, repeats: int, rng: np.random.Generator
) -> np.ndarray:
    """wins (repeats, N, N) with per_pair comparisons of every two actions, i ≻ j with p = π_i /
    (π_i + π_j)."""
    p = pi[:, None] / (pi[:, None] + pi)
    upper = np.triu(rng.binomial(per_pair, p, (repeats, *p.shape)), 1)
    return upper + np.tril(per_pair - upper.swapaxes(-1, -2), -1)


def example_2(preferences: tuple[int, ...], repeats: int, covered: int = COVERED, seed: int = 0):
    """The truth (N,), and {preferences per pair: {method: policies (repeats, N)}}."""
    rng = np.random.default_rng(seed)
    x, mu, sigma = np.arange(1, ACTIONS + 1) / ACTIONS, 0.5, 2.0
    reward = np.exp(-((x - mu) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
    truth, shown = softmax(reward), softmax(np.where(np.arange(ACTIONS) < covered, reward, -np.inf))
    demos, policies = rng.multinomial(DEMONSTRATIONS, shown, repeats), {}
    for per_pair in preferences:
        wins = sample_preferences(truth, per_pair, repeats, rng)
        policies[per_pair] = {
            "SFT": sft(demos),
            "preferences only": preferences_only(wins),
            "RLHF": rlhf(demos, wins),
            "AIHF": aihf(demos, wins),
        }
    return truth, policies


def uncovered_mass(pi: np.ndarray) -> np.ndarray:
    return pi[..., COVERED:].sum(-1)


def total_variation(pi: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.abs(pi - truth).sum(-1) / 2


def draw(truth: np.ndarray, policies: dict, path: Path) -> None:
    """policies is {covered: example_2's}."""
    colors = {
        "SFT": "tab:gray",
        "preferences only": "tab:green",
        "RLHF": "tab:blue",
        "AIHF": "tab:orange",
    }
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 3.8), width_ratios=(1.8, 1, 1), layout="constrained"
    )
    actions, counts, left = np.arange(1, ACTIONS + 1), list(policies[COVERED]), axes[0]
    for method in ("SFT", "RLHF", "AIHF"):
        pi = policies[COVERED][counts[-1]][method]
        mean, std = pi.mean(0), pi.std(0)
        style = {"color": colors[method]}
        left.plot(actions, mean, "--" if method == "RLHF" else "-", label=method, **style)
        left.fill_between(actions, mean - std, mean + std, alpha=0.2, linewidth=0, **style)
    left.plot(actions, truth, color="black", linestyle="--", linewidth=1, label="truth")
    left.axvline(COVERED + 0.5, color="tab:red", linestyle=":")
    left.set(xlabel=f"action (demonstrated: 1 to {COVERED})", ylabel="probability", ylim=(0, None))
    left.set_title(
        f"Figure 2: {counts[-1]} preferences a pair, {len(pi)} repeats, mean ± std", fontsize=10
    )
    left.legend(frameon=False, loc="lower left")
    for axis, (covered, by_count) in zip(axes[1:], policies.items()):
        for method, color in colors.items():
            distance = [total_variation(by_count[count][method], truth) for count in counts]
            mean, std = np.mean(distance, 1), np.std(distance, 1)
            axis.errorbar(counts, mean, std, color=color, label=method, capsize=2)
        axis.set(xscale="log", yscale="log", ylim=(0.006, 0.2), xlabel="preferences a pair")
        axis.set_xticks(counts, counts)
        axis.set_yticks((0.01, 0.03, 0.1), (0.01, 0.03, 0.1))
        axis.minorticks_off()
        axis.set_title(f"distance to the truth, 1..{covered} shown", fontsize=10)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    policies, rows = {}, []
    head = ("demonstrated", "preferences a pair", f"{'method':16}", f"{'mass on 46..50':15}")
    print(*head, "distance to the truth", sep="  ")
    # the paper's, and for comparison demonstrations of everything
    for covered in (COVERED, ACTIONS):
        truth, policies[covered] = example_2(PREFERENCES, REPEATS, covered)
        for per_pair, methods in policies[covered].items():
            for method, pi in methods.items():
                mass, distance = uncovered_mass(pi), total_variation(pi, truth)
                numbers = "  ".join(f"{x.mean():.4f} ± {x.std():.4f}" for x in (mass, distance))
                print(f"1..{covered:<9}  {per_pair:<18}  {method:<16}  {numbers}")
                for repeat in range(REPEATS):
                    numbers = (f"{x[repeat]:.6g}" for x in (mass, distance))
                    rows.append((covered, per_pair, method, repeat, *numbers))
    print(f"{'':32}  truth             {uncovered_mass(truth):.4f}")
    with open(here / "results/figure2_bandit.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = "covered preferences_per_pair method repeat uncovered_mass total_variation"
        writer.writerows((columns.split(), *rows))
    draw(truth, policies, here / "figures/figure2_bandit.png")
