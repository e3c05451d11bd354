"""The measuring script runs, here with tiny models on a CPU, and keeps to its time."""

import measure
import pytest
import torch

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 32,
        "num_attention_heads": 2, "num_frames": 4, "patch_size": 8}  # fmt: skip


@pytest.fixture
def tables(monkeypatch, capsys):
    """tables(*arguments): the rows that it prints, of each part."""
    timed, reading = measure.timed, measure.reading
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "BATCHES", (2,))
    monkeypatch.setattr(measure, "SIZES", {"ViT-B": TINY, "ViT-L": TINY})
    monkeypatch.setattr(measure, "timed", lambda step: timed(step, 1, 0))
    monkeypatch.setattr(measure, "HALF", {"bf16": torch.bfloat16})  # fp16 takes minutes on a CPU
    monkeypatch.setattr(measure.torch, "compile", lambda model: model)  # needs a C++ compiler
    monkeypatch.setitem(measure.PARTS, "reading", lambda end: reading(end, 1, 4, 3, height=80))

    def printed(*arguments):
        measure.main(arguments)
        head, *parts = capsys.readouterr().out.split("\n\n")
        assert head.startswith("CPU, torch")
        return [[line.split(" | ") for line in part.splitlines()[2:]] for part in parts]

    return printed


def test_each_part_has_its_rows(tables):
    training, reading, inference, segmentation = tables("--seconds", "300")
    assert [len(part) for part in (training, reading, inference, segmentation)] == [14, 1, 6, 6]
    for row in training + segmentation + inference:
        assert "not measured" not in str(row) and "none" not in row
    assert all(float(row[5]) > 0 for row in training)
    assert sum(row[3] == "True" for row in training) == 2  # compiled
    assert all(float(rate.split()[0]) > 0 for rate in reading[0][1:])


def test_what_finds_no_time_is_named(tables):
    training, inference = tables("--only", "training", "inference", "--seconds", "0")
    assert len(training) == 14 and len(inference) == 6
    assert all("not measured: no time left" in row for row in training + inference)
