"""The config's sections for using a model: sample, quantize, generate, evaluate and export.

`gptray.config.schema` joins them into one tree; import them from `gptray.config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from gptray.config.limits import within
from gptray.config.named_texts import NamedTexts
from gptray.config.suggest import did_you_mean, nearest
from gptray.config.values import (
    Backend,
    Natural,
    NonEmpty,
    PositiveInt,
    Precision,
    Processes,
    Section,
    model_to,
    only,
)

# Kinds of quantized weights.
QUANTIZED = ("int8", "int4", "iq4_nl")
# The precisions that every export format takes, and each format's own.
_PLAIN = ("fp32", "fp16", "bf16")
_OWN = {"gguf": ("q8_0", "q4_0", "iq4_nl"), "hf": ("int8", "int4")}
# Keys of `sample` that apply to a whole batch job, not to a single row.
_JOB_WIDE = ("prompt", "parse_special")


class SampleConfig(Section):
    """Sampling settings, with the names and meanings of Hugging Face's GenerationConfig."""

    prompt: str | list[str] | None = Field(
        None,
        description="prompts of the samples; null: the first words of validation text",
        examples=[""],
    )
    max_new_tokens: Annotated[int, within("max_new_tokens", low=1)] = Field(
        64, description="most tokens to add; fewer if the model's context fills up"
    )
    min_new_tokens: Annotated[int, within("min_new_tokens")] = Field(
        0, description="tokens to add before the text may end, even at a stop string"
    )
    temperature: Annotated[float, within("temperature")] = Field(0.7, description="0: greedy")
    top_k: Annotated[int, within("top_k")] | None = Field(
        40, description="sample from the k likeliest; null: from all"
    )
    top_p: Annotated[float, within("top_p")] | None = Field(
        None,
        description="sample from the likeliest that add up to this probability, at least one; "
        "null: off",
    )
    min_p: Annotated[float, within("min_p")] | None = Field(
        None,
        description="drop tokens less likely than this fraction of the likeliest one's "
        "probability; null: off",
    )
    repetition_penalty: Annotated[float, within("repetition_penalty")] = Field(
        1.0, description="divides the logits of tokens already seen; 1: off"
    )
    stop: NonEmpty | list[NonEmpty] | None = Field(
        None, description="stop strings: each ends the output and is not part of it"
    )
    stop_token_ids: list[Natural] | None = Field(
        None, description="token ids that end the output, besides the model's end of text"
    )
    include_stop_str_in_output: bool = Field(
        False, description="keep the stop string, or the token of stop_token_ids, in the output"
    )
    skip_special_tokens: bool = Field(
        False, description="leave special tokens out of the text; false: they appear by name"
    )
    utf8: bool = Field(
        True,
        description="never draw a token that would break a character, so outputs never "
        "contain U+FFFD",
    )
    seed: Annotated[int, within("seed")] = Field(
        0, description="seed of the sampler; each prompt and each row draws independently"
    )
    parse_special: bool = Field(
        False,
        description="read the names of special tokens in a prompt (<|endoftext|>, <|im_start|>) as "
        "those tokens; false: as plain text",
    )

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value == []:
            raise ValueError("needs at least one prompt, or null")
        return value

    def broken_rules(self) -> Iterator[str]:
        if self.min_new_tokens > self.max_new_tokens:
            yield (
                f"sample.min_new_tokens={self.min_new_tokens} must not be above "
                f"sample.max_new_tokens={self.max_new_tokens}"
            )


# Settings that a row of a batch job can override, in a column of that name.
ROW_SETTINGS = tuple(name for name in SampleConfig.model_fields if name not in _JOB_WIDE)


class QuantizeConfig(Section):
    weights: Literal["none", "int8", "int4", "iq4_nl"] = Field(
        "none",
        description="quantization of the model that generates or is evaluated, or with lora.rank "
        "of the frozen base; int8: half the memory of bf16, slightly less accurate; int4: a "
        "third, with a scale for every 32 inputs (the head stays int8), less accurate; iq4_nl: "
        "the size of int4, more accurate; all are faster on CPUs with the native kernels",
    )


class GenerateConfig(Section):
    model: Annotated[NonEmpty | None, model_to("generate with")] = None
    adapter: NonEmpty | None = Field(
        None,
        description="adapter to put on the model: a PEFT folder (LoRA) or a run that trained "
        "one; if no model is named, the one that the adapter was trained on is used",
    )
    adapters: dict[str, str] | None = Field(
        None,
        description="adapters for the rows of a batch job by name, {tales: folder}, as in "
        "serve.adapters; generate.adapter_column says which row uses which",
    )
    adapter_column: str | None = Field(
        None,
        description="column with the name of each row's adapter in generate.adapters; null or "
        "empty: the model itself",
    )
    input_path: NonEmpty | list[NonEmpty] | None = Field(
        None,
        description="prompts: files, folders or globs of .parquet .jsonl .ndjson .json .csv .tsv "
        ".txt (one per line), or an OpenAI batch file (.jsonl)",
    )
    output_path: NonEmpty | None = Field(
        None,
        description="folder for the Parquet files, which pandas and pyarrow open as one table; "
        "every node of a cluster must see it; or a URI such as s3://bucket/out",
    )
    prompt_column: str = Field(
        "prompt", description="column that holds the prompts: texts or token ids"
    )
    id_column: str | None = Field(
        None, description="column that identifies each row; null: id if there is one, else position"
    )
    num_samples: PositiveInt = Field(
        1,
        description="outputs for each prompt; above 1 the column sample numbers them from 0",
    )
    settings_from_columns: bool | list[str] = Field(
        True,
        description="columns with sampling settings for their row, such as temperature or seed; "
        "true: all with such a name; false: none; or a list of names",
    )
    prefix: NonEmpty | None = Field(
        None,
        description="prefix for an input column whose name clashes with one of the job's own, "
        "such as output; null: refuse the input",
    )
    num_workers: Processes = Field(1, description="engines, each with its own share of the cluster")
    max_batch_size: PositiveInt = Field(32, description="sequences that one engine runs at a time")
    rows_per_file: PositiveInt = Field(
        256, description="input rows of one Parquet file; a killed job repeats unfinished files"
    )
    precision: Precision = "auto"
    backend: Backend = Field(
        "auto",
        description="native: gptray's own code for CPUs with AVX-512 or NEON, built once by a "
        "C++ compiler in a few seconds; auto: that or PyTorch (torch), whichever is faster where "
        "the engines run; on GPUs, CUDA graphs and Triton",
    )

    def broken_rules(self) -> Iterator[str]:
        if (self.adapters is None) != (self.adapter_column is None):
            yield "adapters and adapter_column need each other; for a single adapter use adapter"
        if self.adapters is not None and self.adapter is not None:
            yield "adapter applies to all rows, adapters to some; give only one of them"

    @field_validator("settings_from_columns")
    @classmethod
    def _known_settings(cls, value: bool | list[str]) -> bool | list[str]:
        for name in value if isinstance(value, list) else []:
            if name not in ROW_SETTINGS:
                near = did_you_mean(nearest(name, ROW_SETTINGS))
                raise ValueError(
                    f"{name} is not a setting of a row{near} (settings: {' '.join(ROW_SETTINGS)})"
                )
        return value


class EvaluateConfig(Section):
    model: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | None = Field(
        None,
        description="model to evaluate: a run by name or folder, a model folder or a hub id; "
        "several: the average of their probabilities is scored; null: this run's own model/",
    )
    adapter: NonEmpty | None = Field(None, description="as generate.adapter")
    source: NonEmpty | list[NonEmpty] | None = Field(
        None,
        description="text to score as a whole instead of the splits, in any form of data.source; "
        "its loss is reported as test_loss",
    )
    also: NamedTexts = None
    stride: PositiveInt | None = Field(
        None,
        description="tokens from one window to the next; a smaller stride gives more context "
        "from the previous window, which is slower but fairer; null: train.block_size, no overlap",
    )
    micro_batch_size: PositiveInt = Field(
        16,
        description="windows per forward pass of one worker; affects nothing but rounding on GPUs",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 on GPUs that support it, else fp32"
    )
    quantized: Annotated[list[str], only(*QUANTIZED)] = Field(
        [],
        description="kinds of quantize.weights to compare with the full weights on the test "
        "text, such as [int8, int4]: loss, agreement of greedy tokens, size",
    )
    train_tokens: PositiveInt = Field(
        100_000, description="tokens of the training split to score, spread evenly over it"
    )
    passages: Natural = Field(
        64, description="passages to continue, for BLEU and memorisation; 0: none"
    )
    bleu_tokenize: Literal["auto", "13a", "char", "ko-mecab", "intl", "flores200"] = Field(
        "auto",
        description="BLEU's tokenizer, by sacrebleu's names; auto: char for text that is mostly "
        "Korean, Chinese, Japanese or similar, else 13a",
    )


class ExportConfig(Section):
    model: Annotated[NonEmpty | None, model_to("export")] = None
    format: Literal["gguf", "hf"] = Field(
        "gguf", description="gguf: one file for llama.cpp; hf: a Hugging Face folder"
    )
    precision: Literal["fp32", "fp16", "bf16", "q8_0", "q4_0", "iq4_nl", "int8", "int4"] = Field(
        "fp16",
        description="precision of the exported weights; for gguf also q8_0, q4_0 and iq4_nl: 8 "
        "or 4 bits, with a scale for every 32 weights; for hf int8 and int4, as "
        "compressed-tensors packs them",
    )
    output_path: NonEmpty | None = Field(
        None, description="the file (.gguf) or folder (hf) to write; it must not exist yet"
    )

    def broken_rules(self) -> Iterator[str]:
        own = _OWN[self.format]
        if self.precision not in (*_PLAIN, *own):
            yield (
                f"export.precision={self.precision} is not available for "
                f"export.format={self.format}, which takes {', '.join((*_PLAIN, *own[:-1]))} or "
                f"{own[-1]}"
            )
