"""An S3 server on loopback that keeps objects in memory and is strict where stores are.

Only what pyarrow asks of a store: listing, reading, writing in one piece or in parts, deleting. No
object is visible before its upload has ended. It answers one access key, and each n-th call with
"503 Slow Down", or late, if told so.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

ACCESS_KEY = "AKIATEST"


@dataclass(frozen=True)
class Object:
    content: bytes
    modified: float = field(default_factory=time.time)

    @property
    def tag(self) -> str:
        return f'"{hashlib.md5(self.content).hexdigest()}"'


class ObjectStore(ThreadingHTTPServer):
    """busy_each, slow_each: the calls to refuse or to answer late."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = {"bucket"}
        self.objects: dict[str, Object] = {}  # by bucket/key
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.calls: list[str] = []
        self.busy_each = self.slow_each = 0
        self.slow_s = 1.0
        self.guard = threading.Lock()
        self.stored = threading.Condition()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that gave up a slow answer have gone; any other error shows in their own."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, source: Path, place: str) -> None:
        """Copy a file, or a folder's files, to bucket/key."""
        files = [path for path in source.rglob("*") if path.is_file()] or [source]
        for path in files:
            below = "" if path == source else f"/{path.relative_to(source).as_posix()}"
            self.objects[place + below] = Object(path.read_bytes())

    def keep(self, name: str, one: Object) -> None:
        with self.stored:
            self.objects[name] = one
            self.stored.notify_all()

    def await_name(self, start: str, *, timeout_s: float) -> None:
        """Wait until there is an object whose bucket/key begins so."""
        with self.stored:
            assert self.stored.wait_for(
                lambda: any(name.startswith(start) for name in self.objects), timeout_s
            ), f"no {start} after {timeout_s} s"

    def names(self, place: str) -> list[str]:
        """The objects below bucket/key, markers of folders left out."""
        start = f"{place}/"
        return sorted(
            name.removeprefix(start)
            for name in self.objects
            if name.startswith(start) and not name.endswith("/")
        )


@contextmanager
def object_store(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[ObjectStore]:
    """A running store, the environment that leads to it, and a cache of its own for the node."""
    with ObjectStore() as store:
        # Its end waits for the next look at whether it is asked to end.
        thread = threading.Thread(target=store.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        for name, value in {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "XDG_CACHE_HOME": str(cache),
        }.items():
            patch.setenv(name, value)
        try:
            yield store
        finally:
            store.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectStore

    def log_message(self, format: str, *args: object) -> None:
        self.server.calls.append(f"{self.command} {self.path}")

    def _answer(self) -> None:
        body = self._body()
        with self.server.guard:
            number = len(self.server.calls)
        if self.server.slow_each and number % self.server.slow_each == 1:
            time.sleep(self.server.slow_s)
        if self.server.busy_each and number % self.server.busy_each == 0:
            return self._fail(503, "SlowDown", "Please reduce your request rate.")
        if f"Credential={ACCESS_KEY}/" not in self.headers.get("Authorization", ""):
            return self._fail(403, "AccessDenied", "Access Denied")
        parts = urlsplit(self.path)
        place = unquote(parts.path.lstrip("/"))
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = place.partition("/")
        if bucket not in self.server.buckets:
            return self._fail(404, "NoSuchBucket", "The specified bucket does not exist")
        handle = getattr(self, f"_{self.command.lower()}_{'object' if key else 'bucket'}")
        handle(place if key else bucket, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = _joined(self.rfile)
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        signed = "aws-chunked" in self.headers.get("Content-Encoding", "")
        return _joined(io.BytesIO(body)) if signed else body

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **given}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _xml(self, name: str, inside: str, status: int = 200) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><{name}>{inside}</{name}>'
        self._send(status, text.encode(), Content_Type="application/xml")

    def _fail(self, status: int, code: str, message: str) -> None:
        self._xml("Error", f"<Code>{code}</Code><Message>{message}</Message>", status)

    def _head_bucket(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        self._send(200, x_amz_bucket_region="us-east-1")

    def _get_bucket(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        """ListObjectsV2."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after, most = query.get("continuation-token", ""), int(query.get("max-keys", 1000))
        start = len(bucket) + 1
        with self.server.guard:
            objects = {
                name[start:]: one
                for name, one in sorted(self.server.objects.items())
                if name.startswith(f"{bucket}/{prefix}")
            }
        found: dict[str, str] = {}
        for key, one in objects.items():
            head, mark, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if mark:
                name = prefix + head + mark
                found[name] = f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
                continue
            when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(one.modified))
            when += f".{int(one.modified % 1 * 1000):03}Z"
            found[key] = (
                f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
                f"<ETag>{escape(one.tag)}</ETag><Size>{len(one.content)}</Size></Contents>"
            )
        left = {name: text for name, text in found.items() if name > after}
        page = dict(itertools.islice(left.items(), most))
        more = len(page) < len(left)
        token = ""
        if more:
            token = f"<NextContinuationToken>{escape([*page][-1])}</NextContinuationToken>"
        self._xml(
            "ListBucketResult",
            f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(page)}</KeyCount>"
            + token
            + "".join(page.values()),
        )

    def _post_bucket(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        """DeleteObjects."""
        assert "delete" in query
        for part in body.decode().split("<Key>")[1:]:
            self.server.objects.pop(f"{bucket}/{part.partition('</Key>')[0]}", None)
        self._xml("DeleteResult", "")

    def _head_object(self, place: str, query: dict[str, str], body: bytes) -> None:
        self._get_object(place, query, body)

    def _get_object(self, place: str, query: dict[str, str], body: bytes) -> None:
        one = self.server.objects.get(place)
        if one is None:
            return self._fail(404, "NoSuchKey", "The specified key does not exist.")
        content, status, headers = one.content, 200, {}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(content), len(content))
            headers["Content_Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
            content, status = content[int(first) : stop], 206
        headers |= {"ETag": one.tag, "Last_Modified": formatdate(one.modified, usegmt=True)}
        self._send(status, content, **headers)

    def _put_object(self, place: str, query: dict[str, str], body: bytes) -> None:
        if "x-amz-copy-source" in self.headers:
            return self._fail(501, "NotImplemented", "Renaming is no part of publishing.")
        if "partNumber" in query:
            self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
            return self._send(200, ETag=Object(body).tag)
        if self.headers.get("If-None-Match") == "*" and place in self.server.objects:
            return self._fail(412, "PreconditionFailed", "It is there.")
        self.server.keep(place, one := Object(body))
        self._send(200, ETag=one.tag)

    def _post_object(self, place: str, query: dict[str, str], body: bytes) -> None:
        if "uploads" in query:
            number = uuid.uuid4().hex
            self.server.uploads[number] = {}
            return self._xml(
                "InitiateMultipartUploadResult",
                f"<Key>{quote(place)}</Key><UploadId>{number}</UploadId>",
            )
        parts = self.server.uploads.pop(query["uploadId"])
        self.server.keep(place, one := Object(b"".join(parts[n] for n in sorted(parts))))
        self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(one.tag)}</ETag>")

    def _delete_object(self, place: str, query: dict[str, str], body: bytes) -> None:
        if "uploadId" in query:
            self.server.uploads.pop(query["uploadId"], None)
        else:
            self.server.objects.pop(place, None)
        self._send(204)


def _joined(stream: BufferedIOBase) -> bytes:
    """The content of chunks that each begin with their size in hexadecimal."""
    content = b""
    while size := int(stream.readline().partition(b";")[0], 16):
        content += stream.read(size)
        stream.readline()
    return content
