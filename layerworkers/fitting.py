"""From a block's inputs to the solves of its linears: which statistics are summed when, and what is solved together.

In lockstep, a linear is fitted to inputs that passed the sparse linears before it, in one forward pass. Fitted to the
dense block, it sees what the dense block gives it, and a second pass carries the samples on.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from billhook.layerworkers.block_facts import Arguments, InputGroup, deviations_of
from billhook.layerworkers.collective import Collective
from billhook.layerworkers.coverage import instead, starved_experts, summed
from billhook.layerworkers.experts import Experts, tokens_of
from billhook.layerworkers.lockstep import Arriving, DenseStream, run_lockstep, run_observed, run_plain
from billhook.layerworkers.methods import method_named
from billhook.layerworkers.reduction import Node, give_up
from billhook.layerworkers.scratch import Parking
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.solving import Together
from billhook.layerworkers.stages import Stage, in_stages
from billhook.layerworkers.statistics import Accumulator, Statistic, covering, with_deviations
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.tasks import BlockTask, LinearReport, LinearTask

Solve = Callable[[Sequence[Together]], None]
"""Prunes the linears of several inputs, given this worker's sums of the statistics of these."""


class BlockFit:
    """One worker's part in pruning one block; used once."""

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[InputGroup],
        task: BlockTask,
        samples: Sequence[int],
        device: torch.device,
        parking: Callable[[str], Parking | None],
        group: Collective,
        watch: Stopwatch,
        solve: Solve,
        dense: DenseStream | None = None,
    ):
        """groups: all of the block's. samples: the indices of this worker's. parking: where tensors of a tier go.

        dense: where linears are corrected; the same samples.
        """
        self._dense = dense
        self._block, self._task, self._samples = block, task, samples
        self._device, self._parking, self._group, self._watch, self._solve = device, parking, group, watch, solve
        self._linears = {linear.name: linear for linear in task.linears}
        self._experts = {path: module for path, module in block.named_modules() if isinstance(module, Experts)}
        self._at_once = {path: task.placement.experts_at_once or each.count for path, each in self._experts.items()}
        self._tokens: dict[str, list[int]] = {}
        self._starved: dict[str, frozenset[int]] = dict.fromkeys(self._experts, frozenset())
        self._groups: list[InputGroup] = []
        self._collected: dict[InputGroup, TensorEntry] = {}
        for each in groups:
            chosen = replace(each, linears=tuple(name for name in each.linears if name in self._linears))
            if chosen.linears or self._decides(each):
                self._groups.append(chosen)
            if chosen.linears and each.linears[0] in task.collected:
                self._collected[chosen] = task.collected[each.linears[0]]

    def run(self, hidden: MutableSequence[Tensor], arguments: Arguments | None) -> None:
        """Prune the block and replace each sample's hidden state by the sparse block's output."""
        shown_all = {path: each.shown_all for path, each in self._experts.items()}
        for path, each in self._experts.items():
            each.at_once = self._at_once[path]
        try:
            (self._in_lockstep if self._task.fit == "lockstep" else self._to_dense_block)(hidden, arguments)
        finally:
            for path, each in self._experts.items():
                each.shown_all = shown_all[path]

    def run_without_samples(self) -> None:
        """Prune the block by what was collected of the inputs of its linears; no sample goes through it."""
        for stage in in_stages(self._groups, self._at_once):
            if stage[0].linears:
                self._solve_stage(stage, {})

    def described(self, report: LinearReport, name: str, transposed: bool) -> LinearReport:
        """Return a linear's report with how it is stored, and what is known of the tokens that its expert is sent."""
        report = replace(report, transposed=transposed)
        path, number = self._expert_of(name)
        if path not in self._tokens:
            return report
        fallback = self._fallback(path) if number in self._starved[path] else ""
        return replace(report, tokens=self._tokens[path][number], fallback=fallback)

    def _in_lockstep(self, hidden: MutableSequence[Tensor], arguments: Arguments | None) -> None:
        def on_stage(stage: Stage, arriving: Arriving) -> None:
            if not stage[0].linears:
                counts = [0] * self._experts[stage[0].experts].count
                for _, _, x, _ in arriving:
                    counts = [a + b for a, b in zip(counts, tokens_of(x, len(counts)), strict=True)]
                self._decide(stage[0].experts, counts)
                return
            sums = self._accumulators(stage)
            for position, group, x, deviation in arriving:
                if group in sums:
                    with self._watch.part("statistics"):
                        sums[group].add(self._samples[position], x, deviation)
            self._solve_stage(stage, {group: each.nodes() for group, each in sums.items()})

        run_lockstep(
            self._block,
            in_stages(self._groups, self._at_once),
            hidden,
            arguments,
            on_stage,
            self._task.placement.intermediates,
            self._parking(self._task.placement.spill_to),
            self._dense,
        )

    def _to_dense_block(self, hidden: MutableSequence[Tensor], arguments: Arguments | None) -> None:
        """Sum the statistics of all groups in one pass, or of one stage after the other where room is short.

        In one pass, those of experts that turn out to be starved are summed again.
        """
        stages = in_stages(self._groups, self._at_once)
        one_by_one = self._task.placement.intermediates == "replay"
        sums: dict[InputGroup, list[Node]] = {}
        for together in stages if one_by_one else [self._groups]:
            sums |= self._observed(together, hidden, arguments, one_by_one)
        if not one_by_one and any(self._starved.values()):
            for group in self._groups:
                if self._is_starved(group):
                    give_up(sums.pop(group, []))
            again = [group for group in self._groups if self._is_starved(group)]
            sums |= self._observed(again, hidden, arguments, one_by_one)
        for stage in stages:
            if stage[0].linears:
                self._solve_stage(stage, {group: sums.pop(group, []) for group in stage})
        run_plain(self._block, hidden, arguments)

    def _observed(
        self, groups: Sequence[InputGroup], hidden: Sequence[Tensor], arguments: Arguments | None, park: bool
    ) -> dict[InputGroup, list[Node]]:
        """Run the block as it is for the statistics of some groups, and for the experts that their routings choose."""
        sums = self._accumulators(groups)
        counts = {group.experts: [0] * self._experts[group.experts].count for group in groups if not group.linears}

        def on_input(position: int, group: InputGroup, x: Tensor) -> None:
            if not group.linears:
                own = counts[group.experts]
                counts[group.experts] = [a + b for a, b in zip(own, tokens_of(x, len(own)), strict=True)]
                return
            with self._watch.part("statistics"):
                sums[group].add(self._samples[position], x)

        seen = [group for group in groups if group in sums or not group.linears]
        if seen:
            run_observed(self._block, seen, hidden, arguments, on_input)
        for path, own in counts.items():
            self._decide(path, own)
        return {group: each.nodes(park=park) for group, each in sums.items()}

    def _accumulators(self, groups: Sequence[InputGroup]) -> dict[InputGroup, Accumulator]:
        """Return what sums the statistics of the groups that need any."""
        sums = {}
        for group in groups:
            statistic = (
                self._statistic(group, [self._linears[name] for name in group.linears]) if group.linears else None
            )
            unused = self._is_starved(group) and self._fallback(group.experts) != "pool"
            if statistic is not None and not unused:
                columns = self._block.get_submodule(group.linears[0]).in_features
                assert isinstance(columns, int)
                parking = self._parking(self._task.placement.statistics)
                sums[group] = Accumulator(statistic, columns, self._task.partition_samples, self._device, parking)
        return sums

    def _statistic(self, group: InputGroup, linears: Sequence[LinearTask]) -> Statistic | None:
        """Return what is summed at a group's input, given its linears: what answers all of them."""
        if not linears[0].correction:
            asked = (method_named(linear.method).statistic for linear in linears)
            return covering([statistic for statistic in asked if statistic is not None])
        linear: Any = self._block.get_submodule(linears[0].name)
        return with_deviations(deviations_of(group, (linear.out_features, linear.in_features)))

    def _solve_stage(self, stage: Stage, sums: dict[InputGroup, list[Node]]) -> None:
        together = []
        for group in stage:
            linears = [self._linears[name] for name in group.linears]
            if self._is_starved(group):
                fallback = self._fallback(group.experts)
                if fallback == "dense":
                    continue
                linears = [instead(linear, fallback) for linear in linears]
            statistic = self._statistic(group, linears)
            nodes, collected = sums.pop(group, []), self._collected.get(group)
            together.append(Together(linears, nodes, statistic, bool(group.residual), collected))
        if together:
            self._solve(together)

    def _decides(self, group: InputGroup) -> bool:
        """Whether experts are chosen here, some of which are to be fitted to the tokens that they are sent."""
        return (
            not group.linears
            and not self._experts[group.experts].shown_all
            and any(
                name.startswith(f"{group.experts}.") and method_named(linear.method).statistic is not None
                for name, linear in self._linears.items()
            )
        )

    def _decide(self, path: str, tokens: Sequence[int]) -> None:
        """Note which experts are starved, given the tokens that this worker's samples send to each."""
        experts = self._experts[path]
        self._tokens[path] = summed(tokens, self._group)
        self._starved[path] = starved_experts(experts, self._tokens[path], self._task.coverage)
        if self._fallback(path) == "pool":
            experts.shown_all = self._starved[path]

    def _is_starved(self, group: InputGroup) -> bool:
        return bool(group.experts) and group.number in self._starved[group.experts]

    def _fallback(self, path: str) -> str:
        """Return what is done to starved experts; where these can see no other tokens, the next thing."""
        fallback = self._task.coverage.fallback
        return "magnitude" if fallback == "pool" and not self._experts[path].can_show_all else fallback

    def _expert_of(self, name: str) -> tuple[str, int]:
        """Return the experts and the number of the one that a linear belongs to; ("", 0) where to none."""
        for path in self._experts:
            if name.startswith(f"{path}."):
                return path, int(name[len(path) + 1 :].partition(".")[0])
        return "", 0
