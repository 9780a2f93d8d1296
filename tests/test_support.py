"""Law 9, continuation, and whatever else surrounds a model: it works, is refused, or is beyond the model itself."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from families import FAMILIES
from support import BEGIN, CHECKS, END, NONE, README, REFUSED, UPSTREAM, YES, outcome, table

NEWEST = Version(transformers.__version__) >= Version("5.23")
QWEN = ("qwen2vl", "qwen25vl", "qwen3vl")
# What the newest transformers cannot do, without vtc:
BEYOND = {
    # the offset of text positions is kept on the module, for the last conversation only
    *(("interleaved", family) for family in QWEN),
    # `mm_token_type_ids` are handed on to the draft model, which does not know them
    *(("draft_model", family) for family in QWEN),
}
lines = [(name, family, site) for name, check in CHECKS.items() for family in FAMILIES for site in check.sites]


@pytest.mark.parametrize(("name", "family", "site"), lines)
def test_law_9(name: str, family: str, site: str) -> None:
    found = outcome(name, family, site)
    if name == "chunked_prefill" and NEWEST:
        assert found == REFUSED
    elif CHECKS[name].clips and not FAMILIES[family].frames:
        assert found == NONE
    elif NEWEST:
        assert found == (UPSTREAM if (name, family) in BEYOND else YES)
    elif name == "checkpointed" and site in ("inside", "both"):
        assert found == REFUSED  # an older release runs the hooks of a layer again in the backward pass
    else:  # it can do less, too, and that alone is an excuse
        assert found in (YES, UPSTREAM)


@pytest.mark.skipif(not NEWEST, reason="the table is about the newest transformers")
def test_the_table_in_the_readme_is_what_happens() -> None:
    _, begin, rest = README.read_text().partition(BEGIN)
    assert begin, f"{README} has no line {BEGIN!r}"
    assert rest.partition(END)[0] == table(), "python tests/support.py --write"
