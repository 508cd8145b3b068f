"""The jobs that a sweep was to have, and the names that they would have."""

from helpers.made_runs import make_sweep

from pattern_bench.reporting.sweeps import expected_names, read_sweep


def test_every_job_that_a_sweep_was_to_have_is_expected(tmp_path):
    task = ["estimator=w,a", "seed=range(0,3)", "layer='features.*'", "+sweep=x"]
    jobs = read_sweep(make_sweep(tmp_path, task)).jobs
    assert len(jobs) == 6
    assert jobs[1] == ("estimator=w", "seed=1", "layer='features.*'", "+sweep=x")
    # The command line wins over the sweeper's own parameters.
    jobs = read_sweep(make_sweep(tmp_path, ["model=linear"], {"model": "a,b", "estimator": "glob(a*)"})).jobs
    assert {frozenset(job) for job in jobs} == {
        frozenset({"model=linear", f"estimator={e}"}) for e in ("a", "a_plus_minus")
    }
    assert read_sweep(make_sweep(tmp_path, ["estimator=w,a"], sweeper="OptunaSweeper")).jobs is None


def test_names_of_a_missing_job_are_those_that_it_would_have():
    names = expected_names(["data=toy", "estimator=w", "probe=both", "method=lrp_z", "degradation.order=least"])
    assert (names.model, names.data, names.estimator, names.probes) == ("linear", "toy", "w", ("closed_form", "sgd"))
    assert names.curve == ("none", "lrp_z, least relevant first")
    assert expected_names(["estimator=x"]).curve == ("x", "lrp_z")
    assert expected_names(["layer=features.0"]).curve is None
    assert expected_names(["estimator=none_such"]) is None
    # Nothing that it names is built, or even imported.
    assert expected_names(["allow_any_target=true", "estimator._target_=os.system"]).estimator == "a_plus_minus"
