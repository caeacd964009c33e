"""The link that experts cross, one at a time; two tiers where there is flash behind it."""

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
) -> LinkState:
    """Return an idle link.

    Args:
        num_ids: L * E.
        transfer_seconds: Of one expert from host memory.
        flash_seconds: What it takes longer if host memory does not hold it.
        host_slots: Experts that host memory holds, the most recently moved; without meaning where flash takes no time.
        log_size: Transfers to keep a record of.
    """
    host = np.full((3, num_ids + 1), num_ids)
    host[HERE] = 0
    return LinkState(
        clock=np.array([0.0, 0.0, 0.0, 0.0, transfer_seconds, flash_seconds]),
        tally=np.array([0, 0, 0, host_slots]),
        arrives=np.zeros(num_ids),
        queue=np.zeros((2, num_ids), np.int64),
        host=host,
        log=np.zeros((log_size, 4)),
    )


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
