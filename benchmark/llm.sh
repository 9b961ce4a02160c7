#!/usr/bin/env bash
# Figures 6 to 10 on the embedded models; seeds 1 to 3, fixed before the runs.
# Two single-threaded runs side by side (JOBS=2). Stopped or killed, the same command carries on.
#     bash benchmark/llm.sh [6|7|9|10]     one figure only (8 is drawn from 6's runs); then: python benchmark/llm.py
# RLHF comes first: SFT, its first stage, is what DPO starts from and what every win rate is over.
# benchmark/llm.py reads the latter from samples.jsonl and the RLHF run's samples_sft.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."

runs() { # lines: method, demonstrations, preferences, seed
  local seed size
  for seed in 1 2 3; do
    case $1 in
      6) for method in rlhf aihf-ppo dpo aihf-dpo; do echo "$method 1000 1000 $seed"; done ;;
      7) for size in "1000 100" "1000 3000"; do # beside those of 6 and 9
           echo "rlhf $size $seed"; echo "aihf-ppo $size $seed"
         done ;;
      9) for size in "3000 1000" "3000 2000" "3000 3000"; do
           echo "rlhf $size $seed"; echo "aihf-ppo $size $seed"
         done ;;
      10) echo "rlhf 1000 1000 $seed" # for its SFT
          for size in "1000 1000" "1000 2000" "1000 3000"; do
            echo "dpo $size $seed"; echo "aihf-dpo $size $seed"
          done ;;
    esac
  done
}

run() { # method demonstrations preferences seed
  local name=llm__$1__$2__$3__$4 sft=runs/llm__rlhf__$2__1000__$4/sft script flags=()
  [ "$1$3" = rlhf100 ] && flags=(--reward-epochs 20) # as many updates as with 1,000; what does best is kept
  [ "$1$3" = aihf-ppo2000 ] && flags+=(--reward-updates-per-iteration 6) # as many passes as with 1,000
  [ "$1$3" = aihf-ppo3000 ] && flags+=(--reward-updates-per-iteration 9)
  [ "$2" = 3000 ] && flags+=(--eval-every 3) # Figure 9 wants many points
  [ "$1" = dpo ] && flags+=(--sft-model-path "$sft" --demo-weight 0)
  case $1 in
    rlhf) script="rlhf_baseline.py llm" ;;
    aihf-ppo) script=aihf_ppo_llm.py ;;
    *) script=aihf_dpo_llm.py ;;
  esac
  if [ -e "runs/$name/policy" ]; then
    return
  elif [ -e "runs/$name/checkpoint.pt" ]; then
    python $script --resume "runs/$name" --threads 1
  else
    python $script --seed "$4" --num-demonstrations "$2" --num-preferences "$3" --run-name "$name" --threads 1 \
      ${flags[@]+"${flags[@]}"}
  fi
}
export -f run

mkdir -p runs
for figure in ${1:-6 10 9 7}; do
  for methods in rlhf aihf-ppo 'dpo|aihf-dpo'; do # SFT has to be there before others start from it
    runs "$figure" | { grep -E "^($methods) " || true; } |
      xargs -r -P "${JOBS:-2}" -L 1 bash -c 'run "$@" >>"runs/llm__$1__$2__$3__$4.log" 2>&1' _
  done
done
