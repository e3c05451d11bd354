"""A model is handed on: the card is true, the export computes the same, the page answers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train
import yaml
from cells import notebook_cells
from inference import Classifier
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor
from tutorial import hand_on, results

LABELS = ["not_raising_hand", "raising_hand"]


@pytest.fixture
def tested(tmp_path):
    """As results.judge returns it: a random model, four random clips, three of them right."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, image_size=32, patch_size=8,
        num_frames=4, num_attention_heads=2, use_mean_pooling=True,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    model = VideoMAEForVideoClassification(config).eval()
    processor = VideoMAEImageProcessor(image_mean=[0.5, 0.4, 0.4], image_std=[0.2, 0.2, 0.3])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = {"hub_token": "<HUB_TOKEN>", "sampling": "dense", "sampling_rate": 4}
    arguments |= {"num_train_epochs": 10.0, "dataset": "/opt/ml/input/data/train"}
    record = {"clips": {"train": 320, "test": 4}, "arguments": arguments}
    (tmp_path / "model/run_record.json").write_text(json.dumps(record))
    (tmp_path / "model/trainer_state.json").write_text("{}")
    job = {"HyperParameters": {"model_name": '"OpenGVLab/VideoMAEv2-Base"'}}
    return SimpleNamespace(
        trained=results.Trained(tmp_path / "model", job),
        classifier=Classifier(model, processor, LABELS, 4, 32, 4),
        pixels=torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8),
        truth=torch.tensor([0, 1, 0, 1]), predicted=torch.tensor([0, 1, 0, 0]),
        probabilities=torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.8, 0.2], [0.8, 0.2]]),
    )  # fmt: skip


HERE = SimpleNamespace(run={"choices": {"model_name": "MCG-NJU/videomae-base"}})


def card(tested, folder, **given):
    """Head and body of the card, as they lie in the folder."""
    hand_on.model_card(HERE, tested, folder, **given)
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_names_weights_licence_and_this_runs_figures(tested, tmp_path):
    head, body = card(tested, tmp_path, stills=2)
    assert head["license"] == "cc-by-nc-4.0"  # that of the published weights
    figures = head["model-index"][0]["results"][0]["metrics"]
    assert {f["type"]: round(f["value"], 4) for f in figures} == {
        "accuracy": 0.75,
        "macro_f1": 0.73,
    }
    assert "| accuracy | 0.75 | 0.30 to 0.95 | 4 |\n| macro F1 | 0.73 |" in body
    stills = results.one_frame(tested.pixels, tested.truth, tested.classifier, most=2)
    assert f"reaches {max(hits.mean() for hits in stills.values()):.2f} at best, on 2 of" in body
    assert "off by 0.05 in the mean" in body  # 0.8 is said, and 3 of 4 are right
    assert "# Clips: not_raising_hand, raising_hand" in body and "`cc-by-nc-4.0`" in body
    assert "The clips: 320 train + 4 test. The model\nlearned from those of `train`" in body
    assert "for 10 epochs at most" in body and "on the 4 clips of the split `test`" in body
    assert "Not described" in body and "**Limits**" in body and "consent" in body
    assert "Drawn." in card(tested, tmp_path, data_note="Drawn.")[1]


@pytest.mark.parametrize(
    ("name", "given", "licence"),
    [
        ("OpenGVLab/VideoMAE2/distill/vit_b_k710_dl_from_giant.pth", None, "apache-2.0"),
        ("MCG-NJU/videomae-base", None, "cc-by-nc-4.0"),
        ("/opt/ml/input/data/model", None, "unknown"),
        ("somebody/model", "mit", "mit"),
    ],
)
def test_no_licence_is_guessed(tested, tmp_path, name, given, licence):
    tested.trained.job["HyperParameters"]["model_name"] = json.dumps(name)
    assert card(tested, tmp_path, weights_licence=given)[0]["license"] == licence


def test_the_card_names_no_folder_of_this_computer(tested, tmp_path):
    (tmp_path / "mine").mkdir()
    here = SimpleNamespace(run={"choices": {"model_name": str(tmp_path / "mine")}})
    assert hand_on.base_of(here, tested.trained._replace(job=None)) == "mine"
    assert hand_on.base_of(HERE, tested.trained._replace(job=None)) == "MCG-NJU/videomae-base"


def test_the_export_computes_the_same_for_any_number_of_clips(tested, tmp_path, capsys):
    import onnxruntime

    file = hand_on.export_onnx(tested.classifier, tmp_path / "model.onnx")
    assert hand_on.check_onnx(file, tested.classifier, tested.pixels) < 1e-5
    assert "largest difference of 8 logits (4 clips x 2 labels)" in capsys.readouterr().out
    exported = onnxruntime.InferenceSession(file)
    for count in (1, 3):
        clips = tested.pixels[:count]
        (logits,) = exported.run(None, {"clips": clips.numpy()})
        with torch.no_grad():
            pixels = train.normalised(clips, tested.classifier.processor)
            expected = tested.classifier.model(pixel_values=pixels).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=0)
    torch.nn.init.normal_(tested.classifier.model.classifier.weight)  # another model
    with pytest.raises(RuntimeError, match=r"do not use .*model\.onnx"):
        hand_on.check_onnx(file, tested.classifier, tested.pixels)


def test_the_folder_holds_what_others_need_and_nothing_of_the_training_machine(tested, tmp_path):
    import inference

    folder = hand_on.make_folder(tested.trained, tmp_path / "hand_on")
    kept = json.loads((folder / "run_record.json").read_text())
    assert kept == {"arguments": {"sampling": "dense", "sampling_rate": 4}}
    assert not (folder / "trainer_state.json").exists()
    assert {"inference.py", "train.py", "model.safetensors"} <= {f.name for f in folder.iterdir()}
    loaded = inference.load_classifier(folder, "cpu")
    assert (loaded.labels, loaded.sampling_rate) == (LABELS, 4)
    needs = (folder / "requirements.txt").read_text()
    assert "\ngradio==" in needs and "\ntorch" in needs and "transformers==" in needs


def test_nothing_is_pushed_unless_a_repository_is_named(tmp_path, monkeypatch, capsys):
    calls = []
    hub = SimpleNamespace(
        create_repo=lambda *args, **kwargs: calls.append((args, kwargs)),
        upload_folder=lambda **kwargs: calls.append(kwargs) or "https://hub/you/model",
    )
    monkeypatch.setattr(hand_on, "HfApi", lambda: hub)
    assert hand_on.push(tmp_path, None) is None and calls == []
    assert "nothing is uploaded" in capsys.readouterr().out
    assert hand_on.push(tmp_path, "you/model") == "https://hub/you/model"
    assert calls[0] == (("you/model",), {"private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == tmp_path and "*.log" in calls[1]["ignore_patterns"]


def test_the_table_says_what_was_not_run(tmp_path):
    (tmp_path / "model.onnx").write_bytes(bytes(2_000_000))
    table = hand_on.ways(tmp_path, {"ONNX": "logits differ by 1e-06", "endpoint": None})
    last = table["checked in this run"]
    assert (last["ONNX"], last["endpoint"], last["page"]) == (
        "logits differ by 1e-06",
        "not run",
        "not run",
    )
    assert "2.0 MB" in table.loc["folder with card", "for"] and len(table.columns) == 3


# The page -----------------------------------------------------------------------------------------
def test_a_page_that_does_not_start_shows_its_log(tmp_path):
    script = tmp_path / "page.py"
    script.write_text("raise SystemExit('no model here')")
    with pytest.raises(RuntimeError, match="no model here"), hand_on.running_page(script):
        pass


@pytest.mark.long
def test_the_page_answers_here_only_refuses_what_is_no_video_and_leaves_nothing(
    tested, tmp_path, monkeypatch
):
    """The file that the guide writes, with a random model."""
    import psutil
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError
    from local_mode import clips

    (cell,) = (cell.source for cell in notebook_cells("how_to/deploy") if cell.id == "page-file")
    page = hand_on.make_folder(tested.trained, tmp_path / "hand_on") / "colleagues_page.py"
    page.write_text(cell.partition("\n")[2])
    settings = {"window_seconds": 2.6, "hop_seconds": 0.3, "threshold": 0.72}
    (page.parent / "settings.json").write_text(json.dumps(settings))
    clips.draw_long_video(tmp_path / "long.mp4", seed=1, seconds=4)
    (tmp_path / "no.mp4").write_text("this is not a video")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with hand_on.running_page(page) as address:
        port = int(address.rpartition(":")[2])
        listening = {
            connection.laddr.ip
            for child in psutil.Process().children()
            for connection in child.net_connections()
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        }
        assert listening == {"127.0.0.1"}
        client = Client(address, verbose=False, download_files=tmp_path / "answers")
        controls = [part["props"] for part in client.config["components"]]
        assert [c["value"] for c in controls if c.get("label") == "Threshold"] == [0.72]
        video = handle_file(tmp_path / "long.mp4")
        picture, table = client.predict(video, LABELS[1], 0, api_name="/judge")
        assert Path(picture).read_bytes()[:4] == b"\x89PNG"
        assert table["headers"] == ["start", "end", "score"]
        ((start, end, score),) = table["data"]  # above 0 from start to end
        assert start == 0 and abs(end - 4) < 0.2 and 0 < score < 1
        with pytest.raises(AppError, match="not a video of a known format"):
            client.predict(handle_file(tmp_path / "no.mp4"), LABELS[1], 0.5, api_name="/judge")
        assert list(temporary.rglob("long.mp4"))
    assert not list(temporary.rglob("*.mp4"))  # people's videos end with the page
