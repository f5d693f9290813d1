"""Where workers go: bundles of CPUs and GPUs that Ray reserves together."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from billhook.layerworkers.errors import NoWorkersError

PLACEMENT_SECONDS = 120.0
"""How long to wait for a place for at least one worker."""

TRY_SECONDS = 20.0
"""How long a reservation may take before what is free is looked at again: a node may have died meanwhile."""

LOOK_SECONDS = 0.5

ANSWER_SECONDS = 3.0
"""How long a node may take to accept a connection."""


@dataclass(frozen=True)
class Share:
    """What one worker takes of a node."""

    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.cpus} CPU(s)" + (" and a GPU" if self.gpus else "")


@dataclass(frozen=True)
class Reservation:
    """Places for workers, until :meth:`release`."""

    group: Any
    share: Share
    size: int

    def options(self, rank: int) -> dict[str, Any]:
        """Return the options with which the actor of a rank is created."""
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)
        return {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "scheduling_strategy": strategy}

    def release(self) -> None:
        """Give the places back."""
        remove_placement_group(self.group)


def free_places(share: Share) -> int:
    """Return how many more workers the nodes have room for now."""
    from ray._private.state import available_resources_per_node

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return sum(
        int(
            min(
                free.get("CPU", 0.0) // share.cpus,
                free.get("GPU", 0.0) // share.gpus if share.gpus else float("inf"),
            )
        )
        for node, free in available_resources_per_node().items()
        if node in alive
    )


def silent_nodes() -> list[str]:
    """Return the addresses of the nodes that Ray takes to be alive, but that accept no connection.

    Ray asks such a node for its share of a placement group, and until that request fails, after minutes, it grants no
    other group.
    """
    return [
        node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and not _accepts(node["NodeManagerAddress"], node["NodeManagerPort"])
    ]


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def reserve(most: int, enough: int, share: Share, patience_seconds: float) -> Reservation:
    """Reserve places for as many workers as there is room for, ``most`` at most and one at least.

    enough: wait for room for so many, but no longer than ``patience_seconds`` unless there is none at all.

    Raises:
        RunError: when there is no place for a single one, or Ray does not answer.
    """
    begin = time.monotonic()
    silent: list[str] = []
    try:
        while time.monotonic() < begin + PLACEMENT_SECONDS:
            places = free_places(share)
            if silent := silent_nodes():
                time.sleep(LOOK_SECONDS)
                continue
            if places < enough and (not places or time.monotonic() < begin + patience_seconds):
                time.sleep(LOOK_SECONDS)
                continue
            found = _reserve(min(places, most), share)
            if found is not None:
                return found
        reason = f"the cluster has {ray.cluster_resources()}, of which {ray.available_resources()} is free"
        if silent:
            reason += f", and {', '.join(silent)} does not answer"
    except RayError as error:
        raise NoWorkersError(f"Ray does not answer: {error}; run the same command again to go on") from error
    raise NoWorkersError(f"no worker of {share} could be placed within {PLACEMENT_SECONDS:g} s: {reason}")


def _reserve(size: int, share: Share) -> Reservation | None:
    """Return places for ``size`` workers; None when Ray does not grant them in time."""
    bundle = {"CPU": share.cpus, **({"GPU": share.gpus} if share.gpus else {})}
    group = placement_group([bundle] * size, strategy="PACK")
    begin = time.monotonic()
    while not group.wait(LOOK_SECONDS):
        if time.monotonic() > begin + TRY_SECONDS:
            remove_placement_group(group)
            return None
    return Reservation(group, share, size)


def on_this_node() -> dict[str, Any]:
    """Return the options with which an actor is created on the driver's node."""
    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
