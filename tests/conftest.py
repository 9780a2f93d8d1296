"""Set-up for all tests."""

from typing import Any

import pytest
import torch

from vtc.zoo import torchvision

# Before any test imports transformers, which imports it: beside a torch for CPUs the usual torchvision does not load.
torchvision.mend()
# The models of the tests are so small that a second thread only adds waiting, on a busy machine a hundredfold.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--everything", action="store_true", help="try the laws on every combination, which takes hours")
    parser.addoption("--every", type=int, default=1, metavar="N", help="try the laws on every Nth case only")


def pytest_generate_tests(metafunc: Any) -> None:
    """Tests of a law get a `case`: any dropping strategy; or an `any_case`: any strategy at all."""
    wanted = {"case", "any_case"} & set(metafunc.fixturenames)
    if wanted:
        from cases import COMPOSED, DECODER_SPECS, DROPPING, SPECS
        from combinations import covering, everything

        specs = {**(SPECS if "any_case" in wanted else DROPPING), **DECODER_SPECS, **COMPOSED}
        law = int(metafunc.function.__name__.split("_")[2])
        cases = everything(specs) if metafunc.config.getoption("everything") else covering(specs, law)
        metafunc.parametrize(wanted.pop(), list(cases)[:: metafunc.config.getoption("every")], ids=str)
