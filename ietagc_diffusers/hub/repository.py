"""A repository on the Hub, through a network that may fail."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from ..errors import UsageError, one_line
from ..run_folder import RunFolder
from .content import CARD, Content, contents
from .sections import merge, read_card

AGAIN = {408, 409, 425, 429}  # besides those of 500 and more: the same request may succeed later
REFUSED = {401: "log in with `hf auth login`, or give a token that may write", 403: "the token may not write there"}
SECONDS = 30.0  # for an answer to a small request
Result = TypeVar("Result")


class UploadError(RuntimeError):
    """The Hub did not do what it was asked for, in a line that has no token."""


@dataclass(frozen=True)
class Patience:
    """How often a request is made that fails for a reason which may pass, and how long is waited before the next try.

    Reasons that may pass are a connection that fails or is cut, too many requests, a conflict, and faults of the Hub.
    The Hub's own client tries small requests and the parts of a file a few times more by itself.

    Args:
        tries: at most so many.
        first: seconds before the second try; before each further one twice as long.
        longest: seconds. A Hub that asks for more (``Retry-After``) is asked no further.
        sleep, clock: the time, in seconds; the clock since 1970.
    """

    tries: int = 6
    first: float = 1.0
    longest: float = 300.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time

    def __call__(self, ask: Callable[[], Result]) -> Result:
        """What ``ask()`` returns. Raises what the last try raised."""
        wait = self.first
        for left in range(self.tries - 1, -1, -1):
            try:
                return ask()
            except Exception as error:
                wanted = self._asked_for(error)
                if not left or not may_pass(error) or (wanted or 0) > self.longest:
                    raise
                self.sleep(min(wait, self.longest) if wanted is None else wanted)
            wait *= 2
        raise AssertionError("at least one try is made")

    def _asked_for(self, error: Exception) -> float | None:
        """The seconds that the answer asks to wait for: a number, or a date."""
        text = next((r.headers.get("Retry-After") for r in _responses(error)), None)
        if text is None:
            return None
        if text.strip().isdecimal():
            return float(text)
        try:
            return max(parsedate_to_datetime(text).timestamp() - self.clock(), 0.0)
        except ValueError:
            return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _responses(error):
    """The Hub's answers among an error and what led to it."""
    return (answer for e in _chain(error) if (answer := getattr(e, "response", None)) is not None)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    for answer in _responses(error):
        return answer.status_code in AGAIN or answer.status_code >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    kinds = {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}
    # TransportError is the HTTP client's; the transfer of large files raises RuntimeError; an answer that is no JSON
    # is a page of something in between.
    return not kinds.isdisjoint(
        {"ConnectionError", "TimeoutError", "TransportError", "RuntimeError", "JSONDecodeError"}
    )


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub, of a model or a dataset, which ``HF_ENDPOINT`` may say the address of.

    Args:
        name: ``name`` or ``owner/name``.
        revision: a branch, or ``refs/pr/N``; None: main.
        private: whether it is made private, if it is created; None: as the account has it.
        token: None: the one that this machine is logged in with.
        kind: ``model`` or ``dataset``.

    Raises:
        UsageError: a name that the Hub does not take.
    """

    name: str
    revision: str | None = None
    private: bool | None = None
    token: str | None = field(default=None, repr=False)
    patience: Patience = Patience()
    kind: str = "model"

    def __post_init__(self):
        check_name(self.name, "repo")
        check_revision(self.revision, "revision")

    @property
    def _api(self) -> HfApi:
        return HfApi(token=self.token)

    def _ask(self, what: str, ask: Callable[[], Result]) -> Result:
        try:
            return self.patience(ask)
        except Exception as error:  # of the network, of the Hub, of its client
            raise UploadError(f"{what}: {self._told(error)}") from None  # what led to it may name the token

    def _told(self, error: Exception) -> str:
        """An error in a line, without the token, which an answer may repeat."""
        said = [" ".join(str(each).split()) or type(each).__name__ for each in _chain(error)]
        text = said[0] if len(said) == 1 or said[1] in said[0] else f"{said[0]} ({said[1]})"
        for token in filter(None, (self.token, get_token())):
            text = text.replace(token, "***")
        advice = next((REFUSED.get(answer.status_code) for answer in _responses(error)), None)
        return f"{text[:200]}; {advice}" if advice else text[:200]

    def create(self) -> "Repository":
        """Create the repository and the branch, or find them. Returns it with its owner's name.

        Raises ``UploadError``.
        """
        created = self._ask(
            "the repository cannot be created",
            lambda: self._api.create_repo(repo_id=self.name, exist_ok=True, private=self.private, repo_type=self.kind),
        )
        found = replace(self, name=created.repo_id)
        if self.revision not in (None, "main") and not str(self.revision).startswith("refs/"):
            self._ask(
                f"the branch {self.revision} cannot be created",
                lambda: self._api.create_branch(
                    repo_id=found.name, branch=str(self.revision), exist_ok=True, repo_type=self.kind
                ),
            )
        return found

    def card(self) -> str | None:
        """The card's text; None if there is none. Raises ``UploadError``."""

        def ask() -> str | None:
            revision = None if self.revision is None else quote(self.revision, safe="")
            address = hf_hub_url(self.name, CARD, revision=revision, repo_type=self.kind)
            headers = build_hf_headers(token=self.token)
            answer = get_session().get(address, headers=headers, timeout=SECONDS, follow_redirects=True)
            if answer.status_code == 404:
                return None
            hf_raise_for_status(answer)
            return answer.content.decode("utf-8", "replace")

        return self._ask("its card cannot be read", ask)

    def commit(self, files: Mapping[str, Content], message: str) -> str:
        """Upload files in one commit: all of them, or none. Returns the commit's address. Raises ``UploadError``."""

        def ask() -> str:
            # Made anew for each try: what has arrived is then found there, and a commit is not made twice.
            operations = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file) if isinstance(file, Path) else file)
                for name, file in files.items()
            ]
            made = self._api.create_commit(
                repo_id=self.name,
                operations=operations,
                commit_message=message,
                revision=self.revision,
                repo_type=self.kind,
            )
            return made.commit_url

        return self._ask("the files cannot be uploaded", ask)


def check_name(name: str, setting: str) -> None:
    """Raise ``UsageError``, naming ``setting``, for a name of a repository that the Hub does not take."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"`{setting}` {name}: is no name for a repository on the Hub, as in me/my-model: {one_line(error)}"
        ) from error


def check_revision(revision: str | None, setting: str) -> None:
    """Raise ``UsageError``, naming ``setting``, for what cannot be the name of a branch (git-check-ref-format)."""
    if revision is None:
        return
    parts = revision.split("/")
    bad = any(not part or part.startswith((".", "-")) or part.endswith((".", ".lock")) for part in parts)
    if bad or ".." in revision or "@{" in revision or any(c in " ~^:?*[\\" or not c.isprintable() for c in revision):
        raise UsageError(f"`{setting}` {revision}: is no name for a branch; give one such as main or second-try")


def upload(run: RunFolder, repository: Repository, message: str) -> str:
    """Upload a finished run with its card, see ``contents``. On a card that is there already only the run's own section
    changes. Returns the commit's address.

    Raises:
        UploadError: the Hub or the network refuses; nothing is committed.
        UsageError: the folder is not that of a finished run, or a card's section has lost its end.
    """
    files = contents(run)
    own, there = read_card(run) or "", repository.card()
    card = own if there is None else merge(there, own, f"the card of {repository.name}")
    return repository.commit({**files, CARD: card.encode()}, message)
