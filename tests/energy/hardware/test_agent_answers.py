"""What agent and client say to each other, without sockets: queries read strictly, errors that survive the wire."""

import json
from contextlib import suppress
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.agent_wire import ANYBODY, BadQueryError, Query, error_answer, error_of_answer
from energy.gpu import (
    ClockDwellError,
    ClockLock,
    ClockRangeError,
    GpuAgentError,
    GpuDriverError,
    GpuError,
    GpuLostError,
    GpuMigError,
    GpuPermissionError,
    GpuUnsupportedError,
    NoSuchGpuError,
)

ERRORS = (
    GpuError("what"),
    GpuDriverError("what"),
    GpuPermissionError("what"),
    GpuLostError("what"),
    GpuUnsupportedError("what"),
    GpuMigError("what"),
    NoSuchGpuError("what"),
    ClockRangeError("what"),
    ClockDwellError("what", 2.5),
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
SET = "gpu_ids=0,1&min_clock_mhz=600&max_clock_mhz=1200"


class TestErrors:
    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_come_out_as_they_went_in(self, error):
        status, body = error_answer(error)
        told = error_of_answer("http://node-1:9400", status, body)
        assert type(told) is type(error)
        assert str(told) == "agent http://node-1:9400: what"
        assert status >= HTTPStatus.BAD_REQUEST

    def test_a_dwell_tells_when_to_come_back(self):
        _, body = error_answer(ClockDwellError("wait", 7.25))
        assert error_of_answer("a", 429, body).retry_after_s == 7.25

    @pytest.mark.parametrize(
        ("status", "kind"),
        [(403, GpuPermissionError), (400, NoSuchGpuError), (500, GpuAgentError), (404, GpuAgentError)],
    )
    def test_of_zeusd_which_names_no_kind_the_status_counts(self, status, kind):
        told = error_of_answer("a", status, b"GPU index out of range")
        assert type(told) is kind
        assert "GPU index out of range" in str(told)

    @given(st.binary(max_size=300), st.sampled_from(list(HTTPStatus)))
    def test_any_answer_makes_an_error_that_names_the_agent(self, body, status):
        assert "agent somewhere" in str(error_of_answer("somewhere", status, body))

    @given(ANY_JSON)
    def test_json_of_any_shape_makes_one_too(self, told):
        assert isinstance(error_of_answer("a", 500, json.dumps(told).encode()), GpuError)

    @given(ANY_JSON, ANY_JSON, st.sampled_from(["clock-dwell", "gpu-lost"]) | ANY_JSON)
    def test_known_fields_of_unknown_types_do_too(self, error, retry_after_s, kind):
        told = {"error": error, "retry_after_s": retry_after_s, "kind": kind}
        assert isinstance(error_of_answer("a", 500, json.dumps(told).encode()), GpuError)

    def test_an_answer_with_a_kind_from_a_later_version_is_read_by_its_status(self):
        body = json.dumps({"error": "too hot", "kind": "thermal"}).encode()
        assert type(error_of_answer("a", 500, body)) is GpuAgentError


class TestQueries:
    def test_a_whole_one(self):
        asked = Query(f"{SET}&holder=solver&lease_s=12.5").set_clocks()
        assert (asked.gpus, asked.lock, asked.holder, asked.lease_s) == ((0, 1), ClockLock(600, 1200), "solver", 12.5)

    def test_without_holder_and_lease_as_zeusds_clients_ask(self):
        asked = Query(SET).set_clocks()
        assert (asked.holder, asked.lease_s) == (ANYBODY, None)

    @given(st.lists(st.integers(0, 63), min_size=1, max_size=16))
    def test_gpus_come_once_each_in_the_order_given(self, indices):
        gpus = Query(f"gpu_ids={','.join(map(str, indices))}").gpus()
        assert gpus == tuple(dict.fromkeys(indices))

    def test_none_named_is_every_one_where_that_is_allowed(self):
        assert Query("").gpus(every=(0, 1, 2)) == (0, 1, 2)
        with pytest.raises(BadQueryError, match="gpu_ids must be GPU indices as 0,1,2; found ''"):
            Query("").gpus()

    @pytest.mark.parametrize("text", ["x", "0,x", "-1", "0.5", "0;1", "²", "١"])
    def test_what_is_no_index_is_named(self, text):
        with pytest.raises(BadQueryError, match="gpu_ids must be GPU indices"):
            Query(f"gpu_ids={text}").gpus()

    @pytest.mark.parametrize("text", ["", "fast", "-600", "6e2", "1200.0", "1234567", "٦٠٠"])
    @pytest.mark.parametrize("which", ["min_clock_mhz", "max_clock_mhz"])
    def test_a_clock_is_a_whole_number_of_mhz(self, which, text):
        other = {"min_clock_mhz": "max_clock_mhz=900", "max_clock_mhz": "min_clock_mhz=900"}[which]
        with pytest.raises(BadQueryError, match=f"{which} must be a whole number of MHz"):
            Query(f"gpu_ids=0&{other}&{which}={text}").set_clocks()

    @pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "soon"])
    def test_a_lease_is_seconds_above_0(self, text):
        with pytest.raises(BadQueryError, match=f"lease_s must be seconds above 0, not '{text}'"):
            Query(f"{SET}&lease_s={text}").set_clocks()

    def test_a_holders_name_is_cut(self):
        assert len(Query(f"holder={'x' * 5000}").holder()) == 100

    @given(st.text(max_size=200))
    def test_any_query_is_read_or_refused(self, text):
        query = Query(text)
        for read in (query.gpus, query.set_clocks):
            with suppress(BadQueryError):
                read()
