"""Look up known vulnerabilities of the pinned versions with pip-audit, if its data can be read here.

    python tools/audit.py [--requirements constraints.txt] [--json FILE]

pip-audit reads the data over the network, from PyPI. Where there is no network, or the index has no such data, nothing
is audited: one line states it, and the exit code is 0. The exit code is 1 if a version has a known vulnerability.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_beyond.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300
"""Time limit: without a network, requests may wait for it."""


def audit(requirements: Path) -> list[dict[str, Any]] | None:
    """Return a record for each package; None if no data can be read."""
    words = ("--requirement", str(requirements), "--no-deps", "--disable-pip", "--format", "json", "--timeout", "10")
    command = [sys.executable, "-m", "pip_audit", *words, "--progress-spinner", "off"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        records: list[dict[str, Any]] = json.loads(ended.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return records


def main() -> None:
    """Parse the options, audit, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requirements", type=Path, default=ROOT / "constraints.txt", help="pinned versions")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    records = audit(args.requirements)
    audited = [record for record in records or [] if "vulns" in record]
    found = [(record["name"], record["version"], entry["id"]) for record in audited for entry in record["vulns"]]
    if not audited:
        print("audit: no data on vulnerabilities can be read here; no package was audited")
    else:
        print(f"audit: {len(audited)} of {len(records or [])} packages audited, {len(found)} known vulnerabilities")
    for name, version, identifier in found:
        print(f"{name} {version}: {identifier}")
    if args.json:
        write_json(args.json, {"audited": len(audited), "packages": len(records or []), "found": found})
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
