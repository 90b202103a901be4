"""Which backend decodes: asked for, or the faster one for a network of that shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptray.config import Config, ModelConfig, override
from gptray.generation.loading import decoder_backend, part_of
from tests.generation.models import needs_native
from tests.native.cache import own_cache, remember

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=300)


def backend(config: Config, *, size: int = 4) -> str:
    return decoder_backend(config, SHAPE, max_batch_size=size)


@needs_native
@pytest.mark.parametrize(
    "words",
    [{}, {"generate.precision": "fp32"}, {"quantize.weights": "int8"}],
)
def test_the_faster_decoder_is_measured_once_and_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, str]
) -> None:
    folder = own_cache(tmp_path, monkeypatch)
    config = override(Config(), words)
    for asked in ("native", "torch"):
        assert backend(override(config, {"generate.backend": asked})) == asked
    assert not folder.exists()
    before = torch.random.get_rng_state()
    backend(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    for faster, seconds in (("torch", (2.0, 1.0)), ("native", (1.0, 2.0))):
        remember(folder, native=seconds[0], torch=seconds[1])
        assert backend(config) == faster
    assert len(list(folder.glob("*.json"))) == 1
    backend(config, size=5)
    assert len(list(folder.glob("*.json"))) == 2


def test_a_part_of_a_large_network_has_its_widths_and_its_proportions() -> None:
    shape = ModelConfig(n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257)
    part = part_of(shape)
    layers = part.config.n_layer
    assert 1 < layers < 12 and part.config.n_embd == 768
    assert part.valid_vocab_size == -(-50257 * layers // 12)
    assert all(bool(weight.isfinite().all()) for weight in part.parameters())
    update = {"mlp": "swiglu", "n_kv_head": 3, "norm": "rmsnorm", "positions": "rotary"}
    llama = part_of(shape.model_copy(update=update))
    assert llama.config.kv_heads == 3 and llama.config.n_layer < layers
    small = part_of(SHAPE)
    assert small.config.n_layer == 2 and small.valid_vocab_size == 300
