"""A loopback server that answers like the Hugging Face hub.

It serves the folders `models/org/name` and `datasets/org/name` below a root, each one a repository
with a single commit on `main`. huggingface_hub reads `HF_ENDPOINT` when it is imported, so what is
tested runs in a subprocess with `HubServer.environment(cache)`:

    with HubServer(root) as hub:
        subprocess.run([...], env=hub.environment(tmp_path / "cache"))
        assert hub.bytes_sent("model.safetensors") < 100_000

Large files redirect to another host name (`localhost`), as they do on the hub. A repository that
holds a file `.gated` answers 403. `hub.requests` lists what was asked for.
"""

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
    r"(/(?P<verb>revision|tree|paths-info|refs)(/(?P<revision>[^/]+))?(/(?P<path>.*))?)?"
)
RESOLVE = re.compile(
    r"/(?P<dataset>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)
CDN = re.compile(r"/cdn/(?P<sha256>[0-9a-f]{64})/(?P<path>.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    method: str
    path: str
    range: str | None
    status: int
    bytes_sent: int


class HubError(Exception):
    """An answer of the hub that is an error, with its machine-readable code."""

    def __init__(self, status: HTTPStatus, code: str, commit: str | None = None) -> None:
        super().__init__(code)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": code}
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit


class HubServer:
    """Serves repositories below `root` until the `with` block ends."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self._server.server_address[1]}"

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """Environment of a subprocess that knows no other hub and starts with an own cache."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def bytes_sent(self, suffix: str = "") -> int:
        """Body bytes sent so far for paths that end in `suffix`."""
        return sum(r.bytes_sent for r in self.requests if r.path.endswith(suffix))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def repository(self, kind: str, repo: str) -> Path:
        folder = self.root / kind / repo
        if not folder.is_dir():
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound")
        if (folder / ".gated").exists():
            raise HubError(HTTPStatus.FORBIDDEN, "GatedRepo")
        return folder

    def commit(self, folder: Path, revision: str | None) -> str:
        """The one commit, a hash of all files, if the revision means it."""
        state = hashlib.sha1()
        for path in _files(folder):
            state.update(f"{path.relative_to(folder).as_posix()} {_sha256(path)}\n".encode())
        commit = state.hexdigest()
        if revision not in (None, "main", commit):
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Keep the test output quiet."""

    def _answer(self) -> None:
        self._hub: HubServer = self.server.hub
        self._path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if match := API.fullmatch(self._path):
                self._api(match, body)
            elif match := RESOLVE.fullmatch(self._path):
                self._resolve(match)
            elif match := CDN.fullmatch(self._path):
                self._file(self._hub.root / match["path"], match["sha256"], {})
            else:
                raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound")
        except HubError as error:
            self._send(error.status, b"{}", error.headers)

    def _api(self, match: re.Match[str], body: bytes) -> None:
        folder = self._hub.repository(match["kind"], match["repo"])
        commit = self._hub.commit(folder, match["revision"])
        entries = [_entry(folder, path) for path in _files(folder)]
        match match["verb"]:
            case "tree":
                below = match["path"] or ""
                document: Any = [e for e in entries if e["path"].startswith(below)]
                folders = {str(Path(e["path"]).parent) for e in document} - {"."}
                document += [
                    {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                    for name in sorted(folders)
                ]
                if "recursive=true" not in self.path.lower():
                    depth = below.count("/") + bool(below)
                    document = [e for e in document if e["path"].count("/") == depth]
                if below and not document:
                    raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound")
            case "paths-info":
                asked = json.loads(body)["paths"]
                document = [e for e in entries if e["path"] in asked]
            case "refs":
                main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
                document = {"branches": [main], "converts": [], "tags": []}
            case _:
                document = {
                    "id": match["repo"],
                    "sha": commit,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "createdAt": "2025-01-01T00:00:00.000Z",
                    "lastModified": "2025-01-01T00:00:00.000Z",
                    "siblings": [{"rfilename": e["path"], "size": e["size"]} for e in entries],
                }
        content = json.dumps(document).encode()
        self._send(HTTPStatus.OK, content, {"Content-Type": "application/json"})

    def _resolve(self, match: re.Match[str]) -> None:
        kind = "datasets" if match["dataset"] else "models"
        folder = self._hub.repository(kind, match["repo"])
        commit = self._hub.commit(folder, match["revision"])
        path = folder / match["path"]
        if not path.is_file():
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", commit)
        etag = _sha256(path)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.suffix not in LARGE:
            self._file(path, etag, headers)
            return
        headers |= {
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(path.stat().st_size),
            "Location": f"{self._hub.cdn}/cdn/{etag}/{path.relative_to(self._hub.root)}",
        }
        self._send(HTTPStatus.FOUND, b"", headers)

    def _file(self, path: Path, etag: str, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        headers = {**headers, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(HTTPStatus.OK, path.read_bytes(), headers)
            return
        begin, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if begin > last:
            self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", headers)
            return
        headers["Content-Range"] = f"bytes {begin}-{last}/{size}"
        with path.open("rb") as file:
            file.seek(begin)
            content = file.read(last + 1 - begin)
        self._send(HTTPStatus.PARTIAL_CONTENT, content, headers)

    def _send(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        sent = 0 if self.command == "HEAD" else len(content)
        self._hub.requests.append(
            Request(
                method=self.command,
                path=self._path,
                range=self.headers.get("Range"),
                status=status,
                bytes_sent=sent,
            )
        )
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if sent:
            self.wfile.write(content)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    content = path.read_bytes()
    entry: dict[str, Any] = {
        "type": "file",
        "path": path.relative_to(folder).as_posix(),
        "size": size,
        "oid": hashlib.sha1(f"blob {size}\0".encode() + content).hexdigest(),
    }
    if path.suffix in LARGE:
        entry["lfs"] = {"oid": _sha256(path), "size": size, "pointerSize": 134}
    return entry


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
