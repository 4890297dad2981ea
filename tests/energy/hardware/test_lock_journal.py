"""The agent's journal: what is written is read, whole at every moment, by one agent at a time."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.adapters.agent_journal import FileJournal, JournalError
from energy.gpu import ClockLock

locks = st.dictionaries(
    st.text("GPU-abcdef0123456789", min_size=1, max_size=20),
    st.builds(ClockLock, st.integers(1, 3000), st.integers(1, 3000)),
    max_size=8,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "locks.json"


def test_no_file_is_no_locks(path):
    assert FileJournal(path).read() == {}


@given(st.lists(locks, min_size=1, max_size=4))
def test_the_last_written_is_read_by_the_next(tmp_path_factory, stories):
    path = tmp_path_factory.mktemp("journal") / "locks.json"
    journal = FileJournal(path)
    for story in stories:
        journal.write(story)
        assert journal.read() == story
    journal.close()
    after = FileJournal(path)
    assert after.read() == stories[-1]
    after.close()


def test_two_agents_do_not_share_one(path):
    first = FileJournal(path)
    with pytest.raises(JournalError, match="another agent is running on this journal; stop it first"):
        FileJournal(path)
    first.close()
    FileJournal(path).close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="choose another place with --journal"):
        FileJournal(tmp_path / "file" / "locks.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"format": 2, "locks": {}}',
        '{"format": 1}',
        '{"format": 1, "locks": [1]}',
        '{"format": 1, "locks": {"GPU-1": [600]}}',
        '{"format": 1, "locks": {"GPU-1": ["x", "y"]}}',
        '{"format": 1, "locks": {"GPU-1": null}}',
    ],
)
def test_what_is_no_journal_is_refused_with_the_way_out(path, text):
    journal = FileJournal(path)
    path.write_text(text)
    with pytest.raises(JournalError, match="nvidia-smi -rgc"):
        journal.read()


def test_nothing_half_written_is_ever_there(path, monkeypatch):
    """A write that fails leaves what was there before, and no litter."""
    journal = FileJournal(path)
    journal.write({"GPU-1": ClockLock(600, 900)})

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        journal.write({})
    assert json.loads(path.read_text())["locks"] == {"GPU-1": [600, 900]}
    assert {entry.name for entry in path.parent.iterdir()} == {"locks.json", "locks.json.lock"}
