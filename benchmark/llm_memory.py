"""Memory of AIHF with PPO: by arithmetic on 1 to 8 processes, and measured on this machine.

    python benchmark/llm_memory.py                        (half a minute)
    python benchmark/llm_memory.py --measure runs/smollm2     (minutes)
    python benchmark/llm_memory.py --growth                   (ten minutes)

The first prints a table in GB (10^9 bytes) of what a process of aihf_ppo_llm.py holds under FSDP2
and bfloat16 autocast. Models of one and two layers go forward in shapes alone, and every tensor
that they save for backward is counted; the rest is arithmetic:

- states: 4 bytes a parameter for policy, reference, reward and value, 4 for the gradients of two of
  them, 8 for Adam's moments of three; each process has its share. --sft-model-path adds the base
  model, 4 bytes a parameter of the policy, here and at the start.
- gathered: the parameters of a block in use and of the next, and what stands outside of blocks.
- activations: of a forward pass of the policy on --micro-batch-size rows, or of the reward on four
  times as many (both sides of both kinds of data), whichever is more.
- checkpoint: weights and moments of the three models that learn, on disk; process 0 holds one
  model's moments at a time. At its start every process holds the four models whole in host memory.

--measure runs one PPO step with this folder's model as policy and as base of the reward, in one
CPU process and in two, and prints the largest resident memory of each (Linux). They run with
MALLOC_MMAP_THRESHOLD_=1000000: by default glibc keeps what FSDP2 gives back, block after block.
--growth runs the embedded model, then with longer responses, larger batches, twice the width (at
random) and more steps, each alone, and prints seconds a PPO step and memory.
"""

import contextlib
import csv
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch
import transformers
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_gen import read

ROOT = Path(__file__).resolve().parents[1]
NEOX = {"intermediate_size": 8192, "hidden_size": 2048, "vocab_size": 50304}
NEOX_160M = {"intermediate_size": 3072, "hidden_size": 768, "vocab_size": 50304}
SMOLLM2 = {"intermediate_size": 1536, "hidden_size": 576, "vocab_size": 49152}
SMOLLM2 |= {"num_key_value_heads": 3, "tie_word_embeddings": True}
CONFIGS = {  # the hub's
    "GPT-2": transformers.GPT2Config(),
    "SmolLM2-135M": transformers.LlamaConfig(
        num_hidden_layers=30, num_attention_heads=9, **SMOLLM2
    ),
    "Pythia-160M": transformers.GPTNeoXConfig(
        num_hidden_layers=12, num_attention_heads=12, **NEOX_160M
    ),
    "Pythia-1B": transformers.GPTNeoXConfig(num_hidden_layers=16, num_attention_heads=8, **NEOX),
    "Pythia-1.4B": transformers.GPTNeoXConfig(num_hidden_layers=24, num_attention_heads=16, **NEOX),
}
# policy, reward, tokens of a prompt, of a response, --micro-batch-size
SETTINGS = (
    ("GPT-2", "GPT-2", 64, 24, 64),
    ("SmolLM2-135M", "SmolLM2-135M", 64, 24, 64),
    ("Pythia-160M", "Pythia-1.4B", 512, 128, 4),
    ("Pythia-1B", "Pythia-1.4B", 512, 128, 4),
    ("Pythia-1B", "Pythia-1.4B", 512, 128, 1),
)


@dataclass
class Args:
    measure: str = ""  # a folder with a causal language model; "": the table
    growth: bool = False  # print how a run on the embedded model grows instead


def parameters(config, kind: str) -> tuple[int, int, int]:
    """How many a model of this kind has, how many of them in a block, and outside of blocks."""
    with torch.device("meta"):
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    blocks = max((x for x in model.modules() if isinstance(x, torch.nn.ModuleList)), key=len)
    count, block = (sum(p.numel() for p in x.parameters()) for x in (model, blocks[0]))
    return count, block, count - len(blocks) * block


def saved_bytes(config, layers: int, rows: int, tokens: int, logits: int) -> int:
    """What a forward pass, with log-probabilities of the last `logits` tokens, saves for
    backward."""
    config = type(config)(**config.to_dict() | {"num_hidden_layers": layers, "use_cache": False})
    with FakeTensorMode():  # shapes and types alone, no numbers
        model, saved = transformers.AutoModelForCausalLM.from_config(config), {}
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def count(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage  # kept, lest its address be used again
            return x

        ids = torch.ones(rows, tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(input_ids=ids, logits_to_keep=max(logits, 1)).logits
            out.float().log_softmax(-1).sum()
    return sum(storage.nbytes() for storage in saved.values())


@cache
def saved_per(name: str, tokens: int, logits: int) -> tuple[int, int, int, int]:
    """Of these bytes: those of each row in each layer, of each row, of each layer, and the rest."""
    sizes = (1, 1), (1, 2), (2, 1), (2, 2)
    a, b, c, d = (saved_bytes(CONFIGS[name], *size, tokens, logits) for size in sizes)
    row_layer = d - c - b + a
    row, layer = b - a - row_layer, c - a - row_layer
    return row_layer, row, layer, a - row_layer - row - layer


def activations(name: str, rows: int, tokens: int, logits: int) -> tuple[float, float]:
    """Bytes, and bytes with --gradient-checkpointing: blocks keep their input (float32) alone, and
    one at a time computes the rest again."""
    row_layer, row, layer, rest = saved_per(name, tokens, logits)
    block, outside = layer + rows * row_layer, rest + rows * row
    layers, width = CONFIGS[name].num_hidden_layers, CONFIGS[name].hidden_size
    inputs = 4 * rows * tokens * width
    return outside + layers * block, outside + layers * inputs + block


def table() -> list[str]:
    columns = ("policy, reward", "micro-batch", "states, shared by all", "gathered", "activations")
    columns += ("with `--gradient-checkpointing`", "a process of 1, 2, 4, 8", "the same with it")
    lines = ["| " + " | ".join((*columns, "checkpoint", "host at start")) + " |", "|---" * 10 + "|"]
    for policy, reward, prompt, response, rows in SETTINGS:
        p, *of_policy = parameters(CONFIGS[policy], "CausalLM")
        r, *of_reward = parameters(CONFIGS[reward], "SequenceClassification")
        own = activations(policy, rows, prompt + response, response + 1)
        others = activations(reward, 4 * rows, prompt + response, 0)
        most = [max(pair) for pair in zip(own, others)]
        states = 4 * (2 * p + 2 * r) + 4 * (p + r) + 8 * (p + 2 * r)
        gathered = max(4 * (2 * block + outside) for block, outside in (of_policy, of_reward))
        processes = [[states / n + gathered * (n > 1) + x for n in (1, 2, 4, 8)] for x in most]
        cells = [[states], [gathered], *([x] for x in most), *processes]
        cells += [[12 * (p + 2 * r)], [8 * (p + r)]]
        texts = [", ".join(f"{x / 1e9:.1f}" for x in numbers) for numbers in cells]
        lines.append(" | ".join([f"| {policy}, {reward}", str(rows), *texts]) + " |")
    return lines


def run(flags: str, processes: int = 1) -> tuple[list[float], float]:
    """The largest resident memory, in GB, of each process of a run of aihf_ppo_llm.py with these
    flags, and seconds a step: the median but for the first step, in which the reward learns, and
    the last, in which the policy is evaluated (Linux)."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        options = f"aihf_ppo_llm.py {flags} --ground-truth-path= --threads 1 --no-cuda"
        options += f" --eval-prompts 2 --eval-every 1000 --runs-dir {folder} --run-name run"
        argv = [sys.executable, *(launch if processes > 1 else []), *options.split()]
        found, environment = {}, os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
        while process.poll() is None:
            workers = [str(process.pid)]
            if processes > 1:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
                workers = children.read_text().split()
            for worker in workers:
                with contextlib.suppress(OSError):  # it has just ended
                    text = Path(f"/proc/{worker}/status").read_text()
                    if kilobytes := re.search(r"VmHWM:\s+(\d+) kB", text):
                        found[int(worker)] = int(kilobytes[1]) * 1024 / 1e9
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit("error: the run failed")
        with open(Path(folder) / "run/metrics.csv", newline="") as file:
            ends = [float(row["charts/wall_seconds"]) for row in csv.DictReader(file)][1:-1]
    steps = [after - before for before, after in zip(ends, ends[1:])]
    return [found[worker] for worker in sorted(found)][:processes], median(steps or [math.nan])


def growth() -> None:
    """Prints seconds a step and memory against length, batch, model and steps of the run."""
    assets = ROOT / "data_gen/assets/imdb/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets)
    config = transformers.AutoConfig.from_pretrained(assets)
    with tempfile.TemporaryDirectory() as folder:
        config.n_embd *= 2
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        cases = {"24 tokens, batches of 64, width 192, 5 steps": ""}
        cases |= {"48 tokens": "--response-length 48", "batches of 128": "--batch-size 128"}
        cases |= {"width 384": f"--model-name-or-path {folder}", "20 steps": "--ppo-steps 20"}
        print("| | seconds a step | GB |\n|---|---|---|")
        for name, flags in cases.items():
            (peak,), seconds = run(f"--ppo-steps 5 --reward-updates-per-iteration 1 {flags}")
            print(f"| {name} | {seconds:.2f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        if args.measure and not Path(args.measure).is_dir():
            raise ValueError(f"there is no model {args.measure}")
        transformers.logging.set_verbosity_error()
    if args.growth:
        growth()
    elif not args.measure:
        print("\n".join(table()))
    for count in (1, 2) if args.measure else ():
        flags = f"""--model-name-or-path {args.measure} --num-demonstrations 16
            --num-preferences 16 --ppo-steps 1 --reward-updates-per-iteration 1
            --reward-batch-size 4 --batch-size 4 --minibatch-size 4 --micro-batch-size 1
            --ppo-epochs 1"""
        each = ", ".join(f"{gigabytes:.2f}" for gigabytes in run(flags, count)[0])
        print(f"processes: {count}; GB in each at most: {each}", flush=True)
