"""What several modules need: errors in the service's words, the time, what a container sees."""

import os
from datetime import UTC, datetime


class ClientError(Exception):
    """What is wrong with a request, in the service's words."""

    code = "ValidationException"


class LimitExceeded(ClientError):
    """A job that needs more instances than a quota leaves."""

    code = "ResourceLimitExceeded"


def now():
    return datetime.now(UTC)


def mapped(text, root):
    return text.replace("/opt/ml", str(root))


def account_environment(credentials, region):
    """The environment of a process that acts in the account, with the credentials of its role."""
    return {
        **os.environ,
        "AWS_ACCESS_KEY_ID": credentials.access_key,
        "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
        "AWS_SESSION_TOKEN": credentials.token or "",
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,
        "PYTHONUNBUFFERED": "1",  # as in the images: lines reach the log when printed
    }


def answers(response_class):
    """A decorator: the function becomes one of moto's operations, by its name."""
    return lambda function: setattr(response_class, function.__name__, function)
