"""A model repository on the Hugging Face hub: small files whole, weights by byte ranges.

Everything is read at one commit. What the local hub cache holds is read from there, so that
offline work (`HF_HUB_OFFLINE=1`) needs no second code path; headers of shards that were not
downloaded are kept in the hub's assets cache, by commit.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    HfApi,
    cached_assets_path,
    constants,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from moetools.errors import CheckpointError
from moetools.safetensors_format import read_header

# The base error of the HTTP client that huggingface_hub was built on (httpx, later httpx2).
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


class HubRepository:
    """One model repository at one commit.

    Attributes:
        name: The model as the user typed it.
        repo_id: `org/name`.
        commit: The commit that the revision meant when the repository was opened.
        snapshot: Folder of the local cache that holds the downloaded files of this commit.
    """

    def __init__(self, repo_id: str, revision: str | None) -> None:
        """Resolve the revision by fetching `config.json`, from the cache when offline.

        Raises:
            CheckpointError: No such repository or revision, no access, or offline and not cached.
        """
        # What it would log about retries is raised as one clear error in the end.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self.repo_id = repo_id
        self.name = f"{repo_id}@{revision}" if revision else repo_id
        try:
            with self._clear_errors("config.json"):
                config = Path(hf_hub_download(repo_id, "config.json", revision=revision))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.name} is not a transformers checkpoint: it has no config.json."
            ) from error
        self.snapshot = config.parent
        self.commit = self.snapshot.name

    def where(self, name: str) -> str:
        """A file of the repository in the user's words."""
        return f"{self.name}: {name}"

    def file(self, name: str) -> Path | None:
        """Fetch a small file; None where the repository has no such file."""
        known = try_to_load_from_cache(self.repo_id, name, revision=self.commit)
        if known is not None:  # a path, or the cache's mark for a file that does not exist
            return Path(known) if isinstance(known, str) else None
        try:
            with self._clear_errors(name):
                return Path(hf_hub_download(self.repo_id, name, revision=self.commit))
        except FileNotFoundError:
            return None

    def cached(self, name: str) -> Path | None:
        """The file in the local cache, or None; never asks the network."""
        path = try_to_load_from_cache(self.repo_id, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def names(self) -> list[str] | None:
        """All files of the repository; None when it cannot be asked."""
        try:
            return list(HfApi().list_repo_files(self.repo_id, revision=self.commit))
        except (HTTP_ERROR, OSError):
            return None

    def read(self, name: str, begin: int, end: int) -> tuple[bytes, int]:
        """Read bytes [begin, end) of a file that was not downloaded, with its whole size.

        Raises:
            FileNotFoundError: The repository has no such file.
            CheckpointError: The hub cannot be reached or does not serve byte ranges.
        """
        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
        with (
            self._clear_errors(name),
            http_stream_backoff(
                "GET",
                url,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                follow_redirects=True,
                max_retries=2,
            ) as response,
        ):
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise CheckpointError(
                    f"{self.where(name)} cannot be read in parts: the server ignores byte ranges. "
                    f"Download the model first: `hf download {self.repo_id}`."
                )
            size = int(response.headers["Content-Range"].rpartition("/")[2])
            return b"".join(response.iter_bytes()), size

    def header(self, name: str) -> tuple[bytes, int]:
        """Header of a shard that was not downloaded, and the size of the whole shard in bytes."""
        folder = Path(cached_assets_path("moetools", namespace=self.repo_id, subfolder=self.commit))
        kept = folder / f"{name.replace('/', '--')}.header"
        if kept.is_file():
            content = kept.read_bytes()
            return content[8:], int.from_bytes(content[:8], "little")
        header, size = read_header(lambda begin, end: self.read(name, begin, end), self.where(name))
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            part.write(size.to_bytes(8, "little") + header)
        os.replace(part.name, kept)
        return header, size

    def download(self, allow: Sequence[str], ignore: Sequence[str] = ("*/*",)) -> Path:
        """Download the files that match the patterns; return their folder.

        By default only files of the top folder.
        """
        with self._clear_errors("a file of the snapshot"):
            return Path(
                snapshot_download(
                    self.repo_id,
                    revision=self.commit,
                    allow_patterns=list(allow),
                    ignore_patterns=list(ignore),
                )
            )

    @contextmanager
    def _clear_errors(self, name: str) -> Iterator[None]:
        """Turn the hub's errors into one clear line; a file that does not exist stays one."""
        try:
            yield
        except GatedRepoError as error:
            raise CheckpointError(
                f"{self.repo_id} is gated: accept its terms at {constants.ENDPOINT}/{self.repo_id} "
                "and log in with `hf auth login`."
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{self.name}: the repository has no such revision. Leave it out for the newest."
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise CheckpointError(
                f"{self.repo_id}: no such folder here and no such model on the hub "
                f"({constants.ENDPOINT}). Check the spelling; for a private model log in with "
                "`hf auth login`."
            ) from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            reason = (
                "HF_HUB_OFFLINE is set"
                if constants.HF_HUB_OFFLINE
                else f"{constants.ENDPOINT} cannot be reached"
            )
            raise CheckpointError(
                f"{self.name}: no such folder here, and {name} is not in the hub cache while "
                f"{reason}. Run `hf download {self.repo_id}` where there is a network."
            ) from error
        except EntryNotFoundError as error:
            raise FileNotFoundError(name) from error
        except HTTP_ERROR as error:
            raise CheckpointError(
                f"{self.name}: {name} cannot be read from {constants.ENDPOINT} "
                f"({str(error).splitlines()[0]})."
            ) from error
