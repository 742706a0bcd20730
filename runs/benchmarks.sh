#!/usr/bin/env bash
# SmolLM2 and an adapter on a few problems of each benchmark, with few tokens: a try of the command, not a result.
#   runs/benchmarks.sh FOLDER ADAPTER
# FOLDER holds aime24, aime25, amc23, math500 and gsm8k_test as JSON Lines; records go to runs/out/eval.
set -euo pipefail
common=(--adapter "$2" --max-new-tokens 128)
for name in aime24 aime25 amc23 math500; do
  moe-bias eval --data "$1/$name.jsonl" "${common[@]}" --limit 8 --samples 2 --temperature 1 --output "runs/out/eval/$name"
done
moe-bias eval --data "$1/gsm8k_test.jsonl" "${common[@]}" --limit 24 --output runs/out/eval/gsm8k
