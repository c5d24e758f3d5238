"""Hyper-connections written by hand, on stacked copies: what the rewrite is held against."""

import torch

import attnres_fx as ax


def hyper(**options):
    return ax.HyperConnectionsConfig(**{"copies": 3, **options})


def doubly_stochastic(logits, steps):
    """Rows last, in logarithms."""
    for _ in range(steps):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


def weights_of(connection, kind, copies, config):
    """What the copies [..., n, D] are read, written or carried with: [..., n] or [..., n, n]."""
    static = getattr(connection, kind)
    weight, scale = getattr(connection, f"{kind}_weight"), getattr(connection, f"{kind}_scale")
    if config.constrained:
        flat = copies.flatten(-2)
        found = static.expand(*copies.shape[:-2], *static.shape)
        if weight is not None:
            normed = torch.nn.functional.rms_norm(flat, flat.shape[-1:], eps=config.eps)
            found = found + scale * torch.einsum("...i,oi->...o", normed, weight).view(found.shape)
        if kind == "carry":
            return doubly_stochastic(found, config.sinkhorn_steps)
        return torch.sigmoid(found) * (2 if kind == "post" else 1)
    found = static.expand(*copies.shape[:-2], *static.shape)
    if weight is None:
        return found
    normed = torch.nn.functional.rms_norm(copies, copies.shape[-1:], eps=config.eps)
    each = "...jd,kd->...kj" if kind == "carry" else "...jd,d->...j"
    return found + scale * torch.tanh(torch.einsum(each, normed, weight))


def written(connection, copies, branch, config):
    """The copies after a write, all weights computed from the copies before it."""
    post = weights_of(connection, "post", copies, config)[..., None] * branch[..., None, :]
    if connection.carry is None:
        return copies + post
    return torch.einsum("...kj,...jd->...kd", weights_of(connection, "carry", copies, config), copies) + post


def by_hand(parts, connections, config):
    """A pre-norm model: root, sublayers as functions of what they read, and the head."""
    root, sublayers, head = parts
    copies = torch.stack([root] * config.copies, -2)
    state = root
    for sublayer, connection in zip(sublayers, connections, strict=True):
        copies = written(connection, copies, sublayer(state), config)
        state = torch.einsum("...j,...jd->...d", weights_of(connection, "pre", copies, config), copies)
    return head(state)
