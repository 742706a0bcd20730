#!/usr/bin/env bash
# Length as something that a layer at the output can learn: accuracy against tokens on problems of GSM8K's test set, for
#   all         trained on every right answer that the model sampled to problems of the training set: the control
#   short       trained on the shortest right answer of each, at several strengths
#   rl-LAMBDA   from `all` on by rewards in which 100 tokens cost a right answer LAMBDA
#   hand        a static bias on words of hesitation, made by hand, at several strengths
#   lora        LoRA on the answers that `short` learned
# beside the plain model, under every shorter limit (`equal tokens`), and told to be brief (`instructed`).
#
#   runs/length.sh MODEL DATA_FOLDER OUT
#
# DATA_FOLDER has gsm8k_train.jsonl and gsm8k_test.jsonl in rows of problem and answer. A plan, from tokens a second
# that were just measured, is printed first; PLAN_ONLY=1 ends there. Every step whose output is there is left out, and a
# step that was cut short goes on: the same command resumes. Test problems are those of the test file alone.
#
# With SERVE the answers of training and of test problems come from vLLM, whose environment it names, as in
#   SERVE="serving-env/bin/moe-bias serve --dtype bfloat16" SERVE_ARGS="--max-model-len 1024" runs/length.sh ...
# LoRA then has a record of its own beside the plain model, as the server has none of it.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 data=$2 out=$3

TRAIN=${TRAIN:-400}            # training problems, of which each is answered
SAMPLES=${SAMPLES:-8}          # times
TEST=${TEST:-200}              # test problems
TEST_SAMPLES=${TEST_SAMPLES:-1} # answers to each: 1 is greedy, more are sampled at temperature 1
LIMIT=${LIMIT:-400}            # tokens of an answer
STRENGTHS=${STRENGTHS:-0.25,0.5,0.75,1,1.25,1.5}
PENALTIES=${PENALTIES:-0.1 0.3 1}
STEPS=${STEPS:-20}             # of rewards, for each penalty
PROMPTS=${PROMPTS:-16}         # problems in a step
GROUP=${GROUP:-8}              # samples of each
INSTRUCTION=${INSTRUCTION:-Be brief: write only the calculations that are needed, and no words that can be left out.}
LORA=${LORA:-1}                # 0 leaves LoRA out, which takes longest to train
DTYPE=${DTYPE:-auto} BATCH=${BATCH:-64} SEED=${SEED:-0} PORT=${PORT:-8077}
RL_ARGS=${RL_ARGS:-}           # more options of train rl, such as --engine vllm

run() { uv run "$@"; }
ask=(run moe-bias eval --model "$model" --dtype "$DTYPE" --max-new-tokens "$LIMIT" --seed "$SEED")
sampled=(--samples "$SAMPLES" --temperature 1 --data "$data/gsm8k_train.jsonl" --batch-size $((BATCH > SAMPLES ? BATCH : SAMPLES)))
tested=(--data "$data/gsm8k_test.jsonl" --limit "$TEST" --instruction "$INSTRUCTION" --batch-size "$BATCH" --samples "$TEST_SAMPLES"
  --temperature $((TEST_SAMPLES > 1)))
read -ra penalties <<< "$PENALTIES"
has_adapter() { [ -f "$out/adapters/$1/adapter_config.json" ]; }
served=()
if [ -n "${SERVE:-}" ]; then served=(--endpoint "http://127.0.0.1:$PORT/v1"); fi

serve() { # the server, until this script ends; adapters may come while it runs
  [ ${#served[@]} -gt 0 ] && [ -z "${server:-}" ] || return 0
  mkdir -p "$out/adapters"
  read -ra words <<< "$SERVE"
  read -ra more <<< "${SERVE_ARGS:-}"
  "${words[@]}" --model "$model" --served-name base --adapters "$out/adapters" --port "$PORT" -- "${more[@]}" > "$out/server.log" 2>&1 &
  server=$!
  trap 'kill "$server"' EXIT
  until curl -sf "http://127.0.0.1:$PORT/health" > /dev/null; do
    kill -0 "$server" || { tail "$out/server.log"; exit 1; }
    sleep 2
  done
}
plain() { if [ ${#served[@]} -gt 0 ]; then printf '%s\n' "${served[@]}" --endpoint-model base; fi; }

mkdir -p "$out"
if [ ! -f "$out/calibration/record.json" ]; then
  serve
  mapfile -t engine < <(plain)
  "${ask[@]}" "${sampled[@]}" --limit 8 "${engine[@]}" --output "$out/calibration" > "$out/calibration.log"
fi
run python runs/length.py plan "$out/calibration" --train "$TRAIN" --samples "$SAMPLES" --test "$TEST" --test-samples "$TEST_SAMPLES" \
  --strengths "$STRENGTHS" --penalties ${#penalties[@]} --steps "$STEPS" --prompts "$PROMPTS" --group "$GROUP" --lora "$LORA"
[ -z "${PLAN_ONLY:-}" ] || exit 0

# The model's own answers to training problems, once; of them the right ones.
if [ ! -f "$out/samples/record.json" ]; then
  serve
  mapfile -t engine < <(plain)
  "${ask[@]}" "${sampled[@]}" --limit "$TRAIN" "${engine[@]}" --output "$out/samples"
fi
for take in all shortest; do
  name=${take/shortest/short}
  has_adapter "$name" || run moe-bias train sft --model "$model" --dtype "$DTYPE" --samples "$out/samples" --samples-take "$take" \
    --seed "$SEED" --features "$out/features/$name" --output "$out/adapters/$name"
done
has_adapter hand || run python runs/length.py hand "$model" "$out/adapters/hand" --dtype "$DTYPE"
if [ "$LORA" = 1 ] && [ ! -f "$out/lora/adapter_config.json" ]; then
  run python runs/lora_answers.py "$model" "$out/samples" "$out/lora" --take shortest --passes 2 --features "$out/features/short" \
    --dtype "$DTYPE" --seed "$SEED"
fi

# Rewards in which tokens cost, all from the same start.
for penalty in "${penalties[@]}"; do
  # shellcheck disable=SC2086
  has_adapter "rl-$penalty" || run moe-bias train rl --model "$model" --dtype "$DTYPE" --problems "$data/gsm8k_train.jsonl" \
    --train-problems "$TRAIN" --test-problems 32 --adapter "$out/adapters/all" --length-penalty "$penalty" --steps "$STEPS" \
    --prompts "$PROMPTS" --group "$GROUP" --max-new-tokens "$LIMIT" --batch-size "$BATCH" --seed "$SEED" $RL_ARGS --output "$out/adapters/rl-$penalty"
done

# Test problems: one folder of samples, so that arms are paired; a record of the strengths, and one of the arms.
arms=(all short hand "${penalties[@]/#/rl-}")
keep() { # the record of the last command on test problems; a server's rows are named as the others are
  if [ ${#served[@]} -gt 0 ]; then
    run python runs/length.py named "$out/test/record.json" "$out/$1.json"
  else
    cp "$out/test/record.json" "$out/$1.json"
  fi
}
commas() { local IFS=,; echo "$*"; }
if [ ${#served[@]} -gt 0 ]; then
  serve
  mapfile -t copies < <(run python runs/length.py strengths "$model" "$out/adapters" short hand --strengths "$STRENGTHS")
  "${ask[@]}" "${tested[@]}" "${served[@]}" --endpoint-model "$(commas base "${copies[@]/#/base:}")" --output "$out/test"
  cp "$out/test/record.json" "$out/strengths.json"
  "${ask[@]}" "${tested[@]}" "${served[@]}" --endpoint-model "$(commas base "${arms[@]/#/base:}")" --output "$out/test"
  cp "$out/test/record.json" "$out/arms.json"
  if [ "$LORA" = 1 ]; then
    "${ask[@]}" "${tested[@]}" --adapter "$out/lora" --output "$out/test-lora"
    cp "$out/test-lora/record.json" "$out/lora.json"
  fi
else
  "${ask[@]}" "${tested[@]}" --adapter "$out/adapters/short,$out/adapters/hand" --strength "$STRENGTHS" --output "$out/test"
  cp "$out/test/record.json" "$out/strengths.json"
  adapters=("${arms[@]/#/$out/adapters/}")
  [ "$LORA" = 1 ] && adapters+=("$out/lora")
  "${ask[@]}" "${tested[@]}" --adapter "$(commas "${adapters[@]}")" --output "$out/test"
  cp "$out/test/record.json" "$out/arms.json"
fi
records=("$out/strengths.json" "$out/arms.json")
[ -f "$out/lora.json" ] && records+=("$out/lora.json")
run moe-bias report "${records[@]}" --title "Accuracy and length" --output "$out/report"
