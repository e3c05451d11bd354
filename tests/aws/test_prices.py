"""What the launch costs: the price table, and AWS's Price List API by which one brings it up."""

import datetime
import json
import re
from unittest.mock import Mock

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from botocore.stub import Stubber
from conftest import ROOT
from tutorial import account

TABLE = json.loads((ROOT / "notebooks" / "aws" / "prices.json").read_text())


def test_every_price_has_a_source_and_a_date():
    assert TABLE["currency"] == "USD" and TABLE["source"].startswith("https://")
    assert datetime.date.fromisoformat(TABLE["date"]) <= datetime.date.today()
    for region, instances in TABLE["region"].items():
        assert boto3.Session().get_partition_for_region(region) == "aws"
        for name, entry in instances.items():
            assert name.startswith("ml.") and 0 < entry["training"] < 200, (region, name)
            assert re.fullmatch(r"20\d\d(-\d\d){0,2}", entry["date"])  # as far as it is known
            assert entry["date"] <= TABLE["date"]


def test_the_default_instances_are_priced_and_four_gpus_cost_more_than_one():
    prices = {name: entry["training"] for name, entry in TABLE["region"]["us-east-1"].items()}
    assert {"ml.g4dn.xlarge", "ml.g5.xlarge", "ml.g6.xlarge", "ml.m5.xlarge"} <= prices.keys()
    for family in ("g5", "g6"):
        assert prices[f"ml.{family}.12xlarge"] > 4 * prices[f"ml.{family}.xlarge"]


def product(usagetype: str, unit_price: str, **terms) -> str:
    """One entry of PriceList, in the Price List API's format."""
    prefix, instance = usagetype.split(":")
    return json.dumps(
        {
            "product": {
                "productFamily": "ML Instance",
                "sku": "ABCDEFGHIJKLMNOP",
                "attributes": {
                    "servicecode": "AmazonSageMaker", "regionCode": "ap-northeast-1",
                    "component": "Training", "instanceName": instance, "usagetype": usagetype,
                    "operation": "RunInstance", "location": "Asia Pacific (Tokyo)",
                },
            },
            "serviceCode": "AmazonSageMaker",
            "terms": terms or {
                "OnDemand": {
                    "ABCDEFGHIJKLMNOP.JRTCKXETXF": {
                        "sku": "ABCDEFGHIJKLMNOP",
                        "effectiveDate": "2026-09-01T00:00:00Z",
                        "priceDimensions": {
                            "ABCDEFGHIJKLMNOP.JRTCKXETXF.6YS6EN2CT7": {
                                "unit": "Hrs", "endRange": "Inf", "appliesTo": [],
                                "description": f"${unit_price} per hour", "beginRange": "0",
                                "pricePerUnit": {"USD": unit_price},
                            }
                        },
                    }
                }
            },
        }
    )  # fmt: skip


@pytest.fixture
def price_list():
    """Answers GetProducts, one page for each list of products, and checks what is asked."""
    client = boto3.client(
        "pricing", "us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
    wanted = {
        "regionCode": "ap-northeast-1", "instanceName": "ml.g6.xlarge", "component": "Training",
    }  # fmt: skip
    filters = [{"Type": "TERM_MATCH", "Field": f, "Value": v} for f, v in wanted.items()]

    def price(*pages):
        with Stubber(client) as stub:
            for number, products in enumerate(pages, 1):
                asked = {"ServiceCode": "AmazonSageMaker", "Filters": filters}
                asked |= {"NextToken": str(number - 1)} if number > 1 else {}
                answer = {"FormatVersion": "aws_v1", "PriceList": products}
                answer |= {"NextToken": str(number)} if number < len(pages) else {}
                stub.add_response("get_products", answer, asked)
            return account.training_price("ml.g6.xlarge", "ap-northeast-1", client)

    return price


def test_the_price_is_that_of_training_on_demand(price_list):
    others = [
        product("APN1-TrSpt:ml.g6.xlarge", "0.5"),
        product("APN1-Train:ml.g6.xlarge", "0", Reserved={}),
    ]
    assert price_list(others, [product("APN1-Train:ml.g6.xlarge", "1.6340000000")]) == 1.634


def test_an_instance_without_a_price_is_an_error_that_names_it(price_list):
    with pytest.raises(LookupError, match="ml.g6.xlarge in ap-northeast-1"):
        price_list([])


@pytest.fixture
def here(tmp_path):
    run = {"region": "us-east-1", "fetched_prices": {"ml.p5.48xlarge": [63.296, "2026-11-01"]}}
    return account.Account(tmp_path, run, boto3.Session(region_name="us-east-1"))


def test_a_fetched_price_is_remembered_and_wins_over_the_table(here, monkeypatch):
    monkeypatch.setattr(account, "training_price", lambda name, region, client: 0.5)
    before = account.prices(here)["ml.g5.xlarge"]
    assert account.fetch_price(here, "ml.g5.xlarge") == 0.5 != before[0]
    again = account.Account(here.output, json.loads((here.output / "run.json").read_text()))
    today = str(datetime.date.today())
    assert account.prices(again)["ml.g5.xlarge"] == (0.5, today)
    assert again.run["dollars_per_hour"]["ml.g5.xlarge"] == 0.5
    assert again.run["dollars_per_hour"]["ml.p5.48xlarge"] == 63.296  # of an earlier run


@pytest.mark.parametrize(
    "answer, dollars",
    [
        (0.5, 0.5),
        (LookupError("none"), None),
        (ClientError({"Error": {"Code": "AccessDeniedException"}}, "GetProducts"), None),
        (EndpointConnectionError(endpoint_url="https://api.pricing"), None),
    ],
)
def test_a_price_that_the_table_lacks_is_asked_for_once(here, monkeypatch, answer, dollars):
    asked = []

    def ask(name, region, client):
        asked.append((name, region))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(account, "training_price", ask)
    account.prices(here)
    assert account.price(here, "ml.g5.xlarge") == 1.408 and not asked  # of the table
    assert account.price(here, "ml.p9.xlarge") == dollars
    assert asked == [("ml.p9.xlarge", "us-east-1")]
    if dollars:
        again = account.Account(here.output, json.loads((here.output / "run.json").read_text()))
        assert account.price(again, "ml.p9.xlarge") == dollars and len(asked) == 1


def test_job_endpoint_and_table_ask_for_a_price_that_the_table_lacks(here, monkeypatch, capsys):
    from sagemaker.core.training.configs import Compute, StoppingCondition
    from tutorial import endpoint, launch, machines

    monkeypatch.setattr(account, "training_price", lambda name, region, client: 0.5)
    here.run |= {"region": "eu-north-1", "quotas": None, "dollars_per_hour": {}}  # not in the table
    limits = StoppingCondition(max_runtime_in_seconds=3600)
    launch.check_money(here, Compute(instance_type="ml.g5.xlarge", instance_count=1), limits, 5)
    assert "$0.5 an hour" in capsys.readouterr().out
    endpoint.check_money(here, "ml.m5.xlarge", deploy=True)
    assert "ml.m5.xlarge: $0.5 an hour" in capsys.readouterr().out
    table = machines.choice(here, ["ml.g6.xlarge"], 0.01, gflop=357, clips=320)
    assert table.loc["ml.g6.xlarge", "$ an hour"] == 0.5


def test_a_region_without_prices_has_none(here, monkeypatch, capsys):
    here.run |= {"region": "eu-north-1", "fetched_prices": {}, "quotas": None}
    monkeypatch.setattr(account, "training_price", Mock(side_effect=LookupError))
    assert account.prices(here) == {} == here.run["dollars_per_hour"]
    account.advise(here, "ml.g5.xlarge")
    assert "No price of ml.g5.xlarge is known: see how_to/train_for_less" in capsys.readouterr().out


def test_every_priced_instance_has_an_estimated_speed():
    for name in {name for listed in TABLE["region"].values() for name in listed}:
        assert account.clips_per_second(name, 357) > 0
    assert account.clips_per_second("ml.unknown.xlarge", 357) is None
    assert account.clips_per_second("ml.g5.xlarge", None) is None


def test_the_speed_of_a_vit_b_is_a_share_of_the_data_sheet():
    """One forward pass is 357 GFLOP: 12 blocks on 1568 tokens, 768 wide."""
    from transformers import VideoMAEConfig
    from tutorial import model_size

    assert model_size.gflop(VideoMAEConfig()) == pytest.approx(account.VIT_B_GFLOP, abs=0.5)
    seconds = 357e9 / (0.35 * 65e12)  # on a T4
    assert account.clips_per_second("ml.g4dn.xlarge", 357) == pytest.approx(1 / seconds)
