"""How a command ends: its exit code, and one line for the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from miram.engine.errors import Preempted, RunFailed, UserError, did_you_mean, exit_code, one_line


def ends_with(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("no\nsuch\t  file"), 2), (Preempted("no\nsuch file"), 75), (RunFailed("no such\r\nfile"), 1)],
)
def test_foreseen_end_has_its_code_and_one_line(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(ends_with(error)) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "miram: no such file\n")


def test_success_is_zero_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: "a result, not a code") == 0
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(ends_with(KeyboardInterrupt())) == 1
    assert capsys.readouterr() == ("", "miram: interrupted; what was saved before is kept\n")


def test_only_the_first_rank_says_that_all_were_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert exit_code(ends_with(Preempted("stopped"))) == 75
    assert exit_code(ends_with(RunFailed("failed"))) == 1
    assert capsys.readouterr() == ("", "miram: failed\n")


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3)])
def test_anything_unforeseen_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        exit_code(ends_with(error))
    assert raised.value is error


@pytest.mark.parametrize("text", ["a b", " a  b ", "a\nb", "\ta\r\n\n b\v"])
def test_one_line_has_single_blanks(text: str) -> None:
    assert one_line(text) == "a b"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("batch_siez", "; did you mean 'batch_size'?"),
        ("step", "; did you mean 'steps'?"),
        ("zzz", "; known: batch_size, epochs, steps"),
    ],
)
def test_nearest_name_is_suggested_else_all_are_listed(word: str, said: str) -> None:
    assert did_you_mean(word, ["steps", "epochs", "batch_size"]) == said


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert exit_code(lambda: (tmp_path / "file" / "below").mkdir()) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "file" / "below") in said
    assert len(said.splitlines()) == 1
