"""gptray: train, tune, evaluate, serve and batch-run GPT language models on Ray.

>>> from gptray import LLM
>>> LLM("book").generate(["Once upon a time"], temperature=0.8)

`train`, `tune` and `evaluate` take a `Config`, such as `load_config` returns, and return what the
jobs of the same name print as JSON. A mistake raises UserError, a failed run RunFailed.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if sys.platform == "win32":
    print("gptray runs on Linux and macOS; on Windows, run it in WSL", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from gptray.config import Config, RunFailed, UserError, load_config
    from gptray.jobs.evaluate.run import evaluate
    from gptray.jobs.generate.llm import LLM, Output
    from gptray.jobs.train.run import train
    from gptray.jobs.tune.run import tune

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Config",
    "Output",
    "RunFailed",
    "UserError",
    "evaluate",
    "load_config",
    "train",
    "tune",
]

# The module of each name, imported on first use because torch takes seconds to load.
_HOMES = {
    "Config": "gptray.config",
    "LLM": "gptray.jobs.generate.llm",
    "Output": "gptray.jobs.generate.llm",
    "RunFailed": "gptray.config",
    "UserError": "gptray.config",
    "evaluate": "gptray.jobs.evaluate.run",
    "load_config": "gptray.config",
    "train": "gptray.jobs.train.run",
    "tune": "gptray.jobs.tune.run",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
