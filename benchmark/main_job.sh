#!/usr/bin/env bash
# The main result: AIHF on three robots, seeds 1 to 3 (Hopper: 1 to 5), fixed before the runs.
# Two single-threaded runs side by side (JOBS=2). Stopped or killed, the same command carries on.
# Then: python benchmark/main_job.py
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # env seed
  local folder=runs/main_job__$1__$2
  grep -q "final true return" "$folder.log" 2>/dev/null && return # finished
  if [ -e "$folder/checkpoint.pt" ]; then
    python aihf_sac_mujoco.py --resume "$folder"
  else
    python aihf_sac_mujoco.py --env "$1" --seed "$2" --run-name "$(basename "$folder")"
  fi
}
export -f run
mkdir -p runs
{
  for seed in 1 2 3; do
    for env in HalfCheetah-v4 Walker2d-v4 Hopper-v4; do
      echo "$env $seed"
    done
  done
  printf 'Hopper-v4 %s\n' 4 5
} | xargs -P "${JOBS:-2}" -L 1 bash -c 'run "$0" "$1" >>"runs/main_job__$0__$1.log" 2>&1'
