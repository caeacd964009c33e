"""Write the API documentation of the package as HTML.

    python tools/build_docs.py [--out site]

Packages import their public names when these are first used, and pdoc documents only names that exist. It also leaves
out the modules of a package with ``__all__``. Therefore this tool imports all names first, and lists all modules.
"""

import argparse
import importlib
import pkgutil
import warnings
from pathlib import Path

import pdoc

import moe_beyond

SKIPPED = ("moe_beyond.__main__",)
"""Modules that run a command when they are imported."""


def import_all() -> list[str]:
    """Import every module and the public names of every package; return the names of the modules."""
    modules = pkgutil.walk_packages(moe_beyond.__path__, "moe_beyond.")
    names = ["moe_beyond", *(module.name for module in modules if module.name not in SKIPPED)]
    for name in names:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            setattr(module, public, getattr(module, public))
    return names


def main() -> None:
    """Write the documentation, and print the path of its first page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("site"), help="output folder (default: site)")
    args = parser.parse_args()
    names = import_all()
    # A package without ``__all__`` brings its modules, which are also in the list.
    warnings.filterwarnings("ignore", "The module specification .* adds a module named")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*names, output_directory=args.out)
    print(f"{args.out / 'index.html'}")


if __name__ == "__main__":
    main()
