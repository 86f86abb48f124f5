"""What a stranger's configuration must not reach: code that writes or removes files."""

import re
from pathlib import Path

import pytest

import torchmask
from torchmask.config.trust import BUILDING_BLOCKS, NO_BLOCKS, Trust, check_dotpath
from torchmask.errors import ConfigError

ROOT = Path(torchmask.__file__).parent
WRITES = re.compile(
    r"rmtree|\.unlink\(|\.rename\(|os\.replace|\.write_text\(|\.write_bytes\(|\.mkdir\(|copyfile|save_file|savefig|tofile"
    r"|open\([^)]*\"[wax]b?\"|open_memmap|StorageWriter"
)
HARMLESS = {
    "torchmask.data.sources": "a docstring's example",
}


def modules():
    for block in BUILDING_BLOCKS:
        if block.startswith("torchmask."):
            for path in sorted((ROOT / block.split(".")[1]).rglob("*.py")):
                yield ".".join(("torchmask", *path.relative_to(ROOT).with_suffix("").parts)), path


def test_every_module_that_writes_is_closed_to_configurations():
    writers = {name for name, path in modules() if WRITES.search(path.read_text(encoding="utf-8"))}
    assert writers - set(NO_BLOCKS) == set(HARMLESS)


@pytest.mark.parametrize(
    "dotpath",
    [
        "torchmask.data.cache.remove_entry",
        "torchmask.data.mapped.write_mapped",
        "torchmask.models.save_pretrained",
        "torchmask.tokenizers.saving.write_tokenizer",
        "torchmask.tokenizers.tokenizer.write_tokenizer",
        "torchmask.data.write_masks_html",
    ],
)
def test_a_writer_is_refused(dotpath):
    with pytest.raises(ConfigError) as caught:
        check_dotpath(dotpath, Trust())
    assert caught.value.id == "C07"
