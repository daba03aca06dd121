"""scripts/four_gears.py: its numbers, its page, and the directions that its page reports."""

import math
import sys

import jax
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import four_gears


def test_the_numbers():
    found = four_gears.numbers(rows=64)
    values = list(found.values())
    assert values[0] == pytest.approx(math.log(50_000) + 0.5, abs=0.3)
    assert values[2] == pytest.approx(math.log(50_000), rel=1e-5)
    assert values[4] - values[3] == pytest.approx(280)
    assert values[5] == 0
    assert values[6] == pytest.approx(0.1, rel=1e-5)
    gradients = four_gears.first_gradients()
    assert gradients["cross-entropy"] > 50 * gradients["squared error"]


def test_a_page_keeps_its_text(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- tables -->\nold\n<!-- end of tables -->\n\nEnd.\n")
    table = four_gears.Table("New", {"": "", "value": ".1f"}, [["a", 1.25]])
    four_gears.write_page(page, [table], "here")
    text = page.read_text()
    assert text.startswith("# Title")
    assert text.endswith("End.\n")
    assert "old" not in text
    assert "| a | 1.2 |" in text


def test_an_unknown_form_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["four_gears.py", "--only", "nothing"])
    with pytest.raises(SystemExit, match="no form nothing; the forms are adamw, mse"):
        four_gears.main()


@pytest.mark.slow
def test_the_directions():
    """Two minutes: cross-entropy beats squared error, AdamW beats momentum, and decay in the gradient hurts Adam."""
    corpus, steps = four_gears.read_corpus(), 120
    forms = four_gears.forms(steps)
    worse = ("mse", "sgd low", "l2")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax needs them
        bits = {name: four_gears.train(forms[name], steps, 2, corpus)["bits"] for name in ("adamw", *worse)}
    for name in worse:
        assert (bits[name] > bits["adamw"]).all(), bits
