"""How many workers and on which nodes: ranges, labels, and what is wrong with them."""

from __future__ import annotations

import pytest

from gptray.config import Config, ConfigError, dump, load_config


def loaded(*words: str) -> Config:
    return load_config(None, words)


def test_a_range_of_workers_is_read_and_written_as_a_list() -> None:
    config = loaded("compute.num_workers=[1, 4]")
    assert (config.compute.min_workers, config.compute.max_workers) == (1, 4)
    assert config.compute.is_elastic and not loaded("compute.num_workers=4").compute.is_elastic
    assert "num_workers: [1, 4]" in dump(config) or "- 4" in dump(config)


def test_a_range_fixes_the_micro_batch_whatever_the_number_of_workers() -> None:
    config = loaded("compute.num_workers=[1, 4]", "train.global_batch_size=32")
    assert config.micro_batch_size == 8 and config.micro_batches == 4
    uneven = loaded(
        "compute.num_workers=[2, 3]", "train.global_batch_size=32", "train.micro_batch_size=4"
    )
    assert uneven.micro_batches == 8 and uneven.grad_accum_steps == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compute.num_workers=[4, 1]"], "[4, 1]: the smaller number comes first, such as [1, 4]"),
        (["compute.num_workers=[0, 2]"], "or a list of 2 whole numbers, got [0, 2]"),
        (["compute.num_workers=[1, 2, 3]"], "a whole number or a list of 2 whole numbers"),
        (
            ["compute.num_workers=[1, 3]", "train.global_batch_size=32"],
            "train.global_batch_size=32 must be divisible by the maximum of "
            "compute.num_workers=[1, 3], such as 33",
        ),
        (
            ["compute.num_workers=[1, 4]", "train.async_validation=true"],
            "train.async_validation=true needs a fixed number of workers, such as "
            "compute.num_workers=4, not [1, 4]",
        ),
        (["compute.label_selector=[spot]"], "compute.label_selector: 'spot' is not NAME=VALUE"),
        (["compute.label_selector=['a=in(x']"], "'a=in(x' is not NAME=VALUE"),
        (["compute.label_selector=[a=b, a=c]"], "name a label twice"),
        (
            ["compute.label_selector=[ray.io/accelerator-type=L4]", "compute.accelerator_type=L4"],
            "name a label twice",
        ),
    ],
)
def test_wrong_ranges_and_labels_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(*words)
    assert expected in str(caught.value)


def test_labels_and_the_accelerator_become_one_selector() -> None:
    compute = loaded(
        "compute.label_selector=[ray.io/market-type=!spot, 'disk=in(ssd, nvme)']",
        "compute.accelerator_type=H100",
    ).compute
    assert compute.selector == {
        "ray.io/market-type": "!spot",
        "disk": "in(ssd, nvme)",
        "ray.io/accelerator-type": "H100",
    }
