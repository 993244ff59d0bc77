import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which the first import of any kernel does: no test module is imported before
    # this one. What tests start on the CPU runs the torch twins and does not notice.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Test models are tiny: threads only wait for one another, ten times as long as the work takes."""
    torch.set_num_threads(1)
