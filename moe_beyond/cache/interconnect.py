"""The interconnect that experts cross one at a time, with a second tier if the device has flash.

Flash and interconnect are two resources that work at the same time. The copy of an expert begins when its read from
flash has ended and the interconnect is free. Reads follow each other in the order of sending, and so do copies. There
is one exception: while the last copy waits for its read, copies from host memory that end before the read go first.

Host memory keeps the experts that were transferred last, including those in slots. It starts with as many experts as
fit (`first_hosted`).
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_beyond.cache.compiler import jit


class Seconds(IntEnum):
    """Entries of `LinkState.seconds`.

    ``NOW`` is the present, and ``FREE`` and ``FLASH_FREE`` are the times at which interconnect and flash become free.
    ``BUSY`` and ``FLASH_BUSY`` sum the time of all copies and of all flash reads. ``TRANSFER`` is the duration of a
    copy from host memory, and ``FLASH`` that of a flash read, both for an expert of mean size. From ``GAP_BEGIN`` to
    ``GAP_END`` the interconnect is idle before its last copy.

    ``COMPUTE`` is the duration of an expert of the running event on the device. ``HOST`` is that of an expert on the
    host, and ``HOST_TOKEN`` that of each of its tokens, if together they take longer. At ``HOST_FREE`` the host has
    computed its experts. ``PREFETCH`` is the time that the copy of a prefetch takes in addition.
    """

    NOW = 0
    FREE = 1
    BUSY = 2
    FLASH_BUSY = 3
    TRANSFER = 4
    FLASH = 5
    FLASH_FREE = 6
    GAP_BEGIN = 7
    GAP_END = 8
    COMPUTE = 9
    HOST = 10
    HOST_TOKEN = 11
    HOST_FREE = 12
    PREFETCH = 13


class Tally(IntEnum):
    """Entries of `LinkState.tally`: queued experts, transfers so far, units in host memory, and its capacity."""

    QUEUED = 0
    SENT = 1
    HOSTED = 2
    HOST_CAPACITY = 3


class Relative(IntEnum):
    """Rows of `LinkState.relative`: copies over the interconnect, and reads from flash."""

    COPY = 0
    READ = 1


class Queue(IntEnum):
    """Rows of `LinkState.queue`: queued experts, the most urgent first; and each expert's `Waits`."""

    ORDER = 0
    WAITS = 1


class Waits(IntEnum):
    """Reason why an expert is queued: it is no longer, a prefetcher selected it, or the host has computed it."""

    NO = 0
    PREFETCH = 1
    FILL = 2


class Host(IntEnum):
    """Rows of `LinkState.host`.

    ``NEWER`` and ``OLDER`` are a ring by recency, ``HOLDS`` is 1 for each expert in host memory, and ``UNITS`` its size
    in units.
    """

    NEWER = 0
    OLDER = 1
    HOLDS = 2
    UNITS = 3


class Transfer(IntEnum):
    """Columns of `LinkState.log`.

    ``BEGIN`` is the begin of the flash read if there is one, and otherwise of the copy. ``PREFETCH`` is 1 for a
    prefetch and 0 for a transfer on demand.
    """

    EXPERT = 0
    BEGIN = 1
    END = 2
    PREFETCH = 3


class LinkState(NamedTuple):
    """Arrays of the interconnect, its queue, and host memory.

    Attributes:
        seconds: Times and durations, ``(14,)`` float64, entries `Seconds`.
        tally: Counts, ``(4,)`` int64, entries `Tally`.
        arrives: Time at which each expert's last transfer ends, ``(L*E,)`` float64.
        queue: Queue of prefetches and fills, ``(2, L*E)`` int64, rows `Queue`.
        host: Experts in host memory, ``(4, L*E + 1)`` int64, rows `Host`; the head of the ring is the number L*E.
        relative: Duration of each expert's copy and read, divided by ``TRANSFER`` and ``FLASH`` of `Seconds`,
            ``(2, L*E)`` float64, rows `Relative`; 1 if all experts have the same size.
        log: First n transfers, ``(n, 4)`` float64, columns `Transfer`; n is 0 if no log is kept.
    """

    seconds: npt.NDArray[np.float64]
    tally: npt.NDArray[np.int64]
    arrives: npt.NDArray[np.float64]
    queue: npt.NDArray[np.int64]
    host: npt.NDArray[np.int64]
    relative: npt.NDArray[np.float64]
    log: npt.NDArray[np.float64]


def new_link(
    num_ids: int,
    transfer_seconds: float = 0.0,
    flash_seconds: float = 0.0,
    host_capacity: int = 0,
    log_size: int = 0,
    hosted: npt.ArrayLike = (),
    units: npt.ArrayLike = 1,
    relative: npt.ArrayLike = 1.0,
) -> LinkState:
    """Return an idle interconnect.

    Args:
        num_ids: Number of experts L * E.
        transfer_seconds: Duration of a copy from host memory (default: 0).
        flash_seconds: Duration of the flash read if host memory does not hold the expert (default: 0, no flash).
        host_capacity: Units that host memory holds; not used if flash takes no time (default: 0).
        log_size: Number of transfers to log (default: 0).
        hosted: Experts in host memory at the start, which fit, the last to leave first (default: none).
        units: Units of each expert, ``(L*E,)`` (default: 1).
        relative: Duration of each expert's copy and read divided by that of the mean, ``(2, L*E)`` (default: 1).
    """
    ring = np.concatenate([[num_ids], np.asarray(hosted, np.int64)])  # from the head to the oldest
    host = np.full((len(Host), num_ids + 1), num_ids)
    host[Host.OLDER, ring], host[Host.NEWER, ring] = np.roll(ring, -1), np.roll(ring, 1)
    host[Host.HOLDS] = 0
    host[Host.HOLDS, ring[1:]] = 1
    host[Host.UNITS, :num_ids] = units
    seconds = np.zeros(len(Seconds))
    seconds[Seconds.TRANSFER], seconds[Seconds.FLASH] = transfer_seconds, flash_seconds
    return LinkState(
        seconds=seconds,
        tally=np.array([0, 0, host[Host.UNITS, ring[1:]].sum(), host_capacity]),
        arrives=np.zeros(num_ids),
        queue=np.zeros((len(Queue), num_ids), np.int64),
        host=host,
        relative=np.broadcast_to(np.asarray(relative, np.float64), (len(Relative), num_ids)).copy(),
        log=np.zeros((log_size, len(Transfer))),
    )


def first_hosted(num_experts: int, units: Sequence[int], host_capacity: int) -> npt.NDArray[np.int64]:
    """Choose the experts in host memory at the start: the lowest ids of each layer, the same number in every layer.

    No profile is used, so all strategies start with the same experts. If the capacity does not divide evenly, the first
    layers have one expert more.

    Args:
        num_experts: Number of experts per layer E.
        units: Units of an expert of each layer, L numbers.
        host_capacity: Units that host memory holds.

    Returns:
        Experts that fit, ``(n,)`` int64, the last to leave first: expert 0 of every layer, then expert 1, ...
    """
    ids = np.arange(len(units) * num_experts).reshape(len(units), num_experts)
    return ids.T.ravel()[np.cumsum(np.tile(units, num_experts)) <= host_capacity]


@jit
def is_instant(link: LinkState) -> bool:
    """Return whether transfers take no time."""
    return link.seconds[Seconds.TRANSFER] == 0 and link.seconds[Seconds.FLASH] == 0


@jit
def copy_seconds(link: LinkState, expert: int) -> float:
    """Return the seconds of an expert's copy over the interconnect."""
    return link.seconds[Seconds.TRANSFER] * link.relative[Relative.COPY, expert]


@jit
def read_seconds(link: LinkState, expert: int) -> float:
    """Return the seconds of an expert's read from flash."""
    return link.seconds[Seconds.FLASH] * link.relative[Relative.READ, expert]


@jit
def duration(link: LinkState, expert: int) -> float:
    """Return the seconds that a transfer of an expert takes if flash and interconnect are free."""
    if reads_flash(link, expert):
        return copy_seconds(link, expert) + read_seconds(link, expert)
    return copy_seconds(link, expert)


@jit
def reads_flash(link: LinkState, expert: int) -> bool:
    """Return whether a transfer of an expert begins with a read from flash."""
    return link.seconds[Seconds.FLASH] > 0 and link.host[Host.HOLDS, expert] == 0


@jit
def begins_at(link: LinkState, expert: int, since: float) -> float:
    """Return the time at which a transfer of an expert can begin.

    Args:
        link: State of the interconnect.
        expert: Expert to transfer.
        since: Earliest start in seconds.
    """
    seconds = link.seconds
    if seconds[Seconds.FLASH] == 0:
        return max(seconds[Seconds.FREE], since)
    if link.host[Host.HOLDS, expert] == 0:
        return max(seconds[Seconds.FLASH_FREE], since)
    copies = copy_seconds(link, expert)
    since = max(since, link.arrives[expert] - copies)  # host memory may still be receiving it
    in_gap = max(seconds[Seconds.GAP_BEGIN], since)
    if in_gap + copies <= seconds[Seconds.GAP_END]:
        return in_gap
    return max(seconds[Seconds.FREE], since)


@jit
def send(link: LinkState, expert: int, since: float, prefetch: bool) -> float:
    """Transfer an expert as soon as the transfers that were sent before it allow.

    Args:
        link: State of the interconnect.
        expert: Expert to transfer.
        since: Earliest start in seconds.
        prefetch: Whether the transfer is a prefetch.

    Returns:
        Time of arrival in seconds.
    """
    seconds = link.seconds
    begins = begins_at(link, expert, since)
    copies = begins
    if reads_flash(link, expert):
        copies = _read_flash(link, expert, begins, since)
    takes = copy_seconds(link, expert) + (seconds[Seconds.PREFETCH] if prefetch else 0.0)
    arrives = copies + takes
    if arrives <= seconds[Seconds.GAP_END]:
        seconds[Seconds.GAP_BEGIN] = arrives
    seconds[Seconds.FREE] = max(seconds[Seconds.FREE], arrives)
    if link.tally[Tally.SENT] < len(link.log):
        row = link.log[link.tally[Tally.SENT]]
        row[Transfer.EXPERT], row[Transfer.BEGIN] = expert, begins
        row[Transfer.END], row[Transfer.PREFETCH] = arrives, prefetch
    link.tally[Tally.SENT] += 1
    seconds[Seconds.BUSY] += takes
    link.arrives[expert] = arrives
    link.queue[Queue.WAITS, expert] = Waits.NO
    if seconds[Seconds.FLASH] > 0:
        _keep_in_host(link, expert)
    return arrives


@jit
def _read_flash(link: LinkState, expert: int, begins: float, since: float) -> float:
    """Read an expert from flash; return the time at which its copy begins."""
    seconds = link.seconds
    reads = read_seconds(link, expert)
    ends = seconds[Seconds.FLASH_FREE] = begins + reads
    seconds[Seconds.FLASH_BUSY] += reads
    idle = max(seconds[Seconds.FREE], since)
    if ends > idle:
        seconds[Seconds.GAP_BEGIN], seconds[Seconds.GAP_END] = idle, ends
    return max(seconds[Seconds.FREE], ends)


@jit
def _keep_in_host(link: LinkState, expert: int) -> None:
    """Make an expert the most recent in host memory; the oldest leave until there is room."""
    head, units = link.host.shape[1] - 1, link.host[Host.UNITS, expert]
    if units > link.tally[Tally.HOST_CAPACITY]:
        return
    if link.host[Host.HOLDS, expert] == 1:
        _remove_from_ring(link, expert)
        link.tally[Tally.HOSTED] -= units
    while link.tally[Tally.HOSTED] + units > link.tally[Tally.HOST_CAPACITY]:
        oldest = link.host[Host.NEWER, head]
        _remove_from_ring(link, oldest)
        link.host[Host.HOLDS, oldest] = 0
        link.tally[Tally.HOSTED] -= link.host[Host.UNITS, oldest]
    link.tally[Tally.HOSTED] += units
    link.host[Host.HOLDS, expert] = 1
    newest = link.host[Host.OLDER, head]
    link.host[Host.NEWER, newest], link.host[Host.OLDER, expert] = expert, newest
    link.host[Host.NEWER, expert], link.host[Host.OLDER, head] = head, expert


@jit
def _remove_from_ring(link: LinkState, expert: int) -> None:
    newer, older = link.host[Host.NEWER, expert], link.host[Host.OLDER, expert]
    link.host[Host.OLDER, newer], link.host[Host.NEWER, older] = older, newer


@jit
def computed_at(link: LinkState, experts: npt.NDArray[np.int64], begins: float, takes: float) -> float:
    """Return the time at which experts have computed, one after another in the order of their arrival.

    Args:
        link: State of the interconnect.
        experts: Experts that are resident, in transit or sent, ``(n,)`` int64.
        begins: Time at which the residents begin to compute, in seconds.
        takes: Seconds of computing per expert.
    """
    ends = begins + takes * len(experts)
    for expert in experts:
        arrives = link.arrives[expert]
        if arrives > begins:
            following = 0  # this expert, and those that arrive with it or later
            for other in experts:
                following += link.arrives[other] >= arrives
            ends = max(ends, arrives + takes * following)
    return ends


@jit
def stall_seconds(
    link: LinkState,
    ids: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    resident: npt.NDArray[np.bool_],
    takes: npt.NDArray[np.float64],
    loads: npt.NDArray[np.float64],
    seconds: npt.NDArray[np.float64],
) -> None:
    """Compute the stall of each event without a cache: every expert that is not resident is transferred.

    One worker reads flash and copies at the same time, as `send` does, and computes each expert once it has arrived.
    Several workers read and copy in turn, and compute when all experts of the event have arrived.

    Args:
        link: Interconnect, for the times and host memory; its queue is not used.
        ids: Experts that the events demand, ``(n,)`` int64.
        offsets: Index of each event's first expert, ``(events + 1,)`` int64.
        resident: Experts that are never transferred, ``(L*E,)`` bool.
        takes: Seconds of computing per expert of each event, ``(events,)`` float64.
        loads: Work space, ``(W,)`` float64: one entry per worker; W workers share an event's experts in turn, each over
            its own interconnect.
        seconds: Output, ``(events,)`` float64: time in which nothing computes; the load time of the slowest of several
            workers.
    """
    for event in range(len(seconds)):
        loads[:] = 0.0
        sent = 0
        link.seconds[Seconds.FREE] = link.seconds[Seconds.FLASH_FREE] = 0.0
        link.seconds[Seconds.GAP_BEGIN] = link.seconds[Seconds.GAP_END] = 0.0
        experts = ids[offsets[event] : offsets[event + 1]]
        for expert in experts:
            if not resident[expert]:
                loads[sent % len(loads)] += duration(link, expert)
                send(link, expert, 0.0, False)
                sent += 1
        if len(loads) == 1:
            seconds[event] = computed_at(link, experts, 0.0, takes[event]) - takes[event] * len(experts)
        else:
            seconds[event] = 0.0
            for load in loads:
                seconds[event] = max(seconds[event], load)
        for expert in experts:
            link.arrives[expert] = 0.0  # the times of every event begin at 0
