"""Running a causal LM over ragged rows and our own key-value cache.

`build_forward` picks the lean path for Llama- and Qwen3-architecture models (`lean.py`), and otherwise drives the Hugging Face
forward through an adapter that looks like a `Cache` to the model. The adapter serves decoder-only models with plain
full attention; anything that keeps other state (sliding windows, linear attention, encoder-decoder) is refused, and
every other model must first reproduce its own uncached logits on a few tokens.
"""

import inspect
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from distill.rollouts.cache import Chunk, KVCache

_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class UnsupportedModelError(ValueError):
    """The model keeps state that a key-value cache with a length per row cannot hold."""


class Forward(Protocol):
    """Appends a chunk to the cache (it writes keys and values; lengths are the caller's business)."""

    def __call__(self, chunk: Chunk, cache: KVCache, *, logits: bool) -> Tensor | None:
        """Next-token logits [N, V] for the chunk's packed tokens, or ``None`` where ``logits`` is false."""
        ...


def unwrap(model: Any) -> PreTrainedModel:
    """The causal LM inside a peft wrapper (its adapters stay active), or the model itself."""
    if not hasattr(model, "get_base_model"):
        return model
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"adapter {name!r} ({config.peft_type}) adds virtual prompt tokens, which rollouts do not feed; use LoRA"
            )
    return model.get_base_model()


def model_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the input embedding."""
    return next(model.get_input_embeddings().parameters()).device


def context_length(model: PreTrainedModel) -> int | None:
    """Longest sequence the model's configuration allows, in tokens, or ``None`` where it does not say."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_supported(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for a model whose cache is not plain full attention."""
    config, name = model.config.get_text_config(decoder=True), type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if not getattr(config, "layer_types", None) else None
    rope = getattr(config, "rope_parameters", None) or {}
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif kinds:
        reason = f"it has layers of type {', '.join(sorted(kinds))}"
    elif window is not None:
        reason = f"it uses sliding-window attention (sliding_window={window})"
    elif getattr(model, "_is_stateful", False):
        reason = "it carries a recurrent state"
    elif rope.get("rope_type") in _BATCH_DEPENDENT_ROPE:
        reason = f"its rotary embedding ({rope['rope_type']}) depends on the longest row of a batch"
    else:
        return
    raise UnsupportedModelError(
        f"{name} cannot be used with the builtin rollout engine: {reason}. "
        "It needs a decoder-only model with full attention in every layer."
    )


def build_forward(model: PreTrainedModel, *, lean: bool = True) -> Forward:
    """The fastest forward that is exact for this model; raises `UnsupportedModelError` where there is none.

    Build it anew whenever weights may have changed (the lean path may keep joined copies of small weights).
    ``lean=False`` keeps to the Hugging Face forward, for comparison.
    """
    from distill.rollouts.lean import LeanForward, is_lean

    check_supported(model)
    if lean and is_lean(model):
        return LeanForward(model)
    return HFForward(model)


class _FullLayer(CacheLayerMixin):
    """What a model may ask of one layer of its cache: nothing that our masks and positions do not already say."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: `KVCache` allocates."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise UnsupportedModelError("the model updates its cache layer by layer, past the cache object")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise UnsupportedModelError("the model builds its own attention mask and ignores the one it is given")

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    # The name of get_max_length before transformers 5.2x.
    get_max_cache_shape = get_max_length


class _Adapter(Cache):
    """`KVCache` in the shape of a Hugging Face cache, for the duration of one forward."""

    def __init__(self, cache: KVCache, chunk: Chunk, layers: int) -> None:
        super().__init__(layers=[_FullLayer() for _ in range(layers)])
        self._cache, self._chunk = cache, chunk
        self.written: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [rows, heads, width, head_dim]; return what the new tokens attend to, in the same layout."""
        self.written.add(layer_idx)
        chunk = self._chunk
        self._cache.write(
            layer_idx, chunk, chunk.pack(key_states.transpose(1, 2)), chunk.pack(value_states.transpose(1, 2))
        )
        if chunk.fresh:
            return key_states, value_states
        return self._cache.read(layer_idx, chunk)


class HFForward:
    """Any decoder-only Hugging Face model with full attention, through its own forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        accepted = inspect.signature(model.forward).parameters
        missing = {"position_ids", "past_key_values", "attention_mask"} - set(accepted)
        if missing:
            raise UnsupportedModelError(f"{type(model).__name__}.forward takes no {', '.join(sorted(missing))}")
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"{type(model).__name__} runs attention {model.config._attn_implementation!r}, which takes no ragged mask; "
                "load it with attn_implementation='sdpa'"
            )
        self._model = model
        self._layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._slices = "logits_to_keep" in accepted
        self._blocked = torch.finfo(model.dtype).min
        self._checked = getattr(model, "_distill_rollouts_checked", False)
        if not self._checked:
            try:
                self._self_check()
            except (RuntimeError, TypeError, IndexError, ValueError) as error:
                if isinstance(error, UnsupportedModelError):
                    raise
                raise UnsupportedModelError(
                    f"{type(model).__name__} does not run over the builtin engine's key-value cache ({error})"
                ) from error
            model._distill_rollouts_checked = True  # type: ignore[assignment]

    def __call__(self, chunk: Chunk, cache: KVCache, *, logits: bool) -> Tensor | None:
        adapter = _Adapter(cache, chunk, self._layers)
        only_last = {"logits_to_keep": 1} if self._slices and not logits else {}
        outputs = self._model(
            input_ids=chunk.pad(chunk.ids),
            attention_mask=chunk.mask(self._model.dtype, self._blocked),
            position_ids=chunk.pad(chunk.positions),
            past_key_values=adapter,
            use_cache=True,
            **only_last,
        )
        if len(adapter.written) != self._layers:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} wrote keys and values of {len(adapter.written)} of its {self._layers} "
                "layers: it keeps or shares state elsewhere"
            )
        return chunk.pack(outputs.logits) if logits else None

    def _self_check(self) -> None:
        """Two ragged rows, prefilled in two pieces, must give the logits of the plain forward."""
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        device = model_device(self._model)
        rows = [np.arange(7, 13) % vocabulary, np.arange(3, 7) % vocabulary]
        cache = KVCache(self._layers, 2, 8, block=8)
        parts: list[list[Tensor]] = [[], []]
        for piece in ([rows[0][:3], rows[1][:2]], [rows[0][3:], rows[1][2:]]):
            logits = self(cache.chunk(np.arange(2), piece, device), cache, logits=True)
            assert logits is not None
            cache.lengths += [len(new) for new in piece]
            for part, one in zip(parts, logits.split([len(new) for new in piece])):
                part.append(one.float())
        for part, ids in zip(parts, rows):
            whole = self._model(input_ids=torch.from_numpy(ids[None]).to(device), use_cache=False).logits[0].float()
            error, scale = (torch.cat(part) - whole).abs().max().item(), whole.abs().max().item()
            if not error <= max(1e-3, 64 * torch.finfo(self._model.dtype).eps) * max(scale, 1.0):
                raise UnsupportedModelError(
                    f"{type(self._model).__name__} gives other logits with a ragged key-value cache than without "
                    f"(difference {error:.3g}, logits up to {scale:.3g}); the builtin engine cannot run it"
                )
