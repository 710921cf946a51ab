"""TRL's DistillationTrainer on one on-policy job, for ``python -m distill.bench.training``. Run it in an environment that has trl.

    python trl_on_policy.py JOB.json RESULT.json

JOB names the model folders, the prompts and the sizes; RESULT gets, for each step, its seconds and its completion tokens, and the
peak resident memory of the process.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class StepTimes(TrainerCallback):
    """Seconds from the start of a step to its end; the data of the step is made inside it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._began or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["student"], padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[who], dtype=torch.float32) for who in ("student", "teacher")
    )
    rows = [{"prompt": prompt} for prompt in job["prompts"]]
    arguments = trl.DistillationConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=job["batch_size"],
        gradient_accumulation_steps=1,
        max_steps=job["steps"],
        max_completion_length=job["max_new_tokens"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        temperature=1.0,
        top_k=0,
        beta=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    times = StepTimes()
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    result = {
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "step_s": times.seconds,
        "tokens": [length * job["batch_size"] for length in lengths],
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
