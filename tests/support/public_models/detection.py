"""Detection and segmentation: positions are added to query and key in every layer, never to the stream."""

import torch
from torch import Tensor, nn

from tests.support.public_models.parts import WIDTH, Attention, Example, FeedForward, values


class EncoderLayer(nn.Module):
    """Both orders of norm and branch."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.norm_first, self.attention, self.feed = norm_first, nn.MultiheadAttention(WIDTH, 2), FeedForward()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def attend(self, x: Tensor, positions: Tensor) -> Tensor:
        q = k = x + positions
        return self.attention(q, k, x, need_weights=False)[0]

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attend(self.norm1(x), positions)
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attend(x, positions))
        return self.norm2(x + self.feed(x))


class DecoderLayer(nn.Module):
    """Self-attention, attention to the memory and a feed-forward; queries have positions of their own."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.norm_first, self.feed = norm_first, FeedForward()
        self.attention, self.cross = nn.MultiheadAttention(WIDTH, 2), nn.MultiheadAttention(WIDTH, 2)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))

    def attend(self, x: Tensor, queries: Tensor) -> Tensor:
        q = k = x + queries
        return self.attention(q, k, x, need_weights=False)[0]

    def look(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        return self.cross(x + queries, memory + positions, memory, need_weights=False)[0]

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attend(self.norm1(x), queries)
            x = x + self.look(self.norm2(x), queries, memory, positions)
            return x + self.feed(self.norm3(x))
        x = self.norm1(x + self.attend(x, queries))
        x = self.norm2(x + self.look(x, queries, memory, positions))
        return self.norm3(x + self.feed(x))


class DETR(nn.Module):
    """Tokens first, `[N, B, D]`; the decoder begins with zeros and shows its state after every layer, normed."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, WIDTH, 1)
        self.positions, self.queries = nn.Parameter(torch.zeros(9, 1, WIDTH)), nn.Parameter(torch.zeros(4, WIDTH))
        self.encoder = nn.ModuleList(EncoderLayer(norm_first) for _ in range(2))
        self.encoder_norm = nn.LayerNorm(WIDTH) if norm_first else nn.Identity()
        self.decoder = nn.ModuleList(DecoderLayer(norm_first) for _ in range(2))
        self.decoder_norm, self.boxes = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, features: Tensor) -> Tensor:
        memory = self.project(features).flatten(2).permute(2, 0, 1)
        queries = self.queries.unsqueeze(1).repeat(1, features.shape[0], 1)
        for layer in self.encoder:
            memory = layer(memory, self.positions)
        memory, x = self.encoder_norm(memory), torch.zeros_like(queries)
        shown = []
        for layer in self.decoder:
            x = layer(x, queries, memory, self.positions)
            shown.append(self.decoder_norm(x))
        return self.boxes(torch.stack(shown)).sigmoid()


class TwoWayBlock(nn.Module):
    """Points attend to each other, points to the image, an MLP, the image to the points; a norm after each sum."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.feed = first, FeedForward()
        self.attention, self.to_image, self.to_points = Attention(), Attention(), Attention()
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(WIDTH) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, points: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            queries = self.attention(queries)
        else:
            q = queries + points
            queries = queries + self.attention(q, q, queries)
        queries = self.norm1(queries)
        queries = self.norm2(queries + self.to_image(queries + points, keys + positions, keys))
        queries = self.norm3(queries + self.feed(queries))
        keys = self.norm4(keys + self.to_points(keys + positions, queries + points, queries))
        return queries, keys


class TwoWay(nn.Module):
    """The decoder of a promptable segmenter: the embedded points are the first queries and their positions as well."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.dense = nn.Embedding(5, WIDTH), nn.Parameter(torch.zeros(WIDTH, 1, 1))
        self.layers = nn.ModuleList(TwoWayBlock(first) for first in (True, False))
        self.last, self.last_norm = Attention(), nn.LayerNorm(WIDTH)
        self.mask = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, positions: Tensor, points: Tensor) -> Tensor:
        keys = (image + self.dense).flatten(2).permute(0, 2, 1)
        positions = positions.flatten(2).permute(0, 2, 1)
        embedded = self.points(points)
        queries = embedded
        for layer in self.layers:
            queries, keys = layer(queries, keys, embedded, positions)
        queries = self.last_norm(queries + self.last(queries + embedded, keys + positions, keys))
        return self.mask(queries) @ keys.transpose(1, 2)


EXAMPLES: dict[str, Example] = {
    "detr": lambda: (DETR(norm_first=False), (values(2, 3, 3, 3),)),
    "detr norm first": lambda: (DETR(norm_first=True), (values(2, 3, 3, 3),)),
    "sam two-way": lambda: (
        TwoWay(),
        (values(2, WIDTH, 3, 3), values(2, WIDTH, 3, 3, seed=1), torch.tensor([[1, 2, 0], [3, 4, 2]])),
    ),
}
