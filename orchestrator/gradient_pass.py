"""Take the gradients of the dense model's loss, before any block is pruned: a pass of samples forward and back."""

from __future__ import annotations

from billhook.layerworkers.errors import BlockLostError, Interrupted
from billhook.layerworkers.machine import library_versions, machine_facts
from billhook.layerworkers.reverse import ReverseTask
from billhook.orchestrator.block_loop import TRIES, Run
from billhook.orchestrator.calibration import deal_samples
from billhook.orchestrator.events import Step, Warned
from billhook.orchestrator.gradients import (
    are_complete,
    asking,
    complete_gradients,
    create_gradients,
    gradient_samples,
    gradients_of,
)
from billhook.orchestrator.journal import FOLDER
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.planning import with_workers
from billhook.orchestrator.workers import PATIENCE_SECONDS, ray_for, reserve_places, start_pool

NOTHING_USED = {"vram": 0, "ram": 0, "disk": 0}


def take_gradients(run: Run) -> dict[str, int]:
    """Write the gradients that methods ask for to the run's folder, unless an earlier command has.

    One that was ended in between begins with them again. Returns what was used at most, by tier; on disk, of scratch.

    Raises:
        Interrupted: when asked to end.
        InputError, RunError: as the pool does, or when workers were lost :data:`TRIES` times.
    """
    request = run.plan.request
    if not gradient_samples(request):
        return NOTHING_USED
    assert run.windows is not None
    if are_complete(request, run.windows.sha256, run.output):
        return NOTHING_USED
    used = NOTHING_USED
    for tries in range(1, TRIES + 1):
        try:
            create_gradients(request, run.output)
            used = _pass(run)
            break
        except BlockLostError as error:
            run.lock.check()
            if run.interruption.asked:
                raise Interrupted(str(error)) from error
            if tries == TRIES:
                raise
            run.report(Warned(f"the pass for gradients begins again: {error}"))
    run.lock.check()
    complete_gradients(request, run.windows.sha256, run.output)
    return used


def _pass(run: Run) -> dict[str, int]:
    plan, windows = run.plan, run.windows
    assert windows is not None
    request, workers = plan.request, plan.workers
    model, blocks, recipe = request.model, request.model.layout.blocks, request.recipe
    count = gradient_samples(request)
    steps = 2 * len(blocks)

    def at(done: int) -> None:
        run.report(Step("gradients", done, steps, ""))
        if run.interruption.asked:
            raise Interrupted("ended in the pass for gradients; the same command begins that again")

    with ray_for(workers, model.device, run.report) as memory:
        places = reserve_places(workers, model.device, workers.count, PATIENCE_SECONDS)
        plan = with_workers(plan, places.size)
        scratch = str(user_path(plan.resources.scratch) if plan.resources.scratch else run.output / FOLDER)
        setup = model.worker_setup(workers.threads, plan.arrangement.activations, scratch, run.access)
        expected = library_versions() | machine_facts(model.device)
        with (
            start_pool(setup, places, run.interruption.deadline, expected) as pool,
            run.interruption.polled(),
        ):
            pool.start(model.layout.stem, deal_samples(windows.first(count), recipe.partition_samples, pool.size))
            for block in blocks:
                later = blocks[block.index + 1 : block.index + 2]
                pool.enter_block(block.index, block.tensors, later[0].tensors if later else ())
                at(block.index + 1)
            pool.turn_back()
            for block in reversed(blocks):
                entries = gradients_of(request, block.index, run.output)
                before = blocks[block.index - 1].tensors if block.index else ()
                task = ReverseTask(
                    block.index,
                    block.tensors,
                    {linear.name: entries[linear.disk_name] for linear in asking(request, block.index)},
                    count,
                    max(1, (recipe.seqlen or 0) - 1),
                    recipe.partition_samples,
                    plan.arrangement.placements[block.index].statistics,
                    before,
                )
                pool.leave_block(task)
                at(steps - block.index)
            pool.finish_writing()
            vram_bytes, scratch_bytes = pool.peak_vram_bytes(), pool.scratch_bytes()
    return {"vram": vram_bytes, "ram": memory.peak_bytes, "disk": scratch_bytes}
