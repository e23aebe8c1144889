"""The instruction set of the C++ noise ops, as a fixture: `pytestmark = cpu_ops.on_every_isa`."""

import pytest
from cpu_ops import _C, DEFAULT_ISA, ISAS


@pytest.fixture(params=ISAS)
def isa(request):
    _C._set_cpu_isa(request.param)
    yield request.param
    _C._set_cpu_isa(DEFAULT_ISA)
