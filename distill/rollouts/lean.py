"""A decode forward for Llama- and Qwen3-architecture models without the per-call cost of the Hugging Face modules.

Same weights, same mathematics, about a third of the operations: q, k and v (and gate and up) run as one matrix
product, query and key share one normalisation and one rotation, rotary tables are computed once, tokens are packed
so that linear layers see no padding, and keys and values go straight into the cache. Sub-modules that are not plain
`nn.Linear` (LoRA, quantised layers) are called as they are. The tests hold it to the Hugging Face forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from distill.rollouts.cache import Chunk, KVCache

_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
_JOIN_LIMIT = 64 * 2**20
"""Bytes per layer up to which weights are copied into one matrix: small layers are bound by calls, large ones by memory."""

Map = Callable[[Tensor], Tensor]


def is_lean(model: Any) -> bool:
    """Whether `LeanForward` reproduces this model.

    It must be exactly one of these classes, with rotary tables that never change, and nothing may hang on the modules
    whose calls are bypassed (ZeRO-3 and FSDP gather weights in such hooks; those run the Hugging Face forward).
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    if type(model) not in (LlamaForCausalLM, Qwen3ForCausalLM) or rope.get("rope_type") not in _STATIC_ROPE:
        return False
    inner = model.model
    bypassed = [inner, inner.norm]
    for layer in inner.layers:
        bypassed += [layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
    return not any(map(_hooked, bypassed))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _linear(module: nn.Module) -> Map:
    """The module as a function, past `nn.Module.__call__` where nothing can hang on it."""
    if type(module) is nn.Linear and not _hooked(module):
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module


def _joined(modules: list[nn.Module]) -> Map:
    """Several projections of one input as one map to the concatenation of their outputs."""
    plain = [module for module in modules if type(module) is nn.Linear and not _hooked(module)]
    size = sum(module.weight.numel() * module.weight.element_size() for module in plain)
    if len(plain) < len(modules) or size > _JOIN_LIMIT:
        maps = [_linear(module) for module in modules]
        return lambda x: torch.cat([apply(x) for apply in maps], dim=-1)
    weight = torch.cat([module.weight.detach() for module in plain])
    biases = [module.bias.detach() for module in plain if module.bias is not None]
    return partial(F.linear, weight=weight, bias=torch.cat(biases) if biases else None)


def _norm(module: Any) -> Map:
    weight: Tensor = module.weight
    return partial(F.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=module.variance_epsilon)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What every layer of one forward shares."""

    chunk: Chunk
    cache: KVCache
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None


class _Attention:
    """One self-attention block over packed tokens."""

    def __init__(self, module: Any, index: int) -> None:
        config = module.config
        self._index, self._size, self._scale = index, module.head_dim, module.scaling
        self._heads, self._shared = config.num_attention_heads, config.num_key_value_heads
        self._project = _joined([module.q_proj, module.k_proj, module.v_proj])
        self._output = _linear(module.o_proj)
        self._qk_norm: tuple[Tensor, float] | None = None
        if hasattr(module, "q_norm"):
            heads = [module.q_norm.weight.expand(self._heads, -1), module.k_norm.weight.expand(self._shared, -1)]
            self._qk_norm = torch.cat(heads).detach(), module.q_norm.variance_epsilon

    def __call__(self, hidden: Tensor, shared: _Pass) -> Tensor:
        chunk, cache, rotary = shared.chunk, shared.cache, shared.rotary
        qkv = self._project(hidden).view(len(hidden), -1, self._size)
        split = self._heads + self._shared
        turned, values = qkv[:, :split], qkv[:, split:]
        if self._qk_norm is not None:
            weight, eps = self._qk_norm
            turned = F.rms_norm(turned, (self._size,), None, eps) * weight
        # rotate_half(x) * sin, with the sign moved into the table: one roll instead of two slices, a negation and a cat.
        turned = torch.addcmul(turned * rotary[0], turned.roll(self._size // 2, -1), rotary[1])
        queries, keys = turned[:, : self._heads], turned[:, self._heads :]
        cache.write(self._index, chunk, keys, values)
        if chunk.fresh:
            mixed = self._within(chunk.pad(queries), chunk.pad(keys), chunk.pad(values))
        else:
            mixed = self._over(chunk.pad(queries), *cache.read(self._index, chunk), shared)
        return self._output(chunk.pack(mixed.flatten(2)))

    def _within(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal attention of rows without a past [rows, width, heads, size]; right padding is never looked at."""
        queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        grouped = self._heads != self._shared
        return F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=self._scale, enable_gqa=grouped
        ).transpose(1, 2)

    def _over(self, queries: Tensor, keys: Tensor, values: Tensor, shared: _Pass) -> Tensor:
        """Attention over the cache: the queries that share a key head are stacked, so keys are never repeated."""
        rows, width = queries.shape[:2]
        group = self._heads // self._shared
        stacked = queries.view(rows, width, self._shared, group, self._size).permute(0, 2, 3, 1, 4)
        stacked = stacked.reshape(rows, self._shared, group * width, self._size)
        mask = shared.mask
        assert mask is not None
        if width > 1 and group > 1:
            mask = mask.repeat(1, 1, group, 1)
        mixed = _attend(stacked, keys, values, mask, self._scale)
        mixed = mixed.view(rows, self._shared, group, width, self._size).permute(0, 3, 1, 2, 4)
        return mixed.reshape(rows, width, self._heads, self._size)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention [rows, heads, *, size] with an additive mask [rows, 1, *, extent].

    On the CPU, torch's fused kernel costs 1.3 (one thread) to 3 times (two threads) what two batched products do for
    the few queries of a decode step.
    """
    if queries.device.type != "cpu" or queries.dtype not in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    rows, heads, count, size = queries.shape
    scores = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    scores = torch.add(mask, scores.view(rows, heads, count, -1), alpha=scale).flatten(0, 1)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(rows, heads, count, size)


class _Block:
    def __init__(self, layer: Any, index: int) -> None:
        self._before, self._between = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._attention = _Attention(layer.self_attn, index)
        self._gate_up = _joined([layer.mlp.gate_proj, layer.mlp.up_proj])
        self._activation, self._down = layer.mlp.act_fn, _linear(layer.mlp.down_proj)

    def __call__(self, hidden: Tensor, shared: _Pass) -> Tensor:
        hidden = hidden + self._attention(self._before(hidden), shared)
        gate, up = self._gate_up(self._between(hidden)).chunk(2, dim=-1)
        return hidden + self._down(self._activation(gate) * up)


class LeanForward:
    """See the module's docstring; the interface is `distill.rollouts.forward.Forward`."""

    def __init__(self, model: Any) -> None:
        inner = model.model
        self._embed, self._rotary_module = inner.embed_tokens, inner.rotary_emb
        self._blocks = [_Block(layer, index) for index, layer in enumerate(inner.layers)]
        self._norm, self._head = _norm(inner.norm), _linear(model.lm_head)
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, chunk: Chunk, cache: KVCache, *, logits: bool) -> Tensor | None:
        hidden = self._embed(chunk.ids)
        cos, signed = self._rotary(hidden, cache.capacity)
        rotary = cos[chunk.positions].unsqueeze(1), signed[chunk.positions].unsqueeze(1)
        mask = None if chunk.fresh else chunk.mask(hidden.dtype, float("-inf"))
        shared = _Pass(chunk, cache, rotary, mask)
        for block in self._blocks:
            hidden = block(hidden, shared)
        return self._head(self._norm(hidden)) if logits else None

    def _rotary(self, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Tables [length, head_dim] of cosines and of sines with the sign of `rotate_half`."""
        if self._tables is None or len(self._tables[0]) < length:
            cos, sin = self._rotary_module(like, torch.arange(length, device=like.device).unsqueeze(0))
            half = sin.shape[-1] // 2
            self._tables = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        return self._tables
