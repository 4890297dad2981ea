"""The ledger's benchmark books what it says: every joule metered, every request begun."""

import pytest

from benchmarks.ledger_load import TP, book
from energy.accounting_ledger import SETTLE_S


def test_all_energy_is_booked_and_all_requests_are_known():
    ledger, cpu_s = book(instances=4, rate_rps=20, seconds=8)
    assert cpu_s > 0
    assert ledger.metered_j == pytest.approx(4 * (8 - SETTLE_S) * 250.0 * TP)  # the last are not settled yet
    assert ledger.knows("r-159")
    assert sum(row.prefill_j + row.decode_j for row in ledger.totals.values()) > 0


def test_without_requests_everything_idles():
    ledger, _ = book(instances=2, rate_rps=0, seconds=8)
    assert sum(row.prefill_j + row.decode_j for row in ledger.totals.values()) == 0
    assert sum(row.idle_j for row in ledger.totals.values()) > 0
