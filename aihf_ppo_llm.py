"""AIHF with PPO: one reward from demonstrations and preferences, one language model aligned to it, in a single loop.

"Joint Demonstration and Preference Learning Improves Policy Alignment with Human Feedback", Li et al.,
arXiv 2406.06874: Algorithm 1 on language models (Sections 6.1 and 6.2, A.2.2). Equation numbers are the paper's.

    python aihf_ppo_llm.py

learns from 1,000 demonstrations {prompt, completion} and 1,000 preferences {prompt, chosen, rejected} to write movie
reviews, from a small language model that is in the repository; prints the held-out ground-truth score, used for
nothing else, as it goes; and leaves policy and reward in runs/<run_name>. The score went from -0.2 to 3.4 in 60 PPO
steps, which took 4 minutes on one CPU core. --preset imdb and --preset hh are the paper's settings for models from the
hub; `torchrun --nproc-per-node 2 aihf_ppo_llm.py` shares every batch between processes.

The main loop is at the end: SAMPLE lets the policy answer the demonstrations' prompts, UPPER LEVEL moves the reward
along α g1 + g2 (reward_losses), LOWER LEVEL aligns the policy to it by PPO, or by the simpler ReMax.

Where the paper leaves a choice, or this file departs from it, and why (benchmark/tuning has what else was tried):
- A response is one action (T = 1): R is a language model with a scalar head, read at the last token of the response.
- The loop begins with the upper level: a policy has nothing to learn from a reward that has not learned anything.
- g1 (Lemma 5.1) is linear in R and grows without bound. Here it comes with λ (R(τ)² + R(τ')²), --reward-penalty, under
  which the R that g1 alone makes is (p_E - p_π) / 2λ(p_E + p_π), within ±1/2λ: Lemma 5.1's direction, bounded.
- g1's responses are fresh, but those of the nine policies before stay in the average, as in aihf_sac_mujoco.py: a
  reward fitted to the newest policy alone forgets what was wrong with the last but one, and the two take turns.
- α is 0.01 (the paper does not say): g1 points the same way in every batch, g2 hardly does, and Adam takes what is left
  of both to the same length. With 1 the policy only imitates.
- A reward is free up to a constant, and drifts. After each upper level it is shifted so that the policy's responses are
  worth 0 on average, which is where the critic finds it again; the critic begins as a copy of the first reward.
- The KL penalty of (10) is to the policy that the run starts from: the base model, or SFT (--sft-model-path). PPO's
  epochs, clips and β are not in the paper; they are those of rlhf_baseline.py.
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
    reward_model_path: str = ""
    """base of the reward model, default: the base policy. The head of a trained sequence classifier is kept"""
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
    """rows {prompt}; the last --eval-prompts are for evaluation"""
    seed: int = 1
    """seeds everything: heads, held-out data, batches, sampling; evaluation has a fixed seed of its own"""
    max_prompt_length: int = 64
    """tokens; of a longer prompt the policy reads the last ones"""
    response_length: int = 24
    """tokens of a response at most; longer demonstrations are cut"""
    temperature: float = 1.0
    """of sampling; logits are divided by it in every log-probability"""
    micro_batch_size: int = 64
    """rows in one forward and backward pass of a process; the result does not depend on it"""
    anneal: bool = True
    """let the learning rates fall linearly to 0 over the run"""
    max_grad_norm: float = 1.0
    """gradients are cut to this norm"""

    # Upper level: the reward
    demo_weight: float = 0.01
    """the paper's alpha (which gives no value), on the demonstrations in (8a); 0 is RLHF's reward learning. g1 points
    the same way in every batch, and g2 hardly does: with 1 the policy only imitates"""
    preference_weight: float = 1.0
    """weight of the preferences; 0 is maximum-likelihood inverse reinforcement learning"""
    demo_loss: Literal["linear", "logistic"] = "linear"
    """of R(demonstration) - R(policy's response): Lemma 5.1's, or log sigmoid of it (the authors' code)"""
    response_memory: int = 10
    """g1 contrasts the demonstrations with the responses of this many latest policies (Lemma 5.1: 1), lest the reward
    forget what is wrong with the last policy but one and the two take turns"""
    reward_penalty: float = 1.0
    """lambda, weight of the squares of both rewards in the demonstration term"""
    reward_updates_per_iteration: int = 3
    """Adam steps on the reward before each policy alignment (paper: 12, for 20 PPO steps)"""
    reward_batch_size: int = 32
    """demonstrations, as many responses of the policy and as many pairs in a step, those of all processes together, as
    in all batch sizes"""
    reward_learning_rate: float = 1e-3
    """Adam's"""
    held_out_share: float = 0.1
    """share of the preferences that is kept for the rewards/ metrics"""

    # Lower level: the policy
    policy_optimizer: Literal["ppo", "remax"] = "ppo"
    """remax: one step a batch along the policy gradient with the greedy response's score as its baseline, no critic"""
    policy_steps_per_iteration: int = 5
    """PPO steps in each policy alignment (paper: 20, of a much smaller learning rate)"""
    ppo_steps: int = 60
    """batches of responses in all"""
    batch_size: int = 64
    """responses in each"""
    minibatch_size: int = 32
    """responses in an optimiser step"""
    ppo_epochs: int = 2
    """passes over each batch"""
    learning_rate: float = 3e-4
    """Adam's, for the policy"""
    value_learning_rate: float = 3e-4
    """Adam's, for the value network"""
    gamma: float = 1.0
    """discount"""
    gae_lambda: float = 0.95
    """of generalised advantage estimation"""
    clip: float = 0.2
    """probability ratios count up to 1 ± this"""
    value_clip: float = 0.2
    """values move at most this far from the old ones"""
    kl_coefficient: float = 0.02
    """β of (10), where the controller begins if it is adaptive"""
    adaptive_kl: bool = False
    """steer β so that the KL divergence goes to --target-kl (Ziegler et al. 2019)"""
    target_kl: float = 6.0
    """nats a response"""
    kl_horizon: float = 10_000.0
    """episodes in which an adaptive β changes by a factor of about e at most 20 % error a step"""
    missing_eos_penalty: float = 0.0
    """taken from the score of a response without the end token"""

    # Running
    eval_prompts: int = 256
    """held-out prompts"""
    eval_every: int = 5
    """PPO steps between evaluations"""
    samples: int = 3
    """rows of the table of samples on screen"""
    checkpoint_every: int = 10
    """PPO steps between checkpoints"""
    runs_dir: str = "runs"
    """where run folders go"""
    run_name: str = ""
    """name of the run's folder; default llm__aihf_ppo_llm__<seed>__<time>"""
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


PRESETS = {  # Table 2 and Section 6; what it leaves open is chosen as in the libraries for these models
    "imdb": {
        "model_name_or_path": "gpt2",
        "ground_truth_path": "lvwerra/distilbert-imdb",
        "num_demonstrations": 0,
        "num_preferences": 0,
        "demo_weight": 1.0,
        "reward_learning_rate": 1e-5,
        "reward_batch_size": 128,
        "reward_updates_per_iteration": 12,
        "policy_steps_per_iteration": 20,
        "kl_coefficient": 0.05,
        "learning_rate": 1.41e-5,
        "value_learning_rate": 1.41e-5,
        "batch_size": 256,
        "minibatch_size": 64,
        "ppo_epochs": 4,
        "ppo_steps": 1000,
    },
    "hh": {
        "model_name_or_path": "EleutherAI/pythia-160m",
        "reward_model_path": "EleutherAI/pythia-1.4b",
        "ground_truth_path": "",  # beaver-7b-v3.0-reward is no architecture of transformers' own
        **{name: f"runs/hh_data/{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")},
        "num_demonstrations": 0,
        "num_preferences": 0,
        "max_prompt_length": 512,
        "response_length": 128,
        "missing_eos_penalty": 1.0,
        "demo_weight": 1.0,
        "reward_learning_rate": 1e-5,
        "reward_batch_size": 8,
        "reward_updates_per_iteration": 20,
        "policy_steps_per_iteration": 6000,
        "kl_coefficient": 0.05,
        "learning_rate": 1e-6,
        "value_learning_rate": 1e-6,
        "batch_size": 4,
        "minibatch_size": 4,
        "micro_batch_size": 4,
        "ppo_steps": 24000,
        "eval_every": 500,
        "checkpoint_every": 500,
    },
}


# --------------------------------------------------------------------------------- several processes (torchrun), or one
# Process r of n holds rows r, r + n, r + 2n ... of every batch. Whatever is normalised (losses by tokens, advantages by
# mean and deviation) is normalised over the rows of all, so the number of processes changes nothing.
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
def reward_losses(
    r_demos: Tensor, r_policy: Tensor, r_chosen: Tensor, r_rejected: Tensor,
    demo_weight: float, preference_weight: float, demo_loss: str, penalty: float,
) -> Tensor:  # fmt: skip
    """What Adam descends in the upper level: minus the objective whose gradient is α g1 + g2, (26), (rows,).

    r_demos and r_policy (rows,) are R of demonstrations τ ~ D and of the policy's own responses τ' to the same prompts;
    r_chosen and r_rejected (rows,) those of pairs τ_l ≺ τ_w. A term of weight 0 is left out, whatever its R.
    """
    losses = torch.zeros_like(r_demos)
    if demo_weight:
        gap = r_demos - r_policy  # (28), Lemma 5.1
        g1 = gap if demo_loss == "linear" else F.logsigmoid(gap)
        losses = losses - demo_weight * (g1 - penalty * (r_demos**2 + r_policy**2))
    if preference_weight:
        losses = losses - preference_weight * F.logsigmoid(r_chosen - r_rejected)  # (27), Bradley-Terry
    return losses


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


def token_rewards(log_ratio: Tensor, scores: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """(4) and (10) token by token: -β log(π/π_SFT) at each, plus the score at the last (the end token if there is one).

    log_ratio and mask (rows, N), scores (rows,); returns (rows, N), 0 after the end (Ziegler et al. 2019, (2)).
    """
    last = (positions(mask)[:, -1:] == torch.arange(mask.shape[1], device=mask.device)).float()
    return (-kl_coefficient * log_ratio + scores[:, None] * last) * mask


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float):
    """Advantages and returns, (rows, N) each (Schulman et al. 2016, (16)); rewards, values and mask are (rows, N).

    The value after the end is 0. values[:, t] is that of the state in which token t is chosen. Returns are those of the
    value network, A + V, before any whitening.
    """
    values = values * mask
    next_values = F.pad(values[:, 1:], (0, 1))
    delta = (rewards + gamma * next_values - values) * mask
    advantages, running = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (rows, N) where mask is 1, over the rows of all processes: ()."""
    total, count = all_rows(torch.stack([(x * mask).sum(), mask.sum()])[None]).sum(0)
    return total / count


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (rows, N) with mean 0 and variance 1 where mask is 1, over the rows of all processes; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_losses(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's loss of each token and the probability ratio, (rows, N) each (Schulman et al. 2017, (7))."""
    ratio = (log_probs - old_log_probs).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each token, (rows, N); to move a value further than clip gains nothing."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def remax_advantages(rewards: Tensor, mask: Tensor, greedy_scores: Tensor) -> Tensor:
    """Rewards to come minus the score of the greedy response to the same prompt, (rows, N); rewards and mask are
    (rows, N), greedy_scores (rows,) (ReMax, Li et al. 2023, Algorithm 1)."""
    return (rewards.flip(1).cumsum(1).flip(1) - greedy_scores[:, None]) * mask


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """Proportional control of log β (Ziegler et al. 2019, 2.2)."""
    return coefficient * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


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
        fail("--demo-weight and --preference-weight are both 0: there is nothing to learn a reward from")
    if args.gamma > 1 or args.gae_lambda > 1 or args.held_out_share >= 1:
        fail("--gamma and --gae-lambda must be at most 1 and --held-out-share below 1")
    if args.batch_size % args.minibatch_size:
        fail("--batch-size must be a multiple of --minibatch-size")
    count = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("reward_batch_size", "minibatch_size", "eval_prompts"):
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
        if not {"step", "csv_bytes"} <= set(state["progress"]) or not {"parts", "data_hash", "memory"} <= set(state):
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


SCRIPT = "aihf_ppo_llm"
MAY_CHANGE = (  # from a run to its continuation
    "resume evaluate ppo_steps eval_every samples checkpoint_every micro_batch_size cuda threads "
    "track wandb_project_name wandb_entity"
).split()
MAY_BE_ZERO = (
    "seed num_demonstrations num_preferences demo_weight preference_weight reward_penalty kl_coefficient "
    "missing_eos_penalty samples"
).split()
METRICS = (
    "charts/iteration charts/step charts/episodes charts/reward_updates charts/episodes_per_second charts/wall_seconds "
    "reward/gap "
    "rewards/loss rewards/held_out_loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
    "objective/kl objective/scores objective/entropy objective/rlhf_reward objective/kl_coefficient "
    "losses/policy losses/value losses/approx_kl losses/clip_fraction losses/ratio "
    "charts/response_length charts/ended_share "
    "eval/gt_score eval/gt_score_std eval/kl eval/kl_base eval/win_rate eval/learned_score eval/reward_correlation "
    "eval/response_length"
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

    # ----------------------------------------------------------- what is learned: policy π, critic V and reward R(·; θ)
    run_dir = Path(args.resume or args.evaluate or Path(args.runs_dir) / args.run_name)
    csv_path = run_dir / "metrics.csv"
    state = load_checkpoint(run_dir) if args.resume or args.evaluate else None
    progress = {"step": 0, "episodes": 0, "reward_updates": 0, "wall_seconds": 0.0, "csv_bytes": 0}
    progress |= {"kl_coefficient": args.kl_coefficient, **(state["progress"] if state else {})}

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
    torch.manual_seed(args.seed)  # of the reward model's head
    reward, _ = load_scorer(args.reward_model_path or args.model_name_or_path, "reward-model-path", False, device)
    if reward.is_decoder and reward.tokenizer.get_vocab() == tokenizer.get_vocab():
        value, value_is_reward = copy.deepcopy(reward), True
    else:  # it cannot read the policy's tokens
        value, value_is_reward = load_scorer(initial_path, flag, False, device)[0], False
        value.model.score.weight.data.zero_()
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

    # ------------------------------------------------------------------------------------------------------- the data
    demos, pairs, held_out = [], [], []
    if args.demo_weight:
        columns = ("prompt", "completion")
        demos = read_texts(args.demonstrations, "demonstrations", columns, args.num_demonstrations)
    if args.preference_weight:
        pairs = read_texts(args.preferences, "preferences", ("prompt", "chosen", "rejected"), args.num_preferences)
    prompts = [prompt for (prompt,) in read_texts(args.prompts, "prompts", ("prompt",))]
    if len(prompts) <= args.eval_prompts:
        fail(f"--prompts {args.prompts} has {len(prompts)} rows: too few for --eval-prompts {args.eval_prompts}")
    data_hash = hashlib.sha256(repr((demos, pairs, prompts)).encode()).hexdigest()
    if state and state["data_hash"] != data_hash:
        fail(f"{run_dir / 'checkpoint.pt'} was trained on other data than the data flags now give")
    if args.ppo_steps < progress["step"]:
        fail(f"--ppo-steps {args.ppo_steps}: the run is at {progress['step']} already")
    if state and not csv_path.is_file():
        fail(f"no {csv_path} to carry on")
    if pairs:
        where = f"row in {args.preferences}"
        rows = hold_out(len(pairs), args.held_out_share, where, np.random.default_rng([args.seed, 0]))
        pairs, held_out = ([pairs[i] for i in part] for part in rows)

    def prompt_ids(prompts: list[str]) -> list[list[int]]:
        return tokenizer(prompts, truncation=True, max_length=args.max_prompt_length)["input_ids"]

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    train_prompts, eval_prompts = prompts[: -args.eval_prompts], prompts[-args.eval_prompts :]
    train_ids, eval_ids = prompt_ids(train_prompts), prompt_ids(eval_prompts)
    if demos:  # cut to what the policy can write: length alone must not tell them apart
        most = args.response_length
        completions = tokenizer([y for _, y in demos], add_special_tokens=False)["input_ids"]
        demos = [(x, decode(ids[:most]) if len(ids) > most else y) for (x, y), ids in zip(demos, completions)]
    contrast_prompts = [x for x, _ in demos] or train_prompts  # those that the policy answers for the upper level
    contrast_ids = prompt_ids(contrast_prompts)

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

    modules = (policy, value, reward)
    optimizers = [torch.optim.Adam(module.parameters()) for module in modules]
    learning_rates = (args.learning_rate, args.value_learning_rate, args.reward_learning_rate)
    learned = dict(zip(("policy", "value", "reward"), modules))
    learned |= dict(zip(("policy_optimizer", "value_optimizer", "reward_optimizer"), optimizers))
    for name, part in learned.items() if state else ():
        part.load_state_dict(state["parts"][name])
    policy_forward, value_forward, reward_forward = map(distributed, modules)
    memory = state["memory"] if state else []  # what the latest policies answered the demonstrations' prompts

    def save_checkpoint() -> None:
        if rank == 0:
            parts = {name: part.state_dict() for name, part in learned.items()}
            now = {**progress, "csv_bytes": csv_path.stat().st_size}
            state = {"progress": now, "data_hash": data_hash, "parts": parts, "memory": memory}
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
            row |= {f"charts/{name}": progress[name] for name in ("step", "episodes", "reward_updates", "wall_seconds")}
            row["charts/iteration"] = -(-progress["step"] // args.policy_steps_per_iteration)
            with open(csv_path, "a") as file:
                file.write(",".join(f"{row[name]:.9g}" if name in row else "" for name in METRICS) + "\n")
            if args.track:
                wandb.log(row)

    # ---------------------------------------------------------------------------------------------- play and evaluate
    def respond(policy: Policy, prompts: list[list[int]], uniform: np.ndarray, temperature: float = args.temperature):
        """Prompts with sampled responses, ids and mask (rows, P + N); the responses' mask (rows, N) and texts."""
        ids, mask = (x.to(device) for x in pad_rows(prompts, pad_id, left=True))
        responses = policy.sample(ids, mask, torch.from_numpy(uniform).to(device), temperature, eos_id, pad_id)
        ended = response_mask(responses, eos_id)
        texts = [decode(row[:n].tolist()) for row, n in zip(responses, ended.sum(-1).tolist())]
        return torch.cat([ids, responses], 1), torch.cat([mask, ended], 1), ended, texts

    @torch.no_grad()
    def by_parts(function, *tensors: Tensor) -> Tensor:
        return torch.cat([function(*part) for part in zip(*(x.split(args.micro_batch_size) for x in tensors))])

    def log_probs_of(policy: Policy, ids: Tensor, mask: Tensor, ended: Tensor) -> Tensor:
        length = ended.shape[1]
        return by_parts(lambda ids, mask: policy(ids, mask, length, args.temperature), ids, mask) * ended

    eval_uniform = np.random.default_rng(10_000).random((args.eval_prompts, args.response_length))

    def evaluate_policy(policy: Policy) -> tuple[dict[str, Tensor], list[str]]:
        """For each held-out prompt: ground-truth and learned score, log-ratio to the reference (in the mean, KL), the
        same to the base model, tokens, (prompts,) each; the responses. The only reader of the ground truth."""
        prompts, uniform = mine(eval_prompts), mine(eval_uniform)
        ids, mask, ended, texts = respond(policy, mine(eval_ids), uniform)
        log_probs = log_probs_of(policy, ids, mask, ended)
        whole = [prompt + text for prompt, text in zip(prompts, texts)]
        scores = {"kl": (log_probs - log_probs_of(reference, ids, mask, ended)).sum(-1)}
        if base:
            other = log_probs_of(base, ids, mask, ended)
            scores["kl_base"] = (log_probs - other).sum(-1)
        scores["response_length"] = ended.sum(-1).float()
        scores["learned_score"] = reward.score(whole, args.micro_batch_size)
        if judge:
            scores["gt_score"] = judge.score(whole, args.micro_batch_size)
        return {name: all_rows(x) for name, x in scores.items()}, all_texts(texts)

    rival_scores, rival_texts = evaluate_policy(opponent)
    rival = "its opponent" if args.opponent_path else "the start"

    def evaluation(scores: dict[str, Tensor], texts: list[str]) -> dict[str, float]:
        row = {f"eval/{name}": x.mean().item() for name, x in scores.items()}
        if judge:
            truth, rival_truth = scores["gt_score"], rival_scores["gt_score"]
            row["eval/gt_score_std"] = truth.std().item()
            row["eval/win_rate"] = ((truth > rival_truth).float() + 0.5 * (truth == rival_truth)).mean().item()
            row["eval/reward_correlation"] = rank_correlation(scores["learned_score"], truth)
        if rank == 0:
            lines = [f"after {progress['step']} PPO steps: " + summary(row)]
            for i in range(min(args.samples, len(texts))):
                both = ((rival_scores, rival_texts, "then"), (scores, texts, "now "))
                lines.append(f"  prompt       | {' '.join(eval_prompts[i].split())[-100:]}")
                for numbers, words, who in both:
                    score = f"{numbers['gt_score' if judge else 'learned_score'][i].item():6.2f}"
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
    if not state:
        log(evaluation(*evaluate_policy(reference)))
        save_checkpoint()
    last = None
    bar = tqdm(
        total=args.ppo_steps, initial=progress["step"], desc="AIHF", unit="step", mininterval=1.0, disable=rank > 0
    )
    for step in range(progress["step"], args.ppo_steps):
        started, row = time.perf_counter(), {}
        for optimizer, learning_rate in zip(optimizers, learning_rates):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / args.ppo_steps if args.anneal else 1)

        k, is_new = divmod(step, args.policy_steps_per_iteration)
        if is_new == 0:
            # ================================================================= SAMPLE: τ ~ D, τ' ~ π_k, (τ_l ≺ τ_w) ~ P
            size = args.reward_updates_per_iteration * args.reward_batch_size
            demo_rows = draw(len(contrast_prompts), size, k, (args.seed, 1)).tolist()
            uniform = mine(np.random.default_rng([args.seed, 3, k]).random((size, args.response_length)))
            own = []  # the policy's responses, in the order of demo_rows
            for part in zip(in_parts(mine(demo_rows), args.batch_size), in_parts(uniform, args.batch_size)):
                own += respond(policy, [contrast_ids[i] for i in part[0]], part[1])[-1]
            memory = [*memory, list(zip(demo_rows, all_texts(own)))][-args.response_memory :]
            entries = [entry for responses in memory for entry in responses]
            drawn = np.random.default_rng([args.seed, 4, k]).permutation(len(entries))[:size]
            contrasts = mine([entries[j] for j in drawn])  # (which demonstration, a response to its prompt)
            pair_rows = mine(draw(len(pairs), size, k, (args.seed, 2))) if pairs else []

            # ================================================= UPPER LEVEL (8a): θ_{k+1} = θ_k + η (α g1 + g2), by Adam
            for update_rows in in_parts(range(len(contrasts)), args.reward_batch_size // count):
                total = torch.zeros((), device=device)
                for part in in_parts(update_rows, args.micro_batch_size):
                    texts = []
                    if demos:
                        texts += ["".join(demos[i]) for i, _ in contrasts[part.start : part.stop]]
                        texts += [demos[i][0] + y for i, y in contrasts[part.start : part.stop]]
                    if pairs:
                        texts += [pairs[i][0] + pairs[i][side] for side in (1, 2) for i in pair_rows[part]]
                    ids, mask = reward.encode(texts)
                    r = at_last(reward_forward(ids, mask), mask).chunk(len(texts) // len(part))
                    weights = args.demo_weight, args.preference_weight, args.demo_loss, args.reward_penalty
                    losses = reward_losses(*r[:2], *r[-2:], *weights)
                    loss = losses.sum() / args.reward_batch_size
                    (loss * count).backward()  # because gradients are averaged over processes
                    total += loss.detach()
                norm = torch.nn.utils.clip_grad_norm_(reward.parameters(), args.max_grad_norm)
                row["rewards/loss"] = all_rows(total[None]).sum().item()
                stop_if_not_finite(step, run_dir, reward_loss=total, reward_gradient=norm)
                optimizers[2].step()
                optimizers[2].zero_grad()
                progress["reward_updates"] += 1
            # The policy's responses become worth 0 on average, and the first reward becomes the critic's beginning.
            texts = [contrast_prompts[i] + y for i, y in zip(mine(demo_rows), own)]
            reward.offset += all_rows(reward.score(texts, args.micro_batch_size)).mean()
            if step == 0 and value_is_reward:
                value.load_state_dict(reward.state_dict())
            if demos:
                r_demos = reward.score(["".join(demos[i]) for i in mine(demo_rows)], args.micro_batch_size)
                row["reward/gap"] = all_rows(r_demos).mean().item()
            if pairs:
                sides = [[pair[0] + pair[side] for pair in held_out] for side in (1, 2)]
                chosen, rejected = (reward.score(texts, args.micro_batch_size) for texts in sides)
                margins = chosen - rejected
                names = ("chosen", "rejected", "margins", "accuracies", "held_out_loss")
                columns = (chosen, rejected, margins, (margins > 0).float(), -F.logsigmoid(margins))
                row |= {f"rewards/{name}": x.mean().item() for name, x in zip(names, columns)}

        # ===================================== LOWER LEVEL (8b): align π to r(·; θ_k), one step of PPO or ReMax on (10)
        rows = mine(draw(len(train_ids), args.batch_size, step, (args.seed, 5)))
        uniform = mine(np.random.default_rng([args.seed, 6, step]).random((args.batch_size, args.response_length)))
        ids, mask, ended, texts = respond(policy, [train_ids[i] for i in rows], uniform)
        length = ended.shape[1]
        old_log_probs, reference_log_probs = (log_probs_of(p, ids, mask, ended) for p in (policy, reference))
        scores = reward.score([train_prompts[i] + text for i, text in zip(rows, texts)], args.micro_batch_size)
        has_eos = ((ids[:, -length:] == eos_id) * ended).any(-1).float()
        log_ratio, penalised = old_log_probs - reference_log_probs, scores - args.missing_eos_penalty * (1 - has_eos)
        rewards = token_rewards(log_ratio, penalised, ended, progress["kl_coefficient"])
        is_ppo = args.policy_optimizer == "ppo"
        if is_ppo:
            old_values = by_parts(value, ids, mask)[:, -length - 1 : -1] * ended
            advantages, returns = generalised_advantages(rewards, old_values, ended, args.gamma, args.gae_lambda)
            advantages = whiten(advantages, ended)
        else:
            greedy = respond(policy, [train_ids[i] for i in rows], uniform, temperature=1e-6)[-1]
            greedy = reward.score([train_prompts[i] + text for i, text in zip(rows, greedy)], args.micro_batch_size)
            advantages = remax_advantages(rewards, ended, greedy)

        statistics = []  # of each minibatch: policy loss, value loss, approximate KL, clipped share, mean ratio
        minibatches = torch.arange(len(ids), device=device).split(args.minibatch_size // count if is_ppo else len(ids))
        for minibatch in minibatches * (args.ppo_epochs if is_ppo else 1):  # their rows are random already
            tokens = all_rows(ended[minibatch].sum()[None]).sum()
            sums = torch.zeros(5, device=device)
            for part in minibatch.split(args.micro_batch_size):
                weight = ended[part] / tokens
                log_probs = policy_forward(ids[part], mask[part], length, args.temperature) * ended[part]
                losses, ratio = policy_losses(log_probs, old_log_probs[part], advantages[part], args.clip)
                (losses * weight * count).sum().backward()  # because gradients are averaged over processes
                errors = torch.zeros_like(losses)
                if is_ppo:
                    values = value_forward(ids[part], mask[part])[:, -length - 1 : -1] * ended[part]
                    errors = value_losses(values, old_values[part], returns[part], args.value_clip)
                    (errors * weight * count).sum().backward()
                with torch.no_grad():
                    change, clipped = log_probs - old_log_probs[part], ((ratio - 1).abs() > args.clip).float()
                    sums += torch.stack([(x * weight).sum() for x in (losses, errors, change**2 / 2, clipped, ratio)])
            statistics.append(all_rows(sums[None]).sum(0))
            norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), args.max_grad_norm) for m in (policy, value)]
            stop_if_not_finite(step, run_dir, losses=statistics[-1], gradients=torch.stack(norms))
            for optimizer in optimizers[: 2 if is_ppo else 1]:
                optimizer.step()
                optimizer.zero_grad()

        # ======================================================================================================== LOG
        progress["step"] = step + 1
        progress["episodes"] += args.batch_size
        names = ("losses/policy", "losses/value", "losses/approx_kl", "losses/clip_fraction")
        row |= dict(zip(names, torch.stack(statistics).mean(0).tolist()))
        row["losses/ratio"] = statistics[0][4].item()  # of the first minibatch: 1, or something is wrong
        columns = [log_ratio.sum(-1), scores, -old_log_probs.sum(-1), rewards.sum(-1), ended.sum(-1).float(), has_eos]
        names = "objective/kl objective/scores objective/entropy objective/rlhf_reward charts/response_length".split()
        row |= dict(zip([*names, "charts/ended_share"], all_rows(torch.stack(columns, 1)).mean(0).tolist()))
        row["objective/kl_coefficient"] = progress["kl_coefficient"]
        row["charts/episodes_per_second"] = args.batch_size / (time.perf_counter() - started)
        if args.adaptive_kl:
            settings = row["objective/kl"], args.target_kl, args.batch_size, args.kl_horizon
            progress["kl_coefficient"] = adapt_kl_coefficient(progress["kl_coefficient"], *settings)

        # =================================================================================================== EVALUATE
        leave, finished = is_interrupted(), step + 1 >= args.ppo_steps
        if (step + 1) % args.eval_every == 0 or finished:
            row |= (last := evaluation(*evaluate_policy(policy)))
        progress["wall_seconds"] += time.perf_counter() - started
        log(row)
        bar.update()
        bar.set_postfix_str(f"score {row['objective/scores']:.2f}, KL {row['objective/kl']:.2f}")

        # ================================================================================================= CHECKPOINT
        if finished:
            save_model(policy.lm, tokenizer, "policy")
            save_model(reward.model, reward.tokenizer, "reward")
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
        print(f"final: {summary(last)}; policy and reward in {run_dir}")
    if dist.is_initialized():
        dist.destroy_process_group()
