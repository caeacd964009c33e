"""Uploading predictors and trace sets to the Hugging Face Hub."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_beyond.hub.push import Upload as Upload
    from moe_beyond.hub.push import UploadResult as UploadResult
    from moe_beyond.hub.push import prepare_upload as prepare_upload
    from moe_beyond.hub.push import push_upload as push_upload

__all__ = ["Upload", "UploadResult", "prepare_upload", "push_upload"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moe_beyond.hub import push

    return getattr(push, name)
