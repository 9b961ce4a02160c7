"""data_gen/imdb_data.py: tiny models of made-up reviews by the real command, kills and bad arguments; and the assets.

python -m pytest tests/test_imdb_data.py
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
import imdb_data  # noqa: E402

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "data_gen" / "imdb_data.py"
ASSETS = ROOT / "data_gen" / "assets" / "imdb"
PRETRAIN = {"vocab_size": 300, "context": 32, "width": 16, "layers": 1, "heads": 2, "steps": 40, "batch_size": 8}
PRETRAIN |= {"heldout_reviews": 20, "samples": 2, "learning_rate": 0.01}
CLASSIFIER = {"steps": 100, "batch_size": 16, "heldout_reviews": 60, "learning_rate": 0.01}
COMMON = {"checkpoint_every": 10, "threads": 1}
WORDS = "film plot actor scene story camera music end role joke".split()


def make_reviews(folder: Path) -> Path:
    """Random words; a positive review has `great` in every other place, a negative one `awful`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 80), ("unsupervised", 50)):
        rows = []
        for i in range(count):
            mood = ("awful", "great")[i % 2]
            words = [word for w in rng.choice(WORDS, rng.integers(10, 40)) for word in (w, mood)]
            words[len(words) // 2] += ".<br /><br />Well,"
            rows.append({"text": " ".join(words), "label": -1 if split == "unsupervised" else i % 2})
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def execute(subcommand: str, **flags) -> tuple[int, str, str]:
    """The script in this process, as `python imdb_data.py subcommand --flags`: (exit code, out, err)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, torch.get_num_threads()
    try:
        sys.argv = [str(SCRIPT), subcommand]
        for name, value in (COMMON | flags).items():
            sys.argv += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before[0]
        torch.set_num_threads(before[1])
    return code, out.getvalue(), err.getvalue()


def make(subcommand: str, folder: Path, data: Path, **flags) -> Path:
    """A tiny model; returns its folder."""
    flags = {"data": data, "output_dir": folder / "out", "work_dir": folder / "work"} | flags
    code, out, err = execute(subcommand, **(PRETRAIN if subcommand == "pretrain" else CLASSIFIER) | flags)
    assert code == 0, (out, err)
    return folder / "out"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}


def assert_refused(result: tuple[int, str, str], *fragments: str) -> None:
    """Exit code 2 and one line on stderr, progress bars aside, that names what is wrong."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.strip() and "%|" not in line and "reviews/s" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, out, err)
    for fragment in fragments:
        assert fragment in lines[0], (fragment, lines[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_reviews(tmp_path_factory.mktemp("data") / "reviews")


@pytest.fixture(scope="module")
def model(tmp_path_factory, data) -> Path:
    """A language model made without disturbance; read only."""
    return make("pretrain", tmp_path_factory.mktemp("model"), data)


@pytest.fixture(scope="module")
def judge(tmp_path_factory, data, model) -> Path:
    return make("classifier", tmp_path_factory.mktemp("judge"), data, model=model, opening_tokens=(6, 12))


def test_language_model_loads(model, data):
    """With the Auto classes and no argument: float32, tied, pad and end distinct, text that comes back."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert network.dtype == torch.float32 and network.config.model_type == "gpt2"
    assert network.config.n_positions == tokenizer.model_max_length == 32 and network.config.vocab_size == 300
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1) and len(tokenizer) == 300
    assert (network.config.pad_token_id, network.config.eos_token_id) == (0, 1)
    text = "A film, naïve\nand  awful ☃ <|endoftext|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(["a film", "a"], padding=True)["input_ids"][1][0] == 0  # padded on the left
    assert not {"<br", "br"} & set(tokenizer.get_vocab())
    with open(model / "model.safetensors", "rb") as file:
        assert b"F16" in file.read(20_000)


def test_language_model_manifest(model, data):
    """The perplexity, recomputed from the files as stored, one review at a time."""
    manifest = json.loads((model / "manifest.json").read_text())
    assert manifest["sha256"] == {n: hashlib.sha256(raw).hexdigest() for n, raw in files_of(model).items()}
    assert manifest["seed"] == 1 and manifest["reviews"] == {"trained_on": 250, "held_out": 20}
    assert manifest["arguments"]["data"] == "reviews" and str(data) not in json.dumps(manifest)
    assert set(manifest["versions"]) == {"python", "numpy", "tokenizers", "torch", "transformers"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert manifest["parameters"] == sum(p.numel() for p in network.parameters())
    texts = sorted({imdb_data.clean(row["text"]) for row in imdb_data.read_rows(str(data), "test", ("text",))})
    nll, count = 0.0, 0
    with torch.no_grad():
        for i in np.random.default_rng(1).permutation(len(texts))[:20]:
            ids = torch.tensor([[1, *tokenizer(texts[i])["input_ids"], 1][:32]])
            nll += network(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert manifest["heldout_perplexity"]["tokens"] == count
    assert manifest["heldout_perplexity"]["perplexity"] == pytest.approx(np.exp(nll / count), rel=1e-4)
    assert manifest["heldout_perplexity"]["perplexity"] < 100  # of 300 tokens
    assert len(manifest["samples"]) == 2 and not any("<|" in sample for sample in manifest["samples"])


def test_classifier_loads_and_manifest(judge, data):
    manifest = json.loads((judge / "manifest.json").read_text())
    assert manifest["sha256"] == {n: hashlib.sha256(raw).hexdigest() for n, raw in files_of(judge).items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(judge).eval()
    assert network.dtype == torch.float32 and network.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    texts, labels = imdb_data.labelled(str(data), "test")
    kept = np.random.default_rng(1).permutation(len(texts))[:60]
    for name, length in (("full", 32), ("opening_40_tokens", 40)):
        with torch.no_grad():
            logits = [network(torch.tensor([tokenizer(texts[i])["input_ids"][:length][:32]])).logits[0] for i in kept]
        score = np.array([float(row[1] - row[0]) for row in logits])
        row = manifest["heldout"][name]
        assert row["accuracy"] == pytest.approx(((score > 0) == labels[kept]).mean())
        assert row["score_mean"] == pytest.approx(score.mean(), abs=1e-3)
        assert row["accuracy"] > 0.9  # the words tell


def test_padding_does_not_change_the_score(judge):
    network = transformers.AutoModelForSequenceClassification.from_pretrained(judge).eval()
    rows = [np.array([5, 6, 7, 8]), np.array([9, 10])]
    both = imdb_data.scores(network, rows, 32, 0)
    alone = [imdb_data.scores(network, [row], 32, 0)[0] for row in rows]
    np.testing.assert_allclose(both, alone, atol=1e-5)
    np.testing.assert_allclose(
        imdb_data.scores(network, rows[:1], 2, 0), imdb_data.scores(network, [rows[0][:2]], 9, 0)
    )


@pytest.mark.parametrize("subcommand", ["pretrain", "classifier"])
def test_killed_and_run_again(tmp_path, monkeypatch, data, model, judge, subcommand):
    """Stopped between two checkpoints, and with half a checkpoint written: the same weights, byte by byte."""

    class Killed(Exception):
        pass

    flags = {} if subcommand == "pretrain" else {"model": model, "opening_tokens": (6, 12)}
    save, calls = torch.save, []

    def half(state, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise Killed
        save(state, path)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        make(subcommand, tmp_path, data, **flags)
    monkeypatch.setattr(torch, "save", save)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert torch.load(tmp_path / "work" / "state.pt", weights_only=True)["step"] == 10
    whole = model if subcommand == "pretrain" else judge
    assert files_of(make(subcommand, tmp_path, data, **flags)) == files_of(whole)
    assert files_of(make(subcommand, tmp_path, data, **flags)) == files_of(whole)  # of the finished training
    assert not (tmp_path / "out" / ".tmp").exists()
    code, _, err = execute(
        subcommand,
        **(PRETRAIN if subcommand == "pretrain" else CLASSIFIER)
        | flags
        | {"data": data, "output_dir": tmp_path / "out", "work_dir": tmp_path / "work", "seed": 2},
    )
    assert code == 2 and "other arguments" in err.splitlines()[-1]
    (tmp_path / "work" / "state.pt").write_bytes(b"half")
    code, _, err = execute(
        subcommand,
        **(PRETRAIN if subcommand == "pretrain" else CLASSIFIER)
        | flags
        | {"data": data, "output_dir": tmp_path / "out", "work_dir": tmp_path / "work"},
    )
    assert code == 2 and "damaged" in err.splitlines()[-1]


def test_windows():
    """Every other window begins on a review's separator or right after it; all lie inside the stream."""
    stream = np.arange(1000)
    starts = np.arange(0, 1000, 100)
    rng = np.random.default_rng(0)
    windows = imdb_data.draw_windows(stream, starts, 4000, 30, 1.0, rng)
    assert windows.shape == (4000, 30) and (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == {s + k for s in starts.tolist() for k in (0, 1)}
    assert 0.46 < (windows[:, 0] % 100 == 0).float().mean() < 0.54
    anywhere = imdb_data.draw_windows(stream, starts, 40_000, 30, 0.0, rng)[:, 0]
    assert set(anywhere.tolist()) == set(range(971))
    half = imdb_data.draw_windows(stream, starts, 4000, 30, 0.5, rng)[:, 0]
    assert 0.47 < (half % 100 < 2).float().mean() < 0.54
    ids = imdb_data.draw_windows(np.arange(10), np.array([0, 8]), 100, 6, 1.0, rng)[:, 0]
    assert set(ids.tolist()) == {0, 1, 4}  # a review that begins near the end is read in the last window


def test_clean():
    assert imdb_data.clean(" Good.<br /><br />Bad\n\n<BR>? <br/>  ") == "Good. Bad <BR>?"


@pytest.mark.parametrize(
    "subcommand, flags, fragment",
    [
        *(
            ("pretrain", {name: 0}, f"--{name.replace('_', '-')}")
            for name in ("steps", "batch_size", "threads", "heads")
        ),
        *(("classifier", {name: 0}, f"--{name.replace('_', '-')}") for name in ("steps", "learning_rate")),
        ("pretrain", {"learning_rate": "nan"}, "--learning-rate"),
        ("pretrain", {"opening_share": 1.5}, "--opening-share"),
        ("pretrain", {"seed": -1}, "--seed"),
        ("pretrain", {"width": 15}, "--width"),
        ("pretrain", {"vocab_size": 100}, "--vocab-size"),
        ("pretrain", {"vocab_size": 4096}, "smaller --vocab-size"),
        ("pretrain", {"context": 10**6}, "--context"),
        ("classifier", {"opening_tokens": (9, 3)}, "--opening-tokens"),
        ("classifier", {"full_share": -1}, "--full-share"),
        ("classifier", {"model": "no/such/folder"}, "no/such/folder"),
        ("pretrain", {"data": "no/such/folder"}, "no/such/folder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments(tmp_path, data, subcommand, flags, fragment):
    settings = (PRETRAIN if subcommand == "pretrain" else CLASSIFIER) | {"data": data}
    result = execute(subcommand, **settings | {"output_dir": tmp_path / "o", "work_dir": tmp_path / "w"} | flags)
    assert_refused(result, fragment)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    "content, fragment",
    [
        (None, "train.jsonl"),
        (b"", "cannot read"),
        (gzip.compress(b'{"text": "a"}\n')[:-9], "cannot read"),
        (gzip.compress(b"\xff\n"), "cannot read"),
        (gzip.compress(b"not json\n"), "cannot read"),
        (gzip.compress(b"\n"), "is empty"),
        (gzip.compress(b'{"text": "a", "label": 1}\n{"label": 1}\n'), "row 2"),
        (gzip.compress(b'{"text": " ", "label": 1}\n'), "row 1"),
        (gzip.compress(b"[1]\n"), "row 1"),
        (gzip.compress(b'{"text": "a", "label": 1}\n'), "label 0"),
        (gzip.compress(b'{"text": "a"}\n'), "label 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_data(tmp_path, data, content, fragment):
    (tmp_path / "data").mkdir()
    if content is not None:
        (tmp_path / "data" / "train.jsonl.gz").write_bytes(content)
    result = execute("classifier", data=tmp_path / "data", output_dir=tmp_path / "o", work_dir=tmp_path / "w")
    if content == b"":  # an empty gzip file is read as no lines
        fragment = "is empty"
    assert_refused(result, fragment)


def test_openings_longer_than_the_context(tmp_path, data, model):
    result = execute("classifier", data=data, model=model, output_dir=tmp_path / "o", work_dir=tmp_path / "w")
    assert_refused(result, "--opening-tokens")


def test_folder_is_a_file(tmp_path, data):
    (tmp_path / "out").write_text("a file")
    assert_refused(execute("pretrain", data=data, output_dir=tmp_path / "out", work_dir=tmp_path / "w"), "out")


# ------------------------------------------------------------------------------------------- what the repository holds
@pytest.mark.parametrize("name", ["model", "classifier"])
def test_embedded_model(name):
    folder = ASSETS / name
    if not folder.is_dir():
        pytest.skip(f"{name} has not been made yet")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == {n: hashlib.sha256(raw).hexdigest() for n, raw in files_of(folder).items()}
    auto = {"model": transformers.AutoModelForCausalLM, "classifier": transformers.AutoModelForSequenceClassification}
    network = auto[name].from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert network.dtype == torch.float32 and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert sum(os.path.getsize(path) for path in ASSETS.rglob("*") if path.is_file()) < 15 * 2**20
