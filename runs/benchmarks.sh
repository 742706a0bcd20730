#!/usr/bin/env bash
# A model and an adapter on some problems of each benchmark, by a server that `moe-bias serve` has started: a look at
# where so small a model stands, not a ranking.
#   runs/benchmarks.sh FOLDER URL MODELS      such as benchmarks http://localhost:8000/v1 BASE,BASE:ADAPTER
# FOLDER holds aime24, aime25, amc23, math500 and gsm8k_test as JSON Lines. Records go to records/eval;
# `uv run python docs/generate.py` then makes the table of docs/results/evaluation.md from them.
set -euo pipefail
cd "$(dirname "$0")/.."

for name in gsm8k_test math500 amc23 aime24 aime25; do
  case $name in
    gsm8k_test) choices=(--limit 64 --samples 1 --temperature 0) ;;
    math500) choices=(--limit 24 --samples 2 --temperature 1) ;;
    *) choices=(--limit 8 --samples 2 --temperature 1) ;;
  esac
  uv run moe-bias eval --data "$1/$name.jsonl" --endpoint "$2" --endpoint-model "$3" --max-new-tokens 256 \
    "${choices[@]}" --output "runs/out/eval/$name"
  mkdir -p records/eval
  cp "runs/out/eval/$name/record.json" "records/eval/$name.json"
done
