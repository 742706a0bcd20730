#!/usr/bin/env bash
# The demonstration on many tasks of reasoning-gym, smaller than its default so that the lot takes
# about half an hour on two cores, and without reinforcement learning, for which a minute leaves no
# time: where does a frozen model gain from a layer at its output, and where not? Records go to records/demo; `uv run python docs/generate.py` then
# makes the table of docs/LOG.md from them.
#
#   runs/demo_tasks.sh [TASK...]
set -euo pipefail
cd "$(dirname "$0")/.."

tasks=("$@")
if [ ${#tasks[@]} -eq 0 ]; then
  tasks=(products chain_sum leg_counting spell_backward gcd simple_equations
    number_filtering syllogism color_cube_rotation)
fi
out=runs/out/demo_tasks
for task in "${tasks[@]}"; do
  printf '\n== %s\n' "$task"
  rm -rf "$out/$task"
  uv run moe-bias demo --task "$task" --train-problems 300 --warm-problems 300 --test-problems 100 \
    --max-new-tokens 128 --minutes 1 --output "$out/$task"
  mkdir -p records/demo
  cp "$out/$task/record.json" "records/demo/$task.json"
done
