import pytest
import torch

from billhook.layerworkers.reduction import Node, even_ranges, fold, total


@pytest.mark.parametrize("partitions", [1, 2, 3, 5, 8, 13, 32])
def test_the_total_has_the_same_bits_for_every_layout_over_workers(partitions: int) -> None:
    torch.manual_seed(partitions)
    parts = [torch.randn(50) * 10 ** torch.randint(-3, 4, (50,)) for _ in range(partitions)]
    totals = []
    for workers in (1, 2, 3, 4, 7):
        nodes = []
        for start, stop in even_ranges(partitions, workers):
            nodes += fold([Node(0, number, parts[number].clone()) for number in range(start, stop)])
        totals.append(total(nodes, partitions))
    assert all(torch.equal(each, totals[0]) for each in totals)
    assert torch.allclose(totals[0].double(), torch.stack(parts).double().sum(dim=0), rtol=1e-4, atol=1e-2)


def test_a_worker_keeps_few_partial_sums() -> None:
    assert len(fold([Node(0, number, torch.zeros(1)) for number in range(32)])) == 1
    assert len(fold([Node(0, number, torch.zeros(1)) for number in range(31)])) == 5


@pytest.mark.parametrize(("partitions", "workers"), [(8, 3), (1, 4), (0, 2), (5, 5)])
def test_ranges_cover_all_partitions_in_order(partitions: int, workers: int) -> None:
    ranges = even_ranges(partitions, workers)
    assert len(ranges) == workers
    assert [number for start, stop in ranges for number in range(start, stop)] == list(range(partitions))
