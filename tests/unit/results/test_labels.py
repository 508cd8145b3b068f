"""How names are written for people."""

from pattern_bench.results.labels import formula, method_place, ordered, plain


def test_the_labels_of_tables_and_figures():
    names = ["random", "x", "w", "a", "a_plus_minus"]
    assert [plain(name) for name in names] == ["random", "S_x", "S_w", "S_a", "S_a+-"]
    assert [formula(name) for name in names] == ["random", "$S_x$", "$S_w$", "$S_a$", "$S_{a+-}$"]
    assert plain("random_order, constant 0") == "random order, constant 0"


def test_unknown_names_stay_as_they_are():
    for name in ("mine", "", "_", "$x$", "S_a", "-1", "mine, blur"):
        assert plain(name) == name
        assert formula(name) == name


def test_the_papers_order_comes_first():
    assert ordered(["zz", "a_plus_minus", "none", "aa", "w", "x", "random", "a"]) == [
        "random", "x", "w", "a", "a_plus_minus", "aa", "none", "zz",
    ]  # fmt: skip
    methods = [
        "pattern_net", "pattern_attribution", "lrp_z", "dtd_w2", "gradient", "deconvnet", "guided_backprop",
        "integrated_gradients", "smoothgrad", "occlusion", "prediction_difference", "random_order", "a", "z",
    ]  # fmt: skip
    assert sorted(reversed(methods), key=method_place) == methods
    assert method_place("gradient, blur")[0] == method_place("gradient")[0]
