"""Makes a backend's decoder: CUDA graphs, the native kernels, or plain PyTorch."""

from __future__ import annotations

import gc
import logging

import torch

from gptray.generation.decoder import Decoder, Network
from gptray.generation.graphs import GraphDecoder
from gptray.generation.native_decoder import NativeDecoder
from gptray.model.gpt import GPT
from gptray.model.gpu_faults import why_failed

log = logging.getLogger("gptray")


def make_decoder(
    backend: str,
    model: GPT,
    slots: int,
    dtype: torch.dtype,
    quantize: str = "none",
    *,
    takes_adapters: bool = False,
) -> Network:
    """The decoder of a backend for S = `slots` sequences; arguments as `engine.Engine`'s."""
    if backend == "graph":
        try:
            return GraphDecoder(
                model, slots, dtype=dtype, quantize=quantize, takes_adapters=takes_adapters
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            log.warning("generating without CUDA graphs, which is slower: %s", why_failed(error))
        gc.collect()  # a reference cycle keeps the unfinished decoder and its cache
    decoder = NativeDecoder if backend == "native" else Decoder
    return decoder(model, slots, dtype=dtype, quantize=quantize)
