"""What is made from code is what stands in the files."""

import json
import runpy
from pathlib import Path

import pytest

from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.leaves import LEAVES
from prunevolve.pruning.masks import GROUPS
from prunevolve.pruning.operators import OPERATORS

ROOT = Path(__file__).parents[2]
WRITTEN = runpy.run_path(str(ROOT / "scripts/write_generated.py"))


@pytest.mark.parametrize("path", WRITTEN["generated"](), ids=lambda path: path.name)
def test_generated_file_is_what_the_code_makes(path):
    made = WRITTEN["generated"]()[path]
    assert path.read_text(encoding="utf-8") == made, "run scripts/write_generated.py"


def test_tables_have_a_row_for_everything_that_has_a_name():
    lines = "".join(WRITTEN["tables"]().values()).splitlines()
    named = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert named == [*LEAVES, *OPERATORS, *GROUPS, *NAMED]


def test_check_fails_where_a_file_is_stale_and_writes_nothing(tmp_path, monkeypatch, capsys):
    metrics, schema = tmp_path / "METRICS.md", tmp_path / "schema.json"
    metrics.write_text("<!-- made by scripts/write_generated.py: leaves -->\n<!-- end -->\n")
    main = WRITTEN["main"]
    for name, value in {"ROOT": tmp_path, "METRICS": metrics, "SCHEMA": schema}.items():
        monkeypatch.setitem(main.__globals__, name, value)
    with pytest.raises(SystemExit) as ended:
        main(check=True)
    assert ended.value.code == 1
    assert capsys.readouterr().out == "METRICS.md is stale\nschema.json is stale\n"
    assert not schema.exists()
    main(check=False)
    assert "| `W` |" in metrics.read_text()
    assert json.loads(schema.read_text())["properties"]["base"]
    main(check=True)
