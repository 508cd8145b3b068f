"""What is read of runs: settings, and one error for files that say something else."""

import json

import pytest
from helpers.made_runs import hydra, make_run

from pattern_bench.errors import UserError
from pattern_bench.reporting.gathering import gather
from pattern_bench.reporting.runs import read_settings


def test_settings_are_flat_and_bounded(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: {b: [1, x], c: null, d: [{e: true}]}\ncache: {dir: /home/me}\n")
    assert read_settings(file) == {"a.b": '[1, "x"]', "a.c": "null", "a.d[0].e": "true"}
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="more than"):
        read_settings(file)


@pytest.mark.parametrize(("file", "field", "wrongs"), [
    *(("summary.json", field, (None, 7, ["a"])) for field in ("run_id", "model", "data", "method", "probe")),
    *(("summary.json", field, (True, "0", 1.5, [])) for field in ("seed", "processes", "patch", "steps")),
    *(("summary.json", field, (True, "0.5", [], float("inf"))) for field in ("accuracy", "positions")),
    *(("summary.json", field, (None, [], {"a": "0.5"}, {"a": None}, {"a": True}, {"a": float("nan")}))
      for field in ("area_over_curve", "seconds", "images_per_second", "peak_memory_mib", "splits")),
    ("summary.json", "area_over_curve_interval", (None, [], [[0, 1]])), ("summary.json", "rho", (None, [], 0.5)),
    ("summary.json", "skipped", ([], {"a": 1})), ("summary.json", "versions", ({"torch": 2.1}, "2.1")),
    ("summary.json", "unreadable", (0, [1], "a")), ("summary.json", "signal_angle_degrees", (3, {"filter": "3"})),
    ("accuracy.json", "model", (7, None)), ("accuracy.json", "top5", (None, "1", 1.5, 0.1, True)),
])  # fmt: skip
def test_a_field_of_another_type_is_one_error_that_names_file_and_field(tmp_path, file, field, wrongs):
    make_run(tmp_path / "run", run_id="abcd1234", overrides=["estimator=a"])
    path = tmp_path / "run" / file
    good = json.loads(path.read_text())
    for wrong in (*wrongs, "x" * 9999 if field == "splits" else [["x" * 9999]]):
        path.write_text(json.dumps({**good, field: wrong}))
        with pytest.raises(UserError, match=rf"^the run in there/run is damaged \({file} gives {field} as ") as raised:
            gather([(tmp_path, "there")])
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 300
    path.write_text(json.dumps(good))
    gather([(tmp_path, "there")])


@pytest.mark.parametrize("kind", ["gallery", "sanity"])
def test_a_gallery_or_sanity_check_of_other_types_is_one_error(tmp_path, kind):
    make_run(tmp_path / "run")
    hydra(tmp_path / "other", [], kind)
    good = {"model": "net", "data": "digits", "seed": 0, "left_out": {"a": "why"}, "versions": {"torch": "2"}}
    good |= {"figure": "fig5", "images": [{"true": "1"}], "columns": [{"key": "a"}]} if kind == "gallery" else {}
    for name in good:
        for wrong in (True, None, 1.5, [3], {"a": [1]}, "../../secret"):
            if isinstance(wrong, str) and isinstance(good[name], str) and name != "figure":
                continue
            (tmp_path / "other" / f"{kind}.json").write_text(json.dumps({**good, name: wrong}))
            with pytest.raises(UserError, match=rf"^the run in there/other is damaged \({kind}\.json gives {name} as "):
                gather([(tmp_path, "there")])
    (tmp_path / "other" / f"{kind}.json").write_text(json.dumps(good))
    assert len(gather([(tmp_path, "there")]).pictures) == 1
