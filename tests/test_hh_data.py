"""data_gen/hh_data.py: made-up dialogues split by the real command with a tiny random reward model; bad inputs.

python -m pytest tests/test_hh_data.py
"""

import contextlib
import gzip
import hashlib
import inspect
import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
import hh_data  # noqa: E402
import imdb_data  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "data_gen" / "hh_data.py"
WORDS = "please help me cook a good soup with rice or beans and tell why".split()


def dialogues(count: int) -> list[dict]:
    rng = np.random.default_rng(0)

    def say(low=1, high=12):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    rows = []
    for i in range(count):
        prompt = "".join(f"\n\nHuman: {say()} {i}\n\nAssistant: {say()}" for _ in range(rng.integers(3)))
        prompt += f"\n\nHuman: {say()} {i}\n\nAssistant:"
        rows.append({"chosen": f"{prompt} {say()} yes", "rejected": f"{prompt} {say()} no"})
    return rows


def save_reward_model(folder: Path, outputs: int, **config) -> Path:
    """A random GPT-2 with a head of that many outputs, its tokenizer without a padding token."""
    tokenizer = imdb_data.train_tokenizer(["".join(row.values()) for row in dialogues(30)], 300)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=imdb_data.SEPARATOR)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    config = transformers.GPT2Config(**sizes, num_labels=outputs, bos_token_id=1, eos_token_id=1, **config)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_reward_model(folder / "one", 1)
    save_reward_model(folder / "two", 2)
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, dialogues(40))))
    return folder


def execute(**flags) -> tuple[int, str, str]:
    """The script in this process, as `python hh_data.py --flags`: (exit code, out, err)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, torch.get_num_threads()
    flags = {"demonstrations": 10, "preferences": 15, "batch_size": 4, "checkpoint_every": 2, "threads": 1} | flags
    try:
        sys.argv = [str(SCRIPT), *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before[0]
        torch.set_num_threads(before[1])
    return code, out.getvalue(), err.getvalue()


def make(files: Path, folder: Path, model: str = "one", **flags) -> dict[str, list[dict]]:
    """The rows that were written, by file."""
    result = execute(**{"data": files, "reward_model": files / model, "output_dir": folder} | flags)
    assert result[0] == 0, result
    return {path.stem: [json.loads(line) for line in open(path)] for path in folder.glob("*.jsonl")}


def assert_refused(result: tuple[int, str, str], *fragments: str) -> None:
    code, out, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, out, err)
    for fragment in fragments:
        assert fragment in lines[0], (fragment, lines[0])


@pytest.mark.parametrize("model, max_length", [("one", 512), ("two", 20)])
def test_split(tmp_path, files, model, max_length):
    """Disjoint, whole, the demonstrations the best by scores computed one dialogue at a time."""
    made = make(files, tmp_path, model, max_length=max_length)
    rows = {row["chosen"]: row for row in dialogues(40)}
    assert [len(made[name]) for name in ("demonstrations", "preferences", "prompts")] == [10, 15, 15]
    assert len({row["prompt"] for part in made.values() for row in part}) == 40
    assert all(set(row) == {"prompt"} for row in made["prompts"])
    for row in made["preferences"]:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert rows[row["prompt"] + row["chosen"]]["rejected"] == row["prompt"] + row["rejected"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(files / model)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(files / model).eval()
    scores = {}
    for text in rows:
        with torch.no_grad():
            logits = network(torch.tensor([tokenizer(text)["input_ids"][-min(max_length, 64) :]])).logits[0]
        scores[text] = float(logits[-1] - (logits[0] if len(logits) == 2 else 0))
    best = sorted(scores, key=scores.get, reverse=True)[:10]
    assert [row["prompt"] + row["completion"] for row in made["demonstrations"]] == best

    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {"demonstrations": 10, "preferences": 15, "prompts": 15} and manifest["rows"] == 40
    assert manifest["chosen_score_mean"]["demonstrations"] == pytest.approx(
        np.mean([scores[t] for t in best]), rel=1e-4
    )
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_seed_and_resume(tmp_path, files, monkeypatch):
    """Another seed draws other preferences; a scoring that was stopped carries on and gives the same files."""
    whole = make(files, tmp_path / "a")
    other = make(files, tmp_path / "b", seed=2)
    assert other["demonstrations"] == whole["demonstrations"] and other["preferences"] != whole["preferences"]

    forward, calls = transformers.GPT2ForSequenceClassification.forward, []

    def counted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.GPT2ForSequenceClassification, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        make(files, tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.json*"))
    calls[:] = [None] * 6
    assert make(files, tmp_path / "c") == whole and len(calls) == 6 + 10 - 4  # four batches were saved
    assert make(files, tmp_path / "c", "two") != whole  # scores of another model are not taken for this one's


def test_prompts_alone_need_no_model(tmp_path, files):
    made = make(files, tmp_path, demonstrations=0, preferences=0, reward_model="")
    assert not made["demonstrations"] and not made["preferences"] and len(made["prompts"]) == 40


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
    """Rows that are no pair of responses to one prompt are dropped and counted; a prompt is kept once."""
    rows = [
        {"chosen": f"{Q} a", "rejected": f"{Q} b"},
        {"chosen": f"{Q} c", "rejected": f"{Q} d"},
        {"chosen": f"{Q} a{Q} x", "rejected": f"{Q} b{Q} x"},
        {"chosen": f"{Q}{Q} e", "rejected": f"{Q}{Q} e "},
        {"chosen": "e", "rejected": f"{Q} b"},
    ]
    kept, dropped = hh_data.parse(rows)
    assert kept == [{"prompt": Q, "chosen": " a", "rejected": " b"}]
    assert dropped == {"not a dialogue": 1, "two prompts": 1, "equal responses": 1, "repeated prompt": 1}


def test_divide():
    scores = np.array([0.0, 2.0, 1.0, 2.0, -1.0, 5.0])
    best, pairs, rest = hh_data.divide(scores, 3, 2, np.random.default_rng(0))
    assert best.tolist() == [5, 1, 3]  # the earlier of two equals first
    assert sorted([*pairs, *rest]) == [0, 2, 4] and len(pairs) == 2


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ({"batch_size": 0}, "--batch-size"),
        ({"preferences": -1}, "--preferences"),
        ({"demonstrations": -1}, "--demonstrations"),
        ({"demonstrations": 25}, "too few"),
        ({"reward_model": ""}, "--reward-model"),
        ({"reward_model": "no/such/model"}, "no/such/model"),
        ({"split": "test"}, "test.jsonl"),
        ({"data": "no/such/file.jsonl"}, "no/such/file.jsonl"),
        ({"data": "empty.jsonl"}, "empty"),
        ({"data": "other.jsonl"}, "row 1"),
        ({"output_dir": "empty.jsonl"}, "empty.jsonl"),
    ],
    ids=lambda value: str(value),
)
def test_bad_inputs(tmp_path, monkeypatch, files, flags, fragment):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n")
    Path("other.jsonl").write_text('{"chosen": "x", "rejected": 1}\n')
    assert_refused(execute(**{"data": files, "reward_model": files / "one", "output_dir": "out"} | flags), fragment)
    assert not list(tmp_path.glob("out/*"))


def test_model_without_a_head(tmp_path, files):
    """A language model is refused: transformers would give it a random head. So is a head of three outputs."""
    transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(files / "one")).save_pretrained(
        tmp_path / "lm"
    )
    transformers.AutoTokenizer.from_pretrained(files / "one").save_pretrained(tmp_path / "lm")
    for folder in (tmp_path / "lm", save_reward_model(tmp_path / "three", 3)):
        result = execute(data=files, reward_model=folder, output_dir=tmp_path / "out")
        assert_refused(result, folder.name, "head")


@pytest.mark.parametrize("name", ["fail", "one_line", "read_rows"])
def test_shared_functions_are_the_same(name):
    assert inspect.getsource(getattr(hh_data, name)) == inspect.getsource(getattr(imdb_data, name))
