"""The config's section of the export job: a model in another program's format."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gptray.config.values import Section


class ExportConfig(Section):
    model: str | None = Field(
        None,
        description="model to export: a run by name or folder, a model folder or a hub id; "
        "null: the run called name, else the newest in storage_path",
    )
    format: Literal["gguf", "hf"] = Field(
        "gguf", description="gguf: one file for llama.cpp; hf: a Hugging Face folder"
    )
    precision: Literal["fp32", "fp16", "bf16", "q8_0"] = Field(
        "fp16",
        description="what weights are rounded to; q8_0: 8 bits, with a scale for every 32 weights, "
        "for gguf only",
    )
    output_path: str | None = Field(
        None, description="the file (.gguf) or folder (hf) to write; it must not exist yet"
    )

    @model_validator(mode="after")
    def _format_has_precision(self) -> ExportConfig:
        if self.format == "hf" and self.precision == "q8_0":
            raise ValueError(
                "export.precision=q8_0 is for export.format=gguf; a Hugging Face folder takes "
                "fp32, fp16 or bf16"
            )
        return self
