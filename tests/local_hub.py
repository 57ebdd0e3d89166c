# Copyright 2026 The NSA for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""A hub on this machine: the part of the Hugging Face hub's HTTP interface that uploads and downloads of models use."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

__all__ = ["LocalHub", "use_hub"]

USER, TOKEN = "me", "hf_testing"


class LocalHub:
    """Serves on loopback while used as a context manager.

    Attributes:
        repos: repository id -> branch -> file name -> content, of the last commit.
        created: what each `create_repo` asked for.
        commits: (repository id, branch, first line of the message), in order.
        refuse: status code for every write, to test refusals.
    """

    def __init__(self):
        self.repos, self.created, self.commits, self.refuse = {}, [], [], None

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def commit_of(self, repo, branch):
        """A hash that changes with the content, as a commit's does."""
        files = self.repos[repo][branch]
        return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()

    def find(self, repo, revision):
        """The branch that `revision` names: its own name or its commit."""
        branches = self.repos.get(repo, {})
        return next((b for b in branches if revision in (b, self.commit_of(repo, b))), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: LocalHub

    def log_message(self, *args):
        pass

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.reply({"error": code}, 404, X_Error_Code=code)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if self.state.refuse is not None:
            return self.reply({"error": "you may not write here"}, self.state.refuse)
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.state.created.append(asked)
            repo = f"{asked.get('organization') or USER}/{asked['name']}"
            self.state.repos.setdefault(repo, {"main": {".gitattributes": b""}})
            return self.reply({"url": f"{self.state.endpoint}/{repo}", "id": repo, "name": repo})
        owner, name, action, branch = path.removeprefix("/api/models/").split("/", 3)
        repo = f"{owner}/{name}"
        branches = self.state.repos[repo]
        if action == "branch":
            branches.setdefault(branch, dict(branches["main"]))
            return self.reply({})
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.reply({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        assert action == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.state.commits.append((repo, branch, line["value"]["summary"]))
            elif line["key"] == "file":
                branches[branch][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                raise AssertionError(line["key"])
        commit = self.state.commit_of(repo, branch)
        address = f"{self.state.endpoint}/{repo}/commit/{commit}"
        pull_request = f"{self.state.endpoint}/{repo}/discussions/1" if "create_pr=1" in self.path else None
        answer = {"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""}
        return self.reply(answer | {"pullRequestUrl": pull_request})

    def _chunk(self):
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "whoami-v2"]:
            return self.reply({"name": USER, "type": "user", "auth": {}, "orgs": []})
        if path[:2] == ["api", "models"]:
            repo, revision = "/".join(path[2:4]), "/".join(path[5:6]) or "main"
            branch = self.state.find(repo, revision)
            if branch is None:
                return self.missing("RepoNotFound")
            files = self.state.repos[repo][branch]
            if path[4:5] == ["tree"]:
                listed = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files.items()]
                return self.reply(listed)
            siblings = [{"rfilename": name} for name in files]
            return self.reply({"id": repo, "sha": self.state.commit_of(repo, branch), "siblings": siblings})
        if path[2:3] != ["resolve"]:
            return self.missing("EntryNotFound")
        repo, revision, name = "/".join(path[:2]), path[3], "/".join(path[4:])
        branch = self.state.find(repo, revision)
        if branch is None:
            return self.missing("RepoNotFound" if repo not in self.state.repos else "RevisionNotFound")
        commit = self.state.commit_of(repo, branch)
        content = self.state.repos[repo][branch].get(name)
        if content is None:
            return self.reply({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.reply(content, X_Repo_Commit=commit, ETag=etag)

    do_HEAD = do_GET


@contextlib.contextmanager
def use_hub(monkeypatch):
    """A `LocalHub` that huggingface_hub of this process talks to."""
    from huggingface_hub import constants

    with LocalHub() as hub:
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, with the endpoint of that time
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
