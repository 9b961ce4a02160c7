"""AIHF-DPO: the reward-free form of AIHF, demonstrations and preferences in one likelihood of one language model.

"Joint Demonstration and Preference Learning Improves Policy Alignment with Human Feedback", Li et al.,
arXiv 2406.06874: (13) of Section 3.4, on language models (Section 6.1, A.2.2). Equation numbers are the paper's.

    python aihf_dpo_llm.py

learns from 1,000 demonstrations {prompt, completion} and 1,000 preferences {prompt, chosen, rejected} to write movie
reviews, from a small language model that is in the repository; prints the held-out ground-truth score, used for nothing
else, as it goes; and leaves the policy in runs/<run_name>. The score went from -0.2 to 2.4 in 200 steps, which took 4
minutes on one CPU core. `--demo-weight 0 --sft-model-path runs/<run>/sft` is DPO (Rafailov et al. 2023) after SFT,
`--preference-weight 0` SFT alone. --preset imdb and --preset hh are for models from the hub; `torchrun
--nproc-per-node 2 aihf_dpo_llm.py` shares every batch between processes.

    (13)  max_π  α E_D[ log π(y|x) ]  +  E_P[ log σ( β log π(y_w|x)/π⁰(y_w|x) - β log π(y_l|x)/π⁰(y_l|x) ) ]

which is (8) with the policy's own r = β log π/π⁰ in the place of a reward: one response is one action (T = 1), and both
levels become one. aihf_dpo_losses is the equation, the main loop is at the end.

Where the paper leaves a choice, or this file departs from it, and why:
- The paper's (13) leaves out the log before σ and swaps two denominators; the form above is right.
- log π(y|x) of a demonstration is a mean over its tokens (--sft-normalisation token): α = 1 then weighs a demonstration
  about as much as a pair, whatever its length. The sum over tokens (sequence) is the equation to the letter.
- The demonstrations are a set of their own, not the chosen responses of the pairs, and π⁰ is the base model.
- --self-play-weight adds log σ of what tells demonstrations from the policy's own responses, r = β log π/π_k: closer to
  (28) than the likelihood (SPIN, Chen et al. 2024). It is off by default and not what the paper calls AIHF-DPO.
"""

import copy
import gzip
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

ASSETS = "data_gen/assets/imdb"


@dataclass
class Args:
    preset: Literal["", "imdb", "hh"] = ""
    """the paper's settings (Table 2) for models from the hub; flags given beside it win"""
    model_name_or_path: str = f"{ASSETS}/model"
    """the base policy: a causal language model, a folder or hub id"""
    sft_model_path: str = ""
    """start from this policy, which is then the reference too, instead of the base policy"""
    ground_truth_path: str = f"{ASSETS}/classifier"
    """a sequence classifier, for evaluation alone; '' for none"""
    opponent_path: str = ""
    """a policy that eval/win_rate is over, such as an SFT model; default: the policy that the run starts from"""
    demonstrations: str = f"{ASSETS}/demonstrations.jsonl"
    """rows {prompt, completion}: .jsonl, .jsonl.gz or a hub id"""
    preferences: str = f"{ASSETS}/preferences.jsonl"
    """rows {prompt, chosen, rejected}"""
    num_demonstrations: int = 1000
    """rows of the demonstrations that are used, the first ones; 0 for all"""
    num_preferences: int = 1000
    """rows of the preferences, likewise"""
    prompts: str = f"{ASSETS}/prompts.jsonl"
    """rows {prompt}; the last --eval-prompts of them are for evaluation, others are not used"""
    seed: int = 1
    """seeds everything: held-out data, batches, self-play; evaluation has a fixed seed of its own"""
    max_prompt_length: int = 64
    """tokens; of a longer prompt the policy reads the last ones"""
    response_length: int = 24
    """tokens of a response at most; longer ones of the data are cut"""
    micro_batch_size: int = 64
    """demonstrations and as many pairs in a forward and backward pass of a process; the result does not depend on it"""
    anneal: bool = True
    """let the learning rates fall linearly to 0 over the run"""
    max_grad_norm: float = 1.0
    """gradients are cut to this norm"""

    # What is maximised, (13)
    demo_weight: float = 1.0
    """the paper's alpha, on the demonstrations; 0 is DPO"""
    preference_weight: float = 1.0
    """weight of the preferences; 0 is supervised fine-tuning"""
    beta: float = 0.1
    """β of (10) and (13): the less, the further the policy may go from the reference"""
    sft_normalisation: Literal["token", "sequence"] = "token"
    """log π(y|x) of a demonstration as a mean over its tokens or as their sum"""
    label_smoothing: float = 0.0
    """share of the preferences that is taken to be the wrong way round (conservative DPO, Mitchell 2023)"""
    self_play_weight: float = 0.0
    """weight of log σ(r(demonstration) - r(response of π_k)), r = β log π/π_k"""
    self_play_every: int = 25
    """steps after which π_k becomes the policy of then"""

    # How
    dpo_steps: int = 200
    """optimiser steps"""
    batch_size: int = 32
    """pairs, and as many demonstrations, in a step, those of all processes together"""
    learning_rate: float = 1e-4
    """Adam's"""
    append_eos: bool = False
    """end responses of the data that are shorter than --response-length with the end token"""
    held_out_share: float = 0.1
    """share of the demonstrations, and of the preferences, that is kept for the held_out/ metrics"""
    cache_dir: str = "runs/reference_log_probs"
    """where the reference's log-probabilities of the pairs are kept, by the hash of model and data"""

    # Running
    eval_prompts: int = 256
    """held-out prompts"""
    eval_every: int = 20
    """steps between evaluations"""
    samples: int = 3
    """rows of the table of samples on screen"""
    checkpoint_every: int = 20
    """steps between checkpoints"""
    runs_dir: str = "runs"
    """where run folders go"""
    run_name: str = ""
    """name of the run's folder; default llm__aihf_dpo_llm__<seed>__<time>"""
    resume: str = ""
    """a run folder to carry on from its last checkpoint, with its own arguments"""
    evaluate: str = ""
    """a run folder whose policy to evaluate instead of training"""
    cuda: bool = True
    """use a GPU when there is one, in bfloat16 with float32 weights and log-probabilities"""
    threads: int = 2
    """CPU threads of torch, of each process"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "aihf"
    """its project"""
    wandb_entity: str | None = None
    """its team"""


PRESETS = {  # Section 6 and Table 2; what they leave open is chosen as in the DPO paper
    "imdb": {
        "model_name_or_path": "gpt2",
        "ground_truth_path": "lvwerra/distilbert-imdb",
        "num_demonstrations": 0,
        "num_preferences": 0,
        "learning_rate": 1e-6,
        "batch_size": 64,
        "dpo_steps": 1000,
    },
    "hh": {
        "model_name_or_path": "EleutherAI/pythia-160m",
        "ground_truth_path": "",  # beaver-7b-v3.0-reward is no architecture of transformers' own
        **{name: f"runs/hh_data/{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")},
        "num_demonstrations": 0,
        "num_preferences": 0,
        "max_prompt_length": 512,
        "response_length": 128,
        "append_eos": True,
        "learning_rate": 1e-6,
        "batch_size": 64,
        "micro_batch_size": 4,
        "dpo_steps": 1000,
        "eval_every": 100,
        "checkpoint_every": 100,
    },
}


# --------------------------------------------------------------------------------- several processes (torchrun), or one
# Process r of n holds rows r, r + n, r + 2n ... of every batch; the number of processes changes nothing.
def processes() -> tuple[int, int]:
    """(rank, how many)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mine(rows):
    """This process's share of rows, a list, array or tensor."""
    rank, count = processes()
    return rows[rank::count]


def all_rows(x: Tensor) -> Tensor:
    """The inverse of mine, for a tensor (rows, ...) with as many rows in every process."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(processes()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def all_texts(texts: list[str]) -> list[str]:
    """The same for texts."""
    parts = [texts] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, texts)
    return [text for rows in zip(*parts) for text in rows]


def distributed(module: torch.nn.Module) -> torch.nn.Module:
    """The module, to be called where gradients are wanted: DistributedDataParallel averages these over processes."""
    return torch.nn.parallel.DistributedDataParallel(module) if processes()[1] > 1 else module


# ---------------------------------------------------------------------------------------------- data and tokens
def fail(message: str):
    """One line to stderr, exit code 2: the caller's input was wrong and nothing has been written."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def is_local(name: str) -> bool:
    """A path rather than a hub id, which is `name` or `owner/name`."""
    return Path(name).exists() or name[:1] in (".", "~", "/") or name.count("/") > 1 or ".jsonl" in name


def check_path(name: str, flag: str) -> None:
    if is_local(name) and not Path(name).exists():
        made_by = {"model": "pretrain", "classifier": "classifier"}.get(Path(name).name, "tiers")
        hint = f"; make it with `python data_gen/imdb_data.py {made_by}`" if name.startswith(ASSETS) else ""
        fail(f"there is no {name}{hint or f'; give another --{flag}'}")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def read_texts(name: str, flag: str, columns: tuple[str, ...], count: int = 0) -> list[tuple[str, ...]]:
    """The columns of a .jsonl(.gz) file, or of a hub data set's split train: of its first `count` rows, or of all."""
    check_path(name, flag)
    try:
        if is_local(name):
            with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        else:
            from datasets import load_dataset

            rows = list(load_dataset(name, split="train"))
    except ImportError:
        fail(f"there is no file {name}; to read it from the hub, pip install -e '.[hub]'")
    except Exception as error:  # no JSON, no UTF-8, half a .gz; or of the network, the hub, the cache ...
        fail(f"cannot read --{flag} {name} ({one_line(error)})")
    if len(rows) < count:
        fail(f"--{flag} {name} has {len(rows)} rows, --num-{flag} asks for {count}; 0 takes all")
    rows = rows[: count or None]
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) and row[key] for key in columns)):
            fail(f"row {number} of {name} needs text under {', '.join(columns)}")
    return [tuple(row[key] for key in columns) for row in rows] or fail(f"--{flag} {name} is empty")


def hold_out(count: int, share: float, what: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """0 … count - 1 in random order, parted into those to learn from and those held out, at least one of each."""
    if count < 2:
        fail(f"only {count} {what}: at least 2 are needed, because one is held out")
    index, held_out = rng.permutation(count), min(max(1, round(share * count)), count - 1)
    return index[held_out:], index[:held_out]


def pad_rows(rows: list[list[int]], pad_id: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, int64 (rows, longest) each. The mask goes by length: a text may hold the pad token."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.int64), 1
    return ids, mask


def in_parts(rows, size: int) -> list:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def draw(count: int, size: int, step: int, seed: tuple[int, ...]) -> np.ndarray:
    """Batch number `step` of `size` rows of a stream of shuffled epochs: a resumed run needs no more to go on."""
    first, last = step * size, (step + 1) * size
    epochs = range(first // count, -(-last // count))
    stream = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(count) for epoch in epochs])
    return stream[first % count :][:size]


def bucketed(lengths: np.ndarray, size: int, step: int, seed: int, stream: int, buckets: int = 16) -> np.ndarray:
    """Batch number `step` of `size` rows, of about the same length: the rows of 16 batches of draw, sorted by lengths
    (rows,), are dealt out anew and come in random order, the same one for every stream."""
    group, place = divmod(step, buckets)
    rows = draw(len(lengths), buckets * size, group, (seed, stream))
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    place = np.random.default_rng([seed, 0, group]).permutation(buckets)[place]
    return rows[place * size :][:size]


# ----------------------------------------------------------------------------------------------------------- models
# Dropout is off because the models stay in evaluation mode, as from_pretrained returns them.
def load_pretrained(kind: str, name: str, flag: str, **kwargs):
    """A tokenizer, configuration or float32 model of a transformers Auto class; no remote code is ever run, and of
    pickled weights only tensors are read. Fails with one line."""
    import transformers

    check_path(name, flag)
    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # of the network, the hub, the files, an unknown architecture ...
        fail(f"cannot load --{flag} {name} ({one_line(error)})")


def half_on_cuda(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def positions(mask: Tensor) -> Tensor:
    """Positions that begin at 0 with each row's first token, wherever the padding is: (rows, tokens)."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Policy(torch.nn.Module):
    """π: a causal language model, of which nothing is wanted but log-probabilities of responses and their sampling."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        parameters = inspect.signature(lm.forward).parameters
        self.can_keep = "logits_to_keep" in parameters  # older versions of transformers cannot
        self.cache = "cache" if "cache" in parameters else "past_key_values"  # as they call it

    def logits(self, length: int, **inputs):
        """Logits of the last `length` positions, float32 (rows, length, vocabulary), and the cache."""
        with half_on_cuda(inputs["input_ids"].device):
            out = self.lm(**inputs, **({"logits_to_keep": length} if self.can_keep else {}))
        return out.logits[:, -length:].float(), getattr(out, self.cache)

    def forward(self, ids: Tensor, mask: Tensor, length: int, temperature: float = 1.0) -> Tensor:
        """log π(y_t | x, y_<t) of the last `length` tokens of ids, float32 (rows, length); ids and mask (rows, tokens)
        hold prompts padded on the left and responses padded on the right. Padding gets a number, to be masked."""
        logits, _ = self.logits(
            length + 1, input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        )
        return token_log_probs(logits[:, :-1], ids[:, -length:], temperature)

    @torch.no_grad()
    def sample(self, ids: Tensor, mask: Tensor, uniform: Tensor, temperature: float, eos_id: int, pad_id: int):
        """Responses to prompts ids, mask (rows, P) padded on the left: (rows, N'), padded after the end token.

        uniform (rows, N) in [0, 1) holds the randomness: token t is where the cumulative probability passes it, so no
        row depends on its batch. Ends when every row has, at N tokens at the latest.
        """
        tokens, where, cache = [], positions(mask), None
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for u in uniform.unbind(1):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": where, self.cache: cache}
            logits, cache = self.logits(1, **inputs, use_cache=True)
            cumulative = (logits[:, -1] / temperature).softmax(-1).double().cumsum(-1)
            chosen = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
            ids = torch.where(ended[:, None], pad_id, chosen.clamp(max=logits.shape[-1] - 1))
            tokens.append(ids)
            ended |= ids[:, 0] == eos_id
            if ended.all():
                break
            mask, where = torch.cat([mask, torch.ones_like(ids)], 1), where[:, -1:] + 1
        return torch.cat(tokens, 1)


class Scorer(torch.nn.Module):
    """r and V: a sequence classifier as a number at every token. Reward model: its number at the last token of a text.
    Value network: the same, at every state. Right-padded or left-padded, by mask."""

    def __init__(self, model, tokenizer, pad_id: int):
        super().__init__()
        self.model, self.tokenizer, self.pad_id = model, tokenizer, pad_id
        self.is_decoder = hasattr(model, "score")  # GPT-2, GPT-NeoX, Llama ...: a linear head on every token
        limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
        self.limit = min([limit for limit in limits if limit] + [10**6])
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores (rows, tokens), float32, of ids and mask (rows, tokens)."""
        with half_on_cuda(ids.device):
            if self.is_decoder:
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
                logits = self.model.score(self.model.base_model(**inputs, use_cache=False)[0]).float()
            else:  # BERT and its like read the whole text at once
                logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
                logits = logits[:, None].expand(-1, ids.shape[1], -1)
        return logits[..., -1] - (logits[..., 0] if logits.shape[-1] == 2 else 0) - self.offset

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the right; of a text that is too long the end is read."""
        rows = self.tokenizer(texts, truncation=True, max_length=self.limit)["input_ids"]
        return tuple(x.to(self.offset.device) for x in pad_rows(rows, self.pad_id))

    @torch.no_grad()
    def score(self, texts: list[str], rows_at_once: int) -> Tensor:
        """(texts,)"""
        inputs = map(self.encode, in_parts(texts, rows_at_once))
        return torch.cat([at_last(self(ids, mask), mask) for ids, mask in inputs])


def load_tokenizer(name: str, flag: str):
    """(tokenizer, id of the end token, id of the padding), the latter two distinct."""
    tokenizer = load_pretrained("AutoTokenizer", name, flag)
    tokenizer.truncation_side = "left"
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if pad_id is None or pad_id == eos_id:  # which token it is does not matter, masks go by length
        pad_id = int(eos_id == 0)
    return tokenizer, eos_id, pad_id


def load_scorer(name: str, flag: str, must_be_trained: bool, device: torch.device) -> tuple[Scorer, bool]:
    """A scorer, and whether its head was there: otherwise it is one output, new."""
    config = load_pretrained("AutoConfig", name, flag)
    trained = any("SequenceClassification" in kind for kind in config.architectures or ())
    one_output = {} if trained else {"num_labels": 1}
    model, info = load_pretrained(
        "AutoModelForSequenceClassification", name, flag, output_loading_info=True, **one_output
    )
    if model.config.num_labels > 2 or (must_be_trained or trained) and info["missing_keys"]:
        fail(f"--{flag} {name} has no trained head of one or two outputs: it is no reward model")
    tokenizer, _, pad_id = load_tokenizer(name, flag)
    return Scorer(model.float(), tokenizer, pad_id).to(device).eval(), trained


# ------------------------------------------------------------------------------------- what is learned, in equations
def aihf_dpo_losses(
    demos: Tensor, demo_lengths: Tensor, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    demo_weight: float, preference_weight: float, beta: float, normalisation: str, smoothing: float,
) -> Tensor:  # fmt: skip
    """Minus (13), (rows,), to be averaged. All inputs are (rows,): log π(y|x), sums over tokens, of demonstrations,
    which have demo_lengths tokens, and of the chosen and rejected responses of pairs, and log π⁰(y|x) of these.

    A term of weight 0 is left out, whatever its inputs. smoothing ε > 0 makes log σ(z) (1 - ε) log σ(z) + ε log σ(-z).
    """
    losses = torch.zeros_like(demos)
    if demo_weight:
        losses = losses - demo_weight * (demos / demo_lengths if normalisation == "token" else demos)
    if preference_weight:
        margins = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
        log_sigmoid = (1 - smoothing) * F.logsigmoid(margins) + smoothing * F.logsigmoid(-margins)
        losses = losses - preference_weight * log_sigmoid
    return losses


def self_play_losses(demos: Tensor, own: Tensor, demos_k: Tensor, own_k: Tensor, beta: float) -> Tensor:
    """-log σ(β log π/π_k(demonstration) - β log π/π_k(own)), (rows,); inputs are log π and log π_k of demonstrations
    and of π_k's own responses to the same prompts, (rows,) each (SPIN, Chen et al. 2024, (4.7))."""
    return -F.logsigmoid(beta * (demos - demos_k) - beta * (own - own_k))


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at tokens: (rows, N) of logits (rows, N, vocabulary) and tokens (rows, N)."""
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def at_last(x: Tensor, mask: Tensor) -> Tensor:
    """x (rows, tokens) at each row's last token, for texts padded on the right: (rows,)."""
    return x.gather(1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)


def response_mask(responses: Tensor, eos_id: int) -> Tensor:
    """1 up to and with the first end token, 0 after it: int64 (rows, N)."""
    ends = (responses == eos_id).long()
    return (ends.cumsum(-1) - ends == 0).long()


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, of x and y (rows,), ties in the order they come."""
    return torch.corrcoef(torch.stack([x, y]).argsort().argsort().double())[0, 1].item()


# ----------------------------------------------------------------------------------------------- arguments, run folder
def parse_args() -> Args:
    """The command line's arguments with those of the preset; with --resume or --evaluate, those of that run."""
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    if args.resume and args.evaluate:
        fail("--resume trains a run on and --evaluate does not train: give one of them")
    if args.resume or args.evaluate:
        path = Path(args.resume or args.evaluate) / "args.json"
        try:
            saved = json.loads(path.read_text())
            if saved.pop("script") != SCRIPT:
                raise KeyError("script")
            saved = Args(**saved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path} is not the args.json of a run of {SCRIPT}.py; give the run's folder, such as runs/<run_name>")
        args = tyro.cli(Args, default=saved)  # flags given now win over the run's own ...
        for field in fields(Args):  # ... where that does not make it another run
            if field.name not in MAY_CHANGE and getattr(args, field.name) != getattr(saved, field.name):
                fail(f"a run goes on with its own arguments: leave out --{field.name.replace('_', '-')}")
        return args
    if args.preset:
        args = tyro.cli(Args, default=Args(**PRESETS[args.preset]))
    args.run_name = args.run_name or f"llm__{SCRIPT}__{args.seed}__{int(time.time())}"
    return args


def check_numbers(args, may_be_zero) -> None:
    for field in fields(args):
        value, flag = getattr(args, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not 0 <= value < math.inf:
                fail(f"{flag} must be a finite number and not negative: {value}")
            if value == 0 and field.name not in may_be_zero:
                fail(f"{flag} must be more than 0")


def check_args(args: Args) -> None:
    check_numbers(args, MAY_BE_ZERO)
    if args.demo_weight == args.preference_weight == 0:
        fail("--demo-weight and --preference-weight are both 0: there is nothing to learn from")
    if args.held_out_share >= 1 or args.label_smoothing > 0.5:
        fail("--held-out-share must be below 1 and --label-smoothing at most 0.5")
    if args.self_play_weight and not args.demo_weight:
        fail("--self-play-weight needs demonstrations: give a --demo-weight above 0")
    count = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("batch_size", "eval_prompts"):
        if getattr(args, name) % count:
            fail(f"--{name.replace('_', '-')} must be a multiple of the {count} processes")


def write_atomically(path: Path, write) -> None:
    """write(path) to a temporary neighbour, flushed to disk and renamed: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def make_run_dir(run_dir: Path, args, metrics: list[str]) -> None:
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **asdict(args)}, indent=2) + "\n")
        (run_dir / "metrics.csv").write_text(",".join(metrics) + "\n")
    except FileExistsError:
        fail(f"{run_dir} exists; carry it on with --resume {run_dir}, or give another --run-name")
    except OSError as error:
        fail(f"cannot write the run folder {run_dir} ({error.strerror}); give another --runs-dir")


def load_checkpoint(run_dir: Path) -> dict:
    path = run_dir / "checkpoint.pt"
    if not path.is_file():
        fail(f"no checkpoint at {path}; the run has to be started anew")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not {"step", "csv_bytes"} <= set(state["progress"]) or not {"parts", "data_hash"} <= set(state):
            raise KeyError
    except Exception as error:  # torch.load raises almost anything on a damaged file
        fail(f"{path} is damaged or no checkpoint of {SCRIPT}.py ({type(error).__name__}); start the run anew")
    return state


def stop_if_not_finite(step: int, run_dir: Path, **tensors: Tensor) -> None:
    """Exit code 1 with one line that names the first tensor holding NaN or infinity; the last checkpoint stays."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            message = f"\nerror: {name} is not finite at step {step}; the last good state is in {run_dir}"
            print(message, file=sys.stderr)
            raise SystemExit(1)


SCRIPT = "aihf_dpo_llm"
MAY_CHANGE = (  # from a run to its continuation
    "resume evaluate dpo_steps eval_every samples checkpoint_every micro_batch_size cuda threads cache_dir "
    "track wandb_project_name wandb_entity"
).split()
MAY_BE_ZERO = (
    "seed num_demonstrations num_preferences demo_weight preference_weight label_smoothing self_play_weight samples"
).split()
METRICS = (
    "charts/step charts/demonstrations charts/pairs charts/rows_per_second charts/wall_seconds "
    "losses/total losses/self_play logps/demonstrations logps/chosen logps/rejected "
    "rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
    "held_out/demonstrations held_out/margins held_out/accuracies "
    "eval/gt_score eval/gt_score_std eval/kl eval/kl_base eval/win_rate eval/reward_correlation eval/response_length"
).split()


if __name__ == "__main__":
    args = parse_args()
    check_args(args)
    import transformers  # here: it takes seconds, which --help and bad arguments need not

    transformers.logging.set_verbosity_error()  # a new head is no news
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        name = [args.run_name]
        dist.broadcast_object_list(name)  # it has the time in it
        args.run_name = name[0]
    rank, count = processes()
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs wandb: pip install wandb")

    # ------------------------------------------------------------------------------------------------ policies, data
    run_dir = Path(args.resume or args.evaluate or Path(args.runs_dir) / args.run_name)
    csv_path = run_dir / "metrics.csv"
    state = load_checkpoint(run_dir) if args.resume or args.evaluate else None
    progress = {"step": 0, "wall_seconds": 0.0, "csv_bytes": 0, **(state["progress"] if state else {})}

    def load_policy(name: str, flag: str) -> Policy:
        return Policy(load_pretrained("AutoModelForCausalLM", name, flag).float()).to(device).eval()

    flag = "sft-model-path" if args.sft_model_path else "model-name-or-path"
    initial_path = args.sft_model_path or args.model_name_or_path
    tokenizer, eos_id, pad_id = load_tokenizer(initial_path, flag)
    if eos_id is None:
        fail(f"--{flag} {initial_path} has no end-of-text token")
    policy = load_policy(initial_path, flag)
    limit = getattr(policy.lm.config, "max_position_embeddings", None) or math.inf
    if args.max_prompt_length + args.response_length > limit:
        fail(f"--max-prompt-length and --response-length together must be at most {limit}, which {initial_path} reads")
    reference = copy.deepcopy(policy).requires_grad_(False)  # π⁰

    def load_other(name: str, flag: str) -> Policy | None:
        """A policy to compare with; None where it has another vocabulary."""
        if name in ("", initial_path):
            return reference
        same = load_tokenizer(name, flag)[0].get_vocab() == tokenizer.get_vocab()
        return load_policy(name, flag).requires_grad_(False) if same else None

    base = load_other(args.model_name_or_path, "model-name-or-path")
    opponent = load_other(args.opponent_path, "opponent-path")
    if opponent is None:
        fail(f"--opponent-path {args.opponent_path} has another vocabulary than {initial_path}")
    judge = None
    if args.ground_truth_path:  # for evaluation, and for nothing else
        judge, _ = load_scorer(args.ground_truth_path, "ground-truth-path", True, device)

    demos, pairs = [], []
    if args.demo_weight:
        columns = ("prompt", "completion")
        demos = read_texts(args.demonstrations, "demonstrations", columns, args.num_demonstrations)
    if args.preference_weight:
        pairs = read_texts(args.preferences, "preferences", ("prompt", "chosen", "rejected"), args.num_preferences)
    prompts = [prompt for (prompt,) in read_texts(args.prompts, "prompts", ("prompt",))]
    if len(prompts) < args.eval_prompts:
        fail(f"--prompts {args.prompts} has {len(prompts)} rows: too few for --eval-prompts {args.eval_prompts}")
    eval_prompts = prompts[-args.eval_prompts :]
    data_hash = hashlib.sha256(repr((demos, pairs, eval_prompts)).encode()).hexdigest()
    if state and state["data_hash"] != data_hash:
        fail(f"{run_dir / 'checkpoint.pt'} was trained on other data than the data flags now give")
    if args.dpo_steps < progress["step"]:
        fail(f"--dpo-steps {args.dpo_steps}: the run is at {progress['step']} already")
    if state and not csv_path.is_file():
        fail(f"no {csv_path} to carry on")
    held_out_rng = np.random.default_rng([args.seed, 0])
    splits = [
        hold_out(len(rows), args.held_out_share, f"row in {name}", held_out_rng) if rows else ()
        for rows, name in ((demos, args.demonstrations), (pairs, args.preferences))
    ]

    def prompt_ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=args.max_prompt_length)["input_ids"] if texts else []

    def response_ids(texts: list[str]) -> list[list[int]]:
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return [(ids + [eos_id] * args.append_eos)[: args.response_length] for ids in rows]

    eval_ids = prompt_ids(eval_prompts)
    demo_prompts, demo_ids = (f([row[i] for row in demos]) for i, f in enumerate((prompt_ids, response_ids)))
    pair_prompts, chosen_ids, rejected_ids = (
        f([row[i] for row in pairs]) for i, f in enumerate((prompt_ids, response_ids, response_ids))
    )
    demo_lengths = np.array([len(ids) for ids in demo_ids])
    pair_lengths = np.array([max(map(len, sides)) for sides in zip(chosen_ids, rejected_ids)])

    try:
        Path(args.cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write --cache-dir {args.cache_dir} ({error.strerror})")

    # ----------------------------------------------------------------------------------- the run folder, log and state
    if args.resume and rank == 0:
        with open(csv_path, "rb+") as file:
            file.truncate(progress["csv_bytes"])  # rows written after the checkpoint will be written again
    elif not args.evaluate and rank == 0:
        make_run_dir(run_dir, args, METRICS)
    if args.track and rank == 0 and not args.evaluate:
        project, entity, name = args.wandb_project_name, args.wandb_entity, run_dir.name
        wandb.init(project=project, entity=entity, name=name, id=name, resume="allow", config=asdict(args))
    interrupted = False

    def interrupt(signum, frame):
        global interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
        tqdm.write("Ctrl-C: finishing this step, then saving; once more to stop at once")

    signal.signal(signal.SIGINT, interrupt)

    def is_interrupted() -> bool:
        """Whether any of the processes is."""
        return bool(all_rows(torch.tensor([float(interrupted)], device=device)).any())

    optimizer = torch.optim.Adam(policy.parameters())
    learned = {"policy": policy, "optimizer": optimizer}
    if args.self_play_weight:
        learned["policy_k"] = policy_k = copy.deepcopy(reference)
    for name, part in learned.items() if state else ():
        part.load_state_dict(state["parts"][name])
    policy_forward = distributed(policy)

    def save_checkpoint() -> None:
        if rank == 0:
            parts = {name: part.state_dict() for name, part in learned.items()}
            now = {**progress, "csv_bytes": csv_path.stat().st_size}
            state = {"progress": now, "data_hash": data_hash, "parts": parts}
            write_atomically(run_dir / "checkpoint.pt", lambda path: torch.save(state, path))

    def save_model(model, its_tokenizer, name: str) -> None:
        if rank == 0:
            temporary = run_dir / f".{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            model.save_pretrained(temporary)
            its_tokenizer.save_pretrained(temporary)
            shutil.rmtree(run_dir / name, ignore_errors=True)
            os.replace(temporary, run_dir / name)

    def log(row: dict) -> None:
        if rank == 0:
            row |= {"charts/step": progress["step"], "charts/wall_seconds": progress["wall_seconds"]}
            row["charts/demonstrations"] = progress["step"] * args.batch_size * bool(demos)
            row["charts/pairs"] = progress["step"] * args.batch_size * bool(pairs)
            with open(csv_path, "a") as file:
                file.write(",".join(f"{row[name]:.9g}" if name in row else "" for name in METRICS) + "\n")
            if args.track:
                wandb.log(row)

    # ------------------------------------------------------------------------------------- log-probabilities, sampling
    def log_probs_of(policy, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """log π(y|x), float32 (rows,): sums over the responses' tokens. Prompts are padded on the left, responses on
        the right; neither prompts nor padding count."""
        (left, left_mask), (right, right_mask) = pad_rows(prompts, pad_id, left=True), pad_rows(responses, pad_id)
        ids, mask = (torch.cat(pair, 1).to(device) for pair in ((left, right), (left_mask, right_mask)))
        return (policy(ids, mask, right.shape[1]) * right_mask.to(device)).sum(-1)

    @torch.no_grad()
    def log_probs_in_parts(policy, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        parts = zip(in_parts(prompts, args.micro_batch_size), in_parts(responses, args.micro_batch_size))
        return torch.cat([torch.zeros(0, device=device), *(log_probs_of(policy, *part) for part in parts)])

    def respond(policy: Policy, prompts: list[list[int]], uniform: np.ndarray) -> list[list[int]]:
        """Sampled responses to prompts, token ids up to the end token; uniform (rows, N) holds the randomness."""
        ids, mask = (x.to(device) for x in pad_rows(prompts, pad_id, left=True))
        responses = policy.sample(ids, mask, torch.from_numpy(uniform).to(device), 1.0, eos_id, pad_id)
        lengths = response_mask(responses, eos_id).sum(-1)
        return [row[:n] for row, n in zip(responses.tolist(), lengths.tolist())]

    def reference_log_probs() -> tuple[Tensor, Tensor]:
        """log π⁰ of all chosen and all rejected responses, (pairs,) each: from the cache, where it is put otherwise."""
        key = hashlib.sha256(repr((pair_prompts, chosen_ids, rejected_ids)).encode())
        for tensor in reference.state_dict().values():
            key.update(tensor.cpu().numpy().tobytes())
        path = Path(args.cache_dir) / f"{key.hexdigest()}.safetensors"
        if rank == 0 and not path.is_file():
            sides = {
                name: log_probs_in_parts(reference, pair_prompts, ids)
                for name, ids in (("chosen", chosen_ids), ("rejected", rejected_ids))
            }
            write_atomically(path, lambda path: save_file(sides, path))
        if count > 1:
            dist.barrier()
        try:
            sides = load_file(path, device=str(device))
        except Exception as error:  # of a damaged file
            fail(f"cannot read {path} ({one_line(error)}); delete it, it will be made anew")
        return sides["chosen"], sides["rejected"]

    # ------------------------------------------------------------------------------------------------------- evaluate
    eval_uniform = np.random.default_rng(10_000).random((args.eval_prompts, args.response_length))

    def evaluate_policy(policy: Policy) -> tuple[dict[str, Tensor], list[str]]:
        """For each held-out prompt: ground-truth score, log-ratio to the reference (in the mean, KL), the same to the
        base model, tokens, (prompts,) each; the responses. The only reader of the ground truth."""
        own = respond(policy, mine(eval_ids), mine(eval_uniform))
        texts = [tokenizer.decode(y, skip_special_tokens=True, clean_up_tokenization_spaces=False) for y in own]
        log_probs = log_probs_in_parts(policy, mine(eval_ids), own)
        scores = {"kl": log_probs - log_probs_in_parts(reference, mine(eval_ids), own)}
        if base:
            scores["kl_base"] = log_probs - log_probs_in_parts(base, mine(eval_ids), own)
        scores["response_length"] = torch.tensor([float(len(y)) for y in own], device=device)
        if judge:
            whole = [prompt + text for prompt, text in zip(mine(eval_prompts), texts)]
            scores["gt_score"] = judge.score(whole, args.micro_batch_size)
        return {name: all_rows(x) for name, x in scores.items()}, all_texts(texts)

    rival_scores, rival_texts = evaluate_policy(opponent)
    rival = "its opponent" if args.opponent_path else "the start"

    def held_out() -> dict[str, float]:
        """What the policy makes of the held-out demonstrations and pairs."""
        row = {}
        if demos:
            inputs = ([ids[i] for i in splits[0][1]] for ids in (demo_prompts, demo_ids))
            total = log_probs_in_parts(policy, *inputs).sum().item()
            row["held_out/demonstrations"] = total / demo_lengths[splits[0][1]].sum()
        if pairs:
            rows = splits[1][1]
            chosen, rejected = (
                log_probs_in_parts(policy, [pair_prompts[i] for i in rows], [ids[i] for i in rows]) - ref[rows]
                for ids, ref in zip((chosen_ids, rejected_ids), ref_log_probs)
            )
            row["held_out/margins"] = args.beta * (chosen - rejected).mean().item()
            row["held_out/accuracies"] = (chosen > rejected).float().mean().item()
        return row

    def evaluation(scores: dict[str, Tensor], texts: list[str]) -> dict[str, float]:
        row = {f"eval/{name}": x.mean().item() for name, x in scores.items()}
        if judge:
            truth, rival_truth = scores["gt_score"], rival_scores["gt_score"]
            row["eval/gt_score_std"] = truth.std().item()
            row["eval/win_rate"] = ((truth > rival_truth).float() + 0.5 * (truth == rival_truth)).mean().item()
            row["eval/reward_correlation"] = rank_correlation(scores["kl"], truth)  # of r = β log π/π⁰
        if rank == 0:
            lines = [f"after {progress['step']} steps: " + summary(row)]
            for i in range(min(args.samples, len(texts))):
                both = ((rival_scores, rival_texts, "then"), (scores, texts, "now "))
                lines.append(f"  prompt       | {' '.join(eval_prompts[i].split())[-100:]}")
                for numbers, words, who in both:
                    score = f"{numbers['gt_score' if judge else 'kl'][i].item():6.2f}"
                    lines.append(f"  {who}  {score} | {' '.join(words[i].split())[:100]}")
            tqdm.write("\n".join(lines))
            write_atomically(run_dir / "samples.jsonl", lambda path: path.write_text(jsonl(scores, texts)))
        return row

    def jsonl(scores: dict[str, Tensor], texts: list[str]) -> str:
        columns = {"prompt": eval_prompts, "response": texts, **{name: x.tolist() for name, x in scores.items()}}
        return "".join(json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values()))

    def summary(row: dict) -> str:
        if not judge:
            return f"KL {row['eval/kl']:.2f}"
        truth = f"ground truth {row['eval/gt_score']:.2f} ({rival} {rival_scores['gt_score'].mean():.2f})"
        return f"{truth}, KL {row['eval/kl']:.2f}, win rate over {rival} {row['eval/win_rate']:.0%}"

    if args.evaluate:
        print(summary(evaluation(*evaluate_policy(policy))))
        raise SystemExit
    ref_log_probs = reference_log_probs() if pairs else ()
    if not state:
        log(evaluation(*evaluate_policy(reference)) | held_out())
        save_checkpoint()
    last = None
    bar = tqdm(
        total=args.dpo_steps, initial=progress["step"], desc="AIHF-DPO", unit="step", mininterval=1.0, disable=rank > 0
    )
    for step in range(progress["step"], args.dpo_steps):
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.dpo_steps if args.anneal else 1)

        # ========================================================================== SAMPLE: (x, y) ~ D, (y_l ≺ y_w) ~ P
        demo_rows, pair_rows = (
            mine(rows[0][bucketed(lengths[rows[0]], args.batch_size, step, args.seed, stream)]) if rows else []
            for stream, (rows, lengths) in enumerate(zip(splits, (demo_lengths, pair_lengths)), 1)
        )
        own = []
        if args.self_play_weight:
            if step % args.self_play_every == 0:
                policy_k.load_state_dict(policy.state_dict())
            uniform = np.random.default_rng([args.seed, 3, step]).random((args.batch_size, args.response_length))
            own = respond(policy_k, [demo_prompts[i] for i in demo_rows], mine(uniform))

        # ===================================================================================== UPDATE: one step on (13)
        totals = torch.zeros(8, device=device)
        for part in in_parts(range(args.batch_size // count), args.micro_batch_size):
            d, p, o = (rows[part.start : part.stop] for rows in (demo_rows, pair_rows, own))
            x = [demo_prompts[i] for i in (*d, *d[: len(o)])] + [pair_prompts[i] for i in (*p, *p)]
            y = [demo_ids[i] for i in d] + o + [ids[i] for ids in (chosen_ids, rejected_ids) for i in p]
            log_probs = log_probs_of(policy_forward, x, y)  # one forward pass for all
            log_demos, log_own, log_chosen, log_rejected = log_probs.split([len(d), len(o), len(p), len(p)])
            nothing = torch.zeros(len(part), device=device)  # in the place of what has weight 0
            lengths = torch.tensor(demo_lengths[d], device=device) if demos else nothing
            log_demos = log_demos if demos else nothing
            log_chosen, log_rejected = (log_chosen, log_rejected) if pairs else (nothing, nothing)
            ref_chosen, ref_rejected = (ref[p] for ref in ref_log_probs) if pairs else (nothing, nothing)
            weights = args.demo_weight, args.preference_weight, args.beta, args.sft_normalisation, args.label_smoothing
            losses = aihf_dpo_losses(log_demos, lengths, log_chosen, log_rejected, ref_chosen, ref_rejected, *weights)
            self_play = nothing
            if o:
                with torch.no_grad():
                    log_demos_k, log_own_k = log_probs_of(policy_k, x[: 2 * len(d)], y[: 2 * len(d)]).chunk(2)
                self_play = self_play_losses(log_demos, log_own, log_demos_k, log_own_k, args.beta)
            total = losses + args.self_play_weight * self_play
            (total.sum() * count / args.batch_size).backward()  # because gradients are averaged over processes
            r_chosen, r_rejected = args.beta * (log_chosen - ref_chosen), args.beta * (log_rejected - ref_rejected)
            columns = total, self_play, log_demos, log_chosen, log_rejected, r_chosen, r_rejected, r_chosen > r_rejected
            totals += torch.stack([x.detach().float().sum() for x in columns])
        totals = all_rows(totals[None]).sum(0) / args.batch_size
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        stop_if_not_finite(step, run_dir, loss=totals, gradient=norm)
        optimizer.step()
        optimizer.zero_grad()

        # ======================================================================================================== LOG
        progress["step"] = step + 1
        row = {"losses/total": totals[0].item()}
        if args.self_play_weight:
            row["losses/self_play"] = totals[1].item()
        if demos:
            row["logps/demonstrations"] = totals[2].item()
        if pairs:
            names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
            row |= dict(zip(names, totals[3:].tolist()))
            row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
        row["charts/rows_per_second"] = args.batch_size / (time.perf_counter() - started)

        # =================================================================================================== EVALUATE
        leave, finished = is_interrupted(), step + 1 >= args.dpo_steps
        if (step + 1) % args.eval_every == 0 or finished:
            row |= (last := evaluation(*evaluate_policy(policy))) | held_out()
        progress["wall_seconds"] += time.perf_counter() - started
        log(row)
        bar.update()
        bar.set_postfix_str(f"loss {row['losses/total']:.3f}")

        # ================================================================================================= CHECKPOINT
        if finished:
            save_model(policy.lm, tokenizer, "policy")
        if (step + 1) % args.checkpoint_every == 0 or finished or leave:
            save_checkpoint()
        if leave and not finished:
            bar.close()
            if rank == 0:
                print(f"stopped after step {step + 1}; carry on with: python {SCRIPT}.py --resume {run_dir}")
            raise SystemExit(130)
    bar.close()
    last = last or evaluation(*evaluate_policy(policy))
    if rank == 0:
        print(f"final: {summary(last)}; policy in {run_dir / 'policy'}")
    if dist.is_initialized():
        dist.destroy_process_group()
