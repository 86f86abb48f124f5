from torchmask.cli.main import main


def test_a_component_is_no_text(capsys):
    nested = "dataset.source={_component_: torchmask.data.open_source, source: x}"
    assert main(["validate", "--config", "tiny/qa", nested]) == 2
    error = capsys.readouterr().err
    assert "error[C03]" in error and "'source'" in error


def test_packing_that_contradicts_itself_is_found_without_reading_data(capsys):
    words = ["packing.share_prefixes=true", "packing.strategy=none"]
    assert main(["validate", "--config", "tiny/qa", *words]) == 2
    assert "share_prefixes is true while strategy is none" in capsys.readouterr().err
