"""data_gen/read.py: it reads what was written; every bad input is one whole sentence."""

import gzip
import json
import os
import re
import sys
import types
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import Drift, make_robot_data, read_arrays, save_arrays

from data_gen import read

HALF_CHARACTER = json.dumps({"prompt": "a \ud800 b", "response": "x"})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_robot_data(tmp_path_factory.mktemp("data") / "drift", seed=0)


@pytest.fixture
def high(data) -> dict:
    """The arrays of high.npz, for a change."""
    return read_arrays(data / "high.npz")


# ---------------------------------------------------------------------------------------- episodes
@pytest.mark.parametrize("tier", ["high", "low"])
def test_episodes_are_read_as_they_were_played(data, tier):
    """Observations but for each episode's last, and actions from the robot's bounds to [-1, 1]."""
    high, read_back = np.load(data / f"{tier}.npz"), read.episodes(data / f"{tier}.npz", Drift())
    number, lengths, low, width = 0, [], np.array([-1.0, -2.0]), np.array([1.5, 3.0])
    for t in range(len(high["actions"])):
        episode = len(lengths)
        assert np.array_equal(read_back.obs[t], high["observations"][t + episode])
        assert np.array_equal(read_back.next_obs[t], high["observations"][t + episode + 1])
        assert read_back.terminated[t] == high["terminations"][t]
        expected = (high["actions"][t] - low) / width * 2 - 1
        np.testing.assert_allclose(read_back.actions[t], expected, atol=1e-6)
        number += 1
        if high["terminations"][t] or high["truncations"][t]:
            lengths.append(number)
            number = 0
    assert read_back.lengths.tolist() == lengths and number == 0
    assert {x.dtype for x in read_back if x is not read_back.lengths} == {np.dtype(np.float32)}
    assert read_back.terminated.any() == (tier == "low")  # falls, or time limits


def put(name: str, row: int, value: float):
    """Changes the first number of a row of an array."""

    def change(arrays: dict) -> dict:
        array = arrays[name].astype(np.float64)
        array.reshape(len(array), -1)[row, 0] = value
        return {name: array}

    return change


BAD_ARRAYS = {  # arrays in the place of those of high.npz, and what the message has to say
    "no observations": (lambda a: {"observations": None}, "cannot read"),
    "no truncations": (lambda a: {"truncations": None}, "cannot read"),
    "no step": (lambda a: {name: array[:0] for name, array in a.items()}, "rows .* 0 ends need"),
    "objects": (lambda a: {"actions": np.array([[None]], object)}, "cannot read"),
    "texts": (lambda a: {"actions": a["actions"].astype(str)}, "actions must be 2-D of real"),
    "0-D": (lambda a: {"terminations": np.array(True)}, "1-D of real numbers, not 0-D bool"),
    "flat actions": (lambda a: {"actions": a["actions"][:, 0]}, "not 1-D"),
    "flags in a column": (lambda a: {"truncations": a["truncations"][:, None]}, "not 2-D bool"),
    "ends of 0.5": (put("truncations", 6, 0.5), "truncations is neither 0 nor 1 in row 6"),
    "falls of 0.5": (put("terminations", 6, 0.5), "terminations is neither 0 nor 1 in row 6"),
    "nan": (put("observations", 7, np.nan), "observations is not finite, or huge in row 7"),
    "infinity": (put("actions", 5, -np.inf), "actions is not .* 5"),
    "1e30": (put("observations", 8, 1e30), "huge in row 8"),
    "outside the box": (put("actions", 9, 0.51), "actions leave the robot's bounds in row 9"),
    "wide": (lambda a: {"observations": np.tile(a["observations"], 2)}, "another robot"),
    "wide actions": (lambda a: {"actions": np.tile(a["actions"], 2)}, "another robot"),
    "an action too few": (lambda a: {"actions": a["actions"][1:]}, "83,.* need 89"),
    "an observation too few": (lambda a: {"observations": a["observations"][1:]}, "89,.* need 90"),
    "no last end": (lambda a: {"truncations": np.roll(a["truncations"], -1)}, "at the last step"),
    "no end": (lambda a: {"truncations": 0 * a["truncations"]}, "an end at the last step"),
}


@pytest.mark.parametrize("change, message", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(tmp_path, high, change, message):
    """Also of the check that minari_io uses, with the rewards among the arrays."""
    path = tmp_path / "high.npz"
    np.savez(path, **high)
    arrays = change(high)
    save_arrays(path, **arrays)
    expected = f"{message} .*high.npz" if message == "cannot read" else f"high.npz.*{message}"
    with pytest.raises(ValueError, match=expected):
        read.episodes(path, Drift())


def test_rewards_are_checked_where_they_are_used(high):
    assert read.check_episodes(high, "x").sum() == len(high["actions"])
    for bad in (lambda a: {"rewards": a["rewards"][1:]}, put("rewards", 3, np.nan)):
        with pytest.raises(ValueError, match="rewards"):
            read.check_episodes(high | bad(high), "x")


@pytest.mark.parametrize(
    "content", [None, b"", b"hello", "cut", "early", "bits", "array"], ids=lambda x: str(x)
)
def test_bad_episode_file(tmp_path, data, content):
    path, raw = tmp_path / "high.npz", (data / "high.npz").read_bytes()
    middle = bytes(byte ^ 0xFF for byte in raw[1000:1050])
    cases = {"cut": raw[:-500], "early": raw[:100], "bits": raw[:1000] + middle + raw[1050:]}
    if content == "array":
        np.save(path.open("wb"), np.zeros(3))
    elif content is not None:
        path.write_bytes(cases.get(content, content))
    with pytest.raises(ValueError, match="cannot read .*high.npz.*data_gen/README.md has"):
        read.episodes(path, Drift())


# --------------------------------------------------------------------------------------- pairs.csv
HEADER = "tier_a,episode_a,start_a,length_a,tier_b,episode_b,start_b,length_b,label\n"
GOOD = "medium,1,3,4,low,2,1,5,1\nlow,0,0,4,medium,5,2,4,1\nlow,1,2,4,medium,0,6,4,0\n"


def read_pairs(folder: Path, data: Path, text: str | bytes) -> list:
    (folder / "pairs.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    tiers = {
        tier: read.episodes(data / f"{tier}.npz", Drift()) for tier in ("medium", "low", "high")
    }
    return read.pairs(folder, tiers, 4)


@pytest.mark.parametrize("form", ["plain", "byte-order mark", "CRLF", "no last newline"])
def test_pairs_are_preferred_and_other_with_their_first_steps(tmp_path, data, form):
    text = {"byte-order mark": "\ufeff" + HEADER + GOOD, "no last newline": (HEADER + GOOD)[:-1]}
    text = text.get(form, HEADER + GOOD).replace("\n", "\r\n" if form == "CRLF" else "\n")
    medium, low = (read.episodes(data / f"{t}.npz", Drift()).lengths for t in ("medium", "low"))
    assert read_pairs(tmp_path, data, text) == [
        (("medium", medium[0] + 3), ("low", low[:2].sum() + 1)),
        (("low", 0), ("medium", medium[:5].sum() + 2)),
        (("medium", 6), ("low", low[0] + 2)),
    ]


BAD_PAIRS = {  # what follows the header
    "no such tier": "best,0,0,4,low,0,0,4,1",
    "a demonstration": "medium,0,0,4,high,0,0,4,1",
    "no such episode": "medium,6,0,4,low,0,0,4,1",
    "episode below 0": "medium,-1,0,4,low,0,0,4,1",
    "start below 0": "medium,0,-1,4,low,0,0,4,1",
    "starts too late": "medium,0,11,4,low,0,0,4,1",
    "longer than the episode": "medium,0,0,4,low,0,0,400,1",
    "short": "medium,0,0,4,low,0,0,3,1",
    "label 2": "medium,0,0,4,low,0,0,4,2",
    "no label": "medium,0,0,4,low,0,0,4",
    "a word": "medium,SECRET,0,4,low,0,0,4,1",
    "half a line": "medium,0,0",
    "a large start": "medium,0," + "9" * 20 + ",4,low,0,0,4,1",
    "a huge number": "medium," + "9" * 5000 + ",0,4,low,0,0,4,1",
}


@pytest.mark.parametrize("text", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pairs(tmp_path, data, text):
    read_pairs(tmp_path, data, HEADER + GOOD)
    wanted = "two segments in episodes, of --segment-length 4 or more.* label of 0 or 1"
    with pytest.raises(ValueError, match=rf"pairs\.csv line 5 needs {wanted}") as error:
        read_pairs(tmp_path, data, HEADER + GOOD + text + "\n")
    assert "SECRET" not in str(error.value) and len(read.one_line(error.value)) <= 320


def test_pairs_that_are_no_table(tmp_path, data, capsys):
    for text in ("", HEADER.replace(",label", "") + "medium,0,0,4,low,0,0,4\n"):
        with pytest.raises(ValueError, match="pairs.csv is empty|line 2 needs two"):
            read_pairs(tmp_path, data, text)
    for text in (HEADER.encode() + b"\xff\xfe\xfa", HEADER + "m" * 200_000 + ",0\n"):
        with pytest.raises(SystemExit), read.input_errors():
            read_pairs(tmp_path, data, text)
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(FileNotFoundError, match="pairs.csv"):
        read.pairs(tmp_path / "nowhere", {"medium": (), "low": ()}, 4)


# ------------------------------------------------------------------------------------- rows of text
ROWS = [
    {"prompt": "caf\u00e9\u2028x", "response": " b", "n": 1},
    {"prompt": "c", "response": "d\n"},
]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.mark.parametrize(
    "form", ["plain", "byte-order mark", "CRLF", "gz", "blank lines", "folder"]
)
def test_rows_are_read(tmp_path, form):
    ends = {"CRLF": "\r\n", "blank lines": "\n\n  \n"}.get(form, "\n")
    text = ("\ufeff" if form == "byte-order mark" else "") + ends.join(LINES) + ends
    raw = text.encode()
    path = tmp_path / ("train.jsonl.gz" if form in ("gz", "folder") else "x.jsonl")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    name = str(tmp_path if form == "folder" else path)
    assert read.rows(name, "response prompt") == [(r["response"], r["prompt"]) for r in ROWS]
    assert read.rows(name, "prompt", count=1) == [(ROWS[0]["prompt"],)]
    also = read.rows(name, "prompt", unchecked="response nowhere")
    assert also == [(r["prompt"], r["response"], None) for r in ROWS]


BAD_ROWS = {  # the bytes of a file, and what the message has to say
    "empty": (b"", "0 rows, 1 are wanted"),
    "no JSON": (b"hello\n", "cannot read"),
    "UTF-16": (LINES[0].encode("utf-16"), "cannot read"),
    "a lone surrogate": (f"{LINES[0]}\n{HALF_CHARACTER}\n".encode(), "row 2 holds half a char"),
    "a missing column": (b'{"prompt": "a"}\n', "row 1 needs text under prompt, response"),
    "a number": (f'{LINES[0]}\n{{"prompt": 1, "response": "b"}}\n'.encode(), "row 2 needs text"),
    "blank text": (b'{"prompt": "a", "response": " "}\n', "row 1 needs text"),
    "a list": (b'["a", "b"]\n', "row 1 needs text"),
    "half a gz": (gzip.compress("\n".join(LINES).encode())[:-12], "cannot read"),
    "no gz": (b"\x1f\x8bhello", "cannot read"),
}


@pytest.mark.parametrize("raw, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(tmp_path, raw, message):
    path = tmp_path / ("x.jsonl.gz" if raw[:1] == b"\x1f" else "x.jsonl")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"x\.jsonl.*{message}|{message}.*x\.jsonl"):
        read.rows(str(path), "prompt response")


def test_rows_that_are_not_there(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("\n".join(LINES))
    with pytest.raises(ValueError, match="has 2 rows, 3 are wanted"):
        read.rows(str(tmp_path / "x.jsonl"), "prompt", count=3)
    for name in ("nowhere.jsonl", "no/where.jsonl.gz", str(tmp_path)):
        with pytest.raises(ValueError, match="cannot read .*jsonl.*FileNotFoundError"):
            read.rows(name, "prompt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("owner/name", "./nowhere"):
        with pytest.raises(ValueError, match=rf"no file {name}; .*pip install -e '\.\[hub\]'"):
            read.rows(name, "prompt")
    hub = types.SimpleNamespace(load_dataset=lambda *name, split: [{"prompt": f"{name} {split}"}])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read.rows("owner/name", "prompt", split="test") == [("('owner/name',) test",)]


# ----------------------------------------------------------------------------------------- errors
def test_not_finite_is_one_line_that_names_the_tensor(tmp_path):
    good = torch.zeros(3)
    read.check_finite(7, Path("runs/x"), good=good)
    for value in (float("nan"), float("inf")):
        with pytest.raises(
            SystemExit, match="\nerror: bad is not finite at step 7; no state is in runs/x"
        ):
            read.check_finite(7, Path("runs/x"), good=good, bad=torch.tensor([0.0, value]))
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(SystemExit, match=f"step 7; the last good state is in {tmp_path}"):
        read.check_finite(7, tmp_path, bad=torch.tensor([value]))


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("a\n b"), "a b"),
        (ImportError("no x"), "no x"),
        (ValueError(), "ValueError: "),
        (KeyError("x"), "KeyError: 'x'"),
        (OSError(28, "full"), "OSError: [Errno 28] full"),
        (RuntimeError("y" * 500), "RuntimeError: " + "y" * 300),
    ],
)
def test_input_errors_are_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as stop, read.input_errors():
        raise error
    found, where = capsys.readouterr().err, r" \(test_read.py line \d+\)"
    where = where if isinstance(error, KeyError | RuntimeError) else ""  # perhaps a fork's mistake
    assert stop.value.code == 2 and re.fullmatch(f"error: {re.escape(line)}{where}\n", found)


def test_a_slip_of_python_is_no_bad_input(capsys):
    with pytest.raises(SystemExit), read.input_errors():
        int("x")
    assert re.search(r"^error: .*'x' \(test_read.py line \d+\)\n$", capsys.readouterr().err)
    with pytest.raises(SystemExit), read.input_errors():
        b"\xff".decode()
    assert "line" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------- run folders
def test_write_whole_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x"
    read.write_whole(path, lambda path: path.write_text("old"))

    def half(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit, match="cannot write .*x .*No space left") as stop:
        read.write_whole(path, half)
    assert "\n" not in str(stop.value).strip()
    monkeypatch.setattr(os, "fsync", lambda file: half(tmp_path / "y"))
    with pytest.raises(SystemExit):
        read.write_whole(path, lambda path: path.write_text("new"))
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["x", "y"]
    with pytest.raises(SystemExit):
        read.write_whole(tmp_path / "gone" / "x", lambda path: path.write_text("new"))


def test_fingerprint_sees_the_middle_of_a_large_array():
    zeros = np.zeros(5000)
    assert read.fingerprint(zeros) != read.fingerprint(np.where(np.arange(5000) == 2500, 1, zeros))


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "/tmp/x", "x/"])
def test_run_names_are_plain(tmp_path, name):
    args = types.SimpleNamespace(evaluate="", resume="", runs_dir=str(tmp_path), run_name=name)
    with pytest.raises(ValueError, match="--run-name .* must be a plain name"):
        read.open_run(args, "script.py")
    assert not list(tmp_path.iterdir())


def test_checkpoint_is_of_this_script_and_holds_no_code(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(ValueError, match="no checkpoint at .* may be used again"):
        read.checkpoint(str(tmp_path), "script.py")
    for content in (Path("x"), torch.zeros(3), {"script": "other.py"}, b"", b"PK", b"hello"):
        torch.save(content, path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        foreign = isinstance(content, torch.Tensor | dict)
        message = "no checkpoint of script.py" if foreign else "is damaged"
        with pytest.raises(ValueError, match=message):
            read.checkpoint(str(tmp_path), "script.py")
    torch.save({"script": "script.py", "x": torch.ones(2)}, path)
    assert read.checkpoint(str(tmp_path), "script.py")["x"].tolist() == [1, 1]


def test_checkpoints_parts_are_gathered_and_written_one_at_a_time(tmp_path):
    """None is in memory while the next is put together; until checkpoint.pt is written the former
    one counts, then its files go, and no other's; one that lacks a part is damaged."""
    module, alive = torch.nn.Linear(2, 2), []
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
    parts = {"policy": module, "policy_optimizer": optimizer}

    def whole(state):
        assert not any(gathered() is not None for gathered in alive)
        gathered = torch.zeros(1)
        alive.append(weakref.ref(gathered))
        return dict(state) | {"gathered": gathered}

    def write(rows):
        state = {"script": "script.py", "log": [{"charts/step": i} for i in range(rows)]}
        read.write_checkpoint(tmp_path, state, parts, whole)

    def stop_before_checkpoint(path, writer, write_whole=read.write_whole):
        if path.name == "checkpoint.pt":
            raise KeyboardInterrupt
        write_whole(path, writer)

    (tmp_path / "checkpoint-before.pt").touch()  # somebody's own
    write(1)
    module.weight.data.fill_(3)
    with mock.patch.object(read, "write_whole", stop_before_checkpoint):
        with pytest.raises(KeyboardInterrupt):
            write(2)
    state = read.checkpoint(str(tmp_path), "script.py")
    assert len(state["log"]) == 1 and state["policy"]["weight"][0, 0] != 3
    write(3)
    own = ["checkpoint-3-policy.pt", "checkpoint-3-policy_optimizer.pt"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*own, "checkpoint-before.pt", "checkpoint.pt", "metrics.csv"]
    state = read.checkpoint(str(tmp_path), "script.py")
    assert len(state["log"]) == 3 and state["policy"]["weight"].tolist() == [[3, 3], [3, 3]]
    assert state["policy_optimizer"]["param_groups"][0]["lr"] == 0.5 and len(alive) == 6
    (tmp_path / own[0]).unlink()
    with pytest.raises(ValueError, match=f"checkpoint.pt is damaged, .*{own[0]}"):
        read.checkpoint(str(tmp_path), "script.py")


def test_summary_is_of_the_evaluation():
    row = {"charts/step": 2, "eval/kl": 1, "reward/gap": 3, "eval/gt_score": -0.5}
    assert read.summary(row) == "kl 1.00, gt_score -0.50"
