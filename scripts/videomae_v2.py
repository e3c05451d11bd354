#!/usr/bin/env python3
"""You need not read this file: it makes any published VideoMAE checkpoint a folder that loads.

Convert:  python videomae_v2.py OpenGVLab/VideoMAE2/distill/vit_b_k710_dl_from_giant.pth vit_b
Look:     python videomae_v2.py SOURCE --check      (tells each weight's fate, writes nothing)
Train:    python train.py --model_name vit_b        (or SOURCE itself: train.py calls `load`)

SOURCE is a file (.safetensors, .pth, .pt, .bin, .ckpt), a folder with one, SageMaker's
model.tar.gz or a folder with it, or on the Hub owner/name or owner/name/file. All sizes (S, B, L,
H, g) are read, under the names of VideoMAE's authors, of transformers or of mmaction2, in the
wrappings of their training loops. No code that a checkpoint brings along is run.
"""

import argparse
import atexit
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import huggingface_hub
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

# ---- Names --------------------------------------------------------------------------------------

# Training code and transformers put these before a weight's name, in any order.
PREFIXES = re.compile(r"^((_orig_mod|module|model|backbone|videomae|encoder)\.)+")
# Left: names of VideoMAE's authors, of mmaction2 and, for two biases, of transformers 5 in memory.
# Right: those that every version of transformers reads. from_pretrained notes which names it
# changes and save_pretrained undoes that, so what is loaded under these names is saved under them.
NAMES = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "patch_embed.projection.": "embeddings.patch_embeddings.projection.",
    "pos_embed": "embeddings.position_embeddings",
    "blocks.": "layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.output.dense.",
    ".attn.": ".attention.attention.",
    ".query.bias": ".q_bias",
    ".value.bias": ".v_bias",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
    ".mlp.layers.0.0.": ".intermediate.dense.",
    ".mlp.layers.1.": ".output.dense.",
}
# What only pre-training or the old head needed.
DROPPED = ("decoder.", "encoder_to_decoder.", "mask_token", "norm.", "head.", "cls_head.")
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # width: attention heads (S, B, L, H, g)
PATCHES = "videomae.embeddings.patch_embeddings.projection.weight"
POSITIONS = "videomae.embeddings.position_embeddings"
BLOCKS = "videomae.encoder.layer."
FINAL_NORM = "videomae.layernorm."  # transformers has it in models without mean pooling


def native_names(key: str) -> list[str]:
    """What a checkpoint's key is called in transformers: no name (dropped), one, or three.

    The fine-tuning ViT of github.com/OpenGVLab/VideoMAEv2 is the ViT of transformers' VideoMAE:
    only the names differ, and one qkv matrix [3 * width, width] stands for three.
    """
    name = PREFIXES.sub("", key)
    if name.startswith(DROPPED):
        return []
    for old, new in NAMES.items():
        name = name.replace(old, new)
    if name.startswith(("embeddings.", "layernorm.")):
        name = f"videomae.{name}"
    elif name.startswith("layer."):
        name = f"videomae.encoder.{name}"
    if name.endswith(".qkv.weight"):
        return [name.replace(".qkv.", f".{part}.") for part in ("query", "key", "value")]
    return [name]


# ---- Where the checkpoint lies ------------------------------------------------------------------

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
# Of these, a training run's state, and hidden files.
NOT_A_MODEL = (".", "optimizer", "scheduler", "scaler", "rng_state", "training_args")
# A folder's model as transformers names it, whole or in parts: the first of these that is there.
MODELS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")


def find(source: str) -> Path:
    """The local file or folder of `source`, fetched from the Hub or unpacked where needed.

    Raises FileNotFoundError for a missing path, RuntimeError where the Hub fails.
    """
    path = Path(os.path.expanduser(source))
    if not path.exists():
        if source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{source}: no such file or folder")
        path = from_hub(source)
    if path.is_dir() and not weights_in(path) and (path / "model.tar.gz").exists():
        path = path / "model.tar.gz"
    return unpacked(path, source) if path.name.endswith((".tar.gz", ".tgz")) else path


def from_hub(source: str) -> Path:
    """The local copy of owner/name (a folder) or owner/name/file on the Hugging Face Hub."""
    repo, file = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:])
    if not file:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            wanted = {"allow_patterns": ["*.json", weights], "ignore_patterns": "*/*"}
            folder = Path(ask_hub(huggingface_hub.snapshot_download, repo, **wanted))
            if weights_in(folder):
                return folder
        names = ask_hub(huggingface_hub.list_repo_files, repo)
        files = [name for name in names if name.endswith(SUFFIXES)]
        if len(files) != 1:
            holds = shorten(files or names)
            raise ValueError(f"{source}: name one weight file, {repo}/FILE; it holds {holds}")
        file = files[0]
    return Path(ask_hub(huggingface_hub.hf_hub_download, repo, file))


def ask_hub(download, repo: str, *args, **kwargs):
    """What the Hub answers to `download`, or one clear error."""
    try:
        return download(repo, *args, **kwargs)
    except Exception as error:
        raise RuntimeError(
            f"{'/'.join([repo, *args])}: not a local path, and the Hub did not give it "
            f"({type(error).__name__}). Check the spelling and the network; a gated or private "
            f"repository needs its licence accepted on huggingface.co/{repo} and HF_TOKEN set."
        ) from error


def unpacked(archive: Path, source: str) -> Path:
    """The folder with the model in a .tar.gz: a temporary one, removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="videomae-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # which refuses members that lead out of it
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{source}: {archive.name} cannot be unpacked: {error}") from error
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    places = [place for place in folders if weights_in(place)]
    return places[0] if len(places) == 1 else folder


def weights_in(folder: Path) -> list[Path]:
    """The files in `folder` that hold weights of a model."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    return [file for file in files if file.is_file() and not file.name.startswith(NOT_A_MODEL)]


def weight_files(path: Path, source: str) -> list[Path]:
    """The file, or the parts, of the one model in `path`; ValueError if there is not one."""
    if path.is_file():
        return [path]
    found = weights_in(path)
    for name in MODELS:
        files = [file for file in found if file.match(name)]
        if files:
            return files
    if len(found) != 1:
        holds = shorten([str(file.relative_to(path)) for file in sorted(path.rglob("*"))])
        raise ValueError(
            f"{source}: {len(found) or 'no'} weight files ({' '.join(SUFFIXES)}) directly in this "
            f"folder; name one file, or the folder that has it. It holds {holds}"
        )
    return found


def shorten(names: list[str]) -> str:
    """At most six of the names, for an error of one line."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(names[:6]) or "nothing") + more


# ---- What the checkpoint holds ------------------------------------------------------------------

WRAPPERS = ("module", "model", "state_dict", "model_state_dict")
# Training loops save their arguments and numpy's learning rates along: values that run no code.
SCALAR = np.float64(0).__reduce__()[0]
ALLOWED = [
    argparse.Namespace,
    (PurePosixPath, "pathlib.PosixPath"),
    (SCALAR, "numpy.core.multiarray.scalar"),  # its name in numpy 1
    (SCALAR, "numpy._core.multiarray.scalar"),  # and in numpy 2
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
]


def read_file(file: Path, where: str) -> dict[str, torch.Tensor]:
    """The state dict in a file, taken out of what training code wrapped it in.

    All but .safetensors are pickles, which can run code: weights_only refuses all but tensors,
    plain values and ALLOWED. Raises ValueError that begins with `where`.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        zipped = zipfile.is_zipfile(file)  # then an optimizer's state is not read
        with torch.serialization.safe_globals(ALLOWED):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(
                f"{where}: refused, since it holds more than tensors ({code[1]}) and could run "
                "code. Where you trust it, save model.state_dict() alone, and name that file"
            ) from error
        with file.open("rb") as opened:
            start = opened.read(24)
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"{where}: damaged, or no checkpoint ({reason}; it begins with {start}). Download it "
            "again; a Git LFS pointer needs git lfs pull"
        ) from error
    inner = unwrapped(saved)
    named = {str(key): value for key, value in inner.items()} if isinstance(inner, dict) else {}
    tensors = {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        found = f"{type(inner).__name__} of {shorten(list(named))}"
        raise ValueError(f"{where}: not a state dict, but a {found}. Save model.state_dict()")
    return tensors


def unwrapped(saved):
    """What lies in the innermost of the WRAPPERS, or `saved` itself."""
    for wrapper in WRAPPERS:
        if isinstance(saved, dict) and isinstance(saved.get(wrapper), dict):
            return unwrapped(saved[wrapper])
    return saved


def read_checkpoint(source: str) -> tuple[list[Path], dict[str, torch.Tensor], dict]:
    """(weight files, the state dict in them, the config.json beside them or {}) of `source`."""
    files = weight_files(find(source), source)
    checkpoint = {}
    for file in files:
        where = source if source.endswith(file.name) else f"{source}/{file.name}"
        checkpoint |= read_file(file, where)
    folder = files[0].parent
    named = (folder / "config.json").exists()
    return files, checkpoint, VideoMAEConfig.get_config_dict(folder)[0] if named else {}


# ---- Conversion ---------------------------------------------------------------------------------


def native_weights(checkpoint: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The weights under the names of native_names; ValueError if they are no VideoMAE's."""
    weights = {}
    for key, tensor in checkpoint.items():
        names = native_names(key)
        parts = tensor.chunk(3) if len(names) == 3 else [tensor]
        for name, part in zip(names, parts, strict=False):
            if name in weights:
                raise ValueError(f"{source}: two models in one file: {key} is there twice")
            weights[name] = part.contiguous()
    if any(".lora_A." in key for key in checkpoint):
        raise ValueError(
            f"{source}: a LoRA adapter, not a whole model. Merge it first (peft: "
            "merge_and_unload()), or name its base model (adapter_config.json says which)"
        )
    known = f"{BLOCKS}0.attention.attention.query.weight" in weights and PATCHES in weights
    if not known or weights[PATCHES].ndim != 5:
        raise ValueError(
            f"{source}: not a VideoMAE checkpoint (no attention and 3-D patches under VideoMAE's "
            f"names; it begins with {shorten(sorted(checkpoint))})"
        )
    return weights


def v2_config(weights: dict[str, torch.Tensor], model_config: dict) -> VideoMAEConfig:
    """The configuration of a checkpoint without transformers' own: sizes read off its tensors.

    `model_config` is that entry of the Hub's config.json; the .pth files come without, and the
    published ones take 16 frames of 224 x 224.
    """
    width, channels, tubelet, patch, _ = weights[PATCHES].shape
    mlp = weights.get(f"{BLOCKS}0.intermediate.dense.bias", torch.empty(4 * width))
    config = VideoMAEConfig(
        hidden_size=width,
        num_channels=channels,
        tubelet_size=tubelet,
        patch_size=patch,
        num_hidden_layers=len({name.split(".")[3] for name in weights if BLOCKS in name}),
        intermediate_size=len(mlp),
        num_attention_heads=model_config.get("num_heads") or HEADS.get(width, max(1, width // 64)),
        image_size=model_config.get("img_size", 224),
        num_frames=model_config.get("num_frames", 16),
        layer_norm_eps=1e-6,
    )
    if "classifier.bias" in weights:
        config.num_labels = len(weights["classifier.bias"])
    return config


def convert(source: str, checkpoint: dict[str, torch.Tensor], saved: dict):
    """(VideoMAEConfig, weights under published names, names of the weights drawn anew).

    `saved` is the config.json beside the checkpoint. Raises ValueError where a backbone weight is
    missing, or a weight has no use or another shape than the configuration's, or the positions
    are not VideoMAE's.
    """
    weights = native_weights(checkpoint, source)
    if saved.get("model_type") == "videomae":
        config = VideoMAEConfig.from_dict(saved)
    else:
        config = v2_config(weights, saved.get("model_config", {}))
    # No shape depends on the size of a clip: a clip of one patch is built at once.
    small = {"image_size": config.patch_size, "num_frames": config.tubelet_size}
    small = VideoMAEConfig.from_dict(config.to_dict() | small | {"use_mean_pooling": True})
    with torch.device("meta"):
        model = VideoMAEForVideoClassification(small)
    wanted = {native_names(name)[0]: tensor.shape for name, tensor in model.state_dict().items()}
    drawn = [name for name in wanted if name not in weights]
    missing = [name for name in drawn if not name.startswith(("classifier.", "fc_norm."))]
    unexpected = []
    positions = weights.pop(POSITIONS, None)
    if positions is not None:
        patches = (config.image_size // config.patch_size) ** 2
        tubelets = config.num_frames // config.tubelet_size
        table = get_sinusoid_encoding_table(tubelets * patches, config.hidden_size)
        same = positions.shape == table.shape
        if not same or not torch.allclose(positions.float(), table, atol=1e-4):
            unexpected.append("pos_embed (learned, or of another size than frames and pixels say)")
    for name, tensor in weights.items():
        if tensor.shape != wanted.get(name) and not name.startswith(FINAL_NORM):
            unexpected.append(f"{name} {list(tensor.shape)}")
    if missing or unexpected:
        raise ValueError(
            f"{source}: the checkpoint does not fit VideoMAE; missing: {shorten(missing)}; "
            f"unexpected: {shorten(unexpected)}. Each weight's fate: videomae_v2.py SOURCE --check"
        )
    return config, weights, drawn


def load(source: str) -> tuple[Path, VideoMAEConfig, dict[str, torch.Tensor] | None]:
    """(local folder, configuration, weights) of `source`, for from_pretrained.

    The weights are the backbone's, and the classifier's under transformers' names; None where
    from_pretrained reads the folder by itself. Raises OSError (no such path, a damaged
    config.json), RuntimeError (the Hub) or ValueError (all else) that says what was found.
    """
    files, checkpoint, saved = read_checkpoint(source)
    config, weights, _ = convert(source, checkpoint, saved)
    folder = files[0].parent
    index = folder / "model.safetensors.index.json"
    found = files[0].name == "model.safetensors" or len(files) > 1 and index.exists()
    if saved.get("model_type") == "videomae" and found and PATCHES in checkpoint:
        return folder, config, None
    return folder, config, {n: w for n, w in weights.items() if not n.startswith(FINAL_NORM)}


# ---- Command line -------------------------------------------------------------------------------


def run(source: str, folder: Path | None) -> None:
    """Writes `source` as a new folder for from_pretrained; without `folder`, tells its fate."""
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: not empty; name a new folder, or delete this one first")
    files, checkpoint, saved = read_checkpoint(source)
    if not folder:
        for key, tensor in checkpoint.items():
            fate = ", ".join(native_names(key)) or "dropped (pre-training or old head only)"
            print(f"{key} {list(tensor.shape)} -> {fate}")
    config, weights, drawn = convert(source, checkpoint, saved)
    print(f"not in the checkpoint, drawn anew: {', '.join(drawn) or 'nothing'}")
    if not folder:
        print("every weight has its place")
        return
    config.architectures = ["VideoMAEForVideoClassification"]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # made for its owner only
    side = config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if files[0].with_name("preprocessor_config.json").exists():
        processor = VideoMAEImageProcessorPil.from_pretrained(files[0].parent, **sizes)
    else:
        colours = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
        processor = VideoMAEImageProcessorPil(**sizes, **colours)
    processor.save_pretrained(folder)
    print(f"{folder} takes {config.num_frames} frames of {side} x {side} pixels")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="The checkpoint; see above.")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="A new folder to write.")
    parser.add_argument("--check", action="store_true", help="Only print each weight's fate.")
    args = parser.parse_args(argv)
    if args.check == bool(args.folder):
        parser.error("give a FOLDER to write, or --check")
    try:
        run(args.source, Path(os.path.expanduser(args.folder)) if args.folder else None)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
