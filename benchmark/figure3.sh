#!/usr/bin/env bash
# Figure 3 and what belongs to it; seeds 1 to 3, fixed before the runs. AIHF's own runs are those of main_job.sh.
# Two single-threaded runs side by side (JOBS=2). Stopped or killed, the same command carries on.
#     bash benchmark/figure3.sh [1|2|3|4|5]     one part only; then: python benchmark/figure3.py
# 1: RLHF on three robots.  2: what each source of data gives.  3: fewer and worse preferences.
# 4: RLHF as we read the paper's, without a KL penalty to the clone or demonstrations in its replay: plain SAC.
# 5: fewer demonstrations, 2 episodes instead of 10, and two controls: a weaker KL penalty, no preferences.
set -euo pipefail
cd "$(dirname "$0")/.."

runs() { # lines: env, method, variant, seed
  local env seed method variant data
  for seed in 1 2 3; do
    case $1 in
      1) for env in Hopper-v4 HalfCheetah-v4 Walker2d-v4; do echo "$env rlhf default $seed"; done ;;
      2) for env in Hopper-v4 HalfCheetah-v4; do
           for method in demonstrations-only preferences-only; do echo "$env $method default $seed"; done
         done ;;
      3) for variant in share0.1 share0.3 flip0.1 flip0.3; do
           for method in aihf rlhf; do echo "Hopper-v4 $method $variant $seed"; done
         done
         for data in "HalfCheetah-v4 share0.1" "HalfCheetah-v4 flip0.3" "Walker2d-v4 share0.1"; do
           for method in aihf rlhf; do echo "${data% *} $method ${data#* } $seed"; done
         done ;;
      4) for env in Hopper-v4 HalfCheetah-v4 Walker2d-v4; do echo "$env rlhf-no-kl default $seed"; done ;;
      5) for env in Hopper-v4 Walker2d-v4; do
           for method in aihf rlhf; do echo "$env $method demos2 $seed"; done
         done
         for method in rlhf-kl-1 demonstrations-only; do echo "Walker2d-v4 $method demos2 $seed"; done ;;
      *) echo "no part $1" >&2; exit 2 ;;
    esac
  done
}

run() { # env method variant seed
  local name=figure3__$1__$2__$3__$4 script=aihf_sac_mujoco.py data=data_gen/assets/mujoco/$1 flags=()
  grep -q "final true return" "runs/$name.log" 2>/dev/null && return # finished
  case $2 in rlhf*) script="rlhf_baseline.py mujoco" ;; esac
  [ "$2" = rlhf-no-kl ] && flags=(--kl-coefficient 0 --learning-rate 1e-3 --demos-in-replay False)
  [ "$2" = rlhf-kl-1 ] && flags=(--kl-coefficient 1)
  [ "$2" = demonstrations-only ] && flags=(--preference-weight 0)
  [ "$2" = preferences-only ] && flags=(--demo-weight 0)
  case $3 in share* | flip* | demos*) data=runs/figure3_data/$1__$3 ;; esac
  if [ -e "runs/$name/checkpoint.pt" ]; then
    python $script --resume "runs/$name"
  else
    python $script --env "$1" --seed "$4" --run-name "$name" --data-dir "$data" ${flags[@]+"${flags[@]}"}
  fi
}
export -f run

mkdir -p runs/figure3_data
for name in Hopper-v4__{share0.1,share0.3,flip0.1,flip0.3,demos2} HalfCheetah-v4__{share0.1,flip0.3} Walker2d-v4__{share0.1,demos2}; do
  folder=runs/figure3_data/$name
  variant=${name#*__}
  flag=${variant%%[0-9]*}
  amount=${variant#"$flag"}
  [ -e "$folder" ] || python benchmark/figure3_data.py --env "${name%__*}" "--$flag" "$amount" --output-dir "$folder"
done
for part in ${1:-1 2 3 4 5}; do runs "$part"; done |
  xargs -r -P "${JOBS:-2}" -L 1 bash -c 'run "$@" >>"runs/figure3__$1__$2__$3__$4.log" 2>&1' _
