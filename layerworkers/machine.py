"""What of a machine decides bits: runs go on, and workers act together, only where these are equal."""

from __future__ import annotations

import platform

import torch


def machine_facts(device: str) -> dict[str, str]:
    """Return architecture, instruction set and, for ``cuda``, the GPU's model."""
    facts = {"architecture": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability()}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(0)
    return facts
