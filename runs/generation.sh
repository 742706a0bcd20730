#!/usr/bin/env bash
# What supervised adapters do to generation: problems of GSM8K's test set, answered greedily and by sampling, by the
# frozen model, by linear experts, by such that were held near the base, and by the free ones of before, at two
# strengths; accuracy, loops, distinct n-grams, lengths. Needs the feature store of runs/defaults.sh.
#
#   runs/generation.sh GSM8K_TEST.jsonl
#
# Records go to records/generation.
set -euo pipefail
cd "$(dirname "$0")/.."
store=runs/out/stores/gsm8k

train() {
  [ -f "runs/out/generation/$1/adapter_config.json" ] || uv run moe-bias train sft --store "$store" --held-out 0.1 \
    --epochs 4 --logits-budget 4GiB --output "runs/out/generation/$1" "${@:2}"
}

train linear
train linear-kl --kl-weight 0.3
train free --experts free --num-experts 16
for way in greedy sampled; do
  case $way in
    greedy) choices=(--samples 1 --temperature 0) ;;
    sampled) choices=(--samples 1 --temperature 1) ;;
  esac
  uv run moe-bias eval --data "$1" --limit 32 --adapter runs/out/generation/linear,runs/out/generation/linear-kl,runs/out/generation/free \
    --strength 0.5,1 --max-new-tokens 256 "${choices[@]}" --output "runs/out/generation/eval-$way"
  mkdir -p records/generation
  cp "runs/out/generation/eval-$way/record.json" "records/generation/$way.json"
done
