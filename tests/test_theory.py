"""The paper's claims: Section 4 in benchmark/figure2_bandit.py, Lemma 5.1 and Algorithm 1 in
benchmark/tabular_mdp.py, and through them demonstration_gap, preference_log_likelihood and
step_weights of aihf_sac_mujoco.py.

python -m pytest tests/test_theory.py      (10 seconds of one core)

Statistical tests have fixed seeds and say how often one would fail with a random one.
"""

import math

import numpy as np
import pytest
import torch
from helpers import ROOT, read_csv
from slow_robot import close

pytest.importorskip("matplotlib")
import figure2_bandit as bandit
import tabular_mdp as tabular

import aihf_sac_mujoco as aihf

FORMS = ("discounted", "sum", "mean")


def autograd(f, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(f(theta), theta)[0]


# ------------------------------------------------------------------------ Section 4: the estimators
def example(first, second):
    """Counts of two actions, of which the first was shown, or preferred, `first` times."""
    return np.array([first, second]), np.array([[0, first], [second, 0]])


def random_counts(actions=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 30, actions), rng.integers(1, 9, (actions, actions)) * (
        1 - np.eye(actions, dtype=int)
    )


@pytest.mark.parametrize("demonstrations, preferences", [((50, 50), (6, 4)), ((6, 4), (50, 50))])
def test_worked_examples(demonstrations, preferences):
    demos, wins = example(*demonstrations)[0], example(*preferences)[1]
    assert bandit.sft(demos)[0] == pytest.approx(demonstrations[0] / sum(demonstrations), abs=1e-15)
    assert bandit.preferences_only(wins)[0] == pytest.approx(
        preferences[0] / sum(preferences), abs=1e-10
    )
    assert bandit.rlhf(demos, wins)[0] == pytest.approx(6 / 10, abs=1e-10)
    assert bandit.aihf(demos, wins)[0] == pytest.approx(56 / 110, abs=1e-10)


@pytest.mark.parametrize("pi, demonstrations, preferences", [(0.5, 60, 140), (0.3, 150, 50)])
def test_variance_law(pi, demonstrations, preferences):
    """The variance of 20,000 estimates within 5 standard errors, by the binomial's fourth moment:
    fails with probability 1e-6. It is 0.05 of the variance, and both data sets alone have a
    variance higher by 0.33 or more."""
    rng, repeats, size = np.random.default_rng(0), 20_000, demonstrations + preferences
    shown, won = rng.binomial(demonstrations, pi, repeats), rng.binomial(preferences, pi, repeats)
    demos, wins = np.stack([shown, demonstrations - shown], -1), np.zeros((repeats, 2, 2), int)
    wins[:, 0, 1], wins[:, 1, 0] = won, preferences - won
    variance = pi * (1 - pi) / size
    excess_kurtosis = (1 - 6 * pi * (1 - pi)) / (size * pi * (1 - pi))
    error = variance * math.sqrt((2 + excess_kurtosis) / repeats)
    assert error < 0.011 * variance
    assert abs(bandit.aihf(demos, wins)[:, 0].var(ddof=1) - variance) < 5 * error
    for alone in (bandit.sft(demos), bandit.preferences_only(wins)):
        assert alone[:, 0].var() > 1.2 * variance


def test_gradient_and_hessian_are_those_of_the_log_likelihood():
    demos, wins = (torch.from_numpy(counts).double() for counts in random_counts())

    def log_likelihood(u):
        log_sigmoid = torch.nn.functional.logsigmoid(u[:, None] - u)
        return demos @ torch.log_softmax(u, -1) + (wins * log_sigmoid).sum()

    u = torch.from_numpy(np.random.default_rng(1).normal(size=6))
    gradient, hessian = bandit.gradient_and_hessian(u.numpy(), demos.numpy(), wins.numpy())
    close(torch.from_numpy(gradient), autograd(log_likelihood, u), 1e-10)
    close(torch.from_numpy(hessian), torch.autograd.functional.hessian(log_likelihood, u), 1e-10)


@pytest.mark.parametrize("scale", [1, 1000])
def test_estimates_are_first_order_optimal_and_satisfy_24(scale):
    demos, wins = (scale * counts for counts in random_counts())
    pairs = wins + wins.T
    u = bandit.maximum_likelihood(demos, wins)
    assert np.abs(bandit.gradient_and_hessian(u, demos, wins)[0]).max() < 1e-8
    pi = bandit.aihf(demos, wins)
    rho = 1 / (pi[:, None] + pi)
    np.testing.assert_allclose(
        pi, (demos + wins.sum(1)) / (demos.sum() + (pairs * rho).sum(1)), atol=1e-10
    )
    np.testing.assert_allclose(
        bandit.aihf(demos, 0 * wins + 1e-9 * pairs), bandit.sft(demos), atol=1e-6
    )


def test_rlhf_maximises_reward_less_kl_from_sft():
    demos, wins = random_counts(seed=3)
    reward, sft = np.log(bandit.preferences_only(wins)), bandit.sft(demos)
    others = np.random.default_rng(0).dirichlet(np.ones(6), 1000)

    def value(pi):  # β = 1
        return (pi * (reward - np.log(pi / sft))).sum(-1)

    best = bandit.rlhf(demos, wins)
    assert (value(others) < value(best)).all()
    assert (value(0.99 * best + 0.01 * others) < value(best)).all()


def test_data_without_a_finite_maximum_are_refused():
    wins = np.array([[0, 3, 2], [0, 0, 2], [0, 1, 0]])  # the first action never loses
    with pytest.raises(ValueError, match="no finite maximum"):
        bandit.preferences_only(wins)
    # demonstrations of the others settle it
    assert np.isfinite(bandit.aihf(np.array([1, 1, 1]), wins)).all()


@pytest.fixture(scope="module")
def figure_2():
    return bandit.example_2(bandit.PREFERENCES, bandit.REPEATS)


def test_example_2_is_the_papers(figure_2):
    truth, policies = figure_2
    assert (len(truth), bandit.DEMONSTRATIONS, bandit.REPEATS, bandit.COVERED, max(policies)) == (
        50,
        2000,
        100,
        45,
        200,
    )
    i = 25  # at i / 50 = μ the density is 1 / (σ sqrt(2 π))
    density = [
        math.exp(-(((j + 1) / 50 - 0.5) ** 2) / 8) / (2 * math.sqrt(2 * math.pi)) for j in range(50)
    ]
    assert density[i - 1] == pytest.approx(0.19947, abs=1e-5)
    np.testing.assert_allclose(truth, np.exp(density) / np.exp(density).sum(), atol=1e-14)
    for pi in policies[200].values():
        assert pi.shape == (100, 50)
        np.testing.assert_allclose(pi.sum(-1), 1, atol=1e-12)


def test_example_2_only_aihf_keeps_what_was_never_demonstrated(figure_2):
    truth, policies = figure_2
    for methods in policies.values():
        assert (bandit.uncovered_mass(methods["SFT"]) == 0).all() and (
            bandit.uncovered_mass(methods["RLHF"]) == 0
        ).all()
        distance = {method: bandit.total_variation(pi, truth) for method, pi in methods.items()}
        assert (distance["AIHF"] < distance["SFT"]).all() and (
            distance["AIHF"] < distance["RLHF"]
        ).all()
    mass = bandit.uncovered_mass(policies[200]["AIHF"]).mean()
    # a little low: demonstrations say that they are avoided
    assert 0.97 < mass / bandit.uncovered_mass(truth) < 0.995


def test_example_2_with_demonstrations_of_everything_joint_learning_beats_each_source_alone():
    truth, policies = bandit.example_2((2,), 20, covered=bandit.ACTIONS)
    distance = {method: bandit.total_variation(pi, truth) for method, pi in policies[2].items()}
    for method in ("SFT", "preferences only", "RLHF"):
        assert distance["AIHF"].mean() < 0.9 * distance[method].mean()


def test_committed_figure_2_is_what_the_code_gives(figure_2):
    truth, policies = figure_2
    rows = read_csv(ROOT / "benchmark/results/figure2_bandit.csv")
    rows = [row for row in rows if row["covered"] == "45"]
    assert len(rows) == len(policies) * 4 * bandit.REPEATS
    for row in rows:
        pi = policies[int(row["preferences_per_pair"])][row["method"]][int(row["repeat"])]
        assert float(row["uncovered_mass"]) == pytest.approx(bandit.uncovered_mass(pi), rel=1e-5)
        assert float(row["total_variation"]) == pytest.approx(
            bandit.total_variation(pi, truth), rel=1e-5
        )


# ----------------------------------------------------------------------- tabular MDPs and Lemma 5.1
S, A, HORIZON = 5, 3, 200
IDENTITY = torch.eye(S * A).double()
BASIS = torch.from_numpy(np.random.default_rng(7).normal(size=(S * A, 4)))


def nonlinear_reward(theta, x):
    return 2 * torch.tanh(x @ BASIS @ theta)


def make_world(seed, gamma=0.9, deterministic=False, stay=0.5):
    """An MDP, π⁰, an expert who never takes the last action and is optimal for nothing, and θ
    (4,)."""
    rng = np.random.default_rng(seed)
    mdp = tabular.random_mdp(S, A, 0.15, gamma, rng, stay)
    if deterministic:
        following = torch.from_numpy(rng.integers(0, S + 1, (S, A)))  # S: the end
        mdp = mdp._replace(
            transitions=torch.nn.functional.one_hot(following, S + 1)[..., :S].double()
        )
    prior = torch.from_numpy(rng.dirichlet(np.ones(A), S))
    expert = torch.from_numpy(np.pad(rng.dirichlet(np.ones(A - 1), S), ((0, 0), (0, 1))))
    return mdp, prior, expert, torch.from_numpy(rng.normal(size=4)), rng


def aligned(theta, mdp, prior, beta, r=nonlinear_reward):
    return tabular.soft_value_iteration(mdp, r(theta, IDENTITY).view(S, A), prior, beta)


def expected(weights):
    """Every (s, a) with its expected weight, in the place of sampled steps."""
    return IDENTITY, weights.flatten()


@pytest.mark.parametrize("seed, gamma, beta", [(0, 0.9, 0.5), (1, 0.5, 2.0), (2, 0.97, 1.0)])
def test_soft_value_iteration_solves_10(seed, gamma, beta):
    mdp, prior, _, theta, rng = make_world(seed, gamma)
    reward = nonlinear_reward(theta, IDENTITY).view(S, A)
    policy, value = tabular.soft_value_iteration(mdp, reward, prior, beta)
    q = reward + gamma * torch.einsum("sat,t->sa", mdp.transitions, value)
    unnormalised = prior * (q / beta).exp()  # (5)
    close(policy, unnormalised / unnormalised.sum(-1, keepdim=True), 1e-10)
    best = tabular.soft_return(mdp, reward, prior, beta, policy)
    assert best == pytest.approx((mdp.start @ value).item(), abs=1e-9)
    for _ in range(100):
        other = 0.9 * policy + 0.1 * torch.from_numpy(rng.dirichlet(np.ones(A), S))
        assert tabular.soft_return(mdp, reward, prior, beta, other) < best


@pytest.mark.parametrize(
    "seed, gamma, beta", [(0, 0.9, 0.5), (1, 0.5, 2.0), (2, 0.97, 0.1), (3, 0.97, 1.0)]
)
def test_lemma_5_1_is_exact_in_expectation(seed, gamma, beta):
    mdp, prior, expert, theta, _ = make_world(seed, gamma)
    of_expert = tabular.occupancy(mdp, expert)

    def l1(theta):  # (9)
        policy, _ = aligned(theta, mdp, prior, beta)
        return (of_expert * policy.log()).sum()

    exact, of_policy = (
        autograd(l1, theta),
        tabular.occupancy(mdp, aligned(theta, mdp, prior, beta)[0]),
    )
    steps = 1e-5 * torch.eye(4).double()
    close(exact, torch.stack([(l1(theta + s) - l1(theta - s)) / 2e-5 for s in steps]), 1e-5)
    g1 = tabular.gradient(
        aihf.demonstration_gap, theta, nonlinear_reward, expected(of_expert), expected(of_policy)
    )
    assert g1.norm() > 0.1
    close(g1 / beta, exact, 1e-9)  # the factor of (34), and the sign


def test_lemma_5_1_needs_the_demonstrations_starting_states():
    mdp, prior, expert, theta, rng = make_world(0)
    elsewhere = mdp._replace(start=torch.from_numpy(rng.dirichlet(np.ones(S))))
    of_expert, (policy, _) = tabular.occupancy(elsewhere, expert), aligned(theta, mdp, prior, 0.5)
    exact = autograd(
        lambda theta: (of_expert * aligned(theta, mdp, prior, 0.5)[0].log()).sum(), theta
    )
    for world, same in ((elsewhere, True), (mdp, False)):
        of_policy = expected(tabular.occupancy(world, policy))
        error = (
            tabular.gradient(
                aihf.demonstration_gap, theta, nonlinear_reward, expected(of_expert), of_policy
            )
            / 0.5
            - exact
        )
        assert (error.norm() < 1e-9) == same and (same or error.norm() > 0.1 * exact.norm())


@pytest.mark.parametrize("deterministic", [True, False])
def test_lemma_5_1_on_a_finite_set_of_demonstrations(deterministic):
    """∇ mean Σ γ^t log π_θ is Lemma 5.1's difference less the luck of the transitions, none of
    which is deterministic.

    Weights are float32: relative error 6e-8 of sums of 10 or so."""
    mdp, prior, expert, theta, rng = make_world(5, 0.8, deterministic)
    demos, beta = tabular.sample(mdp, expert, 6, HORIZON, rng), 0.5
    starts = np.bincount(demos[:, 0] // A, minlength=S) / len(demos)
    visits = tabular.discounted_visits(demos, mdp).mean(0)

    def log_likelihood(theta):
        return visits @ aligned(theta, mdp, prior, beta)[0].log().flatten()

    def luck(theta):
        _, value = aligned(theta, mdp, prior, beta)
        total, mean_next = 0.0, (mdp.transitions @ value).flatten()
        for trajectory in demos:
            steps = trajectory[trajectory >= 0]
            # 0.8^200 = 0, if it was cut off
            after = torch.cat([value[steps[1:] // A], torch.zeros(1).double()])
            total += (
                mdp.gamma ** torch.arange(1, len(steps) + 1) * (after - mean_next[steps])
            ).sum() / len(demos)
        return total / beta

    policy, _ = aligned(theta, mdp, prior, beta)
    of_policy = tabular.occupancy(mdp._replace(start=torch.from_numpy(starts)), policy)
    of_demos = tabular.weighted(demos, "discounted", mdp)
    g1 = (
        tabular.gradient(
            aihf.demonstration_gap, theta, nonlinear_reward, of_demos, expected(of_policy)
        )
        / beta
    )
    of_luck = autograd(luck, theta)
    assert of_luck.norm() < 1e-9 if deterministic else of_luck.norm() > 0.1
    close(g1 - of_luck, autograd(log_likelihood, theta), 1e-5)


def batch_statistics(gradients, exact):
    """Student's t of each component of the mean of independent gradients (batches, P), and its
    relative error."""
    error = gradients.std(0) / math.sqrt(len(gradients))
    return (gradients.mean(0) - exact) / error, (error.norm() / exact.norm()).item()


@pytest.mark.parametrize("end_is_likely", [True, False])
def test_expected_weights_are_those_of_step_weights(end_is_likely):
    """15 (s, a) and 3 forms, |t| with 99 degrees of freedom above 6: fails with probability
    2e-6."""
    rng, horizon = np.random.default_rng(0), 12
    mdp = tabular.random_mdp(S, A, 0.2 if end_is_likely else 0.01, 0.8, rng)
    policy = torch.from_numpy(rng.dirichlet(np.ones(A), S))
    steps = tabular.sample(mdp, policy, 20_000, horizon, rng)
    for form, weights in tabular.expected_weights(mdp, policy, horizon).items():
        parts = [tabular.weighted(part, form, mdp) for part in np.split(steps, 100)]
        sampled = torch.stack([weight @ x for x, weight in parts])
        t, relative_error = batch_statistics(sampled, weights.flatten())
        assert t.abs().max() < 6 and relative_error < 0.02


def expected_g1(theta, form, mdp, prior, expert, beta, r):
    policy, _ = aligned(theta, mdp, prior, beta, r)
    weights = [
        expected(tabular.expected_weights(mdp, pi, HORIZON)[form]) for pi in (expert, policy)
    ]
    return tabular.gradient(aihf.demonstration_gap, theta, r, *weights)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_only_the_discounted_form_is_the_gradient_of_l1(seed):
    """In expectation, with no sampling error: 0.9^200 = 1e-9 is what the horizon cuts off."""
    mdp, prior, expert, theta, _ = make_world(seed, stay=0.9)
    of_expert, beta = tabular.occupancy(mdp, expert), 0.5
    exact = beta * autograd(
        lambda theta: (of_expert * aligned(theta, mdp, prior, beta)[0].log()).sum(), theta
    )
    for form in FORMS:
        g1 = expected_g1(theta, form, mdp, prior, expert, beta, nonlinear_reward)
        best_scaled = g1 * (g1 @ exact) / (g1 @ g1)
        error = ((best_scaled - exact).norm() / exact.norm()).item()
        if form == "discounted":
            close(g1, exact, 1e-7)
        else:
            assert error > 0.03


def test_only_the_discounted_form_is_the_gradient_of_anything():
    """The derivative of a gradient is symmetric."""
    mdp, prior, expert, _, rng = make_world(0, 0.7, stay=0.9)
    theta = torch.from_numpy(rng.normal(size=S * A))

    def minus_g1(theta, form):  # of a tabular reward, up to the expert's constant part
        policy, _ = aligned(theta, mdp, prior, 0.5, tabular.linear_reward)
        return tabular.expected_weights(mdp, policy, 60)[form].flatten()

    for form in FORMS:
        slope = torch.autograd.functional.jacobian(lambda theta: minus_g1(theta, form), theta)
        asymmetry = ((slope - slope.T).norm() / slope.norm()).item()
        assert asymmetry < 1e-6 if form == "discounted" else asymmetry > 0.05


# -------------------------------------------------------------------------------------- Algorithm 1
@pytest.fixture(scope="module", params=[0, 1])
def solved(request):
    rng = np.random.default_rng(request.param)
    problem, reward = tabular.make_problem(50, 3000, rng)
    run = list(tabular.algorithm_1(problem, 60, rollouts=50, pairs=64, eta=4.0, rng=rng))
    return problem, reward, tabular.exact_limit(problem), run


def test_objective_is_8a_step_by_step(solved):
    problem, _, limit, _ = solved
    small = problem._replace(
        demos=problem.demos[:4], preferred=problem.preferred[:3], other=problem.other[:3]
    )
    policy, _ = tabular.soft_value_iteration(
        problem.mdp, limit.view_as(problem.prior), problem.prior, problem.beta
    )
    total = 0.0
    for trajectory in small.demos:
        for t, step in enumerate(trajectory[trajectory >= 0]):
            probability = policy[step // tabular.ACTIONS, step % tabular.ACTIONS].item()
            total += problem.alpha * problem.mdp.gamma**t * math.log(probability) / 4
    for w, lo in zip(small.preferred, small.other):
        total -= math.log(1 + math.exp(-((w - lo) @ limit).item())) / 3
    assert tabular.objective(small, limit) == pytest.approx(total, rel=1e-9)


def test_exact_limit_is_where_the_shipped_gradients_cancel(solved):
    problem, _, limit, _ = solved
    policy, _ = tabular.soft_value_iteration(
        problem.mdp, limit.view_as(problem.prior), problem.prior, problem.beta
    )
    one_hot = torch.eye(limit.numel()).double()
    rollouts = one_hot, tabular.occupancy(problem.mdp, policy).flatten()
    demos = tabular.weighted(problem.demos, "discounted", problem.mdp)
    g1 = tabular.gradient(aihf.demonstration_gap, limit, tabular.linear_reward, demos, rollouts)
    g2 = tabular.gradient(
        aihf.preference_log_likelihood,
        limit,
        tabular.linear_reward,
        problem.preferred[:, None],
        problem.other[:, None],
    )
    assert g2.abs().max() > 1e-3
    close(problem.alpha / problem.beta * g1, -g2, 1e-7)  # float32 weights


def test_algorithm_1_steps_along_the_gradient_with_its_factor_1_over_beta(solved):
    """20,000 rollouts and pairs: the error is 0.01 of the step, and 0.1 is allowed."""
    problem = solved[0]._replace(alpha=1.0)
    run = tabular.algorithm_1(
        problem, 1, rollouts=20_000, pairs=20_000, eta=1.0, rng=np.random.default_rng(0)
    )
    (zero, policy), (theta, _) = run
    shown = tabular.discounted_visits(problem.demos, problem.mdp).mean(0)
    expected_step = (shown - tabular.occupancy(problem.mdp, policy).flatten()) / problem.beta
    expected_step += (problem.preferred - problem.other).mean(0) / 2  # σ(0) = 1/2
    assert not zero.any() and (theta - expected_step).norm() < 0.1 * expected_step.norm()


def test_algorithm_1_increases_the_objective_up_to_its_limit(solved):
    problem, _, limit, run = solved
    best = tabular.objective(problem, limit)
    gaps = [best - tabular.objective(problem, run[k][0]) for k in (0, 1, 5, 20)]
    assert all(later < earlier for earlier, later in zip(gaps, gaps[1:]))
    last = best - np.mean([tabular.objective(problem, theta) for theta, _ in run[50:]])
    assert abs(last) < 0.1 * gaps[0]


def test_algorithm_1_ends_better_than_sft_and_rlhf(solved):
    problem, reward, limit, run = solved
    exact, _ = tabular.soft_value_iteration(
        problem.mdp, limit.view_as(reward), problem.prior, problem.beta
    )
    others = {
        name: tabular.scores(problem, reward, pi) for name, pi in tabular.baselines(problem).items()
    }
    for policy in (run[-1][1], exact):
        score = tabular.scores(problem, reward, policy)
        for method in ("SFT", "RLHF"):
            assert others[method]["uncovered_mass"] == 0 < score["uncovered_mass"]
            for key in ("regret", "total_variation"):
                assert score[key] < 0.7 * others[method][key]


def test_committed_tabular_results_are_what_the_code_gives():
    rows = read_csv(ROOT / "benchmark/results/tabular_mdp.csv")
    rows = [row for row in rows if row["repeat"] == "3" and not row["iteration"]]
    rows = {row["method"]: row for row in rows}
    problem, reward = tabular.make_problem(50, 6000, np.random.default_rng(3))
    limit = tabular.exact_limit(problem).view_as(reward)
    policies = tabular.baselines(problem)
    policies["AIHF"], _ = tabular.soft_value_iteration(
        problem.mdp, limit, problem.prior, problem.beta
    )
    assert set(rows) == {*policies, "optimal"}
    for method, policy in policies.items():
        for key, value in tabular.scores(problem, reward, policy).items():
            assert float(rows[method][key]) == pytest.approx(value, rel=1e-4)
