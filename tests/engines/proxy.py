"""A proxy between trainer and server that makes single things go wrong on a real connection."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY_LENGTH = 32


class Proxy:
    """faults: what happens to the next captures, one each: `damage`, `cut`, `empty` and `delete` treat the stored file,
    `hang up` closes the connection without a reply. change_ids: every prompt gets another fourth token."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.faults: list[str] = []
        self.change_ids = False
        self.run_dir = Path()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.forward(None)

            def do_POST(self) -> None:
                self.forward(self.rfile.read(int(self.headers["Content-Length"])))

            def forward(self, body: bytes | None) -> None:
                fault = owner.faults.pop(0) if body is not None and owner.faults else ""
                if fault == "hang up":
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                status, data, key = owner.ask(self.path, body)
                if fault:
                    owner.spoil(fault, owner.run_dir / key)
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                return self.wfile.write(data) and None

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def ask(self, path: str, body: bytes | None) -> tuple[int, bytes, str]:
        key = ""
        if body is not None:
            request = json.loads(body)
            field = "input_ids" if "input_ids" in request else "prompt"
            if self.change_ids:
                request[field][3] ^= 1
            found = request.get("kv_transfer_params") or request["sampling_params"]["custom_params"]
            key = found["specforge_capture"]
            body = json.dumps(request).encode()
        asked = urllib.request.Request(self.target + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked) as reply:
                return reply.status, reply.read(), key
        except urllib.error.HTTPError as error:
            return error.code, error.read(), key

    @staticmethod
    def spoil(fault: str, path: Path) -> None:
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        data = bytearray(path.read_bytes())
        if fault == "damage":
            data[-1] ^= 1
        elif fault == "cut":
            del data[-5:]
        elif fault == "empty":
            data.clear()
        path.unlink() if fault == "delete" else path.write_bytes(data)

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()
