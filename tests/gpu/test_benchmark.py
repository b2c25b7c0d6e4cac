"""Every case of the benchmark runs, at tiny sizes: before the large ones, and where there is no GPU."""

import json

from benchmarks import gpu as benchmark
from benchmarks.gpu_cases import all_cases


def test_every_case_gives_figures(tmp_path, capsys):
    assert benchmark.main(["--tiny", "--repeats", "1", "--docs", str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / "gpu.json").read_text())
    expected = all_cases(benchmark.TINY, benchmark.TINY, (128,))
    assert [(row["part"], row["name"]) for row in record["rows"]] == [(case.part, case.name) for case in expected]
    assert all(row["seconds"] and not row["note"] for row in record["rows"])
    printed = capsys.readouterr().out
    tables = (tmp_path / "gpu.md").read_text().split(" runs.\n", 1)[1].split("written:")[0]
    assert all(line in printed for line in tables.splitlines())
