"""What every script shares, and nothing of AIHF: data, read and checked, and the folder of a run.

Whatever is wrong is a ValueError or OSError that names file and row. Formats: data_gen/README.md.
"""

import csv
import fcntl
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


# ------------------------------------------------------------------------------------- errors
@contextmanager
def input_errors():
    """Around a script's set-up: whatever goes wrong is one line on stderr and exit code 2, with the
    place of what may be a mistake in a fork. The loop stays outside: a mistake in it keeps its
    traceback. From here on characters that the console cannot encode are printed as "?"."""
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda errors: None)(errors="replace")
    try:
        yield
    except KeyboardInterrupt:  # before a run says how to carry on
        raise SystemExit(130) from None
    except Exception as error:  # libraries raise almost anything on a bad file, name or number
        frames, where = traceback.extract_tb(error.__traceback__), ""
        own = [frame for frame in frames if "site-packages" not in frame.filename][-1]
        expected = isinstance(error, OSError | ImportError | UnicodeError)
        if own is not frames[-1] or str(own.line).startswith("raise"):  # no slip of Python or NumPy
            expected |= isinstance(error, ValueError)
        if not expected:  # perhaps a mistake in a fork
            where = f" ({Path(own.filename).name} line {own.lineno})"
        print(f"error: {one_line(error)}{where}", file=sys.stderr)
        raise SystemExit(2) from None


def one_line(error: BaseException) -> str:
    """At most 300 characters of the message, after its type where that says more."""
    message = " ".join(str(error).split())[:300]
    plain = type(error) is ValueError or isinstance(error, ImportError)
    return message if message and plain else f"{type(error).__name__}: {message}"


def check_numbers(args, may_be_zero: str, unchecked: str = "") -> None:
    """ValueError unless a dataclass's numbers are finite and positive; those named may be 0."""
    for name, value in asdict(args).items():
        zero, checked = name in may_be_zero.split(), name not in unchecked.split()
        for x in value if isinstance(value, tuple) else (value,):
            if checked and type(x) in (int, float) and not (0 < x < 2**63 or x == 0 and zero):
                least = "not negative" if zero else "more than 0"
                raise ValueError(f"--{name.replace('_', '-')} must be {least} and finite, not {x}")


def check_steps(done: int, args, name: str) -> None:
    """ValueError if a run to carry on has done more steps than it is to have."""
    if done > getattr(args, name):
        raise ValueError(f"the run has done {done} steps, more than --{name.replace('_', '-')}")


def check_finite(step: int, run_dir: Path, **tensors) -> None:
    """SystemExit with one line that names the first tensor holding NaN or infinity."""
    bad = [name for name, x in tensors.items() if not x.isfinite().all()]  # shards: all must ask
    if bad:
        what = "the last good state" if (run_dir / "checkpoint.pt").exists() else "no state"
        raise SystemExit(f"\nerror: {bad[0]} is not finite at step {step}; {what} is in {run_dir}")


# -------------------------------------------------------------------------------- run folders
# Flags that --resume cannot change:
FIXED = """seed run_name runs_dir held_out_share sft_model_path reward_model_path sft_epochs
    sft_batch_size bc_updates reward_epochs reward_batch_size reward_updates reward_range
    reward_updates_per_iteration entropy_coefficient kl_coefficient temperature""".split()


def writes() -> bool:
    """Of the processes that train a model together the first alone writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def write_whole(path: Path, write) -> None:
    """Calls write on a temporary path beside this one and renames what it wrote: a folder, or a
    file once it is on disk. SystemExit with one line if the disk is full, say."""
    if not writes():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if temporary.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # torch.save and save_pretrained raise almost anything
        message = f"cannot write {path} ({one_line(error)}); it is as it was"
        raise SystemExit(f"\nerror: {message}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def fingerprint(*parts) -> str:
    """SHA-256 of arrays, tensors and lists of texts and numbers."""
    digest = hashlib.sha256()
    for x in parts:
        digest.update(repr(x).encode() if isinstance(x, list) else np.asarray(x).tobytes())
    return digest.hexdigest()


def write_csv(path: Path, rows: list[dict]) -> None:
    """A table of numbers whose columns are all keys of the rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(f"{row[key]:.9g}" if key in row else "" for key in columns) for row in rows]
    write_whole(path, lambda path: path.write_text("\n".join([",".join(columns), *lines, ""])))


def summary(row: dict[str, float]) -> str:
    """An evaluation's metrics in one line."""
    return ", ".join(f"{key[5:]} {row[key]:.2f}" for key in row if key.startswith("eval/"))


def write_samples(path: Path | None, title: str, prompts, responses, scores: dict) -> None:
    """Prints a title and the first three rows of prompt, response and the last of the scores (DPO
    without a judge: kl); all rows go to a file .jsonl, if there is a path."""
    if not writes():
        return
    tqdm.write(title)
    rows = list(zip(prompts, responses, *(x.tolist() for x in scores.values())))
    for prompt, response, *_, score in rows[:3]:
        tqdm.write(f"  {score:6.2f} | {' '.join(f'{prompt[-60:]} >> {response}'.split())[:160]}")
    names = ("prompt", "response", *scores)
    lines = "".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows)
    if path:
        write_whole(path, lambda path: path.write_text(lines))


def open_run(args, script: str) -> tuple:
    """The folder runs_dir/run_name, new or without a checkpoint, or resume's, with args.json; and
    wandb.log, or a function that does nothing. From here on this process alone writes there (of
    several that make up a run, the first), and says how to carry on when it is stopped. ValueError
    if another process writes there, or if a flag beside --resume would change what the run is. With
    --evaluate its folder, as it is, and None."""
    if args.evaluate:
        return Path(args.evaluate), None
    if args.run_name == ".." or Path(args.run_name).name != args.run_name:
        raise ValueError(f"--run-name {args.run_name!r} must be a plain name; see --runs-dir")
    folder = Path(args.resume or Path(args.runs_dir) / args.run_name)
    before = json.loads((folder / "args.json").read_text()) if args.resume else {}
    now = json.loads(json.dumps(asdict(args)))  # tuples are lists, as in args.json
    for name in [name for name in FIXED if name in before and before[name] != now[name]]:
        flag = name.replace("_", "-")
        raise ValueError(f"--resume cannot change --{flag}, which is {before[name]!r}")
    if not args.resume and writes() and (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} exists; carry it on with --resume {folder}")
    if writes():
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)  # given back when the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}") from None
        for left_over in folder.glob(".*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
            left_over.unlink(missing_ok=True)
        if args.track:  # after these checks: wandb begins a run of a known name anew
            import wandb

            name, again = re.sub("[:;,#?']", "-", args.run_name), "allow" if args.resume else None
            wandb.init(id=name, resume=again, config=now)
        text = json.dumps({"script": script, **now}, indent=2) + "\n"
        write_whole(folder / "args.json", lambda path: path.write_text(text))
    when_stopped_say_how_to_carry_on(folder, script)  # after wandb, which has such a hook too
    return folder, (wandb.log if args.track and writes() else lambda row, step: None)


def when_stopped_say_how_to_carry_on(folder: Path, script: str) -> None:
    """From here on Ctrl-C says how to carry on and exits with 130; so do SIGTERM, with 143, and an
    error's traceback: the other processes of a torchrun end by either when one has died."""

    def say() -> None:
        how = f"carry on with: python {script} --resume {shlex.quote(str(folder))}"
        how = how if (folder / "checkpoint.pt").exists() else "nothing is saved"
        print(f"\nstopped; {how}", flush=True)

    def interrupt(signum, frame):
        if writes() or signum == signal.SIGTERM:
            say()
        sys.exit(128 + signum)

    def crash(*error, hook=sys.excepthook):  # wandb's, if there is one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # lest the line come twice
        hook(*error)
        say()

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    sys.excepthook = crash


def write_checkpoint(folder: Path, state: dict, parts: dict, whole) -> None:
    """metrics.csv; whole(state_dict()) of each of parts, modules and optimisers, in a file of its
    own, so that memory holds one at a time; at last checkpoint.pt, with state and the files' names:
    until then the former one counts."""
    write_csv(folder / "metrics.csv", state["log"])
    files = {name: f"checkpoint-{len(state['log'])}-{name}.pt" for name in parts}
    try:
        for name, part in parts.items():
            write_whole(folder / files[name], partial(torch.save, whole(part.state_dict())))
    except BaseException:  # a full disk is not left full
        for file in files.values() if writes() else ():
            (folder / file).unlink(missing_ok=True)
        raise
    write_whole(folder / "checkpoint.pt", partial(torch.save, state | {"files": files}))
    for path in folder.glob("checkpoint-[0-9]*.pt") if writes() else ():
        if path.name not in files.values():
            path.unlink()


def checkpoint(run: str, script: str, go_on: bool = False) -> dict:
    """The last checkpoint of a run of this script; {} of no run. To go on, with the arguments in
    args.json: those of a --resume that ended before another checkpoint stand nowhere else."""
    if not run:
        return {}
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; begin the run anew, its name may be used again")
    load = partial(torch.load, weights_only=True, map_location="cpu", mmap=True)
    try:
        state = load(path)
        for name, file in state.get("files", {}).items() if isinstance(state, dict) else ():
            state[name] = load(path.with_name(file))
    except Exception as error:  # almost anything on a damaged file
        what = f"damaged, or just being replaced ({one_line(error)})"
        raise ValueError(f"{path} is {what}: try again, or begin the run anew") from None
    if not isinstance(state, dict) or state.get("script") != script:
        raise ValueError(f"{path} is no checkpoint of {script}")
    if go_on:
        last = json.loads(path.with_name("args.json").read_text()).items()
        state["args"] = {k: tuple(x) if type(x) is list else x for k, x in last if k != "script"}
    return state


# ------------------------------------------------------------------------------------- robots
class Episodes(NamedTuple):
    """Episodes end to end, N steps in all."""

    obs: np.ndarray  # (N, obs_dim), float32
    actions: np.ndarray  # (N, act_dim), float32, in [-1, 1]
    lengths: np.ndarray  # (episodes,), steps of each
    next_obs: np.ndarray  # (N, obs_dim), float32
    terminated: np.ndarray  # (N,), float32: 1 where the robot fell


EPISODE_ARRAYS = ("observations", "actions", "terminations", "truncations")


def check_episodes(arrays: dict[str, np.ndarray], source) -> np.ndarray:
    """Raises ValueError, naming source, unless the arrays are those of an episode file (E episodes
    of N steps in all): observations (N + E, obs_dim), actions (N, act_dim), and terminations,
    truncations and, if any, rewards (N,). Returns the episodes' lengths (E,)."""
    for name, array in arrays.items():
        axes, is_flag = 1 + (name in EPISODE_ARRAYS[:2]), name in EPISODE_ARRAYS[2:]
        if array.dtype.kind not in "fiub" or array.ndim != axes:
            wanted = f"{axes}-D of real numbers, not {array.ndim}-D {array.dtype}"
            raise ValueError(f"{source}: {name} must be {wanted}")
        wrong = ~np.isin(array, (0, 1)) if is_flag else ~(np.abs(array.astype(float)) < 1e8)
        if wrong.any():
            what = "neither 0 nor 1" if is_flag else "not finite, or huge"
            raise ValueError(f"{source}: {name} is {what} in row {np.argwhere(wrong)[0, 0]}")
    ends = np.union1d(*(np.flatnonzero(arrays[name]) for name in EPISODE_ARRAYS[2:]))
    rows, steps = {name: len(array) for name, array in arrays.items()}, len(arrays["actions"])
    wanted = dict.fromkeys(rows, steps) | {"observations": steps + len(ends)}
    if steps == 0 or rows != wanted or ends.max(initial=-1) != steps - 1:
        need = f"{steps + len(ends)} observations, {steps} of the others, an end at the last step"
        raise ValueError(f"{source}: rows {rows} with {len(ends)} ends need {need}")
    return np.diff(ends, prepend=-1)


def episodes(path: Path, env) -> Episodes:
    """Read an episode file of a robot, a gymnasium environment; actions, which lie in the bounds of
    env.action_space, are brought to [-1, 1]. Its `rewards`, the true ones, are never touched."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in EPISODE_ARRAYS}
    except Exception as error:  # no file, no such array, almost anything on a damaged file
        advice = "data_gen/README.md has the format, and how to make it"
        raise ValueError(f"cannot read {path} ({one_line(error)}): {advice}") from None
    lengths, low = check_episodes(arrays, path), env.action_space.low
    obs, actions, fell = (arrays[name].astype(np.float32) for name in EPISODE_ARRAYS[:3])
    if (obs.shape[1:], actions.shape[1:]) != (env.observation_space.shape, low.shape):
        wanted = f"{env.observation_space.shape} and {low.shape}"
        raise ValueError(f"{path} is of another robot: observations and actions are not {wanted}")
    actions = 2 * (actions - low) / (env.action_space.high - low) - 1
    if (outside := np.abs(actions) > 1.001).any():
        row = np.argwhere(outside)[0, 0]
        raise ValueError(f"{path}: actions leave the robot's bounds in row {row}")
    last = np.cumsum(lengths + 1) - 1  # rows of obs where episodes end; they begin lengths earlier
    now, after = np.delete(obs, last, axis=0), np.delete(obs, last - lengths, axis=0)
    return Episodes(now, actions.astype(np.float32), lengths, after, fell)


def pairs(folder: Path, tiers: dict[str, Episodes], segment_length: int) -> list[tuple]:
    """Read pairs.csv: for each pair the preferred and the other segment, (tier, first step) each,
    steps counted over all of the tier's episodes."""
    path, pairs = folder / "pairs.csv", []
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                a, b = (_segment(row, side, tiers, segment_length) for side in "ab")
                pairs.append({"1": (a, b), "0": (b, a)}[row["label"]])  # the preferred one first
            except (KeyError, TypeError, ValueError, IndexError):
                wanted = f"two segments in episodes, of --segment-length {segment_length} or more, "
                wanted += "none of high, and a label of 0 or 1; columns: data_gen/README.md"
                raise ValueError(f"{path} line {number} needs {wanted}") from None
    if not pairs:
        raise ValueError(f"{path} is empty: it holds no pair")
    return pairs


def _segment(row: dict, side: str, tiers: dict[str, Episodes], least: int) -> tuple[str, int]:
    tier = row[f"tier_{side}"]
    episode, start, length = (int(row[f"{name}_{side}"]) for name in ("episode", "start", "length"))
    lengths = tiers[tier].lengths.tolist()
    if tier == "high" or min(episode, start) < 0 or not least <= length <= lengths[episode] - start:
        raise ValueError  # pairs says what is wanted
    return tier, sum(lengths[:episode]) + start


# -------------------------------------------------------------------------------------- texts
def rows(name: str, columns: str, count: int = 0, split: str = "train", unchecked: str = ""):
    """Tuples: the texts under these columns, then whatever is under unchecked ones, of the first
    `count` rows (0: of all), from a file .jsonl(.gz), from {split}.jsonl(.gz) in a folder, or from
    a data set of the hub."""
    columns, unchecked = columns.split(), unchecked.split()
    path = Path(name)  # rather than a hub id, which is `name` or `owner/name`
    if path.is_dir():
        path = path / f"{split}.jsonl"
        path = path if path.is_file() else path.with_suffix(".jsonl.gz")
    try:
        if path.is_file() or ".json" in path.name:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8-sig") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        else:
            from datasets import load_dataset

            rows = list(load_dataset(name, split=split))
    except ImportError as error:
        hub = f"for the hub's, pip install -e '.[hub]' ({one_line(error)})"
        raise ValueError(f"no file {name}; {hub}") from None
    except Exception as error:  # no JSON, no UTF-8, half a .gz; the network, the hub, the cache
        raise ValueError(f"cannot read {path} ({one_line(error)})") from None
    if len(rows) < max(count, 1):
        raise ValueError(f"{path} has {len(rows)} rows, {max(count, 1)} are wanted")
    for number, row in enumerate(rows[: count or None], 1):
        texts = [row.get(key) for key in columns] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path} row {number} needs text under {', '.join(columns)}")
        if re.search("[\ud800-\udfff]", "".join(texts)):
            raise ValueError(f"{path} row {number} holds half a character (a lone surrogate)")
    return [tuple(map(row.get, (*columns, *unchecked))) for row in rows[: count or None]]


def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    plain, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    if not plain:  # what transformers makes up where the files are missing
        raise ValueError(f"{tokenizer.name_or_path} has no tokenizer")
    begin = next(i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
    return ids[:begin], ids[begin + len(plain) :]


def without_prefix(ids: list[int], prefix: list[int]) -> list[int]:
    """Ids without what begins every text, if the text spells it out."""
    return ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids


class Texts:
    """A policy's tokenizer: texts to ids and back, so that a response is read as it was written.
    Lists of ids are cut and completed here; the tokenizer stays as it is."""

    def __init__(self, tokenizer, max_prompt_length: int, response_length: int):
        self.tokenizer, self.eos_id = tokenizer, tokenizer.eos_token_id
        self.max_prompt_length, self.response_length = max_prompt_length, response_length
        self.prefix, _ = special_tokens(tokenizer)  # an end token is no part of a prompt
        if self.eos_id is None:
            raise ValueError(f"{tokenizer.name_or_path} has no end-of-text token")

    def ids(self, texts: list[str], name: str) -> list[list[int]]:
        """Token ids of each text, at least one; special ones only where a text spells them out."""
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        if not all(found):
            raise ValueError(f"{name} row {found.index([]) + 1}: a text becomes no token")
        return found

    def prompts(self, prompts: list[str], name: str) -> list[list[int]]:
        """What the policy reads: what begins every text, and the last tokens of the prompts."""
        room, found = self.max_prompt_length - len(self.prefix), self.ids(prompts, name)
        found = [without_prefix(ids, self.prefix)[::-1] for ids in found]  # the last ones stay
        return [self.prefix + ids[::-1] for ids in _cut(found, room, f"{name}: prompts")]

    def responses(self, rows: list[tuple[str, str]], name: str, append_eos=False) -> list:
        """Token ids of completions of prompts, cut to response_length: what follows the prompt's in
        those of the whole text or, where a token straddles the two, the completion's own; with an
        end token after them, if append_eos and there is none."""
        prompts, completions = zip(*rows)
        before, own = self.ids(prompts, name), self.ids(completions, name)
        whole = self.ids([x + y for x, y in rows], name)
        found = [w[len(b) :] if w[: len(b)] == b else [] for b, w in zip(before, whole)]
        read_back = zip(found, self.decode(before, own), completions)
        spaced = sum(not ids and text == f" {y}" for ids, text, y in read_back)
        if spaced and writes():
            why = "their prompts end in a blank, or inside a word"
            print(f"{name}: {spaced} of {len(rows)} responses get a blank before them: {why}")
        found, end = [x or y for x, y in zip(found, own)], [self.eos_id] * append_eos
        found = _cut(found, self.response_length, f"{name}: responses")
        return [(y if y[-1:] == end else y + end)[: self.response_length] for y in found]

    def pairs(self, pairs: list[tuple[str, str, str]], name: str) -> list[tuple[str, str, str]]:
        """The pairs; special tokens that responses spell out are cut, as `decode` cuts those of
        others. ValueError where no token is left; says how many pairs are of equal responses."""
        special = [str(x) for x in self.tokenizer.added_tokens_decoder.values() if x.special]
        special = "|".join(map(re.escape, special))
        pairs = [(x, re.sub(special, "", y), re.sub(special, "", z)) for x, y, z in pairs]
        for column in zip(*pairs):
            self.ids(column, name)
        equal = sum(chosen == rejected for _, chosen, rejected in pairs)
        if equal and writes():
            print(f"{name}: {equal} of {len(pairs)} pairs have equal responses and teach nothing")
        return pairs

    def decode(self, prompts: list[list[int]], responses: list[list[int]]) -> list[str]:
        """The responses' texts: prompt and response decoded together, without the prompt."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self.tokenizer.batch_decode(prompts, **options)
        whole = [prompt + response for prompt, response in zip(prompts, responses)]
        return [w[len(b) :] for b, w in zip(before, self.tokenizer.batch_decode(whole, **options))]


def _cut(rows: list[list[int]], length: int, what: str) -> list[list[int]]:
    """The rows' first tokens, `length` at most; says how many rows are cut."""
    if (cut := sum(len(row) > length for row in rows)) and writes():
        print(f"{what} are cut to {length} tokens, {cut} of {len(rows)}")
    return [row[: max(0, length)] for row in rows]


def pad(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids, 0 where there is none, and their mask: int64 (rows, longest) each."""
    ids, side = [torch.tensor(row, dtype=torch.int64) for row in rows], "left" if left else "right"
    both = ids, [torch.ones_like(x) for x in ids]
    return tuple(pad_sequence(x, batch_first=True, padding_side=side) for x in both)


def draw(count: int, size: int, step: int, seed: tuple[int, ...]) -> list[int]:
    """Batch number `step` of `size` rows of a stream of shuffled epochs over `count` rows."""
    first, last = step * size, (step + 1) * size
    epochs = range(first // count, -(-last // count))
    stream = [np.random.default_rng([*seed, epoch]).permutation(count) for epoch in epochs]
    return np.concatenate(stream)[first % count :][:size].tolist()


def parts(first: int, last: int, size: int) -> list[slice]:
    """first ... last - 1 in parts of at most `size` rows."""
    return [slice(i, min(i + size, last)) for i in range(first, last, size)]
