"""The Hub: what of a run is uploaded, its model card, and the upload."""

from .card import write_card, write_card_of_records
from .content import contents
from .repository import Patience, Repository, UploadError, upload

__all__ = [
    "Patience",
    "Repository",
    "UploadError",
    "contents",
    "upload",
    "write_card",
    "write_card_of_records",
]
