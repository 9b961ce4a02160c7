"""Whole runs of the language-model scripts: as a user starts, stops, kills and carries them on,
what they leave on disk, several processes, and bad input. Mathematics: test_llm_math.py.

python -m pytest tests/test_llm_run.py
"""

import contextlib
import fcntl
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import tokenizers
import torch
import transformers
from helpers import (
    CLOCK,
    DRIVER,
    ROOT,
    assert_one_line_error,
    assert_same_run,
    compare_checkpoints,
    files,
    killed_at,
    leaves,
    load,
    metrics,
    read_rows,
    run_process,
    run_script,
    start_process,
    write_rows,
)
from safetensors.torch import load_file, save_file

import aihf_dpo_llm
import aihf_ppo_llm
import rlhf_baseline
from data_gen import read


class Script(NamedTuple):
    module: types.ModuleType
    command: list[str]  # what comes before the flags
    steps: str  # the flag of how long a run is
    flags: str  # of a run of a second
    one_step: str  # flags beside these by which each network takes one step of Adam
    updates: tuple[int, ...]  # steps of Adam in which the run is killed, one in each part of it
    exports: set[str]  # folders with a model


PPO_FLAGS = """--batch-size 8 --minibatch-size 4 --ppo-epochs 2 --temperature 0.8
    --learning-rate 1e-3 --value-learning-rate 1e-3
    --reward-batch-size 4 --reward-learning-rate 3e-3"""
SCRIPTS = {
    "ppo": Script(
        aihf_ppo_llm,
        [],
        "--ppo-steps",
        f"""{PPO_FLAGS} --ppo-steps 3 --policy-steps-per-iteration 2 --demo-weight 0.7
        --preference-weight 1.3 --reward-updates-per-iteration 2""",
        "--ppo-epochs 1 --minibatch-size 8 --reward-updates-per-iteration 1",
        (2 + 8 + 3,),  # 2 of the upper level, 8 of the first PPO step, 3 of the second
        {"policy", "reward"},
    ),
    "dpo": Script(
        aihf_dpo_llm,
        [],
        "--dpo-steps",
        """--dpo-steps 3 --batch-size 4 --learning-rate 3e-3 --demo-weight 0.7
        --preference-weight 1.3 --append-eos""",
        "",
        (2,),
        {"policy"},
    ),
    "rlhf": Script(
        rlhf_baseline,
        ["llm"],
        "--ppo-steps",
        f"""{PPO_FLAGS} --ppo-steps 2 --sft-batch-size 8 --sft-epochs 1 --sft-learning-rate 3e-3
        --reward-batch-size 8 --reward-epochs 1""",
        """--ppo-epochs 1 --minibatch-size 8 --sft-batch-size 22 --reward-batch-size 22""",
        (2, 3 + 2),  # three updates of each of stages 1 and 2
        {"sft", "reward", "policy"},
    ),
}
COMMON = """--num-demonstrations 0 --num-preferences 0 --max-prompt-length 16 --response-length 6
    --micro-batch-size 8 --eval-prompts 6 --eval-every 2 --checkpoint-every 1 --threads 1
    --no-cuda --run-name run"""
TRUTH = ("gt_score", "gt_score_std", "reward_correlation")  # under eval/


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request) -> Script:
    return SCRIPTS[request.param]


def of(script: Script, **values):
    """The value for this script."""
    return next(values[name] for name in SCRIPTS if SCRIPTS[name] is script)


# --------------------------------------------------------------------------- tiny models and data
def byte_level(special: list[str]):
    """As GPT-2's and RoBERTa's: a blank is part of the word behind it."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    return raw, special, tokenizers.pre_tokenizers.ByteLevel.alphabet()


def metaspace(special: list[str]):
    """As Llama 2's: a word begins with ▁, and so does every text."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    spaces = {"replacement": "▁", "prepend_scheme": "first", "split": True}
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**spaces)
    kinds = tokenizers.decoders
    steps = [kinds.Replace("▁", " "), kinds.ByteFallback(), kinds.Fuse(), kinds.Strip(" ", 1, 0)]
    raw.decoder = kinds.Sequence(steps)
    return raw, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], []


WORDS = """the a film story acting plot was is great dull warm slow bright sad funny long really
    quite never always and but so with very""".split()


def sentence(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def save_model(folder: Path, kind: str, tokenizer, ends: str = "", head="CausalLM", **sizes):
    """A random model, but no uniform one, with its tokenizer, which adds special tokens so."""
    rng = random.Random(7)
    raw, special, alphabet = tokenizer
    corpus = [f"{sentence(rng, 9, 12)}. {sentence(rng, 5, 9)}!" for _ in range(300)]
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    raw.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(vocab_size=420, **options))
    if ends:
        numbers = [(name, raw.token_to_id(name)) for name in ends.split() if name != "$A"]
        template = tokenizers.processors.TemplateProcessing(single=ends, special_tokens=numbers)
        raw.post_processor = template
    end = special[0] if len(special) == 1 else "</s>"
    begin = None if len(special) == 1 else "<s>"
    names = {"eos_token": end, "bos_token": begin}
    names |= {"pad_token": special[1]} if ends[-1:] == ">" else {}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    fast.save_pretrained(folder)
    sizes |= {"vocab_size": len(fast), "num_labels": 1, "eos_token_id": fast.eos_token_id}
    sizes |= {"bos_token_id": fast.bos_token_id, "pad_token_id": int(ends[-1:] == ">")}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4 if head == "CausalLM" else 15)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """GPT-2 is the policy, a RoBERTa that reads 64 tokens the judge; `great` is chosen."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    for name, layers in (("gpt2", 1), ("deep", 2)):
        gpt2 = {"n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 96}
        save_model(folder / name, "gpt2", byte_level(["<|endoftext|>"]), **gpt2)
    llama = sizes | {"num_key_value_heads": 2, "max_position_embeddings": 96}
    save_model(folder / "llama", "llama", metaspace(["<unk>", "<s>", "</s>"]), "<s> $A", **llama)
    neox = sizes | {"max_position_embeddings": 96}
    save_model(folder / "neox", "gpt_neox", byte_level(["<|endoftext|>"]), **neox)
    roberta = sizes | {"max_position_embeddings": 66, "head": "SequenceClassification"}
    special = byte_level(["<s>", "<pad>", "</s>"])
    save_model(folder / "roberta", "roberta", special, "<s> $A </s>", **roberta)

    def begin():
        return "the film " + sentence(rng, 1, 4)

    def end(word):
        return f" {word} {sentence(rng, 1, 5)}."

    demos = [{"prompt": begin(), "completion": end("great")} for _ in range(24)]
    pairs = [{"prompt": begin(), "chosen": end("great"), "rejected": end("dull")} for _ in demos]
    prompts = [{"prompt": begin() if i % 5 else sentence(rng, 70, 80)} for i in range(24)]
    for name, rows in (("demonstrations", demos), ("preferences", pairs), ("prompts", prompts)):
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def command(script: Script, world: Path, *flags) -> list[str]:
    given = [*COMMON.split(), *script.flags.split()]
    given += ["--model-name-or-path", world / "gpt2", "--ground-truth-path", world / "roberta"]
    for name in ("demonstrations", "preferences", "prompts"):
        given += [f"--{name}", world / f"{name}.jsonl"]
    return [*script.command, *map(str, given), *map(str, flags)]


def execute(script: Script, cwd: Path, world: Path, *flags) -> tuple[int, str, str]:
    return run_script(script.module, command(script, world, *flags), cwd)


def run(script: Script, cwd: Path, world: Path, *flags) -> Path:
    """A run that has to end well: its folder."""
    code, out, err = execute(script, cwd, world, *flags)
    assert code == 0, (out, err)
    return cwd / "runs" / "run"


def resume(script: Script, folder: Path, *flags) -> tuple[int, str, str]:
    argv = [*script.command, "--resume", folder, *flags]
    return run_script(script.module, argv, folder.parent)


class Killed(BaseException):
    pass


@contextlib.contextmanager
def watched(act=lambda events: None):
    """What a run does, in order: `adam` for each step, and the names of files and folders that it
    writes. act(all so far) comes right before each."""
    events, step, write = [], torch.optim.Adam.step, read.write_whole

    def watched_step(self, *args, **kwargs):
        events.append("adam")
        act(events)
        return step(self, *args, **kwargs)

    def watched_write(path, writer):
        events.append(path.name)
        act(events)
        return write(path, writer)

    with mock.patch.object(torch.optim.Adam, "step", watched_step):
        with mock.patch.object(read, "write_whole", watched_write):
            yield events


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, script, world) -> tuple[Path, list[str]]:
    with watched() as events:
        return run(script, tmp_path_factory.mktemp("undisturbed"), world), events


@pytest.fixture(scope="module")
def plain(undisturbed) -> Path:
    """The folder of an undisturbed run; read only."""
    return undisturbed[0]


@pytest.fixture
def finished(plain, tmp_path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(plain, tmp_path / "runs" / "run"))


def weights(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in files(folder).items() if name.endswith(".safetensors")}


def test_what_a_run_leaves(script, world, plain):
    """Evaluations where they were asked for, whose means are those of samples.jsonl."""
    table = [row for row in metrics(plain) if row.get("charts/stage", "3") == "3"]
    steps = len(table) - 1
    assert [int(row["charts/step"]) for row in table] == list(range(steps + 1))
    evaluated = [int(row["charts/step"]) for row in table if row["eval/kl"]]
    assert evaluated == sorted({0, 2, steps})
    assert table[0]["eval/kl"] == "0"
    samples = read_rows(plain / "samples.jsonl")
    assert len(samples) == 6
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "roberta")
    tokenizer.model_max_length, tokenizer.truncation_side = 64, "left"
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(world / "roberta")
    for name in ("gt_score", "kl", "kl_base", "response_length"):
        mean = sum(sample[name] for sample in samples) / 6
        assert mean == pytest.approx(float(table[-1][f"eval/{name}"]), rel=1e-4, abs=1e-5)
    saved, state = json.loads((plain / "args.json").read_text()), load(plain)
    assert saved.pop("script") == state["script"] and saved == state["args"]
    assert {path.name for path in plain.iterdir() if path.is_dir()} == script.exports
    assert (plain / "samples_sft.jsonl").exists() == (script.module is rlhf_baseline)
    for sample in samples:  # the judge's own number
        text = sample["prompt"] + sample["response"]
        ids = tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
        truth = judge(ids).logits[0, 0].item()
        assert sample["gt_score"] == pytest.approx(truth, rel=1e-3, abs=1e-4)


# --------------------------------------------------------------------------- kill, stop, carry on
MOMENTS = [(event, 0) for event in ("checkpoint.pt", "sft", "reward", "policy")]
MOMENTS += [("checkpoint.pt", -1), *(("update", i) for i in range(2))]


@pytest.mark.parametrize("event, number", MOMENTS)
def test_kill_and_resume(tmp_path, script, world, undisturbed, event, number):
    """Right before the first or last file or folder of that name, or in an update of each part."""
    plain, events = undisturbed
    updates = [i for i, name in enumerate(events) if name == "adam"]
    found = [i for i, name in enumerate(events) if name == event]
    if event == "update":
        found = [updates[n - 1] for n in script.updates]
    moments = ("checkpoint.pt", *script.exports, *["update"] * (number < len(script.updates)))
    if event not in moments:
        pytest.skip("the script has no such moment")
    index = found[number]

    def kill(so_far):
        if len(so_far) == index + 1:
            raise Killed

    with watched(kill), pytest.raises(Killed):
        run(script, tmp_path, world)
    folder = tmp_path / "runs" / "run"
    if (folder / "checkpoint.pt").exists():
        code, out, err = resume(script, folder)
        assert code == 0, (out, err)
    else:  # the name may be used again
        assert "checkpoint.pt" not in events[:index]
        assert_one_line_error(resume(script, folder), "no checkpoint")
        run(script, tmp_path, world)
    assert_same_run(folder, plain)
    assert weights(folder) == weights(plain) and files(folder).keys() == files(plain).keys()


@pytest.mark.parametrize("call, saved", [(1, False), (-1, True)])
def test_interrupt_says_how_to_carry_on(tmp_path, script, world, undisturbed, call, saved):
    """At the first step of Adam and at the last: exit code 130."""
    plain, events = undisturbed
    updates = events.count("adam")

    def interrupt(so_far):
        if so_far[-1] == "adam" and so_far.count("adam") == call % (updates + 1):
            signal.raise_signal(signal.SIGINT)

    with watched(interrupt):
        code, out, err = run_script(script.module, command(script, world), tmp_path)
    how = " ".join([Path(script.module.__file__).name, *script.command, "--resume runs/run"])
    assert code == 130 and "Traceback" not in err
    assert (f"carry on with: python {how}" if saved else "nothing is saved") in out
    if saved:
        assert resume(script, tmp_path / "runs" / "run")[0] == 0
        assert_same_run(tmp_path / "runs" / "run", plain)


def test_two_writers_are_refused(tmp_path, script, world, finished):
    before = files(finished)
    other = finished.with_name("other")  # without a checkpoint yet
    other.mkdir()
    with open(finished / "lock", "w") as lock, open(other / "lock", "w") as its_lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(its_lock, fcntl.LOCK_EX)
        fresh = execute(script, tmp_path, world, "--run-name", "other")
        for result in (resume(script, finished), fresh):
            assert_one_line_error(result, "another process is writing")
        assert_one_line_error(execute(script, tmp_path, world), "--resume runs/run")
    assert files(finished) == before


def test_a_finished_run(tmp_path, script, world, finished, plain):
    """Resumed it changes nothing, evaluated it says what it said, with more steps it goes on."""
    before, last = files(finished), metrics(finished)[-1]
    code, out, err = resume(script, finished)
    after = files(finished)
    assert code == 0 and after.pop("args.json") != before.pop("args.json") and after == before, err
    assert f" gt_score {float(last['eval/gt_score']):.2f}" in out[out.index("final: ") :]
    code, out, err = run_script(script.module, [*script.command, "--evaluate", finished], tmp_path)
    assert code == 0 and {name: files(finished)[name] for name in before} == before, err
    assert f"{float(last['eval/gt_score']):.2f}" in out
    samples = read_rows(finished / "samples.jsonl")[:3]
    lines = [" ".join(f"{x['prompt'][-60:]} >> {x['response']}".split()) for x in samples]
    assert all(f"{x['gt_score']:6.2f} | {line[:160]}" in out for x, line in zip(samples, lines))
    steps = int(last["charts/step"])
    paths = [(f"--{x}-model-path", world / "gpt2") for x in ("sft", "reward")]
    sizes = [("--held-out-share", 0.2), ("--sft-epochs", 9), ("--reward-batch-size", 9)]
    ppo = [paths[1], ("--reward-updates-per-iteration", 9), ("--temperature", 0.5)]
    own = of(script, ppo=ppo, dpo=[], rlhf=[*paths, *sizes])
    assert_one_line_error(resume(script, finished, script.steps, 1), f"more than {script.steps}")
    for flag, value in (("--seed", 2), ("--run-name", "x"), *own):
        result = resume(script, finished, script.steps, steps + 1, flag, value)
        assert_one_line_error(result, f"--resume cannot change {flag}, which is")
    flags, state = [script.steps, steps + 1, "--learning-rate", 5e-4, "--no-anneal"], load(finished)
    state["log"][-1]["charts/wall_seconds"] = 1000.0
    torch.save(state, finished / "checkpoint.pt")
    with mock.patch.object(read, "check_finite", side_effect=SystemExit(1)):
        assert resume(script, finished, *flags)[0] == 1  # before another checkpoint
    code, out, err = resume(script, finished)
    assert code == 0, (out, err)
    table, args = metrics(finished), load(finished)["args"]
    before = metrics(plain)
    before[-1]["charts/wall_seconds"] = "1000"
    assert table[:-1] == before
    assert 1000 < load(finished)["log"][-1]["charts/wall_seconds"] < 1300  # the clock goes on
    given = {"learning_rate": 5e-4, "anneal": False, script.steps[2:].replace("-", "_"): steps + 1}
    given |= {"run_name": "run", "resume": str(finished)}
    assert args == load(plain)["args"] | given
    rates = {x for name, x in leaves(load(finished)).items() if name.endswith("groups.0.lr")}
    assert 5e-4 in rates and weights(finished) != weights(plain)


def test_other_data_and_other_weights_are_refused(tmp_path, script, world):
    """Of what the run learns from: a text of each file, a number of the base model and, where it is
    not in the checkpoint, of the reference."""
    shutil.copytree(world, tmp_path / "world")
    sft = Path(shutil.copytree(world / "gpt2", tmp_path / "world" / "sft"))
    folder = run(script, tmp_path, tmp_path / "world", "--sft-model-path", sft)
    before = files(folder)
    for name in ("demonstrations", "preferences", "prompts"):
        path = tmp_path / "world" / f"{name}.jsonl"
        text = path.read_text()
        rows = read_rows(path)
        key = list(rows[-1])[-1]
        write_rows(path, [*rows[:-1], rows[-1] | {key: rows[-1][key][:-2] + "x."}])
        assert_one_line_error(resume(script, folder), "other data")
        path.write_text(text)
    assert_one_line_error(resume(script, folder, "--eval-prompts", 8), "other data")
    code, out, err = resume(script, folder)
    assert code == 0, (out, err)
    for name in of(script, ppo=("sft", "gpt2"), dpo=("sft", "gpt2"), rlhf=("gpt2",)):
        path = tmp_path / "world" / name / "model.safetensors"
        raw, state = path.read_bytes(), load_file(path)
        state["transformer.h.0.mlp.c_fc.weight"][0, 0] += 1e-3
        save_file(state, path, {"format": "pt"})
        assert_one_line_error(
            resume(script, folder), of(script, ppo="models", dpo="models", rlhf="model")
        )
        path.write_bytes(raw)
    del before["args.json"]
    assert {name: files(folder)[name] for name in before} == before


# ------------------------------------------------------------------------------- full disk and nan
@pytest.mark.parametrize("broken, before", [("save", 1), ("save_pretrained", 0)])
def test_full_disk(tmp_path, script, world, undisturbed, broken, before):
    """In the file before the last checkpoint, or the last model after it: one line, the former
    checkpoint whole, no temporary file; and the run carries on."""
    (plain, events), calls = undisturbed, []
    owner = torch if broken == "save" else transformers.PreTrainedTokenizerBase
    count = sum(name.endswith(".pt") for name in events)
    last = count - before if broken == "save" else len(script.exports)
    original = getattr(owner, broken)

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == last:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    with mock.patch.object(owner, broken, full):
        result = execute(script, tmp_path, world)
    folder = tmp_path / "runs" / "run"
    assert_one_line_error(result, "cannot write", "No space left", code=1)
    steps = load(folder)["log"][-1]["charts/step"]
    assert steps == load(plain)["log"][-1]["charts/step"] - (broken == "save")
    assert not list(folder.glob(".*"))
    if before:  # nor the files of a checkpoint that was not finished
        assert len(list(folder.glob("checkpoint-*"))) == len(load(folder)["files"])
    assert resume(script, folder)[0] == 0
    assert_same_run(folder, plain)
    assert weights(folder) == weights(plain)


def test_not_finite(tmp_path, script, world, monkeypatch):
    result = execute(script, tmp_path, world, "--learning-rate", 1e18)
    assert_one_line_error(result, "is not finite at step", code=1)
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: nan)
    result = execute(script, tmp_path, world, "--run-name", "other")
    assert_one_line_error(result, "gradient is not finite at step 0", code=1)


# -------------------------------------------------------------------------------------- arguments
def arguments(script: Script, *flags):
    """As a script reads them."""
    with mock.patch.object(read, "check_numbers", side_effect=ValueError) as check:
        run_script(script.module, [*script.command, *flags], ROOT)
    return check.call_args.args[0]


def test_presets_are_the_papers_and_flags_beside_them_win(script):
    imdb = arguments(script, "--batch-size", 16, "--preset", "imdb", "--threads", 1)
    assert (imdb.model_name_or_path, imdb.num_preferences) == ("gpt2", 0)
    assert (imdb.batch_size, imdb.threads, imdb.preset) == (16, 1, "imdb")
    hh = arguments(script, "--preset", "hh", "--response-length", 99, "--ground-truth-path", "x")
    assert hh.model_name_or_path == "EleutherAI/pythia-160m" and hh.learning_rate == 1e-6
    assert (hh.response_length, hh.ground_truth_path, hh.max_prompt_length) == (99, "x", 512)
    imdb = arguments(script, "--preset", "imdb")
    for preset in (imdb, hh):
        assert (preset.num_demonstrations, preset.num_preferences) == (0, 0)
    if script.module is aihf_dpo_llm:
        assert (imdb.learning_rate, imdb.batch_size) == (1e-6, 64)
        assert (hh.batch_size, hh.append_eos) == (64, True)
        return
    assert (imdb.batch_size, imdb.minibatch_size, imdb.ppo_epochs, imdb.ppo_steps) == (
        256,
        64,
        4,
        1000,
    )
    assert imdb.kl_coefficient == hh.kl_coefficient == 0.05 and hh.ppo_steps == 24_000
    assert getattr(hh, "append_eos", True) and getattr(hh, "preference_weight", 1) == 1
    assert (imdb.learning_rate, imdb.reward_learning_rate) == (1.41e-5, 1e-5)
    assert (hh.reward_model_path, hh.reward_batch_size) == ("EleutherAI/pythia-1.4b", 8)
    assert (hh.batch_size, hh.reward_learning_rate, hh.dtype) == (4, 1e-5, "bfloat16")
    assert (imdb.reward_batch_size, imdb.value_learning_rate) == (128, 1.41e-5)
    assert hh.value_learning_rate == 1e-6 and getattr(hh, "reward_epochs", 1) == 1
    if script.module is rlhf_baseline:
        assert imdb.sft_learning_rate == hh.sft_learning_rate == 1e-5 and hh.sft_epochs == 1
    if script.module is aihf_ppo_llm:
        assert (imdb.policy_steps_per_iteration, imdb.reward_updates_per_iteration) == (20, 12)
        assert (hh.policy_steps_per_iteration, hh.reward_updates_per_iteration) == (6000, 20)
        assert imdb.demo_weight == hh.demo_weight == imdb.preference_weight == 1


def test_a_preset_beside_resume_counts_too(tmp_path, script, world):
    folder = run(script, tmp_path, world, script.steps, 1)
    plain = arguments(script, "--resume", folder)
    again = arguments(script, "--resume", folder, "--preset", "imdb", "--learning-rate", 3)
    assert plain.model_name_or_path != "gpt2" == again.model_name_or_path
    assert plain.seed == again.seed and again.learning_rate == 3
    own = json.loads((folder / "args.json").read_text()) | {"preset": "hh", "learning_rate": 4}
    (folder / "args.json").write_text(json.dumps(own))
    again = arguments(script, "--resume", folder, "--preset", "hh")  # of the run already
    assert again.learning_rate == 4 and again.model_name_or_path == plain.model_name_or_path


def test_a_run_without_a_name_gets_its_own(tmp_path, script, world):
    names = []
    for _ in range(2):
        with mock.patch.object(read, "open_run", side_effect=ValueError) as open_run:
            execute(script, tmp_path, world, "--run-name=", "--seed", 7)
        names.append(open_run.call_args.args[0].run_name)
    assert names[0] != names[1] and all("llm" in name and "__7__" in name for name in names)


def test_a_gpu_is_used_where_there_is_one_unless_it_is_not_wanted(script, monkeypatch):
    """Each process has its machine's next one, up to where this build of torch has none."""
    calls, args = [], replace(arguments(script), threads=1)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *x, timeout: calls.extend(x)
    )
    assert script.module.start_processes(replace(args, cuda=False))[0] == torch.device("cpu")
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        script.module.start_processes(args)
    assert calls == ["gloo", 1, "nccl"]


def test_what_processes_cannot_share_is_refused(script, monkeypatch):
    sizes = of(script, ppo="reward minibatch", dpo="", rlhf="sft reward minibatch").split()
    names = [f"{x}_batch_size".replace("minibatch_batch", "minibatch") for x in sizes]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: None)
    args = replace(arguments(script), threads=1, cuda=False)
    torch.set_autocast_cache_enabled(True)  # as they are in a process of its own
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert script.module.start_processes(args)[1] == 4
    assert not torch.is_autocast_cache_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
    for name in (*names, *(["batch_size"] if not names else []), "eval_prompts"):
        with pytest.raises(ValueError, match="multiples of 4 processes"):
            script.module.start_processes(replace(args, **{name: 6}))


@pytest.mark.parametrize("name, alone, of_two", [("ppo", 2 + 8, 2 + 16), ("rlhf", 6 + 8, 6 + 16)])
def test_batches_are_of_all_processes(tmp_path, world, monkeypatch, name, alone, of_two):
    """Steps of Adam of one that believes to have a twin and to hold half of every batch: as many on
    the reward, and, for the responses here are twice its share, twice as many on policy and V."""
    for processes, expected in ((1, alone), (2, of_two)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: None)
        (tmp_path / str(processes)).mkdir()
        with watched() as events:
            run(SCRIPTS[name], tmp_path / str(processes), world, "--ppo-steps", 1)
        assert events.count("adam") == expected


# ------------------------------------------------------------------------- processes of their own
def test_as_a_user_with_the_script_and_read_copied_away(tmp_path, script):
    """On the embedded models and data, past all stages, on a console of another encoding. AIHF with
    PPO is killed with the last checkpoint on disk but not yet under its name, and carried on."""
    (tmp_path / "data_gen").mkdir()
    path = Path(shutil.copy(script.module.__file__, tmp_path / "fork.py"))
    shutil.copy(ROOT / "data_gen" / "read.py", tmp_path / "data_gen")
    (tmp_path / "data_gen" / "assets").symlink_to(ROOT / "data_gen" / "assets")
    prompts = read_rows(ROOT / "data_gen/assets/imdb/prompts.jsonl")[:90]
    prompts[-45]["prompt"] = NOT_ASCII
    flags = [*script.flags.split(), *script.one_step.split(), "--response-length", 4]
    flags += ["--num-demonstrations", 24, "--num-preferences", 24, "--eval-prompts", 45]
    flags += ["--prompts", write_rows(tmp_path / "prompts.jsonl", prompts)]
    flags += [script.steps, 2, "--checkpoint-every", 1, "--eval-every", 2, "--threads", 1]
    argv = [*script.command, *flags, "--run-name", "größe"]
    folder = tmp_path / "runs" / "größe"
    if script.module is aihf_ppo_llm:
        code, out, err = killed_at("os.replace", 19, path, argv, tmp_path)
        assert code == -signal.SIGKILL, (code, err)
        assert load(folder)["log"][-1]["charts/step"] == 1 and list(folder.glob(".checkpoint*"))
        argv = ["--resume", "runs/größe"]
    environment = {"PYTHONPATH": "", "PYTHONIOENCODING": "ascii"}
    code, out, err = run_process([path.name, *argv], tmp_path, **environment)
    assert code == 0 and "Traceback" not in err, err
    assert NOT_ASCII.encode("ascii", "replace").decode() in out
    assert "final: " in out and "python benchmark/plot.py runs/gr??e draws it" in out
    assert load(folder)["log"][-1]["charts/step"] == 2 and not list(folder.glob(".*"))
    assert {path.name for path in folder.iterdir() if path.is_dir()} == script.exports
    assert load(folder)["script"].split()[0] == "fork.py"  # what carries this run on


NOT_ASCII = "Amélie – this movie takes"  # first of the prompts of the evaluation above

JOBS = """
import collections, importlib, json, os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import helpers, torch.distributed
os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "False"}
for name, argv, port in json.loads(Path("jobs.json").read_text()):
    os.environ["MASTER_PORT"] = str(port)
    module, shards = importlib.import_module(name), collections.Counter()
    module.fully_shard = lambda part, shard=module.fully_shard, **mesh: (
        shards.update([type(part).__name__]), shard(part, **mesh))
    result = helpers.run_script(module, argv, Path.cwd())
    with open("shards.jsonl", "a") as file:
        print(json.dumps([name, shards]), file=file)
    print(*result, flush=True)
    assert result[0] == 0 and "returned a view" not in result[2], result[2]  # FSDP2 warns of it
    assert not torch.distributed.is_initialized()
Path("done" + os.environ["RANK"]).touch()
"""


def free_ports():
    """Ports below those that the system gives to outgoing connections: these take none of them."""
    for port in random.sample(range(20_000, 32_000), 1_000):
        with contextlib.suppress(OSError):
            socket.create_server(("", port)).close()
            yield port


def second_step(script: Script) -> list[str]:
    """Flags of a run carried on: of AIHF with PPO by ReMax."""
    return [script.steps, "2", *of(script, ppo="--policy-optimizer remax", dpo="", rlhf="").split()]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, world) -> Path:
    """The folder where one torchrun, of two machines with a process each, has made a run of a step
    of each script, NAME_two, and has carried on one of a process alone, NAME_one_then_two."""
    folder, jobs, ports = tmp_path_factory.mktemp("two"), [], free_ports()
    for name, script in SCRIPTS.items():
        flags = [*script.one_step.split(), script.steps, 1, "--runs-dir", folder, "--seed", 3]
        flags += ["--model-name-or-path", world / "deep"]
        run(script, folder, world, *flags, "--run-name", f"{name}_one")
        resumed = shutil.copytree(folder / f"{name}_one", folder / f"{name}_one_then_two")
        begin = [*flags, "--micro-batch-size", 2, "--gradient-checkpointing"]
        carry_on = [*script.command, "--resume", str(resumed), *second_step(script)]
        for argv in (command(script, world, *begin, "--run-name", f"{name}_two"), carry_on):
            jobs.append([script.module.__name__, argv, next(ports)])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "jobs.py").write_text(JOBS)
    argv = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=two"]
    argv += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{next(ports)}", "jobs.py"]
    argv += [ROOT, ROOT / "tests"]
    machines = [start_process(argv, folder, OMP_NUM_THREADS="1") for _ in range(2)]
    try:
        for machine in machines:  # at the end an agent may wait for the other in vain (300 s)
            with contextlib.suppress(subprocess.TimeoutExpired):
                print(*machine.communicate(timeout=150))
    finally:
        for machine in machines:
            machine.terminate()  # and with it its worker
    assert (folder / "done0").exists() and (folder / "done1").exists()
    return folder


def assert_same_but_for_rounding(one: Path, two: Path) -> None:
    """Gradients, which Adam's moments hold, and metrics; weights within two learning rates, because
    Adam makes steps of ± one of what is only rounding where a gradient vanishes."""
    one, two, far = leaves(load(one)), leaves(load(two)), []
    steps_of_rows = ("accuracies", "correlation", "clip_fraction", "wall_seconds")
    assert one.keys() == two.keys()
    for name in [name for name in one if not name.endswith(steps_of_rows)]:
        a, b = one[name], two[name]
        if "exp_avg" in name:
            assert (a - b).abs().max() <= 1e-3 * a.abs().max() + 1e-9, name
        elif isinstance(a, torch.Tensor) and a.dim() > 0:
            assert (a - b).abs().max() <= 2 * 3e-3, name
            far.append(((a - b).abs() > 1e-5 * a.abs() + 1e-6).flatten())
        elif isinstance(a, (float, torch.Tensor)):
            assert float(b) == pytest.approx(float(a), rel=2e-3, abs=2e-4), name
        elif not name.startswith("args."):
            assert a == b, name
    assert torch.cat(far).float().mean() < 0.02


def test_two_processes_are_one(tmp_path, script, world, two_processes):
    (name,) = (name for name in SCRIPTS if SCRIPTS[name] is script)
    one, two, then_two = (two_processes / f"{name}_{x}" for x in ("one", "two", "one_then_two"))
    assert_same_but_for_rounding(one, two)
    if script.module is aihf_ppo_llm:  # no pair is close
        first, second = (metrics(x)[1]["rewards/accuracies"] for x in (one, two))
        assert float(first) == pytest.approx(float(second))
    assert files(one).keys() == files(two).keys()
    for folder in (one, two):
        folder = shutil.copytree(folder, tmp_path / f"{folder.name}_then_one")
        code, out, err = resume(script, folder, *second_step(script))
        assert code == 0, (out, err)
    assert_same_but_for_rounding(tmp_path / f"{name}_one_then_one", then_two)
    found, expected = (metrics(x) for x in (folder, then_two))
    assert len(found) == len(expected) and found[-1].keys() == expected[-1].keys()
    assert found[-1]["charts/step"] == "2"


def test_all_models_but_the_judge_are_shared_out_block_by_block(script, two_processes):
    """Each of the learned and frozen ones whole, and its two blocks; the judge is a RoBERTa."""
    rows = [json.loads(line) for line in open(two_processes / "shards.jsonl")]
    found = [count for name, count in rows if name == script.module.__name__]
    models = of(
        script, ppo={"Policy": 2, "Scorer": 2}, dpo={"Policy": 2}, rlhf={"Policy": 3, "Scorer": 2}
    )
    assert found[0] == models | {"GPT2Block": 2 * sum(models.values())}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run(tmp_path, world, rank):
    """The other says how to carry on, and ends: the run may be carried on at once. Without a name
    all processes agree on one."""
    (tmp_path / "dies.py").write_text(DRIVER)
    script = SCRIPTS["dpo"]
    flags = [*script.one_step.split(), script.steps, 50, "--checkpoint-every", 1, "--threads", 1]
    argv = command(script, world, *flags, "--runs-dir", tmp_path / "runs", "--run-name=")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "dies.py"]
    launch += [ROOT / f"{script.module.__name__}.py", "torch.optim:Adam.step", 3, 9]
    code, out, err = run_process([*launch, *argv], tmp_path, OMP_NUM_THREADS="1", DIES=str(rank))
    assert code == 1 and "Signal 9 (SIGKILL) received by PID" in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert out.count(f"carry on with: python aihf_dpo_llm.py --resume {folder}") == 1
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert load(folder)["log"][-1]["charts/step"] == 2


# ------------------------------------------------------------- what training may and may not see
def test_training_cannot_see_the_ground_truth(tmp_path, script, world, plain):
    """A judge that says the opposite changes columns of the evaluation alone."""
    liar = shutil.copytree(world / "roberta", tmp_path / "liar")
    state = load_file(liar / "model.safetensors")
    for name in ("weight", "bias"):
        state[f"classifier.out_proj.{name}"] *= -3
    save_file(state, liar / "model.safetensors", {"format": "pt"})
    folder = run(script, tmp_path, world, "--ground-truth-path", liar)
    differ = compare_checkpoints(folder, plain, ("args",))
    assert differ and {name.split("/")[-1] for name in differ} <= {*TRUTH}
    assert weights(folder) == weights(plain)
    scores = []
    for judge in (world / "roberta", liar):
        argv = [*script.command, "--evaluate", plain, "--ground-truth-path", judge]
        code, out, err = run_script(script.module, argv, tmp_path)
        assert code == 0, (out, err)
        scores += re.findall(r"gt_score (-?\d+\.\d+)", out)
    assert len(set(scores)) == 2, scores


def test_other_models(tmp_path, script, world):
    """Llama with a byte-order mark, CRLF and no last newline in its data, and what a script can do
    besides: another tokenizer for the reward, ReMax, sums for SFT, an end token for each text."""
    for name in ("demonstrations", "preferences", "prompts"):
        raw = (world / f"{name}.jsonl").read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / f"{name}.jsonl").write_bytes(b"\xef\xbb\xbf" + raw[:-2])
    options = of(
        script,
        ppo="--policy-optimizer remax --demo-loss logistic --reward-model-path NEOX",
        dpo="--sft-normalisation sequence --no-append-eos",
        rlhf="--append-eos --reward-model-path NEOX",
    )
    flags = options.replace("NEOX", str(world / "neox")).split()
    flags += ["--model-name-or-path", world / "llama", script.steps, 1, "--ground-truth-path="]
    for name in ("demonstrations", "preferences", "prompts"):
        flags += [f"--{name}", tmp_path / f"{name}.jsonl"]
    folder = run(script, tmp_path, world, *flags)
    row = metrics(folder)[-1]
    assert float(row["eval/kl"]) != 0 and not {f"eval/{name}" for name in TRUTH} & {*row}
    if script.module is aihf_ppo_llm:
        result = resume(script, folder, "--policy-optimizer", "ppo")
        assert_one_line_error(result, "the run has no critic")
    for kind, model in (("policy", "llama"), ("reward", "neox")):
        vocabularies = [
            transformers.AutoTokenizer.from_pretrained(path).get_vocab()
            for path in (folder / kind, world / model)
            if (folder / kind).exists()
        ]
        assert vocabularies[:1] == vocabularies[1:]
    if script.module is rlhf_baseline:  # with a critic of its own: carried on as if never stopped
        given = ["--no-anneal", script.steps]
        (tmp_path / "whole").mkdir()
        whole = run(script, tmp_path / "whole", world, *flags, *given, 2)
        shutil.rmtree(folder)
        run(script, tmp_path, world, *flags, *given, 1)
        code, out, err = resume(script, folder, *given, 2)
        assert code == 0 and not compare_checkpoints(folder, whole, ("args", "log")), (out, err)


def test_activations_computed_anew_change_nothing(tmp_path, script, world, plain):
    """Blocks run again in backward, and only there; every number stays the same."""
    calls, block = [], transformers.models.gpt2.modeling_gpt2.GPT2Block.forward

    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return block(self, *args, **kwargs)

    with mock.patch.object(transformers.models.gpt2.modeling_gpt2.GPT2Block, "forward", counted):
        run(script, tmp_path, world, "--runs-dir", "other")
        without, calls[:] = list(calls), []
        folder = run(script, tmp_path, world, "--gradient-checkpointing")
    assert sum(calls) == 2 * sum(without) > 0 and calls.count(False) == without.count(False)
    for own, other in zip(metrics(folder), metrics(plain), strict=True):
        for name in set(own) - set(CLOCK):
            assert own[name] == pytest.approx(other[name]) or float(own[name]) == pytest.approx(
                float(other[name]), rel=1e-4, abs=1e-6
            )


def test_bfloat16_is_near_float32(tmp_path, script, world):
    """Products are rounded to three digits; weights and what leaves a model are float32."""
    state = load(run(script, tmp_path, world, "--dtype", "bfloat16"))
    for name in {"policy", "reward"} & set(state):
        assert all(x.dtype == torch.float32 for x in state[name].values() if x.is_floating_point())
    kind, found = getattr(script.module, "LlmArgs", getattr(script.module, "Args", None)), {}
    rows = torch.randint(3, 250, (4, 12), generator=torch.manual_seed(1))
    for dtype in ("float32", "bfloat16"):
        policy = script.module.Policy(str(world / "gpt2"), kind(dtype=dtype, response_length=6))
        with torch.no_grad():
            found[dtype] = policy(rows, torch.ones_like(rows), 12)[0].log_softmax(-1)
        fused = policy.lm.config._attn_implementation == "sdpa"  # slow in bfloat16 on a CPU
        assert fused == (dtype == "float32" or torch.cuda.is_available())
    assert found["bfloat16"].dtype == torch.float32
    error = (found["bfloat16"] - found["float32"]).abs().max()
    assert 1e-4 < error < 0.2 < found["float32"].std()


def test_exported_models_are_what_was_learned(tmp_path, script, world, plain):
    """By transformers' Auto classes, with tokenizers as they came; and a run that begins with the
    policy says of it what the run that made it said."""
    state = leaves(load(plain))
    for name in script.exports:
        head = "SequenceClassification" if name == "reward" else "CausalLM"
        auto = getattr(transformers, f"AutoModelFor{head}")
        model, info = auto.from_pretrained(plain / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        saved = {"sft": "reference", "reward": "reward"}.get(name, "policy")
        inner = "model." if name == "reward" else "lm."
        for key, tensor in model.state_dict().items():
            found = [state.get(f"{saved}.{inner}{key}"), state.get(f"{saved}.{key}")]
            (found,) = [x for x in found if x is not None]
            assert torch.equal(found, tensor), (name, key)
        raw = json.loads((plain / name / "tokenizer.json").read_text())
        assert raw == json.loads((world / "gpt2" / "tokenizer.json").read_text())
        assert raw["truncation"] is None and raw["padding"] is None
        tokenizer = transformers.AutoTokenizer.from_pretrained(plain / name)
        assert len(tokenizer("the film " * 80)["input_ids"]) >= 160 and tokenizer.eos_token_id == 0
    if script.module is rlhf_baseline:
        folder = run(script, tmp_path, world, "--sft-model-path", plain / "policy")
        row = next(row for row in metrics(folder) if row["charts/stage"] == "3")
    else:
        flags = ["--sft-model-path", plain / "policy", script.steps, 1]
        row = metrics(run(script, tmp_path, world, *flags))[0]
    last = metrics(plain)[-1]
    assert row["eval/kl"] == "0"
    for name in ("kl_base", "gt_score", "gt_score_std", "response_length"):
        assert row[f"eval/{name}"] == last[f"eval/{name}"], name


# -------------------------------------------------------------------------------------- bad input
def changed_model(change, flag: str = "model-name-or-path", name: str = "gpt2"):
    """Flags by which a copy of a model is read after change(its folder)."""

    def flags(world: Path, folder: Path) -> list:
        change(shutil.copytree(world / name, folder / "changed"))
        return [f"--{flag}", folder / "changed"]

    return flags


def without_a_weight(name: str):
    def change(folder: Path):
        state = load_file(folder / "model.safetensors")
        del state[name]
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return change


def edited(name: str, edit):
    def change(folder: Path):
        raw = json.loads((folder / name).read_text())
        edit(raw)
        (folder / name).write_text(json.dumps(raw))

    return change


def no_token(world: Path, folder: Path) -> list:
    """A tokenizer to which a zero-width space is nothing, and a completion of nothing else."""
    nothing = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    model = changed_model(edited("tokenizer.json", lambda raw: raw.update(normalizer=nothing)))
    rows = read_rows(world / "demonstrations.jsonl")
    rows[3]["completion"] = "\u200b"
    path = write_rows(folder / "demonstrations.jsonl", rows)
    return [*model(world, folder), "--demonstrations", path]


def another_end(folder: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<another end>"})
    tokenizer.save_pretrained(folder)


def another_beginning(folder: Path):
    """In front of every text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    begin = [("<begin>", tokenizer.bos_token_id)]
    process = tokenizers.processors.TemplateProcessing(single="<begin> $A", special_tokens=begin)
    tokenizer.backend_tokenizer.post_processor = process
    tokenizer.save_pretrained(folder)


def without_tokenizer(folder: Path):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def three_outputs(world, folder):
    other = {"num_labels": 3, "ignore_mismatched_sizes": True}
    kind, name = transformers.AutoModelForSequenceClassification, world / "roberta"
    kind.from_pretrained(name, **other).save_pretrained(folder / "three")
    transformers.AutoTokenizer.from_pretrained(name).save_pretrained(folder / "three")
    return ["--ground-truth-path", folder / "three"]


def policy_of(kind, **sizes):
    def make(world, folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(world / "gpt2")
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=8, num_hidden_layers=1, vocab_size=len(tokenizer), pad_token_id=0, **sizes
        )
        model = getattr(transformers, f"{kind}For{'MaskedLM' if kind == 'Roberta' else 'CausalLM'}")
        for saved in (model(config), tokenizer):
            saved.save_pretrained(folder / kind)
        return ["--model-name-or-path", folder / kind]

    return make


WITHOUT_A_NORM = without_a_weight("transformer.h.0.ln_1.weight")
HEADLESS = without_a_weight("classifier.out_proj.weight")
LARGE = edited("tokenizer.json", lambda raw: raw["model"]["vocab"].update(zzzz=9999))
ENDLESS = edited("tokenizer_config.json", lambda raw: raw.update(eos_token=None))


def test_a_tokenizer_may_know_an_unused_token_more(tmp_path, world, script):
    """Gemma 3's, of the sizes that read no images."""
    folder = shutil.copytree(world / "gpt2", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    args = types.SimpleNamespace(gradient_checkpointing=False, dtype="float32")
    model, found = script.module.load("CausalLM", str(folder), args)
    assert len(found) == model.get_input_embeddings().num_embeddings + 1


BAD = {  # flags, or what makes them of the world and a folder; the line. More of it: test_read.py
    "no model": (["--model-name-or-path", "./nowhere"], "./nowhere"),
    "no judge": (["--ground-truth-path", "a/b/nowhere"], "nowhere"),
    "no file": (["--preferences", "nowhere.jsonl"], "nowhere.jsonl"),
    "few prompts": (["--eval-prompts", 25], "--eval-prompts"),
    "no token": (no_token, "demonstrations.jsonl row 4"),
    "no tokenizer": (changed_model(without_tokenizer), "changed has no tokenizer"),
    "no weight": (changed_model(WITHOUT_A_NORM), "h.0.ln_1.w"),
    "no weight, judge": (changed_model(HEADLESS, "ground-truth-path", "roberta"), "lacks class"),
    "large tokenizer": (changed_model(LARGE), "more tokens than its model"),
    "an end token too many": (changed_model(another_end), "more tokens than its model"),
    "a first token too many": (changed_model(another_beginning), "more tokens than its model"),
    "no end token": (changed_model(ENDLESS), "no end-of-text token"),
    "long texts": (["--response-length", 81], "reads 96 tokens"),
    "an untrained judge": (lambda world, _: ["--ground-truth-path", world / "gpt2"], "gpt2"),
    "three outputs": (three_outputs, "three"),
    "recurrent": (policy_of("Mamba", state_size=4), "Mamba is an encoder or recurrent"),
    "encoder": (policy_of("Roberta", num_attention_heads=2), "Roberta is an encoder or recurrent"),
    "other vocabulary": (lambda world, _: ["--sft-model-path", world / "llama"], "vocabular"),
    "zero": (["--batch-size", 0], "--batch-size"),
    "threads": (["--threads", 10**11], "Overflow"),
    "unwritable": (lambda world, _: ["--runs-dir", world / "prompts.jsonl"], "prompts.jsonl"),
}
BAD_PPO = {  # of the scripts that have these flags
    "minibatches": (["--minibatch-size", 3], "--minibatch-size divides"),
    "lambda": (["--gae-lambda", 1.5], "--gae-lambda"),
    "no prompt to learn on": (["--eval-prompts", 24], "--eval-prompts"),
    "nothing": (["--demo-weight", 0, "--preference-weight", 0], "nothing to learn"),
    "no reward model": (["--reward-model-path", "./nowhere"], "./nowhere"),
    "no weight, reward": (changed_model(WITHOUT_A_NORM, "reward-model-path"), "h.0.ln_1.w"),
    "no critic": (policy_of("ModernBertDecoder", num_attention_heads=2), "it is no critic"),
}


@pytest.mark.parametrize("case", BAD | BAD_PPO)
def test_bad_input(tmp_path, script, world, case):
    """One clear line, exit code 2, and nothing is written."""
    flags, fragment = (BAD | BAD_PPO)[case]
    flag = flags[0] if case in ("nothing", "no reward model") else "--minibatch-size"
    if case in BAD_PPO and not hasattr(arguments(script), flag[2:].replace("-", "_")):
        pytest.skip("the script has no such flag")
    flags = flags(world, tmp_path) if callable(flags) else flags
    (tmp_path / "cwd").mkdir()
    assert_one_line_error(execute(script, tmp_path / "cwd", world, *flags), fragment)
    assert not list((tmp_path / "cwd").iterdir())


def test_tracking_is_asked_for_and_may_refuse(tmp_path, script, world, monkeypatch):
    def refuse(**settings):
        raise RuntimeError(f"no API key\nlog in first, {settings['id']}")

    monkeypatch.setitem(sys.modules, "wandb", None)  # to import it would raise
    assert_one_line_error(execute(script, tmp_path, world, "--track"), "wandb")
    wandb, rows = (
        types.SimpleNamespace(
            init=refuse, log=lambda row, step=None: rows.append((step, dict(row)))
        ),
        [],
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    result = execute(script, tmp_path, world, "--track", "--run-name", "a:b")
    assert_one_line_error(result, "no API key log in first, a-b")
    assert [path.name for path in (tmp_path / "runs/a:b").iterdir()] == ["lock"]
    settings = {}
    wandb.init = lambda **given: settings.update(given)
    folder = run(script, tmp_path, world, "--track", script.steps, 1)
    assert settings["id"] == "run" and settings["config"]["micro_batch_size"] == 8
    start = next(row for _, row in rows if row["charts/step"] == 0)
    assert "eval/kl" in start and [row for _, row in rows].count(start) == 1
    step, row = rows[-1]
    last = len(metrics(folder)) - 1
    assert row["charts/step"] == 1 and step == of(script, ppo=1, dpo=1, rlhf=last)
    assert settings["resume"] is None
    assert {k: f"{v:.9g}" for k, v in row.items()} == {
        k: v for k, v in metrics(folder)[-1].items() if v
    }
    rows.clear()
    assert resume(script, folder, "--track", script.steps, 2)[0] == 0
    assert [step for step, _ in rows] == of(script, ppo=[1, 2], dpo=[1, 2], rlhf=[last + 1])
    assert settings["resume"] == "allow"
    settings.clear()
    assert run_script(script.module, [*script.command, "--evaluate", folder], tmp_path)[0] == 0
    assert not settings  # an evaluation is not tracked
