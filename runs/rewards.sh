#!/usr/bin/env bash
# Rewards on grade-school problems, on a machine with a GPU: MoE-Bias, parts of it left out, and LoRA, all from the plain
# model, with the same problems, the same samples in a step and the same steps; then answers to problems that nothing was
# trained on, of the same kind and of another.
#   runs/rewards.sh MODEL DATA OUT [arms|answers]
# MODEL is a GGUF file, a folder or a Hub id. DATA holds gsm8k_train, gsm8k_test, math500 and amc23 as JSON Lines. JOBS
# processes share the GPU: seconds of an arm are then no measure of its cost. Every step whose output is there is left out,
# and a step that was cut short goes on: the same command resumes. `arms` and `answers` do one half.
set -euo pipefail
model=$1 data=$2 out=$3 half=${4:-both}

STEPS=${STEPS:-12} PROMPTS=${PROMPTS:-32} GROUP=${GROUP:-8} LIMIT=${LIMIT:-400}
ARMS=${ARMS:-moe-bias:0 lora-high-entropy:0 static:0 moe-bias:1 lora-high-entropy:1 static:1 moe-bias:2 lora-high-entropy:2 static:2 no-gate:0 all-tokens:0 lora:0}
LORA_RATE=${LORA_RATE:-3e-4}   # falls linearly to 0
LORA_ROWS=${LORA_ROWS:-16}     # samples in one backward pass of LoRA
TRAIN=${TRAIN:-7000}           # problems that steps draw from
TEST=${TEST:-300}              # GSM8K's test problems: a greedy answer, and SAMPLES at temperature 1
SAMPLES=${SAMPLES:-4}
OTHER=${OTHER:-200}            # of MATH-500
ROWS=${ROWS:-1024}             # answers in one forward pass
DTYPE=${DTYPE:-bfloat16} JOBS=${JOBS:-1}
MOE_BIAS=${MOE_BIAS:-uv run moe-bias}

common() {
  echo "--model $model --dtype $DTYPE --problems $data/gsm8k_train.jsonl --train-problems $TRAIN --test-problems 32 --resamples 0
    --steps $STEPS --prompts $PROMPTS --group $GROUP --max-new-tokens $LIMIT --evaluate-every $((STEPS + 1))"
}
arm() { # NAME:SEED
  local name=${1%:*} seed=${1#*:} parts=()
  case $name in
    moe-bias) ;;
    no-gate) parts=(--no-entropy-gate) ;;
    all-tokens) parts=(--rho 1) ;;
    static) parts=(--experts free --num-experts 1 --top-k 1 --no-entropy-gate --optimizer sgd --expert-rate 1 --router-rate 0.02) ;;
    lora*)
      # shellcheck disable=SC2046
      [ -e "$out/lora/arms/$name-seed$seed.json" ] || $MOE_BIAS compare $(common) --warm-problems 0 --arms "$name" --seeds "$seed" \
        --lora-rate "$LORA_RATE" --lora-batch-size "$LORA_ROWS" --output "$out/lora"
      return ;;
    *) echo "no arm is called $name" >&2; return 2 ;;
  esac
  # shellcheck disable=SC2046
  [ -e "$out/adapters/$name-seed$seed/record.json" ] || $MOE_BIAS train rl $(common) --seed "$seed" --show-every "$STEPS" "${parts[@]}" \
    --output "$out/adapters/$name-seed$seed"
}
answers() { # NAME FILE ARGUMENTS...
  local adapters=() one
  for one in $ARMS; do
    local folder=adapters
    [ "${one#lora}" = "$one" ] || folder=lora/adapters
    adapters+=("$out/$folder/${one%:*}-seed${one#*:}")
  done
  local joined
  joined=$(IFS=, && echo "${adapters[*]}")
  [ -e "$out/$1/record.json" ] || $MOE_BIAS eval --model "$model" --dtype "$DTYPE" --data "$data/$2.jsonl" --adapter "$joined" \
    --batch-size "$ROWS" --output "$out/$1" "${@:3}"
}
logged() { # NAME COMMAND...: its output goes to a file, and is shown where it fails
  mkdir -p "$out/logs"
  "${@:2}" >"$out/logs/$1.log" 2>&1 || { echo "$1 failed:"; tail -5 "$out/logs/$1.log"; return 1; }
  echo "$1: done after $SECONDS s"
}
many() { # COMMANDS..., each a line of words: JOBS at a time
  local failed=0
  for line in "$@"; do
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || failed=1; done
    # shellcheck disable=SC2086
    logged $line &
  done
  while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n || failed=1; done
  return $failed
}

echo "$(wc -w <<<"$ARMS") arms of $STEPS steps with $((PROMPTS * GROUP)) samples of at most $LIMIT tokens each, $JOBS at a time."
if [ "$half" != answers ]; then
  lines=()
  for one in $ARMS; do lines+=("$one arm $one"); done
  many "${lines[@]}"
fi
if [ "$half" != arms ]; then
  many "test-greedy answers test-greedy gsm8k_test --limit $TEST --samples 1 --temperature 0 --max-new-tokens $LIMIT" \
    "test-sampled answers test-sampled gsm8k_test --limit $TEST --samples $SAMPLES --temperature 1 --max-new-tokens $LIMIT" \
    "test-math answers test-math math500 --limit $OTHER --samples 1 --temperature 0 --max-new-tokens $((2 * LIMIT))" \
    "test-amc answers test-amc amc23 --samples $SAMPLES --temperature 1 --max-new-tokens $((2 * LIMIT))"
fi
