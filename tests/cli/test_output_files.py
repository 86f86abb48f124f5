import pytest

from torchmask.cli.main import main


@pytest.mark.parametrize(
    "command",
    [["inspect", "--html"], ["inspect", "--svg"], ["snapshot", "-o"], ["prove", "-o"]],
    ids=lambda command: " ".join(command),
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, command):
    verb, option = command
    file = tmp_path / "missing" / "out"
    assert main([verb, "--config", "tiny/qa", option, str(file)]) == 7
    assert "error[K05]" in capsys.readouterr().err


def test_a_folder_is_no_output_file(tmp_path, capsys):
    assert main(["snapshot", "--config", "tiny/qa", "-o", str(tmp_path)]) == 7
    assert "it is a folder" in capsys.readouterr().err
