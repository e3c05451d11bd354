"""Becomes TorchServe, set up as AWS's PyTorch inference images do it; server.py runs this.

The images call serving.main() of the same toolkit. It writes the settings to /etc, which takes
root, and looks for its server among all processes of the machine. The rest is as there.
"""

import os

from sagemaker_inference import environment
from sagemaker_pytorch_serving_container import serving, torchserve

torchserve.TS_CONFIG_FILE = os.path.join(os.getcwd(), "ts.properties")
os.makedirs(torchserve.MODEL_STORE)
torchserve._set_python_path()
torchserve._create_torchserve_config_file(serving.HANDLER_SERVICE)
flags = ["--model-store", torchserve.MODEL_STORE, "--ts-config", torchserve.TS_CONFIG_FILE]
flags += ["--log-config", torchserve.DEFAULT_TS_LOG_FILE, "--foreground"]
flags += ["--models", f"{torchserve.DEFAULT_TS_MODEL_NAME}={environment.model_dir}"]
os.execvp("torchserve", ["torchserve", "--start", *flags])
