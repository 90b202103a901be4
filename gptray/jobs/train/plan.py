"""What follows from a training config, told before anything starts: the rows of --dry-run."""

from __future__ import annotations

from gptray.config import Config
from gptray.data.order import BatchOrder
from gptray.jobs.prepare.plan import text_rows
from gptray.jobs.train.check import check_run
from gptray.model.shape import parameter_count

# fp32 weights, gradients and AdamW's two moments.
BYTES_PER_PARAMETER = 16
# Of the logits that exist at a time on a GPU, at most: GPU_BYTES of `gptray.model.loss`.
HEAD_BYTES = 2 << 30
FILES = (
    "config.yaml metrics.jsonl events.jsonl report.html loss.png lr.png grad_norm.png "
    "tensorboard/ checkpoint_*/ model/"
)


def training_plan(config: Config) -> list[tuple[str, str]]:
    """Label and value of each fact; makes the same checks as the job, and starts nothing."""
    checked = check_run(config)
    config, data = checked.config, checked.data
    vocab_size = config.model.vocab_size or (data.vocab_size if data else None)
    if vocab_size is None and config.data.tokenizer == "bpe":
        vocab_size = config.data.vocab_size
    steps, batch = config.train.max_steps, config.train.global_batch_size
    rows = [
        ("run", str(checked.folder)),
        ("workers", _workers(config)),
        ("sequences per step", f"{batch:,} of {config.train.block_size:,} tokens"),
        ("tokens per step", f"{config.tokens_per_step:,}"),
        ("micro-batch", f"{config.micro_batch_size} x {config.grad_accum_steps} passes a worker"),
        ("tokens in all", f"{config.tokens_per_step * steps:,} at most"),
    ]
    if checked.changes:
        rows.append(("changes", "; ".join(checked.changes)))
    if vocab_size:
        count = parameter_count(config.model, vocab_size)
        rows.append(("parameters", f"{count:,}"))
        memory = _memory(config, count, vocab_size) / 2**30
        rows.append(("memory per worker", f"about {memory:.1f} GiB"))
    else:
        rows.append(("parameters", "known once the tokenizer is"))
    if data:
        order = BatchOrder(data.train.tokens, config.train.block_size, seed=config.seed)
        rows.append(("token data", f"{data.data_dir} (ready)"))
        rows += text_rows(data)
        rows.append(("steps per epoch", f"{order.windows_per_epoch / batch:,.1f}"))
        rows.append(("epochs", f"{order.epoch(steps, batch):,.2f} at most"))
    else:
        rows.append(("token data", "to be prepared first"))
    rows.append(("files", FILES))
    return rows


def _workers(config: Config) -> str:
    kind = "GPU" if config.compute.use_gpu else "CPU"
    beside = ", and one beside them that scores" if config.train.async_validation else ""
    return f"{config.compute.num_workers} ({kind}){beside}"


def _memory(config: Config, parameters: int, vocab_size: int) -> float:
    """Bytes of one worker, roughly: states of all parameters, and activations of one pass.

    A block keeps about 16 values of the width a token for its backward pass, and the attention
    probabilities (Korthikanti et al. 2022, without recomputation), in the bytes of fp32. On a GPU
    no probabilities are kept, but the logits of a piece of the head and their gradient are.
    """
    tokens = config.micro_batch_size * config.train.block_size
    if config.compute.use_gpu:
        value = 4 if config.train.precision == "fp32" else 2
        kept = config.model.n_layer * tokens * 16 * config.model.n_embd
        logits = 2 * min(HEAD_BYTES, value * tokens * vocab_size)
        return BYTES_PER_PARAMETER * parameters + value * kept + logits
    attention = config.model.n_head * config.train.block_size
    activations = config.model.n_layer * tokens * (16 * config.model.n_embd + attention)
    return BYTES_PER_PARAMETER * parameters + 4 * activations
