"""How fast are the language-model trainings? Seconds a step beside those of TRL, and beside the
matrix products that a step cannot do without.

    pip install -e '.[speed]'
    python benchmark/llm_speed.py
    pip install --no-deps --target runs/trl_ppo trl==1.12.0      (the last TRL that had PPO)
    python benchmark/llm_speed.py --trl-ppo runs/trl_ppo

prints a line for each measurement, then a table of medians over the rounds, and of the ratios to
TRL round by round; writes benchmark/results/llm_speed.csv. Allow half an hour.

All take turns in every round, each measurement in a process of its own, on the same one core with
one thread: the embedded model, float32, the same data, batches and lengths. The learning rate is
1e-9, lest what is written become longer in one than in another. A step's time is that between the
ends of two steps; the first step, start-up and evaluation are in none.

- dpo: 32 pairs, from reference log-probabilities computed before. TRL computes those in every step
  (trl-dpo), or before as we do (trl-dpo-precomputed).
- remax: 64 responses of up to 24 tokens, and the greedy ones that are their baselines; TRL has no
  ReMax, so beside it stands RLOO (trl-rloo), which needs no greedy responses.
- ppo: 64 responses, 2 epochs of 2 minibatches, with a value network.
- floor: the products of weight matrices that the step needs (without attention), alone.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_gen import read

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "data_gen/assets/imdb"
PAIRS, RESPONSES, LENGTH, PROMPT, RATE = 32, 64, 24, 64, 1e-9
STEPS = {"dpo": 20, "remax": 8, "ppo": 8}  # measured ones
TURNS = {  # training: who takes turns, ours first
    "dpo": ("dpo", "trl-dpo", "trl-dpo-precomputed", "floor-dpo"),
    "remax": ("remax", "trl-rloo", "floor-remax"),
    "ppo": ("ppo", "trl-ppo", "floor-ppo"),
}
OURS = {
    "dpo": f"aihf_dpo_llm.py --demo-weight 0 --batch-size {PAIRS} --dpo-steps",
    "remax": "aihf_ppo_llm.py --policy-optimizer remax --ppo-steps",
    "ppo": "aihf_ppo_llm.py --value-learning-rate 1e-9 --ppo-steps",
}
# one reward update, in the first step, which is not measured
POLICY = f"""--demo-weight 0 --policy-steps-per-iteration {10**6} --reward-updates-per-iteration 1
    --batch-size {RESPONSES} --minibatch-size 32 --ppo-epochs 2"""
COLUMNS = ("training", "what", "round", "seconds_per_step")
RESULTS = ROOT / "benchmark/results/llm_speed.csv"


@dataclass
class Args:
    rounds: int = 5  # measurements of each
    trl_ppo: str = ""  # a folder with a TRL that has PPO; "": do not measure it


def run(*command: str, **environment: str) -> str:
    """What a process prints; if it fails, so do we, with the last line of its errors."""
    process = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    if process.returncode:
        raise SystemExit((process.stderr.strip() or "error: no message").splitlines()[-1])
    return process.stdout


def on_one_core() -> None:
    """This process and those it starts, without a GPU."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def step_seconds(times: list[float]) -> float:
    """The median step, from the times at which the first step and each after it ended."""
    return median(after - before for before, after in zip(times, times[1:]))


def measure_ours(training: str, seed: int, *through: str) -> float:
    """Seconds a step, of the script or of what runs it; the last one, whose time has evaluation in
    it, is one more than asked for."""
    options = f"""{OURS[training]} {STEPS[training] + 2} --learning-rate {RATE} --seed {seed}
        --ground-truth-path= --eval-every {10**9} --eval-prompts 2 --checkpoint-every {10**9}
        --response-length {LENGTH} --max-prompt-length {PROMPT} --threads 1 --no-cuda
        --run-name speed {"" if training == "dpo" else POLICY}"""
    with tempfile.TemporaryDirectory() as runs_dir:
        run(*through, *options.split(), "--runs-dir", runs_dir)
        with open(Path(runs_dir) / "speed/metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    return step_seconds([float(row["charts/wall_seconds"]) for row in rows[1:-1]])


def measure_trl(what: str, seed: int) -> float:
    """Seconds a step of TRL's trainer, in this process."""
    import torch
    import transformers
    from datasets import Dataset

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "model")
    policy = transformers.AutoModelForCausalLM
    scorer = transformers.AutoModelForSequenceClassification
    models = {policy: [policy.from_pretrained(ASSETS / "model") for _ in "12"]}
    models[scorer] = [scorer.from_pretrained(ASSETS / "model", num_labels=1) for _ in "12"]
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    training = "dpo" if "dpo" in what else "ppo"
    batch = PAIRS if training == "dpo" else RESPONSES
    settings = {"learning_rate": RATE, "seed": seed, "max_steps": STEPS[training] + 1}
    settings |= {"per_device_train_batch_size": batch, "bf16": False, "use_cpu": True}
    settings |= {"report_to": "none", "logging_strategy": "no", "save_strategy": "no"}
    settings |= {"gradient_checkpointing": False, "dataloader_pin_memory": False}
    settings |= {"disable_tqdm": True}
    prompts = [prompt for (prompt,) in read.rows(ASSETS / "prompts.jsonl", "prompt")]
    with tempfile.TemporaryDirectory() as folder:
        settings["output_dir"] = folder
        if training == "dpo":
            from trl import DPOConfig, DPOTrainer

            pairs = read.rows(ASSETS / "preferences.jsonl", "prompt chosen rejected", 1000)
            data = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), zip(*pairs))))
            settings |= {"max_length": PROMPT + LENGTH, "beta": 0.1}
            settings["precompute_ref_log_probs"] = what.endswith("precomputed")
            trainer = DPOTrainer(
                *models[policy], DPOConfig(**settings), train_dataset=data,
                processing_class=tokenizer, callbacks=[Clock()],
            )  # fmt: skip
        elif what == "trl-rloo":
            from trl import RLOOConfig, RLOOTrainer

            settings |= {"num_generations": 2, "max_completion_length": LENGTH}
            trainer = RLOOTrainer(
                models[policy][0], models[scorer][0], RLOOConfig(**settings),
                train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
                reward_processing_classes=tokenizer, callbacks=[Clock()],
            )  # fmt: skip
        else:
            from trl.experimental.ppo import PPOConfig, PPOTrainer

            del settings["max_steps"]
            settings |= {"total_episodes": batch * (STEPS[training] + 1), "num_ppo_epochs": 2}
            settings |= {"num_mini_batches": 2, "num_sample_generations": 0}
            settings |= {"response_length": LENGTH, "temperature": 1.0, "stop_token": "eos"}
            ids = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts]
            trainer = PPOTrainer(
                PPOConfig(**settings), tokenizer, *models[policy], models[scorer][0],
                Dataset.from_list(ids), models[scorer][1], eval_dataset=Dataset.from_list(ids[:2]),
                callbacks=[Clock()],
            )  # fmt: skip
        trainer.train()
    return step_seconds(ends)


def measure_floor(training: str, repeats: int = 5) -> float:
    """Seconds of the matrix products of a step: of M rows (tokens) with every weight matrix of the
    model, and three times that for a pass with gradients; logits are of responses alone."""
    import torch
    import transformers

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    blocks = [p for p in model.transformer.h.parameters() if p.ndim == 2]  # (in, out)
    head = model.lm_head.weight.T

    @torch.no_grad()
    def products(tokens: int, logits: int) -> float:
        sizes = [(tokens, weight) for weight in blocks] + ([(logits, head)] if logits else [])
        inputs = [(torch.randn(rows, weight.shape[0]), weight) for rows, weight in sizes]
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            for x, weight in inputs:
                x @ weight
            times.append(time.perf_counter() - started)
        return median(times)

    def count(texts) -> int:
        return sum(len(row) for row in tokenizer(list(texts))["input_ids"])

    if training == "dpo":
        pairs = read.rows(ASSETS / "preferences.jsonl", "prompt chosen rejected", 1000)
        columns = zip(*pairs)
        prompts, chosen, rejected = (count(column) * PAIRS // 1000 for column in columns)
        responses = chosen + rejected
        return 3 * products(2 * prompts + responses, responses)
    demos = list(zip(*read.rows(ASSETS / "demonstrations.jsonl", "prompt completion", 1000)))
    prompts, responses = (count(column) * RESPONSES // 1000 for column in demos)
    written = RESPONSES * (2 if training == "remax" else 1)  # greedy responses too
    read_first = products(written * prompts // RESPONSES, written)  # prompts, for the first token
    sampling = read_first + (LENGTH - 1) * products(written, written)
    tokens = prompts + responses
    scoring = products(tokens, responses)  # the reference's log-probabilities
    scoring += products(tokens, 0) * (2 if training == "remax" else 1)  # learned scores
    if training == "remax":
        return sampling + scoring + 3 * products(tokens, responses)
    # the value network's, and two epochs of both
    return (
        sampling
        + scoring
        + products(tokens, 0)
        + 6 * (products(tokens, responses) + products(tokens, 0))
    )


def write_table(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summary(rows: list[dict]) -> str:
    """The table of medians and that of ratios, from rows with everything in each round."""
    seconds = {}
    for row in rows:
        of_training = seconds.setdefault(row["training"], {})
        of_training.setdefault(row["what"], []).append(float(row["seconds_per_step"]))
    lines = [f"{'seconds a step':<34}{'median':>8}{'min':>8}{'max':>8}  ours is faster, by round"]
    for training, table in seconds.items():
        for what, numbers in table.items():
            line = f"{what:<34}" + "".join(f"{f(numbers):8.3f}" for f in (median, min, max))
            ratios = [a / b for a, b in zip(numbers, table[training], strict=True)]
            if what != training:
                line += f"  {median(ratios):.2f}: " + " ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:  # one measurement, for the process below
        what, seed = sys.argv[2], int(sys.argv[3])
        floor = what.startswith("floor-")
        print(measure_floor(what[6:]) if floor else measure_trl(what, seed))
        raise SystemExit
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        if find_spec("trl") is None:
            raise ValueError("there is no trl; pip install -e '.[speed]'")
        if args.rounds < 1 or args.trl_ppo and not (Path(args.trl_ppo) / "trl").is_dir():
            raise ValueError("--rounds must be above 0, --trl-ppo a folder that has trl")
        on_one_core()
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl")))
    rows = []
    for number in range(1, args.rounds + 1):
        for training, turns in TURNS.items():
            for what in turns:
                if what == "trl-ppo" and not args.trl_ppo:
                    continue
                if what == training:
                    value = measure_ours(training, number)
                else:
                    path = {"PYTHONPATH": args.trl_ppo} if what == "trl-ppo" else {}
                    worker = (str(Path(__file__).resolve()), "--worker", what, str(number))
                    value = float(run(*worker, **path).split()[-1])
                print(f"round {number}: {what} {value:.3f} s", flush=True)
                rows.append(dict(zip(COLUMNS, (training, what, number, f"{value:.5g}"))))
        write_table(RESULTS, rows)
    print(f"\n{summary(rows)}\n\nwrote {RESULTS}")
