"""Devices that are not at hand: what a plan supposes where it is told to."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ByteSize, TypeAdapter, ValidationError

from billhook.layerworkers.errors import OptionError, nearest
from billhook.orchestrator.probe import LAUNCH_SECONDS, Rates
from billhook.orchestrator.recipe import Recipe

EFFICIENCY = 0.5
"""Share of what a data sheet promises that is counted on: of products, of disks, of copies."""

DISK_BYTES = 7e9
"""Of one NVMe drive on PCIe 4.0 x4, sequential reads, as their data sheets have it."""


@dataclass(frozen=True)
class Device:
    """A kind of worker."""

    kind: str
    """``cpu`` or ``cuda``."""
    memory_bytes: int | None
    """None: the machine's memory is as large as need be."""
    rates: Rates


def _derated(flops: float, float32_flops: float, copy_bytes: float, launch_seconds: float = 0.0) -> Rates:
    return Rates(
        EFFICIENCY * flops, EFFICIENCY * float32_flops, EFFICIENCY * DISK_BYTES, EFFICIENCY * copy_bytes, launch_seconds
    )


# NVIDIA's data sheets of the SXM boards: memory; BF16 tensor cores without sparsity; FP32 without tensor cores, which
# is what Grams, factors and solves use; PCIe in one direction.
DEVICES = {
    "a100": Device("cuda", 80_000_000_000, _derated(312e12, 19.5e12, 32e9, LAUNCH_SECONDS)),
    "h100": Device("cuda", 80_000_000_000, _derated(989e12, 67e12, 64e9, LAUNCH_SECONDS)),
    "b200": Device("cuda", 180_000_000_000, _derated(2250e12, 80e12, 64e9, LAUNCH_SECONDS)),
    # One core with two 512-bit FMA units at 3 GHz, 64 float32 operations a cycle; bfloat16 is taken to be no faster.
    "cpu-core": Device("cpu", None, _derated(192e9, 192e9, 20e9)),
}

BANDWIDTH_BYTES = 12.5e9
"""Per second, between workers: a connection of 100 Gbit/s for each."""


@dataclass(frozen=True)
class Supposition:
    """What a plan supposes rather than finds out."""

    device: str | None = None
    """Each worker has one of these, a name of :data:`DEVICES`, on a node of its own; None: what is here."""
    bandwidth_bytes: float | None = None
    """Per second, into or out of a worker, each on a node of its own."""


NOTHING_SUPPOSED = Supposition()


def supposition(device: str | None, bandwidth: float | str | None) -> Supposition:
    """Check the options ``--assume-device`` and ``--bandwidth`` (bytes per second, or as ``12GB/s``).

    Raises:
        InputError: for an unknown device, or a bandwidth that is none.
    """
    if device is not None and device not in DEVICES:
        known = ", ".join(DEVICES)
        raise OptionError(f"--assume-device {device}: unknown{nearest(device, list(DEVICES))}; known are {known}")
    if bandwidth is None:
        return Supposition(device)
    try:
        size = float(TypeAdapter(ByteSize).validate_python(str(bandwidth).removesuffix("/s")))
    except ValidationError:
        size = 0.0
    if size <= 0:
        raise OptionError(f"--bandwidth {bandwidth}: expected bytes per second, as 12GB/s")
    return Supposition(device, size)


def on_device(recipe: Recipe, supposed: Supposition) -> Recipe:
    """Return the recipe for the device that is supposed.

    Raises:
        InputError: when it asks for a device of another kind.
    """
    if supposed.device is None:
        return recipe
    kind = DEVICES[supposed.device].kind
    if recipe.device not in ("auto", kind):
        raise OptionError(f"--device {recipe.device} contradicts --assume-device {supposed.device}; leave it out")
    return recipe.model_copy(update={"device": kind})
