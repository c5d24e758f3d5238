"""Phase 1 of a two-phase read: many queries against the same sources, tiles of rows at a time.

Logits come from matrix products (three tf32 passes, as exact as float32), so that a source is read once for all
queries; mixtures from a second pass. Backward likewise: scores, then gradients of the sources, then of the weights.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton adds tuples; it does not unpack into them)
import triton
import triton.language as tl


@triton.jit
def tile(pointer, stride, rows, cols, N, D: tl.constexpr):
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    return tl.load(pointer + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def batch_logits(
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    weights, bias, logits, scales, lse, N, eps,
    S: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """weights [Q, D] float32, bias [Q, S] or None.

    Writes logits [S, Q, N] without the bias, scales [S, N] (reciprocal root mean squares) and lse [Q, N].
    """
    sources = (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    strides = (t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15)
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    queries = tl.arange(0, QP)
    kept = (rows < N)[:, None] & (queries < Q)[None, :]
    top = tl.full([R, QP], float("-inf"), tl.float32)
    mass = tl.zeros([R, QP], tl.float32)
    for i in tl.static_range(S):
        product = tl.zeros([R, QP], tl.float32)
        squares = tl.zeros([R], tl.float32)
        for start in range(0, D, B):
            cols = start + tl.arange(0, B)
            value = tile(sources[i], strides[i], rows, cols, N, D)
            weight = tile(weights, D, queries, cols, Q, D)
            product = tl.dot(value, tl.trans(weight), product, input_precision="tf32x3")
            squares += tl.sum(value * value, 1)
        scale = tl.rsqrt(squares / D + eps)
        logit = product * scale[:, None]
        tl.store(scales + tl.full([], i, tl.int64) * N + rows, scale, mask=rows < N)
        tl.store(logits + (tl.full([], i * Q, tl.int64) + queries[None, :]) * N + rows[:, None], logit, mask=kept)
        if bias is not None:
            logit += tl.load(bias + queries * S + i, mask=queries < Q, other=0.0).to(tl.float32)[None, :]
        new_top = tl.maximum(top, logit)
        held, taken = tl.exp(top - new_top), tl.exp(logit - new_top)
        if bias is not None:  # one that is minus infinity takes a source out, the first as well
            held, taken = tl.where(top == new_top, 1.0, held), tl.where(logit == float("-inf"), 0.0, taken)
        mass = mass * held + taken
        top = new_top
    tl.store(lse + queries[None, :].to(tl.int64) * N + rows[:, None], top + tl.log(mass), mask=kept)


@triton.jit
def batch_mix(
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    logits, lse, bias, scales, mixed, N,
    S: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """mixed [Q, N, D]: a tile of every source is held while all queries mix it; with scales, of normalised values."""
    sources = (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    strides = (t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15)
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    cols = tl.program_id(1) * B + tl.arange(0, B)
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    values = ()
    for i in tl.static_range(S):
        values = values + (tile(sources[i], strides[i], rows, cols, N, D),)
    for q in range(Q):
        at = tl.full([], 0, tl.int64) + q
        level = tl.load(lse + at * N + rows, mask=rows < N, other=0.0)
        out = tl.zeros([R, B], tl.float32)
        for i in tl.static_range(S):
            logit = tl.load(logits + (i * Q + at) * N + rows, mask=rows < N, other=0.0)
            if bias is not None:
                logit += tl.load(bias + q * S + i).to(tl.float32)
            share = tl.exp(logit - level)
            if scales is not None:
                share *= tl.load(scales + tl.full([], i, tl.int64) * N + rows, mask=rows < N, other=0.0)
            out += share[:, None] * values[i]
        place = mixed + (at * N + rows)[:, None] * D + cols[None, :]
        tl.store(place, out.to(mixed.dtype.element_ty), mask=inside)


@triton.jit
def batch_scores(
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15,
    scores, N,
    S: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, D: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """scores [S, Q, N]: product of each query's gradient [N, D] with each source, row by row."""
    sources = (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    strides = (t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15)
    grads = (g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15)
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    many = tl.arange(0, P)
    product = tl.zeros([R, P, P], tl.float32)
    for start in range(0, D, B):
        cols = start + tl.arange(0, B)
        left = tl.zeros([R, P, B], tl.float32)
        for q in tl.static_range(Q):
            one = tile(grads[q], D, rows, cols, N, D)
            left = tl.where((many == q)[None, :, None], one[:, None, :], left)
        right = tl.zeros([R, B, P], tl.float32)
        for i in tl.static_range(S):
            one = tile(sources[i], strides[i], rows, cols, N, D)
            right = tl.where((many == i)[None, None, :], one[:, :, None], right)
        product = tl.dot(left, right, product, input_precision="tf32x3")
    place = (many[None, None, :] * Q + many[None, :, None]).to(tl.int64) * N + rows[:, None, None]
    kept = (rows < N)[:, None, None] & (many < Q)[None, :, None] & (many < S)[None, None, :]
    tl.store(scores + place, product, mask=kept)


@triton.jit
def batch_spread(
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15,
    d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11, d12, d13, d14, d15,
    weights, shares, weight_factors, value_factors, N,
    S: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """d_i = sum_q shares[i, q] g_q + sum_q weight_factors[i, q] weights[q] - value_factors[i] s_i.

    shares and weight_factors [S, Q, N], value_factors [S, N]; d_i is the gradient of source i.
    """
    sources = (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    strides = (t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15)
    grads = (g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15)
    outs = (d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11, d12, d13, d14, d15)
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    cols = tl.program_id(1) * B + tl.arange(0, B)
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    for i in tl.static_range(S):
        value_factor = tl.load(value_factors + tl.full([], i, tl.int64) * N + rows, mask=rows < N, other=0.0)
        total = -value_factor[:, None] * tile(sources[i], strides[i], rows, cols, N, D)
        for q in tl.static_range(Q):
            place = tl.full([], i * Q + q, tl.int64) * N + rows
            share = tl.load(shares + place, mask=rows < N, other=0.0)
            weight_factor = tl.load(weight_factors + place, mask=rows < N, other=0.0)
            weight = tl.load(weights + q * D + cols, mask=cols < D, other=0.0)
            total += share[:, None] * tile(grads[q], D, rows, cols, N, D) + weight_factor[:, None] * weight[None, :]
        out = outs[i] + rows[:, None] * D + cols[None, :]
        tl.store(out, total.to(outs[i].dtype.element_ty), mask=inside)


@triton.jit
def batch_weights(
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    weight_factors, partial, N,
    S: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """partial [programs, Q, D]: sums over a program's tiles of rows of weight_factors[i, q] s_i."""
    sources = (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    strides = (t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15)
    cols = tl.program_id(0) * B + tl.arange(0, B)
    queries = tl.arange(0, QP)
    total = tl.zeros([QP, B], tl.float32)
    for start in range(tl.program_id(1) * R, N, tl.num_programs(1) * R):
        rows = tl.full([], 0, tl.int64) + start + tl.arange(0, R)
        kept = (queries < Q)[:, None] & (rows < N)[None, :]
        for i in tl.static_range(S):
            place = (tl.full([], i * Q, tl.int64) + queries[:, None]) * N + rows[None, :]
            weight_factor = tl.load(weight_factors + place, mask=kept, other=0.0)
            total = tl.dot(
                weight_factor, tile(sources[i], strides[i], rows, cols, N, D), total, input_precision="tf32x3"
            )
    out = partial + (tl.program_id(1).to(tl.int64) * Q + queries[:, None]) * D + cols[None, :]
    tl.store(out, total, mask=(queries < Q)[:, None] & (cols < D)[None, :])
