"""The groups of flags of a run: a dataclass each, whose fields are the flags `--group.name`."""

import dataclasses

from vixml_jax.runtime.flag_fields import flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The tower: the encoder or decoder that embeds text and images."""

    pretrained: str = flag(
        "",
        "Hugging Face directory or model name to start from. Empty: a tower from scratch with the "
        "sizes below.",
    )
    family: str = flag(
        "encoder",
        "Kind of a tower from scratch. An encoder is like BERT, a decoder like Qwen3.",
        choices=("encoder", "decoder"),
    )
    num_layers: int = flag(4, "Layers of a tower from scratch.", lower_bound=1)
    width: int = flag(256, "Width of a tower from scratch.", lower_bound=1)
    num_heads: int = flag(4, "Attention heads of a tower from scratch.", lower_bound=1)
    mlp_width: int = flag(1024, "Feed-forward width of a tower from scratch.", lower_bound=1)
    dropout: float = flag(
        -1.0,
        "Dropout rate of an encoder in training. -1: that of the checkpoint, or 0.1 from scratch.",
        lower_bound=-1.0,
        upper_bound=0.9,
    )
    num_images: int = flag(
        3, "Images read per item at most; 0: text only.", lower_bound=0, upper_bound=100
    )
    image_init: str = flag(
        "regression",
        "Initial image projection. regression: fitted to the mean token embedding of the labels of "
        "training items; random: as published.",
        choices=("regression", "random"),
    )
    pooling: str = flag(
        "auto",
        "How token states become one vector. auto: as the modules.json of the checkpoint says, or "
        "the mean; mean: their mean; cls: the state of the first token; last: the last state; "
        "weighted_mean: their mean, the n-th with weight n. All but auto start from the "
        "transformer alone, whatever modules.json says.",
        choices=("auto", "mean", "cls", "last", "weighted_mean"),
    )
    causal: bool = flag(
        True,
        "Causal attention in a decoder, as in pretraining. Off: positions attend in both "
        "directions.",
    )
    dtype: str = flag(
        "float32", "Data type that the tower computes in.", choices=("float32", "bfloat16")
    )
    matmul_precision: str = flag(
        "default",
        "Precision of float32 products of tower, prototypes and head. default: TF32 on GPUs, one "
        "pass of bfloat16 on TPUs; high: TF32 on GPUs, three passes on TPUs; highest: float32. "
        "CPUs always compute in float32.",
        choices=("default", "high", "highest"),
    )
    scan: bool = flag(
        False,
        "Compile one layer and loop over it. Compilation is faster, but steps of small towers are "
        "slower.",
    )
    remat: bool = flag(False, "Recompute activations in the backward pass to save memory.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The prompt around the text and images of an item, for decoders."""

    text: str = flag("Text: ", "Prompt before the text.")
    images: str = flag(" Images: ", "Prompt before the images; left out of items without images.")
    order: str = flag(
        "text_image", "Order of text and images.", choices=("text_image", "image_text")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of a frozen decoder, rank-stabilised (rsLoRA)."""

    rank: int = flag(
        0, "Rank of LoRA adapters (decoders only); 0: train all weights.", lower_bound=0
    )
    alpha: float = flag(
        256.0, "Adapters are scaled by alpha / sqrt(rank).", lower_bound=0.0, upper_bound=1e6
    )
    maps: list[str] = flag(
        ["query", "key", "value", "out", "gate", "up", "down"],
        "Linear maps that have adapters.",
    )
    base_dtype: str = flag(
        "bfloat16", "Data type of the frozen weights.", choices=("float32", "bfloat16")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Label prototypes: free vectors, centroids and the network that combines them."""

    prototypes: bool = flag(
        True,
        "Represent labels by prototypes. Off: by the tower's vector of the label text alone.",
    )
    num_free: int = flag(
        65536,
        "Number of free vectors, which labels share. At most one per label is used. 0: prototypes "
        "without free vectors.",
        lower_bound=0,
    )
    free_init: str = flag(
        "uniform",
        "Initial free vectors. uniform: small random values; embedding: the mean embedding of the "
        "labels that share one.",
        choices=("uniform", "embedding"),
    )
    free_update: str = flag(
        "dense",
        "Free vectors that a step updates. dense: all, by their momentum, as published; sparse: "
        "those of the labels in the batch, which is faster with many labels.",
        choices=("dense", "sparse"),
    )
    centroids: str = flag(
        "stale",
        "How label centroids follow training. stale: from the embeddings last seen in training; "
        "exact: all training queries are encoded again each epoch; moving: a moving average; none: "
        "prototypes without centroids.",
        choices=("stale", "exact", "moving", "none"),
    )
    num_heads: int = flag(8, "Attention heads of the combiner.", lower_bound=1, upper_bound=1 << 12)
    mlp_width: int = flag(
        1024, "Feed-forward width of the combiner.", lower_bound=1, upper_bound=1 << 19
    )
    dropout: float = flag(0.1, "Dropout rate of the combiner.", lower_bound=0.0, upper_bound=0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss."""

    kind: str = flag(
        "triplet",
        "Loss of queries and labels in a batch. triplet: hinges of the hardest negatives, as "
        "published; softmax: cross-entropy over the batch with all positives of a query; "
        "decoupled_softmax: the same, in which positives do not compete with each other.",
        choices=("triplet", "softmax", "decoupled_softmax"),
    )
    num_negatives: int = flag(10, "Hardest negatives per row.", lower_bound=1, upper_bound=1 << 20)
    margin_min: float = flag(0.1, "Smallest margin.", lower_bound=0.0, upper_bound=2.0)
    margin_max: float = flag(0.3, "Largest margin.", lower_bound=0.0, upper_bound=2.0)
    temperature: float = flag(
        0.1,
        "Temperature of the softmax that weights negatives. Used by the triplet loss.",
        lower_bound=1e-4,
        upper_bound=1e6,
    )
    softmax_temperature: float = flag(
        0.05, "Scores are divided by it in the softmax losses.", lower_bound=1e-4, upper_bound=1e6
    )
    regulariser: float = flag(
        0.1, "Weight of the prototype margin loss.", lower_bound=0.0, upper_bound=1e6
    )
    tie_gradient: bool = flag(
        True, "Gradient 0.5 where a hinge is exactly zero, as published. Off: gradient 0."
    )
    widths: list[int] = flag(
        [],
        "Widths at which vectors are to be usable, such as 64,128. The loss, and that of the label "
        "head, is the mean over the first 64, the first 128 and all numbers of the vectors. Empty: "
        "all numbers alone, as published.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The label head: a vector and a bias for every label, trained against all labels."""

    only: bool = flag(
        False,
        "Train the head alone, on a tower that stays as it is. The tower reads every query once, "
        "so a first model takes minutes. Labels have no prototypes then, and --loop.epochs has no "
        "effect.",
    )
    weight: float = flag(
        0.0,
        "Weight of the head's loss in each training step; 0: none. It is added to the contrastive "
        "loss.",
        lower_bound=0.0,
        upper_bound=1e6,
    )
    refit: bool = flag(
        False,
        "Train the head alone after the last epoch. It reads the final vectors of the training "
        "queries.",
    )
    epochs: int = flag(
        10,
        "Epochs of the head with --head.only and --head.refit.",
        lower_bound=1,
        upper_bound=1_000_000,
    )
    batch_size: int = flag(
        512,
        "Queries per batch with --head.only and --head.refit.",
        lower_bound=1,
        upper_bound=1 << 24,
    )
    loss: str = flag(
        "auto",
        "Loss of the head. softmax: over all labels; decoupled_softmax: the same, in which labels "
        "of a query do not compete with each other; bce: binary cross-entropy, for many labels per "
        "query; auto: bce from 5.5 labels per query and 25 queries per label on, else "
        "decoupled_softmax.",
        choices=("auto", "softmax", "decoupled_softmax", "bce"),
    )
    learning_rate: float = flag(
        2e-3,
        "Peak learning rate of the head; it falls linearly to 0.",
        lower_bound=0.0,
        upper_bound=1e30,
    )
    mlp_width: int = flag(
        1024,
        "Hidden width of the query side of the head; 0: none. The head reads query vectors through "
        "this network.",
        lower_bound=0,
        upper_bound=1 << 19,
    )
    words: int = flag(
        0,
        "Rows of the head's table of words; 0: it reads none. Each token of a query adds its row "
        "to what the head reads of the query. No more rows are used than the tokenizer has "
        "tokens.",
        lower_bound=0,
        upper_bound=1 << 24,
    )
    label_block: int = flag(
        8192,
        "Labels that a device scores at a time. Memory grows with it, not with all labels.",
        lower_bound=1,
    )
    moments: str = flag(
        "float32",
        "Data type of the optimizer's moments of the head. bfloat16 halves their memory.",
        choices=("float32", "bfloat16"),
    )
    sample_above: int = flag(
        2_000_000,
        "Number of labels up to which a step scores all of them. With more, it scores "
        "--head.num_sampled of them, beside those of its queries.",
        lower_bound=1,
    )
    num_sampled: int = flag(
        65536, "Labels drawn per step where not all are scored.", lower_bound=1, upper_bound=1 << 24
    )

    @property
    def enabled(self) -> bool:
        """Whether the run has a head."""
        return self.only or self.refit or self.weight > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How the scores of prototypes, head and frequency are added. Used where the run has a head."""

    prototypes: float = flag(
        10.0,
        "Weight of prototypes in scores; 0: head alone. It multiplies the similarity of query and "
        "prototype.",
        lower_bound=0.0,
        upper_bound=1e6,
    )
    head: float = flag(
        1.0,
        "Weight of the head's logits in scores; 0: prototypes alone.",
        lower_bound=0.0,
        upper_bound=1e6,
    )
    frequency: float = flag(
        0.0,
        "Weight of log(1 + training queries of a label) in its score. More favours frequent "
        "labels, less rare ones, most where a query is unlike those of training.",
        lower_bound=-1e6,
        upper_bound=1e6,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sampling and packing of batches."""

    size: int = flag(
        1024,
        "Queries per batch, over all devices. If there are fewer training queries, a quarter of "
        "them.",
        lower_bound=2,
    )
    row_width: int = flag(64, "Positions per packed row.", lower_bound=8, upper_bound=1 << 17)
    positives: str = flag(
        "inverse_propensity",
        "How the positive label of a query is sampled.",
        choices=("inverse_propensity", "uniform"),
    )
    image_dropout: float = flag(
        0.0,
        "Fraction of items whose images are dropped in training. Drawn anew in each batch; keeps "
        "the model accurate for items without images.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    cluster_start: int = flag(
        10,
        "Epoch (from 0) after which queries are first clustered. -1: batches stay random.",
        lower_bound=-1,
    )
    cluster_every: int = flag(5, "Epochs between clusterings.", lower_bound=1)
    cluster_size: int = flag(
        16, "Queries per cluster at first.", lower_bound=1, upper_bound=1 << 24
    )
    curriculum: list[int] = flag([], "Epochs (from 0) after which the cluster size doubles.")
    threads: int = flag(1, "Threads that prepare batches.", lower_bound=1, upper_bound=1024)
    microbatch_rows: int = flag(
        0,
        "Packed rows per device that the tower reads at once; 0: all. Rows are recomputed in the "
        "backward pass, so memory grows with this number instead of the batch size.",
        lower_bound=0,
        upper_bound=1 << 24,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with parameter groups and a schedule."""

    learning_rate: float = flag(
        1e-4, "Peak learning rate of the tower.", lower_bound=0.0, upper_bound=1e30
    )
    label_learning_rate: float = flag(
        1e-3,
        "Peak learning rate of the combiner and free vectors.",
        lower_bound=0.0,
        upper_bound=1e30,
    )
    image_learning_rate: float = flag(
        1e-3, "Peak learning rate of the image projection.", lower_bound=0.0, upper_bound=1e30
    )
    weight_decay: float = flag(
        0.01,
        "Weight decay, except of biases, norms and free vectors.",
        lower_bound=0.0,
        upper_bound=1e6,
    )
    warmup_steps: int = flag(
        100,
        "Steps of linear warm-up from 0 to the peak learning rates.",
        lower_bound=0,
        upper_bound=100_000_000,
    )
    clip_norm: float = flag(0.0, "Largest global gradient norm; 0: no clipping.", lower_bound=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length of training, evaluations, checkpoints and logging."""

    epochs: int = flag(
        10, "Passes over the training queries.", lower_bound=0, upper_bound=1_000_000
    )
    eval_every: int = flag(
        0,
        "Epochs between evaluations in training; 0: only at the end. They use the validation split "
        "if the data have one, else the test split.",
        lower_bound=0,
    )
    monitor: str = flag(
        "",
        "Validation metric that selects the best epoch, such as P@1. Empty: the last epoch is the "
        "model, as published. Needs --loop.eval_every; each evaluation then also reads the "
        "training queries.",
    )
    patience: int = flag(
        0,
        "Evaluations without improvement before stopping; 0: never. Needs --loop.monitor.",
        lower_bound=0,
    )
    save_every: int = flag(
        500,
        "Steps between checkpoints. They are written in the background; each epoch ends with one "
        "as well.",
        lower_bound=1,
    )
    save_minutes: float = flag(
        0.0, "Minutes between checkpoints, in addition; 0: no such limit.", lower_bound=0.0
    )
    max_to_keep: int = flag(
        2,
        "Newest checkpoints to keep. There is one more while it is written.",
        lower_bound=1,
    )
    log_every: int = flag(10, "Steps between lines of metrics.jsonl.", lower_bound=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of a run."""

    block: int = flag(1024, "Items encoded at a time.", lower_bound=8, upper_bound=1 << 20)
    k: int = flag(100, "Labels retrieved per query.", lower_bound=1)
    knn_baseline: bool = flag(False, "Also evaluate the training-free kNN baseline.")
    tune: list[str] = flag(
        [],
        "Metrics to tune scores by at the end of training. For example P@1,PSP@5: the weights of "
        "--fusion.* and --knn.* with the best mean on the validation split are saved. No effect "
        "without such a split. Metrics at more than the number of labels are left out.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Retrieval-augmented inference: labels of the nearest training queries are mixed in."""

    weight: float = flag(
        0.0,
        "Weight of labels of the nearest training queries; 0: off. They are mixed with the labels "
        "found by search; the paper uses 0.1.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    k: int = flag(100, "Training queries retrieved per query.", lower_bound=1, upper_bound=1 << 16)
    temperature: float = flag(
        0.05,
        "Softmax temperature of label and training query scores.",
        lower_bound=1e-4,
        upper_bound=1e6,
    )
    joint: bool = flag(
        False,
        "Search labels and training queries as one set. The best of both are kept. Off: each set "
        "is searched by itself.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How labels are searched. Not part of a run: it may differ each time."""

    recall: float = flag(
        0.99,
        "Recall of exact search that --search=scann must reach. The index is tuned to it.",
        lower_bound=0.01,
        upper_bound=1.0,
    )
    width: int = flag(
        0,
        "First numbers of vectors to search with; 0: all. The vectors of labels and queries are "
        "cut to them, for runs that were trained with this number in --loss.widths.",
        lower_bound=0,
        upper_bound=1 << 19,
    )
    dtype: str = flag(
        "float32",
        "Data type of the vectors that are searched. int8: a quarter of the memory; the best "
        "labels are scored again by their float32 vectors, which stay on disk or on the host. With "
        "--search=exact only.",
        choices=("float32", "int8"),
    )
    sample: int = flag(
        1000, "Queries that the index is tuned on at most.", lower_bound=1, upper_bound=1 << 20
    )
    query_block: int = flag(1024, "Queries searched exactly at a time.", lower_bound=1)
    label_block: int = flag(
        65536,
        "Labels scored exactly at a time on each device. The scores of a block take 4 * "
        "query_block * label_block bytes.",
        lower_bound=1,
    )
    memory_gb: float = flag(
        0.0,
        "Host memory that search may use, in GB (10^9 bytes). 0: all that is free.",
        lower_bound=0.0,
        upper_bound=1e9,
    )
