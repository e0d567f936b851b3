"""The prompt for a connection string on Windows, with a stand-in for its console.

It tests the branch's own logic on every platform, not the console's.
"""

import getpass
import importlib.util
import sys
from types import ModuleType

import pytest

from postgres import prompt

PAUSE = ""  # in a list of keys: the next key comes a moment later


class Console(ModuleType):
    """Stands for msvcrt."""

    def __init__(self, *keys: str) -> None:
        super().__init__("msvcrt")
        self.keys = [key for part in keys for key in part or [PAUSE]]
        self.screen = ""

    def kbhit(self) -> bool:
        if self.keys[:1] == [PAUSE]:
            del self.keys[0]
            return False
        return bool(self.keys)

    def getwch(self) -> str:
        while (key := self.keys.pop(0)) == PAUSE:
            pass
        return key

    def putwch(self, character: str) -> None:
        self.screen += character


def read_pasted(monkeypatch: pytest.MonkeyPatch, console: Console) -> str:
    """Call the Windows branch of the module, with Windows' own getpass()."""
    monkeypatch.setitem(sys.modules, "msvcrt", console)
    monkeypatch.setattr(getpass, "msvcrt", console, raising=False)
    monkeypatch.setattr(getpass, "getpass", vars(getpass)["win_getpass"])
    monkeypatch.setattr(sys, "stdin", sys.__stdin__)
    spec = importlib.util.spec_from_file_location("prompt_on_windows", prompt.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as windows:
        windows.setattr(sys, "platform", "win32")
        spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAUSE", 0)
    answer: str = module.read_pasted("Paste: ")
    return answer


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        (["s3cr3t\r"], "s3cr3t\n"),
        (["\r"], "\n"),
        (["\r", "\r"], "\n\n"),
        (["s3cr4\b3t\r"], "s3cr3t\n"),
        (["one\rtwo\rs3cr3t\r"], "one\ntwo\ns3cr3t\n"),
        (["one\r", PAUSE, "two\r"], "one\ntwo\n"),
        (["one\rs3cr", PAUSE, PAUSE, PAUSE, "3t\r"], "one\ns3cr3t\n"),
        (["x" * 100_000 + "\r"], "x" * 100_000 + "\n"),
    ],
)
def test_a_paste_is_one_answer_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, keys: list[str], answer: str
) -> None:
    console = Console(PAUSE, *keys)

    assert read_pasted(monkeypatch, console) == answer
    assert console.screen.split() == ["Paste:"]
    assert console.keys == []


def test_what_was_typed_ahead_of_the_prompt_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console("early\r", PAUSE, "later\r")

    assert read_pasted(monkeypatch, console) == "later\n"
    assert "is not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "error"), [("\x04\r", EOFError), ("\x1a\r", EOFError), ("\x03", KeyboardInterrupt)]
)
def test_ctrl_d_ctrl_z_and_ctrl_c_are_no_answer(
    monkeypatch: pytest.MonkeyPatch, key: str, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        read_pasted(monkeypatch, Console(PAUSE, key))
