"""Which implementations a device gets."""

import subprocess
import sys

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import select_kernels, torch_kernels, triton_kernels
from kernels.jit import cdiv, interpreted, power_of_2
from tests.repository import ROOT

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from kernels.dispatch import select_kernels
ids, table = torch.tensor([[2, 0]]), torch.eye(3)
print(select_kernels(torch.device("cpu")).block_embedding(ids, table).tolist())
"""


def test_each_device_has_its_own() -> None:
    assert select_kernels(torch.device("cpu")) == torch_kernels()
    assert select_kernels(torch.device("cuda:0")) == triton_kernels()


def test_override() -> None:
    assert select_kernels(torch.device("cpu"), "triton") == triton_kernels()
    assert select_kernels(torch.device("cuda"), "torch") == torch_kernels()


def test_every_operation_but_the_products_has_a_kernel_of_its_own() -> None:
    ours, twins = vars(triton_kernels()), vars(torch_kernels())
    assert {name for name in ours if ours[name] is twins[name]} == {"linear", "add_linear"}


def test_kernels_are_interpreted_where_there_is_no_gpu() -> None:
    assert interpreted() is not torch.cuda.is_available()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        select_kernels(torch.device("cuda"))


def test_the_twins_need_no_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[0.0, 0.0, 1.0, 1.0, 0.0, 0.0]]"


def test_sizes_of_tiles() -> None:
    assert [power_of_2(number) for number in (1, 2, 3, 4, 5, 513)] == [1, 2, 4, 4, 8, 1024]
    assert [cdiv(number, 4) for number in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_unknown_device() -> None:
    with pytest.raises(ValueError, match="mps"):
        select_kernels(torch.device("mps"))
