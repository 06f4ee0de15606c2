"""PyTorch baseline of the benchmarks: the same tower, loss and step, with padded texts.

Written from the paper (arXiv 2511.13189, section 3 and supplement) with `transformers`' models,
`peft`'s adapters and `torch.nn.TransformerEncoderLayer`, as one would write it first: in float32 on
a CPU; on a GPU in bfloat16 with SDPA, and decoders with gradient checkpointing.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int

from vixml_jax.data.packing import Layout

LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


class Side(NamedTuple):
    """The queries or the labels of a batch, padded.

    Attributes:
      ids: Token ids [b, t].
      mask: 1 at tokens, 0 at padding [b, t].
      images: Image embeddings [b, i, v], if any.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    images: torch.Tensor | None


def side(
    tokens: list[Int[np.ndarray, " t"]],
    images: Float[np.ndarray, "b i v"] | None,
    length: int | None,
) -> Side:
    """Items as `Program.step` takes them; arguments as `pad` and `Side` have them."""
    return Side(*pad(tokens, length), None if images is None else torch.from_numpy(images))


class Tower(torch.nn.Module):
    """A model of `transformers` under a masked mean, with the parts of an item in their order.

    Args:
      about: Its config.json.
      lora_rank: Of adapters on all maps beside a frozen base; 0: all of it is trained.
      layout: How an item is written.
      image_width: Of an image's embedding.
      device: "cpu" or "cuda".
    """

    def __init__(
        self,
        about: dict[str, Any],
        *,
        lora_rank: int = 0,
        layout: Layout = Layout(),
        image_width: int = 1,
        device: str = "cpu",
    ):
        import transformers

        super().__init__()
        dtype = torch.bfloat16 if device == "cuda" and lora_rank else torch.float32
        about = about.get("text_config", about)
        config = transformers.AutoConfig.for_model(**about)
        self.model = transformers.AutoModel.from_config(config, attn_implementation="sdpa")
        self.model = self.model.to(device, dtype)
        if lora_rank:
            import peft

            if device == "cuda":
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            lora = peft.LoraConfig(
                r=lora_rank, lora_alpha=lora_rank, use_rslora=True, target_modules=LORA_MODULES
            )
            self.model = peft.get_peft_model(self.model, lora)
        self.words = self.model.get_input_embeddings()
        self.layout, self.device = layout, device
        width = self.words.weight.shape[1]
        self.project = torch.nn.Linear(image_width, width).to(device) if layout.num_images else None

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, images: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Means over unmasked tokens, prompt pieces and images: [b, d]."""
        ids, mask = ids.to(self.device), mask.to(self.device)
        states, shown = [], []
        for part in self.layout.unseen if images is None else self.layout.seen:
            if part == "text":
                states.append(self.words(ids))
                shown.append(mask)
            elif part == "images":
                projected = self.project(images.to(self.device).float())
                states.append(projected.to(self.words.weight.dtype))
                shown.append(mask.new_ones(projected.shape[:2]))
            else:
                piece = torch.tensor(part, device=self.device).expand(len(ids), -1)
                states.append(self.words(piece))
                shown.append(torch.ones_like(piece))
        mask = torch.cat(shown, 1)
        states = self.model(inputs_embeds=torch.cat(states, 1), attention_mask=mask)
        weights = mask.unsqueeze(-1).float()
        return (states.last_hidden_state * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


class Program(torch.nn.Module):
    """Tower, combiner, free vectors, centroids and AdamW: everything of a training step.

    Args:
      about: The tower's config.json.
      num_labels: Rows of the label table.
      tower: As `Tower` takes.
    """

    def __init__(self, about: dict[str, Any], num_labels: int, **tower: Any):
        super().__init__()
        self.tower = Tower(about, **tower)
        self.device = self.tower.device
        width = self.tower.words.weight.shape[1]
        self.combiner = torch.nn.TransformerEncoderLayer(
            width, 8, 1024, dropout=0.1, activation="gelu", batch_first=True
        ).to(self.device)
        self.free = torch.nn.Embedding(num_labels, width).to(self.device)
        self.centroids = torch.zeros(num_labels, width, device=self.device)
        trained = [value for value in self.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-5, eps=1e-6)

    def _vectors(self, side: Side) -> torch.Tensor:
        cuda = self.device == "cuda"
        with torch.autocast(self.device, torch.bfloat16, enabled=cuda):
            return self.tower(*side).float()

    def step(
        self,
        queries: Side,
        labels: Side,
        label_ids: Int[np.ndarray, " c"],
        relevance: Bool[np.ndarray, "b c"],
    ) -> float:
        """One update; returns the loss."""
        ids = torch.from_numpy(label_ids.astype(np.int64)).to(self.device)
        positive = torch.from_numpy(relevance).to(self.device)
        q = F.normalize(self._vectors(queries), dim=-1)
        u = self._vectors(labels)
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

    def peak_bytes(self) -> int:
        """Peak GPU memory; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0


def hinge(scores: torch.Tensor, positive: torch.Tensor, k: int = 10) -> torch.Tensor:
    """The hard-negative triplet loss of one direction."""
    chosen = torch.multinomial(positive.float(), 1)
    best = scores.gather(1, chosen)
    negative = scores.masked_fill(positive, -50.0).topk(min(k, scores.shape[1]), dim=1).values
    margin = (best - negative).abs().clamp(0.1, 0.3).detach()
    loss = torch.max(negative - best + margin, torch.zeros((), device=scores.device))
    weights = torch.softmax(negative.masked_fill(loss == 0, -50.0) / 0.1, dim=1)
    return (weights * loss).sum(1).mean()


def regulariser(
    raw: torch.Tensor, prototype: torch.Tensor, positive: torch.Tensor, k: int = 10
) -> torch.Tensor:
    """Prototypes should be closer to positives, and farther from negatives, than label vectors."""
    chosen = torch.multinomial(positive.float(), 1)
    near = torch.relu(raw.gather(1, chosen) - prototype.gather(1, chosen) + 0.1)
    hardest = prototype.masked_fill(positive, -50.0).topk(min(k, raw.shape[1]), dim=1).indices
    far = torch.relu(prototype.gather(1, hardest) - raw.gather(1, hardest) + 0.1)
    return 0.5 * sum(part.sum() / (part > 0).sum().clamp(min=1) for part in (near, far))
