"""The bar that commands show on stderr while they work."""

import io

from rich.console import Console

from sgl_npu.compiler.progress import steps


def shown(**setting) -> str:
    console = Console(file=io.StringIO(), width=120, **setting)
    with steps(3, console) as step:
        step("building [b]")
        step("compiling")
        print("a line of the model")
    return console.file.getvalue()


def test_a_terminal_sees_which_step_of_how_many(capsys):
    text = shown(force_terminal=True)
    assert "compiling" in text and "1/3" in text
    assert capsys.readouterr().out == "a line of the model\n"


def test_a_pipe_sees_nothing(capsys):
    assert shown(force_terminal=False) == ""
    assert capsys.readouterr().out == "a line of the model\n"
