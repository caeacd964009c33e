"""The page of ``moe-beyond report``: one self-contained HTML file about a predictor or a run."""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.report.html.build import write_page as write_page
    from moe_beyond.report.html.report import write_report as write_report
    from moe_beyond.report.html.strategies import DEFAULT_DEVICES as DEFAULT_DEVICES
    from moe_beyond.report.html.strategies import DEFAULT_SHARES as DEFAULT_SHARES
    from moe_beyond.report.html.strategies import default_slots as default_slots
    from moe_beyond.report.html.strategies import page_strategies as page_strategies
    from moe_beyond.report.html.subject import Subject as Subject
    from moe_beyond.report.html.subject import find_subject as find_subject

__all__ = [
    "DEFAULT_DEVICES",
    "DEFAULT_SHARES",
    "Subject",
    "default_slots",
    "find_subject",
    "page_strategies",
    "write_page",
    "write_report",
]

_MODULES = {
    "DEFAULT_DEVICES": "strategies",
    "DEFAULT_SHARES": "strategies",
    "Subject": "subject",
    "default_slots": "strategies",
    "find_subject": "subject",
    "page_strategies": "strategies",
    "write_page": "build",
    "write_report": "report",
}

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
