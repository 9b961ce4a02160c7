"""AIHF-DPO: the reward-free form of AIHF, demonstrations and preferences in one likelihood.

"Joint Demonstration and Preference Learning Improves Policy Alignment with Human Feedback", Li et
al., arXiv 2406.06874: (13) on language models (6.2, A.2.2). Equation numbers are the paper's.

    python aihf_dpo_llm.py

learns to write movie reviews from 1,000 demonstrations and 1,000 preferences, from a small language
model that is in the repository, in 6 minutes on a CPU core; prints the ground-truth score, used for
nothing else; leaves the policy in runs/<run_name>/. `--demo-weight 0 --sft-model-path RUN/sft` (RUN
of rlhf_baseline.py) is DPO, `--preference-weight 0` SFT; torchrun shards models over processes.

    (13)  max_π  α E_D[log π(y|x)] + E_P[log σ(β log π/π⁰(y_w|x) - β log π/π⁰(y_l|x))]

is (8) with its lower level solved: π is the best policy of the reward β log π/π⁰ plus a term of x
alone, which cancels as in DPO. Two departures (README.md has more):
- The paper's (13) leaves out the log before σ and swaps two denominators; above it is as derived.
- log π(y|x) of a demonstration is a mean over its tokens: α = 1 weighs it about as much as a pair.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data_gen import read

ASSETS = "data_gen/assets/imdb"


@dataclass
class Args:
    preset: Literal["", "imdb", "hh"] = ""  # the paper's models; flags beside it win
    model_name_or_path: str = f"{ASSETS}/model"  # the base policy, a folder or hub id
    sft_model_path: str = ""  # start from this policy, which is then π⁰ too
    ground_truth_path: str = f"{ASSETS}/classifier"  # sequence classifier, to evaluate; "": none
    demonstrations: str = f"{ASSETS}/demonstrations.jsonl"  # {prompt, completion}, file or hub id
    preferences: str = f"{ASSETS}/preferences.jsonl"  # {prompt, chosen, rejected}
    num_demonstrations: int = 1000  # the first rows; 0 for all
    num_preferences: int = 1000  # the first rows; 0 for all
    prompts: str = f"{ASSETS}/prompts.jsonl"  # {prompt}; the last --eval-prompts are for evaluation
    seed: int = 1  # of batches; evaluation has a seed of its own
    max_prompt_length: int = 64  # tokens; of longer ones the last are read
    response_length: int = 24  # tokens at most; longer responses of the data are cut
    append_eos: bool = False  # end shorter responses of the data with the end token
    micro_batch_size: int = 64  # demonstrations, and pairs, in a pass; sampling is not split
    anneal: bool = True  # let the learning rate fall linearly to 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm

    # What is maximised, (13)
    demo_weight: float = 1.0  # α of (8a); in aihf_ppo_llm.py it is α / β; 0 is DPO
    preference_weight: float = 1.0  # 0 is supervised fine-tuning
    beta: float = 0.1  # β: the smaller, the further the policy may go from the reference
    sft_normalisation: Literal["token", "sequence"] = "token"  # log π(y|x): mean or sum over tokens
    dpo_steps: int = 200  # Adam steps
    batch_size: int = 32  # demonstrations, and pairs, in each
    learning_rate: float = 1e-4  # Adam's

    # Running
    eval_prompts: int = 256  # held-out prompts
    eval_every: int = 20  # steps between evaluations
    checkpoint_every: int = 20  # steps between checkpoints
    runs_dir: str = "runs"  # where run folders go
    run_name: str = ""  # the run's folder; "": from script, seed and time
    resume: str = ""  # a run folder to carry on with its arguments; most flags beside it win
    evaluate: str = ""  # a run folder whose policy to evaluate instead of training; beats --resume
    cuda: bool = True  # use GPUs when there are any
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights are float32
    gradient_checkpointing: bool = False  # activations are computed anew in backward: less memory
    threads: int = 2  # CPU threads of each process
    track: bool = False  # log to Weights & Biases too (WANDB_PROJECT, WANDB_ENTITY ...)


PRESETS = {  # flags that come before the user's own; batch and rate are as in DPO's paper
    "imdb": """--model-name-or-path gpt2 --ground-truth-path lvwerra/distilbert-imdb
        --num-demonstrations 0 --num-preferences 0 --learning-rate 1e-6 --batch-size 64
        --dpo-steps 1000""",
    # no ground truth: beaver-7b-v3.0-reward needs remote code, which is never run
    "hh": """--model-name-or-path EleutherAI/pythia-160m --ground-truth-path= --append-eos
        --demonstrations runs/hh_data/demonstrations.jsonl --num-demonstrations 0
        --preferences runs/hh_data/preferences.jsonl --num-preferences 0
        --prompts runs/hh_data/prompts.jsonl --max-prompt-length 512 --response-length 128
        --learning-rate 1e-6 --batch-size 64 --micro-batch-size 4 --dpo-steps 1000
        --dtype bfloat16 --eval-every 100 --checkpoint-every 100""",
}
SCRIPT = Path(__file__).name
MAY_BE_ZERO = "seed num_demonstrations num_preferences demo_weight preference_weight"


def aihf_dpo_loss(demo_log_probs, lengths, r_chosen, r_rejected, args: Args) -> Tensor:
    """Minus (13), its terms weighted, summed over rows. Of demonstrations: log π(y|x) and their
    lengths; of pairs: r = β log π/π⁰ of both sides; (rows,) each, empty where the weight is 0."""
    by_token = args.sft_normalisation == "token"
    log_likelihoods = demo_log_probs / lengths if by_token else demo_log_probs
    log_sigmoids = F.logsigmoid(r_chosen - r_rejected)
    return -args.demo_weight * log_likelihoods.sum() - args.preference_weight * log_sigmoids.sum()


def main() -> None:
    with read.input_errors():  # around set-up: what is wrong with the input is said in one line
        args, state = parse_args()
        device, processes = start_processes(args)  # share, gather: rows among processes

        initial = args.sft_model_path or args.model_name_or_path
        policy, reference = Policy(initial, args), Policy(initial, args)  # π, π⁰
        base = Policy(args.model_name_or_path, args) if args.sft_model_path else reference
        if base.vocabulary != policy.vocabulary:
            raise ValueError("--model-name-or-path and --sft-model-path differ in vocabulary")
        judge = load_judge(args.ground_truth_path, args, device) if args.ground_truth_path else None

        # D and P in token ids: demonstrations ((x, y),), pairs ((x, y_w), (x, y_l))
        demos, pairs = [], []
        if args.demo_weight:
            demos = policy.rows(args.demonstrations, "prompt completion", args.num_demonstrations)
        if args.preference_weight:
            pairs = policy.rows(args.preferences, "prompt chosen rejected", args.num_preferences)
        if (equal := sum(chosen == rejected for chosen, rejected in pairs)) and read.writes():
            print(f"{args.preferences}: {equal} of {len(pairs)} pairs are equal after the cut")
        prompts = [x for (x,) in read.rows(args.prompts, "prompt")]
        if len(prompts) < args.eval_prompts:
            raise ValueError(f"{args.prompts} has {len(prompts)} rows: too few for --eval-prompts")
        prompt_ids = policy.texts.prompts(prompts, args.prompts)[-args.eval_prompts :]
        prompts = prompts[-args.eval_prompts :]
        weights = (w for x in dict.fromkeys([reference, base]) for w in x.state_dict().values())
        data_hash = read.fingerprint(demos, pairs, prompt_ids, *weights)
        if state:
            if state["data_hash"] != data_hash:
                raise ValueError("the run had other data, models, --eval-prompts or a weight of 0")
            policy.lm.load_state_dict(state["policy"])
        for module in dict.fromkeys([policy, reference, base]):
            shard(module.to(device), device)
        optimizer = torch.optim.Adam(policy.parameters(), fused=True)  # its rate: in the loop
        if state and not args.evaluate:
            load_optimizer(optimizer, state["optimizer"])
        log = state.get("log", [])  # rows of metrics.csv, one a step from 0
        read.check_steps(len(log) - 1, args, "dpo_steps")
        run_dir, track = read.open_run(args, SCRIPT)

    models, held_out = (policy, reference, base, judge), (prompts, prompt_ids)
    evaluation = partial(evaluate, models, held_out, args, run_dir)
    if args.evaluate:
        return evaluation(log[-1]["charts/step"])
    started = time.perf_counter() - (log[-1]["charts/wall_seconds"] if log else 0)
    log = log or [{"charts/step": 0, "charts/wall_seconds": 0} | evaluation(0)]
    track(log[-1], step=len(log) - 1)
    reference_log_probs = reference.frozen_log_probs([y for p in pairs for y in p]).view(-1, 2)
    size = args.batch_size

    for step in tqdm(range(len(log) - 1, args.dpo_steps), "AIHF-DPO", disable=not read.writes()):
        share_left = 1 - step / args.dpo_steps if args.anneal else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * share_left

        # ================================================ SAMPLE: (x, y) ~ D, (y_l ≺ y_w) ~ P
        demo_indices = share(read.draw(len(demos), size, step, (args.seed, 1)) if demos else [])
        pair_indices = share(read.draw(len(pairs), size, step, (args.seed, 2)) if pairs else [])

        # ==================================================== UPDATE: a step up (13), by Adam
        row = {}
        for part in read.parts(0, size // processes, args.micro_batch_size):
            d, p = demo_indices[part], pair_indices[part]
            examples = [demos[i] for i in d] + [pairs[i] for i in p]
            log_probs = policy.log_probs([side for example in examples for side in example])
            demo_log_probs, pair_log_probs = log_probs.split([len(d), 2 * len(p)])
            pair_log_probs = pair_log_probs.view(-1, 2)
            lengths = torch.tensor([len(y) for i in d for _, y in demos[i]], device=device)
            r_chosen, r_rejected = (args.beta * (pair_log_probs - reference_log_probs[p])).unbind(1)
            loss = aihf_dpo_loss(demo_log_probs, lengths, r_chosen, r_rejected, args)
            (loss / size).backward()
            columns = {"losses/total": loss[None], "logps/demonstrations": demo_log_probs}
            columns |= dict(zip(("logps/chosen", "logps/rejected"), pair_log_probs.unbind(1)))
            columns |= {"rewards/chosen": r_chosen, "rewards/rejected": r_rejected}
            columns["rewards/margins"] = r_chosen - r_rejected
            columns["rewards/accuracies"] = (r_chosen > r_rejected).float()
            for name, column in columns.items():
                if len(column):
                    row[name] = row.get(name, 0) + column.detach().sum() / size
        row = {name: gather(x[None]).sum() for name, x in row.items()}
        norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        read.check_finite(step, run_dir, loss=row["losses/total"], gradient=norm)
        optimizer.step()
        optimizer.zero_grad()

        # ===================================================================== LOG and EVALUATE
        row = {name: mean.item() for name, mean in row.items()} | {"charts/step": step + 1}
        finished = step + 1 == args.dpo_steps
        if (step + 1) % args.eval_every == 0 or finished:
            row |= evaluation(step + 1)
        row["charts/wall_seconds"] = time.perf_counter() - started
        log.append(row)
        track(row, step=step + 1)

        # =========================================================================== CHECKPOINT
        if (step + 1) % args.checkpoint_every == 0 or finished:
            state = {"script": SCRIPT, "args": asdict(args), "data_hash": data_hash, "log": log}
            parts = {"policy": policy.lm, "optimizer": optimizer}
            read.write_checkpoint(run_dir, state, parts, whole)
    save_model(policy.lm, policy.tokenizer, run_dir / "policy")  # if a run is killed here: --resume
    if read.writes():
        print(f"final: {read.summary(log[-1])}; python benchmark/plot.py {run_dir} draws it")
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------- models
# Every pass of a policy goes through its forward, where FSDP2 gathers its parameters. Dropout is
# off: models stay in evaluation mode, as from_pretrained returns them.
def load(kind: str, name: str, args: Args):
    """The float32 model that AutoModelFor<kind> gives, and its tokenizer; no remote code is run."""
    auto, no_code = getattr(transformers, f"AutoModelFor{kind}"), {"trust_remote_code": False}
    model, info = auto.from_pretrained(name, output_loading_info=True, **no_code)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **no_code)
    if info["missing_keys"]:
        raise ValueError(f"the model {name} lacks {', '.join(info['missing_keys'])[:100]}")
    size = model.get_input_embeddings().num_embeddings  # Gemma has unused special tokens beyond
    used = [i for i, x in tokenizer.added_tokens_decoder.items() if not x.special]
    used += sum(read.special_tokens(tokenizer), [tokenizer.eos_token_id or 0])
    if max(tokenizer.vocab_size - 1, *used) >= size:
        raise ValueError(f"the tokenizer of {name} has more tokens than its model")
    if args.dtype == "bfloat16" and not (args.cuda and torch.cuda.is_available()):
        model.set_attn_implementation("eager")  # fused attention is slow on a CPU
    for block in blocks(model) if args.gradient_checkpointing else ():
        options = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
        block.forward = partial(checkpoint, block.forward, **options)
    return model.float(), tokenizer


def blocks(module: nn.Module) -> nn.ModuleList:
    """A transformer's layers: its longest list of modules."""
    return max((x for x in module.modules() if isinstance(x, nn.ModuleList)), key=len)


class Policy(nn.Module):
    """π: a causal language model and, in texts, its tokenizer."""

    def __init__(self, name: str, args: Args):
        super().__init__()
        self.lm, self.tokenizer = load("CausalLM", name, args)
        self.texts = read.Texts(self.tokenizer, args.max_prompt_length, args.response_length)
        self.args, self.vocabulary = args, self.tokenizer.get_vocab()
        limit = getattr(self.lm.config, "max_position_embeddings", None) or 10**6
        if args.max_prompt_length + args.response_length > limit:
            raise ValueError(f"{name} reads {limit} tokens: too few for prompt and response")
        encoder = "MaskedLM" in str(self.lm.config.architectures)  # it sees what it is to predict
        if encoder or getattr(self.lm, "_is_stateful", False):  # Mamba: not with padding
            raise ValueError(f"{name} is an encoder or recurrent, no policy for rows of any length")

    def rows(self, name: str, columns: str, count: int) -> list[tuple]:
        """For each row of a file, a tuple: (prompt ids, response ids) of each of its responses."""
        prompts, *sides = zip(*read.rows(name, columns, count))
        x, append_eos = self.texts.prompts(prompts, name), self.args.append_eos
        ys = [self.texts.responses(list(zip(prompts, y)), name, append_eos) for y in sides]
        return [tuple((prompt, y[i]) for y in ys) for i, prompt in enumerate(x)]

    def forward(self, ids: Tensor, mask: Tensor, length: int, cache: dict | None = None):
        """Float32 logits (rows, length or more, vocabulary) of the last positions of ids (rows,
        tokens), and the next call's cache ({} at first); the mask covers what is cached too."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # 0 at the first token, after the padding
        inputs = {"input_ids": ids, "position_ids": positions[:, -ids.shape[1] :]}
        inputs |= {"use_cache": cache is not None, "logits_to_keep": length, **(cache or {})}
        with torch.autocast(ids.device.type, torch.bfloat16, self.args.dtype == "bfloat16"):
            out = self.lm(attention_mask=mask, **inputs)
        name = "cache" if "cache" in out else "past_key_values"  # in older transformers
        return out.logits.float(), {name: out.get(name)}

    def log_probs(self, rows: list[tuple[list[int], list[int]]]) -> Tensor:
        """log π(y|x), float32 (rows,), of rows (x, y): the sum over the response's tokens."""
        prompts, responses = zip(*rows)
        x, y = read.pad(prompts, left=True), read.pad(responses)
        ids, mask = (torch.cat(z, 1).to(self.lm.device) for z in zip(x, y))
        length = y[0].shape[1]
        logits = self(ids, mask, length + 1)[0][:, -length - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, -length:, None]).squeeze(-1)
        return (log_probs * mask[:, -length:]).sum(-1)

    @torch.no_grad()
    def frozen_log_probs(self, rows: list[tuple[list[int], list[int]]]) -> Tensor:
        """log_probs without gradients; rows need be no multiple of the processes."""
        count = int(os.environ.get("WORLD_SIZE", 1))
        own = share(rows + rows[:1] * (-len(rows) % count))
        batches = [own[part] for part in read.parts(0, len(own), self.args.micro_batch_size)]
        empty = torch.zeros(0, device=self.lm.device)
        return gather(torch.cat([empty, *map(self.log_probs, batches)]))[: len(rows)]

    def sample(self, prompts: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
        """Responses to prompts, which processes share: ids up to and with the end token. A row has
        response_length of the rng's numbers, however early it ends; each picks a token by inverse
        CDF: no row depends on its batch. Processes end together."""
        uniform = torch.from_numpy(share(rng.random((len(prompts), self.args.response_length))))
        ids, mask = (x.to(self.lm.device) for x in read.pad(share(prompts), left=True))
        tokens, cache, ended = [], {}, torch.zeros_like(ids[:, :1], dtype=torch.bool)
        alone = not dist.is_initialized()  # then weights are cast to bfloat16 once, not per token
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False, cache_enabled=alone):
            for u in uniform.to(ids.device).unbind(1):
                logits, cache = self(ids, mask, 1, cache)
                cumulative = logits[:, -1].softmax(-1).double().cumsum(-1)
                ids = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
                ids = ids.clamp(max=logits.shape[-1] - 1).masked_fill(ended, 0)
                tokens.append(ids)
                ended = ended | (ids == self.texts.eos_id)
                if gather(ended).all():
                    break
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
        responses = gather(torch.cat(tokens, 1)).tolist()
        end = self.texts.eos_id  # a row is cut after its first end token, if it has one
        return [row[: row.index(end) + 1] if end in row else row for row in responses]


def load_judge(name: str, args: Args, device: torch.device):
    """The ground truth, a sequence classifier, and its tokenizer, which keeps the end of a text."""
    model, tokenizer = load("SequenceClassification", name, args)
    if model.config.num_labels > 2:
        raise ValueError(f"{name} has more than two outputs: it is no reward model")
    if hasattr(model, "score"):  # a decoder: texts come one by one, none is padded
        model.config.pad_token_id = None
    embeddings = getattr(model.base_model, "embeddings", None)
    unused = getattr(embeddings, "padding_idx", -1) + 1  # RoBERTa's positions begin after it
    limit = getattr(model.config, "max_position_embeddings", None) or 10**6
    tokenizer.model_max_length = min(limit - unused, tokenizer.model_max_length)
    tokenizer.truncation_side = "left"
    return model.requires_grad_(False).to(device), tokenizer


def judge_scores(model, tokenizer, texts: list[str]) -> Tensor:
    """The ground truth of texts, of two outputs their difference: (texts,). None is padded."""
    begin = read.special_tokens(tokenizer)[0]  # once, also where a text spells it out
    rows = [ids[len(begin) :] for ids in tokenizer(texts, truncation=True)["input_ids"]]
    rows = [[begin + read.without_prefix(ids, begin)] for ids in rows]
    logits = torch.cat([model(torch.tensor(ids, device=model.device)).logits for ids in rows])
    return logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0.0)


# --------------------------------------------------------- several processes (torchrun), or one
# Process i of n holds rows i, i + n ... of every batch and a share of every policy (FSDP2).
# Gradients are summed: losses are divided by the whole batch. All do equally many forward passes.
def start_processes(args: Args) -> tuple[torch.device, int]:
    """Joins torchrun's processes, fills in args.run_name; the device, the number of processes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_autocast_cache_enabled(False)  # it would hold all weights in bfloat16 at once
    torch.backends.cuda.enable_cudnn_sdp(False)  # its bfloat16 gradients can be nan
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # this process's "cuda"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))  # others wait while one saves
    began = gather(torch.tensor([time.time_ns()], device=device))[0]  # the same in every process
    args.run_name = args.run_name or f"llm__{SCRIPT[:-3]}__{args.seed}__{began}"
    if any(size % count for size in (args.batch_size, args.eval_prompts)):
        raise ValueError(f"--batch-size and --eval-prompts must be multiples of {count} processes")
    return device, count


def share(rows):
    """This process's rows of a list, array or tensor."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def gather(x: Tensor) -> Tensor:
    """The inverse of share, for a tensor (rows, ...) of the same shape in every process."""
    if not dist.is_initialized():
        return x
    shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, x.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)


def shard(module: nn.Module, device: torch.device) -> None:
    """Share out the parameters, block by block; each is gathered whole where it is used."""
    if dist.is_initialized():
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for part in (*blocks(module), module):
            fully_shard(part, mesh=mesh)
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)


def whole(state):
    """A state with its shards put together: on the CPU of process 0, which writes them, and without
    memory or numbers (meta) in the others."""
    where = "cpu" if read.writes() else "meta"
    return tree_map_only(DTensor, lambda x: x.full_tensor().to(where), state)


def load_optimizer(optimizer, state: dict) -> None:
    """Load a whole state into the optimiser of parameters that may be shared out."""
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if isinstance(parameter, DTensor) and i in state["state"]:
            moments, where = state["state"][i], (parameter.device_mesh, parameter.placements)
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = distribute_tensor(moments[name], *where)
    optimizer.load_state_dict(state)


# --------------------------------------------------------------------------- evaluate and save
def evaluate(models, held_out, args: Args, run_dir: Path, step: int) -> dict[str, float]:
    """Means over held-out prompts, printed with samples: the only reader of the ground truth."""
    (policy, reference, base, judge), (prompts, prompt_ids) = models, held_out
    response_ids, row = policy.sample(prompt_ids, np.random.default_rng(10_000)), {}
    responses = policy.texts.decode(prompt_ids, response_ids)
    rows = list(zip(prompt_ids, response_ids))
    log_probs = policy.frozen_log_probs(rows)
    scores = {"response_length": torch.tensor([len(ids) for ids in response_ids]).float()}
    scores["kl_base"] = (log_probs - base.frozen_log_probs(rows)).cpu()
    scores["kl"] = (log_probs - reference.frozen_log_probs(rows)).cpu()
    if judge:
        texts = share([x + y for x, y in zip(prompts, responses)])
        scores["gt_score"] = truth = gather(judge_scores(*judge, texts)).cpu()
        row["eval/gt_score_std"] = truth.std(correction=0).item()
        if step:  # r = β log π/π⁰ is 0 at the start; β does not change ranks
            ranks = torch.stack([scores["kl"], truth]).argsort().argsort().double()
            row["eval/reward_correlation"] = torch.corrcoef(ranks)[0, 1].item()  # Spearman's
    row = {f"eval/{name}": x.mean().item() for name, x in scores.items()} | row
    path = None if args.evaluate else run_dir / "samples.jsonl"
    read.write_samples(path, f"after {step} steps: {read.summary(row)}", prompts, responses, scores)
    return row


def save_model(model, tokenizer, folder: Path) -> None:
    save = partial(model.save_pretrained, state_dict=whole(model.state_dict()))
    read.write_whole(folder, lambda path: (save(path), tokenizer.save_pretrained(path)))


def parse_args() -> tuple[Args, dict]:
    """Arguments: a given run's, those of a preset new to it, the flags; the run's checkpoint."""
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])  # which preset, which run
    state = read.checkpoint(args.evaluate or args.resume, SCRIPT, go_on=not args.evaluate)
    given, preset = state.get("args", {}), args.preset
    preset = PRESETS[preset].split() if preset not in ("", given.get("preset")) else []
    args = tyro.cli(Args, default=Args(**given), args=preset + sys.argv[1:])
    read.check_numbers(args, MAY_BE_ZERO)
    if args.demo_weight == args.preference_weight == 0:
        raise ValueError("--demo-weight and --preference-weight are 0: there is nothing to learn")
    return args, state


if __name__ == "__main__":
    main()
