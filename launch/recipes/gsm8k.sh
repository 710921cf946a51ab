#!/usr/bin/env bash
# Distil a student on GSM8K from a teacher trained here, two ranks, no GPU needed (about 15 minutes on 2 cores).
#
#   launch/recipes/gsm8k.sh FOLDER     # FOLDER holds train.jsonl and test.jsonl
#
# Both models are tiny: they learn what an answer looks like, not arithmetic. What to watch is the student's KL to the teacher on
# held-out questions (eval/kl_teacher in outputs/gsm8k/student/metrics.jsonl).
set -euo pipefail
data=${1:?usage: gsm8k.sh FOLDER_WITH_train.jsonl_AND_test.jsonl}
job="torchrun --standalone --nproc-per-node 2 -m distill.train"

# 1. The teacher: supervised fine-tuning on the references; its byte-level BPE is trained from the data.
$job experiment=gsm8k_teacher data.path="$data" run.dir=outputs/gsm8k/teacher

# 2. The student: forward KL to the teacher on the same text; it takes over the teacher's tokenizer.
$job experiment=gsm8k_student data.path="$data" model.teacher.path=outputs/gsm8k/teacher/final run.dir=outputs/gsm8k/student

# 3. Both on the first 256 test questions.
for model in teacher student; do
    distill eval data=gsm8k data.path="$data" data.on_long=skip model.student.path=outputs/gsm8k/$model/final \
        model.teacher.path=outputs/gsm8k/teacher/final model.teacher_dtype=float32 train.max_length=256 rollout.max_new_tokens=128 \
        eval.samples=0 eval.examples=256 eval.kl_examples=256 --json outputs/gsm8k/$model/eval.json
done
