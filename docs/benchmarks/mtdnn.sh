#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The measurement of docs/recipes/mtdnn.md: eight tasks, a model for each, one for all, and one for all that learns from
# ensembles of three teachers on four of them. What is finished is kept: the same command goes on after an interruption.
#
#   docs/benchmarks/mtdnn.sh DATA OUTPUT
#
# DATA holds a folder for each task: cola, sst2, mrpc, stsb, qqp_subset, snli, qnli and rte. Settings, with their defaults:
#   SEEDS="1"   e.g. "1 2 3"
#   EPOCHS=2   of the students; teachers, and the tuning on each task, go on from one and take one more
#   PYDISTILL=pydistill   the command
#   RUN_ARGS              more --key value
set -euo pipefail

if [ $# -ne 2 ] || [ ! -d "$1" ]; then
  echo "usage: docs/benchmarks/mtdnn.sh DATA OUTPUT; DATA must be a folder, got '${1:-}'" >&2
  exit 2
fi
data=$1 output=$2 here=$(dirname "$0")
read -ra seeds <<<"${SEEDS:-1}"
read -ra run_args <<<"${RUN_ARGS:-}"
read -ra pydistill <<<"${PYDISTILL:-pydistill}"

"${pydistill[@]}" run "$here/mtdnn.yaml" --resume --output "$output" --seeds "${seeds[@]}" \
  --tasks.cola.data.train "$data/cola/train.tsv" --tasks.cola.data.dev "$data/cola/dev.tsv" \
  --tasks.sst2.data.train "$data/sst2/train.tsv" --tasks.sst2.data.dev "$data/sst2/dev.tsv" \
  --tasks.mrpc.data.train "$data/mrpc/train.tsv" \
  --tasks.stsb.data.train "$data/stsb/train.tsv" --tasks.stsb.data.dev "$data/stsb/dev.tsv" \
  --tasks.qqp.data.train "$data/qqp_subset/all.tsv" \
  --tasks.snli.data.train "$data/snli/dev.tsv" \
  --tasks.qnli.data.train "$data/qnli/dev.tsv" \
  --tasks.rte.data.train "$data/rte/train.tsv" --tasks.rte.data.dev "$data/rte/dev.tsv" \
  --train.num_train_epochs "${EPOCHS:-2}" ${run_args[@]+"${run_args[@]}"}

echo
echo "The table and the picture of the page, from these numbers:"
echo "  cp $output/metrics.json $here/mtdnn.json"
echo "  cp $output/comparison.png $here/mtdnn.png"
echo "  make docs"
