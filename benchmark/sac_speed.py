"""How fast is the SAC here? Environment steps per second of the whole training loop, beside two
other libraries.

    pip install -e '.[speed]'
    python benchmark/sac_speed.py

prints a line for each measurement, then a table (median, min and max over the rounds of each
library) and the ratios of ours to the others, round by round and their median, and writes
benchmark/results/sac_speed.csv. Allow half an hour on a quiet core.

The libraries take turns in every round, each measurement in a process of its own, all of them on
the same CPU core (the last; `taskset` chooses another) with one thread: environment steps, one SAC
update (automatic entropy coefficient) for each, the same sizes of networks and batches. Neither
compilation nor a warm-up of 50,000 steps (random actions, then a thousand updates) is in the time:
after it our memory of rollouts, from which reward updates draw their steps, is full.

- aihf: aihf_sac_mujoco.py as shipped, from the charts/SPS it logs. Only SAC steps are counted, but
  rollouts, reward updates and what is logged of the reward are in the time, which the others have
  not; evaluation and checkpoints are not in it.
- aihf-lower-level: the same script with as little around SAC as its flags allow, in one policy
  alignment: relabelling with the learned reward, and after it one reward update on steps
  drawn from one episode of rollouts, stay in the time.
- sb3, sbx: Stable-Baselines3 (PyTorch) and SBX (JAX), an update after each environment step, which
  is their default.
- sb3-blocks, sbx-blocks: the same with 50 environment steps and then 50 updates, the order ours has
  and the fair one to compare its update with: SBX compiles the 50 into one call.
- floor: the robot's physics under random actions and an update's matrix products, nothing else.
"""

import csv
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import tyro
from llm_speed import ROOT, on_one_core, run, write_table

sys.path.insert(0, str(ROOT))
from data_gen import read

RESULTS = ROOT / "benchmark/results/sac_speed.csv"
ENV, HIDDEN, BATCH = "HalfCheetah-v4", (64, 64), 256  # HIDDEN: our reward's layers too
STEPS, WARM_UP, RANDOM = 10_000, 50_000, 49_000  # measured; before them; of these without updates
BLOCK, ITERATION = 50, 5_000  # BLOCK and policy_steps_per_iteration of aihf_sac_mujoco.py
OURS, OTHERS = ("aihf", "aihf-lower-level"), ("sb3", "sbx", "sb3-blocks", "sbx-blocks", "floor")
TURNS = ("aihf", "sb3", "sbx", "aihf-lower-level", "sb3-blocks", "sbx-blocks", "floor")
COLUMNS = ("library", "round", "steps_per_second")
ONE_THREAD = {
    **dict.fromkeys(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}


@dataclass
class Args:
    rounds: int = 5  # measurements of each library


def measure_ours(library: str, seed: int) -> float:
    """Steps per second of the iterations after the warm-up."""
    iteration, flags = ITERATION, ""
    if library == "aihf-lower-level":
        iteration, flags = STEPS, "--reward-updates-per-iteration 1 --rollout-memory 1"
        flags += " --rollout-steps-per-iteration 1"
    options = f"""--env {ENV} --seed {seed} --total-timesteps {WARM_UP + STEPS}
        --policy-steps-per-iteration {iteration} --learning-starts {RANDOM}
        --hidden {" ".join(map(str, HIDDEN))} --batch-size {BATCH}
        --eval-every {10**9} --eval-episodes 1 --checkpoint-every {10**9}
        --threads 1 --no-cuda --run-name speed {flags}"""
    with tempfile.TemporaryDirectory() as runs_dir:
        printed = run("aihf_sac_mujoco.py", *options.split(), "--runs-dir", runs_dir)
        if "torch.compile failed" in printed:
            raise SystemExit("error: without torch.compile this measures another thing; see README")
        with open(Path(runs_dir) / "speed/metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if float(row["charts/sac_steps"]) > WARM_UP]
    # equally long iterations: steps over seconds
    return len(rows) / sum(1 / float(row["charts/SPS"]) for row in rows)


def measure_other(library: str, seed: int) -> float:
    """Stable-Baselines3 or SBX in this process, with the defaults of aihf_sac_mujoco.py."""
    import gymnasium as gym
    import torch

    if library.startswith("sbx"):
        from sbx import SAC
    else:
        from stable_baselines3 import SAC

    torch.set_num_threads(1)
    gym.logger.min_level = gym.logger.ERROR
    every = BLOCK if library.endswith("blocks") else 1
    model = SAC(
        "MlpPolicy",
        gym.make(ENV, disable_env_checker=True),
        learning_rate=1e-3,
        buffer_size=WARM_UP + STEPS,
        learning_starts=RANDOM,
        batch_size=BATCH,
        tau=0.005,
        gamma=0.99,
        train_freq=every,
        gradient_steps=every,
        ent_coef="auto",
        policy_kwargs={"net_arch": list(HIDDEN)},
        seed=seed,
        device="cpu",
    )
    model.learn(WARM_UP)
    started, first_update = time.perf_counter(), model._n_updates
    model.learn(STEPS, reset_num_timesteps=False)
    seconds = time.perf_counter() - started
    if model.num_timesteps != WARM_UP + STEPS or model._n_updates - first_update != STEPS:
        raise SystemExit(f"error: {library} made another number of steps or updates than {STEPS}")
    return STEPS / seconds


def products(obs_dim: int, act_dim: int, hidden, batch_size: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of each product (m, k) x (k, n) in a SAC update. Forward: the policy for both
    losses, the twin targets, the twin Q networks for both losses. Gradients: of weights for each
    loss, of inputs too, but of a first layer's only where an action needs them."""
    policy, q = (obs_dim, *hidden, 2 * act_dim), (obs_dim + act_dim, *hidden, 1)
    found, n = [], batch_size
    for sizes, forward, weights, inputs, first_inputs in ((policy, 2, 1, 1, 0), (q, 6, 2, 4, 2)):
        for layer, (i, o) in enumerate(zip(sizes, sizes[1:])):
            found += [(n, i, o)] * forward + [(i, n, o)] * weights
            found += [(n, o, i)] * (inputs if layer else first_inputs)
    return found


def measure_floor(steps: int = STEPS) -> float:
    """Steps per second of the robot's physics under random actions and of these products."""
    import gymnasium as gym
    import torch

    torch.set_num_threads(1)
    gym.logger.min_level = gym.logger.ERROR
    robot = gym.make(ENV, disable_env_checker=True)
    (obs_dim,), (act_dim,) = robot.observation_space.shape, robot.action_space.shape
    shapes = products(obs_dim, act_dim, HIDDEN, BATCH)
    factors = [(torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in shapes]
    robot.action_space.seed(0)
    robot.reset(seed=0)
    started = time.perf_counter()
    for _ in range(steps):
        _, _, terminated, truncated, _ = robot.step(robot.action_space.sample())
        if terminated or truncated:
            robot.reset()
        for a, b, out in factors:
            torch.mm(a, b, out=out)
    return steps / (time.perf_counter() - started)


def summary(rows: list[dict]) -> str:
    """The table of speeds and that of ratios, from rows with all libraries in each round. The
    median ratio is that of the rounds' ratios: what slows a whole round down leaves it alone."""
    speeds = {name: [] for name in TURNS}
    for row in rows:
        speeds[row["library"]].append(float(row["steps_per_second"]))
    lines = [f"{'steps per second':<30}{'median':>8}{'min':>8}{'max':>8}"]
    for name in OURS + OTHERS:
        numbers = (f(speeds[name]) for f in (median, min, max))
        lines.append(f"{name:<30}" + "".join(f"{number:8.0f}" for number in numbers))
    lines += ["", f"{'ratio':<30}{'median':>8}  round by round"]
    for ours in OURS:
        for other in OTHERS:
            ratios = [a / b for a, b in zip(speeds[ours], speeds[other], strict=True)]
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"{f'{ours} / {other}':<30}{median(ratios):8.2f}  {each}")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:  # one measurement of another library, for the process below
        library, seed = sys.argv[2], int(sys.argv[3])
        print(measure_floor() if library == "floor" else measure_other(library, seed))
        raise SystemExit
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        if missing := [name for name in ("stable_baselines3", "sbx") if find_spec(name) is None]:
            raise ValueError(f"there is no {' and no '.join(missing)}; pip install -e '.[speed]'")
        if args.rounds < 1:
            raise ValueError("--rounds must be above 0")
        os.environ.update(ONE_THREAD)  # this and the core are handed down to every measurement
        on_one_core()

    packages = ("torch", "stable_baselines3", "sbx-rl", "jax", "gymnasium", "mujoco")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    rows = []
    for number in range(1, args.rounds + 1):
        for library in TURNS:
            if library in OURS:
                speed = measure_ours(library, number)
            else:
                worker = (str(Path(__file__).resolve()), "--worker", library, str(number))
                speed = float(run(*worker).split()[-1])
            print(f"round {number}: {library} {speed:.0f} steps/s", flush=True)
            rows.append(dict(zip(COLUMNS, (library, number, f"{speed:.6g}"))))
        write_table(RESULTS, rows)
    print(f"\n{summary(rows)}\n\nwrote {RESULTS}")
