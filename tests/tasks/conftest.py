"""Fixtures for the tests of tasks."""

import pytest
from task_examples import DEMO_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def demo_model():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Let datasets write its cache, when it reads Parquet, to the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
