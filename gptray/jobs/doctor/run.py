"""The doctor: checks every node of the cluster and says what to fix."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gptray.config import RunFailed
from gptray.jobs.cluster.cluster_nodes import NoAnswer, Node, alive_nodes, ask
from gptray.jobs.cluster.connection import ray_cluster
from gptray.jobs.cluster.shared_storage import blind_nodes, problem_of
from gptray.jobs.doctor.facts import ClusterFacts, Examined
from gptray.jobs.doctor.judgements import Finding, judge
from gptray.jobs.doctor.worker import clock, node_facts, two_gpus_add_up
from gptray.standard_output import line_printer
from gptray.storage.files import is_uri
from gptray.wording import count

log = logging.getLogger("gptray")


def run(storage_path: str) -> None:
    """Log a line for each check and print the JSON line. Raises RunFailed if a check fails."""
    print_line = line_printer()
    with ray_cluster():
        facts = look(storage_path)
    findings = judge(facts)
    for finding in findings:
        log.info("%s", finding.line)
    print_line(outcome(facts, findings))
    failed = [finding.check for finding in findings if finding.level == "fail"]
    if failed:
        raise RunFailed(f"{count(len(failed), 'problem')}: {', '.join(failed)}")


def look(storage_path: str) -> ClusterFacts:
    """Gather the facts of the cluster. Needs Ray."""
    nodes = alive_nodes()
    log.info("checking %s", count(len(nodes), "node"))
    answers = ask(nodes, node_facts, storage_path, about="their versions and disks")
    pairs = [*zip(nodes, answers, strict=True)]
    found = [(node, one) for node, one in pairs if not isinstance(one, NoAnswer)]
    ahead = _seconds_ahead([node for node, _ in found])
    return ClusterFacts(
        storage_path=storage_path,
        nodes=tuple(
            Examined(node, facts, seconds)
            for (node, facts), seconds in zip(found, ahead, strict=True)
        ),
        silent=tuple((node, one) for node, one in pairs if isinstance(one, NoAnswer)),
        blind=tuple(_blind(storage_path)),
        nccl=two_gpus_add_up() if sum(node.gpus for node in nodes) >= 2 else None,
    )


def _blind(storage_path: str) -> list[str]:
    """Which nodes cannot use storage_path, and why; a store must also answer this machine."""
    words = f"storage_path={storage_path}"
    if not is_uri(storage_path):
        return [str(one) for one in blind_nodes(written={words: Path(storage_path)})]
    if problem := problem_of([], [words]):
        return [": ".join(problem)]
    return [str(one) for one in blind_nodes(stores=[words])]


def _seconds_ahead(nodes: Sequence[Node]) -> list[float]:
    """How many seconds each node's clock is ahead of this one, at least; negative: behind.

    Nodes are asked one by one, so that each answer lies between two readings of this clock.
    """
    found = []
    for node in nodes:
        before = time.time()
        answer = ask([node], clock, about="the time")[0]
        after = time.time()
        told = before if isinstance(answer, NoAnswer) else answer
        found.append(max(0.0, told - after) + min(0.0, told - before))
    return found


def outcome(facts: ClusterFacts, findings: Sequence[Finding]) -> dict[str, object]:
    """The job's JSON line."""
    return {
        "ok": all(finding.level != "fail" for finding in findings),
        "problems": [finding.words for finding in findings if finding.level == "fail"],
        "warnings": [finding.words for finding in findings if finding.level == "warn"],
        "checks": [asdict(finding) for finding in findings],
        "nodes": [asdict(one) for one in facts.nodes],
    }
