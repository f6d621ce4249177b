"""A draft handed to a running server: what is sent, and what is refused before anything is sent."""

from __future__ import annotations

import base64
import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specforge_lite.core.errors import EngineError
from specforge_lite.training import reload
from specforge_lite.training.reload import hand_over

CONFIG = {"architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 4, "draft_vocab_size": 3}


class FakeServer(ThreadingHTTPServer):
    """The pages of SGLang that are used; `calls`: path and body of each POST."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakePages)
        self.facts: dict[str, Any] = {"speculative_algorithm": "EAGLE3", "tp_size": 2, "dp_size": 1}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = ""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class FakePages(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self._answer(200 if self.server.facts else 404, self.server.facts)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path.removeprefix("/"), body))
        self._answer(400 if self.path == self.server.fails else 200, {"message": "no room"})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def draft(folder: Path, seed: int, d2t: tuple[int, ...] = (0, 0, 5), **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    values = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.randn(4, 4, generator=values).bfloat16() for name in ("fc", "norm", "lm_head")}
    save_file({**tensors, "d2t": torch.tensor(d2t), "t2d": torch.ones(9).bool()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer() as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        fake.facts["speculative_draft_model_path"] = str(draft(tmp_path / "served", 0))
        yield fake
        fake.shutdown()


def test_every_tensor_but_the_vocabulary_goes_to_the_draft_alone(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "CHUNK_BYTES", 70)  # two tensors at a time
    new = draft(tmp_path / "new", 1)
    hand_over(server.url, new)
    paths = [path for path, _ in server.calls]
    updates = ["update_weights_from_tensor"] * 2
    expected = ["pause_generation", "begin_weight_update", *updates, "end_weight_update", "continue_generation"]
    assert paths == expected
    assert server.calls[0][1] == {"mode": "in_place"}
    bodies = [body for path, body in server.calls if path in ("begin_weight_update", *updates)]
    assert {body["selector"] for body in bodies} == {"draft"}
    sent: dict[str, torch.Tensor] = {}
    for body in bodies[1:]:
        first, second = body["serialized_named_tensors"]  # one a rank
        assert first == second
        assert body["flush_cache"] is False
        sent |= dict(pickle.loads(base64.b64decode(first)))
    stored = reload.read_safetensors([new / "model.safetensors"])
    assert sent.keys() == stored.keys() - {"d2t", "t2d"}
    assert all(torch.equal(sent[name], stored[name]) for name in sent)


def test_a_server_that_fails_goes_on(server: FakeServer, tmp_path: Path) -> None:
    server.fails = "/update_weights_from_tensor"
    with pytest.raises(EngineError, match="HTTP 400: no room"):
        hand_over(server.url, draft(tmp_path / "new", 1))
    assert [path for path, _ in server.calls][-2:] == ["end_weight_update", "continue_generation"]


@pytest.mark.parametrize(
    ("facts", "changes", "message"),
    [
        ({"speculative_algorithm": None}, {}, "it serves no EAGLE draft"),
        ({"speculative_algorithm": "DFLASH"}, {}, r"it serves no EAGLE draft \(speculative_algorithm DFLASH\)"),
        ({"dp_size": 2}, {}, "dp_size 2: SGLang updates one replica only"),
        ({"speculative_draft_model_path": "/no/such"}, {}, "its draft at /no/such cannot be compared"),
        ({}, {"d2t": (0, 0, 4)}, "has another draft vocabulary"),
        ({}, {"hidden_size": 8}, "has hidden_size 4, this one 8"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(
    server: FakeServer, tmp_path: Path, facts: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    server.facts |= facts
    with pytest.raises(EngineError, match=message):
        hand_over(server.url, draft(tmp_path / "new", 1, **changes))
    assert server.calls == []


def test_another_engine_is_told_apart(server: FakeServer, tmp_path: Path) -> None:
    server.facts = {}  # vLLM has no /server_info
    with pytest.raises(EngineError, match="HTTP 404"):
        hand_over(server.url, draft(tmp_path / "new", 1))
