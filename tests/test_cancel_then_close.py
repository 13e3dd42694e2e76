"""Who cancels a wait may close its file in the same step, and need not tell Trio: nobody waits for it any more."""

from __future__ import annotations

import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_aiopoll  # noqa: F401

MANAGERS = ["epoll", "aiopoll"]


@pytest.mark.parametrize("io_manager", MANAGERS)
def test_a_socket_closed_in_the_step_that_cancels_its_wait_is_let_go(io_manager: str) -> None:
    async def main() -> None:
        for _ in range(300):
            ours, peer = socket.socketpair()
            ours.setblocking(False)
            peer.setblocking(False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, ours)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                ours.close()
                assert peer.recv(1) == b""
            peer.close()

    trio.run(main, io_manager=io_manager)


@pytest.mark.parametrize("io_manager", MANAGERS)
def test_a_listeners_port_is_free_in_the_step_that_cancels_its_wait(io_manager: str) -> None:
    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        for _ in range(300):
            listener.setblocking(False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, listener)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                listener.close()
                listener = socket.socket()
                listener.bind(address)
                listener.listen()
        listener.close()

    trio.run(main, io_manager=io_manager)


@pytest.mark.parametrize("io_manager", MANAGERS)
def test_files_of_many_waits_cancelled_at_once_are_let_go_when_the_first_task_goes_on(io_manager: str) -> None:
    async def main() -> None:
        pairs = [socket.socketpair() for _ in range(200)]
        for pair in pairs:
            for sock in pair:
                sock.setblocking(False)
        checked = 0

        async def wait(ours: socket.socket) -> None:
            nonlocal checked
            try:
                await trio.lowlevel.wait_readable(ours)
            finally:
                if not checked:
                    for other, peer in pairs:
                        other.close()
                        checked += peer.recv(1) == b""

        async with trio.open_nursery() as nursery:
            for ours, _ in pairs:
                nursery.start_soon(wait, ours)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert checked == len(pairs)
        for _, peer in pairs:
            peer.close()

    trio.run(main, io_manager=io_manager)


@pytest.mark.parametrize("io_manager", MANAGERS)
def test_a_wait_cancelled_in_the_tick_in_which_it_began_makes_way_for_another(io_manager: str) -> None:
    """Also if others have begun since; and no poll is submitted for it."""

    async def main() -> bool:
        """Whether the tasks ran in the order that is wanted; it is for Trio to choose."""
        (first, first_peer), (other, other_peer) = socket.socketpair(), socket.socketpair()
        scope = trio.CancelScope()
        waiting = []
        woken = []

        async def wait(sock: socket.socket, name: str) -> None:
            waiting.append(name)
            await trio.lowlevel.wait_readable(sock)
            woken.append(name)

        async def wait_for_the_first() -> None:
            with scope:
                await wait(first, "cancelled")

        async def last() -> None:
            if len(waiting) == 2:
                scope.cancel()
                await wait(first, "again")

        with first, first_peer, other, other_peer:
            async with trio.open_nursery() as nursery:
                await wait_all_tasks_blocked()
                before = trio.lowlevel.current_statistics().io_statistics
                nursery.start_soon(last)
                nursery.start_soon(wait_for_the_first)
                nursery.start_soon(wait, other, "other")
                nursery.start_soon(last)
                await wait_all_tasks_blocked()
                after = trio.lowlevel.current_statistics().io_statistics
                assert woken == []
                if "again" not in waiting:
                    nursery.cancel_scope.cancel()
                    return False
                if io_manager == "aiopoll":
                    assert after.polls_submitted - before.polls_submitted == 2
                    assert after.cancels == before.cancels
                first_peer.send(b"x")
                await wait_all_tasks_blocked()
                assert woken == ["again"]
                other_peer.send(b"x")
        assert woken == ["again", "other"]
        return True

    assert any(trio.run(main, io_manager=io_manager) for _ in range(60))
