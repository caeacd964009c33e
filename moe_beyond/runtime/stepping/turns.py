"""Turns of threads that use one model: a forward at a time, and a generated text at a time."""

import os
import threading
import weakref
from typing import Any


class Turns:
    """Locks of a run, and the sequence that its last forward read.

    A thread that generates keeps its turn until its text ends. Other threads wait; so no sequence is read in between.

    Attributes:
        text: Lock that a thread holds while it generates, and during each forward.
        forward: Lock that a thread holds during each forward, and while the run ends.
    """

    def __init__(self) -> None:
        self._create_locks()
        self._thread: int | None = None  # identity of the thread of the last forward
        self._cache: weakref.ref[Any] | None = None  # keys and values of the last forward
        _turns.add(self)

    def continues(self, cache: Any) -> bool:
        """Return whether a forward may continue the last one's sequence: of the same thread, or with the same cache.

        Args:
            cache: Cache of keys and values that the forward receives; None for none.
        """
        same = self._cache is not None and self._cache() is cache
        return same or self._thread == threading.get_ident()

    def note(self, cache: Any, output: Any) -> None:
        """Note the end of a forward.

        Args:
            cache: Cache of keys and values that it received; None for none.
            output: Output of the model.
        """
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        self._thread = threading.get_ident()
        try:
            self._cache = None if cache is None else weakref.ref(cache)
        except TypeError:  # a tuple
            self._cache = None

    def _create_locks(self) -> None:
        self.text, self.forward = threading.RLock(), threading.RLock()


_turns: weakref.WeakSet[Turns] = weakref.WeakSet()


def _free_all() -> None:
    """Free the locks in a fork of the process, which has none of the threads that held them."""
    for turns in _turns:
        turns._create_locks()  # noqa: SLF001


os.register_at_fork(after_in_child=_free_all)
