"""Live tests: real SGLang and vLLM servers on this machine (`make test-engines`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from training import TrainingRuns

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRuns]:
    runs = TrainingRuns(tmp_path_factory.mktemp("training"))
    yield runs
    runs.end()
