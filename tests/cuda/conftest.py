import pytest
from cuda_testing import Kernels


@pytest.fixture(scope="session", params=["emulated", "gpu"])
def kernels(request) -> Kernels:
    """The CUDA kernels: on the CPU through emulation.h, and on the GPU where there is one."""
    return Kernels(request.param)
