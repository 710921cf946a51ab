"""Triton kernels that read one logits tensor: normaliser and entropy, q·A, top-k. Tiles as in `triton_kernels`.

Launched by `triton_tokens` and `triton_topk`. What `token_logprobs` needs on top of the sweeps, K values per token, is
gathered and scattered by torch: N·K elements, not N·V.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201, SIM102

import triton
import triton.language as tl

from .triton_kernels import FLOOR, LN2, exponent, lane_max, lane_sum, load_values, over_lanes, row_pointer, tile_offsets


@triton.jit
def lse_step(x, state, c, ENTROPY: tl.constexpr):
    """Folds one tile into the per-lane state (m, z, C)."""
    m, z, moment = state
    new_m = tl.maximum(m, lane_max(x))
    step = (m - new_m) * c
    keep = tl.exp2(step)
    a = exponent(x, over_lanes(new_m), c)
    e = tl.exp2(a)
    if ENTROPY:
        moment = keep * (moment + z * step) + lane_sum(e * a)
    return new_m, keep * z + lane_sum(e), moment


@triton.jit
def lse_kernel(
    X,  # [B, T, V] logits
    VALID,  # [N] bool; not read unless HAS_VALID
    SAVED,  # [N, 2] fp32, zeroed: (m, log2 z)
    STATS,  # [2, N] fp32, zeroed: entropy, largest probability; not written unless WITH_STATS
    count,
    steps,
    stride_b,
    stride_t,
    V,
    c,
    scale,
    cap,
    WITH_STATS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CAPPED: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0)
    if HAS_VALID:
        if tl.load(VALID + row) == 0:
            return
    X = row_pointer(X, row, steps, stride_b, stride_t)
    BLOCK: tl.constexpr = U * L * VEC
    lanes = tile_offsets(U, L, VEC)
    state = (tl.full([L], FLOOR, tl.float32), tl.zeros([L], tl.float32), tl.zeros([L], tl.float32))
    full = (V // BLOCK) * BLOCK
    for start in range(0, full, BLOCK):
        state = lse_step(load_values(X, start + lanes, V, scale, cap, CAPPED, False), state, c, WITH_STATS)
    if full < V:
        state = lse_step(load_values(X, full + lanes, V, scale, cap, CAPPED, True), state, c, WITH_STATS)
    lane_m, lane_z, moment = state
    m = tl.max(lane_m, axis=0)
    step = (lane_m - m) * c
    keep = tl.exp2(step)
    z = tl.sum(keep * lane_z, axis=0)
    log_z = tl.log2(z)
    tl.store(SAVED + row.to(tl.int64) * 2, m)
    tl.store(SAVED + row.to(tl.int64) * 2 + 1, log_z)
    if WITH_STATS:
        moment = tl.sum(keep * (moment + lane_z * step), axis=0)
        tl.store(STATS + row, (log_z - moment / z) * LN2)
        tl.store(STATS + count + row, 1.0 / z)


@triton.jit
def write_dense(
    X, OUT, offsets, V, m, log_z, factor, c, scale, cap, CAPPED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """One tile of q·factor."""
    x = load_values(X, offsets, V, scale, cap, CAPPED, MASKED)
    grad = factor * tl.exp2(exponent(x, m, c) - log_z)
    if CAPPED:
        grad *= 1.0 - (x / cap) * (x / cap)
    grad = grad.to(OUT.dtype.element_ty)
    if MASKED:
        tl.store(OUT + offsets, grad, mask=offsets < V)
    else:
        tl.store(OUT + offsets, grad)


@triton.jit
def dense_backward_kernel(
    X,  # [B, T, V] logits
    OUT,  # [B, T, V] gradient
    DENSE,  # [N] fp32: A
    VALID,  # [N] bool; not read unless HAS_VALID
    SAVED,  # [N, 2] fp32
    steps,
    stride_b,
    stride_t,
    o_stride_b,
    o_stride_t,
    V,
    segments,  # programs per row
    span,  # elements per program
    c,
    scale,
    cap,
    slope,
    HAS_VALID: tl.constexpr,
    CAPPED: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0) // segments
    low = (tl.program_id(0) % segments) * span
    high = tl.minimum(low + span, V)
    X = row_pointer(X, row, steps, stride_b, stride_t)
    OUT = row_pointer(OUT, row, steps, o_stride_b, o_stride_t)
    BLOCK: tl.constexpr = U * L * VEC
    lanes = tile_offsets(U, L, VEC)
    if HAS_VALID:
        if tl.load(VALID + row) == 0:
            nothing = (lanes * 0).to(OUT.dtype.element_ty)
            for start in range(low, high, BLOCK):
                tl.store(OUT + start + lanes, nothing, mask=start + lanes < V)
            return
    m, log_z = tl.load(SAVED + row.to(tl.int64) * 2), tl.load(SAVED + row.to(tl.int64) * 2 + 1)
    factor = tl.load(DENSE + row) * slope
    full = low + ((high - low) // BLOCK) * BLOCK
    for start in range(low, full, BLOCK):
        write_dense(X, OUT, start + lanes, V, m, log_z, factor, c, scale, cap, CAPPED, False)
    if full < high:
        write_dense(X, OUT, full + lanes, V, m, log_z, factor, c, scale, cap, CAPPED, True)


@triton.jit
def topk_kernel(
    X,  # [B, T, V] logits
    VALID,  # [N] bool; not read unless HAS_VALID
    VALUES,  # [N, k] fp32, filled with −inf
    IDS,  # [N, k] int64, filled with −1
    steps,
    stride_b,
    stride_t,
    V,
    k,
    HAS_VALID: tl.constexpr,
    K: tl.constexpr,  # power of two ≥ k
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_VALID:
        if tl.load(VALID + row) == 0:
            return
    X = X + (row // steps) * stride_b + (row % steps) * stride_t
    slots = tl.arange(0, K)
    best = tl.where(slots < k, float("-inf"), float("inf"))  # slots past k are never the worst
    where = tl.full([K], -1, tl.int64)
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        x = tl.load(X + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        worst, largest = tl.min(best, axis=0), tl.max(x, axis=0)
        while largest > worst:  # the first of equals stays: ids come in ascending order
            position = tl.argmax(x, axis=0)
            slot = tl.argmin(best, axis=0)
            best = tl.where(slots == slot, largest, best)
            where = tl.where(slots == slot, start + position, where)
            x = tl.where(columns == position, float("-inf"), x)
            worst, largest = tl.min(best, axis=0), tl.max(x, axis=0)
    tl.store(VALUES + row * k + slots, best, mask=slots < k)
    tl.store(IDS + row * k + slots, where, mask=slots < k)
