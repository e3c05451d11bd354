"""The commands that end Studio, in notebooks/aws/README.md: AWS knows each, with these parameters.

They are compared with botocore's models of the services, which the AWS CLI is made from. No test
runs them: the embedded AWS has no Studio.
"""

import re
import shlex

import botocore.session
import pytest
from botocore import xform_name
from conftest import ROOT

TEXT = (ROOT / "notebooks/aws/README.md").read_text()
SECTION = TEXT.split("## How Studio ends")[1]
COMMANDS = [
    shlex.split(re.sub("[<>]", "", line))[1:]
    for line in re.search("```bash\n(.*?)```", SECTION, re.DOTALL)[1].splitlines()
    if line.startswith("aws ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_aws_knows_the_command(command):
    service, operation, *options = command
    model = botocore.session.get_session().get_service_model(service)
    names = {xform_name(name, "-"): name for name in model.operation_names}
    shape = model.operation_model(names[operation]).input_shape
    members = {xform_name(name, "-"): name for name in shape.members}
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert {name.removeprefix("--") for name in given} <= members.keys()
    assert set(shape.required_members) <= {members[name.removeprefix("--")] for name in given}
    for name, value in given.items():
        wanted = shape.members[members[name.removeprefix("--")]]
        if wanted.type_name == "structure":  # written Key=value
            key, value = value.split("=")
            wanted = wanted.members[key]
        assert value in (getattr(wanted, "enum", None) or [value])


def test_what_costs_ends_in_the_order_that_aws_demands_and_the_file_system_too():
    operations = [command[1] for command in COMMANDS]
    deletions = ["delete-app", "delete-space", "delete-user-profile", "delete-domain"]
    assert [name for name in operations if name in deletions] == deletions
    (domain,) = [command for command in COMMANDS if command[1] == "delete-domain"]
    assert domain[-2:] == ["--retention-policy", "HomeEfsFileSystem=Delete"]
    assert operations.index("delete-domain") < operations.index("delete-security-group")


def test_notebook_6_leads_there():
    notebook = (ROOT / "notebooks/06_clean_up.ipynb").read_text()
    assert "(aws/README.md#how-studio-ends)" in notebook
