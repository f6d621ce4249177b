"""A small server that speaks SGLang's side of the capture protocol, with the real plugin's writer behind it and
faults on request. Run as `python capture_server.py PORT DIRECTORY`; states are those of `FakeEngine`.

POST /fault {"kind": ..., "times": N} makes the next N captures go wrong.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from specforge_lite.capture.base import TargetInfo
from specforge_lite.serving.environment import PLUGIN_DIR
from specforge_lite.types import TokenizedSample
from tests.fake_engine import FakeEngine

sys.path.insert(0, str(PLUGIN_DIR))
from specforge_capture.writer import CaptureWriter

INFO = TargetInfo("sglang", num_layers=5, hidden_size=8, vocab_size=97, max_length=64, aux_layer_ids=(0, 1, 3))


class CaptureServer:
    """faults: kind -> captures still to go wrong. most_in_flight: requests that were handled at the same time."""

    def __init__(self, directory: Path, port: int = 0, info: TargetInfo = INFO) -> None:
        os.environ["SPECFORGE_CAPTURE"] = f"tmpfs:{directory}"
        self.writer = CaptureWriter("sglang 0.5.23", info.aux_layer_ids, True).open()
        self.directory = directory
        self.info = info
        self.engine = FakeEngine(info)
        self.faults: Counter[str] = Counter()
        self.facts = {
            "version": "0.5.23",
            "enable_return_aux_hidden_states": True,
            "disable_radix_cache": True,
            "chunked_prefill_size": -1,
            "prefill_max_requests": None,
            "cuda_graph_config": {"decode": {"backend": "disabled"}, "prefill": {"backend": "disabled"}},
            "max_req_input_len": info.max_length,
        }
        self.num_requests = self.in_flight = self.most_in_flight = 0
        self.latency_s = 0.0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answers = {"/health": {}, "/get_server_info": owner.facts, "/get_model_info": {}}
                self.answer(200, answers[self.path]) if self.path in answers else self.answer(404, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/fault":
                    owner.faults[body["kind"]] += body["times"]
                    return self.answer(200, {})
                status, reply = owner.generate(body)
                if status == 0:
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                return self.answer(status, reply)

            def answer(self, status: int, reply: object) -> None:
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                pass  # connections that the faults cut

        self.http = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def start(self) -> CaptureServer:
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, kind: str) -> bool:
        with self.lock:
            if self.faults[kind] <= 0:
                return False
            self.faults[kind] -= 1
            return True

    def generate(self, body: dict) -> tuple[int, dict]:
        with self.lock:
            self.num_requests += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            threading.Event().wait(self.latency_s)
            return self._generate(body)
        finally:
            with self.lock:
                self.in_flight -= 1

    def _generate(self, body: dict) -> tuple[int, dict]:
        key = body["sampling_params"]["custom_params"]["specforge_capture"]
        ids = body["input_ids"]
        if self.fault("exit"):
            os._exit(9)
        if self.fault("http500"):
            return 500, {"error": {"message": "out of luck"}}
        if self.fault("http400"):
            return 400, {"error": {"message": "your fault"}}
        if self.fault("drop"):
            return 0, {}
        if self.fault("no plugin"):
            return 200, {"meta_info": {"hidden_states": [[0.5, 0.25]]}}
        if self.fault("refused"):
            return self.reply({"error": "2 of 3 tokens were run: the server caches prefixes or chunks prefills"})
        if self.fault("old plugin"):
            return self.reply({**self.writer.reply(key), "plugin": "0.0.1"})
        if self.fault("elsewhere"):
            return self.reply({**self.writer.reply(key), "place": "tmpfs:/elsewhere"})
        sample = TokenizedSample("x", torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool))
        states = self.engine.capture([sample])[0]
        aux, last = states.aux_LAH, states.last_LH
        if self.fault("wrong ids"):
            ids = [*ids[:-1], ids[-1] ^ 1]
        if self.fault("wrong width"):
            aux, last = aux[..., :4], last[..., :4]
        if self.fault("nan"):
            aux = aux * float("nan")
        if self.fault("full"):
            self.writer._sink.fail(key, OSError(28, "full"))
        elif self.fault("lost"):
            pass
        else:
            self.writer.submit(key, ids, aux, last)
            path = self.directory / key
            if self.fault("corrupt"):
                path.write_bytes(path.read_bytes()[:-1] + b"\xff")
            if self.fault("cut"):
                path.write_bytes(path.read_bytes()[:-7])
        return self.reply(self.writer.reply(key))

    @staticmethod
    def reply(facts: dict) -> tuple[int, dict]:
        return 200, {"meta_info": {"hidden_states": [{"specforge_capture": facts}]}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    CaptureServer(Path(sys.argv[2]), int(sys.argv[1])).http.serve_forever()
