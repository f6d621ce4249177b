"""`bench_model_speedup.py` against real servers: a chain on vLLM, a tree on SGLang. The draft is random, so little is
accepted; what is checked is that everything is counted and that outputs are the target's own. And
`generate_data_by_target.py`: many sampled answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training import TARGET, TrainingRuns, run_script

from specforge_lite.checkpoints.export import export_draft
from specforge_lite.core.http import HttpLoop
from specforge_lite.serving.environment import SERVING_ENGINES
from specforge_lite.serving.process import LaunchedServer, RunDirectory, ServerSpec, free_port
from specforge_lite.serving.session import ServingOptions, ServingSession
from tests.inference_drafts import random_draft

ROOT = Path(__file__).resolve().parent.parent.parent


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


class SpeedupChecks:
    """speculation: B,STEPS,TOPK,VERIFY."""

    engine_name: str
    speculation: str
    temperatures: tuple[str, ...] = ("0", "0.7")

    def test_a_checkpoint_is_served_as_our_decoder_decodes_it(self, training: TrainingRuns, tmp_path: Path) -> None:
        """`serve_acceptance.py` in the engine and in our decoder, at each temperature, in both ways of drafting; then
        the server that its launch.sh starts."""
        training.hf_losses()
        port = free_port()
        found: dict[str, dict[tuple[float, str], float]] = {}
        for backend in (self.engine_name, "hf"):
            output = tmp_path / backend / "results.jsonl"
            run_script(
                "scripts/serve_acceptance.py", str(max((training.directory / "hf").glob("step_*"), key=step_of)),
                "--model-path", str(TARGET), "--backend", backend, "--target-dtype", "float32", "--concurrency", "4",
                "--temperature", *self.temperatures, "--steps", "3", "--benchmark-list", f"{training.data()}:24",
                "--max-new-tokens", "64", "--output", str(output),
                *(("--port", str(port)) if backend == self.engine_name else ()),
            )  # fmt: skip
            rows = [json.loads(line) for line in output.read_text().splitlines()]
            found[backend] = {(r["temperature"], r["draft_sampling"]): r["acc_length"] for r in rows if r["steps"]}
            assert all(row["identical_share"] == 1.0 for row in rows if row["steps"] and not row["temperature"])
        served, ours = found[self.engine_name], found["hf"]
        assert served.keys() == ours.keys()
        assert len(served) == 2 * len(self.temperatures) - 1
        assert served[0.0, "greedy"] == pytest.approx(ours[0.0, "greedy"], rel=0.02)
        for way, length in served.items():  # drawn answers differ; of a wrong sampler hardly anything is accepted
            assert 0.6 < (length - 1) / (ours[way] - 1) < 1.6, (way, length, ours[way])
        script = tmp_path / self.engine_name / "launch.sh"
        assert str(TARGET) in script.read_text()
        url, health = f"http://127.0.0.1:{port}", SERVING_ENGINES[self.engine_name].health_path
        spec = ServerSpec("launch.sh", ["sh", str(script)], {}, url, health, tmp_path / "launch.log", 300)
        server = LaunchedServer(spec, RunDirectory(tmp_path))
        server.start()
        try:
            question, answer = json.loads(training.data().read_text().splitlines()[0])["conversations"][:2]
            body = {"model": str(TARGET), "messages": [question], "max_tokens": 16, "temperature": 0}
            loop = HttpLoop()
            reply = loop.run(loop.post_json(url + "/v1/chat/completions", body))
            loop.close()
        finally:
            server.stop()
        assert answer["content"].startswith(reply["choices"][0]["message"]["content"].strip()[:30])

    def test_the_benchmark_counts_what_a_real_server_does(self, tiny_target: Path, tmp_path: Path) -> None:
        draft, output = tmp_path / "draft", tmp_path / "results.jsonl"
        export_draft(random_draft(128, 4096, 500, max_position_embeddings=1024), draft, dtype="float32")
        command = [
            sys.executable, "benchmarks/bench_model_speedup.py", "--backend", self.engine_name, "--model-path",
            str(tiny_target), "--speculative-draft-model-path", str(draft), "--target-dtype", "float32",
            "--config-list", self.speculation, "--benchmark-list", "mtbench:2", "gsm8k:3", "--max-new-tokens", "24",
            "--output", str(output),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(rows) == 4
        for row in rows:
            assert row["num_requests"] == {"mtbench": 4, "gsm8k": 3}[row["benchmark"]]
            assert row["time_to_first_token_ms"] > 0
            assert row["latency_per_token_ms"] > 0
            if not row["steps"]:
                assert (row["acc_length"], row["verification_passes"]) == (1.0, None)
                continue
            accepted = sum(row["acceptance_per_position"]) * row["verification_passes"]
            first_tokens = row["num_requests"]
            # Each pass gives the accepted tokens and one of the target's; an answer's last pass may be cut short.
            given = first_tokens + row["verification_passes"] + accepted
            assert row["completion_tokens"] <= given + 1e-6 <= row["completion_tokens"] + 4 * first_tokens
            assert row["acc_length"] == row["completion_tokens"] / row["verification_passes"]
            # vLLM tells a request's passes by the chunks of its answer only. On a busy machine chunks run together; the
            # passes then do not add up to the server's own count, and the interval over requests is left out.
            assert row["acc_length_interval"] is not None or self.engine_name == "vllm"
            assert row["identical_share"] == 1.0

    def test_sampled_answers_of_many_long_prompts_at_once(self, tiny_target: Path, tmp_path: Path) -> None:
        """More prompt tokens than an engine computes in one step, each request with a seed of its own."""
        rows = [
            {"id": str(i), "conversations": [{"role": "user", "content": f"{i} " + "tell me about the sea " * 60}]}
            for i in range(24)
        ]
        source, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ServingOptions(self.engine_name, str(tiny_target), dtype="float32", max_length=1024, concurrency=24)
        with ServingSession(options) as session:
            command = [
                sys.executable, "scripts/generate_data_by_target.py", "--raw-data-file", str(source), "--output-dir",
                str(tmp_path / "shards"), "--output-file", str(answers), "--server-address-port", session.url,
                "--max-concurrency", "24", "--temperature", "0.8", "--max-tokens", "12",
            ]  # fmt: skip
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = [json.loads(line) for line in answers.read_text().splitlines()]
        assert [row["id"] for row in found] == [row["id"] for row in rows]
        assert len({row["conversations"][-1]["content"] for row in found}) > 12  # drawn, not the most probable
