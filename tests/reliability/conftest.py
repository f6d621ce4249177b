"""One fork server and one set of inputs for all tests that stop stages of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kill_stages import Host, Inputs, make_inputs


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    running = Host()
    yield running
    running.close()


@pytest.fixture(scope="session")
def inputs(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    yield from make_inputs(host, tmp_path_factory.mktemp("stages"))
