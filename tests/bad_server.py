"""A server that answers wrongly on purpose, byte by byte: for clients that must end in one clear line.

Its health path always answers, so that nothing can be excused by waiting. `kind` names the reply to everything in
`paths`; other paths answer as a working SGLang does.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FACTS = {
    "version": "0.5.23",
    "enable_return_aux_hidden_states": True,
    "disable_radix_cache": True,
    "chunked_prefill_size": -1,
    "max_req_input_len": 512,
}
GOOD = {"/health": {}, "/get_server_info": FACTS, "/get_model_info": {}, "/v1/models": {"data": [{"id": "m"}]}}
ELSEWHERE = "http://203.0.113.9:1/elsewhere"  # an address that belongs to nobody (RFC 5737)

Write = Callable[[bytes], Any]


def http(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    """A whole reply; `length`: what its header claims."""
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {length or len(body)}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def once(data: bytes) -> Callable[[Write], None]:
    return lambda write: write(data)


def drip(write: Write) -> None:
    """Valid JSON, a byte every 20 ms, for ever."""
    write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        write(b" ")
        time.sleep(0.02)


def endless(write: Write) -> None:
    write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


def endless_header(write: Write) -> None:
    write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        write(b"x" * 0x10000)


def stall(write: Write) -> None:
    time.sleep(3600)


def said(status: str, *headers: str) -> bytes:
    return http(json.dumps({"error": {"message": "as asked"}}).encode(), status, *headers)


KINDS: dict[str, Callable[[Write], None]] = {
    "http 400": once(said("400 Bad Request")),
    "http 401": once(said("401 Unauthorized")),
    "http 404": once(said("404 Not Found")),
    "http 429": once(said("429 Too Many Requests", "Retry-After: 0")),
    "http 500": once(said("500 Internal Server Error")),
    "http 503": once(said("503 Service Unavailable")),
    "a redirect": once(said("307 Temporary Redirect", f"Location: {ELSEWHERE}")),
    "a redirect for ever": once(said("302 Found", "Location: /generate")),
    "half a body": once(http(b'{"meta_info": {"hidd', length=1000)),
    "no reply": once(b""),
    "not http": once(b"SSH-2.0-OpenSSH_9.6\r\n" * 3),
    "a web page": once(http(b"<html>busy</html>")),
    "an empty body": once(http(b"")),
    "not utf-8": once(http(b'{"a": "\xff\xfe"}')),
    "nested without end": once(http(b"[" * 100_000)),
    "a list": once(http(b"[1, 2]")),
    "null": once(http(b"null")),
    "text": once(http(b'"ok"')),
    "an object without content": once(http(b"{}")),
    "numbers in odd places": once(http(b'{"meta_info": 3, "choices": 4, "version": 5, "data": 6}')),
    "lists in odd places": once(http(b'{"meta_info": [], "choices": [[]], "version": [], "data": {}}')),
    "a plugin of text": once(http(b'{"meta_info": {"hidden_states": [{"specforge_capture": "yes"}]}}')),
    "a plugin without a place": once(http(b'{"meta_info": {"hidden_states": [{"specforge_capture": {}}]}}')),
    "compressed, and it is not": once(http(b"not gzip", "200 OK", "Content-Encoding: gzip")),
    "an endless body": endless,
    "an endless header": endless_header,
    "a slow drip": drip,
    "silence": stall,
}


class BadServer:
    """`with BadServer(kind, paths) as server: server.address`. num_requests: how often `paths` were asked for."""

    def __init__(self, kind: str, paths: tuple[str, ...]) -> None:
        self.num_requests = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.reply()

            def reply(self) -> None:
                self.close_connection = True
                if not self.path.startswith(paths):
                    self.wfile.write(http(json.dumps(GOOD.get(self.path, {})).encode()))
                    return
                owner.num_requests += 1
                KINDS[kind](self.send)
                self.connection.shutdown(socket.SHUT_RDWR)

            def send(self, data: bytes) -> None:
                if owner.closed:
                    raise ConnectionAbortedError
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False  # stalls never end

            def handle_error(self, *_: object) -> None:
                pass  # connections that clients cut

        self.closed = False
        self._http = Server(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> BadServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._http.shutdown()
        self._http.server_close()
