"""Depth attention over a list of sources, one program a row at a time: forward and backward.

Sources are named pointers (a list of tensors cannot be passed), gathered into a tuple that a static loop indexes.
A `carry` is a mixture over other sources, already normalised, with its log-sum-exp: it stands for them as one more
source whose logit is known. With it a read of any number of sources is a chain of groups, and the second phase of a
two-phase read is a group of one.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from attnres_fx.ops.kernels.rows import (
    centred,
    combined,
    dot,
    load_row,
    no_row,
    plus,
    rounded,
    scaled,
    store_row,
    times,
    total,
)


@triton.jit
def read_forward(
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    delta, delta_stride, carry, carry_lse, query, key_weight, bias, norm_weight, norm_bias,
    out, partial, lse, stats, norm_stats,
    N, eps, gain, norm_eps,
    S: tl.constexpr, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
    VALUE_NORM: tl.constexpr,
):  # fmt: skip
    """Rows `pid, pid + programs, …` of the read.

    s*: the sources, rows t* elements apart. delta: added to the last source, the sum written to `partial`.
    carry [N, D], carry_lse [N]. bias [S]: added to the logits. VALUE_NORM: values are mixed with keys' root mean
    square. out [N, D]: gain * mixture, normed. lse [N], stats [2, S, N] (logits without bias, then reciprocal root
    mean squares) and norm_stats [2, N] (mean, reciprocal scale) are what backward needs; each may be None.
    """
    sources = (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    strides = (t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15)
    weight = times(load_row(query, 0, D, K, C, ""), load_row(key_weight, 0, D, K, C, ""), K)
    for at in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + at
        if carry is not None:
            mixed = load_row(carry, row * D, D, K, C, "evict_first")
            top = tl.load(carry_lse + row)
            mass = tl.full([], 1.0, tl.float32)
        else:
            mixed = no_row(K, C)
            top = tl.full([], float("-inf"), tl.float32)
            mass = tl.full([], 0.0, tl.float32)
        for i in tl.static_range(S):
            value = load_row(sources[i], row * (D if PACKED else strides[i]), D, K, C, "evict_first")
            if i == S - 1 and delta is not None:
                value = rounded(plus(value, load_row(delta, row * delta_stride, D, K, C, "evict_first"), K), partial, K)
                store_row(partial, row * D, value, D, K, C)
            scale = tl.rsqrt(dot(value, value, K) / D + eps)
            logit = dot(value, weight, K) * scale
            if stats is not None:
                tl.store(stats + tl.full([], i, tl.int64) * N + row, logit)
                tl.store(stats + tl.full([], S + i, tl.int64) * N + row, scale)
            if bias is not None:
                logit += tl.load(bias + i).to(tl.float32)
            new_top = tl.maximum(top, logit)
            kept, taken = tl.exp(top - new_top), tl.exp(logit - new_top)
            if bias is not None:  # one that is minus infinity takes a source out, the first as well
                kept, taken = tl.where(top == new_top, 1.0, kept), tl.where(logit == float("-inf"), 0.0, taken)
            mixed = combined(kept, mixed, taken * scale if VALUE_NORM else taken, value, K)
            mass = mass * kept + taken
            top = new_top
        mixed = scaled(mixed, gain / mass, K)
        if lse is not None:
            tl.store(lse + row, top + tl.log(mass))
        if NORM != 0:
            mean = tl.full([], 0.0, tl.float32)
            if NORM == 2:
                mean = total(mixed, K) / D
                mixed = centred(mixed, mean, D, K, C)
            norm_scale = tl.rsqrt(dot(mixed, mixed, K) / D + norm_eps)
            if norm_stats is not None:
                tl.store(norm_stats + row, mean)
                tl.store(norm_stats + N + row, norm_scale)
            mixed = scaled(mixed, norm_scale, K)
            if norm_weight is not None:
                mixed = times(mixed, load_row(norm_weight, 0, D, K, C, "evict_last"), K)
            if norm_bias is not None:
                mixed = plus(mixed, load_row(norm_bias, 0, D, K, C, "evict_last"), K)
        store_row(out, row * D, mixed, D, K, C)


@triton.jit
def read_backward(
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15,
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
    carry, carry_lse, query, key_weight, bias, norm_weight,
    grad_out, grad_out_stride, grad_lse, lse, stats, norm_stats,
    grad_carry, grad_carry_lse, grad_logits, weight_rows, norm_weight_rows, norm_bias_rows,
    N, gain,
    S: tl.constexpr, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
    VALUE_NORM: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows `pid, pid + programs, …`.

    g*: where the sources' gradients go [N, D]. a*: gradients of the sources from their other users [N, D], added, or
    None. grad_out [N, D], grad_lse [N]: gradients of what forward wrote. grad_carry [N, D], grad_carry_lse [N].
    grad_logits [S, N]: what the bias gets from each row, or None.
    Sources are read twice in a row; the second time they come from L2. weight_rows, norm_*_rows [programs, D]: sums
    over a program's rows, float32; `sum_rows` adds them up.
    """
    sources = (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    strides = (t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15)
    grad_sources = (g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15)
    other_grads = (a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
    grad_weight = no_row(K, C)
    place = tl.program_id(0).to(tl.int64) * D
    for at in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + at
        level = tl.load(lse + row)
        grad_mixed = load_row(grad_out, row * grad_out_stride, D, K, C, "evict_first")
        if carry is not None:
            share = tl.exp(tl.load(carry_lse + row) - level)
            mixed = scaled(load_row(carry, row * D, D, K, C, "evict_last"), share, K)
        else:
            mixed = no_row(K, C)
        for i in tl.static_range(S):
            logit = tl.load(stats + tl.full([], i, tl.int64) * N + row)
            if bias is not None:
                logit += tl.load(bias + i).to(tl.float32)
            share = tl.exp(logit - level)
            if VALUE_NORM:
                share *= tl.load(stats + tl.full([], S + i, tl.int64) * N + row)
            value = load_row(sources[i], row * (D if PACKED else strides[i]), D, K, C, "evict_last")
            mixed = combined(1.0, mixed, share, value, K)
        if NORM != 0:
            norm_scale = tl.load(norm_stats + N + row)
            normed = scaled(mixed, gain, K)
            if NORM == 2:
                normed = centred(normed, tl.load(norm_stats + row), D, K, C)
            normed = scaled(normed, norm_scale, K)
            # Summed in memory, where it stays in L2: registers have no room for more rows.
            if norm_bias_rows is not None:
                store_row(
                    norm_bias_rows,
                    place,
                    plus(load_row(norm_bias_rows, place, D, K, C, "evict_last"), grad_mixed, K),
                    D,
                    K,
                    C,
                )
            if norm_weight_rows is not None:
                summed = load_row(norm_weight_rows, place, D, K, C, "evict_last")
                store_row(norm_weight_rows, place, plus(summed, times(grad_mixed, normed, K), K), D, K, C)
            if norm_weight is not None:
                grad_mixed = times(grad_mixed, load_row(norm_weight, 0, D, K, C, "evict_last"), K)
            along = dot(grad_mixed, normed, K) / D
            if NORM == 2:
                grad_mixed = centred(grad_mixed, total(grad_mixed, K) / D, D, K, C)
            grad_mixed = combined(norm_scale, grad_mixed, -norm_scale * along, normed, K)
        grad_mixed = scaled(grad_mixed, gain, K)
        mean_score = dot(grad_mixed, mixed, K)
        weight = times(load_row(query, 0, D, K, C, "evict_last"), load_row(key_weight, 0, D, K, C, "evict_last"), K)
        if grad_lse is not None:
            mean_score -= tl.load(grad_lse + row)
        if carry is not None:
            value = load_row(carry, row * D, D, K, C, "evict_first")
            share = tl.exp(tl.load(carry_lse + row) - level)
            tl.store(grad_carry_lse + row, share * (dot(grad_mixed, value, K) - mean_score))
            store_row(grad_carry, row * D, scaled(grad_mixed, share, K), D, K, C)
        for i in tl.static_range(S):
            value = load_row(sources[i], row * (D if PACKED else strides[i]), D, K, C, "evict_first")
            logit = tl.load(stats + tl.full([], i, tl.int64) * N + row)
            scale = tl.load(stats + tl.full([], S + i, tl.int64) * N + row)
            share = tl.exp(logit - level)
            if bias is not None:
                share = tl.exp(logit + tl.load(bias + i).to(tl.float32) - level)
            score = dot(grad_mixed, value, K)
            if VALUE_NORM:
                score *= scale
            if S == 1 and carry is None and grad_lse is None:
                grad_logit = tl.full([], 0.0, tl.float32)
            else:
                grad_logit = share * (score - mean_score)
            if grad_logits is not None:
                tl.store(grad_logits + tl.full([], i, tl.int64) * N + row, grad_logit)
            along = grad_logit * logit  # times scale squared / D: what the root mean square takes back
            if VALUE_NORM:
                along += share * score
                share *= scale
            grad_weight = combined(1.0, grad_weight, grad_logit * scale, value, K)
            if grad_sources[i] is not None:
                grad_source = combined(share, grad_mixed, grad_logit * scale, weight, K)
                grad_source = combined(1.0, grad_source, -along * scale * scale / D, value, K)
                if other_grads[i] is not None:
                    grad_source = plus(grad_source, load_row(other_grads[i], row * D, D, K, C, "evict_first"), K)
                store_row(grad_sources[i], row * D, grad_source, D, K, C)
    if weight_rows is not None:
        store_row(weight_rows, place, grad_weight, D, K, C)


@triton.jit
def sum_rows(rows, factor, other, out, out_other, R, D, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """out = factor * (sum of R rows), out_other = other * (the same); rows float32 [R, D], always in one order."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    lanes = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, R, TILE):
        places = start + tl.arange(0, TILE)
        mask = (places < R)[:, None] & inside[None, :]
        lanes += tl.load(rows + places[:, None].to(tl.int64) * D + cols[None, :], mask=mask, other=0.0)
    column = tl.sum(lanes, 0)
    scaled_by = column
    if factor is not None:
        scaled_by = column * tl.load(factor + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cols, scaled_by.to(out.dtype.element_ty), mask=inside)
    if out_other is not None:
        second = column * tl.load(other + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_other + cols, second.to(out_other.dtype.element_ty), mask=inside)
