"""The embedded language models and data: a small GPT-2 that writes movie reviews, the classifier that judges them, and
what policies between the two write (A.2.2).

    python data_gen/imdb_data.py pretrain      # 1. tokenizer and language model -> data_gen/assets/imdb/model
    python data_gen/imdb_data.py classifier    # 2. ground-truth reward          -> data_gen/assets/imdb/classifier
    python data_gen/imdb_data.py tiers         # 3. demonstrations, preferences, prompts -> data_gen/assets/imdb

The first two read the IMDb reviews from the hub (`pip install -e '.[hub]'`) or, with --data, from a local folder; the
third needs nothing but their models. Each output folder has its own manifest.json (what made the files, how good they
are, SHA-256 of each), and each command can be interrupted: the same command carries on, exactly on a CPU.

No review is stored: the weights, the vocabulary and texts of the model are. Weights lie on disk as float16, half the
size, but config.json says float32: from_pretrained and the Auto classes then give float32 models.

The paper takes GPT-2 and lvwerra/distilbert-imdb; these two stand in for them where nothing can be downloaded.
"""

import gzip
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import tyro
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

SEPARATOR, PAD = "<|endoftext|>", "<|pad|>"  # the separator begins and ends every review, as in GPT-2
SPLITS = ("train", "unsupervised", "test")


@dataclass
class Training:
    data: str = "stanfordnlp/imdb"
    """a folder with {train,test,unsupervised}.jsonl.gz (or .jsonl) of rows {"text", "label"}, label 1 positive,
    0 negative, -1 unknown; or the id of such a data set on the hub"""
    output_dir: str = ""
    """where the model goes; default data_gen/assets/imdb/<model or classifier>"""
    work_dir: str = ""
    """training state, kept so that the command can carry on; default runs/imdb_data__<subcommand>__<seed>"""
    seed: int = 1
    """seeds the initial weights, the batches, the held-out reviews and the samples"""
    checkpoint_every: int = 250
    """steps between checkpoints"""
    threads: int = 2
    """CPU threads of torch"""
    bf16: bool = False
    """bfloat16 matrix products on a CPU too (on CUDA always): 1.6 times as fast where the CPU has them (avx512_bf16,
    amx_bf16), slower where it has not"""


@dataclass
class Pretrain(Training):
    """Train a byte-level BPE and a small GPT-2 on it from scratch, on the train and unsupervised reviews."""

    vocab_size: int = 4096
    """tokens, the 256 bytes and 2 special ones among them"""
    context: int = 256
    """tokens the model can read (n_positions), and of each training window"""
    width: int = 192
    """of the embeddings and layers (n_embd)"""
    layers: int = 4
    """transformer blocks (n_layer)"""
    heads: int = 6
    """attention heads (n_head), a divisor of the width"""
    opening_share: float = 0.5
    """share of the training windows that start where a review starts; the others start anywhere"""
    steps: int = 4_000
    """optimiser steps"""
    batch_size: int = 16
    """windows a step"""
    learning_rate: float = 2e-3
    """AdamW's peak"""
    heldout_reviews: int = 2_000
    """test reviews whose first `context` tokens the perplexity is measured on"""
    samples: int = 10
    """reviews written for the manifest"""
    compile: bool = False
    """torch.compile the model: a quarter faster, needs a C++ compiler"""


@dataclass
class Classifier(Training):
    """Fine-tune the pretrained model to tell positive from negative reviews, and openings of reviews."""

    model: str = "data_gen/assets/imdb/model"
    """the pretrained model, a folder or hub id: any causal language model with a padding token"""
    full_share: float = 0.4
    """share of the batches of whole reviews, cut at the model's context; the others are openings"""
    opening_tokens: tuple[int, int] = (16, 64)
    """shortest and longest opening, in tokens: as long as a prompt and its generated response"""
    steps: int = 3_000
    """optimiser steps"""
    batch_size: int = 32
    """reviews a step, all cut to one length"""
    learning_rate: float = 5e-4
    """AdamW's peak"""
    heldout_reviews: int = 5_000
    """test reviews the accuracy is measured on"""


@dataclass
class Tiers:
    """PPO on the ground truth; of each prompt, the responses of PPO's checkpoints, sorted by score into three tiers."""

    model: str = "data_gen/assets/imdb/model"
    """the pretrained model, a folder or hub id: it writes the prompts, and PPO starts from it"""
    classifier: str = "data_gen/assets/imdb/classifier"
    """the ground truth, PPO's reward here"""
    output_dir: str = "data_gen/assets/imdb"
    """where demonstrations.jsonl, preferences.jsonl, prompts.jsonl and manifest.json go"""
    work_dir: str = ""
    """unfinished work, kept so that the command can carry on; default runs/imdb_data__tiers__<seed>"""
    seed: int = 1
    """seeds the prompts, PPO and the responses"""
    threads: int = 2
    """CPU threads of torch"""
    prompts: int = 10_000
    """openings of reviews, all different; the first 30 % for PPO on the ground truth, 40 % for the tiers, 30 % to
    prompt the policies that learn from the tiers"""
    prompt_tokens: tuple[int, int] = (4, 12)
    """shortest and longest prompt"""
    response_length: int = 24
    """tokens of a response at most"""
    ppo_steps: int = 10  # the paper: 500
    """PPO steps between the three checkpoints"""
    batch_size: int = 64
    """responses in a PPO step"""
    learning_rate: float = 2e-5
    """PPO's"""
    kl_coefficient: float = 0.1
    """PPO's β"""


# -------------------------------------------------------------------------------------------------------------- data
def fail(message: str):
    """One line to stderr, exit code 2: the caller's input was wrong and nothing has been written."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def read_rows(data: str, split: str, columns: tuple[str, ...]) -> list[dict]:
    """Rows with text under all `columns`: of a .jsonl(.gz) file, of {split}.jsonl(.gz) in a folder, or from the hub."""
    path = Path(data)
    if path.is_dir():
        found = [path / f"{split}{ending}" for ending in (".jsonl.gz", ".jsonl")]
        path = next((p for p in found if p.is_file()), None) or fail(f"{path} has no {split}.jsonl.gz or {split}.jsonl")
    if path.is_file():
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: not JSON, or not UTF-8
            fail(f"cannot read {path} ({one_line(error)})")
    elif data.count("/") != 1 or data[0] in "./~" or path.suffix:  # no hub id
        fail(f"there is no {data}")
    else:
        try:
            from datasets import load_dataset

            rows = list(load_dataset(data, split=split))
        except ImportError:
            fail(f"there is no folder {data}; to read it from the hub, pip install -e '.[hub]'")
        except Exception as error:  # of the network, the hub, the cache, the file format ...
            fail(f"cannot load {split} of {data} from the hub ({one_line(error)})")
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) and row[key].strip() for key in columns)):
            fail(f"row {number} of {path} needs text under {' and '.join(columns)}")
    return rows or fail(f"{path} is empty")


def clean(text: str) -> str:
    """One line, without the <br /> that the reviews are full of."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def labelled(data: str, split: str) -> tuple[list[str], np.ndarray]:
    """Texts and labels (1 positive, 0 negative) of the labelled reviews of a split."""
    rows = [row for row in read_rows(data, split, ("text",)) if row.get("label") in (0, 1)]
    if len({row["label"] for row in rows}) < 2:
        fail(f"{split} of {data} needs reviews with label 0 and with label 1")
    return [clean(row["text"]) for row in rows], np.array([row["label"] for row in rows])


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """GPT-2's byte-level BPE with a vocabulary of its own; the padding token is 0, the separator 1."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], name: str) -> list[np.ndarray]:
    """Token ids of each text, int32 (tokens,), without special tokens."""
    ids = []
    for start in tqdm(range(0, len(texts), 500), desc=name, unit="500 reviews"):
        encoded = tokenizer.encode_batch(texts[start : start + 500], add_special_tokens=False)
        ids += [np.array(encoding.ids, np.int32) for encoding in encoded]
    return ids


def draw_windows(stream: np.ndarray, starts: np.ndarray, count: int, length: int, opening_share: float, rng) -> Tensor:
    """Windows of the token stream (tokens,): (count, length).

    A window starts anywhere or, with probability opening_share, with a review: on the separator before it (which is
    how a whole review is sampled) or right after it (which is how a prompt comes, without special tokens).
    """
    opening = rng.choice(starts, count) + rng.integers(2, size=count)
    anywhere = rng.integers(len(stream) - length + 1, size=count)
    begin = np.where(rng.random(count) < opening_share, np.minimum(opening, len(stream) - length), anywhere)
    return torch.from_numpy(stream[begin[:, None] + np.arange(length)].astype(np.int64))


def pad(rows: list[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, both (rows, longest)."""
    ids = np.full((len(rows), max(map(len, rows))), pad_id, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    return torch.from_numpy(ids), (torch.arange(ids.shape[1]) < lengths[:, None]).long()


# ---------------------------------------------------------------------------------------------------------- training
def train(model, batch_loss, args: Training, state_path: Path, data_hash: str) -> None:
    """AdamW on batch_loss(rng), a scalar, for args.steps steps; carries on from state_path, which holds the state.

    The learning rate rises for 5 % of the steps and falls along a cosine to a tenth of its peak. The generators are
    seeded afresh with the step, so a resumed run draws what the undisturbed one would have drawn.
    """
    groups = [  # weight decay on matrices only
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    recipe = json.dumps([asdict(args) | {"data": data_hash, "output_dir": "", "work_dir": ""}])
    begin = 0
    if state_path.exists():
        try:
            state = torch.load(state_path, map_location="cpu", weights_only=True)
            own = state["recipe"] == recipe
            if own:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                begin = state["step"]
        except Exception as error:  # torch.load raises almost anything on a damaged file
            fail(f"{state_path} is damaged ({type(error).__name__}); delete it or give another --work-dir")
        if not own:
            fail(f"{state_path} belongs to a run with other arguments or data; give another --work-dir or delete it")
    model.train()
    bf16 = args.bf16 or model.device.type == "cuda"
    warmup = max(1, args.steps // 20)
    bar = tqdm(range(begin, args.steps), initial=begin, total=args.steps, desc="2/3 training", mininterval=1.0)
    average = None
    for step in bar:
        cosine = 0.55 + 0.45 * math.cos(math.pi * max(step - warmup, 0) / max(args.steps - warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((step + 1) / warmup, cosine)
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step]).generate_state(1)[0]))  # of dropout
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = batch_loss(np.random.default_rng([args.seed, step]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            print(f"error: the loss is {value} at step {step}; try a smaller --learning-rate", file=sys.stderr)
            raise SystemExit(1)
        average = value if average is None else 0.95 * average + 0.05 * value
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "recipe": recipe, "step": step + 1}, state_path.with_suffix(".tmp"))
            os.replace(state_path.with_suffix(".tmp"), state_path)
    model.half().float().eval()  # what will be stored is what is measured from here on


def write_model(model, tokenizer, output_dir: Path, manifest: dict) -> None:
    """The model as float16 safetensors, its tokenizer and, last, the manifest: each file whole or not at all."""
    work = output_dir / ".tmp"
    shutil.rmtree(work, ignore_errors=True)
    tokenizer.save_pretrained(work)
    model.cpu().half().save_pretrained(work)
    for name, changes in {
        "config.json": {"dtype": "float32", "torch_dtype": "float32"},  # its name from, and before, transformers 4.56
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},  # every version knows this one
    }.items():
        (work / name).write_text(json.dumps(json.loads((work / name).read_text()) | changes, indent=2) + "\n")
    files = sorted(path.name for path in work.iterdir())
    sha256 = {name: hashlib.sha256((work / name).read_bytes()).hexdigest() for name in files}
    (work / "manifest.json").write_text(json.dumps({**manifest, "sha256": sha256}, indent=2, ensure_ascii=False) + "\n")
    for name in [*files, "manifest.json"]:
        os.replace(work / name, output_dir / name)
    work.rmdir()


def describe(args: Training, reviews: dict[str, int], model) -> dict:
    """What every manifest holds; a local data folder by its name only."""
    data = Path(args.data).resolve().name if Path(args.data).exists() else args.data
    words = [word.replace(args.data, data) if word.endswith(args.data) else word for word in sys.argv]
    arguments = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "work_dir")}
    modules = (np, tokenizers, torch, transformers)
    return {
        "command": shlex.join(["python", *words]),
        "seed": args.seed,
        "arguments": {**arguments, "data": data},
        "reviews": reviews,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"python": sys.version.split()[0], **{m.__name__: str(m.__version__) for m in modules}},
        "created": time.strftime("%Y-%m-%d"),
    }


# -------------------------------------------------------------------------------------------------------- 1. pretrain
@torch.no_grad()
def perplexity(model, reviews: list[np.ndarray], pad_id: int) -> tuple[float, int]:
    """exp of the mean negative log-likelihood a token of reviews (separator first), and how many tokens that were."""
    nll, count = 0.0, 0
    for start in tqdm(range(0, len(reviews), 32), desc="3/3 held-out perplexity", unit="batch"):
        ids, mask = (x.to(model.device) for x in pad(reviews[start : start + 32], pad_id))
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        token_nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
        nll, count = nll + token_nll.double().sum().item(), count + int(mask[:, 1:].sum())
    return math.exp(nll / count), count


def pretrain(args: Pretrain, device: torch.device, output_dir: Path, state_path: Path) -> None:
    texts = {split: [clean(row["text"]) for row in read_rows(args.data, split, ("text",))] for split in SPLITS}
    train_texts = texts["train"] + texts["unsupervised"]
    test_texts = sorted(set(texts["test"]) - set(train_texts))
    if not test_texts:
        fail(f"every test review of {args.data} is a training review too")
    rng = np.random.default_rng(args.seed)
    test_texts = [test_texts[i] for i in rng.permutation(len(test_texts))[: args.heldout_reviews]]

    tokenizer = train_tokenizer(train_texts, args.vocab_size)
    if tokenizer.get_vocab_size() != args.vocab_size:
        fail(f"the reviews give {tokenizer.get_vocab_size()} tokens only; give a smaller --vocab-size")
    separator, pad_id = (tokenizer.token_to_id(token) for token in (SEPARATOR, PAD))
    reviews = [np.append(ids, np.int32(separator)) for ids in encode(tokenizer, train_texts, "1/3 tokens")]
    stream = np.concatenate([reviews[0][-1:], *reviews])
    starts = np.cumsum([0, *map(len, reviews[:-1])])  # of each review: the separator before it
    if len(stream) < args.context:
        fail(f"the reviews have {len(stream)} tokens, less than one --context")
    heldout = [np.array([separator, *ids, separator]) for ids in encode(tokenizer, test_texts, "1/3 held-out")]

    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=args.vocab_size,
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's, in one kernel
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),  # less than an epoch: nothing to overfit
        **dict.fromkeys(("bos_token_id", "eos_token_id"), separator),
        pad_token_id=pad_id,
    )
    model = GPT2LMHeadModel(config).to(device)
    forward = torch.compile(model) if args.compile else model

    def batch_loss(rng) -> Tensor:
        ids = draw_windows(stream, starts, args.batch_size, args.context, args.opening_share, rng).to(device)
        return forward(input_ids=ids, labels=ids, use_cache=False).loss

    train(model, batch_loss, args, state_path, hashlib.sha256(stream).hexdigest())

    ppl, heldout_tokens = perplexity(model, [ids[: args.context] for ids in heldout], pad_id)
    torch.manual_seed(args.seed)
    prompt = torch.full((args.samples, 1), separator, device=device)
    length = min(96, args.context)
    samples = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, max_length=length)
    samples = [tokenizer.decode(row) for row in samples.tolist()]  # without special tokens
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict.fromkeys(("bos_token", "eos_token"), SEPARATOR),
        pad_token=PAD,
        padding_side="left",
        model_max_length=args.context,
        clean_up_tokenization_spaces=False,
    )
    manifest = describe(args, {"trained_on": len(train_texts), "held_out": len(heldout)}, model)
    manifest["tokens"] = {"reviews": len(stream), "trained_on": args.steps * args.batch_size * args.context}
    manifest["heldout_perplexity"] = {"perplexity": ppl, "tokens": heldout_tokens, "split": "test"}
    manifest["samples"] = samples
    write_model(model, fast, output_dir, manifest)
    print("\n".join(f"- {sample}" for sample in samples[:3]))
    print(f"held-out perplexity {ppl:.1f} on {heldout_tokens} tokens; wrote {output_dir}")


# ------------------------------------------------------------------------------------------------------ 2. classifier
@torch.no_grad()
def scores(model, reviews: list[np.ndarray], length: int, pad_id: int) -> np.ndarray:
    """Raw positive minus negative logit of each review's first `length` tokens: (reviews,)."""
    order = sorted(range(len(reviews)), key=lambda i: min(len(reviews[i]), length))  # little padding
    out = np.zeros(len(reviews))
    for start in tqdm(range(0, len(order), 64), desc=f"3/3 accuracy on {length} tokens", unit="batch"):
        rows = order[start : start + 64]
        ids, mask = (x.to(model.device) for x in pad([reviews[i][:length] for i in rows], pad_id))
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        out[rows] = (logits[:, 1] - logits[:, 0]).cpu().numpy()
    return out


def classifier(args: Classifier, device: torch.device, output_dir: Path, state_path: Path) -> None:
    texts, labels = labelled(args.data, "train")
    test_texts, test_labels = labelled(args.data, "test")
    kept = np.random.default_rng(args.seed).permutation(len(test_texts))[: args.heldout_reviews]
    test_texts, test_labels = [test_texts[i] for i in kept], test_labels[kept]

    torch.manual_seed(args.seed)  # of the new head
    try:
        fast = AutoTokenizer.from_pretrained(args.model)
        names = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2, **names)
    except Exception as error:
        fail(f"cannot load --model {args.model} ({one_line(error)}); the subcommand pretrain makes one")
    if model.config.pad_token_id is None:
        fail(f"--model {args.model} has no padding token")
    pad_id, context = model.config.pad_token_id, model.config.max_position_embeddings
    if args.opening_tokens[1] > context:
        fail(f"--opening-tokens must not be longer than the {context} tokens that --model {args.model} reads")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    model = model.float().to(device)
    ids = encode(fast.backend_tokenizer, texts, "1/3 tokens")
    test_ids = encode(fast.backend_tokenizer, test_texts, "1/3 held-out")

    def batch_loss(rng) -> Tensor:
        low, high = args.opening_tokens
        length = context if rng.random() < args.full_share else rng.integers(low, high + 1)
        rows = rng.integers(len(ids), size=args.batch_size)
        batch, mask = (x.to(device) for x in pad([ids[i][:length] for i in rows], pad_id))
        logits = model(input_ids=batch, attention_mask=mask, use_cache=False).logits.float()
        return F.cross_entropy(logits, torch.from_numpy(labels[rows]).to(device))

    weights = [p.detach().cpu().numpy() for p in model.parameters()]
    train(model, batch_loss, args, state_path, hashlib.sha256(b"".join([*ids, labels, *weights])).hexdigest())

    accuracy = {}
    for name, length in (("full", context), ("opening_40_tokens", min(40, context))):
        score = scores(model, test_ids, length, pad_id)
        accuracy[name] = {
            "accuracy": float(((score > 0) == test_labels).mean()),
            "score_mean": float(score.mean()),
            "score_std": float(score.std()),
        }
    manifest = describe(args, {"trained_on": len(texts), "held_out": len(test_texts)}, model)
    manifest["heldout"] = accuracy | {"split": "test", "score": "logit of label 1 minus logit of label 0"}
    write_model(model, fast, output_dir, manifest)
    print(", ".join(f"{name} {row['accuracy']:.1%}" for name, row in accuracy.items()) + f" right; wrote {output_dir}")


# ----------------------------------------------------------------------------------------------------------- 3. tiers
TABLE_3 = {"low": 0.27, "medium": 1.13, "high": 2.23}  # mean scores of the paper's tiers, beside ours in the manifest


def write_lines(path: Path, rows: list[dict]) -> None:
    path.with_suffix(".tmp").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    os.replace(path.with_suffix(".tmp"), path)


def load(args: Tiers, kind, flag: str, device: torch.device):
    name = getattr(args, flag)
    try:
        return kind.from_pretrained(name).float().to(device).eval(), AutoTokenizer.from_pretrained(name)
    except Exception as error:
        fail(f"cannot load --{flag} {name} ({one_line(error)}); the subcommands pretrain and classifier make both")


@torch.no_grad()
def continuations(model, fast, prompts: list[str], length: int, seed: list[int]) -> list[str]:
    """What the model writes after each prompt, or from the start of a review, up to `length` tokens."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    batch = fast(prompts, return_tensors="pt", padding=True) if any(prompts) else {}
    ids = batch.get("input_ids", torch.full((len(prompts), 1), fast.bos_token_id)).to(model.device)
    mask = batch.get("attention_mask", torch.ones(ids.shape, dtype=torch.int64)).to(model.device)
    written = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=length)
    return fast.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)


def write_prompts(model, fast, args: Tiers) -> list[str]:
    """Openings of reviews, as the model writes them: all different, each a text that encodes to as many tokens."""
    prompts: dict[str, None] = {}
    rng = np.random.default_rng(args.seed)
    bar = tqdm(total=args.prompts, desc="1/4 prompts", unit="prompt")
    for batch in range(10 + args.prompts // 20):
        if len(prompts) >= args.prompts:
            break
        texts = continuations(model, fast, [""] * 256, args.prompt_tokens[1], [args.seed, 0, batch])
        for text in texts:
            ids = fast(text)["input_ids"][: rng.integers(args.prompt_tokens[0], args.prompt_tokens[1] + 1)]
            prompt = fast.decode(ids)
            if len(ids) >= args.prompt_tokens[0] and fast(prompt)["input_ids"] == ids:
                prompts[prompt] = None
        bar.update(min(len(prompts), args.prompts) - bar.n)
    bar.close()
    if len(prompts) < args.prompts:
        fail(f"{args.model} wrote only {len(prompts)} different openings of --prompt-tokens {args.prompt_tokens}")
    return list(prompts)[: args.prompts]


@torch.no_grad()
def judge(model, fast, texts: list[str]) -> np.ndarray:
    """Positive minus negative logit of each text: (texts,)."""
    out = []
    for start in range(0, len(texts), 128):
        batch = fast(texts[start : start + 128], return_tensors="pt", padding=True).to(model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        out.append((logits[:, 1] - logits[:, 0]).cpu().numpy())
    return np.concatenate(out)


def tiers(args: Tiers, device: torch.device, output_dir: Path, work_dir: Path) -> None:
    model, fast = load(args, AutoModelForCausalLM, "model", device)
    fast.padding_side = "left"
    recipe = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "work_dir", "threads")}
    found = work_dir / "recipe.json"
    if found.exists() and found.read_text() != json.dumps(recipe):
        fail(f"{work_dir} belongs to a run with other arguments; give another --work-dir or delete it")
    found.write_text(json.dumps(recipe))

    prompts = write_prompts(model, fast, args)
    ends = [len(prompts) * 3 // 10, len(prompts) * 7 // 10]
    for name, rows in (("ppo_prompts", prompts[: ends[0]]), ("prompts", prompts[ends[1] :])):
        write_lines(work_dir / f"{name}.jsonl", [{"prompt": prompt} for prompt in rows])

    run = work_dir / "ppo"  # 2/4: rlhf_baseline.py without its first two stages, on the ground truth
    steps = [args.ppo_steps * (i + 1) for i in range(3)]
    flags = {
        "model-name-or-path": args.model,
        "sft-model-path": args.model,
        "reward-model-path": args.classifier,
        "ground-truth-path": args.classifier,
        "prompts": work_dir / "ppo_prompts.jsonl",
        "seed": args.seed,
        "response-length": args.response_length,
        "ppo-steps": steps[-1],
        "save-every": args.ppo_steps,
        "checkpoint-every": args.ppo_steps,
        "eval-every": args.ppo_steps,
        "eval-prompts": max(1, min(128, ends[0] // 2)),
        "batch-size": args.batch_size,
        "minibatch-size": args.batch_size // 2,
        "ppo-epochs": 2,
        "learning-rate": args.learning_rate,
        "kl-coefficient": args.kl_coefficient,
        "threads": args.threads,
        "runs-dir": work_dir,
        "run-name": run.name,
    }
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "rlhf_baseline.py"), "llm"]
    if not (run / "policy").exists():
        words = ["--resume", run] if (run / "checkpoint.pt").exists() else [f"--{k}={v}" for k, v in flags.items()]
        if not (run / "checkpoint.pt").exists():
            shutil.rmtree(run, ignore_errors=True)
        done = subprocess.run([*command, *map(str, words), *(["--no-anneal"] if len(words) > 2 else [])])
        if done.returncode:
            raise SystemExit(done.returncode)

    responses, scores = [], []
    truth, its_fast = load(args, AutoModelForSequenceClassification, "classifier", device)
    its_fast.padding_side = "right"
    asked = prompts[ends[0] : ends[1]]
    for step in steps:
        policy = AutoModelForCausalLM.from_pretrained(run / f"policy_{step}").to(device).eval()
        parts = tqdm(range(0, len(asked), 100), desc=f"3/4 responses after {step} PPO steps", unit="100 prompts")
        texts = [
            text
            for start in parts
            for text in continuations(
                policy, fast, asked[start : start + 100], args.response_length, [args.seed, step, start]
            )
        ]
        responses.append(texts)
        scores.append(judge(truth, its_fast, [prompt + text for prompt, text in zip(asked, texts)]))
    order = np.argsort(scores, axis=0)  # 4/4 of each prompt: low, medium, high
    kept = [i for i in range(len(asked)) if all(texts[i].strip() for texts in responses)]
    rows = [(asked[i], *(responses[k][i] for k in order[:, i])) for i in kept]
    files = {
        "preferences": [{"prompt": p, "chosen": medium, "rejected": low} for p, low, medium, _ in rows],
        "demonstrations": [{"prompt": p, "completion": high} for p, _, _, high in rows],
        "prompts": [{"prompt": prompt} for prompt in prompts[ends[1] :]],
    }
    for name, lines in files.items():
        write_lines(output_dir / f"{name}.jsonl", lines)
    ranked = np.sort(scores, axis=0)[:, kept].astype(float)
    table = {name: {"mean": x.mean(), "std": x.std(), "paper_mean": TABLE_3[name]} for name, x in zip(TABLE_3, ranked)}
    modules = (np, tokenizers, torch, transformers)
    manifest = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "arguments": recipe,
        "rows": {name: len(lines) for name, lines in files.items()},
        "ground_truth_score": table,
        "checkpoints": {step: {"mean": float(x.mean()), "std": float(x.std())} for step, x in zip(steps, scores)},
        "versions": {"python": sys.version.split()[0], **{m.__name__: str(m.__version__) for m in modules}},
        "created": time.strftime("%Y-%m-%d"),
        "sha256": {
            f"{name}.jsonl": hashlib.sha256((output_dir / f"{name}.jsonl").read_bytes()).hexdigest() for name in files
        },
    }
    (output_dir / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for name, row in table.items():
        print(f"{name:6} {row['mean']:5.2f} ± {row['std']:.2f} (the paper's mean: {row['paper_mean']})")
    print(f"{len(kept)} demonstrations and preferences, {len(files['prompts'])} prompts; wrote {output_dir}")


def check_args(args: Pretrain | Classifier | Tiers) -> None:
    for name in (
        "steps batch_size learning_rate checkpoint_every threads heldout_reviews samples layers heads "
        "prompts response_length ppo_steps"
    ).split():
        if not 0 < getattr(args, name, 1) < 10**8:
            fail(f"--{name.replace('_', '-')} must be more than 0 and less than 100 million, not {getattr(args, name)}")
    for name in "opening_share full_share".split():
        if not 0 <= getattr(args, name, 0) <= 1:
            fail(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(args, name)}")
    if args.seed < 0:
        fail("--seed must not be negative")
    if isinstance(args, Pretrain):
        if args.vocab_size < 258 or args.context < 2 or args.width < 1 or args.width % args.heads:
            fail("--vocab-size must be 258 or more, --context 2 or more, --width a multiple of --heads")
    for name in "opening_tokens prompt_tokens".split():
        low, high = getattr(args, name, (1, 1))
        if not 0 < low <= high:
            fail(f"--{name.replace('_', '-')} takes the fewest and the most tokens, in this order")
    if isinstance(args, Tiers) and (args.prompts < 20 or args.batch_size % 2 or not 0 <= args.kl_coefficient < 10**8):
        fail("--prompts must be 20 or more, --batch-size even, --kl-coefficient not negative")


if __name__ == "__main__":
    args = tyro.cli(Pretrain | Classifier | Tiers, description=__doc__.split("\n\n")[0])
    check_args(args)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # a new classification head is no news
    transformers.logging.disable_progress_bar()
    run, folder = {Pretrain: (pretrain, "/model"), Classifier: (classifier, "/classifier")}.get(type(args), (tiers, ""))
    output_dir = Path(args.output_dir or f"data_gen/assets/imdb{folder}")
    work_dir = Path(args.work_dir or f"runs/imdb_data__{run.__name__}__{args.seed}")
    for path in (output_dir, work_dir):  # now, not when the training is over
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot make the folder {path} ({error.strerror})")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run(args, device, output_dir, work_dir if run is tiers else work_dir / "state.pt")
