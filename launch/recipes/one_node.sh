#!/usr/bin/env bash
# Distil on one node with 8 GPUs, as a SLURM job that saves and continues across time limits.
#
#   launch/recipes/one_node.sh STUDENT TEACHER PROMPTS.jsonl [key=value …]      # Hugging Face folders or names
#   PARTITION=gpu TIME=8:00:00 launch/recipes/one_node.sh …
#   DRY=1 launch/recipes/one_node.sh …                                          # prints the batch script
#
# Without SLURM: replace the first line of the command by `ncclx launch torchrun --nproc-per-node 8 \`.
set -euo pipefail
student=${1:?usage: one_node.sh STUDENT TEACHER PROMPTS.jsonl [key=value …]}
teacher=${2:?a teacher is missing}
prompts=${3:?a file of prompts is missing}

# The grace must hold one step and one checkpoint; the job is requeued and continues in the same run.dir.
# 8 ranks: 128 sequences per step are 16 per rank, in 4 forward passes of 4.
ncclx launch slurm 1x8 --gpus-per-rank 1 --time "${TIME:-4:00:00}" --grace 300 ${PARTITION:+--partition "$PARTITION"} --wait ${DRY:+--dry-run} \
    -- -m distill.train model=hf method=on_policy \
    model.student.path="$student" model.teacher.path="$teacher" data=jsonl data.path="$prompts" \
    engine.zero_stage=2 engine.dtype=bfloat16 train.batch_size=128 train.micro_batch_size=4 \
    train.max_length=2048 rollout.max_new_tokens=1024 run.dir=outputs/one_node "${@:4}"
