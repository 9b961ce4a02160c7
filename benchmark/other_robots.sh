#!/usr/bin/env bash
# AIHF as it is on robots that are not the paper's, and on v5 of the paper's: data, then a run each.
# JOBS (2) robots side by side, one thread each. Stopped or killed, the same command carries on.
# Then: python benchmark/other_robots.py
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # env, SAC steps of the expert, other flags for the data
  local data=runs/other_robots_data__$1 folder=runs/other_robots__$1__1
  grep -q "final true return" "$folder.log" 2>/dev/null && return # finished
  [ -e "$data/manifest.json" ] ||
    python data_gen/mujoco_data.py --env "$1" --total-timesteps "$2" --output-dir "$data" "${@:3}" ||
    return
  if [ -e "$folder/checkpoint.pt" ]; then
    python aihf_sac_mujoco.py --resume "$folder"
  else
    python aihf_sac_mujoco.py --env "$1" --data-dir "$data" --run-name "$(basename "$folder")"
  fi
}
export -f run
mkdir -p runs
printf '%s\n' "InvertedDoublePendulum-v5 60000" "Swimmer-v5 200000" \
  "Reacher-v5 50000 --checkpoint-every 500" "Hopper-v5 400000" "HalfCheetah-v5 1200000" "Walker2d-v5 2000000 --seed 2" "Ant-v5 1000000" |
  xargs -P "${JOBS:-2}" -L 1 bash -c 'run "$@" >>"runs/other_robots__$1__1.log" 2>&1' _
