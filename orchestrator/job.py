"""What is done to the blocks, as far as it decides memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from billhook.layerworkers.block_facts import Footprint, deviations_of
from billhook.layerworkers.methods import Alternation, Method, Rounds, Solver
from billhook.layerworkers.patterns import Pattern
from billhook.layerworkers.sharing import (
    CPU_FLOPS_PER_SECOND,
    FAR_BYTES_PER_SECOND,
    FAR_EXCHANGE_SECONDS,
    GPU_FLOPS_PER_SECOND,
    NEAR_BYTES_PER_SECOND,
    NEAR_EXCHANGE_SECONDS,
    Pace,
    Shared,
    Work,
    shared_of,
    work_of,
)
from billhook.layerworkers.stages import in_stages
from billhook.layerworkers.statistics import Statistic, covering, with_deviations
from billhook.orchestrator.layout import Block, Linear
from billhook.orchestrator.recipe import Recipe

Stage = Sequence[Sequence[Linear]]
"""Linears that are solved together, by their inputs."""


@dataclass(frozen=True)
class GradientWork:
    """A pass forward and back for the gradients of the model's loss, before anything is pruned."""

    samples: int
    blocks: int
    """Whose inputs are all kept."""
    head_bytes: int
    """What the gradient by the last block's output takes, of one sample."""


@dataclass(frozen=True)
class Job:
    """What is done to the blocks, as far as it decides memory and time."""

    recipe: Recipe
    method: Method
    """Of the linears that have no other."""
    options: Any
    pattern: Pattern
    samples: int
    """0 for methods that need none."""
    near: bool = False
    """Whether all workers are on one machine."""
    bandwidth_bytes: float | None = None
    """Per second, into or out of a worker; None: not told."""
    beside_bytes: int = 0
    """Memory of what runs beside on the node, as Ray's dashboard."""
    others: Mapping[str, Solver] = field(default_factory=dict)
    """What solves the linears that another method is for, by their names on disk."""
    gradients: GradientWork | None = None
    """None: no method asks for it."""

    @property
    def pace(self) -> Pace:
        """What workers are assumed to do in a second, where solves are shared out."""
        return Pace(
            CPU_FLOPS_PER_SECOND if self.recipe.device == "cpu" else GPU_FLOPS_PER_SECOND,
            NEAR_EXCHANGE_SECONDS if self.near else FAR_EXCHANGE_SECONDS,
            self.bandwidth_bytes or (NEAR_BYTES_PER_SECOND if self.near else FAR_BYTES_PER_SECOND),
        )

    @property
    def partitions(self) -> int:
        """Partitions of the samples."""
        return -(-self.samples // self.recipe.partition_samples)

    def statistic(self, facts: BlockWork, linears: Sequence[Linear]) -> Statistic | None:
        """Return what is summed at the input of some linears of a block."""
        group = facts.block.groups[linears[0].group]
        if not self.recipe.correction or group.experts:
            asked = (self.solver(linear).method.statistic for linear in linears)
            return covering([statistic for statistic in asked if statistic is not None])
        return with_deviations(deviations_of(group, linears[0].shape))

    def shared(self, facts: BlockWork, linears: Sequence[Linear]) -> Shared:
        """Return what the linears of one input share."""
        statistic = self.statistic(facts, linears)
        methods = [self.solver(linear).method for linear in linears]
        return shared_of(methods, linears[0].shape[1], 0 if statistic is None else statistic.deviations)

    def solver(self, linear: Linear) -> Solver:
        """Return what a linear is solved by."""
        return self.others.get(linear.disk_name) or Solver(self.method, self.options)

    @property
    def sums(self) -> bool:
        """Whether anything is summed over tokens."""
        methods = [self.method, *(solver.method for solver in self.others.values())]
        return any(method.statistic is not None for method in methods)

    @property
    def streams(self) -> int:
        """In how many ways each sample is carried through the blocks."""
        return 2 if self.recipe.correction or self.recipe.reconstruct else 1

    @property
    def copies(self) -> int:
        """How many hidden states of each sample are held: of a block that is tuned, those that entered it, too.

        So are those of one whose linears are pruned in turns. Of one that is tuned in rounds, what goes through it in a
        round, and what is to come out.
        """
        again = self.recipe.reconstruct > 0 or self.alternation is not None
        return self.streams + again + (2 if self.rounds is not None else 0)

    @property
    def rounds(self) -> Rounds | None:
        """What is done to each block before it is pruned for good, where a method asks for the gradients of it."""
        solvers = [Solver(self.method, self.options), *self.others.values()]
        asked = [each.method.rounds(each.options) for each in solvers if each.method.rounds is not None]
        return max(asked, key=lambda each: each.count, default=None)

    def in_rounds(self, facts: BlockWork) -> list[Linear]:
        """Return the linears of a block whose methods ask for gradients."""
        return [linear for linear in facts.linears if self.solver(linear).method.rounds is not None]

    @property
    def alternation(self) -> Alternation | None:
        """How feed-forward networks are pruned in turns, where a method asks for it."""
        solvers = [Solver(self.method, self.options), *self.others.values()]
        asked = [each.method.alternation(each.options) for each in solvers if each.method.alternation is not None]
        return next((each for each in asked if each.epochs), None)

    def in_turns(self, facts: BlockWork) -> list[Linear]:
        """Return the linears of a block's feed-forward network, the last one last, if they are pruned in turns."""
        if self.alternation is None:
            return []
        by_name = {each.name: each for each in facts.linears if self.solver(each).method.alternation is not None}
        return [by_name[name] for name in facts.block.feed_forward if name in by_name]

    def in_gradients(self, facts: BlockWork) -> list[Linear]:
        """Return the linears of a block whose methods ask for the gradients of the model's loss."""
        return [linear for linear in facts.linears if self.solver(linear).method.model_gradients is not None]

    def work(self, linear: Linear) -> Work:
        """Return what solving a linear is."""
        solver = self.solver(linear)
        return work_of(solver.method, self.pattern, solver.options, *linear.shape)


@dataclass(frozen=True)
class BlockWork:
    """One block, as far as it decides memory and time."""

    block: Block
    linears: tuple[Linear, ...]
    """Those to prune."""
    footprint: Footprint
    next_bytes: int
    """Of the next block's tensors on disk."""

    def kind(self, job: Job) -> object:
        """Return what two blocks have in common that need the same."""
        footprint, groups = self.footprint, self.block.groups
        waiting = tuple(sorted(footprint.waiting_bytes.items()))
        linears = tuple(
            (
                *(linear.group, linear.shape, linear.item_bytes, job.solver(linear).method.name),
                bool(groups[linear.group].residual),
            )
            for linear in self.linears
        )
        tensors = tuple((tensor.entry.dtype, tensor.entry.size_bytes) for tensor in self.block.tensors)
        return (
            footprint.hidden_bytes,
            footprint.running_bytes,
            footprint.made_bytes,
            waiting,
            self.next_bytes,
            linears,
            tensors,
        )

    @cached_property
    def groups(self) -> dict[int, list[Linear]]:
        """The linears to prune by their input."""
        groups: dict[int, list[Linear]] = {}
        for linear in self.linears:
            groups.setdefault(linear.group, []).append(linear)
        return groups

    def stages(self, experts_at_once: int) -> list[list[list[Linear]]]:
        """Return the linears to prune by stage and input.

        experts_at_once: as of :class:`billhook.layerworkers.tasks.Placement`.
        """
        if experts_at_once not in self._stages:
            groups = self.groups
            numbers = {self.block.groups[number]: number for number in sorted(groups)}
            counts = {each.experts: experts_at_once or self.experts for each in numbers}
            self._stages[experts_at_once] = [
                [groups[numbers[group]] for group in stage] for stage in in_stages(list(numbers), counts)
            ]
        return self._stages[experts_at_once]

    @cached_property
    def _stages(self) -> dict[int, list[list[list[Linear]]]]:
        return {}

    @property
    def experts(self) -> int:
        """How many experts the block's layers have; 0: it has none."""
        return self.block.experts

    @property
    def routings(self) -> int:
        """How often a sample's tokens are sent to experts some of which are pruned."""
        pruned = {self.block.groups[number].experts for number in self.groups}
        return sum(not each.linears and each.share < 1 and each.experts in pruned for each in self.block.groups)

    def share(self, linear: Linear) -> float:
        """Return the share of the tokens that a linear is fitted to."""
        return self.block.groups[linear.group].share

    def forward_flops(self, tokens: int) -> float:
        """Return what running so many tokens through the block computes, where experts are sent as many each."""
        return sum(2.0 * self.share(each) * tokens * each.shape[0] * each.shape[1] for each in self.block.linears)

    def stage_kind(self, job: Job, stage: Stage) -> object:
        """Return what stages have in common that need the same."""
        groups = self.block.groups
        shapes = tuple(
            tuple(
                (
                    *(linear.kind, linear.shape, linear.item_bytes, job.solver(linear).method.name),
                    bool(groups[linear.group].residual),
                )
                for linear in linears
            )
            for linears in stage
        )
        return shapes, self.waiting(stage)

    def waiting(self, stage: Sequence[Sequence[Linear]]) -> int:
        """Return the most that one sample holds before the inputs of ``stage``."""
        return max(self.footprint.waiting_bytes[self.block.groups[linears[0].group].stop] for linears in stage)
