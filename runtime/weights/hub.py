"""The hub that publishes weights, through huggingface_hub's public interface: what it has, and its bytes.

Listing, addresses, token, proxy settings, mirror (HF_ENDPOINT) and HTTP client are the library's. The body of
a file is read here, with that client: the library's own download (2.4) goes into a file of a random name and
removes it when it is interrupted, so 14 GB cut at the last megabyte would begin anew. Here the bytes that
have arrived stay, and the next request asks for the rest.

Plain HTTP, never Xet: its client keeps chunks in a cache outside the weights directory, which no free-space
check of ours would see, asks servers that a mirror does not stand for, and cannot continue a partial file.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import WeightsError

TRANSIENT = (408, 429, 500, 502, 503, 504)
OnBytes = Callable[[int], None]


class UnreachableError(WeightsError):
    """No hub answered: offline, no network, a wrong address."""


class Stopped(Exception):
    """The download was asked to stop."""


@dataclass(frozen=True)
class Patience:
    """How long to bear with a hub: seconds to wait for bytes, tries without progress, seconds between them.

    The pause doubles with each try. A hub that names its own pause (Retry-After) gets it, up to `longest`.
    """

    timeout: float = 20.0
    tries: int = 5
    pause: float = 1.0
    longest: float = 60.0


@dataclass(frozen=True)
class Published:
    """A file as the hub lists it: its sha256 if it is a large file, otherwise git's id of its content."""

    bytes: int
    sha256: str | None
    git_id: str | None

    @property
    def key(self) -> str:
        """A few characters that change with the content."""
        return (self.sha256 or self.git_id or "unknown")[:12]


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    repository: str
    commit: str
    files: dict[str, Published]


class Hub:
    """One hub. Its methods raise WeightsError, in a sentence that says what to do."""

    def __init__(self, patience: Patience | None = None, stop: threading.Event | None = None) -> None:
        from huggingface_hub import constants

        self.patience = patience or Patience()
        self.stop = stop or threading.Event()
        # Read here and not only when the library was imported: a program may set it later.
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    def listing(self, repository: str, revision: str | None) -> Listing:
        """The files of a repository at `revision` (None: its newest) with sizes and digests; one request."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint)

        def ask() -> Any:
            try:
                return api.model_info(
                    repository, revision=revision, files_metadata=True, timeout=self.patience.timeout
                )
            except (AttributeError, KeyError, TypeError) as error:  # JSON, and not that of a hub
                raise ValueError("it answers without the fields of a model") from error

        what = repository if revision is None else f"{repository} at revision {revision}"
        info = self._patiently(ask, what, lambda: False)
        try:
            files = {entry.rfilename: _published(entry) for entry in info.siblings}
            commit = info.sha
        except (AttributeError, TypeError, ValueError) as error:
            raise self._no_hub(error) from error
        if not isinstance(commit, str) or not commit:
            raise self._no_hub("it names no commit")
        return Listing(repository, commit, files)

    def fetch(self, listing: Listing, path: str, part: Path, on_bytes: OnBytes) -> None:
        """Bring `part` to the full length of the file, from wherever it stands; it is not verified.

        `on_bytes` is told of bytes that arrived (and, below zero, of bytes that had to be given up). Raises
        WeightsError, OSError (disk), Stopped; what has arrived stays in `part`.
        """
        wanted = listing.files[path].bytes
        if part.exists() and part.stat().st_size > wanted:
            part.unlink()
        if wanted == 0:
            part.touch()
        last = -1

        def grew() -> bool:
            nonlocal last
            before, last = last, part.stat().st_size if part.exists() else 0
            return last > before

        def once() -> None:
            have = part.stat().st_size if part.exists() else 0
            if have < wanted:
                self._stream(listing, path, part, have, on_bytes)

        what = f"{path} of {listing.repository}"
        grew()
        self._patiently(once, what, grew, complete=lambda: part.exists() and part.stat().st_size == wanted)

    def _stream(self, listing: Listing, path: str, part: Path, have: int, on_bytes: OnBytes) -> None:
        """One request for the bytes from `have` on, appended to `part` as they come."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(listing.repository, path, revision=listing.commit, endpoint=self.endpoint)
        # identity: a compressed answer has another length, and cannot be continued
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with get_session().stream(
            "GET", url, headers=headers, timeout=self.patience.timeout, follow_redirects=True
        ) as response:
            if have and response.status_code == 416:
                part.unlink()
                on_bytes(-have)
                return
            hf_raise_for_status(response)
            continued = response.status_code == 206 and _begins_at(response.headers, have)
            if have and not continued:
                part.unlink()
                on_bytes(-have)
                if response.status_code == 206:  # a range, and not the one that was asked for
                    return
                have = 0
            self._append(response, part, have, listing.files[path].bytes, on_bytes)

    def _append(self, response: Any, part: Path, have: int, wanted: int, on_bytes: OnBytes) -> None:
        with part.open("ab") as file:
            for chunk in response.iter_bytes():  # as it comes: what waits for a full chunk is lost in a cut
                if self.stop.is_set():
                    raise Stopped
                have += len(chunk)
                if have > wanted:
                    raise WeightsError(
                        f"{response.url.path} is longer than the {wanted} bytes that the hub lists; "
                        "run this again later, or ask whoever runs the mirror."
                    )
                file.write(chunk)
                on_bytes(len(chunk))

    def _patiently(
        self,
        once: Callable[[], Any],
        what: str,
        grew: Callable[[], bool],
        complete: Callable[[], bool] = lambda: True,
    ) -> Any:
        """`once()`, again after what may pass (a cut, a timeout, 5xx, 429), until it is `complete`.

        Tries that brought bytes do not count.
        """
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        failures = 0
        while True:
            fault: Exception | None = None
            try:
                result = once()
                if complete():
                    return result
            except OfflineModeIsEnabled as error:
                raise UnreachableError(
                    f"{what} is needed and HF_HUB_OFFLINE forbids asking for it; unset that, or copy the "
                    "files from another machine."
                ) from error
            except HTTPError as error:  # before OSError and ValueError, which some of its kinds are too
                fault = error
                status = _status(error)
                if status is not None and status not in TRANSIENT:
                    raise self._refused(error, status, what) from error
                if type(error).__name__ == "UnsupportedProtocol":  # such an address never will answer
                    raise self._gave_up(error, what, 1) from error
            except ValueError as error:  # what answered does not speak JSON
                raise self._no_hub(error) from error
            failures = 0 if grew() else failures + 1
            pause = self._pause(fault, failures)
            if failures >= self.patience.tries or pause is None:
                raise self._gave_up(fault, what, failures) from fault
            if self.stop.wait(pause):
                raise Stopped

    def _pause(self, fault: Exception | None, failures: int) -> float | None:
        """Seconds until the next try; None if the hub asks for more than there is patience."""
        asked = _retry_after(fault)
        if asked is not None:
            return asked if asked <= self.patience.longest else None
        return min(self.patience.pause * 2.0 ** max(0, failures - 1), self.patience.longest)

    def _refused(self, error: Exception, status: int, what: str) -> WeightsError:
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        hub = f"The hub at {self.endpoint}"
        if isinstance(error, RevisionNotFoundError):
            return WeightsError(f"{hub} has no {what}; name another with --revision (main is the newest).")
        if isinstance(error, EntryNotFoundError):
            return WeightsError(
                f"{hub} has no {what} (404): it was renamed or removed; try --revision main or another model."
            )
        if status in (401, 403) or isinstance(error, GatedRepoError):
            return WeightsError(
                f"{hub} refuses {what} ({status}), or has no such thing; set HF_TOKEN to a token that may "
                "read it, and accept its licence on its page there if it asks for that."
            )
        if status == 404 or isinstance(error, RepositoryNotFoundError):
            return WeightsError(
                f"{hub} has no {what} ({status}), or hides it from you; if HF_ENDPOINT names a mirror, it "
                "may lack it, and if it is private, set HF_TOKEN."
            )
        return WeightsError(f"{hub} answers {status} for {what}; run this again later.")

    def _gave_up(self, fault: Exception | None, what: str, failures: int) -> WeightsError:
        hub = f"The hub at {self.endpoint}"
        status = None if fault is None else _status(fault)
        if status == 429:
            asked = _retry_after(fault)
            wait = "a while" if asked is None else f"{asked:.0f} s"
            return WeightsError(
                f"{hub} has had too many requests (429) and asks to wait {wait}; run the same command after "
                "that: it continues where it stopped. A token in HF_TOKEN is allowed more."
            )
        if status is not None:
            return WeightsError(
                f"{hub} answers {status} for {what}, {failures} times; run the same command later: it "
                "continues where it stopped."
            )
        if fault is None:
            return WeightsError(
                f"{hub} sends less of {what} than it lists, {failures} times; run the same command later."
            )
        return UnreachableError(
            f"{hub} does not answer for {what} ({_first_line(fault)}); check the network, HTTPS_PROXY and "
            "HF_ENDPOINT, and run the same command again: it continues where it stopped."
        )

    def _no_hub(self, why: object) -> WeightsError:
        return WeightsError(
            f"What answers at {self.endpoint} is no hub of models ({_first_line(why)}); check HF_ENDPOINT "
            "and the proxy."
        )


def _published(entry: Any) -> Published:
    """A file of a listing with its fields proven; ValueError."""
    if type(entry.size) is not int or entry.size < 0:
        raise ValueError(f"it does not tell the size of {entry.rfilename!r:.80}")
    digest = entry.lfs.sha256 if entry.lfs is not None else None
    for value, length in ((digest, 64), (entry.blob_id, 40)):
        if value is not None and not _is_hexadecimal(value, length):
            raise ValueError(f"it gives {entry.rfilename!r:.80} a digest that is none")
    return Published(entry.size, digest, entry.blob_id)


def _is_hexadecimal(value: object, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and set(value) <= set("0123456789abcdef")


def _begins_at(headers: Any, have: int) -> bool:
    return bool(headers.get("Content-Range", "").replace("=", " ").startswith(f"bytes {have}-"))


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _retry_after(error: Exception | None) -> float | None:
    """Seconds that a 429 or 503 asks to wait; None where it does not say."""
    response = getattr(error, "response", None)
    if response is None or response.status_code not in (429, 503):
        return None
    try:
        return max(0.0, float(response.headers.get("Retry-After", "")))
    except ValueError:  # absent, or a date: then our own pause
        return None


def _first_line(reason: object) -> str:
    lines = str(reason).strip().splitlines()
    return lines[0][:200] if lines else type(reason).__name__
