from collections.abc import Iterator

import pytest

from tests.serving.server_process import ServerProcess, start_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server with the embedded model for all tests that leave it as they found it."""
    with start_server(tmp_path_factory.mktemp("server")) as running:
        yield running
