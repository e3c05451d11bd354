"""Where the notebooks work, and as whom: the AWS account, and run.json, which connects them.

Notebook 1 calls begin, execution_role, make_bucket and instances; the other notebooks call connect,
or read_run if they need no AWS.
"""

import datetime
import json
import math
import os
import platform
import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

import boto3
import pandas as pd
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from local_mode import aws

HERE = Path(__file__).resolve().parent.parent  # notebooks/
ABSENT = ("404", "NoSuchBucket", "NotFound")
DENIED = ("AccessDenied", "AccessDeniedException")
KEPT = ("dataset", "choices", "clip_counts", "gflop")  # of run.json; they are true in any account
LISTED = ("created", "homes", "jobs", "deployed")  # of run.json: what notebook 6 deletes
FULL_ACCESS = "arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"
USES = (
    "training job usage",
    "spot training job usage",
    "training warm pool usage",
    "processing job usage",
    "endpoint usage",
    "transform job usage",
)
VIT_B_GFLOP = 357  # one forward pass of ViT-B on 16 x 224 x 224: see model_size.gflop
SHARE = 0.35  # of the data sheet's speed that training reaches: an assumption, not a measurement


@dataclass(frozen=True)
class Machine:
    """What an instance type offers, from AWS's instance pages and the makers' data sheets."""

    what: str  # the GPUs, or the CPUs, that the model runs on
    memory_gb: int  # of all GPUs, or of the machine
    tflops: float  # of all GPUs, dense 16 bit; of the CPUs, 32 bit: 0.08 for each vCPU (AVX-512)
    vcpus: int
    gpus: int = 1


INSTANCES = {
    "ml.m5.large": Machine("2 vCPUs", 8, 0.16, 2, gpus=0),
    "ml.m5.xlarge": Machine("4 vCPUs", 16, 0.32, 4, gpus=0),
    "ml.m5.4xlarge": Machine("16 vCPUs", 64, 1.28, 16, gpus=0),
    "ml.c5.2xlarge": Machine("8 vCPUs", 16, 0.64, 8, gpus=0),
    "ml.c5.4xlarge": Machine("16 vCPUs", 32, 1.28, 16, gpus=0),
    "ml.g4dn.xlarge": Machine("1 x T4", 16, 65, 4),
    "ml.g4dn.12xlarge": Machine("4 x T4", 64, 260, 48, gpus=4),
    "ml.g5.xlarge": Machine("1 x A10G", 24, 70, 4),
    "ml.g5.2xlarge": Machine("1 x A10G", 24, 70, 8),
    "ml.g5.12xlarge": Machine("4 x A10G", 96, 280, 48, gpus=4),
    "ml.g6.xlarge": Machine("1 x L4", 24, 121, 4),
    "ml.g6.2xlarge": Machine("1 x L4", 24, 121, 8),
    "ml.g6.12xlarge": Machine("4 x L4", 96, 484, 48, gpus=4),
    "ml.p4d.24xlarge": Machine("8 x A100", 320, 2496, 96, gpus=8),
}


@dataclass
class Account:
    """An AWS account in one Region, and what run.json knows of it. The notebooks call it `here`."""

    output: Path  # the folder of run.json, of pictures and models
    run: dict  # run.json, as it is on the disk
    session: boto3.Session | None = None  # of the Region
    quota_codes: dict = field(default_factory=dict)  # by name of the quota; filled by quotas()

    def refresh(self) -> None:
        """Reads run.json again: another notebook may have written to it."""
        file = self.output / "run.json"
        if file.exists():
            new = json.loads(file.read_text())
            self.run.clear()
            self.run.update(new)

    def write(self) -> None:
        """Writes run.json whole, or not at all."""
        new = self.output / "run.json.new"
        new.write_text(json.dumps(self.run, indent=2))
        new.replace(self.output / "run.json")

    def remember(self, **values) -> None:
        """Sets `values` in run.json, at once: what is not written down is never deleted."""
        self.refresh()
        self.run.update(values)
        self.write()

    def add(self, field: str, *items: str) -> None:
        """Adds items to a list of run.json: created, homes, jobs or deployed."""
        self.refresh()
        known = self.run.get(field, [])
        self.run[field] = [*known, *(item for item in items if item not in known)]
        self.write()

    def drop(self, field: str, *items: str) -> None:
        """Takes items off a list of run.json."""
        self.refresh()
        self.run[field] = [item for item in self.run.get(field, []) if item not in items]
        self.write()


def read_run(output_dir) -> Account:
    """run.json in `output_dir`, without a word to AWS; an empty one if there is none yet."""
    output = Path(output_dir).resolve()
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    file = output / "run.json"
    return Account(output, json.loads(file.read_text()) if file.exists() else {})


# Notebook 1 ---------------------------------------------------------------------------------------
def versions() -> None:
    """Prints the versions that run here. Raises RuntimeError for a Python or package that lacks."""
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError(f"Python {platform.python_version()}: 3.11.4 or newer unpacks safely")
    print(f"{'python':14}{platform.python_version()}")
    for package in ("torch", "transformers", "datasets", "accelerate", "sagemaker", "boto3"):
        try:
            print(f"{package:14}{version(package)}")
        except PackageNotFoundError as error:
            raise RuntimeError(
                f"{package} is not installed: run the cell above, then restart the kernel"
            ) from error


def begin(
    output_dir, endpoint_url=None, region=None, bucket=None, prefix="video-tutorial"
) -> Account:
    """Signs in, and begins run.json in `output_dir`, or goes on with the one that is there.

    `endpoint_url`: None for AWS itself; an address on this machine starts the embedded AWS there.
    `region`: None for the Region of your AWS configuration. `bucket`: None for the name that the
    SDK uses by default, sagemaker-<region>-<account>. `prefix`: the folder in the bucket for all
    that the series uploads. Raises RuntimeError without credentials, and if run.json lists what you
    have in another Region or account.
    """
    here = read_run(output_dir)
    before = here.run
    endpoint_url = aws.connect(endpoint_url)
    here.session = boto3.Session(region_name=region)
    identity = _identity(here.session)
    region = here.session.region_name
    where = {"region": region, "account": identity["Account"], "endpoint_url": endpoint_url}
    if _embedded_account_is_gone(before, where, here.session):
        print("The embedded account of run.json is gone: this one is new. Clips and choices stay.")
        before = {name: before[name] for name in KEPT if name in before}
    elif not where.items() <= before.items():
        if any(before.get(name) for name in LISTED):
            raise RuntimeError(
                f"run.json lists what you have in {before['region']} of another Region or account: "
                "delete it there (06_clean_up), or set another output_dir here."
            )
        before = {name: before[name] for name in KEPT if name in before}
    bucket = bucket or f"sagemaker-{region}-{identity['Account']}"
    here.run = {"created": [], "homes": [], "jobs": []} | before
    here.write()
    here.remember(**where, bucket=bucket, prefix=prefix)
    expect_the_owner(here)
    kind = identity["Arn"].split(":")[5].split("/")[0]  # "user/me" -> "user"
    print(f"Region {region}, signed in as: {kind}")
    return here


def _identity(session):
    """The answer of AWS to "who am I?". Raises RuntimeError with the remedy if there is none."""
    try:
        return session.client("sts").get_caller_identity()
    except (BotoCoreError, ClientError) as error:
        raise RuntimeError(
            "No valid AWS credentials or Region. In Studio: open the space with an execution role. "
            "On a laptop: run `aws sso login` (the first time `aws configure sso`), then start the "
            "kernel again. No account: run with the parameters in local_mode/parameters.yaml."
        ) from error


def _embedded_account_is_gone(run, where, session):
    """Whether `run` is of an embedded AWS that ended, and all that it held with it."""
    address = run.get("endpoint_url")
    if not address or not any(run.get(name) for name in LISTED):
        return False
    if address != where["endpoint_url"]:
        return aws.status(urlsplit(address).port or aws.PORT) is None
    made = f"bucket/{run['bucket']}" in run["created"]
    return made and bucket_region(session, run["bucket"], run["account"]) is None


def policy(here, name, role_name="SageMaker-Video-ExecutionRole") -> dict:
    """The policy in aws/<name>.json, filled in for this account.

    `name`: "trust_policy", "execution_policy" (of the jobs) or "caller_policy" (of you).
    `role_name`: may be an ARN, as for execution_role.
    """
    role_name = role_name.rpartition(":role/")[2]
    names = {field: here.run[field] for field in ("bucket", "prefix", "region", "account")}
    text = (HERE / "aws" / f"{name}.json").read_text()
    return json.loads(Template(text).substitute(names, role_name=role_name))


def execution_role(here, role_name, create=False, full_access=False) -> None:
    """Finds or creates the role that jobs act through; run.json remembers its ARN.

    `role_name`: a name or an ARN. An ARN is taken as it is, and IAM is not asked. A name is looked
    up; if there is no such role, it is created if `create`; else, in Studio, Studio's own is taken.
    A role that was created here gets its permissions, again on every call: those of
    aws/execution_policy.json or, with `full_access`, the managed policy AmazonSageMakerFullAccess.
    Raises RuntimeError if there is no role, if you may not look it up or create it, and for an ARN
    that is not one of a role of this account.
    """
    if role_name.startswith("arn:"):
        if f":iam::{here.run['account']}:role/" not in role_name:
            raise RuntimeError(
                f"{role_name} is no role of your account: the ARN of a role looks like "
                "arn:aws:iam::<account>:role/<name>. IAM, Roles shows it."
            )
        role_arn = role_name
    else:
        role_arn = _named_role(here, role_name, create)
    if f"role/{role_name}" in here.run["created"]:
        _permit(here, role_name, full_access)
    here.remember(role_arn=role_arn)
    print("execution role:", role_arn.split("/")[-1])


def _named_role(here, role_name, create):
    """The ARN of the role of this name: found, created, or Studio's own."""
    iam = here.session.client("iam")
    try:
        return iam.get_role(RoleName=role_name)["Role"]["Arn"]
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchEntity" and create:
            return _new_role(here, role_name)
        if Path("/opt/ml/metadata/resource-metadata.json").exists():  # in Studio
            from sagemaker.core.helper.session_helper import Session, get_execution_role

            return get_execution_role(Session(here.session))
        if code in DENIED:
            raise RuntimeError(_ask_for_the_arn("look up", role_name)) from error
        raise RuntimeError(
            f"No role {role_name!r} is in this account. Set create_role = True, make the role in "
            "the console, or set role_name to the name or ARN of one that you have."
        ) from error


def _new_role(here, role_name):
    """Creates the role, and returns its ARN."""
    trust = json.dumps(policy(here, "trust_policy", role_name))
    try:
        role = here.session.client("iam").create_role(
            RoleName=role_name, AssumeRolePolicyDocument=trust
        )
    except ClientError as error:
        if error.response["Error"]["Code"] not in DENIED:
            raise
        raise RuntimeError(_ask_for_the_arn("create", role_name)) from error
    here.add("created", f"role/{role_name}")
    return role["Role"]["Arn"]


def _ask_for_the_arn(action, role_name):
    return (
        f"You may not {action} the role {role_name!r} in IAM (AccessDenied). Ask an administrator "
        "for the ARN of an execution role, and set role_name to the ARN: IAM is then not asked."
    )


def _permit(here, role_name, full_access):
    """Gives the role the permissions of one way, and takes those of the other way back."""
    role = here.session.resource("iam").Role(role_name)
    attached = [policy.arn for policy in role.attached_policies.all()]
    if full_access and FULL_ACCESS not in attached:
        role.attach_policy(PolicyArn=FULL_ACCESS)
    if not full_access and FULL_ACCESS in attached:
        role.detach_policy(PolicyArn=FULL_ACCESS)
    least = role.Policy("video-tutorial")
    if full_access and "video-tutorial" in [policy.name for policy in role.policies.all()]:
        least.delete()
    if not full_access:
        least.put(PolicyDocument=json.dumps(policy(here, "execution_policy", role_name)))


def permit(here, name) -> None:
    """Gives the execution role the policy in aws/<name>.json, beside what it may already.

    A guide needs it. Only a role that notebook 1 created is changed; for any other the policy is
    printed.
    """
    role = here.run["role_arn"].rpartition("/")[2]
    document = json.dumps(policy(here, name, role), indent=2)
    if f"role/{role}" in here.run["created"]:
        inline = here.session.resource("iam").RolePolicy(role, f"video-{name.replace('_', '-')}")
        inline.put(PolicyDocument=document)
        print(f"{role} has the permissions in aws/{name}.json now")
    else:
        print(f"{role} is not of notebook 1: add this policy, if it has none like it.\n{document}")


def make_bucket(here) -> None:
    """Creates the bucket that run.json names, if there is none of this name.

    S3 deletes broken uploads from a new bucket after a week. Raises RuntimeError if the bucket is
    not yours or lies in another Region.
    """
    name, region, s3 = here.run["bucket"], here.run["region"], here.session.client("s3")
    if not bucket_exists(here):
        where = {"CreateBucketConfiguration": {"LocationConstraint": region}}
        where = {} if region == "us-east-1" else where  # which S3 does not take as a constraint
        s3.create_bucket(Bucket=name, **where)
        here.add("created", f"bucket/{name}")
        rule = {"ID": "broken-uploads", "Status": "Enabled", "Filter": {"Prefix": ""}}
        rule["AbortIncompleteMultipartUpload"] = {"DaysAfterInitiation": 7}
        try:
            s3.put_bucket_lifecycle_configuration(
                Bucket=name, LifecycleConfiguration={"Rules": [rule]}
            )
        except ClientError as error:  # AmazonSageMakerFullAccess does not allow it
            print("No rule deletes broken uploads:", error.response["Error"]["Code"])
    print("bucket:", name.replace(here.run["account"], "<account>"))


# Quotas, prices, speed ----------------------------------------------------------------------------
def instances(here, types) -> pd.DataFrame:
    """A table of instance types: quota, price, memory and an estimate of the speed of training.

    Reads all quotas of SageMaker and remembers them in run.json, with the known prices, for the
    notebooks that launch. "clips/s" is for all of ViT-B, 16 x 224 x 224; without a GPU, for its
    head alone (the backbone is frozen).
    """
    limits, rows = quotas(here), {}
    prices(here)
    for name in types:
        price(here, name)  # asks AWS where the table lacks it
        dollars, day = prices(here).get(name, (math.nan, "not known"))
        machine = INSTANCES.get(name)
        row = {"quota on demand": quota_of(limits, name, "training job usage")}
        row["quota on spot"] = quota_of(limits, name, "spot training job usage")
        row |= {"$ an hour": dollars, "price of": day}
        if machine:
            passes = 3 if machine.gpus else 1
            row |= {"runs on": machine.what, "memory, GB": machine.memory_gb}
            row["clips/s"] = round(clips_per_second(name, VIT_B_GFLOP) / passes, 1)
            frozen = "" if machine.gpus else ", backbone frozen"
            row["estimated from"] = f"{SHARE:.0%} of {machine.tflops} TFLOP/s{frozen}"
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def quota_of(limits, instance_type, use) -> int | str:
    """The quota of an instance type for a use: a number, or words if there is none."""
    if limits is None:
        return "not known"
    limit = limits.get(f"{instance_type} for {use}")
    return "not listed" if limit is None else int(limit)


def clips_per_second(instance_type, gflop) -> float | None:
    """How many clips a second an instance passes forward through a model: an estimate.

    It is 35 % of the data sheet's speed over the operations of one forward pass, `gflop` (in
    billions, see model_size.gflop). To train a clip takes 3 forward passes, or 1 if the backbone is
    frozen: divide by that. None if the instance type is not in INSTANCES, or gflop is None.
    """
    machine = INSTANCES.get(instance_type)
    return SHARE * machine.tflops * 1000 / gflop if machine and gflop else None


def quotas(here) -> dict | None:
    """How many instances you may have, by quota name such as "ml.g5.xlarge for training job usage".

    None if you may not ask AWS. run.json remembers the answer.
    """
    patient = Config(retries={"mode": "adaptive", "max_attempts": 10})  # it lists thousands, twice
    asked = {"ServiceCode": "sagemaker", "PaginationConfig": {"PageSize": 100}}  # 100 at most
    client = here.session.client("service-quotas", config=patient)
    found = {}
    try:
        # AWS's defaults, and over them what applies to you: it lists only those that were changed.
        for listing in ("list_aws_default_service_quotas", "list_service_quotas"):
            for page in client.get_paginator(listing).paginate(**asked):
                found |= {quota["QuotaName"]: quota for quota in page["Quotas"]}
    except ClientError as error:  # a role that may train need not be allowed to ask
        print("The quotas cannot be read:", error.response["Error"]["Code"])
        here.remember(quotas=None)
        return None
    wanted = re.compile(rf"ml\.\S+ for ({'|'.join(USES)})")
    found = {name: quota for name, quota in found.items() if wanted.fullmatch(name)}
    here.quota_codes = {name: quota["QuotaCode"] for name, quota in found.items()}
    here.remember(quotas={name: quota["Value"] for name, quota in found.items()})
    return here.run["quotas"]


def quota_link(here, instance_type, use="training job usage") -> str:
    """The address of the console's page where you ask for more instances for a use."""
    code = here.quota_codes.get(f"{instance_type} for {use}", "")
    region = here.run["region"]
    console = f"https://{region}.console.aws.amazon.com/servicequotas/home?region={region}"
    return f"{console}#!/services/sagemaker/quotas/{code}"


def advise(here, instance_type) -> None:
    """Prints what 20 minutes on an instance cost, and whether your quota lets it start."""
    price(here, instance_type)
    dollars, day = prices(here).get(instance_type, (None, None))
    if dollars:
        print(f"20 minutes on {instance_type} cost ${dollars / 3:.2f} (price of {day}).")
    else:
        print(f"No price of {instance_type} is known: see how_to/train_for_less.ipynb.")
    quota = quota_of(here.run.get("quotas"), instance_type, "training job usage")
    if quota == "not listed":
        print(f"AWS lists no quota of {instance_type} here: choose another type or Region.")
    elif quota == 0:
        print('Your quota is 0. Ask for 1 now. Until then use instance_type = "ml.m5.xlarge".')
    else:
        print(f"Your quota is {quota}.")
    print("To ask for more:", quota_link(here, instance_type))


def request_quota(here, instance_type, use="training job usage", instances=1) -> str:
    """Asks AWS to raise a quota to `instances`; prints and returns what AWS says.

    Raises ValueError for a use that SageMaker has no quota of.
    """
    if use not in USES:
        raise ValueError(f"use is {use!r}: it must be one of {', '.join(USES)}")
    if not here.quota_codes:
        quotas(here)
    wanted = f"{instance_type} for {use}"
    code = here.quota_codes.get(wanted)
    client = here.session.client("service-quotas")
    if not code:
        answer = "AWS does not list it: ask in the console"
    else:
        try:
            request = client.request_service_quota_increase(
                ServiceCode="sagemaker", QuotaCode=code, DesiredValue=instances
            )
            answer = f"requested {instances}: {request['RequestedQuota']['Status']}"
        except client.exceptions.ResourceAlreadyExistsException:
            answer = "a request of yours is still open"
    print(f"{wanted}: {answer}")
    return answer


def prices(here) -> dict:
    """{instance type: (US dollars an hour of training, date)} in this Region.

    From aws/prices.json and, before that, from what fetch_price asked AWS for. run.json remembers
    the dollars.
    """
    table = json.loads((HERE / "aws" / "prices.json").read_text())["region"]
    listed = table.get(here.run["region"], {})
    dated = {name: (entry["training"], entry["date"]) for name, entry in listed.items()}
    fetched = here.run.get("fetched_prices", {})
    dated |= {name: tuple(price) for name, price in fetched.items()}
    dollars = {name: price for name, (price, _) in dated.items()}
    here.remember(dollars_per_hour=dollars, fetched_prices=fetched)
    return dated


def price(here, instance_type) -> float | None:
    """US dollars of an hour of training on an instance, as run.json has it, or as AWS tells now.

    run.json has the prices of aws/prices.json, and those that AWS told before. None if AWS lists no
    price, cannot be reached, or does not let you ask (pricing:GetProducts). Endpoints cost as much
    where both prices were found quoted (ml.m5, g4dn, g5, g6); on ml.p4d they cost more.
    """
    if instance_type not in here.run.get("dollars_per_hour", {}):
        with suppress(BotoCoreError, ClientError, LookupError):
            fetch_price(here, instance_type)
    return here.run.get("dollars_per_hour", {}).get(instance_type)


def fetch_price(here, instance_type) -> float:
    """Today's price of an hour of training on an instance, from AWS's Pricing API, in US dollars.

    run.json remembers it. You need the permission pricing:GetProducts.
    """
    quick = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 2})
    # It answers for all Regions.
    pricing = here.session.client("pricing", region_name="us-east-1", config=quick)
    price = training_price(instance_type, here.run["region"], pricing)
    today = str(datetime.date.today())
    fetched = here.run.get("fetched_prices", {}) | {instance_type: [price, today]}
    here.remember(fetched_prices=fetched)
    prices(here)
    return price


def training_price(instance_type, region, pricing) -> float:
    """US dollars an hour, on demand, as AWS lists them today. LookupError if it lists none.

    `pricing` is a client of the Price List API, which answers with JSON texts, one a product.
    """
    wanted = {"regionCode": region, "instanceName": instance_type, "component": "Training"}
    filters = [{"Type": "TERM_MATCH", "Field": f, "Value": v} for f, v in wanted.items()]
    pages = pricing.get_paginator("get_products")
    for page in pages.paginate(ServiceCode="AmazonSageMaker", Filters=filters):
        for product in map(json.loads, page["PriceList"]):
            usage = product["product"]["attributes"]["usagetype"]  # USE1-Train:ml.g4dn.xlarge
            for term in product["terms"].get("OnDemand", {}).values():
                for dimension in term["priceDimensions"].values():
                    if usage.endswith(f"Train:{instance_type}"):
                        return float(dimension["pricePerUnit"]["USD"])
    raise LookupError(f"AWS lists no price of training on {instance_type} in {region}")


# The other notebooks ------------------------------------------------------------------------------
def connect(output_dir="outputs", check: bool = True) -> Account:
    """The account that notebook 1 wrote into run.json.

    `check`: whether you must be signed in to it, and the bucket must still be there. Raises
    RuntimeError with what to do, such as the notebook to run.
    """
    here = read_run(output_dir)
    if "role_arn" not in here.run:
        raise RuntimeError(
            f"{output_dir} has no run.json of notebook 1: run 01_setup.ipynb first, with the same "
            "output_dir. (All deleted by 06_clean_up? Then 01_setup is the way back.)"
        )
    aws.connect(here.run["endpoint_url"])
    os.environ["AWS_DEFAULT_REGION"] = here.run["region"]  # where the SDK reads the job's log
    here.session = boto3.Session(region_name=here.run["region"])
    expect_the_owner(here)
    if check and _identity(here.session)["Account"] != here.run["account"]:
        raise RuntimeError(
            "You are signed in to another account than that of run.json: sign in to that one, or "
            "set another output_dir."
        )
    if check and not bucket_exists(here):
        raise RuntimeError(
            "The bucket of run.json is gone: it was deleted, or the embedded AWS ended. (That one "
            "lives until 06_clean_up or until this computer restarts, with its jobs.) Run "
            "01_setup.ipynb again, then go on; clips and pictures in output_dir are still there."
        )
    return here


def bucket_exists(here) -> bool:
    """Whether the bucket of run.json is there. Raises RuntimeError if a job cannot use it."""
    name, region = here.run["bucket"], here.run["region"]
    found = bucket_region(here.session, name, here.run["account"])
    if found not in (None, region):
        raise RuntimeError(
            f"The bucket {name!r} lies in {found}, and a job in {region} cannot use it. Set "
            f'region = "{found}", or another bucket.'
        )
    return found is not None


def bucket_region(session: boto3.Session, bucket: str, account_id: str) -> str | None:
    """The Region of a bucket of this account; None if nobody has a bucket of this name.

    Raises RuntimeError if it belongs to another account, or if you may not use it.
    """
    try:
        found = session.client("s3").head_bucket(Bucket=bucket, ExpectedBucketOwner=account_id)
        return found["BucketRegion"]
    except ClientError as error:
        if error.response["Error"]["Code"] in ABSENT:
            return None
        raise RuntimeError(
            f"The bucket {bucket!r} is not yours to use: it belongs to another account, or you may "
            "not list it. Set another name."
        ) from error


def expect_the_owner(here) -> None:
    """From now on S3 refuses requests about the bucket of run.json if it is not this account's.

    Anybody can guess the name of the bucket, and make it when yours is deleted.
    """
    bucket, account_id = here.run["bucket"], here.run["account"]

    def expect(params, model, **_):
        if params.get("Bucket") == bucket and "ExpectedBucketOwner" in model.input_shape.members:
            params["ExpectedBucketOwner"] = account_id

    event = "provide-client-params.s3"
    here.session.events.register(event, expect, unique_id="expect-the-owner")
