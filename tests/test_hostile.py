"""Wrong arguments of every kind to every public function."""

from fuzz import foreign, hostile_calls


def test_no_wrong_argument_ends_in_a_foreign_exception():
    bad = [f"{name}: {what}" for name, call in hostile_calls() if (what := foreign(call)) is not None]
    assert not bad, "\n".join(bad[:20])
