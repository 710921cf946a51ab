"""The Triton kernels. Launching, shapes and strides: `triton_path.py`.

One program walks one row (forward) or one segment of a row (backward) in tiles of U·L·VEC elements: L = 32·warps lanes of VEC
neighbouring elements, loaded 16 bytes at a time, U tiles in flight. Every lane keeps its own running maximum and sums, so
the loop over the vocabulary has no barrier and no shuffle; lanes meet once, after it. Full tiles are loaded without a
mask (a mask would split the loads where V is not a multiple of 16), the remainder with one.

Arithmetic is fp32 in units of log2. With x the logit after softcap, m a maximum and c = scale·log2(e)/T,
    a = (x − m)·c,   e = exp2(a),   z = Σ e,   A = Σ e_t·(a_t − a_s),   B = Σ e_s·(a_t − a_s),   C = Σ e·a
and at the end KL(p‖q) = A/z_t − log2(z_t/z_s), H = log2 z − C/z. Subtracting m before scaling keeps logits of ±1e4 exact.
Exponents are clamped to ≥ −1e30, so that an excluded id (−inf) gives e = 0 and 0·a = 0, not NaN; NaN itself passes.
Bytes per element of both logits in bf16: forward 4 (the KLs) or 8 (the others), backward 6.

Rows of the outputs: SAVED `[N, 5]` = (m_s, log2 z_s, m_t, log2 z_t, G); STATS `[S, N]` in the order of `kinds.BASE_STATS`.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201, SIM102

import triton
import triton.language as tl

from .triton_terms import gradient_term, loss_and_sum

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)
# The compiler hands neighbouring threads the second-fastest axis of a tile, and older versions break the tie between the
# other two axes the other way. Lanes must get the threads: `python -m distill.kernels.aot` fails where this is wrong.
LANES_FIRST = tl.constexpr(tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 7))
INFINITE = tl.constexpr(1e20)  # a mean log-ratio beyond this has met an id that the other side excludes


@triton.jit
def load_values(ptr, offsets, limit, scale, cap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """fp32 values at `offsets`: raw logits, or cap·tanh(scale·x/cap) under a softcap; −inf beyond `limit`."""
    if MASKED:
        x = tl.load(ptr + offsets, mask=offsets < limit, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(ptr + offsets).to(tl.float32)
    if SOFTCAP:
        y = x * (scale / cap)
        small = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
        y = cap * tl.where(y < 0, small - 1.0, 1.0 - small) / (1.0 + small)
        x = tl.where(offsets < limit, y, float("-inf")) if MASKED else y
    return x


@triton.jit
def exponent(x, m, c):
    """(x − m)·c, at least FLOOR; NaN stays NaN."""
    return tl.maximum((x - m) * c, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lane_max(x):
    """Largest value of every lane, `[L]`, of a tile."""
    return tl.max(tl.max(x, axis=2), axis=1 if LANES_FIRST else 0)


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=1 if LANES_FIRST else 0)


@triton.jit
def over_lanes(x):
    """`[L]` values as they broadcast against a tile."""
    if LANES_FIRST:
        return x[:, None, None]
    else:
        return x[None, :, None]


@triton.jit
def tile_offsets(U: tl.constexpr, L: tl.constexpr, VEC: tl.constexpr):
    """Where a tile's elements lie: tile number · L·VEC + lane · VEC + position."""
    u, lane, position = tl.arange(0, U), tl.arange(0, L), tl.arange(0, VEC)
    if LANES_FIRST:
        return u[None, :, None] * (L * VEC) + lane[:, None, None] * VEC + position[None, None, :]
    else:
        return u[:, None, None] * (L * VEC) + lane[None, :, None] * VEC + position[None, None, :]


@triton.jit
def row_pointer(ptr, row, steps, stride_b, stride_t):
    """Start of flat row `row` of `[B, T, V]`; 64-bit, since N·V may exceed 2³¹."""
    wide = row.to(tl.int64)
    return ptr + (wide // steps) * stride_b + (wide % steps) * stride_t


@triton.jit
def online_step(s, t, state, c_s, c_t, BOTH: tl.constexpr, ENTROPY: tl.constexpr):
    """Folds one tile into the per-lane state (m_s, z_s, m_t, z_t, A, B, C_s, C_t, joint maximum)."""
    ms, zs, mt, zt, sum_a, sum_b, cs, ct, joint = state
    new_ms, new_mt = tl.maximum(ms, lane_max(s)), tl.maximum(mt, lane_max(t))
    step_s, step_t = (ms - new_ms) * c_s, (mt - new_mt) * c_t
    keep_s, keep_t = tl.exp2(step_s), tl.exp2(step_t)
    a_s, a_t = exponent(s, over_lanes(new_ms), c_s), exponent(t, over_lanes(new_mt), c_t)
    e_s, e_t = tl.exp2(a_s), tl.exp2(a_t)
    if BOTH or ENTROPY:
        gap = a_t - a_s
        sum_a = keep_t * (sum_a + zt * (step_t - step_s)) + lane_sum(e_t * gap)
        sum_b = keep_s * (sum_b + zs * (step_t - step_s)) + lane_sum(e_s * gap)
    if ENTROPY:
        cs = keep_s * (cs + zs * step_s) + lane_sum(e_s * a_s)
        ct = keep_t * (ct + zt * step_t) + lane_sum(e_t * a_t)
        joint = tl.maximum(joint, lane_max(s + t))
    zs = keep_s * zs + lane_sum(e_s)
    zt = keep_t * zt + lane_sum(e_t)
    return new_ms, zs, new_mt, zt, sum_a, sum_b, cs, ct, joint


@triton.jit
def merge_lanes(state, c_s, c_t):
    """The state of the whole row, scalars, from the lanes'."""
    lane_ms, lane_zs, lane_mt, lane_zt, sum_a, sum_b, cs, ct, joint = state
    ms, mt = tl.max(lane_ms, axis=0), tl.max(lane_mt, axis=0)
    step_s, step_t = (lane_ms - ms) * c_s, (lane_mt - mt) * c_t
    keep_s, keep_t = tl.exp2(step_s), tl.exp2(step_t)
    zs, zt = tl.sum(keep_s * lane_zs, axis=0), tl.sum(keep_t * lane_zt, axis=0)
    sum_a = tl.sum(keep_t * (sum_a + lane_zt * (step_t - step_s)), axis=0)
    sum_b = tl.sum(keep_s * (sum_b + lane_zs * (step_t - step_s)), axis=0)
    cs = tl.sum(keep_s * (cs + lane_zs * step_s), axis=0)
    ct = tl.sum(keep_t * (ct + lane_zt * step_t), axis=0)
    return ms, zs, mt, zt, sum_a, sum_b, cs, ct, tl.max(joint, axis=0)


@triton.jit
def nonnegative_nats(x):
    """log2 units to nats; rounding below 0 becomes 0, an excluded id +inf; NaN stays."""
    x = tl.where(x > INFINITE, float("inf"), x * LN2)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sweep_terms(
    S, T, V, ms, log_zs, mt, log_zt, c_s, c_t, s_scale, s_cap, t_scale, t_cap, mix,
    KIND: tl.constexpr, S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr, U: tl.constexpr, L: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """(Σ f_k, Σ g_k) of one row with known normalisers; last tile first: what was read last is still in the L2 cache."""
    BLOCK: tl.constexpr = U * L * VEC
    lanes = tile_offsets(U, L, VEC)
    lane_loss, lane_total = tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    full = (V // BLOCK) * BLOCK
    if full < V:
        s = load_values(S, full + lanes, V, s_scale, s_cap, S_CAPPED, True)
        t = load_values(T, full + lanes, V, t_scale, t_cap, T_CAPPED, True)
        f, g = loss_and_sum(KIND, mix, exponent(s, ms, c_s) - log_zs, exponent(t, mt, c_t) - log_zt)
        lane_loss, lane_total = lane_sum(f), lane_sum(g)
    for back in range(0, full, BLOCK):
        start = full - BLOCK - back
        s = load_values(S, start + lanes, V, s_scale, s_cap, S_CAPPED, False)
        t = load_values(T, start + lanes, V, t_scale, t_cap, T_CAPPED, False)
        f, g = loss_and_sum(KIND, mix, exponent(s, ms, c_s) - log_zs, exponent(t, mt, c_t) - log_zt)
        lane_loss += lane_sum(f)
        lane_total += lane_sum(g)
    return tl.sum(lane_loss, axis=0), tl.sum(lane_total, axis=0)


@triton.jit
def forward_kernel(
    S,  # [B, T, V_s] student logits
    T,  # [B, T, V_t] teacher logits
    VALID,  # [N] bool; not read unless HAS_VALID
    LOSS,  # [N] fp32, zeroed
    SAVED,  # [N, 5] fp32, zeroed
    STATS,  # [8, N] fp32, zeroed; not written unless WITH_STATS
    count,  # N
    steps,  # T of [B, T, V]
    s_stride_b,
    s_stride_t,
    t_stride_b,
    t_stride_t,
    V,  # shared vocabulary
    c_s,  # factor from values to log2 units, student and teacher
    c_t,
    s_scale,
    s_cap,
    t_scale,
    t_cap,
    mix,
    KIND: tl.constexpr,
    WITH_STATS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0)
    if HAS_VALID:
        if tl.load(VALID + row) == 0:
            return
    S = row_pointer(S, row, steps, s_stride_b, s_stride_t)
    T = row_pointer(T, row, steps, t_stride_b, t_stride_t)
    BLOCK: tl.constexpr = U * L * VEC
    IS_KL: tl.constexpr = KIND == "forward_kl" or KIND == "reverse_kl"
    lanes = tile_offsets(U, L, VEC)
    low = tl.full([L], FLOOR, tl.float32)
    zero = tl.zeros([L], tl.float32)
    state = (low, zero, low, zero, zero, zero, zero, zero, low)
    full = (V // BLOCK) * BLOCK
    for start in range(0, full, BLOCK):
        s = load_values(S, start + lanes, V, s_scale, s_cap, S_CAPPED, False)
        t = load_values(T, start + lanes, V, t_scale, t_cap, T_CAPPED, False)
        state = online_step(s, t, state, c_s, c_t, IS_KL, WITH_STATS)
    if full < V:
        s = load_values(S, full + lanes, V, s_scale, s_cap, S_CAPPED, True)
        t = load_values(T, full + lanes, V, t_scale, t_cap, T_CAPPED, True)
        state = online_step(s, t, state, c_s, c_t, IS_KL, WITH_STATS)
    ms, zs, mt, zt, sum_a, sum_b, cs, ct, joint = merge_lanes(state, c_s, c_t)
    log_zs, log_zt = tl.log2(zs), tl.log2(zt)
    log_ratio = tl.log2(zt / zs)
    forward_kl = nonnegative_nats(sum_a / zt - log_ratio)
    reverse_kl = nonnegative_nats(log_ratio - sum_b / zs)
    if IS_KL:
        loss = forward_kl if KIND == "forward_kl" else reverse_kl
        total = 0.0 if KIND == "forward_kl" else reverse_kl
    else:
        loss, total = sweep_terms(
            S, T, V, ms, log_zs, mt, log_zt, c_s, c_t, s_scale, s_cap, t_scale, t_cap, mix, KIND, S_CAPPED, T_CAPPED,
            U, L, VEC,
        )  # fmt: skip
        loss = tl.maximum(loss, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(LOSS + row, loss)
    tl.store(SAVED + row.to(tl.int64) * 5 + 0, ms)
    tl.store(SAVED + row.to(tl.int64) * 5 + 1, log_zs)
    tl.store(SAVED + row.to(tl.int64) * 5 + 2, mt)
    tl.store(SAVED + row.to(tl.int64) * 5 + 3, log_zt)
    tl.store(SAVED + row.to(tl.int64) * 5 + 4, total)
    if WITH_STATS:
        student_entropy, teacher_entropy = (log_zs - cs / zs) * LN2, (log_zt - ct / zt) * LN2
        tl.store(STATS + 0 * count + row, forward_kl)
        tl.store(STATS + 1 * count + row, reverse_kl)
        tl.store(STATS + 2 * count + row, student_entropy)
        tl.store(STATS + 3 * count + row, teacher_entropy)
        tl.store(STATS + 4 * count + row, forward_kl + teacher_entropy)
        tl.store(STATS + 5 * count + row, 1.0 / zs)
        tl.store(STATS + 6 * count + row, 1.0 / zt)
        # s + t reaches m_s + m_t only at an id that is first on both sides
        tl.store(STATS + 7 * count + row, (joint == ms + mt).to(tl.float32))


@triton.jit
def terms_kernel(
    S,  # [B, T, V_s] student logits
    T,  # [B, T, V_t] teacher logits
    VALID,  # [N] bool; not read unless HAS_VALID
    SAVED,  # [N, 5] fp32; the last column is not read
    OUT,  # [2, N] fp32, zeroed: Σ f, Σ g
    count,
    steps,
    s_stride_b,
    s_stride_t,
    t_stride_b,
    t_stride_t,
    V,
    c_s,
    c_t,
    s_scale,
    s_cap,
    t_scale,
    t_cap,
    mix,
    KIND: tl.constexpr,
    HAS_VALID: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    VEC: tl.constexpr,
):
    """The second sweep alone, for shards of a vocabulary whose normalisers come from elsewhere."""
    row = tl.program_id(0)
    if HAS_VALID:
        if tl.load(VALID + row) == 0:
            return
    S = row_pointer(S, row, steps, s_stride_b, s_stride_t)
    T = row_pointer(T, row, steps, t_stride_b, t_stride_t)
    base = SAVED + row.to(tl.int64) * 5
    ms, log_zs, mt, log_zt = tl.load(base), tl.load(base + 1), tl.load(base + 2), tl.load(base + 3)
    loss, total = sweep_terms(
        S, T, V, ms, log_zs, mt, log_zt, c_s, c_t, s_scale, s_cap, t_scale, t_cap, mix, KIND, S_CAPPED, T_CAPPED,
        U, L, VEC,
    )  # fmt: skip
    tl.store(OUT + row, loss)
    tl.store(OUT + count + row, total)


@triton.jit
def write_gradient(
    S, T, OUT, offsets, V, ms, log_zs, mt, log_zt, total, factor, c_s, c_t, s_scale, s_cap, t_scale, t_cap, mix,
    KIND: tl.constexpr, S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient. `factor` = upstream·scale/T."""
    s = load_values(S, offsets, V, s_scale, s_cap, S_CAPPED, MASKED)
    t = load_values(T, offsets, V, t_scale, t_cap, T_CAPPED, MASKED)
    a_s, a_t = exponent(s, ms, c_s) - log_zs, exponent(t, mt, c_t) - log_zt
    grad = factor * gradient_term(KIND, mix, a_s, a_t, total)
    if S_CAPPED:
        grad *= 1.0 - (s / s_cap) * (s / s_cap)
    grad = grad.to(OUT.dtype.element_ty)
    if MASKED:
        tl.store(OUT + offsets, grad, mask=offsets < V)
    else:
        tl.store(OUT + offsets, grad)


@triton.jit
def backward_kernel(
    S,  # [B, T, V_s] student logits
    T,  # [B, T, V_t] teacher logits
    OUT,  # [B, T, V_s] gradient; may be S
    GRAD,  # [N] fp32 upstream gradient
    VALID,  # [N] bool; not read unless HAS_VALID
    SAVED,  # [N, 5] fp32
    steps,
    s_stride_b,
    s_stride_t,
    t_stride_b,
    t_stride_t,
    o_stride_b,
    o_stride_t,
    V,
    segments,  # programs per row
    span,  # elements per program, a multiple of the tile
    c_s,
    c_t,
    s_scale,
    s_cap,
    t_scale,
    t_cap,
    slope,  # scale/T: d(value)/d(logit) apart from the softcap
    mix,
    KIND: tl.constexpr,
    HAS_VALID: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0) // segments
    low = (tl.program_id(0) % segments) * span
    high = tl.minimum(low + span, V)
    S = row_pointer(S, row, steps, s_stride_b, s_stride_t)
    T = row_pointer(T, row, steps, t_stride_b, t_stride_t)
    OUT = row_pointer(OUT, row, steps, o_stride_b, o_stride_t)
    BLOCK: tl.constexpr = U * L * VEC
    lanes = tile_offsets(U, L, VEC)
    if HAS_VALID:
        if tl.load(VALID + row) == 0:
            nothing = (lanes * 0).to(OUT.dtype.element_ty)
            for start in range(low, high, BLOCK):
                tl.store(OUT + start + lanes, nothing, mask=start + lanes < V)
            return
    base = SAVED + row.to(tl.int64) * 5
    ms, log_zs, mt, log_zt, total = (
        tl.load(base),
        tl.load(base + 1),
        tl.load(base + 2),
        tl.load(base + 3),
        tl.load(base + 4),
    )
    factor = tl.load(GRAD + row) * slope
    full = low + ((high - low) // BLOCK) * BLOCK
    for start in range(low, full, BLOCK):
        write_gradient(
            S, T, OUT, start + lanes, V, ms, log_zs, mt, log_zt, total, factor, c_s, c_t, s_scale, s_cap, t_scale,
            t_cap, mix, KIND, S_CAPPED, T_CAPPED, False,
        )  # fmt: skip
    if full < high:
        write_gradient(
            S, T, OUT, full + lanes, V, ms, log_zs, mt, log_zt, total, factor, c_s, c_t, s_scale, s_cap, t_scale,
            t_cap, mix, KIND, S_CAPPED, T_CAPPED, True,
        )  # fmt: skip
