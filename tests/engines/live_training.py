"""Training on states of a real engine, and the drafts that come of it served in that engine; for test_sglang.py and
test_vllm.py."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from live_suite import AUX, LENGTHS, Oracle, listening, wait_for
from training import TrainingRuns, run_script

from specforge_lite.core.errors import CaptureError, EngineError
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving import watchdog
from specforge_lite.serving.process import temporary_directory
from specforge_lite.serving.registry import open_engine
from specforge_lite.serving.session import ServingOptions, ServingSession
from specforge_lite.types import CapturedStates, TokenizedSample

HERE = Path(__file__).resolve().parent


class TensorParallelChecks:
    """Two tensor-parallel ranks, launched by a trainer process of its own, which is then killed."""

    engine_name: str

    def test_parity_and_nothing_left_after_a_killed_trainer(
        self, tiny_target: Path, oracle: Oracle, tmp_path: Path
    ) -> None:
        shm = tmp_path / "shm"
        shm.mkdir()
        arguments = [str(HERE / "trainer_process.py"), self.engine_name, str(tiny_target), str(shm), str(tmp_path)]
        with (tmp_path / "trainer.log").open("w") as log:
            process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT)
        try:
            ready = tmp_path / "ready.pt"
            assert wait_for(lambda: ready.exists() or process.poll() is not None, 280)
            assert process.poll() is None, (tmp_path / "trainer.log").read_text()
            answers = torch.load(ready, weights_only=True)
            assert len(answers) == len(LENGTHS) + 8
            for name, facts in answers.items():
                ids = facts["ids"]
                state = CapturedStates(name, ids, facts["aux"], facts["last"], AUX, facts["normed"])
                oracle.assert_equal(TokenizedSample(name, ids, ids >= 0), state)
            self._kill_and_look(process, shm)
        finally:
            process.kill()
            process.wait()

    @staticmethod
    def _kill_and_look(process: subprocess.Popen[bytes], shm: Path) -> None:
        (run,) = shm.iterdir()
        session = json.loads((run / ".session").read_text())["session"]
        servers = watchdog.session_processes(session)
        assert len(servers) >= 3  # the server and two ranks
        assert {ip for ip, _ in listening(servers)} == {"127.0.0.1"}  # the ranks' rendezvous too
        temporary = temporary_directory(run)
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
        shared = watchdog.shared_memory_of(servers)
        process.kill()  # in the middle of its captures
        process.wait()
        assert wait_for(lambda: not watchdog.session_processes(session) and not psutil.pid_exists(session), 30)
        assert wait_for(lambda: list(shm.iterdir()) == [] and not temporary.exists(), 10)
        assert [path for path in shared if os.path.exists(path)] == []


class TrainingChecks:
    """`torchrun ... scripts/train_eagle3_online.py`, two ranks, tensor-parallel size 2; the draft it made, served.

    plain_server_error: what an attempt to capture from the serving server must say.
    """

    engine_name: str
    plain_server_error: str

    def test_fifty_steps_with_a_kill_in_between_give_the_losses_of_transformers(self, training: TrainingRuns) -> None:
        run = training.start(self.engine_name, "--tp-size", "2")
        assert run.wait_for_step(10, 280), run.log()
        os.kill(run.server_main(), signal.SIGKILL)
        oracle = training.hf_losses()
        assert run.wait(280) == 0, run.log()
        losses = run.losses()
        assert len(losses) == len(oracle) == 50
        assert max(abs(a - b) for a, b in zip(losses, oracle)) < 1e-3
        log = run.log()
        assert f"waiting for {self.engine_name}" in log
        assert "restart 1 of at most" in log
        assert " wait " in log  # the share of time spent waiting, in the step line
        assert run.leftovers() == []

    def test_the_exported_draft_is_served_with_our_decoders_acceptance(
        self, training: TrainingRuns, tiny_target: Path, tmp_path: Path
    ) -> None:
        from specforge_lite.inference.speculative import SpeculativeModel

        draft, prompts = training.exported_draft(), training.prompts()
        model = SpeculativeModel.from_pretrained(
            str(tiny_target), draft, num_draft_tokens=3, dtype="float32", device="cpu"
        )
        ours = model.run(prompts, training.decode_settings())
        counted = 1 + sum(ours.stats.accepted_at) / ours.stats.verification_passes
        assert counted > 1.2  # a draft that guesses nothing would agree with anything
        plain = model.run(prompts, training.decode_settings(), speculative=False)
        options = ServingOptions(
            self.engine_name, str(tiny_target), str(draft), 3, 1, 4, dtype="float32", max_length=512, log_dir=tmp_path
        )
        with ServingSession(options) as session:
            run = session.generate(prompts, training.max_new_tokens)
            assert run.outputs == plain.new_tokens
            assert session.acceptance().length == pytest.approx(counted, rel=0.05)
            # scripts/generate_data_by_target.py against the same server: greedy answers equal transformers'.
            assert training.regenerate(session.url, tmp_path / "regenerated") == training.greedy_texts()
            target = TargetSection(
                target_model_path=str(tiny_target), target_backend=self.engine_name, target_url=(session.url,)
            )
            with pytest.raises((CaptureError, EngineError), match=self.plain_server_error):
                open_engine(target, 200)

    def test_an_eagle1_draft_is_served_with_our_decoders_acceptance(
        self, training: TrainingRuns, tiny_target: Path, tmp_path: Path
    ) -> None:
        draft, output = training.exported_eagle1_draft(), tmp_path / "serving.json"
        run_script(
            "scripts/compare_serving.py", "--backend", self.engine_name, "--target-model-path", str(tiny_target),
            "--draft-model-path", str(draft), "--prompts", str(training.data()), "--num-prompts", "16",
            "--max-new-tokens", str(training.max_new_tokens), "--max-length", "512", "--output", str(output),
            "--log-dir", str(tmp_path),
        )  # fmt: skip
        found = json.loads(output.read_text())  # written when the greedy answers were those of plain decoding
        assert found["num_identical"] == found["num_prompts"] == 16
        assert found["acceptance_length_ours"] > 1.2  # a draft that guesses nothing would agree with anything
        assert found["acceptance_length"] == pytest.approx(found["acceptance_length_ours"], rel=0.05)
