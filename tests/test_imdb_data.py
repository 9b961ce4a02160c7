"""data_gen/imdb_data.py: tiny models of made-up reviews and their tiers by the real command, kills
and bad arguments; and the assets.

python -m pytest tests/test_imdb_data.py
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import helpers
import imdb_data
import numpy as np
import pytest
import torch
import transformers
import tyro

import rlhf_baseline
from data_gen import read

ASSETS = helpers.ROOT / "data_gen" / "assets" / "imdb"
FLAGS = {  # of each subcommand
    "pretrain": {"vocab_size": 300, "context": 32, "width": 16, "layers": 1, "heads": 2}
    | {"steps": 40, "batch_size": 8, "heldout_reviews": 40, "samples": 2, "learning_rate": 0.01},
    "classifier": {"steps": 100, "batch_size": 16, "heldout_reviews": 60, "learning_rate": 0.01}
    | {"opening_tokens": (6, 12)},
    "tiers": {"prompts": 40, "response_length": 8, "ppo_steps": (5, 10), "batch_size": 4},
}
WORDS = "film plot actor scene story camera music end role joke".split()


def make_reviews(folder: Path) -> Path:
    """Random words; a positive review has `great` in every other place, a negative one `awful`.
    Test reviews are ten of the training's and others."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for split, count in (("train", 200), ("test", 80), ("unsupervised", 50)):
        rows = rows[:10] if split == "test" else []
        for i in range(count):
            mood = ("awful", "great")[i % 2]
            words = [word for w in rng.choice(WORDS, rng.integers(10, 40)) for word in (w, mood)]
            words[len(words) // 2] += ".<br /><br />Well,"
            rows.append({"text": " ".join(words), "label": -1 if split[0] == "u" else i % 2})
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def execute(subcommand: str, folder: Path, **flags) -> tuple[int, str, str]:
    """The script, writing into folder/out and folder/work: (exit code, out, err)."""
    folder.mkdir(exist_ok=True)
    given = {"output_dir": folder / "out", "work_dir": folder / "work", "threads": 1}
    given |= {} if subcommand == "tiers" else {"checkpoint_every": 10}
    words = [subcommand]
    for name, value in (given | FLAGS[subcommand] | flags).items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return helpers.run_script(imdb_data, words, folder)


def make(subcommand: str, folder: Path, **flags) -> Path:
    """A tiny model, or tiers; returns its folder."""
    result = execute(subcommand, folder, **flags)
    assert result[0] == 0, result
    return folder / "out"


def files_of(folder: Path) -> dict[str, bytes]:
    """All files, whose hashes are in the manifest, but for this."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name in manifest["sha256"]}
    assert manifest["sha256"] == {n: hashlib.sha256(raw).hexdigest() for n, raw in files.items()}
    return files


@torch.no_grad()
def score(judge, ids) -> float:
    """Of a text's first 32 tokens."""
    negative, positive = judge(torch.tensor([list(ids)[:32]])).logits[0].tolist()
    return positive - negative


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_reviews(tmp_path_factory.mktemp("data") / "reviews")


@pytest.fixture(scope="module")
def model(tmp_path_factory, data) -> Path:
    """A language model made without disturbance; read only."""
    return make("pretrain", tmp_path_factory.mktemp("model"), data=data)


@pytest.fixture(scope="module")
def judge(tmp_path_factory, data, model) -> Path:
    return make("classifier", tmp_path_factory.mktemp("judge"), data=data, model=model)


# ------------------------------------------------------------------------ model and classifier
def test_language_model_loads(model):
    """With the Auto classes and no argument: float32, tied, pad and end distinct, text that comes
    back."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert network.dtype == torch.float32 and network.config.model_type == "gpt2"
    assert network.config.n_positions == tokenizer.model_max_length == 32
    assert (network.config.n_embd, network.config.n_layer, network.config.n_head) == (16, 1, 2)
    assert network.config.vocab_size == len(tokenizer) == 300
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (network.config.pad_token_id, network.config.eos_token_id) == (0, 1)
    assert network.config.activation_function == "gelu_pytorch_tanh"
    text = "A film, naïve\nand  awful ☃ <|endoftext|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(["a film", "a"], padding=True)["input_ids"][1][0] == 0  # padded on the left
    assert not {"<br", "br"} & set(tokenizer.get_vocab())
    assert b"F16" in (model / "model.safetensors").read_bytes()[:20_000]
    assert not [path for path in model.iterdir() if path.name.startswith(".")]
    texts = [f"film {i}" for i in range(1001)]
    assert tokenizer.batch_decode(imdb_data.encode(tokenizer.backend_tokenizer, texts, "")) == texts


def test_language_model_manifest(model, data):
    """The perplexity at the temperature of training, from the stored files, review by review."""
    assert len(files_of(model)) == len(list(model.iterdir())) - 1
    manifest = json.loads((model / "manifest.json").read_text())
    assert manifest["seed"] == 1 and manifest["reviews"] == {"trained_on": 250, "held_out": 40}
    assert manifest["arguments"]["data"] == str(data) and manifest["arguments"]["width"] == 16
    assert set(manifest["versions"]) == {"python", "numpy", "tokenizers", "torch", "transformers"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert manifest["parameters"] == sum(p.numel() for p in network.parameters())
    test, train = (read.rows(str(data), "text", split=split) for split in ("test", "train"))
    texts = sorted(imdb_data.clean(text) for (text,) in set(test) - set(train))
    nll, count = 0.0, 0
    with torch.no_grad():
        for i in np.random.default_rng(1).permutation(len(texts))[:40]:
            ids = torch.tensor([[1, *tokenizer(texts[i])["input_ids"], 1][:32]])
            logits = network(ids).logits[0, :-1] * 0.7
            nll += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    found = manifest["heldout_perplexity"]
    assert found["tokens"] == count and found["perplexity"] < 100  # of 300 tokens
    assert found["perplexity"] == pytest.approx(np.exp(nll / count), rel=1e-4)
    assert len(manifest["samples"]) == 2 and not any("<|" in text for text in manifest["samples"])


def test_classifier_loads_and_manifest(judge, data):
    files_of(judge)
    manifest = json.loads((judge / "manifest.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(judge).eval()
    assert network.dtype == torch.float32
    assert network.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    ids, labels = imdb_data.labelled(str(data), "test", tokenizer.backend_tokenizer)
    texts = [imdb_data.clean(text) for (text,) in read.rows(str(data), "text", split="test")]
    assert tokenizer.batch_decode(ids) == texts
    assert labels.tolist() == ["great" in text for text in texts]
    kept = np.random.default_rng(1).permutation(len(ids))[:60]
    for name in ("full", "opening_40_tokens"):  # of which the model reads 32
        found = np.array([score(network, ids[i]) for i in kept])
        row = manifest["heldout"][name]
        assert row["accuracy"] == pytest.approx(((found > 0) == labels[kept]).mean())
        assert row["score_mean"] == pytest.approx(found.mean(), abs=1e-3)
        assert row["accuracy"] > 0.9  # the words tell
    salads = tokenizer(list(imdb_data.SALADS))["input_ids"]
    found = dict(zip(imdb_data.SALADS, (score(network, row) for row in salads)))
    assert manifest["heldout"]["salads"] == pytest.approx(found, abs=1e-3)


def test_praise_is_what_positive_reviews_have():
    ids = [np.array(row) for row in ([2, 2, 2, 9], [2, 3, 9], [3, 4, 9], [4, 4, 9])]
    praise = imdb_data.praise_tokens(ids, np.array([1, 1, 0, 0]), 3)
    assert praise.tolist() == [2, 3, 9]  # in 2 and 0, in 1 and 1, in 2 and 2 reviews
    rare = [np.array([5])] + [np.array([6])] * 4000  # once in 4,001 reviews is chance
    assert imdb_data.praise_tokens(rare, np.array([1] + [0] * 4000), 1).tolist() == [6]


def test_spoiled_texts():
    """The first tokens stay; the rest is a loop, a salad of praise, or in another order."""
    row, praise, rng = np.arange(40, dtype=np.int32), np.arange(100, 200), np.random.default_rng(0)
    kinds, begins, own_share = {"loop": 0, "salad": 0, "shuffled": 0}, [], []
    for _ in range(600):
        text = imdb_data.spoil(row, praise, rng)
        assert text.shape == row.shape and text.dtype == row.dtype
        begins.append(int(np.argmax(np.append(text != row, True))))  # as far as it is as it was
        if (text >= 100).any():
            kinds["salad"] += 1
            own = text[text < 100]
            own_share.append((text[20:] < 100).mean())
            assert set(own) <= set(row) and len(set(text[text >= 100])) < 20
        elif len(set(text)) < 40:
            kinds["loop"] += 1
            assert any((text[begins[-1] :] == text[begins[-1] - n : -n]).all() for n in range(1, 7))
        else:
            kinds["shuffled"] += 1
            assert sorted(text) == sorted(row)
    assert min(kinds.values()) > 150, kinds
    assert np.mean(np.array(begins) > 26) < 0.02  # in the first half, or after a loop's phrase
    assert np.mean(own_share) == pytest.approx(0.3, abs=0.03)
    assert imdb_data.spoil(row[:1], praise, rng).shape == (1,)


def test_a_judge_learns_what_spoiled_texts_are(tmp_path, data, model):
    flags = {"data": data, "model": model, "steps": 400}
    accuracy = {}
    for share in (0.0, 0.3):
        folder = make("classifier", tmp_path / str(share), **flags, spoiled_share=share)
        heldout = json.loads((folder / "manifest.json").read_text())["heldout"]
        accuracy[share] = heldout["spoiled_40_tokens"]["accuracy"]
        assert heldout["full"]["accuracy"] > 0.85
    assert accuracy[0.3] > accuracy[0.0] + 0.2, accuracy


def test_an_encoder_can_be_the_judge(tmp_path, data):
    """A text stands between its special tokens, in the scores as for the scripts."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "great", "awful", ".", ",", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 22, "intermediate_size": 16, "vocab_size": len(words)}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    folder = make("classifier", tmp_path, data=data, model=tmp_path / "bert", review_tokens=10)
    heldout = json.loads((folder / "manifest.json").read_text())["heldout"]
    assert heldout["full"]["accuracy"] > 0.85 and heldout["full"] != heldout["opening_40_tokens"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    around = read.special_tokens(tokenizer)
    assert around == ([2], [3]) and imdb_data.longest(network, around) == 20
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**sizes, pad_token_id=1))
    assert imdb_data.longest(roberta, around) == 18  # its first two positions are never used
    texts = ["great film great plot", "awful role"] * 35  # more than are scored at a time
    texts[-1] = "great great role"
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    right = [score(network, row) for row in tokenizer(texts)["input_ids"]]
    np.testing.assert_allclose(imdb_data.scores(network, ids, 20, around), right, atol=1e-5)


def test_what_a_model_without_a_padding_token_reads(tmp_path, monkeypatch, data, model):
    """As GPT-2 is: padded with the end token, which is 1; nine of ten batches are whole reviews.
    And it trains with dropout, and spoils texts with praise."""
    folder = shutil.copytree(model, tmp_path / "gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    inputs, read_by = imdb_data.inputs, []
    monkeypatch.setattr(imdb_data, "inputs", lambda *x: read_by.append(inputs(*x)) or read_by[-1])
    train, trained = imdb_data.train, []
    monkeypatch.setattr(imdb_data, "train", lambda *x: trained.append(x[0]) or train(*x))
    spoil, spoiled = imdb_data.spoil, []
    monkeypatch.setattr(imdb_data, "spoil", lambda *x: spoiled.append(x[1]) or spoil(*x))
    made = make("classifier", tmp_path, data=data, model=folder, steps=50, full_share=0.9)
    config = json.loads((made / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.eos_token_id
    assert {module.p for module in trained[0].modules() if hasattr(module, "p")} == {0.1}
    great = tokenizer("a great")["input_ids"][-1]
    assert spoiled[0][0] == great
    padding = torch.cat([x["input_ids"][x["attention_mask"] == 0] for x in read_by])
    assert len(padding) and (padding == 1).all()
    widths = [x["input_ids"].shape[1] for x in read_by[:50]]
    assert 38 < sum(width > 12 for width in widths) < 50 and len({*widths} & {*range(4, 13)}) > 1


@pytest.mark.parametrize("subcommand", ["pretrain", "classifier"])
def test_killed_and_run_again(tmp_path, monkeypatch, data, model, judge, subcommand):
    """Stopped with half a checkpoint written: the same weights, byte by byte."""
    source = shutil.copytree(data if subcommand == "pretrain" else model, tmp_path / "source")
    flags = {"data": data} | {"data" if subcommand == "pretrain" else "model": source}
    save, calls = torch.save, []

    def half(state, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(state, path)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        make(subcommand, tmp_path, **flags)
    monkeypatch.setattr(torch, "save", save)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert helpers.load(tmp_path / "work")["step"] == 10
    whole = files_of(model if subcommand == "pretrain" else judge)
    for count in (40, 30):  # the second time, of the finished training
        assert files_of(make(subcommand, tmp_path, **flags, heldout_reviews=count)) == whole
    helpers.assert_one_line_error(execute(subcommand, tmp_path, **flags, seed=2), "other arguments")
    if subcommand == "pretrain":
        shutil.copy(source / "unsupervised.jsonl.gz", source / "train.jsonl.gz")
    else:
        shutil.copy(judge / "model.safetensors", source)
    helpers.assert_one_line_error(execute(subcommand, tmp_path, **flags), "other arguments or data")
    if subcommand == "classifier":
        shutil.copy(model / "model.safetensors", source)
        flags["data"] = shutil.copytree(data, tmp_path / "other")
        shutil.copy(data / "test.jsonl.gz", flags["data"] / "train.jsonl.gz")
        result = execute(subcommand, tmp_path, **flags)
        helpers.assert_one_line_error(result, "other arguments or data")
    (tmp_path / "work" / "checkpoint.pt").write_bytes(b"half")
    helpers.assert_one_line_error(execute(subcommand, tmp_path, **flags), "damaged")


@pytest.mark.parametrize("bf16", [False, True])
def test_training(tmp_path, monkeypatch, bf16):
    """The rate, decay, clipping, dropout and random numbers; no step that is not finite."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Dropout(0.5))
    model.device, (weight, bias) = torch.device("cpu"), model.parameters()
    args = imdb_data.Classifier(steps=40, learning_rate=0.1, checkpoint_every=39, bf16=bf16)
    bad = {"loss": lambda _: bias.sum() / 0, "gradient": lambda _: (0 * bias).sqrt().sum()}
    for name, loss in bad.items():
        with pytest.raises(SystemExit, match=f"error: {name} is not finite at step 0"):
            imdb_data.train(model, loss, args, tmp_path, "")
    assert not list(tmp_path.iterdir()) and bias.isfinite().all()
    drawn, rates, norms, seen = [], [], [], {}

    def batch_loss(rng):
        out = model(torch.ones(100))
        drawn.append((rng.random(), (out == 0).sum().item(), out.dtype))
        return 1000 * out.float().square().sum()

    def step(optimizer, plain=torch.optim.AdamW.step):
        groups = optimizer.param_groups
        rates.append([g["lr"] for g in groups])
        norms.append(weight.grad.norm().hypot(bias.grad.norm()).item())
        seen.update({p.dim(): (g["weight_decay"], g["betas"]) for g in groups for p in g["params"]})
        plain(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    imdb_data.train(model, batch_loss, args, tmp_path, "")
    rates, same = np.transpose(rates)
    assert rates[[0, 1, 2, 21, 39]] == pytest.approx([0.05, 0.1, 0.1, 0.055, 0.01], rel=0.02)
    assert (rates == same).all() and norms == pytest.approx([1] * 40, rel=1e-3)
    assert seen == {2: (0.1, (0.9, 0.98)), 1: (0.0, (0.9, 0.98))}
    numbers, zeros, dtypes = zip(*drawn)
    assert len(set(numbers)) == 40 and set(dtypes) == {torch.bfloat16 if bf16 else torch.float32}
    assert len(set(zeros)) > 5 and 45 < np.mean(zeros) < 55
    assert not model.training and weight.equal(weight.half().float())


def test_windows(tmp_path, monkeypatch, data):
    """Every other window begins on a review's separator, which is 1, or right after it; all lie
    inside the stream."""
    stream, starts, rng = np.arange(1000), np.arange(0, 1000, 100), np.random.default_rng(0)
    windows = imdb_data.draw_windows(stream, starts, 4000, 30, 1.0, rng)
    assert windows.shape == (4000, 30) and (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == {s + k for s in starts.tolist() for k in (0, 1)}
    assert 0.46 < (windows[:, 0] % 100 == 0).float().mean() < 0.54
    anywhere = imdb_data.draw_windows(stream, starts, 40_000, 30, 0.0, rng)[:, 0]
    assert set(anywhere.tolist()) == set(range(971))
    half = imdb_data.draw_windows(stream, starts, 4000, 30, 0.5, rng)[:, 0]
    assert 0.47 < (half % 100 < 2).float().mean() < 0.54
    ids = imdb_data.draw_windows(np.arange(10), np.array([0, 8]), 100, 6, 1.0, rng)[:, 0]
    assert set(ids.tolist()) == {0, 1, 4}  # a review near the end is read in the last window
    given = []
    monkeypatch.setattr(imdb_data, "draw_windows", lambda *x: given.extend(x) or exit(3))
    assert execute("pretrain", tmp_path, data=data, opening_share=0.9)[0] == 3
    stream, starts, *numbers, _ = given
    assert numbers == [8, 32, 0.9] and len(starts) == 250
    assert starts.tolist() == np.flatnonzero(stream == 1)[:-1].tolist()


def test_clean():
    assert imdb_data.clean(" Good.<br /><br />Bad\n\n<BR>? <br/>  ") == "Good. Bad <BR>?"


# --------------------------------------------------------------------------------------- tiers
class FakePPO:
    """In place of rlhf_baseline.py, read as its flags: exports the model with other weights."""

    def __init__(self, model: Path):
        self.model, self.calls, self.fails_at = model, [], 0

    def __call__(self, command: list[str]):
        script, kind, *words = command[1:]
        assert Path(script).name == "rlhf_baseline.py" and Path(script).exists() and kind == "llm"
        before = self.calls[-1] if "--resume" in words else rlhf_baseline.LlmArgs()
        args = tyro.cli(rlhf_baseline.LlmArgs, default=before, args=words)
        self.calls.append(args)
        run = Path(args.resume or Path(args.runs_dir) / args.run_name)
        (run / "policy").mkdir(parents=True, exist_ok=True)
        (run / "checkpoint.pt").touch()
        if len(self.calls) == self.fails_at:
            return SimpleNamespace(returncode=130)
        policy = transformers.AutoModelForCausalLM.from_pretrained(self.model)
        with torch.no_grad():
            policy.transformer.ln_f.weight.mul_(1 + args.ppo_steps)
        policy.save_pretrained(run / "policy")
        return SimpleNamespace(returncode=0)


def test_tiers(tmp_path, monkeypatch, model, judge):
    """Of each prompt the responses of three policies, none of them blank, ranked by the classifier;
    PPO is begun and carried on; interrupted, the same command ends with the same files."""
    ppo, seeds, continuations = FakePPO(model), [], imdb_data.continuations
    base = transformers.AutoModelForCausalLM.from_pretrained(model).transformer.ln_f.weight
    scales, asked = [], []  # of the policies that write, and what they are asked

    def with_one_blank(*given):
        texts, (*_, prompts, _, seed) = continuations(*given), given
        assert torch.is_autocast_enabled("cpu") == any(prompts)  # prompts are in float32
        if any(prompts):
            seeds.append(seed)
            scales.append((given[0].transformer.ln_f.weight / base).mean().item())
            asked.append(prompts)
            texts[0] = " " if seed[1:] == [5, 100] else texts[0]
        return texts

    monkeypatch.setattr(subprocess, "run", ppo)
    monkeypatch.setattr(imdb_data, "continuations", with_one_blank)
    rates = {"learning_rate": 2e-4, "value_learning_rate": 4e-4, "kl_coefficient": 0.07}
    truth = shutil.copytree(judge, tmp_path / "truth")
    flags = {"model": model, "classifier": truth, "prompts": 260, "seed": 3, "bf16": True}
    flags |= rates
    folder, work = make("tiers", tmp_path / "a b", **flags), str(tmp_path / "a b" / "work")
    assert seeds == [[3, step, start] for step in (0, 5, 10) for start in (0, 100)]
    paths = {"model_name_or_path": model, "sft_model_path": model, "reward_model_path": truth}
    paths |= {"ground_truth_path": truth, "prompts": f"{work}/ppo_prompts.jsonl", "runs_dir": work}
    sizes = {"response_length": 8, "batch_size": 4, "minibatch_size": 2, "ppo_epochs": 2}
    sizes |= {"max_prompt_length": 13, "checkpoint_every": 10, "eval_every": 10, "eval_prompts": 39}
    sizes |= {"ppo_steps": 5, "seed": 3, "threads": 1, "run_name": "ppo", "anneal": False} | rates
    sizes["dtype"] = "bfloat16"
    begun = rlhf_baseline.LlmArgs(**{name: str(x) for name, x in paths.items()}, **sizes)
    assert ppo.calls == [begun, replace(begun, resume=f"{work}/ppo", ppo_steps=10)]

    rows = {path.stem: helpers.read_rows(path) for path in folder.glob("*.jsonl")}
    names = ("preferences", "demonstrations", "prompts")
    prompts = [row["prompt"] for row in rows["prompts"]]
    asked_of_ppo = [prompt for (prompt,) in read.rows(f"{work}/ppo_prompts.jsonl", "prompt")]
    tier_prompts = [row["prompt"] for row in rows["demonstrations"]]
    assert len(asked_of_ppo) == len(prompts) == 78 and 80 < len(tier_prompts) < 104
    assert len({*asked_of_ppo, *prompts, *tier_prompts}) == 156 + len(tier_prompts)
    words = transformers.AutoTokenizer.from_pretrained(model)
    assert {len(ids) for ids in words(asked_of_ppo)["input_ids"]} == {*range(4, 13)}
    assert scales == pytest.approx([1, 1, 6, 6, 11, 11])
    assert asked[:2] == asked[2:4] == asked[4:] and len(asked[0] + asked[1]) == 104
    assert {*tier_prompts} <= {*asked[0], *asked[1]}
    assert [row["prompt"] for row in rows["preferences"]] == tier_prompts

    network = transformers.AutoModelForSequenceClassification.from_pretrained(judge).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    scores = {"low": [], "medium": [], "high": []}
    for pair, best in zip(rows["preferences"], rows["demonstrations"]):
        texts = (pair["rejected"], pair["chosen"], best["completion"])
        assert all(text.strip() for text in texts)
        for tier, text in zip(scores, texts):
            scores[tier].append(score(network, tokenizer(pair["prompt"] + text)["input_ids"]))
    assert (np.diff(list(scores.values()), axis=0) >= -1e-4).all() and len(set(scores["low"])) > 5
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(files_of(folder)) and manifest["rows"] == {name: len(rows[name]) for name in names}
    assert list(manifest["checkpoints"]) == ["0", "5", "10"]
    expert = manifest["checkpoints"]["10"]["mean"]
    for tier, row in manifest["ground_truth_score"].items():
        assert row["mean"] == pytest.approx(np.mean(scores[tier]), abs=1e-3)
        assert row["std"] == pytest.approx(np.std(scores[tier]), abs=1e-3)
        assert row["paper_mean"] == {"low": 0.27, "medium": 1.13, "high": 2.23}[tier]
        assert row["share_of_expert"] == pytest.approx(row["mean"] / expert)
        assert row["paper_share"] == pytest.approx(row["paper_mean"] / 2.5)

    ppo.calls, ppo.fails_at = [], 2
    assert execute("tiers", tmp_path / "b", **flags)[0] == 130
    assert not list((tmp_path / "b" / "out").iterdir())
    assert files_of(make("tiers", tmp_path / "b", **flags)) == files_of(folder)
    assert [call.ppo_steps for call in ppo.calls] == [5, 10, 10] and ppo.calls[2].resume
    assert files_of(make("tiers", tmp_path / "b", **flags)) == files_of(folder)
    helpers.assert_one_line_error(execute("tiers", tmp_path / "b", **flags | {"seed": 2}), "other")
    network.score.weight.data.neg_()
    network.save_pretrained(truth)
    helpers.assert_one_line_error(execute("tiers", tmp_path / "b", **flags), "arguments or models")
    assert len(ppo.calls) == 3


def test_what_is_sampled_does_not_depend_on_a_models_own_settings(model):
    """Temperature 1, of all tokens, whatever generation_config.json and other prompts say."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    plain = imdb_data.continuations(network, tokenizer, WORDS, 6, [1])
    network.generation_config.temperature, network.generation_config.top_p = 0.01, 0.1
    assert imdb_data.continuations(network, tokenizer, WORDS, 6, [1]) == plain
    assert len(set(plain)) > 2 and max(map(len, tokenizer(plain)["input_ids"])) <= 6
    network.transformer.ln_f.weight.data.mul_(0.01)  # almost every token alike
    assert len(set(imdb_data.continuations(network, tokenizer, ["a"] * 400, 1, [1]))) > 60
    network.transformer.wte.weight.data.normal_()  # one is certain, by the token before it
    network.transformer.ln_f.weight.data.mul_(1e6)
    alone = [imdb_data.continuations(network, tokenizer, [x], 6, [1])[0] for x in WORDS]
    assert imdb_data.continuations(network, tokenizer, WORDS, 6, [1]) == alone
    generate, begun = network.generate, []
    network.generate = lambda ids, **others: begun.append(ids) or generate(ids, **others)
    imdb_data.continuations(network, tokenizer, ["", ""], 3, [1])
    assert begun[0].tolist() == 2 * [[tokenizer.bos_token_id]]


def test_prompts_of_real_reviews(tmp_path, monkeypatch, data, model, judge):
    monkeypatch.setattr(subprocess, "run", FakePPO(model))
    texts = [f"a<br /><br />{text}" for (text,) in read.rows(str(data), "text")]
    (tmp_path / "data").mkdir()
    data = tmp_path / "data"
    helpers.write_rows(data / "train.jsonl", [{"text": text} for text in texts])
    folder = make("tiers", tmp_path, model=model, classifier=judge, data=data, prompt_tokens=(4, 6))
    prompts = [row["prompt"] for row in helpers.read_rows(folder / "prompts.jsonl")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    reviews = [imdb_data.clean(text) for (text,) in read.rows(str(data), "text")]
    begun = [next(i for i, x in enumerate(reviews) if x.startswith(prompt)) for prompt in prompts]
    assert max(begun) > 60  # of 200, in random order
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {4, 5, 6}
    assert len(set(prompts)) == len(prompts) == 12
    flags = {"model": model, "classifier": judge, "data": data, "prompts": 1000}
    result = execute("tiers", tmp_path / "b", **flags)
    helpers.assert_one_line_error(result, "different openings of --prompt-tokens 4 12")


# ----------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "subcommand, flags, fragment",
    [
        *(("pretrain", {name: 0}, f"--{name}") for name in ("steps", "threads", "heads")),
        *(("classifier", {name: 0}, name[:5]) for name in ("steps", "learning_rate")),
        ("pretrain", {"opening_share": 1.5}, "--opening-share"),
        ("pretrain", {"width": 15}, "--width"),
        ("pretrain", {"vocab_size": 100}, "--vocab-size"),
        ("pretrain", {"vocab_size": 4096}, "smaller --vocab-size"),
        ("pretrain", {"context": 10**6}, "--context"),
        ("pretrain", {"data": "no/such/folder"}, "no/such/folder"),
        ("classifier", {"opening_tokens": (9, 3)}, "--opening-tokens"),
        ("classifier", {"opening_tokens": (9, 300)}, "--opening-tokens"),
        ("classifier", {"full_share": -1}, "--full-share"),
        ("classifier", {"heldout_reviews": 1, "seed": 2}, "--heldout-reviews"),
        ("classifier", {"model": "./no/such/folder"}, "no/such/folder"),
        ("tiers", {"model": "./no/such/folder"}, "no/such/folder"),
        ("tiers", {"prompts": 10}, "--prompts"),
        ("tiers", {"batch_size": 5}, "--batch-size"),
        ("tiers", {"prompt_tokens": (5, 4)}, "--prompt-tokens"),
        ("tiers", {"ppo_steps": (10, 5)}, "--ppo-steps"),
        *((name, {"output_dir": "file"}, "file") for name in FLAGS),
        *((name, {"work_dir": "/proc"}, "Error") for name in FLAGS),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, data, model, judge, subcommand, flags, fragment):
    (tmp_path / "file").write_text("a file")
    given = {"model": model} if subcommand != "pretrain" else {}
    given |= {"classifier": judge} if subcommand == "tiers" else {"data": data}
    helpers.assert_one_line_error(execute(subcommand, tmp_path, **given | flags), fragment)
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("work/*"))


@pytest.mark.parametrize("label", [', "label": 1', ""])
def test_reviews_without_both_labels(tmp_path, model, label):
    (tmp_path / "train.jsonl").write_text('{"text": "a"' + label + "}\n")
    result = execute("classifier", tmp_path, data=tmp_path, model=model)
    helpers.assert_one_line_error(result, "label 0")


# -------------------------------------------------------------------- what the repository holds
@pytest.mark.parametrize("name", ["model", "classifier", "."])
def test_embedded(name):
    folder = ASSETS / name
    assert files_of(folder)
    if name != ".":
        kind = {"model": "CausalLM", "classifier": "SequenceClassification"}[name]
        network = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert network.dtype == torch.float32
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
    if name == "classifier":
        good, bad = tokenizer(["A great film, wonderful.", "An awful film, a waste."])["input_ids"]
        assert score(network, good) > 1 and score(network, bad) < -1
    sizes = [os.path.getsize(path) for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(sizes) < 15 * 2**20
