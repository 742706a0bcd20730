#!/usr/bin/env bash
# Where the defaults of supervised training come from: one setting after the other on two texts, the
# worked solutions of GSM8K (a quarter of them, about 212,000 tokens to train on) and functions of
# Python's standard library (about 200,000). Records go to records/defaults; `uv run python docs/generate.py`
# then makes the tables of docs/results/defaults.md from them. Cells that have a record are not run again.
#
#   runs/defaults.sh GSM8K_TRAIN.jsonl
#
# The file has GSM8K's training set in rows of problem and solution (or question and answer).
set -euo pipefail
cd "$(dirname "$0")/.."
gsm8k=$1
stores=runs/out/stores
python=runs/out/python_functions.jsonl
common=(--held-out 0.1 --logits-budget 4GiB)

[ -d "$stores/gsm8k" ] || uv run moe-bias extract --data "$gsm8k" --shard 1/4 --output "$stores/gsm8k"
[ -f "$python" ] || uv run python runs/python_functions.py "$python" --functions 2000
[ -d "$stores/python" ] || uv run moe-bias extract --data "$python" --output "$stores/python"

sweep() {
  uv run moe-bias sweep --store "$stores/$1" "${common[@]}" --epochs 4 --train-tokens "$5" \
    --output "runs/out/defaults/$1-$2" --grid "$3" --base "$4" --seeds 0
  mkdir -p records/defaults
  cp "runs/out/defaults/$1-$2/table.json" "records/defaults/$1-$2.json"
}

sweep gsm8k linear "experts=linear num_experts=2,4,8 expert_rank=3,7,15" "num_experts=4 expert_rank=7" 250000
sweep gsm8k linear-rates "experts=linear expert_rate=1e-3,3e-3,1e-2 router_rate=1e-3,3e-3,1e-2" \
  "expert_rate=3e-3 router_rate=3e-3" 250000
sweep gsm8k linear-reach "reach=support,vocabulary experts=linear,directions" "reach=support experts=linear" 70000
sweep gsm8k directions "experts=directions num_experts=16,32 top_k=2,4" "num_experts=16 top_k=2" 70000
sweep gsm8k linear-passes "epochs=2,4,6,8" "epochs=4" 200000
for text in gsm8k python; do
  sweep $text linear-start "entropy_gate=true,false normalisation=standardise,rms,none" \
    "entropy_gate=true normalisation=standardise" 70000
  sweep $text linear-dropout "expert_dropout=0,0.1" "expert_dropout=0" 70000
done

# The layer beside what it could be without: a static bias, free experts, no gate, no routing, LoRA on the output embedding.
for text in gsm8k python; do
  for tokens in 20000 70000 200000; do
    uv run moe-bias arms --store "$stores/$text" "${common[@]}" --epochs 4 --train-tokens $tokens --no-lora --seeds 0,1,2 \
      --arms static,no-gate,no-routing,free,lora-head --output "runs/out/defaults/$text-arms-$tokens"
    cp "runs/out/defaults/$text-arms-$tokens/table.json" "records/defaults/$text-arms-$tokens.json"
  done
done

# LoRA takes hours on as many tokens as MoE-Bias: it is run on 100,000 of them, and for as long as MoE-Bias takes.
uv run moe-bias arms --store "$stores/gsm8k" --data "$gsm8k" "${common[@]}" --epochs 4 --arms static \
  --seeds 0 --lora-tokens 100000 --output runs/out/defaults/gsm8k-arms
cp runs/out/defaults/gsm8k-arms/table.json records/defaults/gsm8k-arms.json
