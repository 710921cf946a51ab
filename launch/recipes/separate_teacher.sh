#!/usr/bin/env bash
# A teacher on ranks of its own: train a tiny one, then let it teach from another (emulated) host. About 4 minutes on 2 cores.
#
#   launch/recipes/separate_teacher.sh                        # 1 student rank on host 0, 1 teacher rank on host 1
#   HOSTS=2+1 TEACHERS=1 launch/recipes/separate_teacher.sh   # 2 students on host 0, 1 teacher on host 1
#   launch/recipes/separate_teacher.sh teacher.signal=logits  # further key=value reach the student's run
#
# Emulated hosts need root. Without it, or on real machines, the same job starts under torchrun, SLURM or mpirun: the last
# TEACHERS ranks teach. For two nodes of 8 GPUs with the teacher sharded over the second one:
#   ncclx launch slurm 2x8 --gpus-per-rank 1 -- -m distill.train model=hf teacher=separate teacher.ranks=8 teacher.shard=tensor …
set -euo pipefail
hosts=${HOSTS:-2x1}
teachers=${TEACHERS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

[ -d outputs/teacher/final ] || distill train experiment=demo_teacher run.dir=outputs/teacher
ncclx launch emulate "$hosts" --rate "${RATE:-200mbit}" \
    -- -m distill.train experiment=separate_teacher teacher.ranks="$teachers" "$@"

# Of the last step: bytes of signals and of requests, seconds that the student waited, and the teacher's busy share.
tail -n 1 outputs/separate/metrics.jsonl | tr ',' '\n' | grep '"teacher/' || true
