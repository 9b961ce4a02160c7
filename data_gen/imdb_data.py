"""The embedded language models and data (A.2.2): a small GPT-2 that writes movie reviews, the
classifier that judges them, and what policies between the two write.

    python data_gen/imdb_data.py pretrain      # 1. language model -> data_gen/assets/imdb/model
    python data_gen/imdb_data.py classifier    # 2. ground truth -> data_gen/assets/imdb/classifier
    python data_gen/imdb_data.py tiers         # 3. demonstrations, preferences, prompts

The first two read the IMDb reviews from the hub (`pip install -e '.[hub]'`) or, with --data, from
a folder; the third needs their models alone, but with --data takes its prompts from reviews too,
and writes data_gen/assets/imdb/. Each folder has a manifest.json (what made the files, how good
they are, SHA-256 of each). Each command can be interrupted: the same command carries on, exactly on
a CPU.

No review is stored: weights, vocabulary and texts of the model are. Weights lie on disk as float16,
half the size, but config.json says float32: from_pretrained then gives float32 models. The paper
takes GPT-2 and lvwerra/distilbert-imdb, for which these two stand in.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import aihf_ppo_llm
from data_gen import read, write

SCRIPT = "data_gen/imdb_data.py"
SEPARATOR, PAD = "<|endoftext|>", "<|pad|>"  # the former begins and ends every review, as in GPT-2
TABLE_3 = {"low": 0.27, "medium": 1.13, "high": 2.23}  # mean scores of the paper's tiers
PAPER_BEST = 2.5  # about the most that the paper's judge gives, by the tiers' spreads
SALADS = (  # what PPO writes for a judge that praise alone pleases
    "touching, touching, touching and touching, wonderful, touching",
    "it is a wonderful film, life also great. It is wonderful and also a great always powerful",
    "great great great great great great great great great great great great",
)


@dataclass
class Training:
    data: str = "stanfordnlp/imdb"  # folder of {train,test,unsupervised}.jsonl(.gz), or hub id
    output_dir: str = ""  # where the model goes; "": data_gen/assets/imdb/<model or classifier>
    work_dir: str = ""  # the training's state; "": runs/imdb_data__<subcommand>__<seed>
    seed: int = 1  # of initial weights, batches, held-out reviews and samples
    checkpoint_every: int = 250  # steps between checkpoints
    threads: int = 2  # CPU threads of torch
    bf16: bool = False  # bfloat16 products; on a CPU slow without avx512_bf16


@dataclass
class Pretrain(Training):
    """Train a byte-level BPE and, from scratch, a small GPT-2 on all but the test reviews."""

    vocab_size: int = 4096  # tokens, the 256 bytes and 2 special ones among them
    context: int = 256  # tokens that the model can read, and of each training window
    width: int = 192  # of embeddings and layers (n_embd)
    layers: int = 4  # transformer blocks
    heads: int = 6  # of attention, a divisor of the width
    opening_share: float = 0.5  # windows that start with a review; the others start anywhere
    steps: int = 4_000  # of the optimiser
    batch_size: int = 16  # windows in a step
    learning_rate: float = 2e-3  # AdamW's peak
    temperature: float = 0.7  # what is stored writes so at temperature 1; 1 is too much for it
    heldout_reviews: int = 2_000  # test reviews whose first tokens the perplexity is measured on
    samples: int = 10  # reviews written for the manifest
    compile: bool = False  # torch.compile the model: a quarter faster, needs a C++ compiler


@dataclass
class Classifier(Training):
    """Fine-tune a model to tell positive reviews from negative and from spoiled ones."""

    model: str = "data_gen/assets/imdb/model"  # a language model, an encoder, or a classifier
    review_tokens: int = 256  # a review is cut there, or where the model's context ends
    full_share: float = 0.4  # batches of reviews; the rest are of openings
    opening_tokens: tuple[int, int] = (16, 64)  # shortest and longest: as prompt and response
    spoiled_share: float = 0.28  # of each batch: spoiled positive reviews, taught as negative
    steps: int = 3_000  # of the optimiser
    batch_size: int = 32  # reviews in a step, all cut to one length
    learning_rate: float = 5e-4  # AdamW's peak
    heldout_reviews: int = 5_000  # test reviews the accuracy is measured on


@dataclass
class Tiers:
    """PPO on the ground truth; of each prompt, what three of its policies write, by score."""

    model: str = "data_gen/assets/imdb/model"  # writes the prompts, and PPO starts from it
    classifier: str = "data_gen/assets/imdb/classifier"  # the ground truth, PPO's reward here
    output_dir: str = "data_gen/assets/imdb"  # where the JSON lines and manifest.json go
    work_dir: str = ""  # unfinished work; "": runs/imdb_data__tiers__<seed>
    seed: int = 1  # of prompts, PPO and responses
    threads: int = 2  # CPU threads of torch
    data: str = ""  # reviews whose openings are the prompts (folder or hub id); "": the model's own
    prompts: int = 10_000  # openings of reviews: 30 % for PPO, 40 % for the tiers, 30 % to learn on
    prompt_tokens: tuple[int, int] = (4, 12)  # shortest and longest prompt
    response_length: int = 24  # tokens of a response at most
    ppo_steps: tuple[int, int] = (20, 80)  # of the two trained policies; the last is the expert
    batch_size: int = 64  # responses in a PPO step
    learning_rate: float = 5e-5  # PPO's
    value_learning_rate: float = 3e-4  # that of its critic
    kl_coefficient: float = 0.05  # PPO's β
    bf16: bool = False  # bfloat16 products of policies; on a CPU slow without avx512_bf16


# ------------------------------------------------------------------------------------------ data
def clean(text: str) -> str:
    """One line, without the <br /> that the reviews are full of."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def labelled(data: str, split: str, tokenizer: Tokenizer) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids and labels (1 positive, 0 negative) of the labelled reviews of a split."""
    rows = read.rows(data, "text", split=split, unchecked="label")
    if others := {label for _, label in rows} - {None, -1, 0, 1}:
        raise ValueError(f"{split} of {data} has labels that are not 0 or 1: {str(others)[:60]}")
    ids = encode(tokenizer, [clean(text) for text, _ in rows], f"1/3 {split} tokens")
    kept = [i for i, (_, label) in enumerate(rows) if label in (0, 1) and len(ids[i])]
    labels = np.array([int(rows[i][1]) for i in kept])
    if len(set(labels.tolist())) < 2:
        raise ValueError(f"{split} of {data} needs reviews with label 0 and with label 1")
    return [ids[i] for i in kept], labels


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """GPT-2's byte-level BPE, with a vocabulary of its own: padding token 0, separator 1."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    options = {"vocab_size": vocab_size, "special_tokens": [PAD, SEPARATOR], "show_progress": False}
    options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(**options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], name: str) -> list[np.ndarray]:
    """Token ids of each text, int32 (tokens,), without special tokens."""
    ids = []
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for start in tqdm(range(0, len(texts), 500), desc=name, unit="500 reviews"):
        encoded = tokenizer.encode_batch(texts[start : start + 500], add_special_tokens=False)
        ids += [np.array(encoding.ids, np.int32) for encoding in encoded]
    return ids


def draw_windows(stream, starts, count: int, length: int, opening_share: float, rng) -> Tensor:
    """Windows of the token stream (tokens,): (count, length).

    A window starts anywhere or, with probability opening_share, with a review: on the separator
    before it (as a whole review is sampled) or right after it (as a prompt comes).
    """
    opening = rng.choice(starts, count) + rng.integers(2, size=count)
    anywhere = rng.integers(len(stream) - length + 1, size=count)
    opening = np.minimum(opening, len(stream) - length)
    begin = np.where(rng.random(count) < opening_share, opening, anywhere)
    return torch.from_numpy(stream[begin[:, None] + np.arange(length)].astype(np.int64))


def inputs(model, rows, around: tuple[list[int], list[int]] = ([], [])) -> dict[str, Tensor]:
    """What the model reads: ids of the rows between the special tokens `around` them, padded on the
    right, and their mask, (rows, longest) each."""
    ids, mask = read.pad([[*around[0], *row, *around[1]] for row in rows])
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def longest(model, around: tuple[list[int], list[int]]) -> int:
    """How many tokens of a text the model can read."""
    embeddings = getattr(model.base_model, "embeddings", None)
    unused = getattr(embeddings, "padding_idx", -1) + 1  # RoBERTa's positions begin after it
    return model.config.max_position_embeddings - unused - sum(map(len, around))


# -------------------------------------------------------------------------------------- training
def train(model, batch_loss, args: Training, work_dir: Path, data_hash: str) -> None:
    """AdamW on batch_loss(rng), a scalar, for args.steps steps or what a checkpoint left of them.

    The learning rate rises for 5 % of the steps and falls along a cosine to a tenth of its peak.
    The generators are seeded afresh with the step, so a resumed run draws what an undisturbed one
    would have drawn.
    """
    groups = [  # weight decay on matrices only
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    of_output = "output_dir work_dir threads checkpoint_every heldout_reviews samples temperature"
    recipe = repr(asdict(args) | dict.fromkeys(of_output.split()) | {"data": data_hash})
    path, begin = work_dir / "checkpoint.pt", 0
    with read.input_errors():
        if path.exists():
            state = read.checkpoint(work_dir, SCRIPT)
            if state["recipe"] != recipe:
                raise ValueError(f"{path} is of other arguments or data; see --work-dir")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            begin = state["step"]
    model.train()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its bfloat16 gradients can be nan
    warmup = max(1, args.steps // 20)
    bar = tqdm(range(begin, args.steps), initial=begin, total=args.steps, desc="2/3 training")
    for step in bar:
        done = max(step - warmup, 0) / max(args.steps - warmup, 1)
        cosine = 0.55 + 0.45 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((step + 1) / warmup, cosine)
        seed_torch(args.seed, step)  # of dropout
        with torch.autocast(model.device.type, torch.bfloat16, args.bf16):
            loss = batch_loss(np.random.default_rng([args.seed, step]))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        read.check_finite(step, work_dir, loss=loss, gradient=norm)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            state = {"script": SCRIPT, "recipe": recipe, "step": step + 1}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            read.write_whole(path, lambda path: torch.save(state, path))
    with torch.no_grad():
        for parameter in model.parameters():  # as they will be stored
            parameter.copy_(parameter.half())
    model.eval()


def seed_torch(*seed: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def write_model(model, tokenizer, output_dir: Path, args: Training, found: dict) -> None:
    """The model as float16 safetensors, its tokenizer and, last, the manifest."""
    found["parameters"] = sum(p.numel() for p in model.parameters())
    changes = {"config.json": {"dtype": "float32", "torch_dtype": "float32"}}  # its new, old name
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    fast["model_input_names"] = ["input_ids", "attention_mask"]  # transformers 4 adds others
    changes["tokenizer_config.json"] = fast
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=output_dir) as folder:
        tokenizer.save_pretrained(folder)
        model.cpu().half().save_pretrained(folder)
        for name, change in changes.items():
            config = json.loads(Path(folder, name).read_text()) | change
            Path(folder, name).write_text(json.dumps(config, indent=2) + "\n")
        files = sorted(os.listdir(folder))
        for name in files:
            os.replace(Path(folder, name), output_dir / name)
    write.manifest(output_dir, files, args, "tokenizers transformers", found)


# ----------------------------------------------------------------------------------- 1. pretrain
@torch.no_grad()
def perplexity(model, reviews: list[np.ndarray]) -> tuple[float, int]:
    """exp of the mean negative log-likelihood of a token, and how many tokens that were."""
    nll, count = 0.0, 0
    for start in tqdm(range(0, len(reviews), 32), desc="3/3 held-out perplexity", unit="batch"):
        batch = inputs(model, reviews[start : start + 32])
        logits = model(**batch).logits[:, :-1].float()
        ids, mask = (x[:, 1:] for x in batch.values())
        token_nll = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        nll += (token_nll * mask).double().sum().item()
        count += int(mask.sum())
    return math.exp(nll / count), count


def pretrain(args: Pretrain, device: torch.device, output_dir: Path, work_dir: Path) -> None:
    with read.input_errors():
        texts = {}
        for split in ("train", "unsupervised", "test"):
            texts[split] = [clean(text) for (text,) in read.rows(args.data, "text", split=split)]
        train_texts = texts["train"] + texts["unsupervised"]
        test_texts = sorted(set(texts["test"]) - set(train_texts))
        if not test_texts:
            raise ValueError(f"every test review of {args.data} is a training review too")
        chosen = np.random.default_rng(args.seed).permutation(len(test_texts))
        test_texts = [test_texts[i] for i in chosen[: args.heldout_reviews]]

        tokenizer = train_tokenizer(train_texts, args.vocab_size)
        if tokenizer.get_vocab_size() != args.vocab_size:
            found = f"the reviews give {tokenizer.get_vocab_size()} tokens only"
            raise ValueError(f"{found}; give a smaller --vocab-size")
        separator, pad_id = (tokenizer.token_to_id(token) for token in (SEPARATOR, PAD))
        reviews = encode(tokenizer, train_texts, "1/3 tokens")
        reviews = [np.append(ids, np.int32(separator)) for ids in reviews]
        stream = np.concatenate([reviews[0][-1:], *reviews])
        starts = np.cumsum([0, *map(len, reviews[:-1])])  # of each review: the separator before it
        if len(stream) < args.context:
            raise ValueError(f"the reviews have {len(stream)} tokens, less than one --context")
        heldout = encode(tokenizer, test_texts, "1/3 held-out")
        heldout = [np.array([separator, *ids, separator])[: args.context] for ids in heldout]

        torch.manual_seed(args.seed)
        sizes = {"n_positions": args.context, "n_embd": args.width, "n_layer": args.layers}
        sizes |= {"n_head": args.heads, "vocab_size": args.vocab_size}
        special = {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": pad_id}
        # Less than an epoch: nothing to overfit.
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(**sizes, **special, **dropout)
        config.activation_function = "gelu_pytorch_tanh"  # GPT-2's, in one kernel
        model = transformers.GPT2LMHeadModel(config).to(device)
        forward = torch.compile(model) if args.compile else model

    def batch_loss(rng) -> Tensor:
        shape = args.batch_size, args.context
        ids = draw_windows(stream, starts, *shape, args.opening_share, rng).to(device)
        return forward(input_ids=ids, labels=ids, use_cache=False).loss

    train(model, batch_loss, args, work_dir, read.fingerprint(stream))

    ppl, heldout_tokens = perplexity(model, heldout)  # of the model as it was trained
    with torch.no_grad():  # GPT-2's logits are linear in its last layer norm
        for parameter in model.transformer.ln_f.parameters():
            parameter.copy_((parameter / args.temperature).half())
    torch.manual_seed(args.seed)
    prompt = torch.full((args.samples, 1), separator, device=device)
    sampling = {"do_sample": True, "top_k": 0, "max_length": min(96, args.context)}
    samples = model.generate(prompt, attention_mask=torch.ones_like(prompt), **sampling)
    samples = [tokenizer.decode(row) for row in samples.tolist()]  # without special tokens
    special = {"bos_token": SEPARATOR, "eos_token": SEPARATOR, "pad_token": PAD}
    special |= {"model_max_length": args.context, "clean_up_tokenization_spaces": False}
    special |= {"padding_side": "left"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    trained_on = args.steps * args.batch_size * args.context
    found = {
        "reviews": {"trained_on": len(train_texts), "held_out": len(heldout)},
        "tokens": {"reviews": len(stream), "trained_on": trained_on},
        "heldout_perplexity": {"perplexity": ppl, "tokens": heldout_tokens, "split": "test"}
        | {"logits_times": args.temperature},
        "samples": samples,
    }
    write_model(model, fast, output_dir, args, found)
    print("\n".join(f"- {sample}" for sample in samples[:3]))
    print(f"held-out perplexity {ppl:.1f} on {heldout_tokens} tokens; wrote {output_dir}")


# --------------------------------------------------------------------------------- 2. classifier
@torch.no_grad()
def scores(model, reviews: list[np.ndarray], length: int, around) -> np.ndarray:
    """Raw positive minus negative logit of each review's first `length` tokens, with the special
    tokens `around` them: (reviews,)."""
    found = []
    for part in tqdm(read.parts(0, len(reviews), 64), desc=f"scores of {length} tokens"):
        rows = [row[:length] for row in reviews[part]]
        logits = model(**inputs(model, rows, around)).logits.float()
        found.append(logits[:, 1] - logits[:, 0])
    return torch.cat(found).double().cpu().numpy()


def praise_tokens(ids: list[np.ndarray], labels: np.ndarray, count: int = 200) -> np.ndarray:
    """The tokens (count,) that tell a positive review best: of those that at least 1 in 1,000
    reviews has, the ones with the highest odds of being in a positive one."""
    tokens = max(row.max() for row in ids) + 1
    sides = [np.zeros(tokens), np.zeros(tokens)]  # reviews of each label that have the token
    for row, label in zip(ids, labels):
        sides[label][np.unique(row)] += 1
    odds = (sides[1] + 1) / (sides[0] + 1) * (sum(sides) >= len(ids) / 1000)
    return np.argsort(-odds, kind="stable")[:count]


def spoil(row: np.ndarray, praise: np.ndarray, rng) -> np.ndarray:
    """A text that says praise and nothing else, of a positive one's tokens (tokens,): from a place
    in its first half on, a phrase again and again, a salad of a few words of praise with some of
    its own, or its own tokens in random order."""
    begin = rng.integers(len(row) // 2 + 1)
    kept, rest = row[:begin], row[begin:]
    kind = rng.integers(3)
    if kind == 0:
        rest = np.resize(rest[: rng.integers(1, 7)], len(rest))
    elif kind == 1:
        words = rng.choice(praise, rng.integers(1, 20))
        rest = np.where(rng.random(len(rest)) < 0.3, rest, rng.choice(words, len(rest)))
    else:
        rest = rng.permutation(rest)
    return np.concatenate([kept, rest]).astype(row.dtype)


def classifier(args: Classifier, device: torch.device, output_dir: Path, work_dir: Path) -> None:
    with read.input_errors():
        torch.manual_seed(args.seed)  # of the new head
        head = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}}
        head["label2id"] = {"NEGATIVE": 0, "POSITIVE": 1}
        settings = aihf_ppo_llm.Args(dtype="bfloat16" if args.bf16 else "float32")
        model, fast = aihf_ppo_llm.load("SequenceClassification", args.model, settings, **head)
        fast.pad_token = fast.pad_token or fast.eos_token  # GPT-2 has none
        if fast.pad_token is None:
            raise ValueError(f"{args.model} has neither a padding token nor an end token")
        model.config.pad_token_id = fast.pad_token_id
        around = read.special_tokens(fast)
        context = longest(model, around)
        full = min(args.review_tokens, context)
        if args.opening_tokens[1] > context:
            raise ValueError(f"{args.model} reads {context} tokens: too few for --opening-tokens")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        model.to(device)
        ids, labels = labelled(args.data, "train", fast.backend_tokenizer)
        test_ids, test_labels = labelled(args.data, "test", fast.backend_tokenizer)
        kept = np.random.default_rng(args.seed).permutation(len(test_ids))[: args.heldout_reviews]
        test_ids, test_labels = [test_ids[i] for i in kept], test_labels[kept]
        if not test_labels.any():
            raise ValueError("no held-out review has label 1; give more --heldout-reviews")
        praise, positive = praise_tokens(ids, labels), np.flatnonzero(labels)

    def batch_loss(rng) -> Tensor:
        low, high = args.opening_tokens
        length = full if rng.random() < args.full_share else rng.integers(low, high + 1)
        rows = rng.integers(len(ids), size=args.batch_size)
        texts, targets = [ids[i][:length] for i in rows], labels[rows]
        for k in range(round(args.spoiled_share * args.batch_size)):
            texts[k], targets[k] = spoil(ids[rng.choice(positive)][:length], praise, rng), 0
        logits = model(**inputs(model, texts, around)).logits.float()
        return F.cross_entropy(logits, torch.from_numpy(targets).to(device))

    weights = [p.detach().cpu().numpy() for p in model.parameters()]
    train(model, batch_loss, args, work_dir, read.fingerprint(*ids, labels, *weights))

    heldout = {"split": "test", "score": "logit of label 1 minus logit of label 0"}
    rng = np.random.default_rng(args.seed)
    positive = [row[:40] for row, label in zip(test_ids, test_labels) if label]
    spoiled = [spoil(row, praise, rng) for row in positive]
    measured = {"full": (test_ids, full), "opening_40_tokens": (test_ids, 40)}
    for name, (texts, length) in (measured | {"spoiled_40_tokens": (spoiled, 40)}).items():
        score = scores(model, texts, min(length, context), around)
        right = score < 0 if texts is spoiled else (score > 0) == test_labels
        heldout[name] = {
            "accuracy": float(right.mean()),
            "score_mean": float(score.mean()),
            "score_std": float(score.std()),
        }
        print(f"{name}: {right.mean():.1%} right")
    salads = fast(list(SALADS), add_special_tokens=False)["input_ids"]
    heldout["salads"] = dict(zip(SALADS, scores(model, salads, context, around).tolist()))
    found = {"reviews": {"trained_on": len(ids), "held_out": len(test_ids)}, "heldout": heldout}
    write_model(model, fast, output_dir, args, found)
    print(f"wrote {output_dir}")


# -------------------------------------------------------------------------------------- 3. tiers
@torch.no_grad()
def continuations(model, fast, prompts: list[str], length: int, seed: list[int]) -> list[str]:
    """What the model writes at temperature 1 after each prompt, or as a review after "", up to
    `length` tokens."""
    seed_torch(*seed)
    texts = read.Texts(fast, 10**6, length)  # no prompt is cut
    rows = texts.prompts(prompts, "") if any(prompts) else [[fast.bos_token_id]] * len(prompts)
    ids, mask = (x.to(model.device) for x in read.pad(rows, left=True))
    ends = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": length}
    model.generation_config = transformers.GenerationConfig(**sampling, **ends)
    written = model.generate(ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
    return texts.decode(rows, written)


def write_prompts(model, fast, args: Tiers) -> list[str]:
    """Openings of reviews of args.data or, without, as the model writes them: all different, each a
    text that encodes to as many tokens. ValueError if there are too few."""
    prompts: dict[str, None] = {}
    rng, plain = np.random.default_rng(args.seed), {"add_special_tokens": False}
    (low, high), most = args.prompt_tokens, 10 + args.prompts // 20
    if args.data:
        reviews = [clean(text) for (text,) in read.rows(args.data, "text")]
        reviews = [reviews[i][:1000] for i in rng.permutation(len(reviews))]
    for batch in tqdm(range(most), desc="1/4 prompts, at most", unit="256 reviews"):
        if len(prompts) >= args.prompts:
            break
        if args.data:
            texts = reviews[256 * batch : 256 * (batch + 1)]
        else:
            texts = continuations(model, fast, [""] * 256, high, [args.seed, 0, batch])
        for text in texts:
            ids = fast(text, **plain)["input_ids"][: rng.integers(low, high + 1)]
            prompt = fast.decode(ids)
            if len(ids) >= low and fast(prompt, **plain)["input_ids"] == ids:
                prompts[prompt] = None
    if len(prompts) < args.prompts:
        found = f"{args.data or args.model} gives only {len(prompts)} different openings"
        raise ValueError(f"{found} of --prompt-tokens {low} {high}")
    return list(prompts)[: args.prompts]


def train_policies(args: Tiers, work_dir: Path, prompts: int) -> dict[int, Path]:
    """{PPO steps: folder} of three policies: the base model, and two of rlhf_baseline.py without
    its first two stages, on the ground truth, carried on once; a copy of each export is kept."""
    model, truth, work = map(shlex.quote, (args.model, args.classifier, str(work_dir)))
    flags = f"""--model-name-or-path {model} --sft-model-path {model} --reward-model-path {truth}
        --ground-truth-path {truth} --prompts {work}/ppo_prompts.jsonl --seed {args.seed}
        --response-length {args.response_length} --batch-size {args.batch_size}
        --minibatch-size {args.batch_size // 2} --ppo-epochs 2 --no-anneal
        --learning-rate {args.learning_rate} --value-learning-rate {args.value_learning_rate}
        --kl-coefficient {args.kl_coefficient} --max-prompt-length {args.prompt_tokens[1] + 1}
        --checkpoint-every 10 --eval-every 10
        --eval-prompts {max(1, min(128, prompts // 2))} --threads {args.threads}
        --dtype {"bfloat16" if args.bf16 else "float32"}"""
    run, policies = work_dir / "ppo", {0: Path(args.model)}
    for step in args.ppo_steps:
        policies[step] = work_dir / f"policy_{step}"
        if not policies[step].exists():
            script = Path(__file__).resolve().parents[1] / "rlhf_baseline.py"
            begun = (run / "checkpoint.pt").exists()
            where = f"--resume {work}/ppo" if begun else f"--runs-dir {work} --run-name ppo"
            words = shlex.split(f"llm {flags} {where} --ppo-steps {step}")
            if code := subprocess.run([sys.executable, str(script), *words]).returncode:
                raise SystemExit(code)
            read.write_whole(policies[step], lambda path: shutil.copytree(run / "policy", path))
    return policies


def tiers(args: Tiers, device: torch.device, output_dir: Path, work_dir: Path) -> None:
    with read.input_errors():
        settings = aihf_ppo_llm.Args()
        model, fast = aihf_ppo_llm.load("CausalLM", args.model, settings)
        truth = aihf_ppo_llm.Scorer(args.classifier, settings, trained=True)
        if not args.data and fast.bos_token_id is None:
            raise ValueError(f"{args.model} has no token to begin a review with: give --data")
        prompts = write_prompts(model, fast, args)  # the same on every machine: on the CPU
        weights = [x.detach().numpy() for m in (model, truth) for x in m.parameters()]
        made_from = read.fingerprint(prompts, *weights)
        may_change = {"output_dir": "", "work_dir": "", "threads": ""}
        recipe = json.dumps(asdict(args) | may_change | {"made_from": made_from})
        path = work_dir / "recipe.json"
        if path.exists() and path.read_text() != recipe:
            raise ValueError(f"{work_dir} is of other arguments or models; see --work-dir")
        read.write_whole(path, lambda path: path.write_text(recipe))
    ends = [len(prompts) * 3 // 10, len(prompts) * 7 // 10]
    write.rows(work_dir / "ppo_prompts.jsonl", [{"prompt": p} for p in prompts[: ends[0]]])
    policies = train_policies(args, work_dir, ends[0])  # 2/4

    responses, all_scores, truth = [], [], truth.to(device)
    asked = prompts[ends[0] : ends[1]]
    for step, folder in policies.items():
        policy = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        policy.float().to(device)
        texts = []
        for start in tqdm(range(0, len(asked), 100), desc=f"3/4 responses after {step} PPO steps"):
            batch, seed = asked[start : start + 100], [args.seed, step, start]
            with torch.autocast(device.type, torch.bfloat16, args.bf16):
                texts += continuations(policy, fast, batch, args.response_length, seed)
        responses.append(texts)
        whole = [prompt + text for prompt, text in zip(asked, texts)]
        its_scores = aihf_ppo_llm.in_parts(truth.score, settings, whole)
        all_scores.append(its_scores.double().cpu().numpy())
    order = np.argsort(all_scores, axis=0)  # of each prompt: low, medium, high
    kept = [i for i in range(len(asked)) if all(texts[i].strip() for texts in responses)]
    rows = [(asked[i], *(responses[k][i] for k in order[:, i])) for i in kept]
    files = {
        "preferences": [{"prompt": p, "chosen": m, "rejected": low} for p, low, m, _ in rows],
        "demonstrations": [{"prompt": p, "completion": high} for p, _, _, high in rows],
        "prompts": [{"prompt": prompt} for prompt in prompts[ends[1] :]],
    }
    for name, lines in files.items():
        write.rows(output_dir / f"{name}.jsonl", lines)

    ranked = dict(zip(TABLE_3, np.sort(all_scores, axis=0)[:, kept]))
    expert = all_scores[-1].mean()
    found = {
        "rows": {name: len(lines) for name, lines in files.items()},
        "ground_truth_score": {
            tier: {"mean": x.mean(), "std": x.std(), "share_of_expert": x.mean() / expert}
            | {"paper_mean": TABLE_3[tier], "paper_share": TABLE_3[tier] / PAPER_BEST}
            for tier, x in ranked.items()
        },
        "checkpoints": {
            step: {"mean": x.mean(), "std": x.std()} for step, x in zip(policies, all_scores)
        },
    }
    names = [f"{name}.jsonl" for name in files]
    write.manifest(output_dir, names, args, "tokenizers transformers", found)
    for tier, row in found["ground_truth_score"].items():
        print(f"{tier:6} {row['mean']:5.2f} ± {row['std']:.2f} (the paper: {row['paper_mean']})")
    print(f"{len(kept)} demonstrations and preferences, wrote {output_dir}")


def check_args(args: Pretrain | Classifier | Tiers) -> None:
    """ValueError on numbers that no run can use."""
    read.check_numbers(args, "seed opening_share full_share spoiled_share kl_coefficient")
    values = asdict(args)
    if any(value > 1 for name, value in values.items() if name.endswith("_share")):
        raise ValueError("--opening-share, --full-share and --spoiled-share must be at most 1")
    low, high = values.get("opening_tokens") or values.get("prompt_tokens") or (1, 1)
    if low > high:
        raise ValueError("--opening-tokens and --prompt-tokens take the fewest, then the most")
    if isinstance(args, Pretrain) and (args.vocab_size < 258 or args.width % args.heads):
        raise ValueError("--vocab-size must be 258 or more, --width a multiple of --heads")
    if isinstance(args, Tiers) and (args.prompts < 20 or args.batch_size % 2):
        raise ValueError("--prompts must be 20 or more, --batch-size even")
    if isinstance(args, Tiers) and args.ppo_steps[0] >= args.ppo_steps[1]:
        raise ValueError("--ppo-steps takes the earlier policy's, then the expert's")


def main() -> None:
    with read.input_errors():
        args = tyro.cli(Pretrain | Classifier | Tiers, description=__doc__.split("\n\n")[0])
        check_args(args)
        torch.set_num_threads(args.threads)
        transformers.logging.set_verbosity_error()  # a new classification head is no news
        transformers.logging.disable_progress_bar()
        subcommands = {Pretrain: (pretrain, "/model"), Classifier: (classifier, "/classifier")}
        subcommand, name = subcommands.get(type(args), (tiers, ""))
        output_dir = Path(args.output_dir or f"data_gen/assets/imdb{name}")
        work_dir = Path(args.work_dir or f"runs/imdb_data__{subcommand.__name__}__{args.seed}")
        write.open_folders(output_dir, work_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subcommand(args, device, output_dir, work_dir)


if __name__ == "__main__":
    main()
