"""Value types that sections share, and the checks that need more than bounds."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from encodings.aliases import aliases
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from gptray.config.limits import LARGEST, MAX_PROCESSES
from gptray.config.suggest import did_you_mean, nearest
from gptray.config.yaml_text import plain_number

PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
Several = Annotated[int, Field(ge=2, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Processes = Annotated[int, Field(gt=0, le=MAX_PROCESSES)]
NonEmpty = Annotated[str, Field(min_length=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"],
    Field(description="auto: bf16 if the processor or GPU supports it, else fp32"),
]
Backend = Literal["auto", "native", "torch"]


class Section(BaseModel):
    """A section of the config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def broken_rules(self) -> Iterator[str]:
        """Messages about valid values that cannot be combined; only the first is reported."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for sentence in self.broken_rules():
            raise ValueError(sentence)
        return self


def only(*names: str) -> AfterValidator:
    """A check that a list holds none but these names, each once."""

    def known(given: list[str]) -> list[str]:
        for name in given:
            if name not in names:
                raise ValueError(f"takes {', '.join(names)}, not {name}")
        return list(dict.fromkeys(given))

    return AfterValidator(known)


def model_to(use: str) -> FieldInfo:
    """The description of a key that names a trained model to `use`."""
    found: FieldInfo = Field(
        description=f"model to {use}: a run by name or folder, a model folder or a hub id; null: "
        "the run called name, else the newest in storage_path"
    )
    return found


def split_parts(value: object) -> object:
    """Normalise a split, "90:10" or a list on any scale, to fractions that sum to one."""
    if isinstance(value, str):
        value = value.split(":")
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= 3:
        raise ValueError("give train:val or train:val:test, such as 90:10 or 80:10:10")
    try:
        parts = [plain_number(one) if isinstance(one, str) else float(one) for one in value]
    except (TypeError, ValueError):
        raise ValueError("give train:val or train:val:test, such as 90:10 or 80:10:10") from None
    if not all(0 < part < float("inf") for part in parts):
        raise ValueError("every part of the split must be above 0")
    total = sum(parts)
    # A normalised split stays unchanged, so that a dumped config equals its source.
    return tuple(parts) if abs(total - 1) < 1e-9 else tuple(part / total for part in parts)


def known_codec(value: str | None) -> str | None:
    """Check that Python has a codec of this name that reads text files."""
    if value is None or _reads_text(value):
        return value
    spelled = value.lower().replace("-", "_")
    names = {name for name in (*aliases, *aliases.values()) if _reads_text(name)}
    near = did_you_mean(nearest(spelled, sorted(names - {spelled})))
    raise ValueError(f"unknown encoding{near} (such as cp949, utf-16, cp1252)")


def _reads_text(codec: str) -> bool:
    """Whether it decodes bytes to text, in blocks, and can go on past an invalid byte.

    Codecs of domain names (idna) cannot, and some turn bytes to bytes (base64) or text to text.
    """
    try:
        b"\xff".decode(codec, "replace")
        return codecs.lookup(codec).incrementaldecoder is not None
    except (LookupError, ValueError):
        return False
