#!/usr/bin/env bash
# Grade-school problems on a model that solves some of them: own right answers, worked answers and rewards, at the output
# and by LoRA.
#   runs/experiment.sh MODEL DATA OUT URL
# MODEL is a GGUF file, a folder or a Hub id, which `moe-bias serve` serves at URL on this machine, with OUT/adapters and a
# spool (docs/guides/rl.md). DATA holds gsm8k_train, gsm8k_test, math500 and amc23 as JSON Lines. Every step goes on where
# it was interrupted; the folders in OUT say what was done. Sizes are variables, such as TRAIN=130 STEPS=20.
#   samples     the model's own answers to TRAIN training problems, SAMPLES of each
#   own, short  adapters of all right ones, of the shortest of each problem; static: one vector of biases of all of them
#   lora        LoRA on all of them, for as many seconds as `own` took, loading the model and its pass through it counted
#   worked      an adapter of people's solutions to WORKED training problems
#   rewards     STEPS steps of rewards from `own`, on the problems that are solved sometimes
#   test-...    greedy answers to problems of the same kind and of two others, none of which is trained on
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=$1 DATA=$2 OUT=$3 URL=$4
TRAIN=${TRAIN:-130} SAMPLES=${SAMPLES:-4} WORKED=${WORKED:-500} TEST=${TEST:-150} OTHER=${OTHER:-60}
STEPS=${STEPS:-10} PROMPTS=${PROMPTS:-12} GROUP=${GROUP:-4} LIMIT=${LIMIT:-512} DTYPE=${DTYPE:-auto}
SERVED=$(curl -fsS "$URL/models" | uv run python -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
echo "Samples to learn from: $((TRAIN * SAMPLES)), and $((STEPS * PROMPTS * GROUP)) by rewards."
echo "Answers to measure: $((TEST + 2 * OTHER)) of the model and of each adapter, each of at most $LIMIT tokens or twice as many."

asked() { # NAME PROBLEMS MODELS ARGUMENTS...
  uv run moe-bias eval --data "$DATA/$2.jsonl" --endpoint "$URL" --endpoint-model "$3" --output "$OUT/$1" "${@:4}"
}
trained() { # NAME ARGUMENTS...
  [ -e "$OUT/adapters/$1/record.json" ] || uv run moe-bias train sft --model "$MODEL" --output "$OUT/adapters/$1" "${@:2}"
}

asked samples gsm8k_train "$SERVED" --limit "$TRAIN" --samples "$SAMPLES" --temperature 0.7 --max-new-tokens "$LIMIT"
began=$SECONDS
trained own --samples "$OUT/samples"
[ -e "$OUT/own.seconds" ] || echo $((SECONDS - began)) >"$OUT/own.seconds"
trained short --samples "$OUT/samples" --samples-take shortest
trained static --samples "$OUT/samples" --experts free --num-experts 1 --top-k 1 --no-entropy-gate
[ -e "$OUT/lora/lora.json" ] || uv run python runs/lora_answers.py "$MODEL" "$OUT/samples" "$OUT/lora" --seconds "$(cat "$OUT/own.seconds")"
[ -e "$OUT/worked.jsonl" ] || uv run python runs/worked_answers.py "$DATA/gsm8k_train.jsonl" "$OUT/worked.jsonl" --limit "$WORKED"
trained worked --data "$OUT/worked.jsonl"

[ -e "$OUT/sometimes.jsonl" ] || uv run python runs/choose_problems.py "$OUT/samples" "$DATA/gsm8k_train.jsonl" "$OUT/sometimes.jsonl"
[ -e "$OUT/adapters/rewards/record.json" ] || uv run moe-bias train rl --model "$MODEL" --dtype "$DTYPE" --adapter "$OUT/adapters/own" \
  --engine vllm --endpoint "$URL" --problems "$OUT/sometimes.jsonl" --steps "$STEPS" --prompts "$PROMPTS" --group "$GROUP" \
  --max-new-tokens "$LIMIT" --output "$OUT/adapters/rewards"

ARMS=$SERVED
for name in own short static worked rewards; do ARMS=$ARMS,$SERVED:$name; done
asked test-gsm8k gsm8k_test "$ARMS" --limit "$TEST" --samples 1 --temperature 0 --max-new-tokens "$LIMIT"
asked test-math math500 "$ARMS" --limit "$OTHER" --samples 1 --temperature 0 --max-new-tokens $((2 * LIMIT))
asked test-amc amc23 "$ARMS" --samples 1 --temperature 0 --max-new-tokens $((2 * LIMIT))
uv run moe-bias eval --model "$MODEL" --dtype "$DTYPE" --data "$DATA/gsm8k_test.jsonl" --adapter "$OUT/lora" --no-base \
  --limit "$TEST" --samples 1 --temperature 0 --max-new-tokens "$LIMIT" --output "$OUT/test-lora"
