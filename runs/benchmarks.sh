#!/usr/bin/env bash
# A model and an adapter on a few problems of each benchmark, with few tokens: a try of the command, not a result.
#   runs/benchmarks.sh FOLDER ADAPTER
# FOLDER holds aime24, aime25, amc23, math500 and gsm8k_test as JSON Lines. Records go to records/eval;
# `uv run python docs/generate.py` then makes the table of docs/evaluation.md from them.
set -euo pipefail
cd "$(dirname "$0")/.."

few=(--max-new-tokens 128 --limit 8)
for name in aime24 aime25 amc23 math500 gsm8k_test; do
  case $name in
    gsm8k_test) samples=(--samples 1 --temperature 0) ;;
    *) samples=(--samples 2 --temperature 1) ;;
  esac
  uv run moe-bias eval --data "$1/$name.jsonl" --adapter "$2" "${few[@]}" "${samples[@]}" --output "runs/out/eval/$name"
  mkdir -p records/eval
  cp "runs/out/eval/$name/record.json" "records/eval/$name.json"
done
