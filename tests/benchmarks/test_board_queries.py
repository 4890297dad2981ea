"""A board's queries as Grafana would ask them, and what counts as something to show."""

import pytest

from benchmarks.board_queries import BoardQuery, answered, board_queries

QUERY = BoardQuery("p", "A", "up", False)


def board(*exprs: str, **variable) -> dict:
    listed = [{"name": "model", "query": "label_values(up, job)", "allValue": ".*", **variable}]
    targets = [{"refId": chr(65 + n), "expr": expr} for n, expr in enumerate(exprs)]
    return {
        "templating": {"list": listed},
        "annotations": {"list": [{"name": "a", "expr": "changes(epoch[1m]) > 0"}]},
        "panels": [{"type": "row", "title": "r"}, {"title": "p", "targets": targets}],
    }


def test_variables_panels_and_annotations_are_all_asked():
    queries = board_queries(board("up", "down"), 5)
    assert [(q.panel, q.ref, q.expr) for q in queries] == [
        ("variable model", "", "count by (job) (up)"),
        ("annotation a", "", "changes(epoch[1m])"),
        ("p", "A", "up"),
        ("p", "B", "down"),
    ]


def test_grafana_s_variables_are_filled_in():
    *_, query = board_queries(board('rate(x{m=~"$model"}[$__rate_interval])'), 5)
    assert query.expr == 'rate(x{m=~".*"}[20s])'


def test_a_variable_the_board_does_not_define_is_an_error():
    with pytest.raises(ValueError, match="a variable that the board does not define"):
        board_queries(board('up{pool="$pool"}'), 5)


def test_a_variable_asked_in_another_way_is_an_error():
    with pytest.raises(ValueError, match="only label_values"):
        board_queries(board("up", query="metrics(.*)"), 5)


@pytest.mark.parametrize(
    ("result", "series", "value"),
    [
        ([], 0, None),
        ([{"value": [1.0, "NaN"]}], 1, None),
        ([{"value": [1.0, "+Inf"]}, {"value": [1.0, "0"]}], 2, 0.0),
        ([{"values": [[1.0, "2.5"], [6.0, "NaN"]]}], 1, 2.5),
        ([{"values": [[1.0, "1"], [6.0, "3"]]}, {"values": [[1.0, "9"]]}], 2, 3.0),
    ],
)
def test_a_panel_shows_something_if_a_finite_number_is_in_the_answer(result, series, value):
    answer = answered(QUERY, result)
    assert (answer.series, answer.value, answer.shows) == (series, value, value is not None)
