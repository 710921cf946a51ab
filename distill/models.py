"""Students and teachers: loading, building, checking that they fit, adapters.

A model is a Hugging Face causal LM from a folder or hub name, or one built from an architecture in the configuration.
``TargetLogits`` wraps it so that a forward pass returns logits only where a next token is supervised: the prompt and the
padding never cost a row of the vocabulary. ``target_hidden`` returns what stands before the head there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from distill.config import LoraSpec, ModelSpec
from distill.data.batch import TokenBatch
from distill.errors import ModelError

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # its load reports become ModelErrors here


class TargetLogits(nn.Module):
    """A causal LM whose forward pass returns the logits of a batch's supervised positions only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model  # a causal LM, or a peft model around one

    def forward(self, batch: TokenBatch) -> Tensor:
        """Logits ``[T, V]`` (model dtype) that predict ``batch.target_ids``; T may be 0."""
        return final_logits(causal_lm(self.model), target_hidden(self.model, batch))


def target_hidden(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Final hidden states ``[T, H]`` of a causal LM (or a peft model around one) at the batch's supervised positions."""
    output = causal_lm(model).base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    )
    rows, columns = batch.target_index.unbind(1)
    hidden: Tensor = output.last_hidden_state[rows, columns]
    return hidden


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value,operator]


def final_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Hidden states ``[T, H]`` → logits ``[T, V]``, with the scale and soft cap that some architectures apply."""
    return scaled_and_capped(model.get_output_embeddings()(hidden), *scale_and_cap(model))


def scale_and_cap(model: PreTrainedModel) -> tuple[float, float | None]:
    """By what a model multiplies its logits, and where it caps them (None: nowhere)."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma


def scaled_and_capped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """``tanh(s·z / c)·c``; without a cap ``s·z``."""
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def section_of(who: str) -> str:
    """Where the configuration has a model: the student, teacher or reference, or by its name one of several teachers."""
    return f"model.{who}" if who in ("student", "teacher", "reference") else f"teacher.many.{who}"


def title_of(who: str) -> str:
    """What a person calls a model."""
    return f"the {who}" if section_of(who).startswith("model.") or " " in who else f"teacher '{who}'"


def load_tokenizer(spec: ModelSpec, who: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model (or at ``spec.tokenizer``). Raises ModelError naming the path."""
    path = spec.tokenizer or spec.path
    assert path is not None
    _require_folder(path, f"{section_of(who)}.tokenizer" if spec.tokenizer else f"{section_of(who)}.path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no tokenizer for {title_of(who)} at '{path}': {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{title_of(who)}'s tokenizer at '{path}' has no end-of-sequence token; set one and save it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    spec: ModelSpec, who: str, dtype: torch.dtype, options: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """A causal LM from ``spec.path``. Raises ModelError for a missing path, a wrong kind, or a checkpoint with gaps.

    ``options``: further ones of transformers' ``from_pretrained``.
    """
    assert spec.path is not None
    key = f"{section_of(who)}.path"
    _require_folder(spec.path, key)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            spec.path, dtype=dtype, attn_implementation=spec.attention, output_loading_info=True, **(options or {})
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{key}={spec.path}: cannot be loaded as a causal language model: {_first_line(error)}"
        ) from None
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        what = "a language-model head" if any("lm_head" in name for name in missing) else "some weights"
        raise ModelError(
            f"{key}={spec.path}: the checkpoint has no weights for {', '.join(missing[:3])}"
            f"{' …' if len(missing) > 3 else ''}, so this {who} would lack {what}; give a complete causal LM"
        )
    return model


def load_outline(spec: ModelSpec, who: str) -> PreTrainedModel:
    """The model at ``spec.path`` without its weights (on the meta device), for what its configuration says. Raises ModelError."""
    assert spec.path is not None
    _require_folder(spec.path, f"{section_of(who)}.path")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec.path))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{section_of(who)}.path={spec.path}: no causal language model: {_first_line(error)}"
        ) from None
    with contextlib.suppress(OSError):  # many folders have none; the one made from the configuration then stands
        model.generation_config = GenerationConfig.from_pretrained(spec.path)
    return model


def build_model(init: dict[str, Any], tokenizer: PreTrainedTokenizerBase, attention: str) -> PreTrainedModel:
    """A freshly initialised causal LM of the architecture ``init``, its vocabulary taken from ``tokenizer``."""
    values = dict(init)
    kind = values.pop("model_type", None)
    if kind is None:
        raise ModelError("model.student.init lacks model_type (for example qwen3 or llama)")
    try:
        config = AutoConfig.for_model(
            kind,
            **{"vocab_size": len(tokenizer), **values},
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"model.student.init: {_first_line(error)}") from None


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> nn.Module:
    """Freeze ``model`` and add low-rank adapters (peft)."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets: str | list[str] = spec.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in spec.target_modules.split(",")]
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules={spec.target_modules}: {_first_line(error)}") from None


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """A teacher: evaluation mode, no gradients."""
    return model.eval().requires_grad_(False)


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, who: str = "teacher") -> None:
    """Refuse two tokenizers unless one family made both: equal ids for every token in the range both have.

    Padded or extended vocabularies (151936 beside 152064) pass: only ids below the smaller size must agree.
    Raises ModelError naming the first tokens that differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    shared = min(len(student), len(teacher))
    differing = [
        token
        for token in ours.keys() | theirs.keys()
        if ours.get(token, shared) != theirs.get(token, shared)
        and min(ours.get(token, shared), theirs.get(token, shared)) < shared
    ]
    if not differing and _split(student) == _split(teacher):
        return
    examples = ", ".join(
        f"{token!r} is {ours.get(token, 'absent')} for the student and {theirs.get(token, 'absent')} for {title_of(who)}"
        for token in sorted(differing)[:2]
    )
    places = {vocabulary[token] for token in differing for vocabulary in (ours, theirs) if token in vocabulary}
    count = sum(place < shared for place in places)
    raise ModelError(
        f"the student's and {title_of(who)}'s tokenizers differ in {count} of their first {shared} tokens"
        f"{': ' + examples if examples else ' (they split the same text differently)'}. Whole distributions can only be "
        f"compared within one tokenizer family; choose a student of {title_of(who)}'s, or align the two: teacher.signal=sampled or "
        "topk (not with teacher.mixture=mean, a cache, or text that the teacher writes)"
    )


def _split(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """How a tokenizer splits a text that any general one can encode; None for a small alphabet of its own."""
    try:
        return tokenizer.encode("The quick brown fox: 12 + 30 = 42.\n\nHence, however, 7 < 8.")
    except Exception:  # the tokenizers library raises bare Exception for a symbol it does not know
        return None


def context_length(model: nn.Module) -> int | None:
    """Positions a model was made for, or None where its configuration does not say."""
    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, each shared tensor once (ZeRO-3 shards count in full)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _require_folder(path: str, key: str) -> None:
    """A path that looks local must exist; anything else is taken for a hub name."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.startswith("outputs/")
    if looks_local and not Path(path).is_dir():
        raise ModelError(f"{key}={path}: no such folder")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
