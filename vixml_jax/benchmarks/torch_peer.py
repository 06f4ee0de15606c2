"""The peer of the benchmarks: the same tower, loss and step in PyTorch, texts padded.

Written from the paper (arXiv 2511.13189, section 3 and supplement) with `transformers`' BertModel
and `torch.nn.TransformerEncoderLayer`, in float32, as one would write it first.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int


def pad(
    tokens: list[Int[np.ndarray, " t"]], length: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [b, t], padded to `length`, or to the longest where it is None."""
    length = length or max(len(row) for row in tokens)
    ids = np.zeros((len(tokens), length), np.int64)
    mask = np.zeros((len(tokens), length), np.int64)
    for i, row in enumerate(tokens):
        ids[i, : len(row)] = row[:length]
        mask[i, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


class Tower(torch.nn.Module):
    """BertModel under a masked mean."""

    def __init__(self, sizes: dict[str, Any]):
        import transformers

        super().__init__()
        self.bert = transformers.BertModel(
            transformers.BertConfig(**sizes), add_pooling_layer=False
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


class Program(torch.nn.Module):
    """Tower, combiner, free vectors, centroids and AdamW: all that one step touches."""

    def __init__(self, sizes: dict[str, Any], num_labels: int):
        super().__init__()
        width = sizes["hidden_size"]
        self.tower = Tower(sizes)
        self.combiner = torch.nn.TransformerEncoderLayer(
            width, 8, 1024, dropout=0.1, activation="gelu", batch_first=True
        )
        self.free = torch.nn.Embedding(num_labels, width)
        self.centroids = torch.zeros(num_labels, width)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=2e-5, eps=1e-6)

    def step(
        self,
        queries: list[Int[np.ndarray, " t"]],
        labels: list[Int[np.ndarray, " t"]],
        label_ids: Int[np.ndarray, " c"],
        relevance: Bool[np.ndarray, "b c"],
        length: int | None,
    ) -> float:
        """One update; returns the loss."""
        ids = torch.from_numpy(label_ids.astype(np.int64))
        positive = torch.from_numpy(relevance)
        q = F.normalize(self.tower(*pad(queries, length)), dim=-1)
        u = self.tower(*pad(labels, length))
        tokens = torch.stack([u, self.free(ids), self.centroids[ids]], dim=1)
        z = F.normalize(self.combiner(tokens).mean(dim=1), dim=-1)
        u = F.normalize(u, dim=-1)
        raw, prototype = q @ u.T, q @ z.T
        loss = (
            hinge(raw, positive)
            + hinge(prototype, positive)
            + hinge(raw.T, positive.T)
            + 0.1 * regulariser(raw, prototype, positive)
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def hinge(scores: torch.Tensor, positive: torch.Tensor, k: int = 10) -> torch.Tensor:
    """The hard-negative triplet loss of one direction."""
    chosen = torch.multinomial(positive.float(), 1)
    best = scores.gather(1, chosen)
    negative = scores.masked_fill(positive, -50.0).topk(k, dim=1).values
    margin = (best - negative).abs().clamp(0.1, 0.3).detach()
    loss = torch.max(negative - best + margin, torch.zeros(()))
    weights = torch.softmax(negative.masked_fill(loss == 0, -50.0) / 0.1, dim=1)
    return (weights * loss).sum(1).mean()


def regulariser(
    raw: torch.Tensor, prototype: torch.Tensor, positive: torch.Tensor, k: int = 10
) -> torch.Tensor:
    """Prototypes should stand closer to positives, and farther from negatives, than labels do."""
    chosen = torch.multinomial(positive.float(), 1)
    near = torch.relu(raw.gather(1, chosen) - prototype.gather(1, chosen) + 0.1)
    hardest = prototype.masked_fill(positive, -50.0).topk(k, dim=1).indices
    far = torch.relu(prototype.gather(1, hardest) - raw.gather(1, hardest) + 0.1)
    return 0.5 * sum(part.sum() / (part > 0).sum().clamp(min=1) for part in (near, far))
