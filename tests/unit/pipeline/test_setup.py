"""What a job is about is checked before anything is computed."""

import pytest

from pattern_bench.errors import UserError


def test_a_ridge_that_leaves_nothing_is_refused(run_job):
    with pytest.raises(UserError, match=r"probe.regularisation=1e\+300 is not possible: .* give at most 10000"):
        run_job("probe.regularisation=1e300")
