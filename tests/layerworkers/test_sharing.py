import pytest

from billhook.layerworkers.sharing import Pace, Shared, Work, share_out, share_out_stage

NOTHING = Shared(0.0, 0)


def pace(exchange_seconds: float, flops_per_second: float = 5e10, bytes_per_second: float = 1e9) -> Pace:
    return Pace(flops_per_second, exchange_seconds, bytes_per_second)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("selections", [0, 10, 10_000])
@pytest.mark.parametrize("shared_bytes", [0, 10**7, 10**12])
def test_every_row_is_solved_once_and_ranges_are_whole_partitions(
    workers: int, selections: int, shared_bytes: int
) -> None:
    linears = [Work(rows, 1e9 * rows, selections) for rows in (64, 576, 1500)]
    shared = share_out(linears, Shared(1e9, shared_bytes), workers, 256, pace(2e-3))
    for work, ranges in zip(linears, shared, strict=True):
        assert len(ranges) == workers
        assert [row for start, stop in ranges for row in range(start, stop)] == list(range(work.rows))
        assert all(start % 256 == 0 for start, _ in ranges)


def test_rows_are_split_when_selection_is_local_and_linears_dealt_when_it_is_dear() -> None:
    split = share_out([Work(1024, 1e10, 0)], NOTHING, 2, 256, pace(2e-3))
    assert split == [[(0, 512), (512, 1024)]]
    two = [Work(1024, 1e8, 12), Work(1024, 1e8, 12)]
    assert sorted(share_out(two, NOTHING, 2, 256, pace(2e-3))) == [[(0, 0), (0, 1024)], [(0, 1024), (0, 0)]]
    one = [Work(1024, 1e9, 12)]
    assert share_out(one, NOTHING, 2, 256, pace(2e-3)) == [[(0, 1024), (0, 0)]]
    assert share_out(one, NOTHING, 2, 256, pace(2e-4)) == [[(0, 512), (512, 1024)]]
    assert share_out(one, NOTHING, 2, 256, pace(2e-4, flops_per_second=5e13)) == [[(0, 1024), (0, 0)]]


def test_as_many_solve_as_it_pays_to_send_the_factor_to() -> None:
    def solvers(shared_bytes: int) -> int:
        (ranges,) = share_out([Work(1024, 1e12, 0)], Shared(0.0, shared_bytes), 4, 256, pace(2e-3))
        return sum(start < stop for start, stop in ranges)

    # 20 s for one; 10, 10 and 5 s for two, three and four, and the time to send once, twice and twice
    assert [solvers(size) for size in (0, 10**9, 6 * 10**9, 11 * 10**9)] == [4, 4, 2, 1]


def test_inputs_that_are_known_together_are_dealt_out_whole() -> None:
    groups = [[Work(100, 1e9, 5), Work(50, 5e8, 5)], [Work(80, 4e9, 5)], [Work(10, 1e8, 5)]]
    shared = [Shared(1e9, 10**6)] * 3
    (first, second, third) = share_out_stage(groups, shared, 2, 16, pace(3e-4))
    assert second == [[(0, 80), (0, 0)]]
    assert first == [[(0, 0), (0, 100)], [(0, 0), (0, 50)]]
    assert third == [[(0, 0), (0, 10)]]
    assert share_out_stage(groups, shared, 1, 16, pace(3e-4))[0] == [[(0, 100)], [(0, 50)]]
    alone = share_out_stage(groups[:1], shared[:1], 2, 16, pace(3e-4))
    assert alone == [share_out(groups[0], shared[0], 2, 16, pace(3e-4))]
