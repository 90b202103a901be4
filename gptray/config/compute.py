"""The config's `compute` section: a job's workers, their resources and the nodes they run on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from gptray.config.limits import LARGEST
from gptray.config.values import NonEmpty, Positive, PositiveInt, Processes, Section

# The label that Ray sets on nodes whose accelerators it recognises.
ACCELERATOR_LABEL = "ray.io/accelerator-type"
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
# Ray's label selectors: zone=a, zone=!a, zone=in(a, b), zone=!in(a, b).
_WANTED = re.compile(rf"({_NAME}/)?{_NAME}=!?({_NAME}|in\({_NAME}(, ?{_NAME})*\))")


class ComputeConfig(Section):
    num_workers: Processes | tuple[Processes, Processes] = Field(
        1,
        description="data-parallel workers; [min, max]: as many as there is room for, changing "
        "as nodes come and go (Ray ScalingConfig)",
    )

    label_selector: list[NonEmpty] = Field(
        [],
        description="labels that a worker's node must have, such as [ray.io/market-type=spot, "
        "zone=!a, 'disk=in(ssd, nvme)'] (Ray label selectors)",
    )
    accelerator_type: NonEmpty | None = Field(
        None,
        description="accelerator that a worker's node must have, such as A100, H100 or L4 (Ray)",
    )

    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="ddp: each worker holds all weights and AdamW's state; fsdp: each holds a "
        "share, for models too large for one worker, with the same losses (FSDP2)",
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of gradients sent between workers; bf16: half the bytes, rounded "
        "(MixedPrecisionPolicy)",
    )
    use_gpu: bool = Field(False, description="one GPU for each worker (nccl); else CPUs (gloo)")
    gpus_per_worker: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="GPUs for each worker; below 1, trials of a sweep share a GPU (needs "
        "use_gpu and one worker)",
    )
    cpus_per_worker: PositiveInt | None = Field(
        None,
        description="cores of one worker; null: as many as let all workers fit, at most 4 on an "
        "existing cluster (RAY_ADDRESS); with a GPU, that GPU's share of its node's cores",
    )
    wait_s: Positive | None = Field(
        None,
        description="seconds to wait for room on a cluster before the job fails; null: no limit",
    )
    max_failures: Annotated[int, Field(ge=-1, le=LARGEST)] = Field(
        3, description="worker failures to recover from; -1: no limit (Ray FailureConfig)"
    )
    num_to_keep: PositiveInt = Field(
        2, description="newest checkpoints to keep, in addition to the best one"
    )

    @property
    def selector(self) -> dict[str, str]:
        """The labels that a worker's node must have, in Ray's format."""
        wanted = dict(one.split("=", 1) for one in self.label_selector)
        if self.accelerator_type:
            wanted[ACCELERATOR_LABEL] = self.accelerator_type
        return wanted

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while they train."""
        return isinstance(self.num_workers, tuple)

    @property
    def min_workers(self) -> int:
        """The fewest workers that training continues with."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def max_workers(self) -> int:
        """The most workers that train at a time."""
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def workers_shown(self) -> str:
        """`num_workers` as written in a config: 2, or [1, 4]."""
        workers = self.num_workers
        return f"[{workers[0]}, {workers[1]}]" if isinstance(workers, tuple) else f"{workers}"

    def broken_rules(self) -> Iterator[str]:
        for one in self.label_selector:
            if not _WANTED.fullmatch(one):
                yield (
                    f"compute.label_selector: {one!r} is not NAME=VALUE, NAME=!VALUE or "
                    "NAME=in(VALUE, VALUE)"
                )
        if len(self.selector) < len(self.label_selector) + (self.accelerator_type is not None):
            yield "compute.label_selector and compute.accelerator_type name a label twice"
        if self.min_workers > self.max_workers:
            yield (
                f"compute.num_workers={self.workers_shown}: the smaller number comes first, such "
                f"as [{self.max_workers}, {self.min_workers}]"
            )
        if self.gpus_per_worker < 1 and self.max_workers > 1:
            yield (
                f"compute.gpus_per_worker={self.gpus_per_worker:g} works only with one worker; "
                f"the workers of compute.num_workers={self.workers_shown} need a GPU each"
            )
