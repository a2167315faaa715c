"""A server that speaks the hub's few calls, in a thread, and a cache of the hub's own layout."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub

from tidar.config import hub

CALL = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[\w.-]+/[\w.-]+)(/(?P<call>revision|tree|paths-info|auth-check)(/(?P<rev>[^/]+)(/(?P<path>.*))?)?)?"
)
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[\w.-]+/[\w.-]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")


class Hub:
    """repos: files by name, by id. refs: a revision's commit, by id. requests: what was asked for, in order."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.requests: list[str] = []
        self.status: dict[str, tuple[int, str]] = {}  # answers instead, by id: status and X-Error-Code
        self.truncate: str | None = None  # a file of which the first answer is cut

    def add(self, name: str, files: dict[str, bytes], commit: str = "a" * 40) -> None:
        self.repos[name] = files
        self.refs[name] = {"main": commit, commit: commit}


def empty_cache(monkeypatch, folder: Path) -> None:
    """An empty cache of the hub, and a working folder beside it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(hub, "_pinned", {})
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")


def connect(monkeypatch, address: str) -> None:
    """Makes this process's library ask the server at `address`."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def serving(server: Hub):
    """Yields the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_call(self) -> None:
            url = urlsplit(self.path)
            server.requests.append(f"{self.command} {unquote(url.path)}")
            match = CALL.fullmatch(url.path) or FILE.fullmatch(url.path)
            parts = {name: unquote(part or "") for name, part in match.groupdict().items()} if match else {}
            length = int(self.headers.get("Content-Length", 0))
            asked = self.rfile.read(length)
            name = parts.get("id")
            if name in server.status:
                status, code = server.status[name]
                return self.answer(status, X_Error_Code=code)
            if name not in server.repos:
                return self.answer(401, X_Error_Code="RepoNotFound")
            files = server.repos[name]
            commit = server.refs[name].get(parts["rev"] or "main")
            if commit is None:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if "file" in parts:
                return self.file(files, parts["file"], commit)
            if parts["call"] == "tree":
                folder = parts["path"] and parts["path"] + "/"
                body = self.tree(files, folder, recursive="recursive=true" in url.query.lower())
                if not body:
                    return self.answer(404, X_Error_Code="EntryNotFound")
            elif parts["call"] == "paths-info":
                wanted = re.findall(r"paths=([^&]+)", unquote(asked.decode())) or json.loads(asked)["paths"]
                body = [self.entry(file, files[file]) for file in wanted if file in files]
            else:
                body = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

        do_GET = do_HEAD = do_POST = handle_call

        def entry(self, name: str, content: bytes) -> dict:
            return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}

        def tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
            names = [name.removeprefix(folder).split("/") for name in files if name.startswith(folder)]
            folders = {folder + "/".join(name[:i]) for name in names for i in range(1, len(name))}
            entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(folders)]
            entries += [self.entry(name, files[name]) for name in sorted(files) if name.startswith(folder)]
            return [entry for entry in entries if recursive or "/" not in entry["path"].removeprefix(folder)]

        def file(self, files: dict[str, bytes], name: str, commit: str) -> None:
            if name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            content, status, more = files[name], 200, {}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
                more["Content_Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
                content, status = content[start:stop], 206
                server.requests[-1] += f" from {start}"
            headers = {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X_Repo_Commit": commit, **more}
            length = str(len(content))
            if name == server.truncate and self.command == "GET":
                server.truncate, content, self.close_connection = None, content[: len(content) // 2], True
            return self.answer(status, content, Content_Length=length, Accept_Ranges="bytes", **headers)

        def log_message(self, *args) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
