"""AIHF with PPO: one reward from demonstrations and preferences, one language model aligned to it.

"Joint Demonstration and Preference Learning Improves Policy Alignment with Human Feedback", Li et
al., arXiv 2406.06874: Algorithm 1 on language models (6.2, A.2.2). Equation numbers: the paper's.

    python aihf_ppo_llm.py

learns to write movie reviews from 1,000 demonstrations and 1,000 preferences, from a small language
model that is in the repository, in 10 minutes on a core; prints the ground-truth score, used for
nothing else; leaves policy and reward in runs/<run_name>/. --preset imdb and hh are the paper's
models and Table 2; `torchrun --nproc-per-node 2 aihf_ppo_llm.py` shards models (FSDP2).

Three departures from the paper matter (README.md has more):
- g1 (Lemma 5.1) is linear in R and unbounded. λ (R(τ)² + R(τ')²) is subtracted from it, so that the
  best R for g1 alone is (p_E - p_π) / (2λ (p_E + p_π)), p densities of τ and τ': within ±1/(2λ).
- Preferences weigh 3. The reward learns first and fast: otherwise the policy exploits a reward
  that has not seen its text. R is shifted to mean 0 on that text, so that the critic stays valid.
- g1 sees responses of the ten latest policies, so that the reward does not forget earlier ones.

`reward/gap` tells how it goes: large at first, near 0 once the policy is as good as the
demonstrations; far below 0, the policy exploits R with texts unlike the demonstrations.
"""

import copy
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data_gen import read

ASSETS = "data_gen/assets/imdb"


@dataclass
class Args:
    preset: Literal["", "imdb", "hh"] = ""  # Table 2, both weights 1; hh: give --sft-model-path
    model_name_or_path: str = f"{ASSETS}/model"  # the base policy, a folder or hub id
    sft_model_path: str = ""  # start from this policy, which is then the reference π⁰ too
    reward_model_path: str = ""  # base of the reward; "": the base policy. A trained head is kept
    ground_truth_path: str = f"{ASSETS}/classifier"  # sequence classifier, to evaluate; "": none
    demonstrations: str = f"{ASSETS}/demonstrations.jsonl"  # {prompt, completion}, file or hub id
    preferences: str = f"{ASSETS}/preferences.jsonl"  # {prompt, chosen, rejected}
    num_demonstrations: int = 1000  # the first rows; 0 for all
    num_preferences: int = 1000  # the first rows; 0 for all
    prompts: str = f"{ASSETS}/prompts.jsonl"  # {prompt}; the last --eval-prompts are for evaluation
    seed: int = 1  # of heads, batches, sampling; evaluation has a seed of its own
    max_prompt_length: int = 64  # tokens; of a longer prompt the policy reads the last ones
    response_length: int = 24  # tokens at most; longer demonstrations are cut, preferences not
    temperature: float = 1.0  # of sampling; logits are divided by it in every log-probability
    micro_batch_size: int = 64  # rows in a forward pass (R: up to 4 times that); not of sampling
    anneal: bool = True  # let the learning rates fall linearly to 0 over the run (paper: no)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm

    # Upper level: the reward
    demo_weight: float = 1.0  # α of Algorithm 1: (8a)'s α divided by β; 0: preferences alone
    preference_weight: float = 3.0  # of (11) (paper: 1); 0: inverse reinforcement learning
    demo_loss: Literal["linear", "logistic"] = "linear"  # g1: Lemma 5.1, or log σ (authors' code)
    response_memory: int = 10  # latest policies whose responses g1 sees (Algorithm 1: 1)
    reward_penalty: float = 0.3  # λ, weight of R² in the demonstration term (paper: none)
    reward_updates_per_iteration: int = 10  # Adam steps on the reward (paper: 12, for 20 PPO steps)
    reward_batch_size: int = 32  # demonstrations, and responses, and pairs, in each (paper: 128)
    reward_learning_rate: float = 1e-3  # Adam's (paper: 1e-5, for GPT-2)

    # Lower level: the policy
    policy_optimizer: Literal["ppo", "remax"] = "ppo"  # remax: no critic, one step a batch
    policy_steps_per_iteration: int = 5  # PPO steps between rounds of reward updates (paper: 20)
    ppo_steps: int = 60  # steps of PPO or ReMax in all, each on a new batch of responses
    batch_size: int = 64  # responses in each step (paper: 256)
    minibatch_size: int = 32  # responses in an optimiser step
    ppo_epochs: int = 2  # passes over each batch
    learning_rate: float = 1e-4  # Adam's, for the policy (paper: 1.41e-5, for GPT-2)
    value_learning_rate: float = 3e-4  # Adam's, for the critic
    gae_lambda: float = 0.95  # of generalised advantage estimation; the discount is 1
    clip: float = 0.2  # probability ratios are clipped to 1 ± this
    kl_coefficient: float = 0.02  # β of (10)

    # Running
    eval_prompts: int = 256  # held-out prompts; also how many of g1's responses are sampled at once
    eval_every: int = 5  # PPO steps between evaluations
    checkpoint_every: int = 10  # PPO steps between checkpoints
    runs_dir: str = "runs"  # where run folders go
    run_name: str = ""  # the run's folder; "": from script, seed and time
    resume: str = ""  # a run folder to carry on with its arguments; most flags beside it win
    evaluate: str = ""  # a run folder whose policy to evaluate instead of training; beats --resume
    cuda: bool = True  # use GPUs when there are any
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights are float32
    gradient_checkpointing: bool = False  # activations are computed anew in backward: less memory
    threads: int = 2  # CPU threads of each process
    track: bool = False  # log to Weights & Biases too (WANDB_PROJECT, WANDB_ENTITY ...)


PRESETS = {  # the paper's models and Table 2, else our guess; the user's own flags win
    "imdb": """--model-name-or-path gpt2 --ground-truth-path lvwerra/distilbert-imdb
        --num-demonstrations 0 --num-preferences 0 --preference-weight 1 --reward-learning-rate 1e-5
        --reward-batch-size 128 --reward-updates-per-iteration 12 --policy-steps-per-iteration 20
        --kl-coefficient 0.05 --learning-rate 1.41e-5 --value-learning-rate 1.41e-5
        --batch-size 256 --minibatch-size 64 --ppo-epochs 4 --ppo-steps 1000""",
    # no ground truth: beaver-7b-v3.0-reward needs remote code, which is never run
    "hh": """--model-name-or-path EleutherAI/pythia-160m --reward-model-path EleutherAI/pythia-1.4b
        --ground-truth-path= --demonstrations runs/hh_data/demonstrations.jsonl
        --preferences runs/hh_data/preferences.jsonl --prompts runs/hh_data/prompts.jsonl
        --num-demonstrations 0 --num-preferences 0 --max-prompt-length 512 --response-length 128
        --dtype bfloat16 --preference-weight 1 --reward-learning-rate 1e-5
        --reward-batch-size 8 --reward-updates-per-iteration 20 --policy-steps-per-iteration 6000
        --kl-coefficient 0.05 --learning-rate 1e-6 --value-learning-rate 1e-6 --batch-size 4
        --minibatch-size 4 --micro-batch-size 4 --ppo-steps 24000 --eval-every 500
        --checkpoint-every 500""",
}
SCRIPT = Path(__file__).name
MAY_BE_ZERO = """seed num_demonstrations num_preferences demo_weight preference_weight
    reward_penalty kl_coefficient"""


# ---------------------------------------------------------------- the two levels, in equations
def reward_losses(r_demos: Tensor, r_policy: Tensor, r_chosen: Tensor, r_rejected: Tensor, args):
    """Losses (rows,); their mean has the gradient -(α g1 + preference_weight g2), (26), but for
    λ's term. R, (rows,) each: of τ ~ D, of τ' to the same prompts, of the preferred and the other
    sides of pairs; where a weight is 0 its two are not read, and may be anything."""
    losses = torch.zeros_like(r_demos)
    if args.demo_weight:
        gap = r_demos - r_policy  # (28), Lemma 5.1
        gap = gap if args.demo_loss == "linear" else F.logsigmoid(gap)
        losses -= args.demo_weight * (gap - args.reward_penalty * (r_demos**2 + r_policy**2))
    if args.preference_weight:
        losses -= args.preference_weight * F.logsigmoid(r_chosen - r_rejected)  # (27), (11)
    return losses


def token_rewards(log_ratio: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """(10) token by token, (rows, N): -β log(π/π⁰) at each, plus the score at the last (Ziegler et
    al. 2019); log_ratio and mask (rows, N), scores (rows,)."""
    last = (mask.cumsum(-1) == mask.sum(-1, keepdim=True)) * mask  # 1 at the last token
    return -beta * log_ratio * mask + scores[:, None] * last


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, lam: float):
    """Advantages and returns, (rows, N) each (Schulman et al. 2016, their (16), γ = 1), of rewards,
    values and mask (rows, N). values[:, t] is V before token t; after the end it counts as 0."""
    values = values * mask
    delta = (rewards + F.pad(values[:, 1:], (0, 1)) - values) * mask
    advantages, running = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def remax_advantages(rewards: Tensor, mask: Tensor, greedy_scores: Tensor) -> Tensor:
    """Rewards to come (γ = 1) minus the greedy response's score, (rows, N), of rewards and mask
    (rows, N) and greedy_scores (rows,) (ReMax, Li et al. 2023, Algorithm 1)."""
    return (rewards.flip(1).cumsum(1).flip(1) - greedy_scores[:, None]) * mask


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (rows, N) with mean 0 and variance 1 where mask is 1, over all processes; 0 elsewhere."""
    count = total(mask.sum())
    x = (x - total((x * mask).sum()) / count) * mask
    return x * torch.rsqrt(total((x**2).sum()) / count + 1e-8)


def policy_losses(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float):
    """PPO's loss of each token and π/π_old, (rows, N) each (Schulman et al. 2017, their (7))."""
    ratio = (log_probs - old_log_probs).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


# --------------------------------------------------------------------------------- Algorithm 1
def main() -> None:
    with read.input_errors():  # around set-up: what is wrong with the input is said in one line
        args, state = parse_args()
        device, processes = start_processes(args)  # share, gather, total: rows among processes

        # Learned: π, R, PPO's V (begins as R where R reads π's tokens); frozen: π⁰, base, judge
        initial = args.sft_model_path or args.model_name_or_path
        policy = Policy(initial, args)
        reference = copy.deepcopy(policy)  # π⁰
        base = Policy(args.model_name_or_path, args) if args.sft_model_path else reference
        if base.vocabulary != policy.vocabulary:
            raise ValueError("--model-name-or-path and --sft-model-path differ in vocabulary")
        torch.manual_seed(args.seed)  # of new heads
        reward = Scorer(args.reward_model_path or args.model_name_or_path, args)
        learned, is_ppo = {"policy": policy, "reward": reward}, args.policy_optimizer == "ppo"
        critic_from_reward = is_ppo and reward.is_decoder and reward.vocabulary == policy.vocabulary
        critic_from_reward &= reward.limit >= args.max_prompt_length + args.response_length
        if is_ppo:
            value = copy.deepcopy(reward) if critic_from_reward else Scorer(initial, args)
            learned["value"] = value
            if not value.is_decoder:
                raise ValueError(f"{initial} has no linear head for every token: it is no critic")
        judge = Scorer(args.ground_truth_path, args, True) if args.ground_truth_path else None

        # The data: preferences P, prompts, and demonstrations D (α = 0: prompts in their place)
        pairs = []
        if args.preference_weight:
            pairs = read.rows(args.preferences, "prompt chosen rejected", args.num_preferences)
            pairs = policy.texts.pairs(pairs, args.preferences)
        prompts = [prompt for (prompt,) in read.rows(args.prompts, "prompt")]
        prompt_ids, n = policy.texts.prompts(prompts, args.prompts), args.eval_prompts
        if len(prompts) <= n:
            raise ValueError(f"{args.prompts} has too few rows for --eval-prompts {n}")
        demos, demo_prompt_ids = [(x, "") for x in prompts[:-n]], prompt_ids[:-n]  # α = 0: no D
        if args.demo_weight:
            demos = read.rows(args.demonstrations, "prompt completion", args.num_demonstrations)
            demo_prompt_ids = policy.texts.prompts([x for x, _ in demos], args.demonstrations)
            completions = policy.texts.responses(demos, args.demonstrations)  # cut as π's are
            completions = policy.texts.decode(demo_prompt_ids, completions)
            demo_texts = [x + y for (x, _), y in zip(demos, completions)]
        weights = (w for model in (reference, base) for w in model.state_dict().values())
        data_hash = read.fingerprint(pairs, prompts, demos, [n], *weights)
        if state and state["data_hash"] != data_hash:
            raise ValueError("the run had other data, models, --eval-prompts or a weight of 0")
        if state and not learned.keys() <= state.keys():
            raise ValueError("the run has no critic: PPO cannot carry it on")
        for name in learned if state else ():
            learned[name].load_state_dict(state[name])
        for module in dict.fromkeys([*learned.values(), reference, base]):
            shard(module.to(device), device)
        optimizers = {x: torch.optim.Adam(m.parameters(), fused=True) for x, m in learned.items()}
        for name in learned if state and not args.evaluate else ():
            load_optimizer(optimizers[name], state[f"{name}_optimizer"])
        memory, log = state.get("memory", []), state.get("log", [])  # τ' for g1; metrics.csv
        read.check_steps(len(log) - 1, args, "ppo_steps")
        run_dir, track = read.open_run(args, SCRIPT)

    models = policy, reference, base, reward, (judge.to(device) if judge else None)
    evaluation = partial(evaluate, models, (prompts[-n:], prompt_ids[-n:]), args, run_dir)
    if args.evaluate:
        return evaluation(log[-1]["charts/step"])
    started = time.perf_counter() - (log[-1]["charts/wall_seconds"] if log else 0)
    log = log or [{"charts/step": 0, "charts/wall_seconds": 0} | evaluation(0)]
    track(log[-1], step=len(log) - 1)

    for step in tqdm(range(len(log) - 1, args.ppo_steps), "AIHF", disable=not read.writes()):
        share_left = 1 - step / args.ppo_steps if args.anneal else 1.0
        row = {"charts/step": step + 1}

        k, steps_since_reward = divmod(step, args.policy_steps_per_iteration)
        if steps_since_reward == 0:  # the reward first (Algorithm 1: the policy): R starts random
            # ================ SAMPLE: τ ~ D, τ' ~ π_k and earlier ones, (τ_l ≺ τ_w) ~ P
            size = args.reward_updates_per_iteration * args.reward_batch_size  # of all updates
            indices = read.draw(len(demos), size, k, (args.seed, 1))  # 1 to 6: random streams
            rng, responses = np.random.default_rng([args.seed, 3, k]), []
            for part in read.parts(0, size, args.eval_prompts):  # as many as evaluation at once
                responses += policy.sample([demo_prompt_ids[i] for i in indices[part]], rng)[-1]
            fresh = [demos[i][0] + y for i, y in zip(indices, responses)]
            if step == 0 and reward.has_head:  # a trained reward begins with mean 0 on π⁰'s text
                reward.offset += gather(in_parts(reward.score, args, share(fresh))).mean()
            memory = [*memory, *zip(indices, fresh)][-args.response_memory * size :]  # (i of D, τ')
            order = np.random.default_rng([args.seed, 4, k]).permutation(len(memory))
            recalled = share([memory[j] for j in order[:size]])  # τ' of g1: all policies alike
            sides = []  # columns of texts: τ ~ D, τ' to the same prompts (g1); τ_w, τ_l (g2)
            if args.demo_weight:
                sides += [demo_texts[i] for i, _ in recalled], [text for _, text in recalled]
            if args.preference_weight:
                drawn = [pairs[i] for i in share(read.draw(len(pairs), size, k, (args.seed, 2)))]
                sides += [x + y for x, y, _ in drawn], [x + y for x, _, y in drawn]

            # ====================== UPPER LEVEL (8a): θ_{k+1} = θ_k + η (α g1 + g2), by Adam
            for batch in read.parts(0, size // processes, args.reward_batch_size // processes):
                loss, correct = torch.zeros(2, device=device)
                for part in read.parts(batch.start, batch.stop, args.micro_batch_size):
                    r = reward.score([x for side in sides for x in side[part]]).chunk(len(sides))
                    losses = reward_losses(*r[:2], *r[-2:], args) / args.reward_batch_size
                    losses.sum().backward()
                    loss += losses.detach().sum()
                    correct += (r[-2] > r[-1]).sum() / args.reward_batch_size
                rate = args.reward_learning_rate * share_left
                descend(optimizers["reward"], rate, args, step, run_dir, loss)
            row["rewards/loss"] = total(loss).item()  # of the last update
            if args.preference_weight:
                row["rewards/accuracies"] = total(correct).item()
            # Shift R to mean 0 on π_k's text: λ's term notices, (11) and the best π of (10) do not.
            reward.offset += gather(in_parts(reward.score, args, share(fresh))).mean()
            if step == 0 and critic_from_reward:
                value.load_state_dict(reward.state_dict())  # the critic begins as the first reward
            if args.demo_weight:
                r_demos = in_parts(reward.score, args, share([demo_texts[i] for i in indices]))
                row["reward/gap"] = gather(r_demos).mean().item()  # minus that of π_k, now 0

        # ============= LOWER LEVEL (8b): align π to r(·; θ_{k+1}), a step of PPO or ReMax on (10)
        indices = read.draw(len(prompts) - n, args.batch_size, step, (args.seed, 5))
        asked = [prompt_ids[i] for i in indices]
        rng = np.random.default_rng([args.seed, 6, step])
        ids, mask, alive, ended, responses = policy.sample(asked, rng)  # responses: of all rows
        texts = [prompts[i] + response for i, response in zip(indices, responses)]
        length, scores = alive.shape[1], in_parts(reward.score, args, share(texts))
        old_log_probs = in_parts(policy.log_probs, args, ids, mask, alive)
        log_ratio = old_log_probs - in_parts(reference.log_probs, args, ids, mask, alive)
        rewards = token_rewards(log_ratio, scores, alive, args.kl_coefficient)
        if is_ppo:
            values = in_parts(value, args, ids, mask)[:, -length - 1 : -1]  # V before each token
            advantages, returns = generalised_advantages(rewards, values, alive, args.gae_lambda)
            advantages = whiten(advantages, alive)
        else:
            greedy = policy.sample(asked, rng, temperature=1e-6)[-1]
            texts = [prompts[i] + response for i, response in zip(indices, greedy)]
            greedy_scores = in_parts(reward.score, args, share(texts))
            advantages = remax_advantages(rewards, alive, greedy_scores)  # π/π_old is 1: no clip

        statistics = []  # of each minibatch: policy and value loss, approximate KL, share clipped
        size, epochs = (args.minibatch_size, args.ppo_epochs) if is_ppo else (args.batch_size, 1)
        for minibatch in read.parts(0, len(ids), size // processes) * epochs:  # already shuffled
            token_weights = alive / total(alive[minibatch].sum())  # a mean over all its tokens
            sums = torch.zeros(4, device=device)
            for part in read.parts(minibatch.start, minibatch.stop, args.micro_batch_size):
                log_probs = policy.log_probs(ids[part], mask[part], alive[part])
                old, advantage = old_log_probs[part], advantages[part]
                losses, ratio = policy_losses(log_probs, old, advantage, args.clip)
                (losses * token_weights[part]).sum().backward()
                errors = torch.zeros_like(losses)
                if is_ppo:
                    values = value(ids[part], mask[part])[:, -length - 1 : -1]
                    errors = 0.5 * (values - returns[part]) ** 2
                    (errors * token_weights[part]).sum().backward()
                columns = losses, errors, (log_probs - old) ** 2 / 2, (ratio - 1).abs() > args.clip
                sums += torch.stack([(x * token_weights[part]).sum().detach() for x in columns])
            statistics.append(total(sums))
            for name, rate in (("policy", args.learning_rate), ("value", args.value_learning_rate)):
                if name in learned:  # ReMax has no critic
                    descend(optimizers[name], rate * share_left, args, step, run_dir, sums)

        # ===================================================================== LOG and EVALUATE
        names = ("losses/policy", "losses/value", "losses/approx_kl", "losses/clip_fraction")
        row |= dict(zip(names, torch.stack(statistics).mean(0).tolist()))
        columns = {"objective/kl": log_ratio.sum(-1), "objective/scores": scores}
        columns |= {"objective/entropy": -old_log_probs.sum(-1), "charts/ended_share": ended}
        row |= {name: gather(column).mean().item() for name, column in columns.items()}
        finished = step + 1 == args.ppo_steps
        if (step + 1) % args.eval_every == 0 or finished:
            row |= evaluation(step + 1)
        row["charts/wall_seconds"] = time.perf_counter() - started
        log.append(row)
        track(row, step=step + 1)

        # =========================================================================== CHECKPOINT
        if (step + 1) % args.checkpoint_every == 0 or finished:
            state = {"script": SCRIPT, "args": asdict(args), "data_hash": data_hash, "log": log}
            parts = learned | {f"{name}_optimizer": x for name, x in optimizers.items()}
            read.write_checkpoint(run_dir, state | {"memory": memory}, parts, whole)
    save_model(reward.model, reward.tokenizer, run_dir / "reward")
    save_model(policy.lm, policy.tokenizer, run_dir / "policy")  # if a run is killed here: --resume
    if read.writes():
        print(f"final: {read.summary(log[-1])}; python benchmark/plot.py {run_dir} draws it")
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------- models
# Every pass of a model goes through its forward, where FSDP2 gathers it. Dropout is off: models
# stay in evaluation mode, as from_pretrained returns them.
def load(kind: str, name: str, args: Args, **new_head):
    """The float32 model that AutoModelFor<kind> gives, and its tokenizer; no remote code is run.
    ValueError if weights other than a new head's are missing, or tokens have no embedding."""
    auto, no_code = getattr(transformers, f"AutoModelFor{kind}"), {"trust_remote_code": False}
    model, info = auto.from_pretrained(name, output_loading_info=True, **no_code, **new_head)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **no_code)
    body = model.base_model_prefix
    if missing := [key for key in info["missing_keys"] if not new_head or key.startswith(body)]:
        raise ValueError(f"the model {name} lacks {', '.join(missing)[:100]}")
    size = model.get_input_embeddings().num_embeddings  # Gemma has unused special tokens beyond
    used = [i for i, x in tokenizer.added_tokens_decoder.items() if not x.special]
    used += sum(read.special_tokens(tokenizer), [tokenizer.eos_token_id or 0])
    if max(tokenizer.vocab_size - 1, *used) >= size:
        raise ValueError(f"the tokenizer of {name} has more tokens than its model")
    if args.dtype == "bfloat16" and not (args.cuda and torch.cuda.is_available()):
        model.set_attn_implementation("eager")  # fused attention is slow on a CPU
    for block in blocks(model) if args.gradient_checkpointing else ():
        options = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
        block.forward = partial(checkpoint, block.forward, **options)
    return model.float(), tokenizer


def blocks(module: nn.Module) -> nn.ModuleList:
    """A transformer's layers: its longest list of modules."""
    return max((x for x in module.modules() if isinstance(x, nn.ModuleList)), key=len)


class Policy(nn.Module):
    """π: a causal language model and, in texts, its tokenizer."""

    def __init__(self, name: str, args: Args):
        super().__init__()
        self.lm, self.tokenizer = load("CausalLM", name, args)
        self.texts = read.Texts(self.tokenizer, args.max_prompt_length, args.response_length)
        self.args, self.vocabulary = args, self.tokenizer.get_vocab()
        limit = getattr(self.lm.config, "max_position_embeddings", None) or 10**6
        if args.max_prompt_length + args.response_length > limit:
            raise ValueError(f"{name} reads {limit} tokens: too few for prompt and response")
        encoder = "MaskedLM" in str(self.lm.config.architectures)  # it sees what it is to predict
        if encoder or getattr(self.lm, "_is_stateful", False):  # Mamba: not with padding
            raise ValueError(f"{name} is an encoder or recurrent, no policy for rows of any length")

    def forward(self, ids: Tensor, mask: Tensor, length: int, cache: dict | None = None):
        """Float32 logits (rows, length or more, vocabulary) of the last positions of ids (rows,
        tokens), and the next call's cache ({} at first); the mask covers what is cached too."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # 0 at the first token, after the padding
        inputs = {"input_ids": ids, "position_ids": positions[:, -ids.shape[1] :]}
        inputs |= {"use_cache": cache is not None, "logits_to_keep": length, **(cache or {})}
        with torch.autocast(ids.device.type, torch.bfloat16, self.args.dtype == "bfloat16"):
            out = self.lm(attention_mask=mask, **inputs)
        name = "cache" if "cache" in out else "past_key_values"  # in older transformers
        return out.logits.float(), {name: out.get(name)}

    def log_probs(self, ids: Tensor, mask: Tensor, alive: Tensor) -> Tensor:
        """log π(y_t | x, y_<t), float32 (rows, N), 0 after the end; ids and mask (rows, P + N) hold
        prompts padded on the left and responses padded on the right, alive the responses' mask."""
        length = alive.shape[1]
        logits, _ = self(ids, mask, length + 1)
        log_probs = (logits[:, -length - 1 : -1] / self.args.temperature).log_softmax(-1)
        return log_probs.gather(-1, ids[:, -length:, None]).squeeze(-1) * alive

    def sample(self, prompts: list[list[int]], rng: np.random.Generator, temperature=None):
        """Of this process's rows: ids and mask (rows, P + N) of prompt and response, the responses'
        mask (rows, N), end token included, and whether it came (rows,). Of all rows: the responses'
        texts. Each row takes response_length numbers of the rng, however early it ends, and picks a
        token by inverse CDF with each: its text depends on no other row. Processes end together."""
        uniform = torch.from_numpy(share(rng.random((len(prompts), self.args.response_length))))
        ids, mask = (x.to(self.lm.device) for x in read.pad(share(prompts), left=True))
        token, cache, width = ids, {}, ids.shape[1]
        ended = torch.zeros_like(ids[:, :1], dtype=torch.bool)
        alone = not dist.is_initialized()  # then weights are cast to bfloat16 once, not per token
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False, cache_enabled=alone):
            for u in uniform.to(ids.device).unbind(1):
                logits, cache = self(token, mask, 1, cache)
                logits = logits[:, -1] / (temperature or self.args.temperature)
                cumulative = logits.softmax(-1).double().cumsum(-1)
                token = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
                token = token.clamp(max=logits.shape[-1] - 1).masked_fill(ended, 0)
                ids, mask = torch.cat([ids, token], 1), torch.cat([mask, (~ended).long()], 1)
                ended = ended | (token == self.texts.eos_id)
                if total((~ended).sum()) == 0:
                    break
        responses, alive = ids[:, width:], mask[:, width:]
        rows = zip(gather(responses).tolist(), gather(alive.sum(-1)).tolist())
        texts = self.texts.decode(prompts, [row[:length] for row, length in rows])
        return ids, mask, alive, ended.squeeze(1).float(), texts


class Scorer(nn.Module):
    """R, V and the judge: a sequence classifier that gives one number at every token (of two
    outputs their difference). R(τ) is that at a text's last token, V(s) that at the last of s."""

    def __init__(self, name: str, args: Args, trained: bool = False):
        """A new head if there is none; ValueError if `trained` and none, or over two outputs."""
        super().__init__()
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        self.has_head = "SequenceClassification" in str(config.architectures)
        new_head = {} if self.has_head else {"num_labels": 1}
        self.model, self.tokenizer = load("SequenceClassification", name, args, **new_head)
        if trained and not self.has_head or self.model.config.num_labels > 2:
            raise ValueError(f"{name} has no trained head of one or two outputs: no reward model")
        self.vocabulary = self.tokenizer.get_vocab()
        self.prefix, self.suffix = read.special_tokens(self.tokenizer)
        self.is_decoder = hasattr(self.model, "score")  # a linear head, as GPT-2 and Llama have
        self.args = replace(args, dtype="float32") if trained or not self.is_decoder else args
        embeddings = getattr(self.model.base_model, "embeddings", None)
        unused = getattr(embeddings, "padding_idx", -1) + 1  # RoBERTa's positions begin after it
        limit = getattr(self.model.config, "max_position_embeddings", None) or 10**6
        limit = min(limit - unused, self.tokenizer.model_max_length)
        self.limit = limit - len(self.prefix) - len(self.suffix)
        self.register_buffer("offset", torch.zeros(()))  # subtracted from every score

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores (rows, tokens), float32, of ids and mask (rows, tokens)."""
        with torch.autocast(ids.device.type, torch.bfloat16, self.args.dtype == "bfloat16"):
            if self.is_decoder:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
                hidden = self.model.base_model(**inputs, use_cache=False)[0]
            else:  # BERT and its like read the whole text at once
                ids = ids.masked_fill(mask == 0, self.model.config.pad_token_id or 0)
                logits = self.model(input_ids=ids, attention_mask=mask).logits
                logits = logits[:, None].expand(-1, ids.shape[1], -1)
        if self.is_decoder:  # outside autocast: bfloat16 would round R
            logits = self.model.score(hidden.float())
        first = logits[..., 0] if logits.shape[-1] == 2 else 0.0  # two outputs: log-odds
        return logits[..., -1] - first - self.offset

    def score(self, texts: list[str]) -> Tensor:
        """R of texts: (texts,); of a text that is too long the end is read."""
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [read.without_prefix(row, self.prefix)[-self.limit :] for row in rows]
        rows = [self.prefix + row + self.suffix or [0] for row in rows]
        ids, mask = (x.to(self.offset.device) for x in read.pad(rows))
        return self(ids, mask).gather(1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)


@torch.no_grad()
def in_parts(function, args: Args, *rows) -> Tensor:
    """function(*rows) without gradients, of micro_batch_size rows at a time."""
    parts = read.parts(0, len(rows[0]), args.micro_batch_size)
    return torch.cat([function(*(x[part] for x in rows)) for part in parts])


def descend(optimizer, learning_rate: float, args: Args, step: int, run_dir: Path, loss: Tensor):
    """A step along gradients clipped to max_grad_norm; the run stops where they are not finite."""
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
    read.check_finite(step, run_dir, loss=loss, gradient=norm)
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()


# --------------------------------------------------------- several processes (torchrun), or one
# Process i of n holds rows i, i + n ... of a batch and shards of all models but the judge (FSDP2).
# Gradients are summed: losses are divided by the whole batch. All do equally many forward passes.
def start_processes(args: Args) -> tuple[torch.device, int]:
    """Joins torchrun's processes, fills in args.run_name; the device, the number of processes."""
    transformers.logging.set_verbosity_error()  # else it warns of new heads
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_autocast_cache_enabled(False)  # it would hold all weights in bfloat16 at once
    torch.backends.cuda.enable_cudnn_sdp(False)  # its bfloat16 gradients can be nan
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # this process's "cuda"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))  # others wait while one saves
    began = gather(torch.tensor([time.time_ns()], device=device))[0]  # the same in every process
    args.run_name = args.run_name or f"llm__{SCRIPT[:-3]}__{args.seed}__{began}"
    sizes = args.reward_batch_size, args.batch_size, args.minibatch_size, args.eval_prompts
    if any(size % count for size in sizes):
        raise ValueError(f"batches and --eval-prompts must be multiples of {count} processes")
    return device, count


def share(rows):
    """This process's rows of a list, array or tensor."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def gather(x: Tensor) -> Tensor:
    """The inverse of share, for a tensor (rows, ...) of the same shape in every process."""
    if not dist.is_initialized():
        return x
    shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, x.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)


def total(x: Tensor) -> Tensor:
    """The sum over processes."""
    return gather(x[None]).sum(0)


def shard(module: nn.Module, device: torch.device) -> None:
    """Share out the parameters, block by block; each is gathered whole where it is used."""
    if dist.is_initialized():
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for part in (*blocks(module), module):
            fully_shard(part, mesh=mesh)
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)


def whole(state):
    """A state with its shards put together: on the CPU of process 0, which writes them, and without
    memory or numbers (meta) in the others."""
    where = "cpu" if read.writes() else "meta"
    return tree_map_only(DTensor, lambda x: x.full_tensor().to(where), state)


def load_optimizer(optimizer, state: dict) -> None:
    """Load a whole state into the optimiser of parameters that may be shared out."""
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if isinstance(parameter, DTensor) and i in state["state"]:
            moments, where = state["state"][i], (parameter.device_mesh, parameter.placements)
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = distribute_tensor(moments[name], *where)
    optimizer.load_state_dict(state)


# --------------------------------------------------------------------------- evaluate and save
def evaluate(models, held_out, args: Args, run_dir: Path, step: int) -> dict[str, float]:
    """Means over held-out prompts, printed with samples: the only reader of the ground truth."""
    (policy, reference, base, reward, judge), (prompts, prompt_ids) = models, held_out
    ids, mask, alive, _, responses = policy.sample(prompt_ids, np.random.default_rng(10_000))
    log_probs = in_parts(policy.log_probs, args, ids, mask, alive)
    others = (in_parts(x.log_probs, args, ids, mask, alive) for x in (reference, base))
    kl, kl_base = ((log_probs - other).sum(-1) for other in others)
    scores = {"kl": kl, "kl_base": kl_base, "response_length": alive.sum(-1).float()}
    texts = share([x + y for x, y in zip(prompts, responses)])
    scores["learned_score"] = in_parts(reward.score, args, texts)
    scores = {name: gather(x).cpu() for name, x in scores.items()}
    row = {f"eval/{name}": x.mean().item() for name, x in scores.items()}
    if judge:
        scores["gt_score"] = truth = gather(in_parts(judge.score, args, texts)).cpu()
        row["eval/gt_score"] = truth.mean().item()
        row["eval/gt_score_std"] = truth.std(correction=0).item()
        ranks = torch.stack([scores["learned_score"], truth]).argsort().argsort().double()
        row["eval/reward_correlation"] = torch.corrcoef(ranks)[0, 1].item()  # Spearman's
    path = None if args.evaluate else run_dir / "samples.jsonl"
    read.write_samples(path, f"after {step} steps: {read.summary(row)}", prompts, responses, scores)
    return row


def save_model(model, tokenizer, folder: Path) -> None:
    save = partial(model.save_pretrained, state_dict=whole(model.state_dict()))
    read.write_whole(folder, lambda path: (save(path), tokenizer.save_pretrained(path)))


def parse_args() -> tuple[Args, dict]:
    """The run's arguments (--resume, --evaluate) or the defaults, then a preset that is not the
    run's already, then the flags: the last wins. And the run's checkpoint, or {}."""
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])  # which preset, which run
    state = read.checkpoint(args.evaluate or args.resume, SCRIPT, go_on=not args.evaluate)
    given, preset = state.get("args", {}), args.preset
    preset = PRESETS[preset].split() if preset not in ("", given.get("preset")) else []
    args = tyro.cli(Args, default=Args(**given), args=preset + sys.argv[1:])
    read.check_numbers(args, MAY_BE_ZERO)
    if args.demo_weight == args.preference_weight == 0:
        raise ValueError("--demo-weight and --preference-weight are 0: there is nothing to learn")
    is_ppo = args.policy_optimizer == "ppo"
    if args.gae_lambda > 1 or is_ppo and args.batch_size % args.minibatch_size:
        raise ValueError("--gae-lambda is at most 1, --minibatch-size divides --batch-size")
    return args, state


if __name__ == "__main__":
    main()
