"""The processes that run the stages for the tests of this folder, and what the stages read; made once."""

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
