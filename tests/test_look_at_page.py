"""The tool that opens pages finds their errors, if a browser is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "look_at_page.py"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEAD = (
    "<!doctype html><html lang='en'><meta name='viewport' content='width=device-width'><link rel='icon' href='data:,'>"
)


def look(page: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(page), "--out", str(page.parent / "seen"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_errors_of_a_page_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        f"{HEAD}<p>fine</p><div style='overflow-x: auto'><div style='width: 900px'>wide, scrolled</div></div>"
    )
    done = look(page)
    assert (done.returncode, done.stderr) == (0, "")
    pictures = sorted(path.name for path in (tmp_path / "seen").iterdir())
    assert pictures == [f"page-{width}-{scheme}.png" for width in (1280, 360) for scheme in ("dark", "light")]
    page.write_text(
        f"{HEAD}<img alt='' src='http://127.0.0.1:9/x.png'><script>console.error('oh')</script>"
        "<details><summary>more</summary><div id='wide' style='width: 900px'>wide</div></details>"
    )
    done = look(page)
    assert done.returncode == 1
    for line in (
        'px wide, all parts opened: scrolls sideways at <div id="wide"',
        "1280 px, dark: request leaves it: http://127.0.0.1:9/x.png",
        "360 px, dark: console: oh",
    ):
        assert line in done.stderr
    assert sum("scrolls sideways" in line for line in done.stderr.splitlines()) == 2  # on the phone, light and dark


def test_a_missing_page_is_refused(tmp_path: Path) -> None:
    done = look(tmp_path / "gone.html", "--browser", sys.executable)
    assert done.returncode == 2
    assert "no such file" in done.stderr
