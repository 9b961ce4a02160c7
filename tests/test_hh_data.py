"""data_gen/hh_data.py: made-up dialogues split by the real command with a tiny random reward model;
bad inputs.

python -m pytest tests/test_hh_data.py
"""

import gzip
import hashlib
import json
import os
from pathlib import Path

import helpers
import hh_data
import imdb_data
import numpy as np
import pytest
import torch
import transformers

WORDS = "please help me cook a good soup with rice or beans and tell why".split()
TIERS = ("demonstrations", "preferences", "prompts")


def dialogues(count: int) -> list[dict]:
    rng = np.random.default_rng(0)

    def say(low=1, high=12):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    rows = []
    for i in range(count):
        turns = rng.integers(3)
        prompt = "".join(f"\n\nHuman: {say()} {i}\n\nAssistant: {say()}" for _ in range(turns))
        prompt += f"\n\nHuman: {say()} {i}\n\nAssistant:"
        rows.append({"chosen": f"{prompt} {say()} yes", "rejected": f"{prompt} {say()} no"})
    return rows


def save_reward_model(folder: Path, outputs: int) -> Path:
    """A random GPT-2 with a head of that many outputs, its tokenizer without a padding token."""
    tokenizer = imdb_data.train_tokenizer(["".join(row.values()) for row in dialogues(30)], 300)
    end = imdb_data.SEPARATOR
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    sizes |= {"initializer_range": 0.5, "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPT2Config(**sizes, num_labels=outputs)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_reward_model(folder / "one", 1)
    save_reward_model(folder / "two", 2)
    for split, rows in (("train", dialogues(40)), ("other", dialogues(41)[1:])):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)))
    return folder


def execute(files: Path, folder: Path, **flags) -> tuple[int, str, str]:
    """The script, writing into folder: (exit code, out, err)."""
    given = {"data": files, "reward_model": files / "one", "output_dir": folder / "out"}
    given |= {"demonstrations": 10, "preferences": 15, "batch_size": 4, "checkpoint_every": 3}
    given |= {"threads": 1} | flags
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return helpers.run_script(hh_data, argv, folder)


def make(files: Path, folder: Path, **flags) -> dict[str, list[dict]]:
    """The rows that were written, by file."""
    result = execute(files, folder, **flags)
    assert result[0] == 0, result
    paths = (folder / "out").glob("*.jsonl")
    return {path.stem: helpers.read_rows(path) for path in paths}


def score_alone(folder: Path, text: str, max_length: int) -> float:
    """The reward model's score of one dialogue, computed apart from the script."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = tokenizer(text)["input_ids"][-min(max_length, 64) :]
        logits = network(torch.tensor([ids])).logits[0]
    return float(logits[-1] - (logits[0] if len(logits) == 2 else 0))


@pytest.mark.parametrize("model, max_length", [("one", 512), ("two", 20)])
def test_split(tmp_path, files, model, max_length):
    """Disjoint, whole, the demonstrations the best by scores computed one dialogue at a time."""
    made = make(files, tmp_path, reward_model=files / model, max_length=max_length)
    rows = {row["chosen"]: row for row in dialogues(40)}
    assert [len(made[name]) for name in TIERS] == [10, 15, 15]
    assert len({row["prompt"] for part in made.values() for row in part}) == 40
    assert all(set(row) == {"prompt"} for row in made["prompts"])
    for row in made["preferences"]:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert rows[row["prompt"] + row["chosen"]]["rejected"] == row["prompt"] + row["rejected"]

    scores = {text: score_alone(files / model, text, max_length) for text in rows}
    best = sorted(scores, key=scores.get, reverse=True)[:10]
    assert [row["prompt"] + row["completion"] for row in made["demonstrations"]] == best

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"] == dict(zip(TIERS, (10, 15, 15))) and manifest["rows"] == 40
    mean = np.mean([scores[text] for text in best])
    assert manifest["chosen_score_mean"]["demonstrations"] == pytest.approx(mean, rel=1e-4)
    assert list(manifest["sha256"]) == [f"{name}.jsonl" for name in TIERS]
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_seed_and_resume(tmp_path, files, monkeypatch):
    """Another seed draws other preferences; a scoring that was stopped carries on and gives the
    same files; scores that another flag, model or data would change are not taken."""
    for name in "abc":
        (tmp_path / name).mkdir()
    whole = make(files, tmp_path / "a")
    other = make(files, tmp_path / "b", seed=2)
    assert other["demonstrations"] == whole["demonstrations"]
    assert other["preferences"] != whole["preferences"]

    forward, calls = transformers.GPT2Model.forward, []

    def counted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.GPT2Model, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        make(files, tmp_path / "c")
    assert not list((tmp_path / "c" / "out").glob("*.json*"))
    calls[:] = [None] * 6
    assert make(files, tmp_path / "c") == whole and len(calls) == 6 + 10 - 3  # 3 batches were saved
    changes, path = {}, tmp_path / "c" / "out" / "checkpoint.pt"
    every = {"dtype": "bfloat16", "max_length": 8, "split": "other", "reward_model": files / "two"}
    for name, value in every.items():
        changes[name], before, calls[:] = value, torch.load(path)["scores"], [None] * 6
        make(files, tmp_path / "c", **changes)
        assert len(calls) == 6 + 10 and (torch.load(path)["scores"] != before).any(), name
    path.write_bytes(b"half")
    helpers.assert_one_line_error(execute(files, tmp_path / "c"), "checkpoint.pt", "damaged")


def test_prompts_alone_need_no_model(tmp_path, files):
    made = make(files, tmp_path, demonstrations=0, preferences=0, reward_model="")
    assert not made["demonstrations"] and not made["preferences"]
    prompts = [row["prompt"] for row in made["prompts"]]
    texts = [row["chosen"].rpartition("Assistant:")[0] + "Assistant:" for row in dialogues(40)]
    assert sorted(prompts) == sorted(texts) and prompts != texts  # in random order


Q = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"{Q} Yes.", (Q, " Yes.")),
        (f"{Q}Yes.\n", (Q, " Yes.")),
        (f"{Q} One.{Q} Two.", (f"{Q} One.{Q}", " Two.")),
        (f"{Q} A\n\nB: c", (Q, " A\n\nB: c")),
        ("Human: Hi\n\nAssistant: Yes.", ("Human: Hi\n\nAssistant:", " Yes.")),
        (f"{Q}  ", None),  # no response
        (f"{Q} Yes.\n\nHuman: Thanks", None),  # the human has the last word
        ("\n\nHuman: Hi", None),
        ("\n\nAssistant: Hello", None),  # nobody asked
        ("Hello", None),
    ],
)
def test_split_dialogue(text, expected):
    assert hh_data.split_dialogue(text) == expected


def test_parse():
    """Rows that are no pair of responses to one prompt are dropped and counted; a prompt is kept
    once."""
    rows = [(f"{Q} a", f"{Q} b"), (f"{Q} c", f"{Q} d"), (f"{Q} a{Q} x", f"{Q} b{Q} x")]
    rows += [(f"{Q}{Q} e", f"{Q}{Q} e "), ("e", f"{Q} b")]
    kept, dropped = hh_data.parse(rows)
    assert kept == [{"prompt": Q, "chosen": " a", "rejected": " b"}]
    assert dropped == dict.fromkeys(dropped, 1) and len(dropped) == 4


def test_divide():
    scores = np.array([0.0, 2.0, 1.0, 2.0, -1.0, 5.0])
    best, pairs, rest = hh_data.divide(scores, 3, 2, np.random.default_rng(0))
    assert best.tolist() == [5, 1, 3]  # the earlier of two equals first
    assert sorted([*pairs, *rest]) == [0, 2, 4] and len(pairs) == 2
    others = hh_data.divide(np.zeros(100), 0, 50, np.random.default_rng(0))[1:]
    assert all((np.diff(rows) < 0).any() for rows in others)  # the hub's parts are mixed


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ({"batch_size": 0}, "--batch-size"),
        ({"demonstrations": -1}, "--demonstrations"),
        ({"demonstrations": 25}, "too few"),
        ({"reward_model": ""}, "--reward-model"),
        ({"reward_model": "./no/such/model"}, "no/such/model"),
        ({"split": "test"}, "test.jsonl"),
        ({"data": "no/such/file.jsonl"}, "no/such/file.jsonl"),
        ({"data": "empty.jsonl"}, "empty.jsonl"),
        ({"data": "other.jsonl"}, "row 1"),
        ({"output_dir": "empty.jsonl"}, "empty.jsonl"),
        ({"output_dir": "/proc"}, "Error"),
    ],
    ids=str,
)
def test_bad_inputs(tmp_path, files, flags, fragment):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "other.jsonl").write_text('{"chosen": "x", "rejected": 1}\n')
    helpers.assert_one_line_error(execute(files, tmp_path, **flags), fragment)
    assert not list(tmp_path.glob("out/*"))


def test_bad_reward_models(tmp_path, files):
    """A language model is refused: transformers would give it a random head. So are scores that
    are no numbers. More of them: test_llm_run.py."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "one")
    config = transformers.AutoConfig.from_pretrained(files / "one")
    for part in (transformers.GPT2LMHeadModel(config), tokenizer):
        part.save_pretrained(tmp_path / "lm")
    result = execute(files, tmp_path, reward_model=tmp_path / "lm")
    helpers.assert_one_line_error(result, "lm", "head")
    assert not os.path.exists(tmp_path / "out")
    folder = save_reward_model(tmp_path / "nan", 1)
    helpers.change_json(folder / "config.json", layer_norm_epsilon=-1e9)
    result = execute(files, tmp_path, reward_model=folder)
    helpers.assert_one_line_error(result, "scores is not finite", code=1)
