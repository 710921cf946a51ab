#!/usr/bin/env bash
# Distil on 2 nodes with 8 H100 each: dense models, teacher and student on every GPU, weights and optimizer sharded (ZeRO-3).
#
#   launch/recipes/two_by_eight.sh STUDENT TEACHER PROMPTS.jsonl [key=value …]  # Hugging Face folders or names
#   RAILS=ib0,ib1 PARTITION=gpu launch/recipes/two_by_eight.sh …
#   DRY=1 launch/recipes/two_by_eight.sh …                                      # prints the batch script
set -euo pipefail
student=${1:?usage: two_by_eight.sh STUDENT TEACHER PROMPTS.jsonl [key=value …]}
teacher=${2:?a teacher is missing}
prompts=${3:?a file of prompts is missing}

cluster=(2x8 --gpus-per-rank 1 --cpus-per-rank 12 --sbatch exclusive --sbatch mem=0)
limit=(--time "${TIME:-4:00:00}" --grace 600)                  # a checkpoint of ZeRO-3 takes minutes on a slow file system
where=(${PARTITION:+--partition "$PARTITION"} ${RAILS:+--rails "$RAILS"}) # rails: the interfaces between nodes, one per NIC

# 16 ranks: 256 sequences per step are 16 per rank, in 4 forward passes of 4.
ncclx launch slurm "${cluster[@]}" "${limit[@]}" "${where[@]}" ${DRY:+--dry-run} \
    -- -m distill.train model=hf method=on_policy \
    model.student.path="$student" model.teacher.path="$teacher" data=jsonl data.path="$prompts" \
    engine.zero_stage=3 engine.dtype=bfloat16 engine.activation_checkpointing=true engine.lr=1e-5 \
    train.batch_size=256 train.micro_batch_size=4 train.max_length=4096 rollout.max_new_tokens=2048 \
    checkpoint.every=50 run.dir=outputs/two_by_eight "${@:4}"
