from __future__ import annotations

import sys

import pytest

from mtnlg.config import CheckpointError
from mtnlg.interop import fetch_from_hub, looks_like_hub_name


@pytest.mark.parametrize("name", ["gpt2", "owner/model-1.5"])
def test_hub_names(name):
    assert looks_like_hub_name(name)


@pytest.mark.parametrize("name", ["/tmp/x", "./x", "runs/a/b", "../x", "", "a b"])
def test_paths(name):
    assert not looks_like_hub_name(name)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        fetch_from_hub("owner/model")


def test_without_a_network_the_error_says_so(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"owner/model.*cannot reach the hub"):
        fetch_from_hub("owner/model")


def test_only_safe_files_are_asked_for(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert fetch_from_hub("owner/model") == tmp_path
    assert not [pattern for pattern in asked["owner/model"] if "bin" in pattern or pattern == "*"]
