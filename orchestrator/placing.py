"""The fastest way of working that the budgets allow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from billhook.layerworkers.errors import BudgetError
from billhook.layerworkers.tasks import Placement
from billhook.orchestrator.budgets import Budgets
from billhook.orchestrator.job import BlockWork, Job
from billhook.orchestrator.needs import Need, at_tier, larger, sum_of
from billhook.orchestrator.phases import (
    block_phases,
    processes_bytes,
    sizes_bytes,
    store_bytes,
)
from billhook.orchestrator.probe import Rates

RAM_TRUST = 0.97
"""Share of the RAM budget that is planned with: what processes take is not known to the last page."""


class DoesNotFitError(BudgetError):
    """No way of working fits the budgets."""

    def __init__(self, reason: str, smallest: Budgets):
        super().__init__(reason)
        self.smallest = smallest
        """The budgets, with the one that is exceeded raised to what works."""


@dataclass(frozen=True)
class Arrangement:
    """A way of working for the whole run."""

    workers: int
    on_gpu: bool
    activations: str
    """``device``, ``ram`` or ``disk``."""
    placements: tuple[Placement, ...]
    """By block."""
    phases: Mapping[str, Need]
    """By phase, at the worst block."""
    peak: Need
    """Device: of one worker (on a CPU a part of RAM); the others: of the node, processes included."""
    extra_seconds: float
    """What it takes longer than if all memory were there."""


def arrange(
    job: Job,
    blocks: Sequence[BlockWork],
    budgets: Budgets,
    rates: Rates,
    worker_counts: Sequence[int],
    own_bytes: int,
    wanted: Mapping[str, str],
    output_bytes: int,
    head: Need | None = None,
    per_node: int | None = None,
) -> Arrangement:
    """Return the fastest way of working that the budgets allow.

    worker_counts: those allowed, the best first. wanted: tiers that the user fixed, by option. head: what each worker
    needs after the blocks, beside its activations. per_node: how many workers share a node's RAM and disk, those that
    need most; None: all of them.

    Raises:
        DoesNotFitError: when none is: the smallest budget that would do is named.
    """
    smallest: dict[str, int] = {}
    _check_output(budgets, output_bytes)
    left = [] if budgets.disk is None else [budgets.disk - output_bytes]
    left += [] if budgets.scratch_disk is None else [budgets.scratch_disk]
    within = replace(budgets, disk=min(left, default=None))
    for workers in worker_counts:
        best: Arrangement | None = None
        for activations in _tiers(wanted["activations"]):
            made = _arrange_with(
                job,
                blocks,
                within,
                rates,
                workers,
                activations,
                own_bytes,
                wanted,
                smallest,
                head,
                workers if per_node is None else min(workers, per_node),
            )
            if made is not None and (best is None or made.extra_seconds < best.extra_seconds):
                best = made
        if best is not None:
            return best
    raise _misfit(budgets, smallest, output_bytes, job)


def _misfit(budgets: Budgets, smallest: Mapping[str, int], output_bytes: int, job: Job) -> DoesNotFitError:
    if "ram" not in smallest and "disk" in smallest:
        disk = smallest["disk"] + output_bytes
        return DoesNotFitError(
            f"--disk: of {_mib(budgets.disk or 0)} that may be used, {_mib(output_bytes)} are for the output; scratch "
            f"files need {_mib(smallest['disk'])}, together --disk {_mib(disk)}; free some space, choose another -o or "
            "--scratch, or raise --disk",
            replace(budgets, disk=disk, scratch_disk=None),
        )
    # What fails for RAM alone fits the device: so RAM it is, where both fail.
    option = "ram" if "ram" in smallest else "vram"
    # Rounded up: the size of our own processes differs a little from one command to the next.
    margin = 1.01 / RAM_TRUST if option == "ram" else 1.01
    enough = -(-int(margin * smallest[option]) // 2**20) * 2**20
    budget = budgets.ram if option == "ram" else budgets.vram or 0
    return DoesNotFitError(
        f"--{option} {_mib(budget)}: too small for the largest phase of the largest block, whatever else is kept on "
        f"disk; the smallest budget that works is --{option} {_mib(enough)} (for {job.samples} sequences of "
        f"{job.recipe.seqlen} tokens, dtype {job.recipe.dtype})",
        replace(budgets, ram=enough) if option == "ram" else replace(budgets, vram=enough),
    )


def _arrange_with(
    job: Job,
    blocks: Sequence[BlockWork],
    budgets: Budgets,
    rates: Rates,
    workers: int,
    activations: str,
    own_bytes: int,
    wanted: Mapping[str, str],
    smallest: dict[str, int],
    head: Need | None,
    per_node: int,
) -> Arrangement | None:
    """Choose each block's placement, given where the activations are; None where a block has none that fits."""
    fixed = processes_bytes(per_node, own_bytes) + store_bytes(workers) + job.beside_bytes
    chosen: dict[object, tuple[Placement, dict[str, list[Need]], float]] = {}
    placements: list[Placement] = []
    phases: dict[str, Need] = {}
    peak, extra = Need(0, 0, 0), 0.0
    short: dict[str, int] = {}
    on_cpu = job.recipe.device == "cpu"
    for facts in blocks:
        kind = facts.kind(job)
        if kind not in chosen:
            options = []
            misses: dict[str, int] = {}
            for placement in _placements(job, wanted, facts.experts):
                by_phase = _by_phase(block_phases(job, facts, placement, workers, activations))
                if head is not None:
                    hidden = facts.footprint.hidden_bytes * -(-job.samples // workers)
                    by_phase["head"] = [at_tier(activations, hidden) + head] * workers
                exceeded = _exceeded(_node(by_phase, per_node, fixed, on_cpu), budgets)
                for option, size in exceeded.items():
                    misses[option] = min(misses.get(option, size), size)
                if not exceeded:
                    options.append((placement, by_phase, _extra_seconds(job, facts, placement, workers, rates)))
            if not options:
                for option, size in misses.items():
                    short[option] = max(short.get(option, 0), size)
                continue
            chosen[kind] = min(options, key=lambda option: option[2])
        placement, by_phase, seconds = chosen[kind]
        placements.append(placement)
        extra += seconds
        for name, own in by_phase.items():
            total = _node({name: own}, per_node, fixed, on_cpu)
            phases[name] = larger(phases.get(name, total), total)
        peak = larger(peak, _node(by_phase, per_node, fixed, on_cpu))
    if short:
        for option, size in short.items():
            smallest[option] = min(smallest.get(option, size), size)
        return None
    if activations != "device" and job.samples:
        hidden = blocks[0].footprint.hidden_bytes * job.samples * job.streams
        extra += 2 * len(blocks) * hidden / (rates.disk_bytes if activations == "disk" else rates.copy_bytes)
    return Arrangement(workers, not on_cpu, activations, tuple(placements), phases, peak, extra)


def _by_phase(phases: Iterator[tuple[str, list[Need]]]) -> dict[str, list[Need]]:
    """Return each phase's largest needs, of those that come more than once."""
    by_phase: dict[str, list[Need]] = {}
    for name, needs in phases:
        so_far = by_phase.get(name, needs)
        by_phase[name] = [larger(one, other) for one, other in zip(so_far, needs, strict=True)]
    return by_phase


def _exceeded(need: Need, budgets: Budgets) -> dict[str, int]:
    """Return the budget that does not suffice, and what would: the device's before RAM's before the disk's."""
    if budgets.vram is not None and need.device > budgets.vram:
        return {"vram": need.device}
    if need.ram > RAM_TRUST * budgets.ram:
        return {"ram": need.ram}
    if budgets.disk is not None and need.disk > budgets.disk:
        return {"disk": need.disk}
    return {}


def _node(by_phase: Mapping[str, Sequence[Need]], per_node: int, fixed_bytes: int, on_cpu: bool) -> Need:
    """Return the device's worst phase on one worker, and the worst of RAM and disk over all workers of the node."""
    totals = [
        sum_of(sorted(own, key=lambda need: need.ram + need.device + need.disk)[-per_node:])
        for own in by_phase.values()
    ]
    return Need(
        max(each.device for own in by_phase.values() for each in own),
        fixed_bytes + max(total.ram + (total.device if on_cpu else 0) for total in totals),
        max(total.disk for total in totals),
    )


def _tiers(wanted: str) -> list[str]:
    return ["device", "ram", "disk"] if wanted == "auto" else [wanted]


def _placements(job: Job, wanted: Mapping[str, str], experts: int) -> Iterator[Placement]:
    dense = job.recipe.fit == "dense-block" or not job.samples
    intermediates = ["hold", "replay"] if dense else ["hold", "spill", "replay"]
    if wanted["intermediates"] != "auto":
        # The dense block is run without a pause: nothing waits that could be spilled.
        intermediates = ["hold" if dense and wanted["intermediates"] == "spill" else wanted["intermediates"]]
    statistics = _tiers(wanted["statistics"])
    at_once = [0, *(count for count in (experts // 4, experts // 16, 1) if 0 < count < experts)]
    for read_ahead, keep, tier, count in itertools.product([True, False], intermediates, statistics, at_once):
        for spill_to in ["ram", "disk"] if keep == "spill" else ["disk"]:
            yield Placement(keep, spill_to, tier, read_ahead, count)


def _extra_seconds(job: Job, facts: BlockWork, placement: Placement, workers: int, rates: Rates) -> float:
    """Return what a placement costs beyond holding everything on the device and overlapping all transfers."""
    seconds = 0.0
    samples = -(-job.samples // workers)
    parked = {"device": 0.0, "ram": 1 / rates.copy_bytes, "disk": 1 / rates.disk_bytes}
    if not placement.read_ahead:
        seconds += facts.next_bytes / rates.disk_bytes
    stages = facts.stages(placement.experts_at_once)
    seconds += len(stages) * job.pace.exchange_seconds  # no more of them than need be
    waiting = [facts.waiting(stage) for stage in stages]
    if placement.intermediates == "spill" and job.samples:
        seconds += 2 * job.streams * samples * sum(waiting) * parked[placement.spill_to]
    if placement.intermediates == "replay" and job.samples:
        forward = job.streams * facts.forward_flops(samples * (job.recipe.seqlen or 0))
        again = len(waiting) / 2 if job.recipe.fit == "lockstep" else max(0, len(waiting) - 1)
        seconds += again * forward / rates.flops
    if placement.statistics != "device" and job.sums:
        partitions = -(-job.partitions // workers)
        sizes = sizes_bytes(job, facts, list(facts.groups.values()))
        seconds += 2 * max(0, partitions - 1) * sizes * parked[placement.statistics]
    return seconds


def _check_output(budgets: Budgets, output_bytes: int) -> None:
    room = budgets.output_disk if budgets.output_disk is not None else budgets.disk
    if room is not None and output_bytes > room:
        raise DoesNotFitError(
            f"--disk: the output needs {_mib(output_bytes)}, and {_mib(room)} may be used on its disk; free some "
            "space, choose another -o, or raise --disk",
            replace(budgets, disk=max(budgets.disk or 0, output_bytes), output_disk=None),
        )


def _mib(size: int) -> str:
    """Return a size as options take it, rounded up."""
    return f"{-(-size // 2**20)}MiB"
