"""The guide hands the model on: the card says what is so, the export computes the same."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import train
import yaml
from cells import run_cell
from transformers import VideoMAEConfig, VideoMAEForVideoClassification
from tutorial import results

LABELS = ["not_raising_hand", "raising_hand"]
CARD = ("card-data", "card-text", "card-limits", "card")


@pytest.fixture
def notebook(tmp_path):
    """The variables that the cells find: a random model, four random clips, the figures."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, image_size=32, patch_size=8,
        num_frames=4, num_attention_heads=2, use_mean_pooling=True,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    model = VideoMAEForVideoClassification(config).eval()
    (tmp_path / "model").mkdir()
    record = {"clips": {"train": 320, "test": 4}, "arguments": {"hub_token": "<HUB_TOKEN>"}}
    (tmp_path / "model" / "run_record.json").write_text(json.dumps(record))
    return {
        "tested": SimpleNamespace(trained=results.Trained(tmp_path / "model", None)),
        "output": tmp_path, "results": results,
        "json": json, "torch": torch, "train": train, "split": "test",
        "model": model, "config": config, "labels": LABELS, "device": "cpu",
        "processor": SimpleNamespace(image_mean=[0.5, 0.4, 0.4], image_std=[0.2, 0.2, 0.3]),
        "clips": torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8),
        "truth": torch.tensor([0, 1, 0, 1]), "some": torch.tensor([0, 1]),
        "flags": {"num_train_epochs": 10.0, "sampling": "dense", "sampling_rate": 4},
        "figures": {
            "accuracy": 0.75, "macro_f1": 0.7333, "best_single_frame": 0.5,
            "expected_calibration_error": 0.0712,
        },
        "scores": pd.DataFrame.from_dict(
            {"accuracy": (0.75, 0.30064, 0.9544, 4), "macro F1": (0.7333, 0.2, 1.0, 4)},
            "index", columns=["value", "low", "high", "clips"],
        ),
        "job": {"HyperParameters": {"model_name": '"OpenGVLab/VideoMAEv2-Base"'}},
        "base_model": None, "weights_licence": None, "data_note": None, "hub_repo": None,
    }  # fmt: skip


def card(notebook):
    variables = notebook
    for cell in CARD:
        variables = run_cell("how_to/deploy", cell, **variables)
    text = (notebook["output"] / "model" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_names_weights_licence_and_this_runs_figures(notebook):
    head, body = card(notebook)
    assert head["license"] == "cc-by-nc-4.0"  # that of the published weights
    results = head["model-index"][0]["results"][0]["metrics"]
    assert {r["type"]: r["value"] for r in results} == {"accuracy": 0.75, "macro_f1": 0.7333}
    assert "| accuracy | 0.75 | 0.301 to 0.954 | 4 |\n| macro F1 | 0.733 | 0.2 to 1.0 | 4 |" in body
    assert "reaches 0.500 at best, on 2 of" in body and "0.071 in the mean" in body
    assert "# Clips: not_raising_hand, raising_hand" in body and "`cc-by-nc-4.0`" in body
    assert "320 train + 4 test" in body and "on the 4 clips of the split `test`" in body
    assert "Not described" in body


@pytest.mark.parametrize(
    ("name", "given", "licence"),
    [
        ("OpenGVLab/VideoMAE2/distill/vit_b_k710_dl_from_giant.pth", None, "apache-2.0"),
        ("MCG-NJU/videomae-base", None, "cc-by-nc-4.0"),
        ("/opt/ml/input/data/model", None, "unknown"),
        ("somebody/model", "mit", "mit"),
    ],
)
def test_no_licence_is_guessed(notebook, name, given, licence):
    notebook["job"]["HyperParameters"]["model_name"] = json.dumps(name)
    head, _ = card(notebook | {"weights_licence": given})
    assert head["license"] == licence


def test_the_export_computes_the_same_for_any_number_of_clips(notebook, capsys):
    import onnxruntime

    variables = run_cell("how_to/deploy", "export", **notebook)
    run_cell("how_to/deploy", "parity", **variables)
    assert "largest difference of 8 logits" in capsys.readouterr().out
    exported = onnxruntime.InferenceSession(notebook["output"] / "model.onnx")
    for count in (1, 3):
        clips = notebook["clips"][:count]
        (logits,) = exported.run(None, {"clips": clips.numpy()})
        with torch.no_grad():
            pixels = train.normalised(clips, notebook["processor"])
            expected = notebook["model"](pixel_values=pixels).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=0)


def test_another_model_is_not_passed_off_as_the_export(notebook):
    variables = run_cell("how_to/deploy", "export", **notebook)
    torch.nn.init.normal_(variables["model"].classifier.weight)
    with pytest.raises(RuntimeError, match=r"do not use model\.onnx"):
        run_cell("how_to/deploy", "parity", **variables)


def test_nothing_is_pushed_unless_a_repository_is_named(notebook, monkeypatch):
    import huggingface_hub

    calls = []
    hub = SimpleNamespace(
        create_repo=lambda *args, **kwargs: calls.append((args, kwargs)),
        upload_file=lambda **kwargs: calls.append(kwargs),
        upload_folder=lambda **kwargs: calls.append(kwargs),
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    run_cell("how_to/deploy", "hub", **notebook)
    assert calls == []
    run_cell("how_to/deploy", "hub", **notebook | {"hub_repo": "you/model"})
    assert calls[0] == (("you/model",), {"private": True, "exist_ok": True})
    sampling = json.loads(calls[1]["path_or_fileobj"])  # what load_classifier reads
    assert sampling == {"arguments": {"sampling": "dense", "sampling_rate": 4}}
    assert calls[2]["folder_path"] == notebook["output"] / "model"
    assert "run_record.json" in calls[2]["ignore_patterns"]
