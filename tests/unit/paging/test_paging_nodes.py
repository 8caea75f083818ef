"""Free lists: order, NUMA walks, poison, and the cost of a huge EPC."""

from __future__ import annotations

from functools import partial

import pytest
from tests.support.hw import make_machine

from softsgx.arch import PAGE_BYTES, EpcAddr
from softsgx.defects import Defect
from softsgx.hw import EpcSection, Machine, MachineConfig
from softsgx.paging import EpcCore, NoEpc, SgxEpcPage
from softsgx.paging.nodes import AtomicCount, Node, TornCount, walk_once, walk_until_back
from softsgx.runtime import InlineRuntime, Livelock, SeededRuntime, ThreadsRuntime


def node(pages: int = 8, number: int = 0) -> Node:
    made = Node(number, InlineRuntime(), {})
    if pages:
        made.give_fresh(0, pages * PAGE_BYTES)
    return made


def drain(made: Node) -> list[int]:
    taken = []
    while (page := made.take()) is not None:
        taken.append(page.addr // PAGE_BYTES)
    return taken


def test_freed_pages_come_in_the_order_they_were_freed_then_fresh_ones_by_address() -> None:
    made = node(4)
    first, second = made.take(), made.take()
    assert first is not None and second is not None
    made.give(second)
    made.give(first)
    assert drain(made) == [1, 0, 2, 3]


def test_a_page_keeps_its_record() -> None:
    made = node(1)
    page = made.take()
    assert page is not None
    made.give(page)
    assert made.take() is page


def test_a_page_freed_twice_is_our_mistake() -> None:
    made = node(1)
    page = made.take()
    assert page is not None
    made.give(page)
    with pytest.raises(AssertionError, match="twice"):
        made.give(page)


@pytest.mark.parametrize("poisoned", range(4))
def test_a_poisoned_free_page_is_never_taken(poisoned: int) -> None:
    made = node(4)
    found = made.poison(EpcAddr(poisoned * PAGE_BYTES), dirty=False)
    assert found is not None and found[1]
    assert drain(made) == [at for at in range(4) if at != poisoned]
    assert [page.addr for page in made.quarantine] == [poisoned * PAGE_BYTES]


def test_a_freed_and_then_poisoned_page_is_never_taken() -> None:
    made = node(2)
    pages = [made.take(), made.take()]
    for page in pages:
        assert page is not None
        made.give(page)
    assert pages[0] is not None
    made.poison(pages[0].addr, dirty=False)
    assert drain(made) == [1]


def test_a_page_poisoned_in_use_goes_into_quarantine_when_freed() -> None:
    made = node(1)
    page = made.take()
    assert page is not None
    assert made.poison(page.addr, dirty=False) == (page, False)
    assert made.poison(page.addr, dirty=False) is None
    assert not made.give(page)
    assert made.quarantine == [page] and made.take() is None


def test_what_is_listed_is_what_can_be_taken() -> None:
    made = node(6)
    for _ in range(2):
        page = made.take()
    assert page is not None
    made.give(page)
    made.poison(EpcAddr(3 * PAGE_BYTES), dirty=False)
    listed = [
        at for start, end in made.listed() for at in range(start // PAGE_BYTES, end // PAGE_BYTES)
    ]
    assert listed == drain(made)


@pytest.mark.parametrize(
    ("cpu_node", "order"),
    [(0, [1, 3]), (1, [1, 3]), (2, [3, 1]), (3, [3, 1]), (4, [1, 3])],
)
def test_the_walk_starts_at_the_next_node_with_epc_and_visits_each_once(
    cpu_node: int, order: list[int]
) -> None:
    nodes = [node(0, 1), node(0, 3)]
    assert [found.number for found in walk_once(nodes, cpu_node)] == order


def numa_core(*nodes: int, runtime: SeededRuntime | InlineRuntime, **more: object) -> EpcCore:
    sections = tuple(
        EpcSection(0x1000_0000 * (at + 1), 2 * PAGE_BYTES, node=number)
        for at, number in enumerate(nodes)
    )
    machine = Machine(MachineConfig(sections=sections), runtime)
    return EpcCore(machine, runtime, dirty=(), **more)  # type: ignore[arg-type]


def test_pages_come_from_the_cpus_own_node_first() -> None:
    core = numa_core(0, 1, runtime=InlineRuntime())
    assert [core.alloc(None, reclaim=True, cpu_node=1).node for _ in range(4)] == [1, 1, 0, 0]
    assert core.node_bytes() == {0: 2 * PAGE_BYTES, 1: 2 * PAGE_BYTES}


def test_a_node_may_own_several_sections() -> None:
    core = numa_core(0, 0, runtime=InlineRuntime())
    assert len({core.alloc(None, reclaim=True).addr for _ in range(4)}) == 4
    core.check_invariants()


def test_a_cpu_on_a_node_without_epc_gets_an_answer_when_all_is_busy() -> None:
    core = numa_core(0, 2, runtime=InlineRuntime())
    for _ in range(4):
        core.alloc(None, reclaim=True, cpu_node=1)
    with pytest.raises(NoEpc):
        core.alloc(None, reclaim=True, cpu_node=1)


def test_defect_b17_scans_without_end() -> None:
    runtime = SeededRuntime(0, step_limit=2000)
    core = numa_core(0, 2, runtime=runtime, defects=frozenset({Defect.NODE_WALK_WITHOUT_END}))

    def main() -> None:
        for _ in range(5):
            core.alloc(None, reclaim=True, cpu_node=1)

    with pytest.raises(Livelock):
        runtime.run(main)


def test_defect_b17_ends_on_nodes_that_have_epc() -> None:
    nodes = [node(0, 0), node(0, 1)]
    walk = partial(walk_until_back, point=lambda _where: None)
    assert [found.number for found in walk(nodes, 1)] == [1, 0]


def test_half_a_terabyte_is_set_up_without_touching_its_pages() -> None:
    machine = make_machine(epc_pages=512 << 18)
    core = EpcCore(machine, machine.runtime, dirty=())
    assert core.free_pages == 512 << 18
    page = core.alloc(None, reclaim=True)
    core.free(page)
    core.check_invariants()
    assert len(machine.pages) == 0


def test_a_count_changed_by_threads_is_exact() -> None:
    runtime = ThreadsRuntime()
    count = AtomicCount(runtime)

    def work() -> None:
        for _ in range(2000):
            count.add(1)
            count.add(-1)
            count.add(1)

    def main() -> None:
        for task in [runtime.spawn(work, "work") for _ in range(3)]:
            task.join()

    runtime.run(main)
    assert count.value == 6000


def churn(seed: int, defects: frozenset[Defect]) -> EpcCore:
    """Two tasks on two nodes take and free pages."""
    runtime = SeededRuntime(seed)
    core = numa_core(0, 1, runtime=runtime, defects=defects)

    def work(cpu_node: int) -> None:
        for _ in range(4):
            core.free(core.alloc(None, reclaim=True, cpu_node=cpu_node))

    def main() -> None:
        tasks = [runtime.spawn(partial(work, number), f"cpu{number}") for number in (0, 1)]
        for task in tasks:
            task.join()

    runtime.run(main)
    return core


def test_the_free_count_is_exact_under_every_schedule_and_defect_b15_is_found() -> None:
    for seed in range(20):
        churn(seed, frozenset()).check_invariants()
    torn = [
        churn(seed, frozenset({Defect.FREE_COUNT_WITHOUT_LOCK})).free_pages for seed in range(20)
    ]
    assert any(count != 4 for count in torn)
    assert issubclass(TornCount, AtomicCount)


def test_a_records_text_says_what_it_is_used_for() -> None:
    page = SgxEpcPage(EpcAddr(0x1000), 0)
    page.kind, page.tracked = "reg", True
    assert repr(page) == "<EPC 0x1000 reg tracked>"
