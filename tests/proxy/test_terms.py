"""Terms: what control headers ask for; a bad one is no reason to fail a request."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.heads import ClientHead, InstanceHead
from proxy.terms import DEFAULT_TENANT, NOT_PASSED, Terms, read_terms

BOUNDS_S = (0.001, 60.0)
TTFT, TPOT = b"x-llm-d-slo-ttft-ms", b"x-llm-d-slo-tpot-ms"
TENANT, OBJECTIVE = b"x-llm-d-inference-fairness-id", b"x-llm-d-inference-objective"


def terms(*headers):
    return read_terms(headers, BOUNDS_S)


class TestLatencies:
    @given(st.floats(1.0, 60_000.0))
    def test_milliseconds_become_seconds(self, asked_ms):
        found = terms((TTFT, str(asked_ms).encode()), (TPOT, str(asked_ms).encode()))
        assert found.ttft_s == found.tbt_s == pytest.approx(asked_ms / 1000.0)
        assert found.invalid == ()

    @pytest.mark.parametrize(
        "value", [b"", b"fast", b"0", b"-5", b"nan", b"inf", b"-inf", b"1e9", b"0.5", b"100ms", b"1,5"]
    )
    def test_what_makes_no_sense_is_named_and_counts_as_absent(self, value):
        found = terms((TTFT, value), (TPOT, b"50"))
        assert (found.ttft_s, found.tbt_s, found.invalid) == (None, 0.05, ("ttft",))

    @pytest.mark.parametrize("value", [b" 250 ", b"250.0", b"2.5e2", b"+250"])
    def test_a_number_may_be_written_in_any_way(self, value):
        assert terms((TTFT, value)).ttft_s == 0.25

    def test_the_bounds_themselves_are_allowed(self):
        assert terms((TTFT, b"1"), (TPOT, b"60000")).invalid == ()

    @pytest.mark.parametrize(
        ("alias", "canonical", "field"),
        [(b"x-slo-ttft-ms", TTFT, "ttft_s"), (b"x-slo-tpot-ms", TPOT, "tbt_s")],
    )
    def test_an_older_name_counts_where_the_new_one_is_absent(self, alias, canonical, field):
        assert getattr(terms((alias, b"300")), field) == 0.3
        assert getattr(terms((alias, b"300"), (canonical, b"200")), field) == 0.2
        assert getattr(terms((canonical, b"200"), (alias, b"300")), field) == 0.2

    def test_a_bad_new_name_is_not_healed_by_the_old_one(self):
        found = terms((TTFT, b"x"), (b"x-slo-ttft-ms", b"300"))
        assert (found.ttft_s, found.invalid) == (None, ("ttft",))


class TestNames:
    def test_nobody_named_is_the_default_tenant(self):
        assert terms() == Terms() == Terms(tenant=DEFAULT_TENANT)

    @pytest.mark.parametrize("value", [b"", b"   ", b"a\x00b", b"a\nb", b"x" * 257])
    def test_a_name_is_printable_and_short(self, value):
        found = terms((TENANT, value), (OBJECTIVE, value))
        assert (found.tenant, found.objective) == (DEFAULT_TENANT, None)
        assert found.invalid == ("tenant", "objective")

    def test_space_around_a_name_is_none_of_it(self):
        assert terms((TENANT, b"  team a ")).tenant == "team a"

    def test_the_gateway_apis_names_do_as_well(self):
        found = terms((b"x-gateway-inference-fairness-id", b"team"), (b"x-gateway-inference-objective", b"batch"))
        assert (found.tenant, found.objective) == ("team", "batch")

    def test_of_several_headers_of_one_name_the_first_counts(self):
        assert terms((TENANT, b"one"), (TENANT, b"two")).tenant == "one"


class TestRequestIds:
    @pytest.mark.parametrize("value", [b"a", b"chatcmpl-7", b"x" * 128, b"0-9_./:~"])
    def test_a_plain_word_is_taken_over(self, value):
        assert terms((b"x-request-id", value)).request_id == value

    @pytest.mark.parametrize("value", [b"", b"two words", b"x" * 129, b"\xe9", b"a\tb", b"a\x7f"])
    def test_anything_else_is_not(self, value):
        found = terms((b"x-request-id", value))
        assert (found.request_id, found.invalid) == (None, ("request-id",))


@given(st.lists(st.tuples(st.sampled_from([*sorted(NOT_PASSED), b"other"]), st.binary(max_size=300)), max_size=12))
def test_any_headers_give_terms_within_bounds(headers):
    found = read_terms(headers, BOUNDS_S)
    for latency_s in (found.ttft_s, found.tbt_s):
        assert latency_s is None or (math.isfinite(latency_s) and BOUNDS_S[0] <= latency_s <= BOUNDS_S[1])
    assert 0 < len(found.tenant) <= 256
    assert len(set(found.invalid)) == len(found.invalid)


def head(*headers):
    return ClientHead(headers, BOUNDS_S)


class TestClientHead:
    def test_control_headers_go_no_further_and_others_do(self):
        passed = head(
            (b"Host", b"here"), (b"X-LLM-D-SLO-TTFT-Ms", b"100"), (b"X-Mine", b"1"), (b"Accept", b"*/*")
        ).passed_lines
        assert passed == b"x-mine: 1\r\naccept: */*\r\n"

    def test_what_connection_names_ends_here(self):
        passed = head(
            (b"Connection", b"close, X-Mine"),
            (b"connection", b" x-other "),
            (b"X-Mine", b"1"),
            (b"X-Other", b"2"),
            (b"X-Kept", b"3"),
        ).passed_lines
        assert passed == b"x-kept: 3\r\n"

    def test_headers_of_one_name_all_go_on_in_order(self):
        assert head((b"X-A", b"1"), (b"X-B", b"2"), (b"x-a", b"3")).passed_lines == b"x-a: 1\r\nx-b: 2\r\nx-a: 3\r\n"

    @pytest.mark.parametrize("value", [b"100-continue", b"100-Continue"])
    def test_a_client_that_asks_for_leave(self, value):
        assert head((b"Expect", value)).expects_continue
        assert not head((b"Expect", b"magic")).expects_continue

    @pytest.mark.parametrize(
        ("headers", "http_1_0", "refused"),
        [
            (((b"host", b"a"),), False, False),
            ((), False, True),
            ((), True, False),
            (((b"host", b"a"), (b"Host", b"a")), False, True),
            (((b"host", b"a"), (b"Host", b"a")), True, True),
        ],
    )
    def test_exactly_one_host(self, headers, http_1_0, refused):
        refusal = head(*headers).refusal(b"/v1/models", http_1_0, 1000)
        assert (refusal is not None) == refused
        assert refusal is None or (refusal.status, "Host" in refusal.message) == (400, True)

    def test_a_target_is_a_path(self):
        assert head((b"host", b"a")).refusal(b"http://a/v1/models", http_1_0=False, limit_bytes=1000).status == 400
        assert head((b"host", b"a")).refusal(b"*", http_1_0=False, limit_bytes=1000).status == 400

    def test_a_long_head_is_a_431(self):
        long = head((b"host", b"a"), (b"cookie", b"x" * 100))
        assert long.refusal(b"/", http_1_0=False, limit_bytes=112) is None
        assert long.refusal(b"/?", http_1_0=False, limit_bytes=112).status == 431


class TestInstanceHead:
    def test_a_stream_is_a_200_of_events(self):
        events = (b"Content-Type", b"text/event-stream; charset=utf-8")
        assert InstanceHead(200, [events]).stream
        assert not InstanceHead(503, [events]).stream
        assert not InstanceHead(200, [(b"content-type", b"application/json")]).stream
        assert not InstanceHead(200, []).stream

    def test_this_hops_headers_and_the_gateways_own_names_end_here(self):
        passed = InstanceHead(
            200,
            [
                (b"Server", b"uvicorn"),
                (b"Transfer-Encoding", b"chunked"),
                (b"Content-Length", b"3"),
                (b"X-Request-Id", b"engine-1"),
                (b"X-Dynamollm-Class", b"LL"),
                (b"Connection", b"X-Hop"),
                (b"X-Hop", b"1"),
                (b"X-Kept", b"2"),
            ],
        ).lines
        assert passed == b"HTTP/1.1 200 OK\r\nx-kept: 2\r\n"
