"""The designs weighed in the docs: what needs no compiler is computed again."""

import json

import pytest

from benchmarks.wkv7_compiled import DOCS
from benchmarks.wkv7_designs import CARDS, KERNELS, RESULTS, TABLES, floors, trace

RECORDED = json.loads(RESULTS.read_text("utf-8"))


def test_the_kernels_move_and_wait_for_what_their_docstring_says():
    found = [trace("h100", {})[name] for name in KERNELS]
    state = 2 * 4 * 64 * 64 / 4096  # float32 states in and out
    assert [x.bytes for x in found] == [1408 + state, 1152 + state, 2688]
    assert [round(x.flops / 1e3) for x in found] == [56, 40, 146]
    assert [x.programs for x in found] == [96, 96, 3072]
    assert [(x.products, x.carried_products) for x in found] == [(10, 3), (10, 3), (12, 0)]


@pytest.mark.parametrize("design", RECORDED["designs"])
def test_floors_are_as_recorded(design):
    """By `python -m benchmarks.wkv7_designs`; its replays of machine code are taken on trust."""
    for card in CARDS:
        assert floors(RECORDED["replays"], design, card) == RECORDED["designs"][design][card]


@pytest.mark.parametrize("name", TABLES)
def test_the_docs_say_what_is_recorded(name):
    assert TABLES[name](RECORDED) in DOCS.read_text("utf-8")
