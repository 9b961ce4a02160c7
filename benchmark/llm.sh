#!/usr/bin/env bash
# Figures 6 to 10 on the embedded models; seeds 1 to 3, fixed before the runs (SEEDS="1 2 3").
# Two single-threaded runs side by side (JOBS=2). Stopped or killed, the same command carries on.
#     bash benchmark/llm.sh [6|7|9|10]     one figure only (8 is drawn from 6's runs)
# Then: python benchmark/llm.py; python benchmark/llm_rewards.py; python benchmark/llm_sharpness.py
# RLHF comes first: SFT, its first stage, is what DPO starts from and what every win rate is over.
# `random` is the control: PPO from SFT on a reward model whose new head learns nothing;
# `aihf-ppo-sft` and `aihf-dpo-sft` are AIHF that begins, as RLHF's PPO and DPO do, with SFT.
set -euo pipefail
cd "$(dirname "$0")/.."

runs() { # lines: method, demonstrations, preferences, seed
  local seed size method line
  case $1 in
    6 | 8) for method in aihf-ppo rlhf aihf-dpo dpo random aihf-ppo-sft aihf-dpo-sft; do echo "$method 1000 1000"; done ;;
    7) for size in "1000 1000" "1000 100" "1000 1000flip0.3" "100 1000" "1000 3000" "3000 1000" "1000 300" \
         "300 1000" "1000 1000flip0.1"; do # beside those of 6
         echo "rlhf $size"; echo "aihf-ppo $size"
       done ;;
    9) for size in "3000 1000" "3000 2000" "3000 3000"; do
         echo "rlhf $size"; echo "aihf-ppo $size"
       done ;;
    10) echo "rlhf 1000 1000" # for its SFT
        for size in "1000 1000" "1000 2000" "1000 3000"; do
          echo "dpo $size"; echo "aihf-dpo $size"
        done ;;
    *) echo "no figure $1" >&2; exit 2 ;;
  esac | while read -r line; do
    for seed in ${SEEDS:-1 2 3}; do echo "$line $seed"; done
  done
}

run() { # method demonstrations preferences seed
  local name=llm__$1__$2__$3__$4 sft=runs/llm__rlhf__$2__1000__$4/sft script flags=()
  local preferences=${3%%flip*} flip=${3##*flip}
  [ "$1$3" = rlhf100 ] && flags=(--reward-epochs 20) # as many updates as with 1,000; what does best is kept
  [ "$1$3" = rlhf300 ] && flags=(--reward-epochs 7)
  [ "$1$2" = rlhf100 ] && flags=(--sft-epochs 30)
  [ "$1$2" = rlhf300 ] && flags=(--sft-epochs 10)
  case $1 in dpo | random | *-sft) flags+=(--sft-model-path "$sft") ;; esac
  [ "$1" = dpo ] && flags+=(--demo-weight 0)
  [ "$1" = random ] && flags+=(--reward-learning-rate 1e-12)
  [ "$preferences" != "$3" ] && flags+=(--preferences "runs/preferences_flip$flip.jsonl")
  case $1 in
    rlhf | random) script="rlhf_baseline.py llm" ;;
    aihf-ppo*) script=aihf_ppo_llm.py ;;
    *) script=aihf_dpo_llm.py ;;
  esac
  if [ "runs/$name/policy" -nt "runs/$name/checkpoint.pt" ]; then
    return # finished: the policy is written last
  elif [ -e "runs/$name/checkpoint.pt" ]; then
    python $script --resume "runs/$name" --threads 1
  else
    python $script --seed "$4" --num-demonstrations "$2" --num-preferences "$preferences" --run-name "$name" --threads 1 \
      ${flags[@]+"${flags[@]}"}
  fi
}
export -f run

mkdir -p runs
for flip in 0.1 0.3; do
  python benchmark/llm_data.py --flip $flip --output runs/preferences_flip$flip.jsonl
done
for figure in ${1:-6 7 10 9}; do
  for methods in 'rlhf|aihf-ppo' 'dpo|aihf-dpo' 'random|aihf-ppo-sft|aihf-dpo-sft'; do # SFT has to be there before others start from it
    runs "$figure" | { grep -E "^($methods) " || true; } |
      xargs -r -P "${JOBS:-2}" -L 1 bash -c 'run "$@" >>"runs/llm__$1__$2__$3__$4.log" 2>&1' _
  done
done
