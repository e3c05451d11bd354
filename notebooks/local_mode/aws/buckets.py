"""S3 buckets: a request that expects another owner is refused, which moto leaves out."""

from moto.s3.exceptions import S3AccessDeniedError
from moto.s3.models import s3_backends
from moto.s3.responses import S3Response


def extend_moto(server):
    """Let moto heed ExpectedBucketOwner, in each request about a bucket or an object."""
    for name in ("_bucket_response", "_key_response"):
        setattr(S3Response, name, heeding_the_owner(getattr(S3Response, name)))


def heeding_the_owner(answer):
    def checked(response, request, full_url):
        expected = request.headers.get("x-amz-expected-bucket-owner")
        _, owner = s3_backends.bucket_accounts.get(response.bucket_name, (None, expected))
        if expected and owner != expected:
            raise S3AccessDeniedError
        return answer(response, request, full_url)

    return checked
