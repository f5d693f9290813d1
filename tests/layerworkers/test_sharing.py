import pytest

from billhook.layerworkers.sharing import Work, share_out, share_out_stage


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("selections", [0, 10, 10_000])
def test_every_row_is_solved_once_and_ranges_are_whole_partitions(workers: int, selections: int) -> None:
    linears = [Work(rows, 1e9 * rows, selections) for rows in (64, 576, 1500)]
    for work, ranges in zip(linears, share_out(linears, workers, 256, 2e-3), strict=True):
        assert len(ranges) == workers
        assert [row for start, stop in ranges for row in range(start, stop)] == list(range(work.rows))
        assert all(start % 256 == 0 for start, _ in ranges)


def test_rows_are_split_when_selection_is_local_and_linears_dealt_when_it_is_dear() -> None:
    split = share_out([Work(1024, 1e10, 0)], 2, 256, 2e-3)
    assert split == [[(0, 512), (512, 1024)]]
    two = [Work(1024, 1e8, 12), Work(1024, 1e8, 12)]
    assert sorted(share_out(two, 2, 256, 2e-3)) == [[(0, 0), (0, 1024)], [(0, 1024), (0, 0)]]
    one = [Work(1024, 1e9, 12)]
    assert share_out(one, 2, 256, 2e-3) == [[(0, 1024), (0, 0)]]
    assert share_out(one, 2, 256, 2e-4) == [[(0, 512), (512, 1024)]]


def test_inputs_that_are_known_together_are_dealt_out_whole() -> None:
    groups = [[Work(100, 1e9, 5), Work(50, 5e8, 5)], [Work(80, 4e9, 5)], [Work(10, 1e8, 5)]]
    (first, second, third) = share_out_stage(groups, [1e9, 1e9, 1e9], 2, 16, 3e-4)
    assert second == [[(0, 80), (0, 0)]]
    assert first == [[(0, 0), (0, 100)], [(0, 0), (0, 50)]]
    assert third == [[(0, 0), (0, 10)]]
    assert share_out_stage(groups, [1e9, 1e9, 1e9], 1, 16, 3e-4)[0] == [[(0, 100)], [(0, 50)]]
    assert share_out_stage(groups[:1], [1e9], 2, 16, 3e-4) == [share_out(groups[0], 2, 16, 3e-4)]
