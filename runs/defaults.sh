#!/usr/bin/env bash
# Where the defaults of supervised training come from: one setting after the other on two texts, the
# worked solutions of GSM8K (a quarter of them, about 212,000 tokens to train on) and functions of
# Python's standard library (about 200,000). Records go to records/defaults; `uv run python docs/generate.py`
# then makes the tables of docs/defaults.md from them. Cells that have a record are not run again.
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
declare -A features=([gsm8k]="--store $stores/gsm8k" [python]="--data $python --features $stores/python")

sweep() {
  # shellcheck disable=SC2086
  uv run moe-bias sweep ${features[$1]} "${common[@]}" --epochs 4 --expert-rate "$2" \
    --output "runs/out/defaults/$1-$3" --grid "$4" --base "$5" --seeds "${6:-0}"
  mkdir -p records/defaults
  cp "runs/out/defaults/$1-$3/table.json" "records/defaults/$1-$3.json"
}

declare -A seeds=([gsm8k]=0,1 [python]=0)
for text in gsm8k python; do
  sweep $text 5e-2 experts "num_experts=4,16,64 top_k=1,2,4" "num_experts=16 top_k=2" "${seeds[$text]}"
  sweep $text 5e-2 rates "expert_rate=2e-2,5e-2,1e-1 router_rate=1e-3,3e-3,1e-2" "expert_rate=5e-2 router_rate=3e-3"
  sweep $text 5e-2 gate "gate_alpha=0,1 gate_beta=-1,0,2" "gate_alpha=1 gate_beta=0"
  sweep $text 5e-2 normalisation "normalisation=standardise,rms,none" "normalisation=standardise"
done
sweep gsm8k 2e-2 together "gate_alpha=0,1 top_k=2,4 epochs=4,8" "gate_alpha=0 top_k=2 epochs=4"
sweep gsm8k 2e-2 epochs "epochs=2,4,8,16 expert_dropout=0,0.2" "epochs=4 expert_dropout=0"
for text in gsm8k python; do
  sweep $text 2e-2 support "support=own,auto:1024,auto:2048" "support=own"
done

# LoRA takes hours on as many tokens as MoE-Bias: it is run on 100,000 of them, and for as long as MoE-Bias takes.
uv run moe-bias arms --store "$stores/gsm8k" --data "$gsm8k" "${common[@]}" --epochs 4 --expert-rate 2e-2 --gate-alpha 0 \
  --seeds 0 --lora-tokens 100000 --output runs/out/defaults/gsm8k-arms
cp runs/out/defaults/gsm8k-arms/table.json records/defaults/gsm8k-arms.json
