#!/usr/bin/env bash
# EAGLE-3 for Llama-3.1-8B-Instruct, from a public data set to a measured speed-up, on one box of 8 GPUs:
# prepare, four servers, regenerate, cache, train, export, benchmark. Every path and number below is a variable:
#
#   MODEL=/models/Llama-3.1-8B-Instruct WORK=/data/run examples/run_llama3_eagle3_sgl_online.sh
#   TINY=1 examples/run_llama3_eagle3_sgl_online.sh         the same steps on the shipped target, on a CPU, in minutes
#
# A step whose output is there is left out, so that an interrupted run continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

TINY=${TINY:-0}
if [ "$TINY" = 1 ]; then
  MODEL=${MODEL:-specforge_lite/assets/tiny_target}; DRAFT_CONFIG=${DRAFT_CONFIG:-configs/tiny-target-eagle3.json}
  DATASET=${DATASET:-gsm8k-sample}; SAMPLES=${SAMPLES:-24}; TEMPLATE=${TEMPLATE:-auto}; MAX_LENGTH=${MAX_LENGTH:-256}
  BACKEND=${BACKEND:-hf}; NUM_SERVERS=${NUM_SERVERS:-0}; NUM_GPUS=${NUM_GPUS:-1}; TP_SIZE=${TP_SIZE:-1}
  EPOCHS=${EPOCHS:-1}; ANSWER_TOKENS=${ANSWER_TOKENS:-32}; BENCH_TOKENS=${BENCH_TOKENS:-24}
  BENCHMARKS=${BENCHMARKS:-gsm8k:2}; SCHEDULE=${SCHEDULE:-800}
  WORK=${WORK:-outputs/llama3-example-tiny}
fi
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}; DRAFT_CONFIG=${DRAFT_CONFIG:-configs/llama-3.1-8b-eagle3.json}
DATASET=${DATASET:-sharegpt}; SAMPLES=${SAMPLES:-100000}; TEMPLATE=${TEMPLATE:-llama3}; MAX_LENGTH=${MAX_LENGTH:-2048}
BACKEND=${BACKEND:-sglang}; NUM_SERVERS=${NUM_SERVERS:-4}; NUM_GPUS=${NUM_GPUS:-4}; TP_SIZE=${TP_SIZE:-4}
EPOCHS=${EPOCHS:-10}; ANSWER_TOKENS=${ANSWER_TOKENS:-1024}; BENCH_TOKENS=${BENCH_TOKENS:-512}
SCHEDULE=${SCHEDULE:-800000}
BENCHMARKS=${BENCHMARKS:-mtbench:80 gsm8k:200 humaneval:200 math500:200}
WORK=${WORK:-outputs/llama3-8b-eagle3}; CACHE=${CACHE:-$WORK/cache}; RUN=${RUN:-$WORK/run}
FIRST_PORT=${FIRST_PORT:-30001}; REPORT_TO=${REPORT_TO:-none}
PYTHON=${PYTHON:-.venv/bin/python}; ENGINE_PYTHON=${ENGINE_PYTHON:-.venv-sglang/bin/python}
mkdir -p "$WORK"

echo "== 1. prepare"
[ -e "$WORK/data/.done" ] || {
  "$PYTHON" scripts/prepare_data.py --dataset "$DATASET" --output-path "$WORK/data" --sample-size "$SAMPLES" --split-eval 0.1
  touch "$WORK/data/.done"
}

echo "== 2. regenerate the answers with the target"
servers=()
stop_servers() { for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done; servers=(); }
trap stop_servers EXIT
if [ ! -e "$WORK/answers/.done" ]; then
  addresses=()
  for ((i = 0; i < NUM_SERVERS; i++)); do
    port=$((FIRST_PORT + i))
    CUDA_VISIBLE_DEVICES=$i "$ENGINE_PYTHON" -m sglang.launch_server --model-path "$MODEL" --port "$port" \
      --dtype bfloat16 --mem-fraction-static 0.8 > "$WORK/server_$i.log" 2>&1 &
    servers+=($!); addresses+=("127.0.0.1:$port")
  done
  if [ "$NUM_SERVERS" = 0 ]; then served=(--target-backend hf); else served=(--server-address-port "${addresses[@]}"); fi
  for part in train eval; do
    "$PYTHON" scripts/generate_data_by_target.py --model-name "$MODEL" --output-dir "$WORK/answers/$part" \
      --output-file "$WORK/$part.jsonl" --raw-data-file "$(ls "$WORK"/data/*_$part.jsonl)" --max-tokens "$ANSWER_TOKENS" "${served[@]}"
  done
  stop_servers
  touch "$WORK/answers/.done"
fi

echo "== 3. cache"
data=(--target-model-path "$MODEL" --draft-model-config "$DRAFT_CONFIG" --train-data-path "$WORK/train.jsonl"
  --eval-data-path "$WORK/eval.jsonl" --cache-dir "$CACHE" --chat-template "$TEMPLATE" --max-length "$MAX_LENGTH")
"$PYTHON" scripts/build_eagle3_dataset_cache.py "${data[@]}" --view-train-data 1

echo "== 4. train"
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS" scripts/train_eagle3_sgl_online.py \
  "${data[@]}" --model-path "$MODEL" --target-backend "$BACKEND" --tp-size "$TP_SIZE" --output-dir "$RUN" \
  --num-epochs "$EPOCHS" --batch-size 1 --learning-rate 5e-5 --total-steps="$SCHEDULE" --dist-timeout=10 \
  --draft-attention-backend flex_attention --report-to "$REPORT_TO"

echo "== 5. export"
"$PYTHON" scripts/export_draft.py --checkpoint "$RUN" --output-dir "$WORK/draft" --overwrite

echo "== 6. benchmark"
"$PYTHON" bench_model_speedup.py --model-path "$MODEL" --speculative-draft-model-path "$WORK/draft" \
  --backend "$BACKEND" --config-list 1,0,0,0 1,3,1,4 1,7,10,60 --benchmark-list $BENCHMARKS \
  --max-new-tokens "$BENCH_TOKENS" --output "$WORK/speedup.jsonl"
echo "done: draft in $WORK/draft, speed-up in $WORK/speedup.jsonl"
