"""rlhf_baseline.py llm: PPO's mathematics against slow references, tiny random models, and its three stages as a user
runs, kills and resumes them.

python -m pytest tests/test_rlhf_llm.py
"""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_sac_mujoco_run import ROOT, assert_refused, files
from test_sac_mujoco_run import execute as execute_script

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
import rlhf_baseline as rlhf  # noqa: E402

SCRIPT = ROOT / "rlhf_baseline.py"
PAD, EOS = 0, 1
WORDS = "film plot actor scene story camera music end role joke great awful".split()
FLAGS = {
    "--num-demonstrations": 0,
    "--num-preferences": 0,
    "--sft-batch-size": 8,
    "--sft-epochs": 1,
    "--sft-learning-rate": 0.003,
    "--reward-batch-size": 8,
    "--reward-epochs": 1,
    "--reward-learning-rate": 0.003,
    "--ppo-steps": 4,
    "--batch-size": 16,
    "--minibatch-size": 8,
    "--micro-batch-size": 8,
    "--learning-rate": 0.001,
    "--value-learning-rate": 0.001,
    "--response-length": 8,
    "--max-prompt-length": 8,
    "--temperature": 0.8,
    "--missing-eos-penalty": 0.1,
    "--eval-prompts": 8,
    "--eval-every": 2,
    "--checkpoint-every": 1,
    "--threads": 1,
}
TIMES = ("charts/wall_seconds", "charts/episodes_per_second", "charts/rows_per_second")


def configuration(kind: str, **changes):
    if kind == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)  # has to stay off
        sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=48)
        return transformers.GPT2Config(
            vocab_size=300, **sizes, **dropout, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, **changes
        )
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return transformers.GPTNeoXConfig(
        vocab_size=300, **sizes, max_position_embeddings=48, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
        attention_dropout=0.1, hidden_dropout=0.1, **changes,
    )  # fmt: skip


def language_model(kind: str, sharpness: float = 8.0):
    """Random, but not uniform: a tiny new model's logits are almost equal."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM.from_config(configuration(kind)).eval()
    auto.get_output_embeddings().weight.data *= sharpness
    return auto


def make_world(folder: Path, kind: str = "gpt2") -> Path:
    """A tokenizer, a tiny language model, a two-label classifier, and texts: `great` is chosen, `awful` rejected."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def words(count, mood=()):
        return " ".join(rng.choice([*WORDS, *mood], count))

    prompts = [words(rng.integers(2, 7)) for _ in range(60)]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        prompts * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|pad|>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    torch.manual_seed(1)
    classifier = transformers.AutoModelForSequenceClassification.from_config(configuration(kind, num_labels=2))
    classifier.score.weight.data *= 20
    for name, model in (("model", transformers.AutoModelForCausalLM.from_config(configuration(kind))),
                        ("classifier", classifier)):  # fmt: skip
        model.half().save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    write_lines(folder / "prompts.jsonl", [{"prompt": p} for p in prompts])
    rows = [{"prompt": p, "completion": f" great {words(rng.integers(1, 6))}"} for p in prompts[:40]]
    write_lines(folder / "demonstrations.jsonl", rows)
    rows = [{"prompt": p, "chosen": " great great", "rejected": f" awful {words(2)}"} for p in prompts[:40]]
    write_lines(folder / "preferences.jsonl", rows)
    return folder


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(world: Path, runs: Path, *flags, **changes) -> list[str]:
    given = FLAGS | {"--model-name-or-path": world / "model", "--ground-truth-path": world / "classifier"}
    given |= {f"--{name}": world / f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")}
    given |= {"--runs-dir": runs, "--run-name": "run"}
    given |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return ["llm", *(f"{flag}={value}" for flag, value in given.items()), "--no-cuda", *map(str, flags)]


def execute(cwd: Path, argv: list) -> tuple[int, str, str]:
    return execute_script(cwd, argv, SCRIPT)


def run(cwd: Path, world: Path, *flags, **changes) -> Path:
    code, out, err = execute(cwd, command(world, cwd / "runs", *flags, **changes))
    assert code == 0, (out, err)
    return cwd / "runs" / "run"


def rows(folder: Path) -> list[dict]:
    """metrics.csv without times."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world") / "w")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, world) -> Path:
    """An undisturbed run; read only."""
    return run(tmp_path_factory.mktemp("plain"), world)


# ------------------------------------------------------------------------------------------------------ mathematics
def lengths_mask(lengths: list[int], width: int) -> torch.Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0)])
def test_advantages_are_those_of_each_row_alone(gamma, lam):
    """Row by row, token by token, from the definition Σ (γλ)^k δ, in float64; padding holds garbage."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 6, generator=generator).double() for _ in range(2))
    lengths = [6, 1, 3, 5]
    mask = lengths_mask(lengths, 6)
    advantages, returns = rlhf.generalised_advantages(rewards * mask, values, mask, gamma, lam)
    for row, n in enumerate(lengths):
        r, v = rewards[row, :n].tolist(), [*values[row, :n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
        assert not advantages[row, n:].any() and not returns[row, n:].any()


def test_lambda_one_makes_returns_of_the_rewards_to_come():
    rewards, values = torch.randn(2, 3, 5)
    mask = lengths_mask([5, 2, 4], 5)
    _, returns = rlhf.generalised_advantages(rewards * mask, values, mask, 1.0, 1.0)
    expected = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, expected)


def test_response_mask_and_where_the_score_goes():
    """The end token is part of the response and has the score; without one the last token has it."""
    responses = torch.tensor([[5, EOS, PAD, PAD], [5, 6, 7, 8], [EOS, PAD, PAD, PAD], [PAD, 5, EOS, EOS]])
    mask = rlhf.response_mask(responses, EOS)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    scores, log_ratio = torch.tensor([10.0, 20, 30, 40]), torch.arange(16.0).view(4, 4)
    rewards = rlhf.token_rewards(log_ratio, scores, mask, 0.5)
    assert rewards.tolist() == [[0, 9.5, 0, 0], [-2, -2.5, -3, 16.5], [26, 0, 0, 0], [-6, -6.5, 33, 0]]
    total = scores - 0.5 * (log_ratio * mask).sum(-1)  # (4): E[R] - β KL
    torch.testing.assert_close(rewards.sum(-1), total)


def test_masked_mean_and_whitening():
    x, mask = torch.randn(5, 7).double() * 3 + 2, lengths_mask([7, 1, 3, 5, 2], 7)
    chosen = x[mask.bool()].numpy()
    assert rlhf.masked_mean(x, mask).item() == pytest.approx(chosen.mean())
    white = rlhf.whiten(x, mask)
    np.testing.assert_allclose(white[mask.bool()], (chosen - chosen.mean()) / chosen.std(), rtol=1e-6)
    assert not white[~mask.bool()].any()
    spoiled = torch.where(mask.bool(), x, 1e6)
    torch.testing.assert_close(rlhf.whiten(spoiled, mask), white)


def test_token_log_probs():
    logits, tokens = torch.randn(3, 4, 9).double(), torch.randint(9, (3, 4))
    found = rlhf.token_log_probs(logits, tokens, 0.7)
    for row in range(3):
        for t in range(4):
            z = logits[row, t] / 0.7
            expected = z[tokens[row, t]] - math.log(sum(math.exp(value) for value in z.tolist()))
            assert found[row, t].item() == pytest.approx(expected.item())


def test_policy_losses_stop_at_the_clip():
    old = torch.zeros(6)
    log_probs = torch.tensor([0.5, -0.5, 0.1, 0.5, -0.5, -0.1]).requires_grad_()
    advantages = torch.tensor([1.0, 1, 1, -1, -1, -1])
    losses, ratio = rlhf.policy_losses(log_probs, old, advantages, 0.2)
    expected = [-min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratio.tolist(), advantages.tolist())]
    assert losses.tolist() == pytest.approx(expected)
    losses.sum().backward()
    assert [g != 0 for g in log_probs.grad.tolist()] == [False, True, True, True, False, True]


def test_value_losses_stop_at_the_clip():
    old, returns = torch.zeros(4), torch.tensor([1.0, 1, -1, 1])
    values = torch.tensor([0.1, 0.5, 0.5, -0.5]).requires_grad_()
    losses = rlhf.value_losses(values, old, returns, 0.2)
    assert losses.tolist() == pytest.approx([0.5 * 0.81, 0.5 * 0.64, 0.5 * 2.25, 0.5 * 2.25])
    losses.sum().backward()
    assert [g != 0 for g in values.grad.tolist()] == [True, False, True, True]


def test_kl_controller():
    assert rlhf.adapt_kl_coefficient(0.1, 6.0, 6.0, 256, 10_000) == pytest.approx(0.1)
    assert rlhf.adapt_kl_coefficient(0.1, 60.0, 6.0, 256, 10_000) == pytest.approx(0.1 * (1 + 0.2 * 0.0256))
    assert rlhf.adapt_kl_coefficient(0.1, 5.4, 6.0, 256, 10_000) == pytest.approx(0.1 * (1 - 0.1 * 0.0256))


def test_rank_correlation():
    x = torch.tensor([0.1, 5.0, 2.0, 3.0])
    assert rlhf.rank_correlation(x, x**3) == pytest.approx(1)
    assert rlhf.rank_correlation(x, -x) == pytest.approx(-1)
    assert rlhf.rank_correlation(x, torch.tensor([1.0, 2, 4, 3])) == pytest.approx(0.2)


def test_batches_are_epochs_in_random_order():
    drawn = np.concatenate([rlhf.draw(10, 4, step, (3, 1)) for step in range(10)])
    for epoch in range(4):
        assert sorted(drawn[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert list(drawn[:10]) != list(drawn[10:20])
    assert sorted(rlhf.draw(3, 7, 0, (1,))[:3]) == [0, 1, 2]  # a batch larger than the data


# ------------------------------------------------------------------------------------------------------------ models
KINDS = ("gpt2", "gpt_neox")
PROMPTS = [[7, 8, 9, 10, 11], [12], [0, 14, 15]]  # one holds the padding's number
RESPONSES = [[20, 21, EOS], [22, 23, 24, 25], [26]]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_log_prob(kind):
    """Prompts padded on the left and responses on the right against each row alone through the whole model."""
    lm = language_model(kind)
    policy = rlhf.Policy(lm)
    (left, left_mask), (right, right_mask) = rlhf.pad_rows(PROMPTS, PAD, left=True), rlhf.pad_rows(RESPONSES, PAD)
    assert left[1].tolist() == [0, 0, 0, 0, 12] and left_mask[2].tolist() == [0, 0, 1, 1, 1]
    ids, mask = torch.cat([left, right], 1), torch.cat([left_mask, right_mask], 1)
    found = policy(ids, mask, 4, 0.7)
    policy.can_keep = False  # as with older versions of transformers
    torch.testing.assert_close(policy(ids, mask, 4, 0.7), found)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + response])).logits[0].double()
        expected = [
            (logits[len(prompt) + t - 1] / 0.7).log_softmax(-1)[y].item() for t, y in enumerate(response)
        ]  # fmt: skip
        np.testing.assert_allclose(found[row, : len(response)].tolist(), expected, atol=1e-5)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_at_no_temperature_is_greedy_search(kind):
    lm = language_model(kind)
    ids, mask = rlhf.pad_rows(PROMPTS, PAD, left=True)
    uniform = torch.rand(3, 8, dtype=torch.float64)
    sampled = rlhf.Policy(lm).sample(ids, mask, uniform, 1e-6, EOS, PAD)
    for row, prompt in enumerate(PROMPTS):
        greedy = lm.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD,
        )[0, len(prompt):]  # fmt: skip
        assert sampled[row, : len(greedy)].tolist() == greedy.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_does_not_depend_on_the_batch(kind):
    policy = rlhf.Policy(language_model(kind))
    uniform = torch.rand(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = policy.sample(*rlhf.pad_rows(PROMPTS, PAD, left=True), uniform, 1.0, EOS, PAD)
    for row, prompt in enumerate(PROMPTS):
        alone = policy.sample(*rlhf.pad_rows([prompt], PAD, left=True), uniform[row : row + 1], 1.0, EOS, PAD)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_sampling_has_the_models_distribution():
    """2,000 second tokens after the same prompt and first token against the softmax at the temperature."""
    policy = rlhf.Policy(language_model("gpt2", sharpness=30.0))
    ids = torch.tensor([[7, 8]]).repeat(2000, 1)
    uniform = (torch.arange(2000).double()[:, None] + 0.5) / 2000
    sampled = policy.sample(ids, torch.ones_like(ids), uniform, 0.8, EOS, PAD)[:, 0]
    expected = (policy.lm(ids[:1]).logits[0, -1] / 0.8).softmax(-1)
    np.testing.assert_allclose(torch.bincount(sampled, minlength=300) / 2000, expected.detach(), atol=1.5e-3)


def test_sampling_ends_when_every_row_has(monkeypatch):
    policy = rlhf.Policy(language_model("gpt2"))
    script, calls = [[5, EOS], [EOS, 9], [7, 7], [8, 8]], []

    def logits(length, **inputs):
        calls.append(inputs["position_ids"][:, -1].tolist())
        tokens = torch.tensor(script[len(calls) - 1])
        return 1e4 * F.one_hot(tokens, 300)[:, None].float(), None

    monkeypatch.setattr(policy, "logits", logits)
    ids, mask = rlhf.pad_rows([[3, 4], [6]], PAD, left=True)
    sampled = policy.sample(ids, mask, torch.rand(2, 4, dtype=torch.float64), 1.0, EOS, PAD)
    assert sampled.tolist() == [[5, EOS], [EOS, PAD]] and calls == [[1, 0], [2, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_classifiers(tmp_path, kind):
    """The last token's number: of one output, or logit 1 - logit 0; right or left padding changes nothing."""
    world = make_world(tmp_path / "w", kind)
    scorer, trained = rlhf.load_scorer(str(world / "classifier"), "ground-truth-path", True, torch.device("cpu"))
    texts = ["film plot", "great", "actor <|pad|> awful film"]
    scores = scorer.score(texts, 2)
    assert trained and scores.shape == (3,)
    for text, score in zip(texts, scores.tolist()):
        ids = torch.tensor([scorer.tokenizer(text)["input_ids"]])
        logits = scorer.model(ids).logits[0]
        assert score == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
    ids, mask = rlhf.pad_rows(PROMPTS, PAD)
    left_ids, left_mask = rlhf.pad_rows(PROMPTS, PAD, left=True)
    right = rlhf.at_last(scorer(ids, mask), mask)
    torch.testing.assert_close(scorer(left_ids, left_mask)[:, -1], right, atol=1e-5, rtol=1e-5)
    base, trained = rlhf.load_scorer(str(world / "model"), "reward-model-path", False, torch.device("cpu"))
    assert not trained and base.model.config.num_labels == 1 and base.model.dtype == torch.float32
    long = scorer.score(["film " * 100], 2)
    torch.testing.assert_close(scorer.score(["plot " + "film " * 100], 2), long)  # the end is read


def test_scores_of_an_encoder(tmp_path, world):
    """BERT and its like, with a tokenizer of their own."""
    sizes = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=300, max_position_embeddings=48)
    torch.manual_seed(0)
    transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes)).save_pretrained(
        tmp_path / "bert"
    )
    transformers.AutoTokenizer.from_pretrained(world / "model").save_pretrained(tmp_path / "bert")
    scorer, _ = rlhf.load_scorer(str(tmp_path / "bert"), "ground-truth-path", True, torch.device("cpu"))
    texts = ["film plot story", "great"]
    together = scorer.score(texts, 2)
    for text, score in zip(texts, together.tolist()):
        logits = scorer.model(torch.tensor([scorer.tokenizer(text)["input_ids"]])).logits[0]
        assert score == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)


@pytest.mark.parametrize("pad, eos, expected", [(0, 1, 0), (1, 1, 0), (None, 0, 1), (None, 5, 0)])
def test_padding_is_never_the_end_token(monkeypatch, pad, eos, expected):
    class Tokenizer:
        eos_token_id, pad_token_id = eos, pad

    monkeypatch.setattr(rlhf, "load_pretrained", lambda *_: Tokenizer())
    assert rlhf.load_tokenizer("", "")[1:] == (eos, expected)


# -------------------------------------------------------------------------------------------------------- whole runs
def test_stages(world, plain):
    """Rows, files, the first minibatch's ratio and that learning happens."""
    table = rows(plain)
    stages = [(row["charts/stage"], row["charts/step"]) for row in table]
    assert stages == [*(("1", str(i)) for i in range(1, 6)), *(("2", str(i)) for i in range(1, 6)),
                      *(("3", str(i)) for i in range(5))]  # fmt: skip
    sft, reward, ppo = table[:5], table[5:10], table[10:]
    assert float(sft[-1]["sft/held_out_loss"]) < float(sft[0]["sft/held_out_loss"])
    assert float(reward[-1]["rewards/held_out_loss"]) < float(reward[0]["rewards/held_out_loss"]) < 0.75
    for row in reward:
        margin = float(row["rewards/chosen"]) - float(row["rewards/rejected"])
        assert margin == pytest.approx(float(row["rewards/margins"]), abs=1e-5)
    assert ppo[0]["eval/kl"] == "0" and ppo[0]["eval/win_rate"] == "0.5" and ppo[0]["losses/ratio"] == ""
    for row in ppo[1:]:
        assert float(row["losses/ratio"]) == pytest.approx(1, abs=1e-5)
        assert float(row["losses/approx_kl"]) > 0
    assert float(ppo[1]["objective/kl"]) == pytest.approx(0, abs=1e-5) and float(ppo[4]["objective/kl"]) != 0
    assert [bool(row["eval/gt_score"]) for row in ppo] == [True, False, True, False, True]
    names = {"args.json", "metrics.csv", "checkpoint.pt", "sft", "reward", "policy", "samples.jsonl"}
    assert {path.name for path in plain.iterdir()} == names
    assert json.loads((plain / "args.json").read_text())["script"] == "rlhf_baseline"
    samples = [json.loads(line) for line in (plain / "samples.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in samples] == prompts[-8:] and {type(row["response"]) for row in samples} == {str}
    for name in ("gt_score", "learned_score", "kl", "kl_base"):
        mean = np.mean([row[name] for row in samples])
        assert mean == pytest.approx(float(ppo[-1][f"eval/{name}"]), rel=1e-4, abs=1e-5)
    lm = transformers.AutoModelForCausalLM.from_pretrained(plain / "policy")
    state = torch.load(plain / "checkpoint.pt", weights_only=True)
    assert torch.equal(state["parts"]["policy"]["lm.transformer.wte.weight"], lm.transformer.wte.weight)
    sft = transformers.AutoModelForCausalLM.from_pretrained(plain / "sft")
    assert not torch.equal(sft.transformer.wte.weight, lm.transformer.wte.weight)
    assert transformers.AutoTokenizer.from_pretrained(plain / "policy").eos_token_id == EOS


def test_a_given_reward_model_and_policy_leave_stages_1_and_2_out(tmp_path, world):
    """As imdb_data.py uses it: PPO on a classifier from a language model, without demonstrations or preferences. The
    ground truth goes up where it is the reward itself."""
    assets = ROOT / rlhf.ASSETS
    given = {"sft_model_path": assets / "model", "reward_model_path": assets / "classifier"}
    given |= {"ground_truth_path": assets / "classifier", "model_name_or_path": assets / "model"}
    nothing = {"demonstrations": "none.jsonl", "preferences": "none.jsonl"}
    things, ends = "film movie story cast plot music show acting".split(), "is was has seems with of that looks".split()
    openings = [{"prompt": f"The {thing} {end}"} for thing in things for end in ends] * 2
    write_lines(tmp_path / "prompts.jsonl", openings)
    changes = {"ppo_steps": 6, "save_every": 3, "learning_rate": 3e-4, "value_learning_rate": 3e-4, "eval_every": 3}
    changes |= {"batch_size": 64, "minibatch_size": 32, "micro_batch_size": 64, "temperature": 1}
    changes |= {"response_length": 16, "eval_prompts": 64, "prompts": tmp_path / "prompts.jsonl"}
    folder = run(tmp_path, world, **given, **nothing, **changes, missing_eos_penalty=0)
    table = rows(folder)
    assert [row["charts/stage"] for row in table] == ["3"] * 7
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"policy", "policy_3", "policy_6"}
    assert files(folder / "policy") == files(folder / "policy_6")
    truth = [float(row["eval/gt_score"]) for row in table if row["eval/gt_score"]]
    assert truth[-1] > truth[0] + 0.3 and float(table[-1]["eval/win_rate"]) > 0.5
    for row in table:
        if row["eval/gt_score"]:  # one and the same model
            assert row["eval/learned_score"] == row["eval/gt_score"] and float(row["eval/reward_correlation"]) == 1


def test_gpt_neox(tmp_path):
    run(tmp_path, make_world(tmp_path / "w", "gpt_neox"), ppo_steps=2)


def test_a_reward_model_with_another_tokenizer(tmp_path, world):
    """It reads text; the value network, which reads tokens, comes from the policy instead."""
    other = Path(shutil.copytree(world / "classifier", tmp_path / "other"))
    raw = json.loads((other / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    a, b = list(vocabulary)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    run(tmp_path, world, reward_model_path=other, ppo_steps=2)


def test_no_ground_truth_and_adaptive_kl(tmp_path, world, plain):
    """Training does not see the ground truth: without it everything else is the same."""
    folder = run(tmp_path, world, ground_truth_path="")
    seen_by_truth = ("eval/gt_score", "eval/gt_score_std", "eval/win_rate", "eval/reward_correlation")
    for row, other in zip(rows(folder), rows(plain), strict=True):
        assert {**other, **dict.fromkeys(seen_by_truth, "")} == row
    folder = run(
        tmp_path, world, "--adaptive-kl", run_name="run2", kl_coefficient=0.05, target_kl=0.001, kl_horizon=16
    ).with_name("run2")
    beta = [float(row["objective/kl_coefficient"]) for row in rows(folder)[11:]]
    assert beta == pytest.approx([0.05, 0.04, *beta[2:]]) and beta[2] != beta[1]


class Killed(Exception):
    pass


def at(monkeypatch, moment: str, do) -> None:
    """do() after the n-th Adam step of `moment`'s stage (1, 2, 3), or in the n-th half-written checkpoint (save)."""
    adam, save, calls = torch.optim.Adam.step, torch.save, {"adam": 0, "save": 0}
    when = {"1": 3, "2": 8, "3": 10 + 4 * 2 * 2 + 1}.get(moment)

    def step(self, *args, **kwargs):
        adam(self, *args, **kwargs)
        calls["adam"] += 1
        if calls["adam"] == when:
            do()

    def half(state, path):
        calls["save"] += 1
        if f"save{calls['save']}" == moment:
            Path(path).write_bytes(b"half")
            do()
        save(state, path)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(torch, "save", half)


def kill():
    raise Killed


def weights(folder: Path) -> dict:
    return {name: raw for name, raw in files(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("moment", ["1", "2", "3", "save4", "save7", "save10", "save13", "save14", "save16"])
def test_kill_and_resume(tmp_path, world, plain, monkeypatch, moment):
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patched:
        at(patched, moment, kill)
        with pytest.raises(Killed):
            execute(tmp_path, command(world, tmp_path / "runs"))
    code, out, err = execute(tmp_path, ["llm", "--resume", folder])
    assert code == 0, (out, err)
    assert rows(folder) == rows(plain) and weights(folder) == weights(plain)


@pytest.mark.parametrize("moment", ["1", "2", "3"])
def test_interrupt_and_resume(tmp_path, world, plain, monkeypatch, moment):
    folder = tmp_path / "runs" / "run"
    with monkeypatch.context() as patched:
        at(patched, moment, lambda: signal.raise_signal(signal.SIGINT))
        code, out, err = execute(tmp_path, command(world, tmp_path / "runs", checkpoint_every=100))
    assert code == 130 and f"llm --resume {folder}" in out, (out, err)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["progress"]["stage"] == int(moment)
    code, out, err = execute(tmp_path, ["llm", "--resume", folder])
    assert code == 0, (out, err)
    assert rows(folder) == rows(plain) and weights(folder) == weights(plain)


def test_evaluate_and_resume_of_a_finished_run_change_nothing(tmp_path, plain):
    finished = Path(shutil.copytree(plain, tmp_path / "finished"))
    score = float(rows(finished)[-1]["eval/gt_score"])
    before = files(finished)
    code, out, err = execute(tmp_path, ["llm", "--evaluate", finished])
    assert code == 0 and f"ground truth {score:.2f}" in out and files(finished) == before, (out, err)
    code, out, err = execute(tmp_path, ["llm", "--resume", finished])
    assert code == 0 and f"final: ground truth {score:.2f}" in out and files(finished) == before, (out, err)
    code, out, err = execute(tmp_path, ["llm", "--resume", finished, "--ppo-steps", 5])
    assert code == 0 and rows(finished)[:15] == rows(plain) and rows(finished)[15]["charts/step"] == "5", (out, err)


def test_two_processes_are_one(tmp_path, world, plain):
    """torchrun with 2 processes and half the rows each: what is logged is the same up to rounding."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command(world, tmp_path / "runs")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)  # pytest shows this whole when the next line fails, and cuts a long message short
    assert done.returncode == 0
    for row, other in zip(rows(tmp_path / "runs" / "run"), rows(plain), strict=True):
        assert [name for name in row if row[name]] == [name for name in other if other[name]]
        for name, value in row.items():
            if value:
                assert float(value) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-4), (name, row)


def test_micro_batches_change_nothing(tmp_path, world, plain):
    for row, other in zip(rows(run(tmp_path, world, micro_batch_size=3)), rows(plain), strict=True):
        for name, value in row.items():
            assert value == other[name] or float(value) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_not_finite(tmp_path, world, monkeypatch, stage):
    name = {1: "sft_learning_rate", 2: "reward_learning_rate", 3: "learning_rate"}[stage]
    code, out, err = execute(tmp_path, command(world, tmp_path / "runs", **{name: 1e30}))
    assert code == 1 and "is not finite at step" in err, (out, err)
    state = torch.load(tmp_path / "runs" / "run" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["stage"] == stage


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"model_name_or_path": "./nowhere"}, "./nowhere"),
        ({"model_name_or_path": "data_gen/assets/imdb/model"}, "python data_gen/imdb_data.py pretrain"),
        ({"ground_truth_path": "data_gen/assets/imdb/classifier"}, "python data_gen/imdb_data.py classifier"),
        ({"prompts": "data_gen/assets/imdb/prompts.jsonl"}, "python data_gen/imdb_data.py tiers"),
        ({"ground_truth_path": "MODEL"}, "--ground-truth-path"),
        ({"demonstrations": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"demonstrations": "PROMPTS"}, "completion"),
        ({"preferences": "PROMPTS"}, "chosen"),
        ({"prompts": "MODEL"}, "--prompts"),
        ({"eval_prompts": 60}, "--eval-prompts"),
        ({"response_length": 47}, "--response-length"),
        ({"batch_size": 12}, "--batch-size"),
        ({"held_out_share": 1}, "--held-out-share"),
        ({"gamma": 1.5}, "--gamma"),
        ({"temperature": 0}, "--temperature"),
        ({"learning_rate": "nan"}, "--learning-rate"),
        ({"resume": "nowhere"}, "args.json"),
        ({"evaluate": "nowhere"}, "args.json"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, world, changes, fragment):
    places = {"MODEL": world / "model", "PROMPTS": world / "prompts.jsonl"}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    assert_refused(execute(tmp_path, command(world, tmp_path / "runs", **changes)), fragment)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["", "{", '{"prompt": 3}', "[1]", '{"prompt": ""}'])
def test_bad_lines(tmp_path, world, text):
    (tmp_path / "bad.jsonl").write_text(text)
    assert_refused(execute(tmp_path, command(world, tmp_path / "runs", prompts=tmp_path / "bad.jsonl")), "bad.jsonl")
    assert not (tmp_path / "runs").exists()


GOOD = rlhf.LlmArgs()
NUMBERS = [f.name for f in fields(GOOD) if type(getattr(GOOD, f.name)) in (int, float)]


def test_numbers(capsys):
    rlhf.check_llm_args(GOOD)
    for preset in rlhf.PRESETS.values():
        rlhf.check_llm_args(rlhf.LlmArgs(**preset))
    for name in NUMBERS:
        for value in (-1, float("nan"), float("inf"), *(() if name in rlhf.LLM_MAY_BE_ZERO else (0,))):
            with pytest.raises(SystemExit) as stop:
                rlhf.check_llm_args(replace(GOOD, **{name: value}))
            captured = capsys.readouterr()
            assert_refused((stop.value.code, captured.out, captured.err), f"--{name.replace('_', '-')}")


def test_presets_are_the_papers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "llm", "--preset", "imdb", "--batch-size", "64"])
    args = rlhf.complete_llm(rlhf.LlmArgs(preset="imdb"))
    assert (args.model_name_or_path, args.reward_batch_size, args.batch_size) == ("gpt2", 128, 64)
    assert (args.reward_learning_rate, args.learning_rate) == (1e-5, 1.41e-5)
    monkeypatch.setattr(sys, "argv", ["x", "llm", "--preset", "hh"])
    args = rlhf.complete_llm(rlhf.LlmArgs(preset="hh"))
    assert (args.reward_learning_rate, args.learning_rate) == (1e-5, 1e-6)
    assert (args.reward_batch_size, args.batch_size, args.ppo_steps) == (8, 4, 6000)


BAD_RUNS = {
    "no checkpoint": (lambda f, w: (f / "checkpoint.pt").unlink(), [], "checkpoint.pt"),
    "half a checkpoint": (lambda f, w: (f / "checkpoint.pt").write_bytes(b"PK"), [], "checkpoint.pt"),
    "no metrics": (lambda f, w: (f / "metrics.csv").unlink(), [], "metrics.csv"),
    "no reward": (lambda f, w: shutil.rmtree(f / "reward"), [], "reward"),
    "other data": (lambda f, w: set_argument(f, prompts=str(w / "demonstrations.jsonl")), [], "other data"),
    "a robot's": (lambda f, w: set_argument(f, env="Hopper-v4"), [], "args.json"),
    "its own arguments": (lambda f, w: None, ["--seed", 2], "--seed"),
    "fewer steps": (lambda f, w: None, ["--ppo-steps", 2], "--ppo-steps"),
    "both": (lambda f, w: None, ["--evaluate", "."], "--evaluate"),
}


def set_argument(folder: Path, **changes) -> None:
    saved = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**saved, **changes}))


@pytest.mark.parametrize("spoil, flags, fragment", BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_run_folder(tmp_path, world, plain, spoil, flags, fragment):
    finished = Path(shutil.copytree(plain, tmp_path / "finished"))
    spoil(finished, world)
    before = files(finished)
    assert_refused(execute(tmp_path, ["llm", "--resume", finished, *flags]), fragment)
    assert files(finished) == before


def test_an_existing_run_is_not_overwritten(tmp_path, world, plain):
    before = files(plain)
    assert_refused(execute(tmp_path, command(world, plain.parent)), "--resume")
    assert files(plain) == before


def test_help_and_copied_alone(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, "rlhf_baseline.py", "llm"], cwd=tmp_path, capture_output=True, text=True
    )  # fmt: skip
    assert_refused((done.returncode, done.stdout, done.stderr), "python data_gen/imdb_data.py pretrain")
    code, out, _ = execute(tmp_path, ["llm", "--help"])
    assert code == 0 and "--sft-model-path" in out and "--env" not in out
    assert [p.name for p in tmp_path.iterdir()] == ["rlhf_baseline.py"]
