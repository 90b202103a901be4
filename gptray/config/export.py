"""The config's section of the export job: a model in another program's format."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gptray.config.values import Section

_PLAIN = ("fp32", "fp16", "bf16")
# What each format has besides.
_OWN = {"gguf": ("q8_0", "q4_0", "iq4_nl"), "hf": ("int8", "int4")}


class ExportConfig(Section):
    model: str | None = Field(
        None,
        description="model to export: a run by name or folder, a model folder or a hub id; "
        "null: the run called name, else the newest in storage_path",
    )
    format: Literal["gguf", "hf"] = Field(
        "gguf", description="gguf: one file for llama.cpp; hf: a Hugging Face folder"
    )
    precision: Literal["fp32", "fp16", "bf16", "q8_0", "q4_0", "iq4_nl", "int8", "int4"] = Field(
        "fp16",
        description="what weights are rounded to; for gguf also q8_0, q4_0 and iq4_nl: 8 or 4 "
        "bits, with a scale for every 32 weights; for hf int8 and int4, as compressed-tensors "
        "packs them",
    )
    output_path: str | None = Field(
        None, description="the file (.gguf) or folder (hf) to write; it must not exist yet"
    )

    @model_validator(mode="after")
    def _format_has_precision(self) -> ExportConfig:
        own = _OWN[self.format]
        if self.precision not in (*_PLAIN, *own):
            raise ValueError(
                f"export.precision={self.precision} does not go with export.format={self.format}, "
                f"which takes {', '.join((*_PLAIN, *own[:-1]))} or {own[-1]}"
            )
        return self
