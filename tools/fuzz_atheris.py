"""Fuzz a target of `fuzz.py` guided by coverage, with atheris (`pip install atheris`).

    python tools/fuzz_atheris.py TARGET [--cases 100000] [--seed 1]

atheris chooses the random numbers of the changes, and keeps those that reach new code of this package. Accepted inputs,
refused inputs and faults are those of `fuzz.py`. The exit code is 1 if there is a fault.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import atheris
from huggingface_hub import constants

with atheris.instrument_imports(include=["moe_beyond"], exclude=["moe_beyond.cache"]):  # numba compiles plain code only
    import fuzz

MAX_BYTES = 4096
"""Bytes of the longest sequence of random numbers."""


class FedRandom(Random):
    """Random numbers made of bytes; zeros after the last.

    Args:
        content: Bytes to read.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(0)
        self._content, self._read = content, 0

    def getrandbits(self, k: int) -> int:
        """Return a number of ``k`` bits."""
        size = (k + 7) // 8
        part = self._content[self._read : self._read + size]
        self._read += size
        return int.from_bytes(part.ljust(size, b"\0"), "little") & ((1 << k) - 1)

    def random(self) -> float:
        """Return a number in [0, 1)."""
        return self.getrandbits(53) / 2**53


def main() -> None:
    """Parse the options and try the cases; libFuzzer does not return, so the last case ends the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=fuzz.ALL, help="name of the target")
    parser.add_argument("--cases", type=int, default=10**5, help="number of cases (default: 100000)")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: 1)")
    args = parser.parse_args()
    constants.HF_HUB_OFFLINE = True
    target, found, faults = fuzz.ALL[args.target], Counter(), Counter()
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    tempfile.tempdir = str(work)
    folder = work / "case"

    def attempt(content: bytes) -> None:
        folder.mkdir()
        value = target.make(FedRandom(content), folder)
        with fuzz.limited():
            outcome, detail = fuzz.try_input(target, value, folder)
        shutil.rmtree(folder)
        found[outcome if outcome in (fuzz.ACCEPTED, fuzz.REFUSED) else "faults"] += 1
        if outcome not in (fuzz.ACCEPTED, fuzz.REFUSED):
            if outcome not in faults:
                print(f"{outcome}: {detail}; input {value!r}")
            faults[outcome] += 1
        if found.total() == args.cases:
            shutil.rmtree(work)
            print(f"{args.target}: {args.cases:,} cases: " + ", ".join(f"{n:,} {kind}" for kind, n in found.items()))
            sys.stdout.flush()
            os._exit(bool(faults))

    atheris.Setup(
        [sys.argv[0], f"-seed={args.seed}", f"-max_len={MAX_BYTES}", "-len_control=0", "-verbosity=0"], attempt
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
