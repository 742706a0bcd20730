#!/usr/bin/env bash
# Where the defaults of supervised training come from: one setting after the other on two texts, the
# worked solutions of GSM8K (a quarter of them, about 212,000 tokens to train on) and functions of
# Python's standard library (about 200,000). Records go to records/defaults; `uv run python docs/generate.py`
# then makes the tables of docs/defaults.md from them. Cells that have a record are not run again.
#
#   runs/defaults.sh GSM8K_TRAIN.jsonl [TEXT...]
#
# The file has GSM8K's training set in rows of problem and solution (or question and answer).
set -euo pipefail
cd "$(dirname "$0")/.."
gsm8k=$1
shift
texts=("${@:-gsm8k python}")
stores=runs/out/stores

[ -d "$stores/gsm8k" ] || uv run moe-bias extract --data "$gsm8k" --shard 1/4 --output "$stores/gsm8k"
python=runs/out/python_functions.jsonl
[ -f "$python" ] || uv run python runs/python_functions.py "$python" --functions 2000
declare -A lora=([gsm8k]="--data $gsm8k" [python]="--no-lora")
declare -A features=([gsm8k]="--store $stores/gsm8k" [python]="--data $python --features $stores/python")

sweep() {
  # shellcheck disable=SC2086
  uv run moe-bias sweep ${features[$text]} --held-out 0.1 --epochs 4 --logits-budget 4GiB \
    --output "runs/out/defaults/$text-$1" --grid "$2" --base "$3" --seeds "${4:-0}"
  mkdir -p records/defaults
  cp "runs/out/defaults/$text-$1/table.json" "records/defaults/$text-$1.json"
}

# LoRA on both texts takes hours on two cores: it is run on GSM8K, on 100,000 tokens and for as long as moe-bias takes.
arms() {
  # shellcheck disable=SC2086
  uv run moe-bias arms ${features[$text]} ${lora[$text]} --held-out 0.1 --epochs 4 --expert-rate 2e-2 --gate-alpha 0 --logits-budget 4GiB --seeds 0 \
    --lora-tokens 100000 --output "runs/out/defaults/$text-arms"
  cp "runs/out/defaults/$text-arms/table.json" "records/defaults/$text-arms.json"
}

for text in ${texts[*]}; do
  sweep experts "num_experts=4,16,64 top_k=1,2,4" "num_experts=16 top_k=2" 0,1
  sweep rates "expert_rate=2e-2,5e-2,1e-1 router_rate=1e-3,3e-3,1e-2" "expert_rate=5e-2 router_rate=3e-3"
  sweep gate "gate_alpha=0,1 gate_beta=-1,0,2" "gate_alpha=1 gate_beta=0"
  sweep normalisation "normalisation=standardise,rms,none" "normalisation=standardise"
  sweep together "expert_rate=2e-2 gate_alpha=0,1 top_k=2,4 epochs=4,8" "gate_alpha=0 top_k=2 epochs=4"
  arms
  sweep epochs "epochs=2,4,8,16 expert_dropout=0,0.2" "epochs=4 expert_dropout=0"
  sweep support "support=own,auto:1024,auto:2048" "support=own"
done
