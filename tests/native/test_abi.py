"""The library's interface as Python sees it: described by the compiler, typed at every call."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from gptray.native import abi
from gptray.native.abi import check_abi, load_library
from gptray.native.backend import GENERATE_KEY, TRAIN_KEY
from tests.generation.models import needs_native

pytestmark = needs_native


@pytest.fixture(scope="module")
def description() -> str:
    library = load_library(key=GENERATE_KEY)
    text: bytes = library.decode_abi() + library.train_abi()
    return text.decode()


def test_the_library_describes_every_constant_and_structure(description: str) -> None:
    check_abi(description)
    names = [re.split(r"\W", line)[0] for line in description.splitlines() if "(" not in line]
    structs = [struct.__name__ for struct in abi.STRUCTS]
    assert sorted(names) == sorted([*abi.CONSTANTS, *structs])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("PANEL 64", "PANEL 32"),
        lambda text: text.replace("Norm 24", "Norm 32"),
        lambda text: text.replace("eps f32 16", "eps f32 20"),
        lambda text: text.replace("weight f32* 0, bias f32* 8", "bias f32* 0, weight f32* 8"),
        lambda text: text.replace("inputs i32 24", "in i32 24"),
        lambda text: text.partition("\n")[2],
    ],
)
def test_a_library_with_another_interface_is_refused(
    description: str, change: Callable[[str], str]
) -> None:
    changed = change(description)
    assert changed != description
    with pytest.raises(AssertionError, match=r"abi\.py and the native library differ:\n *\S+: "):
        check_abi(changed)


def test_a_difference_names_both_lines(description: str) -> None:
    with pytest.raises(AssertionError) as told:
        check_abi(description.replace("eps f32 16", "eps f64 16"))
    ours = "Norm 24: weight f32* 0, bias f32* 8, eps f32 16"
    assert str(told.value).splitlines()[1:] == [
        f"abi.py: {ours}",
        f"   C++: {ours.replace('f32 16', 'f64 16')}",
    ]


def test_a_tensor_of_another_type_or_with_gaps_is_refused() -> None:
    library = load_library(key=TRAIN_KEY)
    x, y = torch.ones(2, 6).bfloat16(), torch.empty(2, 6).bfloat16()
    weight, bias = torch.ones(6), torch.zeros(6)
    library.layer_norm(x, weight, bias, y, 1e-5, 2, 6, 1)
    assert torch.equal(y, torch.zeros(2, 6).bfloat16())
    gaps = torch.ones(2, 8).bfloat16()[:, :6]
    for tensors in ([weight, x, bias, y], [x, weight, bias, gaps], [x.float(), weight, bias, y]):
        with pytest.raises(Exception, match=r"torch\.\S+ for \S+\*|is not contiguous"):
            library.layer_norm(*tensors, 1e-5, 2, 6, 1)
    with pytest.raises(TypeError, match="takes at least 8 arguments"):
        library.layer_norm(x, weight, bias, y, 1e-5, 2, 6)
