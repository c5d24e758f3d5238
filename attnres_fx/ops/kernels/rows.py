"""Triton pieces the kernels share: one row as a tuple of chunks, in float32.

A row of D numbers is K = ceil(D / C) chunks of C; only the last one may be masked. Chunks are added up lane by
lane before they are reduced, so a row costs one reduction however many chunks it has.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton adds tuples; it does not unpack into them)
import triton
import triton.language as tl


@triton.jit
def no_row(K: tl.constexpr, C: tl.constexpr):
    row = ()
    for _ in tl.static_range(K):
        row = row + (tl.zeros([C], tl.float32),)
    return row


@triton.jit
def load_row(pointer, start, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, POLICY: tl.constexpr):
    """The D numbers `start` after `pointer`; zero beyond them.

    The place of a number is added up before the pointer is: pointers to lanes of every source, kept in registers
    over a loop of rows, would not leave room for the rows.
    """
    row = ()
    for k in tl.static_range(K):
        cols = k * C + tl.arange(0, C)
        if (k + 1) * C <= D:
            chunk = tl.load(pointer + (start + cols), eviction_policy=POLICY)
        else:
            chunk = tl.load(pointer + (start + cols), mask=cols < D, other=0.0, eviction_policy=POLICY)
        row = row + (chunk.to(tl.float32),)
    return row


@triton.jit
def store_row(pointer, start, row, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    for k in tl.static_range(K):
        cols = k * C + tl.arange(0, C)
        chunk = row[k].to(pointer.dtype.element_ty)
        if (k + 1) * C <= D:
            tl.store(pointer + (start + cols), chunk)
        else:
            tl.store(pointer + (start + cols), chunk, mask=cols < D)


@triton.jit
def dot(a, b, K: tl.constexpr):
    """Sum of products of two rows."""
    lanes = a[0] * b[0]
    for k in tl.static_range(1, K):
        lanes += a[k] * b[k]
    return tl.sum(lanes, 0)


@triton.jit
def total(a, K: tl.constexpr):
    lanes = a[0]
    for k in tl.static_range(1, K):
        lanes += a[k]
    return tl.sum(lanes, 0)


@triton.jit
def scaled(a, factor, K: tl.constexpr):
    row = ()
    for k in tl.static_range(K):
        row = row + (a[k] * factor,)
    return row


@triton.jit
def times(a, b, K: tl.constexpr):
    row = ()
    for k in tl.static_range(K):
        row = row + (a[k] * b[k],)
    return row


@triton.jit
def plus(a, b, K: tl.constexpr):
    row = ()
    for k in tl.static_range(K):
        row = row + (a[k] + b[k],)
    return row


@triton.jit
def combined(a, x, b, y, K: tl.constexpr):
    """a * x + b * y for rows x, y and numbers a, b."""
    row = ()
    for k in tl.static_range(K):
        row = row + (a * x[k] + b * y[k],)
    return row


@triton.jit
def rounded(a, like, K: tl.constexpr):
    """A row as it is after a cast to the dtype `like` points to."""
    row = ()
    for k in tl.static_range(K):
        row = row + (a[k].to(like.dtype.element_ty).to(tl.float32),)
    return row


@triton.jit
def centred(a, mean, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """a - mean, still zero beyond D."""
    row = ()
    for k in tl.static_range(K):
        chunk = a[k] - mean
        if (k + 1) * C > D:
            chunk = tl.where(k * C + tl.arange(0, C) < D, chunk, 0.0)
        row = row + (chunk,)
    return row
