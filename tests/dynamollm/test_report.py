"""``dynamollm report`` against a gateway's admin route over a real socket."""

import csv
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest
from click.testing import CliRunner

from dynamollm.commands.report import command
from dynamollm.errors import UserError
from energy.accounting import EnergyRow, EnergyWindow, User, UserRow
from energy.accounting_report import OVERHEAD, report_of

WINDOW = EnergyWindow(
    1_700_000_000.0,
    1_700_003_600.0,
    (
        UserRow(User("llama", "SS", "SS", "alice"), EnergyRow(10, 1000, 500, 100.0, 500.0, 0.0, 0.0, 36.0, 6.0, 1.0)),
        UserRow(User("llama", "LL", "LL", "bob"), EnergyRow(2, 8000, 600, 4000.0, 1400.0, 0.0, 0.0, 72.0, 9.0, 2.0)),
        UserRow(User("llama", "LL", "", ""), EnergyRow(idle_j=900.0, transition_j=100.0, gpu_s=36.0, gpu_usd=0.5)),
        UserRow(User("", "", "", ""), EnergyRow(idle_j=200.0)),
    ),
    "a test grid",
    ("B300",),
)

SAVED = [
    {
        "policy": "single-pool",
        "seconds": 1800.0,
        "metered_j": 720_000.0,
        "energy_j": 1_080_000.0,
        "saved_j": 360_000.0,
        "band_j": 36_000.0,
    }
]


@pytest.fixture
def gateway():
    """Answers as a gateway's admin route does; ``seen`` is what it was asked, ``answer`` what it says."""

    class Route(BaseHTTPRequestHandler):
        seen, answer = [], (200, msgspec.json.encode(WINDOW))

        def do_GET(self):
            self.seen.append((self.path, self.headers.get("authorization")))
            status, body = type(self).answer
            if self.path == "/admin/status":
                status, body = 200, json.dumps({"counterfactual": SAVED}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Route)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Route.url = f"http://127.0.0.1:{server.server_port}"
    yield Route
    server.shutdown()
    thread.join()
    server.server_close()


def run(gateway, *arguments):
    result = CliRunner().invoke(
        command, ["--url", gateway.url + "/v1", *arguments], catch_exceptions=False, standalone_mode=False
    )
    return result.output


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("class", ["LL", OVERHEAD, "SS"]),
        ("pool", ["LL", "SS", "(unheld GPUs)"]),
        ("tenant", ["bob", OVERHEAD, "alice"]),
        ("model", ["llama", "(unheld GPUs)"]),
    ],
)
def test_the_lines_of_each_dimension_add_up_to_the_total(by, names):
    report = report_of(WINDOW, by)
    assert [line.name for line in report.lines] == names
    assert report.total.energy_j == sum(line.energy_j for line in report.lines) == 7200.0
    assert report.total.energy_wh == 2.0
    assert report.total.requests == 12


def test_joules_a_token_are_by_phase_and_without_idle_time():
    lines = {line.name: line for line in report_of(WINDOW, "class").lines}
    assert (lines["SS"].prefill_j_per_token, lines["SS"].decode_j_per_token) == (0.1, 1.0)
    assert (lines["LL"].prefill_j_per_token, lines["LL"].j_per_request) == (0.5, 2700.0)
    assert lines[OVERHEAD].decode_j_per_token is None
    assert report_of(EnergyWindow(0.0, 1.0, (), "x"), "class").total.j_per_request is None


def test_the_table_says_it_all_in_80_columns(gateway):
    shown = run(gateway, "--since", "15m", "--api-key", "k")
    assert gateway.seen == [("/admin/energy?since_s=900.0", "Bearer k"), ("/admin/status", "Bearer k")]
    assert "saved in 30 min against single-pool: 100 of 300 Wh (33%), give or take 10" in shown
    assert "Energy by class, 2023-11-14 22:13:20 to 2023-11-14 23:13:20 UTC" in shown
    assert all(name in shown for name in ("SS", "LL", OVERHEAD, "all", "a test grid", "No price is set for B300"))
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown


def test_wide_numbers_fit_too(gateway):
    row = EnergyRow(123456, 10**9, 10**8, 1.23e9, 4.5e9, 6.7e8, 8.9e7, 1.0, 98765.4, 0.00123, 0.0)
    gateway.answer = (200, msgspec.json.encode(EnergyWindow(0.0, 1.0, (UserRow(User("", "", "", ""), row),), "grid")))
    assert "…" not in run(gateway, "--by", "pool")


def test_csv_and_json_have_every_number(gateway):
    rows = list(csv.DictReader(io.StringIO(run(gateway, "--format", "csv", "--by", "tenant"))))
    assert [row["tenant"] for row in rows] == ["bob", OVERHEAD, "alice"]
    assert sum(float(row["energy_j"]) for row in rows) == 7200.0
    told = json.loads(run(gateway, "--format", "json", "--by", "pool"))
    assert told["counterfactual"] == SAVED
    assert told["total"]["co2_g"] == 15.0
    assert told["lines"][0]["gpu_hours"] == pytest.approx(0.03)
    assert told["carbon_source"] == "a test grid"


def test_what_is_wrong_is_said(gateway):
    for answer, message in (
        ((401, b""), "wants an API key"),
        ((404, b""), "status 404; is it a dynamollm gateway"),
        ((200, b"{}"), "is not understood"),
    ):
        gateway.answer = answer
        with pytest.raises(UserError, match=message):
            run(gateway)
    gateway.url = "http://127.0.0.1:1"
    with pytest.raises(UserError, match="is a gateway running there"):
        run(gateway)
    for since in ("1", "h", "-1h", "1w"):
        assert "is not a stretch of time" in CliRunner().invoke(command, ["--since", since]).output
