"""How sparse each linear should be, learnt block by block as the samples pass what was pruned so far."""

from __future__ import annotations

from billhook.layerworkers.besa import Learning, LearnTask
from billhook.layerworkers.errors import UnsupportedModelError
from billhook.orchestrator.events import Progress, Step
from billhook.orchestrator.passing import Load, Trial, passing
from billhook.orchestrator.phases import learning_by_gradients


def learnt_shares(trial: Trial, learning: Learning, report: Progress) -> list[float]:
    """Return the sparsity of each linear, block by block; see :func:`billhook.layerworkers.besa.learn_block`.

    Raises:
        InputError: for experts, through whose routing goes no gradient, or where it fits no budget.
        RunError: a worker failed.
    """
    request, samples = trial.request, len(trial.windows.tokens)
    blocks = request.model.layout.blocks
    if any(block.experts for block in blocks):
        raise UnsupportedModelError(
            f"--allocation {request.recipe.allocation}: {request.model.checkpoint.folder} is a mixture of experts, "
            "through whose routing goes no gradient; choose another allocator"
        )
    told = f"passes each block backward, with the hidden states of {samples} samples in two streams"
    load = Load(2, learning_by_gradients, told, dense_stream=True)
    found: list[float] = []
    with passing(trial, load, report) as pool:
        for block, linears in zip(blocks, request.linears, strict=True):
            task = LearnTask(
                block.index,
                block.tensors,
                tuple((linear.name, linear.disk_name) for linear in linears),
                learning,
                samples,
                tuple(tensor for later in blocks[block.index + 1 : block.index + 2] for tensor in later.tensors),
            )
            found += pool.learn_block(task)
            report(Step("allocate", block.index + 1, len(blocks), ""))
    return found
