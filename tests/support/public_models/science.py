"""Models of proteins."""

import torch
from torch import Tensor, nn

from tests.support.public_models.parts import WIDTH, Attention, Example, FeedForward, values

PAIR = 4


class RowAttention(nn.Module):
    """Along the residues of each sequence; the pairs give the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pair_norm, self.bias = nn.LayerNorm(WIDTH), nn.LayerNorm(PAIR), nn.Linear(PAIR, 2, bias=False)
        self.attention = Attention()

    def forward(self, msa: Tensor, pair: Tensor) -> Tensor:
        bias = self.bias(self.pair_norm(pair)).permute(2, 0, 1)[None]
        return self.attention(self.norm(msa), bias=bias)


class ColumnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()

    def forward(self, msa: Tensor) -> Tensor:
        return self.attention(self.norm(msa.transpose(0, 1))).transpose(0, 1)


class Transition(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.feed = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.norm(x))


class OuterProductMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
        self.out = nn.Linear(4, PAIR)

    def forward(self, msa: Tensor) -> Tensor:
        x = self.norm(msa)
        return self.out(torch.einsum("sia,sjb->ijab", self.left(x), self.right(x)).flatten(2) / msa.shape[0])


class TriangleProduct(nn.Module):
    """Edge ij is updated from the edges ik and jk."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_out, self.out = nn.LayerNorm(PAIR), nn.LayerNorm(PAIR), nn.Linear(PAIR, PAIR)
        self.edges, self.gates = nn.Linear(PAIR, 2 * PAIR), nn.Linear(PAIR, 3 * PAIR)

    def forward(self, pair: Tensor) -> Tensor:
        x = self.norm(pair)
        *gates, gate = self.gates(x).sigmoid().chunk(3, -1)
        left, right = (edge * g for edge, g in zip(self.edges(x).chunk(2, -1), gates, strict=True))
        return gate * self.out(self.norm_out(torch.einsum("ikc,jkc->ijc", left, right)))


class TriangleAttention(nn.Module):
    """Around the ending node, so over the pairs turned round; the third edge gives the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bias, self.attention = nn.LayerNorm(PAIR), nn.Linear(PAIR, 2, bias=False), Attention(PAIR)

    def forward(self, pair: Tensor) -> Tensor:
        x = self.norm(pair.transpose(0, 1))
        return self.attention(x, bias=self.bias(x).permute(2, 0, 1)[None]).transpose(0, 1)


class EvoformerBlock(nn.Module):
    """Three updates of the sequences, four of the pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.column, self.msa_transition = RowAttention(), ColumnAttention(), Transition(WIDTH)
        self.outer, self.pair_transition = OuterProductMean(), Transition(PAIR)
        self.product, self.attend = TriangleProduct(), TriangleAttention()

    def forward(self, msa: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        msa = msa + self.row(msa, pair)
        msa = msa + self.column(msa)
        msa = msa + self.msa_transition(msa)
        pair = pair + self.outer(msa)
        for update in (self.product, self.attend, self.pair_transition):
            pair = pair + update(pair)
        return msa, pair


class Evoformer(nn.Module):
    """Sequences `[S, R, D]` and pairs `[R, R, d]`, both begun from the target; the first sequence and the pairs are
    what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences, self.target = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH)
        self.left, self.right, self.offsets = nn.Linear(5, PAIR), nn.Linear(5, PAIR), nn.Embedding(9, PAIR)
        self.blocks = nn.ModuleList(EvoformerBlock() for _ in range(2))
        self.single, self.distances = nn.Linear(WIDTH, WIDTH), nn.Linear(PAIR, 6)

    def forward(self, msa: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(target.shape[0])
        pair = self.left(target)[:, None] + self.right(target)[None]
        pair = pair + self.offsets((places[:, None] - places[None]).clamp(-4, 4) + 4)
        msa = self.sequences(msa) + self.target(target)
        for block in self.blocks:
            msa, pair = block(msa, pair)
        distances = self.distances(pair)
        return self.single(msa[0]), distances + distances.transpose(0, 1)


EXAMPLES: dict[str, Example] = {"evoformer": lambda: (Evoformer(), (values(3, 5, 5), values(5, 5, seed=1)))}
