"""What happens along a run, each in a small class: see ``training.ensemble.Callback``."""

from .checkpoints import Checkpoints
from .epochs import SavedEpochs
from .faults import BadSamples, Diverged, Ended, NonFinite
from .log import FileLosses, StepLog
from .monitor import Monitor
from .privacy import PrivacySpent
from .progress import Progress
from .rounds import RoundRecords, SavedRounds
from .signals import Signals
from .uploads import Uploads
from .validation import Validation

__all__ = [
    "BadSamples",
    "Checkpoints",
    "Diverged",
    "Ended",
    "FileLosses",
    "Monitor",
    "NonFinite",
    "PrivacySpent",
    "Progress",
    "RoundRecords",
    "SavedEpochs",
    "SavedRounds",
    "Signals",
    "StepLog",
    "Uploads",
    "Validation",
]
