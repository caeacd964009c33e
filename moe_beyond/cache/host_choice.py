"""Miss handling: experts of an event that the host computes.

An expert is absent if it has no slot, or if its transfer has not arrived. With ``move`` the event waits for it. With
``cpu`` the host computes it from host memory, one expert after another, while the device computes the others.

``best`` takes the absent experts one by one, those that most tokens demand first, ties by the lower expert. Host or
device gets an expert, whichever computes it sooner; the device wins ties. The host has to compute the experts that it
was given before. The device has to wait for the queue of the interconnect and for the experts that it computes before.
The number of tokens counts on both sides: weights are read once, and floating-point operations grow with tokens.

An expert without a slot that the host computes is queued as a fill, so an idle interconnect brings it into the cache.
So both ways keep an expert, and the value of keeping it is no term of the choice. If the interconnect is too busy for
the fill, a transfer on demand would only take the place of another fill. A term for it, hits per transfer so far times
the seconds that a hit saves, made replays slower (simulator/README.md).
"""

from moe_beyond.cache.compiler import jit, jit_apart
from moe_beyond.cache.core import CacheState, Clock, Expert, Ints, Scratch
from moe_beyond.cache.interconnect import LinkState, Seconds, copy_seconds
from moe_beyond.cache.misses import Handling


@jit
def host_seconds(link: LinkState, tokens: int) -> float:
    """Return the seconds in which the host computes an expert for a number of tokens."""
    return max(link.seconds[Seconds.HOST], link.seconds[Seconds.HOST_TOKEN] * tokens)


@jit_apart
def choose_host(cache: CacheState, experts: Ints, tokens: Ints) -> None:
    """Choose the experts of an event that the host computes; not for ``Handling.MOVE``.

    Entry i of ``Scratch.MARKED`` is 1 if the host computes expert i of the event. ``Seconds.HOST_FREE`` is the time at
    which it has computed all of them.

    Args:
        cache: Cache whose layer is being routed.
        experts: Distinct demanded experts of the layer, ascending, ``(n,)`` int64.
        tokens: Number of tokens that demand each expert, ``(n,)`` int64.
    """
    link = cache.link
    seconds = link.seconds
    marked, order = cache.scratch_int[Scratch.MARKED], cache.scratch_int[Scratch.ORDER]
    absent = _absent(cache, experts, tokens, order)
    host, computing = seconds[Seconds.NOW], seconds[Seconds.COMPUTE]
    device = host + computing * (len(experts) - absent)
    free = max(seconds[Seconds.FREE], host)
    marked[: len(experts)] = 0
    for i in order[:absent]:
        expert, takes = experts[i], host_seconds(link, tokens[i])
        if cache.clock[Clock.HANDLING] == Handling.BEST:
            has_slot = cache.experts[Expert.PLACE, expert] >= 0
            # A run does not know the arrival of its prefetch in transit, the last transfer.
            arrives = (
                min(link.arrives[expert], seconds[Seconds.FREE]) if has_slot else free + copy_seconds(link, expert)
            )
            ends = max(device, arrives) + computing
            if ends <= host + takes:
                device = ends
                free = max(free, arrives)
                continue
        host += takes
        marked[i] = 1
    seconds[Seconds.HOST_FREE] = host


@jit
def _absent(cache: CacheState, experts: Ints, tokens: Ints, order: Ints) -> int:
    """List the indices of absent experts, those of most tokens first (insertion sort); return their number."""
    absent = 0
    for i in range(len(experts)):
        arrives = cache.link.arrives[experts[i]]
        if cache.experts[Expert.PLACE, experts[i]] < 0 or arrives > cache.link.seconds[Seconds.NOW]:
            place = absent
            while place > 0 and tokens[order[place - 1]] < tokens[i]:
                order[place] = order[place - 1]
                place -= 1
            order[place] = i
            absent += 1
    return absent
