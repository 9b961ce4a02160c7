"""The language-model scripts' mathematics and their loops, against slow references.

What whole runs do not show of equations; models against passes without padding and cache; texts;
then whole runs, in float64, against Algorithm 1 (PPO, ReMax), (13) (DPO) and the three stages of
RLHF in explicit loops, row by row, with Adam by hand; and that what is planted is learned.

python -m pytest tests/test_llm_math.py
"""

import contextlib
import inspect
import itertools
import json
import math
import operator
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from helpers import load, read_rows, run_script, write_rows
from torch.utils._python_dispatch import TorchDispatchMode

import aihf_dpo_llm as dpo
import aihf_ppo_llm as ppo
import rlhf_baseline as rlhf
from data_gen import read

PAD, BOS, EOS = 0, 1, 2
WORDS = "a film plot actor scene story camera music end role great awful".split()
VOCABULARY = ["<pad>", "<s>", "</s>", *WORDS]
SCRIPTS = {"ppo": ppo, "dpo": dpo, "rlhf": rlhf}


def having(name: str):
    """The scripts that have this function."""
    found = {key: script for key, script in SCRIPTS.items() if hasattr(script, name)}
    return pytest.mark.parametrize("script", found.values(), ids=found)


def arguments(script, **changes):
    return getattr(script, "LlmArgs", getattr(script, "Args", None))(**changes)


# ------------------------------------------------------------------------- tiny models and data
def word_tokenizer(words: list[str], template: str = "<s> $A"):
    """A token a word, after a begin token."""
    raw = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    raw = tokenizers.Tokenizer(raw)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return complete(raw, template)


def metaspace_tokenizer(template: str = "<s> $A"):
    """As of Llama 2: a word begins with ▁, and so does every text."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<pad>"))
    spaces = {"replacement": "▁", "prepend_scheme": "first", "split": True}
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**spaces)
    kinds = tokenizers.decoders
    steps = [kinds.Replace("▁", " "), kinds.ByteFallback(), kinds.Fuse(), kinds.Strip(" ", 1, 0)]
    raw.decoder = kinds.Sequence(steps)
    special = [*VOCABULARY[:3], *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer
    trainer = trainer(vocab_size=330, special_tokens=special, show_progress=False)
    raw.train_from_iterator([" ".join(WORDS)] * 20 + ["films. Then"] * 5, trainer)
    return complete(raw, template)


def complete(raw, template: str):
    special = [(word, i) for i, word in enumerate(VOCABULARY[:3])]
    template = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    raw.post_processor = template
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def save(
    folder: Path, kind: str, tokenizer, seed: int = 0, head: str = "CausalLM", scale=8, **changes
):
    """A random model, not uniform, with dropout that has to stay off, and its tokenizer."""
    common = {"vocab_size": len(tokenizer), "bos_token_id": BOS, "eos_token_id": EOS}
    common |= {"pad_token_id": PAD, **changes}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 12}
    if kind == "GPT2":
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12}
    if kind == "DistilBert":
        sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
        sizes |= {"max_position_embeddings": 12}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **common})
    model = getattr(transformers, f"Auto{'ModelFor'}{head}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """model, sft, reward (of other tokens) and judge; good texts end in `great`, bad in `awful`."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    same, other = word_tokenizer(VOCABULARY), word_tokenizer(VOCABULARY[:3] + WORDS[::-1])
    save(folder / "model", "GPT2", same, 1)
    save(folder / "sft", "GPT2", same, 2)
    save(folder / "reward", "GPT2", other, 3, "SequenceClassification", num_labels=1)
    save(folder / "judge", "GPT2", same, 4, "SequenceClassification", num_labels=2)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS[:10], rng.integers(low, high)))

    prompts = [words(1, 9) for _ in range(15)]
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    rows = [{"prompt": p, "completion": f" great {words(1, 7)} great"} for p in prompts[10::-1]]
    rows[1]["completion"] = rows[4]["completion"] = " great film </s>"
    write_rows(folder / "demonstrations.jsonl", rows)
    rows = [
        {"prompt": p, "chosen": f" great {words(1, 3)}", "rejected": f" {words(1, 7)} awful"}
        for p in prompts[3:13]
    ]
    rows[2]["rejected"] += " </s>"  # which no reward reads: from other texts decode drops it
    write_rows(folder / "preferences.jsonl", rows)
    return folder


def settings(text: str) -> dict:
    """Flags and their values, a number where it is one."""
    words = text.split()
    values = [json.loads(x) if x[0].isdigit() else x for x in words[1::2]]
    return dict(zip(words[::2], values))


def not_read(flags: dict) -> dict:
    """The files that weights of 0 leave alone are not there."""
    weights = {"demonstrations": "demo_weight", "preferences": "preference_weight"}
    return {name: "./nowhere.jsonl" for name, weight in weights.items() if not flags[weight]}


def plain_pairs(world: Path, count: int) -> list[tuple]:
    """Preferences without the end token that a text spells out."""
    pairs = read_lines(world / "preferences.jsonl")[:count]
    return [tuple(text.replace("</s>", "") for text in pair) for pair in pairs]


def read_lines(path: Path) -> list[tuple]:
    return [tuple(row.values()) for row in read_rows(path)]


def at_most(count: int, kind, name: str):
    """As long as it lasts no call of a module's function may have more rows."""
    function = getattr(kind, name)

    def counting(self, rows, *others):
        assert len(rows) <= count
        return function(self, rows, *others)

    return mock.patch.object(kind, name, counting)


def run(script, cwd: Path, world: Path, flags: dict, *more: str) -> Path:
    given = {f"--{name}": world / f"{name}.jsonl" for name in ("demonstrations", "preferences")}
    given |= {"--prompts": world / "prompts.jsonl", "--model-name-or-path": world / "model"}
    given |= {"--ground-truth-path": world / "judge", "--runs-dir": cwd / "runs"}
    given |= {"--run-name": "run", "--threads": 1}
    given |= {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    command = ["llm"] if hasattr(script, "LlmArgs") else []
    argv = [*command, *(f"{name}={value}" for name, value in given.items()), "--no-cuda", *more]
    ticks = types.SimpleNamespace(perf_counter=itertools.count().__next__, time_ns=lambda: 0)
    saved, write_checkpoint = [], read.write_checkpoint

    def noting_write(folder, state, *parts):
        saved.append(state["log"][-1])
        write_checkpoint(folder, state, *parts)

    patches = [mock.patch.object(script, "time", ticks)]
    patches.append(mock.patch.object(read, "write_checkpoint", noting_write))
    size = flags.get("micro_batch_size", 64)  # of examples, each of one to four texts
    patches.append(at_most(size * (3 if script is dpo else 1), script.Policy, "log_probs"))
    if script is not dpo:
        patches.append(at_most(size * (4 if script is ppo else 2), script.Scorer, "forward"))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        code, out, err = run_script(script, argv, cwd)
    assert code == 0, (out, err)
    last = flags.get("ppo_steps") or flags["dpo_steps"]
    every = flags.get("checkpoint_every") or arguments(script).checkpoint_every
    steps = [row["charts/step"] for row in saved if row.get("charts/stage", 3) == 3]
    assert steps == [*range(every, last, every), last]
    (cwd / "out").write_text(out)
    seconds = [row["charts/wall_seconds"] for row in load(cwd / "runs" / "run")["log"]]
    assert seconds == [seconds[0] + i for i in range(len(seconds))]  # a tick a row, in all
    return cwd / "runs" / "run"


@contextlib.contextmanager
def in_double():
    """Everything in float64, models too, which makes equal what is equal."""
    double = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
    double_model = mock.patch.object(torch.nn.Module, "float", torch.nn.Module.double)
    with double, double_model:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------- a slow reference, in pieces
class Net:
    """A model in float64, unpadded rows, gradients cut by hand and Adam by hand."""

    def __init__(self, model):
        self.model, self.offset, self.updates = model.double().eval(), 0.0, 0
        self.parameters = list(model.parameters())
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    def log_probs(self, x: list[int], y: list[int], temperature: float = 1.0) -> torch.Tensor:
        z = self.model(input_ids=torch.tensor([x + y])).logits[0] / temperature
        z = [z[len(x) + t - 1] for t in range(len(y))]
        return torch.stack([z[t][y[t]] - torch.logsumexp(z[t], 0) for t in range(len(y))])

    @torch.no_grad()
    def sample(self, x: list[int], uniform, temperature: float) -> list[int]:
        y = []
        for u in uniform:
            z = self.model(input_ids=torch.tensor([x + y])).logits[0, -1] / temperature
            probabilities, token = torch.softmax(z, 0).tolist(), 0
            cumulative = probabilities[0]
            while cumulative <= u and token + 1 < len(probabilities):
                token += 1
                cumulative += probabilities[token]
            y.append(token)
            if token == EOS:
                break
        return y

    def numbers(self, ids: list[int]) -> torch.Tensor:
        """A reward model's number at every token."""
        z = self.model.transformer(input_ids=torch.tensor([ids]))[0][0] @ self.model.score.weight.T
        return (z[:, 1] - z[:, 0] if z.shape[1] == 2 else z[:, 0]) - self.offset

    def descend(self, loss: torch.Tensor, rate: float, max_norm: float) -> None:
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
        self.updates += 1
        with torch.no_grad():
            for p, m, v, g in zip(self.parameters, self.first, self.second, gradients):
                g = g * min(1.0, max_norm / (norm + 1e-6))
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g**2)
                m_hat, v_hat = m / (1 - 0.9**self.updates), v / (1 - 0.999**self.updates)
                p -= rate * m_hat / (v_hat.sqrt() + 1e-8)

    def copy(self, other: "Net") -> None:
        """Weights and offset of another, not its moments."""
        self.offset = other.offset
        self.model.load_state_dict(other.model.state_dict())


class Words:
    """What the scripts make of words: a token each, cut as the arguments say."""

    def __init__(self, flags: dict):
        self.flags = flags

    def prompt(self, text: str) -> list[int]:
        ids = [VOCABULARY.index(word) for word in text.split()]
        return [BOS, *ids[-(self.flags["max_prompt_length"] - 1) :]]

    def response(self, text: str) -> list[int]:
        ids = [VOCABULARY.index(word) for word in text.split()]
        if self.flags.get("append_eos") and ids[-1] != EOS:
            ids.append(EOS)
        return ids[: self.flags["response_length"]]

    def text(self, ids: list[int]) -> str:
        return "".join(f" {VOCABULARY[i]}" for i in ids if i > EOS)


def reward_of(net: Net, text: str, vocabulary: list[str] = VOCABULARY) -> torch.Tensor:
    """R of a text: of a long one the last 11 words after the begin token."""
    return net.numbers([BOS, *[vocabulary.index(word) for word in text.split()][-11:]])[-1]


def drawn(count: int, size: int, step: int, *seed: int) -> list[int]:
    places = range(step * size, (step + 1) * size)
    return [
        np.random.default_rng([*seed, i // count]).permutation(count)[i % count] for i in places
    ]


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log(1 + torch.exp(-x))


def load_reference(world: Path, flags: dict) -> dict[str, Net]:
    auto = transformers.AutoModelForCausalLM.from_pretrained
    initial = flags.get("sft_model_path") or world / "model"
    nets = {"policy": Net(auto(initial)), "reference": Net(auto(initial))}
    nets["base"] = Net(auto(world / "model"))
    auto = transformers.AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(flags["seed"])
    nets["reward"] = Net(auto(flags.get("reward_model_path") or world / "model", num_labels=1))
    nets["value"] = Net(auto(initial, num_labels=1))
    if not flags.get("reward_model_path"):
        nets["value"].copy(nets["reward"])
    return nets | {"judge": Net(auto(world / "judge"))}


def evaluated(nets: dict, prompts: list[str], flags: dict, vocabulary, learned=True) -> dict:
    """What an evaluation logs."""
    words, scores = Words(flags), {"kl": [], "kl_base": [], "response_length": []}
    scores |= {"learned_score": [], "gt_score": []} if learned else {"gt_score": []}
    uniform = np.random.default_rng(10_000).random((len(prompts), flags["response_length"]))
    for prompt, u in zip(prompts, uniform):
        x, temperature = words.prompt(prompt), flags.get("temperature", 1.0)
        y = nets["policy"].sample(x, u, temperature)
        log_prob = {
            name: nets[name].log_probs(x, y, temperature).sum().item()
            for name in ("policy", "reference", "base")
        }
        scores["kl"].append(log_prob["policy"] - log_prob["reference"])
        scores["kl_base"].append(log_prob["policy"] - log_prob["base"])
        scores["response_length"].append(len(y))
        text = prompt + words.text(y)
        scores["gt_score"].append(reward_of(nets["judge"], text).item())
        if learned:
            scores["learned_score"].append(reward_of(nets["reward"], text, vocabulary).item())
    truth = scores["gt_score"]
    row = {f"eval/{name}": np.mean(values) for name, values in scores.items()}
    row["eval/gt_score_std"] = np.std(truth)
    ranks = [
        [sum(x < y for x in values) for y in values]
        for values in (scores["learned_score" if learned else "kl"], truth)
    ]
    if np.ptp(ranks[0]):  # else, as at the start of DPO, there is nothing to rank
        row["eval/reward_correlation"] = np.corrcoef(ranks)[0, 1]
    return row


def reference_ppo_step(nets, prompts, held_out, step, seeds, anneal, flags, vocabulary) -> dict:
    """Step `step` of the lower level, by PPO or ReMax: what it logs."""
    words, temperature, size = Words(flags), flags["temperature"], flags["batch_size"]
    is_ppo, policy, value = flags["policy_optimizer"] == "ppo", nets["policy"], nets["value"]
    left, batch = 1 - step / flags["ppo_steps"] if anneal else 1, []
    rates = {"policy": flags["learning_rate"], "value": flags["value_learning_rate"]}
    indices = drawn(len(prompts), size, step, flags["seed"], seeds[0])
    uniform = np.random.default_rng([flags["seed"], seeds[1], step])
    for i, u in zip(indices, uniform.random((size, flags["response_length"]))):
        x = words.prompt(prompts[i])
        y = policy.sample(x, u, temperature)
        with torch.no_grad():
            old = policy.log_probs(x, y, temperature).tolist()
            ref = nets["reference"].log_probs(x, y, temperature).tolist()
            score = reward_of(nets["reward"], prompts[i] + words.text(y), vocabulary).item()
            values = value.numbers(x + y)[len(x) - 1 : -1].tolist()
        ended, n = float(EOS in y), len(y)
        rewards = [-flags["kl_coefficient"] * (old[t] - ref[t]) for t in range(n)]
        rewards[-1] += score
        advantages = []
        if is_ppo:
            for t in range(n):
                advantage = 0.0
                for j in range(t, n):
                    later = values[j + 1] if j + 1 < n else 0.0
                    delta = rewards[j] + later - values[j]
                    advantage += flags["gae_lambda"] ** (j - t) * delta
                advantages.append(advantage)
        else:
            greedy = policy.sample(x, u, 1e-6)
            with torch.no_grad():
                text = prompts[i] + words.text(greedy)
                baseline = reward_of(nets["reward"], text, vocabulary).item()
            advantages = [sum(rewards[t:]) - baseline for t in range(n)]
        returns = [a + v for a, v in zip(advantages, values)]
        row = {"x": x, "y": y, "old": old, "advantages": advantages, "returns": returns}
        row |= {"objective/kl": sum(old) - sum(ref), "objective/scores": score}
        batch.append(row | {"objective/entropy": -sum(old), "charts/ended_share": ended})
    log = {name: np.mean([row[name] for row in batch]) for name in batch[0] if "/" in name}
    if is_ppo:
        flat = [a for row in batch for a in row["advantages"]]
        for row in batch:
            centred = [a - np.mean(flat) for a in row["advantages"]]
            row["advantages"] = [a / math.sqrt(np.var(flat) + 1e-8) for a in centred]
    size = flags["minibatch_size"] if is_ppo else len(batch)
    statistics = []
    for _ in range(flags["ppo_epochs"] if is_ppo else 1):
        for start in range(0, len(batch), size):
            terms = {"policy": [], "value": [], "approx_kl": [], "clip_fraction": []}
            for row in batch[start : start + size]:
                log_probs = policy.log_probs(row["x"], row["y"], temperature)
                numbers = value.numbers(row["x"] + row["y"])
                for t, advantage in enumerate(row["advantages"]):
                    ratio = torch.exp(log_probs[t] - row["old"][t])
                    low, high = 1 - flags["clip"], 1 + flags["clip"]
                    cut = ratio if low < ratio < high else torch.tensor(low if ratio < 1 else high)
                    terms["policy"].append(-torch.minimum(ratio * advantage, cut * advantage))
                    error = numbers[len(row["x"]) - 1 + t] - row["returns"][t]
                    terms["value"].append(error**2 / 2 if is_ppo else torch.zeros(()))
                    terms["approx_kl"].append((log_probs[t] - row["old"][t]) ** 2 / 2)
                    terms["clip_fraction"].append(((ratio - 1).abs() > flags["clip"]).double())
            means = {name: sum(values) / len(values) for name, values in terms.items()}
            for name in ("policy", "value") if is_ppo else ("policy",):
                nets[name].descend(means[name], rates[name] * left, flags["max_grad_norm"])
            statistics.append({name: mean.item() for name, mean in means.items()})
    for name in ("policy", "value", "approx_kl", "clip_fraction"):
        log[f"losses/{name}"] = np.mean([row[name] for row in statistics])
    log["charts/step"] = step + 1
    if (step + 1) % flags["eval_every"] == 0 or step + 1 == flags["ppo_steps"]:
        log |= evaluated(nets, held_out, flags, vocabulary)
    return log


def assert_same_weights(state: dict, nets: dict, *names: str) -> None:
    for name in names:
        found = {
            key.removeprefix("lm.").removeprefix("model."): x for key, x in state[name].items()
        }
        for key, tensor in nets[name].model.state_dict().items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-7, msg=f"{name} {key}")
        if "offset" in found:
            assert found["offset"].item() == pytest.approx(float(nets[name].offset), abs=1e-7)


def assert_same_networks(state: dict, nets: dict, *names: str) -> None:
    """Weights, offset, Adam's moments and its number of steps, of a script and of its reference."""
    assert_same_weights(state, nets, *names)
    for name in names:
        moments = (state.get(f"{name}_optimizer") or state["optimizer"])["state"]
        assert len(moments) == (len(nets[name].parameters) if nets[name].updates else 0)
        for i, its in moments.items():
            assert its["step"] == nets[name].updates
            for key, mine in (("exp_avg", nets[name].first), ("exp_avg_sq", nets[name].second)):
                torch.testing.assert_close(its[key], mine[i], rtol=1e-6, atol=1e-9)


def assert_same_log(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for i, (row, its) in enumerate(zip(found, expected)):
        names = {name for name in its if i or name in row or not name.startswith("charts/")}
        assert {name for name in row if "seconds" not in name} == names
        for name, value in ((name, its[name]) for name in names):
            assert row[name] == pytest.approx(value, abs=1e-7), (its["charts/step"], name)


# ---------------------------------------------------------------------------- repeated on purpose
REPEATED = {  # of aihf_ppo_llm.py; the tests below try these there
    rlhf: """generalised_advantages whiten policy_losses load blocks Policy.__init__ Policy.forward
    Policy.log_probs Scorer in_parts descend share gather total shard whole load_optimizer
    save_model""",
    dpo: "blocks Policy.__init__ Policy.forward share gather shard whole load_optimizer save_model",
}


@pytest.mark.parametrize("script", REPEATED, ids=["rlhf", "dpo"])
def test_what_the_scripts_repeat_is_letter_identical(script):
    for name in REPEATED[script].split():
        mine, its = (inspect.getsource(operator.attrgetter(name)(x)) for x in (ppo, script))
        assert mine == its.replace("args: LlmArgs", "args: Args"), name


# ------------------------------------------------------------------------------------ equations
LENGTHS = [6, 1, 3, 5]
MASK = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("demo_loss", ["linear", "logistic"])
@pytest.mark.parametrize("alpha, weight, penalty", [(0.7, 1.3, 0.2), (2, 0, 0), (0, 0.5, 0.2)])
def test_the_rewards_gradient_is_alpha_g1_plus_g2(demo_loss, alpha, weight, penalty):
    """By (26), (27) and (28), plain number by plain number; a term of weight 0 is left out."""
    args = {"demo_weight": alpha, "preference_weight": weight, "reward_penalty": penalty}
    args, r = arguments(ppo, demo_loss=demo_loss, **args), random(4, 3)
    if not alpha or not weight:
        r[slice(0, 2) if not alpha else slice(2, 4)] = math.nan
    r.requires_grad_()
    losses = ppo.reward_losses(*r, args)
    losses.sum().backward()
    for j in range(3):
        demo, own, chosen, rejected = r[:, j].tolist()
        value, slopes = 0.0, [0.0] * 4
        if alpha:
            other = 1.0 if demo_loss == "linear" else 1 / (1 + math.exp(demo - own))
            gap = demo - own if demo_loss == "linear" else math.log(1 - other)
            value += alpha * (gap - penalty * (demo**2 + own**2))
            slopes[0] = alpha * (other - 2 * penalty * demo)
            slopes[1] = alpha * (-other - 2 * penalty * own)
        if weight:
            other = 1 / (1 + math.exp(chosen - rejected))
            value += weight * math.log(1 - other)
            slopes[2], slopes[3] = weight * other, -weight * other
        assert losses[j].item() == pytest.approx(-value, abs=1e-12)
        found = [0.0 if math.isnan(x) else -x for x in r.grad[:, j].tolist()]
        assert found == pytest.approx(slopes, abs=1e-12)


def test_the_penalty_bounds_what_g1_wants():
    """Ascent on g1 alone over a table of R: (p_E - p_π) / 2λ(p_E + p_π), as the header says."""
    expert, own = torch.tensor([0.7, 0.3, 0.0]), torch.tensor([0.2, 0.3, 0.5])
    args = arguments(ppo, demo_weight=1, preference_weight=0, reward_penalty=0.25)
    r, weight = torch.zeros(3, requires_grad=True), (expert[:, None] * own).flatten()
    optimizer = torch.optim.SGD([r], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        losses = ppo.reward_losses(r.repeat_interleave(3), r.repeat(3), r, r, args)
        (losses * weight).sum().backward()
        optimizer.step()
    torch.testing.assert_close(r.detach(), (expert - own) / (0.5 * (expert + own)))


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
@pytest.mark.parametrize("alpha, weight", [(0.7, 1.3), (1, 1)])
def test_the_dpo_loss_is_13(normalisation, alpha, weight):
    """Value and gradient of a sum over rows."""
    args = {"demo_weight": alpha, "preference_weight": weight}
    args, logs = arguments(dpo, sft_normalisation=normalisation, **args), random(3, 4)
    lengths = torch.tensor([5, 1, 9, 2])
    logs.requires_grad_()
    loss, value, slopes = dpo.aihf_dpo_loss(logs[0], lengths, *logs[1:], args), 0.0, []
    loss.backward()
    for (demo, chosen, rejected), length in zip(logs.T.tolist(), lengths.tolist()):
        length = length if normalisation == "token" else 1
        right = 1 / (1 + math.exp(rejected - chosen))
        value -= alpha * demo / length + weight * math.log(right)
        slope = weight * (1 - right)
        slopes.append([-alpha / length, -slope, slope])
    assert loss.item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(logs.grad.T, torch.tensor(slopes).double())


@having("token_rewards")
def test_where_the_score_goes(script):
    """At the last token, the end token if there is one; all in all E[R] - β KL, (4)."""
    scores, log_ratio = torch.tensor([10.0, 20, 30, 40]).double(), random(4, 6)
    rewards = script.token_rewards(log_ratio, scores, MASK, 0.5)
    for row, n in enumerate(LENGTHS):
        expected = (-0.5 * log_ratio[row, :n]).tolist()
        expected[-1] += scores[row].item()
        assert rewards[row].tolist() == pytest.approx(expected + [0.0] * (6 - n))


@pytest.mark.parametrize("lam", [0.95, 0.7, 1.0])
def test_advantages(lam):
    """Σ λ^k δ of each row alone; padding holds garbage."""
    rewards, values = random(2, 4, 6)
    advantages, returns = ppo.generalised_advantages(rewards * MASK, values, MASK, lam)
    for row, n in enumerate(LENGTHS):
        r, v = rewards[row, :n].tolist(), [*values[row, :n].tolist(), 0.0]
        delta = [r[t] + v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum(lam**k * delta[t + k] for k in range(n - t))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
            if lam == 1:
                assert returns[row, t].item() == pytest.approx(sum(r[t:]), abs=1e-12)
        assert not advantages[row, n:].any() and not returns[row, n:].any()


def test_remax_advantages():
    rewards, mask = torch.tensor([[1.0, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = ppo.remax_advantages(rewards, mask, torch.tensor([2.0, 10.0]))
    assert found.tolist() == [[4, 3, 1], [-1, -5, 0]]


def test_whitening():
    x, inside = random(4, 6) * 3 + 2, MASK.bool()
    white, chosen = ppo.whiten(x, MASK), x[inside].numpy()
    np.testing.assert_allclose(white[inside], (chosen - chosen.mean()) / chosen.std(), rtol=1e-6)
    assert not white[~inside].any()
    torch.testing.assert_close(ppo.whiten(torch.where(inside, x, 1e6), MASK), white)


def test_policy_losses_stop_at_the_clip():
    log_probs = torch.tensor([0.5, -0.5, 0.1, 0.5, -0.5, -0.1]).requires_grad_()
    old, advantages = torch.zeros(6), torch.tensor([1.0, 1, 1, -2, -2, -2])
    losses, ratio = ppo.policy_losses(log_probs, old, advantages, 0.2)
    numbers = zip(log_probs.exp().tolist(), advantages.tolist())
    expected = [-min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in numbers]
    assert losses.tolist() == pytest.approx(expected)
    assert ratio.tolist() == pytest.approx(log_probs.exp().tolist())
    losses.sum().backward()
    assert [g != 0 for g in log_probs.grad.tolist()] == [False, True, True, True, False, True]


# --------------------------------------------------------------------------------------- models
PROMPTS = [[BOS, 8, 9, 10, 11], [BOS, 12], [PAD, 14, 5]]  # one holds the padding's number
RESPONSES = [[7, 6, EOS], [8, 9, 10, 11], [12]]
KINDS = pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX"])
POLICIES = having("Policy")


def make_policy(script, folder: Path, kind: str, **changes):
    args = {"max_prompt_length": 6, "response_length": 6, "micro_batch_size": 2, **changes}
    name = save(folder, kind, word_tokenizer(VOCABULARY))
    return script.Policy(name, arguments(script, **args))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """PROMPTS with RESPONSES."""
    sides = (read.pad(PROMPTS, left=True), read.pad(RESPONSES))
    return tuple(torch.cat(parts, 1) for parts in zip(*sides))


def numbers(uniform: np.ndarray) -> types.SimpleNamespace:
    """In the place of a generator, whose next numbers these are."""
    return types.SimpleNamespace(random=uniform.reshape)


def sampled(script, policy, uniform: np.ndarray) -> list[list[int]]:
    found = policy.sample(PROMPTS, numbers(uniform))
    if isinstance(found, list):  # DPO's
        return found
    ids, mask, alive, ended, texts = found
    n = alive.shape[1]
    assert torch.equal(mask[:, -n:], alive) and torch.equal(ids[:, :-n], padded()[0][:, :-4])
    rows = [row[:length] for row, length in zip(ids[:, -n:].tolist(), alive.sum(-1).tolist())]
    assert texts == policy.texts.decode(PROMPTS, rows)
    assert ended.tolist() == [row[-1] == EOS for row in rows]
    return rows


@KINDS
@POLICIES
def test_cache_and_padding_change_nothing(tmp_path, script, kind):
    """Log-probabilities, and samples up to and with the end token, are those of each row alone."""
    temperature, ends, rows = 1.0 if script is dpo else 0.8, 0, list(zip(PROMPTS, RESPONSES))
    changes = {} if script is dpo else {"temperature": temperature}
    policy = make_policy(script, tmp_path, kind, **changes)
    plain = Net(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    expected = [plain.log_probs(x, y, temperature).float() for x, y in rows]
    if script is dpo:
        found, expected = (
            policy.frozen_log_probs(rows)[:, None],
            [x.sum(0, keepdim=True) for x in expected],
        )
    else:
        ids, mask = padded()
        found = script.in_parts(policy.log_probs, policy.args, ids, mask, mask[:, -4:])
        assert not found[mask[:, -4:] == 0].any()
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[: len(its)], its, atol=1e-4, rtol=1e-4)
    for seed in range(4):
        uniform = np.random.default_rng(seed).random((3, 6))
        found = sampled(script, policy, uniform)
        assert found == [plain.sample(x, u, temperature) for x, u in zip(PROMPTS, uniform)]
        ends += sum(y[-1] == EOS for y in found)
    assert 0 < ends < 12


class WeightCasts(TorchDispatchMode):
    """Counts those of weights to bfloat16."""

    count = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.count += kwargs["dtype"] == torch.bfloat16
        return function(*args, **(kwargs or {}))


@POLICIES
def test_sampling_casts_each_weight_once_unless_they_are_shards(tmp_path, script):
    """FSDP2 gathers a block's weights where they are used: all of them are never held at once."""
    policy, rows, counts = make_policy(script, tmp_path, "GPT2", dtype="bfloat16"), [], []
    with mock.patch.multiple(script, share=lambda x: x, gather=lambda x: x):
        for processes in (False, True):
            torch.set_autocast_cache_enabled(False)  # as start_processes does
            with mock.patch.object(torch.distributed, "is_initialized", lambda: processes):
                with WeightCasts() as casts:
                    rows.append(sampled(script, policy, np.random.default_rng(0).random((3, 6))))
            counts.append(casts.count)
            assert not torch.is_autocast_cache_enabled() and torch.is_grad_enabled()
    assert rows[0] == rows[1] and counts[1] // counts[0] in range(2, 7)
    assert counts[1] % counts[0] == 0


@POLICIES
def test_sampling_goes_on_until_all_processes_have_ended(tmp_path, script):
    policy, uniforms, passes = make_policy(script, tmp_path, "GPT2"), np.random.default_rng(0), []
    policy.register_forward_hook(lambda *call: passes.append(1))
    for uniform in uniforms.random((99, 1, 6)):
        passes.clear()
        alone = policy.sample(PROMPTS[:1], numbers(uniform))
        if len(passes) < 6:  # a response that has ended early
            break
    assert len(passes) < 6
    passes.clear()
    going_on = {"total": lambda x: x + 1, "gather": lambda x: x if x.dtype.is_signed else x ^ x}
    name = "gather" if script is dpo else "total"  # another one's row has not ended
    with mock.patch.object(script, name, going_on[name]):
        found = policy.sample(PROMPTS[:1], numbers(uniform))
    assert len(passes) == 6 and (found if script is dpo else found[-1]) == (
        alone if script is dpo else alone[-1]
    )


def test_scores_of_any_number_of_rows_are_shared(tmp_path, monkeypatch):
    """By three processes, the first row again in the place of those that are missing."""
    policy, rows, shared = make_policy(dpo, tmp_path, "GPT2"), list(zip(PROMPTS, RESPONSES)), []
    rows, expected = [*rows, rows[0]], policy.frozen_log_probs([*rows, rows[0]])
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(dpo, "share", lambda rows: shared.append(rows) or rows)
    torch.testing.assert_close(policy.frozen_log_probs(rows), expected)
    assert shared == [[*rows, *rows[:1] * 2]]


TEXTS = ["film plot", "great", "actor a awful film"]


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "DistilBert", "ModernBertDecoder"])
def test_scores_are_the_classifiers(tmp_path, kind, labels):
    """The last token's number: of one output, or logit 1 - logit 0; of a long text the end's."""
    tokenizer = word_tokenizer(VOCABULARY, "<s> $A </s>")
    name = save(tmp_path, kind, tokenizer, 0, "SequenceClassification", num_labels=labels)
    scorer = ppo.Scorer(name, arguments(ppo, micro_batch_size=2), True)
    scorer.offset += 0.25
    scores = ppo.in_parts(scorer.score, scorer.args, TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        logits = scorer.model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        expected = logits[-1] - (logits[0] if labels == 2 else 0) - 0.25
        torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)
    rounded = ppo.Scorer(name, arguments(ppo, dtype="bfloat16"), True)  # a judge is exact
    rounded.offset += 0.25
    torch.testing.assert_close(rounded.score(TEXTS), scorer.score(TEXTS), atol=1e-5, rtol=1e-5)
    learned = ppo.Scorer(name, arguments(ppo, dtype="bfloat16")).score(TEXTS)
    error = (learned - 0.25 - scores).abs().max()
    assert learned.dtype == torch.float32 and (learned != learned.bfloat16()).any()
    assert 1e-5 < error < 0.1 if scorer.is_decoder else error < 1e-5  # the head is not rounded
    long = scorer.score(
        ["film " * 20 + "plot", "awful " * 20 + "film " * 9 + "plot", "plot film plot"]
    )
    torch.testing.assert_close(long[0], long[1])
    assert (long[0] - long[2]).abs() > 1e-3
    torch.testing.assert_close(scorer.score([f"<s> {text}" for text in TEXTS]), scorer.score(TEXTS))
    model, tokenizer = dpo.load_judge(name, arguments(dpo), torch.device("cpu"))
    for begin in ("", "<s> "):  # what begins every text is read once, also where it is spelled out
        found = dpo.judge_scores(model, tokenizer, [begin + text for text in TEXTS])
        torch.testing.assert_close(found, scores + 0.25, atol=1e-4, rtol=1e-4)
    if scorer.is_decoder:
        rows = [[BOS, 5, PAD, 7], [8, 9]]
        left, right = read.pad(rows, left=True), read.pad(rows)
        found = scorer(*right)
        torch.testing.assert_close(scorer(*left)[1, -2:], found[1, :2], atol=1e-4, rtol=1e-4)


def test_dpo_takes_a_judge_that_needs_its_padding_token(tmp_path):
    tokenizer, sizes = word_tokenizer(VOCABULARY, "<s> $A </s>"), {"d_model": 8, "num_labels": 1}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 8}
    name = save(tmp_path, "Bart", tokenizer, 0, "SequenceClassification", **sizes)
    model, tokenizer = dpo.load_judge(name, arguments(dpo), torch.device("cpu"))
    assert model(**tokenizer("film plot", return_tensors="pt")).logits.shape == (1, 1)


@POLICIES
def test_a_tokenizer_may_read_less_than_its_model(tmp_path, script):
    tokenizer = word_tokenizer(VOCABULARY)
    tokenizer.model_max_length = 5
    name = save(tmp_path, "GPT2", tokenizer, 0, "SequenceClassification", num_labels=1)
    if script is dpo:
        _, tokenizer = dpo.load_judge(name, arguments(dpo), torch.device("cpu"))
        assert tokenizer.model_max_length == 5
        return
    scorer = script.Scorer(name, arguments(script), True)
    assert scorer.limit == 4  # beside the begin token
    long, short = scorer.score(["great " * 9 + "a film plot awful", "a film plot awful"])
    torch.testing.assert_close(long, short)


@pytest.mark.parametrize("kind, changes", [("DistilBert", {}), ("GPT2", {"n_positions": 10})])
@having("Scorer")
def test_what_is_no_critic(tmp_path, world, script, kind, changes):
    """An encoder, which reads whole texts at once, and a reward that reads less than prompt and
    response; the critic is then a model like the policy."""
    tokenizer, changes = word_tokenizer(VOCABULARY), {"num_labels": 1, **changes}
    name = save(tmp_path / "reward", kind, tokenizer, 0, "SequenceClassification", **changes)
    flags = PPO_FLAGS if script is ppo else RLHF_FLAGS | {"sft_epochs": 0.1, "reward_epochs": 0.1}
    state = load(run(script, tmp_path, world, flags | {"ppo_steps": 1, "reward_model_path": name}))
    assert len(state["value"]["model.transformer.wpe.weight"]) == 12


# ---------------------------------------------------------------------------------------- texts
def texts_of(tokenizer, max_prompt_length: int = 5, response_length: int = 4):
    return read.Texts(tokenizer, max_prompt_length, response_length)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("kind", [word_tokenizer, metaspace_tokenizer])
def test_a_response_is_read_and_taught_as_it_was_written(kind, template):
    """Whether it begins with a blank or not."""
    tokenizer = (
        kind(template=template) if kind is metaspace_tokenizer else kind(VOCABULARY, template)
    )
    texts = texts_of(tokenizer, 50, 50)
    rows = [("a film", " great plot"), ("film plot", " a"), ("a story", " end")]
    if kind is metaspace_tokenizer:
        rows += [("a film", "s. Then a plot"), ("a film", ". Then")]
    prompts = texts.prompts([x for x, _ in rows], "file")
    completions = texts.responses(rows, "file")
    assert texts.decode(prompts, completions) == [y for _, y in rows]
    for (x, y), prompt, completion in zip(rows, prompts, completions):  # as the whole is read
        whole = tokenizer(x + y, add_special_tokens=False)["input_ids"]
        assert [i for i in prompt if i != BOS] + completion == whole
        assert prompt.count(BOS) == (template != "$A") and EOS not in prompt
    ids = [[*y, EOS] for y in completions]  # an end token is read as nothing
    assert texts.decode(prompts, ids) == [y for _, y in rows]


def test_a_token_that_straddles_the_two(capsys):
    """Then the completion's own tokens count; how many of them put a blank before it, is said."""
    rows = [("a film", " great"), ("a film ", "great"), ("a fil", "m great")]
    model = Path(ppo.__file__).parent / ppo.ASSETS / "model"
    bytes_ = texts_of(transformers.AutoTokenizer.from_pretrained(model), 50, 50)
    assert bytes_.responses(rows, "")[1:] == bytes_.ids(["great", "m great"], "")
    assert not capsys.readouterr().out
    texts_of(metaspace_tokenizer(), 50, 50).responses(rows, "file")
    assert "file: 2 of 3 responses get a blank before them" in capsys.readouterr().out


def test_texts_are_cut_as_lists_of_ids(capsys):
    """How many, is said."""
    texts = texts_of(word_tokenizer(VOCABULARY, "<s> $A </s>"))
    long, cut = "a film plot actor scene story", [5, 6, 7, 8]
    found = texts.prompts([long, f"<s> {long}", "a", "<s> a"], "file")
    assert found == [[BOS, *cut]] * 2 + [[BOS, 3]] * 2
    assert (
        texts.responses([("a", " " + long), ("a", " a film plot actor")], "file")
        == [[3, 4, 5, 6]] * 2
    )
    said = [
        "file: prompts are cut to 4 tokens, 2 of 4",
        "file: responses are cut to 4 tokens, 1 of 2",
    ]
    assert capsys.readouterr().out.splitlines() == said
    none = texts_of(word_tokenizer(VOCABULARY, "$A"), 4)
    assert none.prompts([long, "a"], "") == [cut, [3]]
    whole = texts_of(word_tokenizer(VOCABULARY), 50, 50)
    assert whole.responses([("a", "a </s>")], "")[0] == [3, EOS]


def test_responses_of_pairs_spell_out_no_special_token(capsys):
    """The reward reads no other responses with one."""
    texts = texts_of(word_tokenizer(VOCABULARY))
    rows = [("a", " film</s>", " plot"), ("<s> a", " film", "</s> film")]
    assert texts.pairs(rows, "x") == [("a", " film", " plot"), ("<s> a", " film", " film")]
    assert "x: 1 of 2 pairs" in capsys.readouterr().out
    texts.tokenizer.backend_tokenizer.add_special_tokens(["<end_of_turn>"])  # unnamed
    rows = [("a", " film<end_of_turn>", "<end_of_turn> plot")]
    assert texts.pairs(rows, "x") == [("a", " film", " plot")]


def test_a_text_of_no_token():
    tokenizer = word_tokenizer(VOCABULARY)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("☃", "")
    texts = texts_of(tokenizer)
    rows = [("a", " film"), ("a", " ☃")]
    for call in (
        lambda: texts.prompts(["a", "☃"], "x.jsonl"),
        lambda: texts.responses(rows, "x.jsonl"),
        lambda: texts.pairs([(x, x, y) for x, y in rows], "x.jsonl"),
        lambda: texts.pairs([(x, y, x) for x, y in rows], "x.jsonl"),
        lambda: texts.pairs([("a", "a", "a"), ("a", "a", "</s>")], "x.jsonl"),
    ):
        with pytest.raises(ValueError, match="x.jsonl row 2"):
            call()


def test_equal_pairs_are_counted(tmp_path, world):
    """By DPO those that are equal after the cut too."""
    sides = [(" great", " film"), (" great", " great"), (" film" * 5 + " great", " film" * 9)]
    rows = [{"prompt": "a", "chosen": w, "rejected": other} for w, other in sides]
    preferences = write_rows(tmp_path / "p.jsonl", rows)
    run(dpo, tmp_path, world, DPO_FLAGS | {"preferences": preferences, "num_preferences": 3})
    assert "p.jsonl: 2 of 3 pairs" in (tmp_path / "out").read_text()


# ----------------------------------------------------------------------------------- Algorithm 1
PPO_FLAGS = settings("""
    seed 7  num_demonstrations 9  num_preferences 7  max_prompt_length 6  response_length 5
    temperature 0.7  micro_batch_size 2  max_grad_norm 0.5  demo_weight 0.7
    preference_weight 1.3  demo_loss linear  response_memory 2  reward_penalty 0.3
    reward_updates_per_iteration 2  reward_batch_size 5  reward_learning_rate 0.015
    policy_optimizer ppo  policy_steps_per_iteration 2  ppo_steps 5  batch_size 6
    minibatch_size 3  ppo_epochs 2  learning_rate 0.02  value_learning_rate 0.03
    gae_lambda 0.8  clip 0.1  kl_coefficient 0.25  eval_prompts 4
    eval_every 2  checkpoint_every 2
""")


def reference_aihf(world: Path, flags: dict, anneal: bool) -> tuple[dict, list, list]:
    """Algorithm 1: the networks, the memory and the log after it."""
    nets, words, vocabulary = load_reference(world, flags), Words(flags), VOCABULARY
    if flags.get("reward_model_path"):
        vocabulary = VOCABULARY[:3] + WORDS[::-1]
    demos = read_lines(world / "demonstrations.jsonl")[: flags["num_demonstrations"]]
    pairs = plain_pairs(world, flags["num_preferences"])
    prompts = [prompt for (prompt,) in read_lines(world / "prompts.jsonl")]
    train, held_out = prompts[: -flags["eval_prompts"]], prompts[-flags["eval_prompts"] :]
    alpha, weight = flags["demo_weight"], flags["preference_weight"]
    policy, reward = nets["policy"], nets["reward"]
    if not alpha:
        demos = [(prompt, "") for prompt in train]
    demo_texts = [x + words.text(words.response(y)) for x, y in demos]

    def r(text: str) -> torch.Tensor:
        return reward_of(reward, text, vocabulary)

    row = evaluated(nets, held_out, flags, vocabulary)
    log, memory, seed = [{"charts/step": 0} | row], [], flags["seed"]
    for step in range(flags["ppo_steps"]):
        row, left = {}, 1 - step / flags["ppo_steps"] if anneal else 1
        if step % flags["policy_steps_per_iteration"] == 0:
            k, batch = step // flags["policy_steps_per_iteration"], flags["reward_batch_size"]
            size = flags["reward_updates_per_iteration"] * batch
            indices = drawn(len(demos), size, k, seed, 1)
            uniform = np.random.default_rng([seed, 3, k]).random((size, flags["response_length"]))
            own = []
            for i, u in zip(indices, uniform):
                y = policy.sample(words.prompt(demos[i][0]), u, flags["temperature"])
                own.append(demos[i][0] + words.text(y))
            memory.append(list(zip(indices, own)))
            memory = memory[-flags["response_memory"] :]
            remembered = [entry for entries in memory for entry in entries]
            order = np.random.default_rng([seed, 4, k]).permutation(len(remembered))
            drawn_pairs = drawn(len(pairs), size, k, seed, 2) if weight else []
            if step == 0 and vocabulary is not VOCABULARY:  # a trained head's level
                with torch.no_grad():
                    reward.offset = reward.offset + np.mean([r(text).item() for text in own])
            for u in range(flags["reward_updates_per_iteration"]):
                loss, right = torch.zeros(()), 0.0
                for j in range(u * batch, (u + 1) * batch):
                    objective, is_right, (i, text) = 0.0, torch.zeros(()), remembered[order[j]]
                    if alpha:
                        r_demo, r_own = r(demo_texts[i]), r(text)
                        gap = r_demo - r_own
                        gap = gap if flags["demo_loss"] == "linear" else log_sigmoid(gap)
                        penalty = flags["reward_penalty"] * (r_demo**2 + r_own**2)
                        objective = alpha * (gap - penalty)
                    if weight:
                        x, chosen, rejected = pairs[drawn_pairs[j]]
                        r_chosen, r_rejected = r(x + chosen), r(x + rejected)
                        objective = objective + weight * log_sigmoid(r_chosen - r_rejected)
                        is_right = r_chosen > r_rejected
                    loss, right = loss - objective / batch, right + is_right.item() / batch
                rate = flags["reward_learning_rate"] * left
                reward.descend(loss, rate, flags["max_grad_norm"])
            row |= {"rewards/loss": loss.item()} | ({"rewards/accuracies": right} if weight else {})
            with torch.no_grad():
                reward.offset = reward.offset + np.mean([r(text).item() for text in own])
                if alpha:
                    row["reward/gap"] = np.mean([r(demo_texts[i]).item() for i in indices])
            if step == 0 and vocabulary is VOCABULARY:
                nets["value"].copy(reward)
        row |= reference_ppo_step(nets, train, held_out, step, (5, 6), anneal, flags, vocabulary)
        log.append(row)
    return nets, memory, log


AIHF_RUNS = {
    "ppo": {},
    "remax": {"policy_optimizer": "remax", "ppo_steps": 3, "minibatch_size": 4}  # not read
    | {"policy_steps_per_iteration": 1, "reward_updates_per_iteration": 3},
    "another reward": {"demo_loss": "logistic", "reward_model_path": "reward", "ppo_steps": 3}
    | {
        "ppo_epochs": 1,
        "max_grad_norm": 50,
    },  # no two flags alike in all runs; one without clipping
    "no demonstrations": {"demo_weight": 0, "ppo_steps": 1},
    "no preferences": {"preference_weight": 0, "ppo_steps": 1},
}


@pytest.mark.parametrize("changes", AIHF_RUNS.values(), ids=AIHF_RUNS)
def test_aihf_is_algorithm_1(tmp_path, world, changes):
    """Every number of a run: weights, moments, memory and log."""
    flags = PPO_FLAGS | {"sft_model_path": world / "sft"} | changes
    anneal = "demo_loss" not in changes
    if "reward_model_path" in changes:
        flags["reward_model_path"] = world / "reward"
    with in_double():
        switch = "--anneal" if anneal else "--no-anneal"
        folder = run(ppo, tmp_path, world, flags | not_read(flags), switch)
        nets, memory, log = reference_aihf(world, flags, anneal)
    state = load(folder)
    assert [*map(tuple, state["memory"])] == [entry for entries in memory for entry in entries]
    assert_same_log(state["log"], log)
    is_ppo = "policy_optimizer" not in changes
    assert_same_networks(state, nets, "policy", "reward", *["value"] * is_ppo)
    assert ("value" in state) == is_ppo  # ReMax has no critic
    if not changes:  # the settings are such that all of this matters
        assert 0.1 < max(row["losses/clip_fraction"] for row in log[1:]) < 0.9
        assert 0 < np.mean([row["charts/ended_share"] for row in log[1:]]) < 1


# ------------------------------------------------------------------------------------------ (13)
DPO_FLAGS = settings("""
    seed 8  num_demonstrations 9  num_preferences 7  max_prompt_length 6  response_length 5
    micro_batch_size 2  max_grad_norm 0.5  demo_weight 0.7  preference_weight 1.3  beta 0.3
    sft_normalisation token  dpo_steps 4  batch_size 5  learning_rate 0.02
    eval_prompts 4  eval_every 3  checkpoint_every 2
""")


def reference_dpo(world: Path, flags: dict, anneal: bool) -> tuple[dict, list]:
    """The networks and the log after it."""
    nets, words = load_reference(world, flags), Words(flags)
    policy, beta = nets["policy"], flags["beta"]
    demos = read_lines(world / "demonstrations.jsonl")[: flags["num_demonstrations"]]
    pairs = read_lines(world / "preferences.jsonl")[: flags["num_preferences"]]
    held_out = [x for (x,) in read_lines(world / "prompts.jsonl")][-flags["eval_prompts"] :]
    alpha, weight, size = flags["demo_weight"], flags["preference_weight"], flags["batch_size"]

    def log_prob(net: Net, prompt: str, response: str) -> torch.Tensor:
        return net.log_probs(words.prompt(prompt), words.response(response)).sum()

    row = evaluated(nets, held_out, flags, VOCABULARY, learned=False)
    log = [{"charts/step": 0} | row]
    for step in range(flags["dpo_steps"]):
        rows = []
        for j in range(size):
            row = {"losses/total": torch.zeros(())}
            if alpha:
                x, y = demos[drawn(len(demos), size, step, flags["seed"], 1)[j]]
                row["logps/demonstrations"] = likelihood = log_prob(policy, x, y)
                if flags["sft_normalisation"] == "token":
                    likelihood = likelihood / len(words.response(y))
                row["losses/total"] = row["losses/total"] - alpha * likelihood
            if weight:
                x, *sides = pairs[drawn(len(pairs), size, step, flags["seed"], 2)[j]]
                for name, y in zip(("chosen", "rejected"), sides):
                    row[f"logps/{name}"] = log_prob(policy, x, y)
                    with torch.no_grad():
                        reference = log_prob(nets["reference"], x, y)
                    row[f"rewards/{name}"] = beta * (row[f"logps/{name}"] - reference)
                margin = row["rewards/chosen"] - row["rewards/rejected"]
                row["rewards/margins"], row["rewards/accuracies"] = margin, (margin > 0).double()
                row["losses/total"] = row["losses/total"] - weight * log_sigmoid(margin)
            rows.append(row)
        means = {name: sum(row[name] for row in rows) / size for name in rows[0]}
        rate = flags["learning_rate"] * (1 - step / flags["dpo_steps"] if anneal else 1)
        policy.descend(means["losses/total"], rate, flags["max_grad_norm"])
        row = {name: mean.item() for name, mean in means.items()} | {"charts/step": step + 1}
        if (step + 1) % flags["eval_every"] == 0 or step + 1 == flags["dpo_steps"]:
            row |= evaluated(nets, held_out, flags, VOCABULARY, learned=False)
        log.append(row)
    return nets, log


DPO_RUNS = {
    "dpo": {},
    "sequence": {"sft_normalisation": "sequence", "append_eos": True, "dpo_steps": 2}
    | {"max_grad_norm": 50},
    "no demonstrations": {"demo_weight": 0, "dpo_steps": 2},
    "no preferences": {"preference_weight": 0, "dpo_steps": 2},
}


@pytest.mark.parametrize("changes", DPO_RUNS.values(), ids=DPO_RUNS)
def test_dpo_is_13(tmp_path, world, changes):
    """Every number of a run."""
    flags, switches = DPO_FLAGS | {"sft_model_path": world / "sft"} | changes, ["--anneal"]
    if flags.get("append_eos"):
        switches = ["--no-anneal", "--append-eos"]
    with in_double():
        given = {name: value for name, value in flags.items() if name != "append_eos"}
        folder = run(dpo, tmp_path, world, given | not_read(flags), *switches)
        nets, log = reference_dpo(world, flags, "--anneal" in switches)
    state = load(folder)
    assert "eval/reward_correlation" not in state["log"][0]  # the policy is the reference
    for row in (state["log"][1], log[1]):  # whose margins are 0 but for rounding
        row.pop("rewards/accuracies", None)
    assert_same_log(state["log"], log)
    assert_same_networks(state, nets, "policy")


# ---------------------------------------------------------------------------- RLHF's three stages
RLHF_FLAGS = settings("""
    seed 7  held_out_share 0.25  sft_epochs 6.0  sft_batch_size 2  sft_learning_rate 0.1
    reward_epochs 20.0  reward_batch_size 4  reward_learning_rate 0.1  ppo_steps 3
    eval_every 1
""")
RLHF_FLAGS = {name: x for name, x in PPO_FLAGS.items() if hasattr(rlhf.LlmArgs, name)} | RLHF_FLAGS


def reference_rlhf(world: Path, flags: dict, anneal: bool) -> tuple[dict, list]:
    """The networks and the log after all stages."""
    nets, words, seed, log = load_reference(world, flags), Words(flags), flags["seed"], []
    own_reward, vocabulary = not flags.get("reward_model_path"), VOCABULARY
    if not own_reward:  # it has a head: no stage 2, and no critic of its vocabulary
        vocabulary = VOCABULARY[:3] + WORDS[::-1]
    skipped = {1: flags.get("sft_model_path"), 2: not own_reward}
    demos = read_lines(world / "demonstrations.jsonl")[: flags["num_demonstrations"]]
    pairs = plain_pairs(world, flags["num_preferences"])
    prompts = [prompt for (prompt,) in read_lines(world / "prompts.jsonl")]
    train, held_out = prompts[: -flags["eval_prompts"]], prompts[-flags["eval_prompts"] :]
    rng, splits = np.random.default_rng([seed, 0]), []
    for rows in (demos, pairs):
        order, kept = rng.permutation(len(rows)), round(flags["held_out_share"] * len(rows))
        splits.append([[rows[i] for i in part] for part in (order[:-kept], order[-kept:])])
    best = {}

    def sft(prompt: str, completion: str) -> tuple[dict, int]:
        y = words.response(completion)
        log_probs = nets["policy"].log_probs(words.prompt(prompt), y, flags["temperature"])
        return {"loss": -log_probs.sum()}, len(y)

    def rewards(prompt: str, chosen: str, rejected: str) -> tuple[dict, int]:
        row = {name: reward_of(nets["reward"], prompt + text)
               for name, text in (("chosen", chosen), ("rejected", rejected))}  # fmt: skip
        margin = row["chosen"] - row["rejected"]
        return row | {"accuracies": (margin > 0).double(), "loss": -log_sigmoid(margin)}, 1

    def mean(loss, rows: list[tuple]) -> dict[str, torch.Tensor]:
        rows, counts = zip(*(loss(*row) for row in rows))
        return {name: sum(row[name] for row in rows) / sum(counts) for name in rows[0]}

    stages = ("sft", "policy", sft), ("rewards", "reward", rewards)
    for stage, (name, net, loss) in enumerate(stages, 1):
        if skipped[stage]:
            continue
        rows, others = splits[stage - 1]
        flag, recent, lowest = ("sft", "reward")[stage - 1], [], math.inf
        size = flags[f"{flag}_batch_size"]
        steps = math.ceil(flags[f"{flag}_epochs"] * len(rows) / size)
        for step in range(steps):
            batch = [rows[i] for i in drawn(len(rows), size, step, seed, stage)]
            now = mean(loss, batch)["loss"]
            rate = flags[f"{flag}_learning_rate"] * (1 - step / steps if anneal else 1)
            nets[net].descend(now, rate, flags["max_grad_norm"])
            recent.append(now.item())
            if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
                with torch.no_grad():
                    found = {key: x.item() for key, x in mean(loss, others).items()}
                row = {"charts/stage": stage, "charts/step": step + 1}
                row |= {f"{name}/held_out_{key}": x for key, x in found.items()}
                log.append(row | {f"{name}/loss": np.mean(recent)})
                recent = []
                if row[f"{name}/held_out_loss"] < lowest:
                    lowest, best[name] = row[f"{name}/held_out_loss"], step + 1
                    state = {key: x.clone() for key, x in nets[net].model.state_dict().items()}
        nets[net].model.load_state_dict(state)
        assert not anneal or best[name] < steps  # the best is not the last
    nets["reference"].copy(nets["policy"])
    texts = [x + words.text(words.response(y)) for x, y in demos]
    if not all(skipped.values()):  # else nothing reads the demonstrations
        with torch.no_grad():
            scores = [reward_of(nets["reward"], text, vocabulary).item() for text in texts]
        nets["reward"].offset = np.mean(scores)
    for name in ("policy", "value"):  # stage 3 begins with new moments
        nets[name] = Net(nets[name].model)
    if own_reward:
        nets["value"].copy(nets["reward"])
    row = evaluated(nets, held_out, flags, vocabulary)
    log.append({"charts/stage": 3, "charts/step": 0} | row)
    for step in range(flags["ppo_steps"]):
        row = reference_ppo_step(nets, train, held_out, step, (3, 4), anneal, flags, vocabulary)
        log.append(row | {"charts/stage": 3})
    return nets, log


RLHF_RUNS = {
    "three stages": {},
    "no annealing": {"append_eos": True, "ppo_steps": 1, "sft_epochs": 2.3, "max_grad_norm": 50},
    "no SFT": {"sft_model_path": "sft", "ppo_steps": 1},
    "another reward": {"reward_model_path": "reward", "ppo_steps": 1},
    "PPO alone": {"sft_model_path": "sft", "reward_model_path": "reward", "ppo_steps": 1}
    | dict.fromkeys(("demonstrations", "preferences"), "./nowhere.jsonl"),
}


@pytest.mark.parametrize("changes", RLHF_RUNS.values(), ids=RLHF_RUNS)
def test_rlhf_is_its_three_stages(tmp_path, world, changes):
    """Every number of a run, which leaves out a stage whose result is given."""
    paths = {name: world / path for name, path in changes.items() if name.endswith("_path")}
    flags, anneal = RLHF_FLAGS | changes | paths, "append_eos" not in changes
    switches = ["--anneal"] if anneal else ["--no-anneal", "--append-eos"]
    with in_double():
        given = {name: value for name, value in flags.items() if name != "append_eos"}
        folder = run(rlhf, tmp_path, world, given, *switches)
        nets, log = reference_rlhf(world, flags | {"policy_optimizer": "ppo"}, anneal)
    state = load(folder)
    state["value"] = state.get("value", state["best_reward"])
    assert_same_log(state["log"], log)
    assert_same_networks(state, nets, "policy", "value")
    assert_same_weights(state, nets, "reference", "reward")
    stages = [name for name in ("sft", "reward") if f"{name}_model_path" not in changes]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*stages, "policy"}


# -------------------------------------------------------------------------------- what is learned
GOOD = " great great great"
LEARN = settings("""
    response_length 3  max_prompt_length 5  num_demonstrations 0  num_preferences 0
    eval_prompts 4  eval_every 50  max_grad_norm 5
""")
LEARN = {
    "ppo": LEARN
    | settings("""
        demo_weight 0.3  reward_learning_rate 0.02  reward_updates_per_iteration 6
        reward_batch_size 8  policy_steps_per_iteration 4  ppo_steps 16  batch_size 32
        minibatch_size 16  learning_rate 0.02  value_learning_rate 0.02
    """),
    "dpo": LEARN | settings("dpo_steps 20  batch_size 8  learning_rate 0.01"),
    "rlhf": LEARN
    | settings("""
        sft_epochs 1  sft_batch_size 8  sft_learning_rate 0.003  reward_epochs 6
        reward_batch_size 8  reward_learning_rate 0.02  ppo_steps 10  batch_size 32
        minibatch_size 16  learning_rate 0.02  value_learning_rate 0.02
    """),
}


@pytest.fixture(scope="module")
def planted(world, tmp_path_factory) -> Path:
    """Demonstrations and chosen responses are great thrice, rejected ones any words."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    save(folder / "model", "GPT2", word_tokenizer(VOCABULARY), 2, scale=1)
    save(folder / "judge", "GPT2", word_tokenizer(VOCABULARY), 4, "SequenceClassification")
    prompts = [{"prompt": prompt} for (prompt,) in read_lines(world / "prompts.jsonl")]
    rows = [prompt | {"completion": GOOD} for prompt in prompts]
    pairs = [
        prompt | {"chosen": GOOD, "rejected": " " + " ".join(rng.choice(WORDS, 3))}
        for prompt in prompts * 3
    ]
    write_rows(folder / "prompts.jsonl", prompts)
    write_rows(folder / "demonstrations.jsonl", rows)
    write_rows(folder / "preferences.jsonl", pairs)
    return folder


def learned(script, folder: Path, planted: Path) -> dict[str, float]:
    """In the mean over prompts: how much better than a bad response the reward finds the good one;
    by how much the policy's log-probability of it has risen (in RLHF, since SFT); and by how much
    the gap has closed."""
    prompts, words = [x for (x,) in read_lines(planted / "prompts.jsonl")], Words(PPO_FLAGS)
    auto, row = transformers.AutoModelForCausalLM.from_pretrained, {}
    first = folder / "sft" if (folder / "sft").exists() else planted / "model"
    with torch.no_grad():
        before, after = (
            np.mean([net.log_probs(words.prompt(x), words.response(GOOD)).sum() for x in prompts])
            for net in (Net(auto(first)), Net(auto(folder / "policy")))
        )
        row["policy"] = after - before
        if hasattr(script, "Scorer"):
            reward = script.Scorer(str(folder / "reward"), arguments(script), True)
            good, bad = (reward.score([x + y for x in prompts]) for y in (GOOD, " film awful plot"))
            row["reward"] = (good - bad).mean().item()
    gaps = [step["reward/gap"] for step in load(folder)["log"] if "reward/gap" in step]
    return row | ({"closed": max(gaps) - gaps[-1]} if gaps else {})


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_planted_is_learned(tmp_path, planted, name):
    row = learned(SCRIPTS[name], run(SCRIPTS[name], tmp_path, planted, LEARN[name]), planted)
    assert all(value > 0.5 for value in row.values()), row
