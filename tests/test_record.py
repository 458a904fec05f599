"""The table of results is what the kept figures say."""
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def record():
    spec = importlib.util.spec_from_file_location("record", ROOT / "results" / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_s_table_is_built_from_the_kept_results(record):
    table = record.README.read_text().split(record.START)[1].split(record.END)[0].strip()
    assert table == record.tables()


def test_a_run_is_kept_with_all_that_its_figures_depend_on(record, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.record(tiny_run, "tiny", "a remark", ["interpolation"])
    kept = json.loads((tmp_path / "tiny.json").read_text())
    assert (
        kept["iterations"] == 9
        and kept["seconds"] >= 0
        and kept["command"].startswith("sngan_iclevr.py --data drawn")
    )
    assert {"commit", "hardware", "torch"} <= set(kept["sittings"][0])
    assert (tmp_path / "tiny.png").exists() and (tmp_path / "tiny_interpolation.png").exists()
    row = record.rows()[-1]
    mean, std = kept["scores"]["best"]["test"]["accuracy"]
    for part in (
        "drawn scenes",
        f"accuracy test {mean:.4g} ± {std:.2g}",
        "held-out accuracy",
        "a remark",
        "results/tiny.png",
        "[interpolation](results/tiny_interpolation.png)",
    ):
        assert part in row
