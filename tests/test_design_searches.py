"""The benchmark of design searches runs."""

from tests.scripts import run_script


def test_a_problem_is_searched_and_judged(tmp_path):
    finished = run_script(
        "benchmarks/design_searches.py", "--quick", "--problems", "two doses", "--csv", tmp_path / "searches.csv"
    )
    assert "| two doses | 1.0841 |" in finished.stdout
    assert "found: " in finished.stdout
    assert len((tmp_path / "searches.csv").read_text().splitlines()) == 2
