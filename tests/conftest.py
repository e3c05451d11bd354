"""Puts scripts/ and notebooks/ where tests can import from them; a few clips and a tiny model."""

import functools
import gc
import multiprocessing
import os
import sys
from pathlib import Path

# Each of a hundred processes would compile transformers anew, in 3.5 s, where this is set.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
# Before torch is there: threads that spin while they wait make tests beside them four times slower.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import av  # noqa: E402, F401  before decord, whose libvpx would else write VP9 for it, and fail
import pytest  # noqa: E402
from botocore.loaders import JSONFileLoader  # noqa: E402
from jsonschema import Draft202012Validator  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "notebooks")]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on the Hub

TINY = ROOT / "notebooks" / "local_mode" / "tiny_videomae_v2"


@pytest.fixture(autouse=True)
def nothing_runs_before_all_else():
    """No test leaves this process with real-time priority: an encoder that root runs may."""
    yield
    if sys.platform == "linux":
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture(autouse=True)
def workers_end_with_their_test():
    """A DataLoader's, of a Trainer that ran in this process.

    They would end when the garbage is collected, in some later test. By then their queues are gone,
    so torch waits five seconds for each.
    """
    yield
    if multiprocessing.active_children():
        from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

        for found in gc.get_objects():
            if type(found) is _MultiProcessingDataLoaderIter:
                found._shutdown_workers()


@pytest.fixture(autouse=True, scope="module")
def the_environment_stays():
    """What a module's tests set is gone after it; mlflow notes its experiment there by itself."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="session")
def each_schema_is_checked_once():
    """SageMaker's SDK has its own schema checked anew each time it looks for a default.

    That was two thirds of the time of tests that launch. What is held to a schema is so each time.
    """
    checked, check = {}, Draft202012Validator.check_schema

    def once(schema, *args, **kwargs):
        if id(schema) not in checked:
            check(schema, *args, **kwargs)
            checked[id(schema)] = schema  # kept, or another could get its id

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draft202012Validator, "check_schema", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def each_model_of_aws_is_read_once():
    """A new session of boto3 reads AWS's models anew, and each notebook's cell may begin one."""
    read, loader = JSONFileLoader.load_file, JSONFileLoader()
    once = functools.cache(lambda path: read(loader, path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda self, path: once(path))
        yield


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory):
    """Drawn clips: 16 for training, 8 for validation, 12 for testing."""
    from local_mode import clips

    folder = tmp_path_factory.mktemp("clips") / "drawn clips"  # a space, as readers have them
    return clips.write_clips(folder, {"train": 16, "validation": 8, "test": 12}, height=80)


@pytest.fixture(scope="session")
def native_checkpoint(tmp_path_factory):
    """A random VideoMAE as the Hub has them: self-supervised, saved by transformers itself."""
    import torch
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = VideoMAEForPreTraining(
        VideoMAEConfig(
            **size, image_size=32, patch_size=8, num_frames=4, num_attention_heads=2,
            decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=32, use_mean_pooling=False,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at birth: a lost bias would go unnoticed
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("native")
    model.save_pretrained(folder)
    return folder
