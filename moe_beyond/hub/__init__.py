"""Uploading predictors and trace sets to the Hugging Face Hub.

.. include:: README.md
"""

from typing import TYPE_CHECKING

from moe_beyond.exports import lazy_exports

if TYPE_CHECKING:
    from moe_beyond.hub.push import Upload as Upload
    from moe_beyond.hub.push import UploadResult as UploadResult
    from moe_beyond.hub.push import prepare_upload as prepare_upload
    from moe_beyond.hub.push import push_upload as push_upload

__all__ = ["Upload", "UploadResult", "prepare_upload", "push_upload"]

__getattr__, __dir__ = lazy_exports(__name__, dict.fromkeys(__all__, "push"))
