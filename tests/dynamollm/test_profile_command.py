"""``dynamollm profile``: fit writes or refuses, show prints and plots, compare and check speak plainly."""

import shutil

import pytest
from click.testing import CliRunner

from dynamollm.commands.profile import command
from dynamollm.errors import UserError
from energy.adapters.catalogue import SHIPPED, load_fitted, profile_names

HEADER = "gpu,model,tp,sm_clock_mhz,input_tokens,output_tokens,concurrency,ttft_s,tbt_s,power_w"


def invoke(*arguments, ok=True):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=True)
    if ok:
        assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture
def csv(tmp_path):
    """A small sweep by a formula: two shapes, three concurrencies, two clocks."""
    rows = [HEADER]
    for clock in (1000, 1500):
        for tokens in (256, 1024):
            for clients in (1, 4, 16):
                ttft_s = (0.01 + tokens * 1e-4) * (1500 / clock) * (1 + clients / 16)
                rows.append(
                    f"X1,me/tiny,1,{clock},{tokens},128,{clients},{ttft_s},{0.01 + clients * 2e-4},{100 + clients}"
                )
    path = tmp_path / "sweep.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_fit_writes_a_profile_that_check_accepts(csv, tmp_path):
    output = tmp_path / "tiny.yaml"
    told = invoke("fit", csv, "-o", output).output
    assert "12 rows fitted, 0 left out" in told
    profile = load_fitted(output)
    assert (profile.name, profile.gpu, profile.model, profile.sm_clocks_mhz) == ("tiny", "X1", "me/tiny", (1000, 1500))
    assert [source.name for source in profile.provenance.sources] == ["sweep.csv"]
    assert invoke("check", output).output.startswith("ok: tiny, me/tiny on X1, TP 1, 2 clocks")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: text.replace("0.0102,101", "-1,101"), "line 2: tbt_s is -1"),
        (lambda text: "\n".join(line.rsplit(",", 1)[0] for line in text.splitlines()), "no power column"),
        (lambda text: text.replace("me/tiny", "me/tiny-FP8", 3), "mixed model"),
        (lambda text: "\n".join(text.splitlines()[:4]), "too few points"),
    ],
)
def test_fit_refuses_with_the_reason_and_writes_nothing(csv, tmp_path, spoil, reason):
    csv.write_text(spoil(csv.read_text()))
    output = tmp_path / "tiny.yaml"
    result = invoke("fit", csv, "-o", output, ok=False)
    assert isinstance(result.exception, UserError)
    assert reason in str(result.exception)
    assert list(tmp_path.iterdir()) == [csv]


def test_fit_names_what_the_files_hold_when_a_selection_finds_nothing(csv, tmp_path):
    result = invoke("fit", csv, "--gpu", "H100-SXM", "-o", tmp_path / "x.yaml", ok=False)
    assert "no row has {'gpu': 'H100-SXM'}; the files hold gpu: X1" in str(result.exception)


def test_show_prints_the_heat_map_and_draws_every_plot(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    told = invoke("show", "llama-3.1-70b-fp8-h100", "--plots", tmp_path).output
    assert "activity_power: fitted" in told
    for word in ("SS", "LL", "1980 MHz", "SLO-max req/s", "loaded 122 W"):
        assert word in told
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == [f"llama-3.1-70b-fp8-h100-{kind}.png" for kind in ("energy", "heatmap", "power", "tbt", "ttft")]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_compare_puts_two_profiles_side_by_side(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    told = invoke("compare", "llama-2-70b-h100", "llama-3.1-70b-fp8-h100").output
    assert "llama-2-70b-h100 against llama-3.1-70b-fp8-h100" in told
    assert told.count("TP") >= 18


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_passes_check(name):
    assert invoke("check", name).output.startswith(f"ok: {name}")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("    weights_s: ", "    weights_s: -", "weights_s"),
        ("bare_w: 71.8", "bare_w: 99.0", "idle power must rise"),
        ("board_w: 700.0", "board_w: 900.0", "is above the 700 W of H100-SXM"),
        ("    sharpness: ", "    sharpness: 0.5  # ", "it must be 1 or more"),
        ("kv_capacity:\n  2: ", "kv_capacity:\n  2: -", "no KV cache beside the weights"),
        ("board_w: 700.0", "board_w: lots", "$.physics.board_w"),
        ("times:", "tymes:", "times"),
        ("format: 1", "format: 99", "not a profile of format 1"),
        ("format: 1", "{", "not YAML"),
    ],
)
def test_check_says_what_no_gpu_does_and_what_cannot_be_read(tmp_path, old, new, reason):
    path = tmp_path / "spoilt.yaml"
    shutil.copy(SHIPPED / "llama-3.1-70b-fp8-h100.yaml", path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    result = invoke("check", path, ok=False)
    assert isinstance(result.exception, UserError)
    assert reason in str(result.exception)
    assert "spoilt.yaml" in str(result.exception)


def test_an_unknown_profile_names_the_shipped_ones():
    result = invoke("show", "gpt-17", ok=False)
    assert all(name in str(result.exception) for name in profile_names())
