"""What does each choice in a step of the language-model trainings save? Each changed alone.

    python benchmark/llm_steps.py

prints a line for each measurement, then seconds a step, and how many times as fast as the changed
script the shipped one is; writes benchmark/results/llm_steps.csv. Allow an hour. All is as in
llm_speed.py: one core, one thread, the embedded model; all take turns in every round.

Undone: Adam fused into one call; logits of the responses alone; keys and values kept while a
response is sampled. Tried and not shipped: torch.compile of the policy's passes, but not of
sampling or of the value network's. --dtype bfloat16 is a flag; undone, too: its attention, step by
step on a CPU, where the fused one is slow.
"""

import importlib
import sys
from dataclasses import dataclass

import torch
import transformers
import tyro
from llm_speed import COLUMNS, ROOT, measure_ours, on_one_core, summary, write_table

sys.path.insert(0, str(ROOT))
from data_gen import read

RESULTS = ROOT / "benchmark/results/llm_steps.csv"


@dataclass
class Args:
    rounds: int = 3  # measurements of each


def unfused_adam(module) -> None:
    adam = torch.optim.Adam
    torch.optim.Adam = lambda parameters, fused: adam(parameters)


def logits_of_prompts_too(module) -> None:
    forward = module.Policy.forward

    def all_logits(self, ids, mask, length, cache=None):
        logits, cache = forward(self, ids, mask, ids.shape[1], cache)
        return logits[:, -length:], cache

    module.Policy.forward = all_logits


def nothing_cached(module) -> None:
    forward = module.Policy.forward

    def without_cache(self, ids, mask, length, cache=None):
        ids = torch.cat([cache["ids"], ids], 1) if cache else ids
        logits, _ = forward(self, ids, mask, length)
        return logits, {"ids": ids}

    module.Policy.forward = without_cache


def compiled(module) -> None:
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would go on uncompiled
    forward = module.Policy.forward

    def through_compiler(self, ids, mask, length, cache=None):
        if not hasattr(self, "plain"):
            self.plain = self.lm.forward
            self.compiled = torch.compile(self.plain, dynamic=True)
        self.lm.forward = self.compiled if cache is None else self.plain
        return forward(self, ids, mask, length, cache)

    module.Policy.forward = through_compiler


def fused_attention(module) -> None:
    transformers.PreTrainedModel.set_attn_implementation = lambda self, name: None


CHANGES = {  # what it does to a script, and its flags
    "unfused_adam": (unfused_adam, ()),
    "logits_of_prompts_too": (logits_of_prompts_too, ()),
    "nothing_cached": (nothing_cached, ()),
    "compiled": (compiled, ()),
    "bfloat16": (None, ("--dtype", "bfloat16")),
    "bfloat16_fused_attention": (fused_attention, ("--dtype", "bfloat16")),
}
TURNS = {  # training: the changes that can make a difference
    "dpo": [change for change in CHANGES if change != "nothing_cached"],
    "remax": list(CHANGES),
    "ppo": list(CHANGES),
}


def change_and_run(change: str, script: str, *flags: str) -> None:
    """The script, changed, with its flags."""
    module, (alter, more) = importlib.import_module(script.removesuffix(".py")), CHANGES[change]
    if alter:
        alter(module)
    sys.argv = [script, *flags, *more]
    module.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:  # one measurement, for the process below
        change_and_run(*sys.argv[2:])
        raise SystemExit
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        read.check_numbers(args, "")
        on_one_core()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    rows = []
    for number in range(1, args.rounds + 1):
        for training, changes in TURNS.items():
            for what in (training, *changes):
                worker = () if what == training else (__file__, "--worker", what)
                value = measure_ours(training, number, *worker)
                print(f"round {number}: {training}, {what} {value:.3f} s", flush=True)
                rows.append(dict(zip(COLUMNS, (training, what, number, f"{value:.5g}"))))
        write_table(RESULTS, rows)
    print(f"\n{summary(rows)}\n\nwrote {RESULTS}")
