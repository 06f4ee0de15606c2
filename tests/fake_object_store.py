"""An in-memory fake of Google Cloud Storage, served by this process.

Implements the part of https://cloud.google.com/storage/docs/json_api that gcsfs and tensorstore
use: objects with generations, preconditions, ranges, listings by folder, copies, simple, multipart
and resumable uploads, and batch deletion.
"""

import base64
import contextlib
import email
import http.server
import itertools
import json
import re
import threading
import urllib.parse
import zlib

import google_crc32c

BUCKET = "shop"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects, sessions, lock, generations = {}, [], threading.RLock(), itertools.count(1)

    def log_message(self, *args):
        pass

    def _answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status != 304 and self.command != "HEAD":
            self.wfile.write(content)

    def _respond(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        split = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(split.query, keep_blank_values=True))
        with self.lock:
            self._answer_to(split.path, query, body)

    do_GET = do_POST = do_DELETE = do_HEAD = do_PUT = _respond

    def _answer_to(self, path, query, body):
        if path.startswith("/batch/"):
            return self._batch(body)
        found = re.fullmatch(rf"(/upload|/download)?/storage/v1/b/{BUCKET}(/o)?(/.*)?", path)
        if not found:
            return self._answer(404, {"error": {"code": 404, "message": f"no {path}"}})
        kind, objects, rest = found.groups()
        if not objects:
            return self._answer(200, {"kind": "storage#bucket", "name": BUCKET})
        if rest is None:
            if self.command == "GET":
                return self._answer(200, self._list(query))
            return self._upload(query, body)
        source, _, target = rest[1:].partition(f"/rewriteTo/b/{BUCKET}/o/")
        name = urllib.parse.unquote(source)
        status = self._precondition(name, query)
        if status:
            return self._answer(status)
        if name not in self.objects:
            return self._answer(404, {"error": {"code": 404, "message": f"no {name}"}})
        if self.command == "DELETE":
            del self.objects[name]
            return self._answer(204)
        if target:
            copy = self._put(urllib.parse.unquote(target), self.objects[name][1])
            return self._answer(200, {"done": True, "resource": copy})
        if query.get("alt") == "media" or kind == "/download":
            return self._read(*self.objects[name])
        return self._answer(200, self._metadata(name))

    def _precondition(self, name, query):
        """Status 304 or 412 if a precondition is not met, otherwise None."""
        generation = self.objects.get(name, (0, b""))[0]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return 412
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            return 304 if self.command == "GET" else 412
        return None

    def _put(self, name, content):
        self.objects[name] = next(self.generations), content
        return self._metadata(name)

    def _metadata(self, name):
        generation, content = self.objects[name]
        return {
            "kind": "storage#object", "name": name, "bucket": BUCKET,
            "id": f"{BUCKET}/{name}/{generation}", "size": str(len(content)),
            "generation": str(generation), "metageneration": "1", "storageClass": "STANDARD",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
            "crc32c": base64.b64encode(
                google_crc32c.value(content).to_bytes(4, "big")
            ).decode(),
            "etag": str(zlib.crc32(content)),
        }  # fmt: skip

    def _list(self, query):
        prefix, end = query.get("prefix", ""), query.get("delimiter")
        items, folders = [], set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            rest = name[len(prefix) :]
            if end and end in rest:
                folders.add(prefix + rest.split(end)[0] + end)
            elif "endOffset" not in query or name < query["endOffset"]:
                items.append(self._metadata(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}

    def _upload(self, query, body):
        name = query.get("name")
        if query.get("uploadType") == "multipart":
            kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            metadata, _ = email.message_from_bytes(kind + body).get_payload()
            name, body = json.loads(metadata.get_payload())["name"], _second_part(body)
        elif query.get("uploadType") == "resumable":
            return self._resume(query, body)
        status = self._precondition(name, query)
        return self._answer(status) if status else self._answer(200, self._put(name, body))

    def _resume(self, query, body):
        """A resumable upload: the first request gets a session URL, to which chunks are sent."""
        if "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            self.sessions.append((name, bytearray()))
            location = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o"
            location += f"?uploadType=resumable&upload_id={len(self.sessions) - 1}"
            return self._answer(200, Location=location)
        name, content = self.sessions[int(query["upload_id"])]
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            return self._answer(308, Range=f"bytes=0-{len(content) - 1}")
        return self._answer(200, self._put(name, bytes(content)))

    def _read(self, generation, content):
        headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not requested:
            return self._answer(200, content, **headers)
        first, last = (int(text) if text else None for text in requested.groups())
        start = len(content) - last if first is None else first
        stop = len(content) if last is None or first is None else min(last + 1, len(content))
        if start >= len(content):
            return self._answer(416)
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._answer(206, content[start:stop], **headers)

    def _batch(self, body):
        """Several deletions in one request."""
        answers = []
        for name in re.findall(rf"DELETE /storage/v1/b/{BUCKET}/o/(\S+)", body.decode()):
            deleted = self.objects.pop(urllib.parse.unquote(name), None)
            answers.append(
                "--x\r\nContent-Type: application/http\r\n\r\n"
                f"HTTP/1.1 {'404 Not Found' if deleted is None else '204 No Content'}\r\n\r\n\r\n"
            )
        self._answer(
            200, ("".join(answers) + "--x--").encode(), Content_Type="multipart/mixed; boundary=x"
        )


def _second_part(body):
    """The content of the second part of a multipart body, byte for byte."""
    boundary = body.split(b"\n", 1)[0].strip()
    part = body.split(boundary)[2]
    content = part.split(b"\n\n" if b"\r\n\r\n" not in part else b"\r\n\r\n", 1)[1]
    return re.sub(rb"\r?\n$", b"", content, count=1)


@contextlib.contextmanager
def serve():
    """Serves the bucket `shop`; yields environment variables for gcsfs and tensorstore."""
    handler = type("Handler", (_Handler,), {"objects": {}, "sessions": []})
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://localhost:{server.server_port}"
    try:
        yield {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # It would use gRPC.
        }
    finally:
        server.shutdown()
        thread.join()
