"""What is made from code is what stands in the files."""

import json
import runpy
from pathlib import Path

import pytest

from pruning.baselines import NAMED
from pruning.leaves import LEAVES
from pruning.masks import GROUPS
from pruning.operators import OPERATORS

ROOT = Path(__file__).parents[2]
WRITTEN = runpy.run_path(str(ROOT / "scripts/write_generated.py"))


@pytest.mark.parametrize("path", WRITTEN["generated"](), ids=lambda path: path.name)
def test_generated_file_is_what_the_code_makes(path):
    made = WRITTEN["generated"]()[path]
    assert path.read_text(encoding="utf-8") == made, "run scripts/write_generated.py"


def test_tables_have_a_row_for_everything_that_has_a_name():
    tables = WRITTEN["tables"]()
    lines = "".join(tables.values()).splitlines()
    named = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert named == [*LEAVES, *OPERATORS, *GROUPS, *NAMED]
    assert all(
        f"made by scripts/write_generated.py: {name} " in text_of_metrics() for name in tables
    )


def text_of_metrics():
    return (ROOT / "docs/METRICS.md").read_text(encoding="utf-8")


def test_rows_say_shape_and_needs_and_keep_bars_out_of_the_table():
    tables = WRITTEN["tables"]()
    assert "| `sqrt` | 1 | `(out, in)` | [x]^0.5 | sqrt(\\|x\\|) |\n" in tables["release"]
    assert (
        "| `colsum` | 1 | `(1, in)` | [x] n | sum over the outputs of each input |"
        in tables["extended"]
    )
    assert "| `div` | 2 | `(out, in)` | [x] [y]^-1 n^-1 | " in tables["release"]
    assert "| `exp` | 1 | `(out, in)` | none, and x must have none | " in tables["release"]
    rows = {line.split("`")[1]: line for line in tables["leaves"].splitlines()[2:]}
    assert rows["W"] == "| `W` | `(out, in)` | w | absolute weight | nothing | release |"
    assert rows["B"].startswith("| `B` | `(out, 1)` | ")
    assert rows["B"].endswith(" | a backward pass per window | extended |")
    assert rows["H"].endswith(
        "forward pass per window, and `(in, in)` of memory per layer | extended |"
    )


def test_named_metrics_and_groups_say_what_they_are():
    tables = WRITTEN["tables"]()
    assert (
        "| `row` | The weights of one output row; each row loses the same share. |\n"
        in tables["groups"]
    )
    assert "| `snip` | `mul(W, G)` | model | none | Lee et al., 2019" in tables["baselines"]
    assert "| row | a sum of different ones | Das" in tables["baselines"]
    assert "`snip`" not in tables["published"]


def test_with_tables_replaces_only_what_is_between_the_markers():
    text = "a\n<!-- made by scripts/x.py: one -->\nold\n<!-- end -->\nb\n"
    expected = text.replace("old", "new")
    assert WRITTEN["with_tables"](text, {"one": "new\n"}) == expected
    with pytest.raises(KeyError):
        WRITTEN["with_tables"](text, {})


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
