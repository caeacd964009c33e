"""The link that experts cross, one at a time; two tiers where there is flash behind it.

A read from flash and the copy over the link follow each other: one expert occupies the link for both. Host memory keeps
what was moved last, also what is in a slot; it begins with as many experts as fit (`first_hosted`).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.jit import jit

# What `clock` holds, in seconds: the present; when the link is free; how long it has been busy, and reading flash; how
# long a transfer from host memory takes; and what reading the expert from flash adds.
NOW, FREE, BUSY, FLASH_BUSY, TRANSFER, FLASH = range(6)
# What `queue` holds: experts that were asked for and wait, the most urgent first; and 1 for each that does.
ORDERED, WAITS = range(2)
# What `tally` holds: how many wait; how many were sent; how many host memory holds, and how many it can.
QUEUED, SENT, HOSTED, HOST_SLOTS = range(4)
# What `host` holds: a ring of what host memory has, by recency, forwards and backwards; and 1 for each of those.
NEWER, OLDER, HERE = range(3)


class LinkState(NamedTuple):
    """What is on its way, what waits, and what host memory holds.

    Attributes:
        clock: ``(6,)`` float64.
        tally: ``(4,)``.
        arrives: ``(L*E,)`` float64, when an expert's last transfer ended or will.
        queue: ``(2, L*E)``.
        host: ``(3, L*E + 1)``; the ring's head is the number L*E.
        log: ``(n, 4)`` float64, the first n transfers: expert, begin, end, and 1 for one ahead of demand; n is 0 where
            nobody wants to know.
    """

    clock: npt.NDArray[np.float64]
    tally: npt.NDArray[np.int64]
    arrives: npt.NDArray[np.float64]
    queue: npt.NDArray[np.int64]
    host: npt.NDArray[np.int64]
    log: npt.NDArray[np.float64]


def new_link(
    num_ids: int,
    transfer_seconds: float = 0.0,
    flash_seconds: float = 0.0,
    host_slots: int = 0,
    log_size: int = 0,
    hosted: npt.ArrayLike = (),
) -> LinkState:
    """Return an idle link.

    Args:
        num_ids: L * E.
        transfer_seconds: Of one expert from host memory.
        flash_seconds: What it takes longer if host memory does not hold it.
        host_slots: Experts that host memory holds, the most recently moved; without meaning where flash takes no time.
        log_size: Transfers to keep a record of.
        hosted: Experts that host memory holds at first, the last to leave first; at most ``host_slots``.
    """
    ring = np.concatenate([[num_ids], np.asarray(hosted, np.int64)])  # from the head to ever older
    host = np.full((3, num_ids + 1), num_ids)
    host[OLDER, ring], host[NEWER, ring] = np.roll(ring, -1), np.roll(ring, 1)
    host[HERE] = 0
    host[HERE, ring[1:]] = 1
    return LinkState(
        clock=np.array([0.0, 0.0, 0.0, 0.0, transfer_seconds, flash_seconds]),
        tally=np.array([0, 0, len(ring) - 1, host_slots]),
        arrives=np.zeros(num_ids),
        queue=np.zeros((2, num_ids), np.int64),
        host=host,
        log=np.zeros((log_size, 4)),
    )


def first_hosted(num_layers: int, num_experts: int, host_slots: int) -> npt.NDArray[np.int64]:
    """Choose the experts that host memory holds at first: the same number in each layer, the lowest ids.

    No profile is consulted, so that every strategy begins alike. Where the slots do not divide, the first layers have
    one more.

    Args:
        num_layers: L.
        num_experts: E.
        host_slots: Experts that host memory holds.

    Returns:
        ``(min(host_slots, L*E),)`` int64, the last to leave first: expert 0 of every layer, then expert 1, ...
    """
    ids = np.arange(num_layers * num_experts).reshape(num_layers, num_experts)
    return ids.T.ravel()[:host_slots]


@jit
def is_instant(link: LinkState) -> bool:
    """Tell whether transfers take no time."""
    return link.clock[TRANSFER] == 0 and link.clock[FLASH] == 0


@jit
def duration(link: LinkState, expert: int) -> float:
    """Return the seconds that a transfer of an expert would take now."""
    if link.clock[FLASH] == 0 or link.host[HERE, expert] == 1:
        return link.clock[TRANSFER]
    return link.clock[TRANSFER] + link.clock[FLASH]


@jit
def send(link: LinkState, expert: int, since: float, ahead: bool) -> float:
    """Put an expert on the link behind what is on it, no sooner than ``since``; return when it arrives."""
    takes = duration(link, expert)
    begins = max(link.clock[FREE], since)
    link.clock[FREE] = begins + takes
    if link.tally[SENT] < len(link.log):
        row = link.log[link.tally[SENT]]
        row[0], row[1], row[2], row[3] = expert, begins, link.clock[FREE], ahead
    link.tally[SENT] += 1
    link.clock[BUSY] += takes
    link.clock[FLASH_BUSY] += takes - link.clock[TRANSFER]
    link.arrives[expert] = link.clock[FREE]
    link.queue[WAITS, expert] = 0
    if link.clock[FLASH] > 0:
        _keep_in_host(link, expert)
    return link.clock[FREE]


@jit
def _keep_in_host(link: LinkState, expert: int) -> None:
    head = link.host.shape[1] - 1
    if link.host[HERE, expert] == 1:
        _unlink(link, expert)
    elif link.tally[HOSTED] == link.tally[HOST_SLOTS]:
        oldest = link.host[NEWER, head]
        if oldest == head:  # no room for any
            return
        _unlink(link, oldest)
        link.host[HERE, oldest] = 0
    else:
        link.tally[HOSTED] += 1
    link.host[HERE, expert] = 1
    newest = link.host[OLDER, head]
    link.host[NEWER, newest], link.host[OLDER, expert] = expert, newest
    link.host[NEWER, expert], link.host[OLDER, head] = head, expert


@jit
def _unlink(link: LinkState, expert: int) -> None:
    newer, older = link.host[NEWER, expert], link.host[OLDER, expert]
    link.host[OLDER, newer], link.host[NEWER, older] = older, newer


@jit
def load_seconds(
    link: LinkState,
    ids: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    resident: npt.NDArray[np.bool_],
    loads: npt.NDArray[np.float64],
    seconds: npt.NDArray[np.float64],
) -> None:
    """Time what each event has to move in, where no cache decides: everything that is not resident.

    Args:
        link: A `LinkState`, for the times and for host memory; its queue is not used.
        ids: ``(n,)`` int64, the experts that every event demands.
        offsets: ``(events + 1,)`` int64, where each event's begin.
        resident: ``(L*E,)``, experts that never move.
        loads: ``(W,)`` float64, room to work in: W links that share an event's experts in turn.
        seconds: ``(events,)``, filled with the time that the slowest of these links takes.
    """
    for event in range(len(seconds)):
        loads[:] = 0.0
        sent = 0
        for expert in ids[offsets[event] : offsets[event + 1]]:
            if not resident[expert]:
                loads[sent % len(loads)] += duration(link, expert)
                send(link, expert, 0.0, False)
                sent += 1
        slowest = 0.0
        for load in loads:
            slowest = max(slowest, load)
        seconds[event] = slowest
