"""The network against transformers' GPT-2 and against full logits; its initial weights."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gptray.config import ModelConfig, UserError
from gptray.model.gpt import GPT
from gptray.model.parameters import parameter_count


def small(**fields: object) -> ModelConfig:
    values = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 300, "dropout": 0.0}
    return ModelConfig.model_validate(values | fields)


def rough(config: ModelConfig, vocab_size: int = 61) -> GPT:
    """A network whose weights are large enough for every part to matter."""
    torch.manual_seed(1)
    model = GPT(config, vocab_size=vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.transformer.wte.weight[vocab_size:] = 0
    return model


def batch(model: GPT, B: int = 2, T: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.valid_vocab_size, (B, T + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


LLAMA = {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 1}
BARE = {"qkv_bias": False, "attn_out_bias": False, "mlp_bias": False}
EXAONE = LLAMA | BARE | {"qk_norm": True, "post_norm": True, "sliding_window": 20}


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"norm": "none"}, {"residual": False}, {"n_inner": 50}, LLAMA, EXAONE,
        {"tie_word_embeddings": False, "parallel_residual": True, "mlp": "gelu"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
def test_loss_and_all_gradients_equal_cross_entropy_of_full_logits(
    fields: dict[str, object], length: int
) -> None:
    model = rough(small(**fields))
    idx, targets = batch(model, T=length)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    loss = model(idx, targets)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradients(model, loss), gradients(model, expected), atol=1e-5, rtol=1e-4
    )


def test_token_losses_average_to_the_loss_and_carry_no_gradient() -> None:
    model = rough(small())
    idx, targets = batch(model)
    losses = model.token_losses(idx, targets)
    assert losses.shape == idx.shape and losses.dtype == torch.float32
    assert not losses.requires_grad
    torch.testing.assert_close(losses.mean(), model(idx, targets))
    with torch.no_grad():
        torch.testing.assert_close(losses.mean(), model(idx, targets))


def test_gradients_of_micro_batches_sum_to_those_of_the_batch() -> None:
    model = rough(small())
    idx, targets = batch(model, B=4, T=20)
    whole = gradients(model, model(idx, targets))
    for start in range(4):
        rows = slice(start, start + 1)
        (model(idx[rows], targets[rows]) / 4).backward()
    parts = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_ddp_leaves_the_same_gradients(tmp_path: object) -> None:
    model = rough(small())
    idx, targets = batch(model, T=20)
    alone = gradients(model, model(idx, targets))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        DistributedDataParallel(model)(idx, targets).backward()
    finally:
        torch.distributed.destroy_process_group()
    together = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("fields", [{}, EXAONE], ids=str)
@pytest.mark.parametrize("length", [5, 128, 300])
def test_bf16_is_close_to_fp32_and_its_gradients_are_fp32(
    fields: dict[str, object], length: int
) -> None:
    model = rough(small(**fields))
    idx, targets = batch(model, T=length)
    exact = gradients(model, loss := model(idx, targets))
    logits = model(idx)
    model.compute_dtype = torch.bfloat16
    assert model(idx).dtype == torch.bfloat16
    assert (model(idx).float() - logits).norm() / logits.norm() < 0.02
    fast = gradients(model, loss_bf16 := model(idx, targets))
    assert loss_bf16.dtype == torch.float32
    assert abs(loss_bf16.item() - loss.item()) < 0.02
    for name, gradient in fast.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() / exact[name].norm() < 0.1, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_sees_its_window_and_nothing_before_it(dtype: torch.dtype) -> None:
    model = rough(small(n_layer=1, sliding_window=20))
    model.compute_dtype = dtype
    idx, _ = batch(model, B=1)
    changed = idx.clone()
    changed[0, 100] = (changed[0, 100] + 1) % model.valid_vocab_size
    before, after = model(idx), model(changed)
    differs = (before != after).any(-1)[0].nonzero().flatten()
    assert differs.tolist() == list(range(100, 120))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_sees_nothing_of_later_ones(dtype: torch.dtype) -> None:
    model = rough(small())
    model.compute_dtype = dtype
    idx, _ = batch(model, B=1)
    changed = idx.clone()
    changed[0, 200:] = (changed[0, 200:] + 1) % model.valid_vocab_size
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def test_padded_entries_get_no_probability_no_gradient_and_change_nothing() -> None:
    padded, plain = rough(small(vocab_size=64)), rough(small())
    plain.load_state_dict(
        {
            name: value[:61] if "wte" in name else value
            for name, value in padded.state_dict().items()
        }
    )
    idx, targets = batch(padded)
    logits = padded(idx)
    assert logits.shape[-1] == 64 and torch.all(logits[..., 61:] == -math.inf)
    torch.testing.assert_close(logits[..., :61], plain(idx))
    loss = padded(idx, targets)
    torch.testing.assert_close(loss, plain(idx, targets))
    torch.testing.assert_close(padded.token_losses(idx, targets), plain.token_losses(idx, targets))
    assert not gradients(padded, loss)["transformer.wte.weight"][61:].any()


def test_padding_smaller_than_the_tokenizer_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="model.vocab_size=60.*61"):
        GPT(small(vocab_size=60), vocab_size=61)


def test_more_tokens_than_positions_are_refused() -> None:
    model = GPT(small(n_positions=8), vocab_size=61)
    with pytest.raises(ValueError, match="9 tokens .* model.n_positions=8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_initial_weights_follow_gpt2() -> None:
    model = GPT(small(n_layer=8, n_embd=128, vocab_size=512), vocab_size=500)
    model.initialise(5)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif ".ln_" in name:
            assert torch.all(weight == 1), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            real = weight[:500] if "wte" in name else weight
            assert abs(real.std().item() / std - 1) < 0.03, name
            assert abs(real.mean().item()) < std * 0.02, name
    assert not model.transformer.wte.weight[500:].any()
    idx, targets = batch(model, T=64)
    assert abs(model(idx, targets).item() - math.log(500)) < 0.1


def test_initial_weights_are_a_function_of_the_seed() -> None:
    model, other = GPT(small(), vocab_size=61), GPT(small(), vocab_size=61)
    torch.manual_seed(99)
    model.initialise(7)
    torch.manual_seed(100)
    other.initialise(7)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), atol=0, rtol=0)
    other.initialise(8)
    assert not torch.equal(model.transformer.wte.weight, other.transformer.wte.weight)


def test_gpt2_124m_has_its_parameters() -> None:
    config = ModelConfig(n_layer=12, n_head=12, n_embd=768, n_positions=1024)
    with torch.device("meta"):
        model = GPT(config, vocab_size=50257)
    assert model.num_params == parameter_count(config, 50257) == 124_439_808


@pytest.mark.parametrize("fields", [{}, {"norm": "none"}, {"n_inner": 50}, LLAMA, EXAONE])
def test_parameters_are_counted_without_building(fields: dict[str, object]) -> None:
    config = small(**fields)
    assert GPT(config, vocab_size=61).num_params == parameter_count(config, 61)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_follows_torchs_seed_and_ends_with_training(dtype: torch.dtype) -> None:
    model = rough(small(dropout=0.3))
    model.compute_dtype = dtype
    idx, targets = batch(model)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model(idx, targets))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    model.eval()
    assert torch.equal(model(idx, targets), model(idx, targets))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "fields"), [(torch.float32, {}), (torch.bfloat16, EXAONE)], ids=str
)
def test_compiled_equals_eager(dtype: torch.dtype, fields: dict[str, object]) -> None:
    model = rough(small(n_layer=1, vocab_size=64, **fields))
    model.compute_dtype = dtype
    idx, targets = batch(model, T=150)
    eager, compiled = model(idx, targets), torch.compile(model)(idx, targets)
    torch.testing.assert_close(compiled, eager, atol=1e-2, rtol=1e-2)
    expected = gradients(model, eager)
    for name, gradient in gradients(model, compiled).items():
        assert (gradient - expected[name]).norm() / expected[name].norm() < 0.05, name
