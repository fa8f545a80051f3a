"""docs/configuration.md is what the code gives, and each key in it has a meaning."""

from tools.document_options import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run python -m tools.document_options"


def test_each_key_has_a_type_a_default_and_a_meaning():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    # A cell ends at a bar that is not part of a type.
    assert [row for row in rows if "|  |" in row] == []
