"""The files of results of one checkpoint: updates by several evaluations, and reading by the report."""

import json
from pathlib import Path
from typing import Any

import pytest

from infra.files import write_atomic
from infra.results import Results
from report.comparison import comparison_table
from report.page import write_report
from report.run_files import read_run


def bpd(mean: float, values: str, dequantization: str) -> dict[str, Any]:
    return {"mean": mean, "se": 0.01, "dequantization": dequantization, "nfe": 9.0, "seconds": mean, "values": values}


UNIFORM, LEARNED = bpd(2.5, "bpd-a", "uniform"), bpd(2.25, "bpd-b", "variational")


def add(workdir: Path, **parts: dict[str, Any]) -> dict[str, Any]:
    """Adds the parts of one evaluation, and returns the content of the file."""
    results = Results(workdir / "eval" / "step_4.json", {"checkpoint_step": 4})
    for name, part in parts.items():
        results.add(name, part)
    return json.loads((workdir / "eval" / "step_4.json").read_text())


def test_results_with_other_settings_are_kept(tmp_path):
    add(tmp_path, loss={"total": {"mean": 0.5}}, bpd=UNIFORM)
    content = add(tmp_path, loss={"total": {"mean": 0.4}}, bpd=LEARNED)
    assert content["bpd"]["mean"] == 2.25, "the newest one"
    assert [part["bpd"]["mean"] for part in content["earlier"]] == [2.5]
    assert content["loss"] == {"total": {"mean": 0.4}}
    assert add(tmp_path, bpd=LEARNED) == content, "a repeated evaluation changes nothing"
    back = add(tmp_path, bpd=UNIFORM)
    assert (back["bpd"]["mean"], [part["bpd"]["mean"] for part in back["earlier"]]) == (2.5, [2.25])


def test_two_evaluations_at_a_time_lose_nothing(tmp_path):
    one, other = (Results(tmp_path / "eval" / "step_4.json", {"checkpoint_step": 4}) for _ in range(2))
    one.add("bpd", UNIFORM)
    other.add("bpd", LEARNED)
    one.add("loss", {"total": {"mean": 0.5}})
    content = json.loads((tmp_path / "eval" / "step_4.json").read_text())
    assert content.keys() == {"checkpoint_step", "bpd", "loss", "earlier"}
    assert [content["bpd"]["values"], content["earlier"][0]["bpd"]["values"]] == ["bpd-b", "bpd-a"]


def test_results_of_other_parameters_do_not_mix(tmp_path):
    path = tmp_path / "eval" / "step_4.json"
    Results(path, {"checkpoint_step": 4, "parameters": "a"}).add("loss", {"total": {"mean": 0.5}})
    Results(path, {"checkpoint_step": 4, "parameters": "a"}).add("bpd", UNIFORM)
    assert {"loss", "bpd"} <= json.loads(path.read_text()).keys()
    Results(path, {"checkpoint_step": 4, "parameters": "b"}).add("bpd", LEARNED)
    assert json.loads(path.read_text()).keys() == {"checkpoint_step", "parameters", "bpd"}


def test_samples_with_another_reference_are_other_results(tmp_path):
    samples = {"fid": 1.0, "n": 100, "features_hash": "f", "statistics_hash": "s", "values": "samples-a"}
    changes = {"n": 200, "features_hash": "g", "statistics_hash": "t", "values": "samples-b"}
    add(tmp_path, samples=samples)
    for number, change in enumerate(changes.items(), 1):
        content = add(tmp_path, samples=samples | dict([change]))
        assert len(content["earlier"]) == number


def test_the_report_shows_all_evaluations_with_their_times(tmp_path):
    times = {"seconds": 7.0, "images_per_second": 3.0}
    content = add(tmp_path, bpd=UNIFORM, samples={"fid": 1.0, "n": 9, "values": "samples-a"} | times)
    assert not times.keys() & content["samples"].keys(), "times have a file of their own"
    add(tmp_path, bpd=LEARNED)
    earlier, last = read_run(tmp_path).results
    assert earlier["bpd"] == UNIFORM
    assert last["bpd"] == LEARNED
    assert (last["samples"]["seconds"], "samples" in earlier) == (7.0, False)
    assert last["samples"]["images_per_second"] == 3.0
    assert (earlier["file"], last["file"]) == ("eval/step_4.json, earlier 1", "eval/step_4.json")
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert all(word in page for word in ("uniform", "variational", "eval/step_4.json, earlier 1"))
    assert page.index("2.250") < page.index("2.500"), "the summary shows the newest one"
    table = comparison_table(read_run(tmp_path).results)
    assert "2.500 +- 0.010" in table
    assert "2.250 +- 0.010" in table


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "eval").mkdir()
    path = tmp_path / "eval" / "step_4.json"
    for content, said in ((b'{"checkpoint_step": ', "as JSON"), (b"[]", "list instead of"), (b"\xff", "as JSON")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot read .*step_4.json.*{said}.*; delete it"):
            Results(path, {})


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "eval").write_text("not a folder")
    with pytest.raises(OSError, match=r"^cannot write .*eval/step_4.json: (File exists|Not a directory)$"):
        write_atomic(tmp_path / "eval" / "step_4.json", "{}")


def test_numbers_that_are_not_finite_are_no_numbers_in_json(tmp_path):
    """One image has no standard error."""
    nan = float("nan")
    add(
        tmp_path, bpd=UNIFORM | {"se": nan, "ci95": (nan, nan), "errors": {"probe_error": nan}, "largest": float("inf")}
    )
    text = (tmp_path / "eval" / "step_4.json").read_text()
    part = json.loads(text, parse_constant=lambda name: pytest.fail(name))["bpd"]
    assert (part["se"], part["ci95"], part["errors"]) == (None, [None, None], {"probe_error": None})
    write_report(tmp_path)
    assert ">nan" not in (tmp_path / "report.html").read_text()
