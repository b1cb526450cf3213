"""Tests of a group stay on one worker: a pytest that xdist does not understand would scatter them without a word."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("groups are kept")
def test_a_group_is_known_to_the_worker(request):
    if not hasattr(request.config, "workerinput"):
        pytest.skip("one process: nothing to keep together")
    if not request.config.getoption("loadgroup"):
        pytest.skip("not run with --dist loadgroup")
    assert request.node.nodeid.endswith("@groups are kept")
