"""Settings to be compared are those of constants and operations that there are."""

from dataclasses import fields

import pytest

from benchmarks.kernel_sweep import SWEEPS, Setting, Sweep, applied
from kernels.dispatch import Kernels, triton_kernels


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.op)
def test_settings(sweep: Sweep) -> None:
    assert sweep.op in {field.name for field in fields(Kernels)}
    assert len({setting.name for setting in sweep.settings}) == len(sweep.settings) > 1
    for setting in sweep.settings:
        before = vars(sweep.module).copy()
        with applied(sweep, setting) as kernels:
            assert kernels == triton_kernels()
            for name, value in setting.constants.items():
                assert isinstance(value, type(before[name])), "constants that the module has"
                assert getattr(sweep.module, name) == value
        assert vars(sweep.module) == before


def test_constants_come_back_after_an_error() -> None:
    sweep, setting = SWEEPS[0], Setting("other", {"TILING": None})
    before = SWEEPS[0].module.TILING
    with pytest.raises(RuntimeError), applied(sweep, setting):
        raise RuntimeError
    assert sweep.module.TILING is before
