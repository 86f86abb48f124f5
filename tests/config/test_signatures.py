"""Signatures read from source equal those of the imported objects."""

import importlib
import inspect
import subprocess
import sys

import pytest

from torchmask.config import signatures
from torchmask.config.signatures import find, imported_module, may_define


@pytest.mark.parametrize(
    "dotpath",
    [
        "torch.optim.AdamW",
        "torch.optim.SGD",
        "torch.optim.Adafactor",
        "torch.optim.lr_scheduler.CosineAnnealingLR",
        "torch.nn.Linear",
        "torch.nn.CrossEntropyLoss",
        "torchao.optim.AdamW8bit",
        "torchmask.errors.DataError",
        "torchmask.messages.Message",
        "torchmask.Message",
        "torchmask.config.load_config",
        "torchmask.data.instruct_dataset",
        "torchmask.data.alpaca_dataset",
        "torchmask.data.chat_dataset",
        "torchmask.data.squad_dataset",
        "torchmask.data.text_completion_dataset",
        "torchmask.data.segments_dataset",
        "torchmask.data.tokenized_dataset",
    ],
)
def test_parameters_equal_those_of_the_imported_object(dotpath):
    module, _, name = dotpath.rpartition(".")
    expected = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    found = find(dotpath)
    assert found is not None and found.parameters is not None
    assert [p.name for p in found.parameters] == [p.name for p in expected]
    assert [p.has_default for p in found.parameters if p.kind not in "***"] == [
        p.default is not p.empty for p in expected if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def test_nothing_is_imported():
    code = (
        "import sys\nfrom torchmask.config.signatures import find\n"
        "assert find('torch.optim.AdamW').module == 'torch.optim.adamw'\n"
        "assert find('torchao.optim.AdamW8bit')\n"
        "assert not {'torch', 'torchao', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_sources_do_not_say_is_not_guessed(tmp_path):
    assert find("torch.optim.Nothing") is None
    assert find("torch.os.system") is None
    assert find("no_such_package.thing") is None


def test_modules_behind_attributes_are_seen():
    assert imported_module("torch", "os") == "os"
    assert imported_module("torch.nn.modules.module", "functools") == "functools"
    assert imported_module("torch.optim", "AdamW") is None
    assert not may_define("torch.optim", "AdmW")


SOURCE = """
import functools
from dataclasses import dataclass, field
from typing import ClassVar

class Base:
    def __init__(self, a, b=1, *, c): ...

class Child(Base):
    pass

class Own(Base):
    def __init__(self, d, *rest, e=2, **more): ...

    @classmethod
    def load(cls, path: str, *, strict: bool = True): ...

    def method(self, x): ...

@dataclass
class Data:
    x: int
    y: list = field(default_factory=list)
    z: int = field(init=False)
    kind: ClassVar[str] = "k"

@dataclass(kw_only=True)
class More(Data):
    w: int = 1

alias = Own

class Plain: ...
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Child", [("a", False), ("b", True), ("c", False)]),
        ("Own", [("d", False), ("rest", True), ("e", True), ("more", True)]),
        ("alias", [("d", False), ("rest", True), ("e", True), ("more", True)]),
        ("Own.load", [("path", False), ("strict", True)]),
        ("Data", [("x", False), ("y", True)]),
        ("More", [("x", False), ("y", True), ("w", True)]),
        ("Plain", []),
    ],
)
def test_classes_dataclasses_methods_and_aliases(tmp_path, name, expected):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("from .inner import *\nfrom .inner import Own as Renamed\n")
    (tmp_path / "pack" / "inner.py").write_text(SOURCE)
    folders = (str(tmp_path),)
    for path in (f"pack.inner.{name}", f"pack.{name}"):
        found = find(path, folders=folders)
        assert found is not None and found.module == "pack.inner"
        assert [(p.name, p.has_default) for p in found.parameters] == expected
    assert find("pack.Renamed", folders=folders).name == "Own"
    assert find("pack.Own.method", folders=folders) is None
    signatures._locate.cache_clear()


def test_lazily_exported_names_are_found_in_the_type_checking_block(tmp_path):
    (tmp_path / "lazy").mkdir()
    (tmp_path / "lazy" / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lazy.heavy import build\n"
    )
    (tmp_path / "lazy" / "heavy.py").write_text("raise SystemExit\ndef build(size, *, depth=2): ...\n")
    found = find("lazy.build", folders=(str(tmp_path),))
    assert found.module == "lazy.heavy" and [p.name for p in found.parameters] == ["size", "depth"]
    signatures._locate.cache_clear()
