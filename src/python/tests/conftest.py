"""The built-in model, and settings with which a run takes a moment."""

import pathlib

import pytest

import quantc

#: Few and short samples: what a test asks is not how good the result is.
QUICK = {"group_size": 64, "samples": 4, "seq_len": 64, "verify_windows": 1, "device": "cpu"}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    quantc.demo_model(folder)
    return folder
