#!/usr/bin/env bash
# What a layer at the output could gain on GSM8K's worked solutions, told from 50,000 of 212,000 training tokens. The store is the
# one of runs/defaults.sh, whose arms at 70,000 and 200,000 tokens are what the forecast is held against.
#
#   runs/headroom.sh
set -euo pipefail
cd "$(dirname "$0")/.."
OMP_NUM_THREADS=1 uv run moe-bias headroom --store runs/out/stores/gsm8k --held-out 0.1 --output runs/out/headroom/gsm8k
mkdir -p records/headroom
cp runs/out/headroom/gsm8k/record.json records/headroom/gsm8k.json
