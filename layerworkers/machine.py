"""What of a machine decides bits: runs go on, and workers act together, only where these are equal."""

from __future__ import annotations

import platform
from importlib.metadata import version
from importlib.util import find_spec

import torch
from threadpoolctl import threadpool_info

from billhook.kernels.gram import cpu_multiplies_bfloat16

LIBRARIES = ("billhook", "torch", "transformers", "safetensors", "numpy", "scipy", "numba", "tokenizers")


def machine_facts(device: str) -> dict[str, str]:
    """Return architecture, instruction sets, the kernels that BLAS chose and, for ``cuda``, the GPU's model."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    blas = {f"{each['internal_api']} {each['architecture']}" for each in threadpool_info() if "architecture" in each}
    facts = {
        "architecture": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "flags": " ".join(sorted(name for name, value in capabilities.items() if value is True)),
        "vendor": str(capabilities.get("cpu_name", "")).partition(" ")[0],
        "blas": ", ".join(sorted(blas)),
        "gram": "bfloat16" if cpu_multiplies_bfloat16() else "float32",
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["triton"] = version("triton") if find_spec("triton") is not None else "none"
    return facts


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide bits."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
