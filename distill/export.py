"""The trained student in Hugging Face format, whole or absent.

``final/`` loads with ``AutoModelForCausalLM.from_pretrained``: LoRA adapters are merged into it and also kept
in ``final/adapter`` for those who want the difference alone.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.distributed import all_or_nothing, rank
from distill.engine import TrainEngine
from distill.errors import CheckpointError
from distill.models import causal_lm
from distill.runs import replace_folder


def export_student(engine: TrainEngine, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write the student to ``target``. All ranks call it; raises CheckpointError on all where rank 0 cannot write."""
    with engine.whole_student() as student, all_or_nothing(CheckpointError):
        if rank() == 0:
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            if causal_lm(student) is not student:
                student.save_pretrained(str(partial / "adapter"))  # type: ignore[operator]
            merged(student).save_pretrained(str(partial))
            tokenizer.save_pretrained(str(partial))
            replace_folder(partial, target)


def merged(student: nn.Module) -> PreTrainedModel:
    """The student as one plain model: itself, or under LoRA a copy with the adapters merged."""
    model = causal_lm(student)
    return model if model is student else copy.deepcopy(student).merge_and_unload()  # type: ignore[operator]
