"""Whether what is sent to the embedded AWS, and what it answers, is what AWS itself knows.

AWS is known here by the service models in botocore: the members of each answer, which are
required, their types, enumerations, patterns, lengths and ranges; and by the table of errors in
local_mode/aws/words.py. embedded.own_aws watches every client of its test process.
"""

import json
import re
from contextlib import contextmanager
from datetime import datetime
from xml.etree import ElementTree

from botocore.client import BaseClient
from botocore.endpoint import Endpoint
from botocore.validate import ParamValidationDecorator
from local_mode.aws import words

TYPES = {
    "string": str,
    "integer": int,
    "long": int,
    "float": (int, float),
    "double": (int, float),
    "boolean": bool,
    "timestamp": datetime,
    "structure": dict,
    "map": dict,
    "list": list,
}
# Elements of XML answers that belong to the protocol, not to the answer.
WRAPPERS = {"member", "entry", "key", "value", "ResponseMetadata", "RequestId", "HostId"}


@contextmanager
def watched():
    """A list of breaches of the contract, which grows with each answer that this process gets."""
    breaches, make_request, call = [], Endpoint.make_request, BaseClient._make_api_call

    def make_request_and_look(self, operation_model, request):
        answer = make_request(self, operation_model, request)
        if "127.0.0.1" in self.host:
            breaches.extend(breaches_of(operation_model, *answer))
        return answer

    def call_validated(self, operation_name, arguments):
        if not validates(self):
            breaches.append(f"{operation_name}: this client does not validate its requests")
        return call(self, operation_name, arguments)

    Endpoint.make_request, BaseClient._make_api_call = make_request_and_look, call_validated
    try:
        yield breaches
    finally:
        Endpoint.make_request, BaseClient._make_api_call = make_request, call


def validates(client):
    """Whether a client holds its requests to the service's model before it sends them."""
    return isinstance(client._serializer, ParamValidationDecorator)


def breaches_of(operation, http, parsed):
    """What AWS would not have answered: texts; none if all is well."""
    if http.status_code >= 300:
        found = wrong_in_error(operation, http, parsed["Error"])
    elif operation.output_shape is None:
        found = []
    else:
        found = [*wrong_in_answer(operation.output_shape, parsed), *unknown(operation, http)]
    return [f"{operation.name}: {text}" for text in found]


def wrong_in_error(operation, http, error):
    """An error must be in the table of AWS's words, or name the embedded AWS as its author."""
    code, text = error.get("Code", ""), error.get("Message", "")
    row = words.row_of(operation.name, code, text)
    if row and row.status != http.status_code:
        yield f"{code} has the status {http.status_code}, not {row.status}"
    if row is None and "embedded AWS" not in text:
        yield f"not in words.py: {http.status_code} {code}: {text}"


def wrong_in_answer(shape, value, path=""):
    """What of a parsed answer contradicts the service's model."""
    kind, limits = shape.type_name, shape.metadata
    if kind == "blob" or getattr(shape, "is_document_type", False):
        return
    if path.endswith("ContainerEntrypoint[]"):
        return  # of the request: where a test has its program, of any length
    if not isinstance(value, TYPES[kind]) or (kind != "boolean" and isinstance(value, bool)):
        yield f"{path} is {value!r}, not a {kind}"
    elif kind == "structure":
        known = {name: member for name, member in shape.members.items() if name in value}
        for name in {*shape.required_members} - {*known}:
            yield f"{path}.{name} is missing"
        for name, member in known.items():
            yield from wrong_in_answer(member, value[name], f"{path}.{name}")
    elif kind == "list":
        for item in value:
            yield from wrong_in_answer(shape.member, item, f"{path}[]")
    elif kind == "map":
        for key, item in value.items():
            yield from wrong_in_answer(shape.key, key, f"{path} key")
            yield from wrong_in_answer(shape.value, item, f"{path}.{key}")
    elif kind == "string":
        if shape.enum and value not in shape.enum:
            yield f"{path} is {value!r}, none of {', '.join(shape.enum)}"
        if not matches(limits.get("pattern"), value):
            yield f"{path} is {value!r}, which {limits['pattern']} does not fit"
    size = value if kind in ("integer", "long", "float", "double") else None
    size = len(value) if kind in ("string", "list", "map") else size
    if size is not None and not limits.get("min", size) <= size <= limits.get("max", size):
        yield f"{path} is {value!r}: beyond {limits.get('min')} to {limits.get('max')}"


def matches(pattern, text):
    """Whether a text fits a pattern of the model.

    What Python does not know of Java's patterns fits all: \\p{...}, and ranges over two surrogates.
    """
    if pattern is None or "\\p{" in pattern or "\\uDBFF" in pattern:
        return True
    return re.search(f"^(?:{pattern})$", text, re.DOTALL) is not None


def unknown(operation, http):
    """The members of a raw answer that the model does not have: botocore passes over them."""
    if operation.has_streaming_output or not http.content.strip():
        return
    shape, protocol = operation.output_shape, operation.service_model.metadata["protocol"]
    if "payload" in shape.serialization and "xml" not in protocol:
        return  # the body is not a structure
    if protocol in ("json", "rest-json"):
        yield from unknown_members(shape, json.loads(http.content))
    elif protocol in ("query", "rest-xml"):
        names = (
            names_in(shape) | WRAPPERS | {f"{operation.name}Response", f"{operation.name}Result"}
        )
        root = ElementTree.fromstring(http.content)
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        tags -= {root.tag.rpartition("}")[2]}
        yield from (f"AWS has no {tag}" for tag in sorted(tags - names))


def unknown_members(shape, value, path=""):
    """The same in JSON. A null counts as left out, as for botocore."""
    if shape.type_name == "structure" and isinstance(value, dict):
        members = {m.serialization.get("name", n): m for n, m in shape.members.items()}
        for name, item in value.items():
            if name in members:
                yield from unknown_members(members[name], item, f"{path}.{name}")
            elif item is not None:
                yield f"AWS has no {path}.{name}"
    elif shape.type_name == "list" and isinstance(value, list):
        for item in value:
            yield from unknown_members(shape.member, item, f"{path}[]")
    elif shape.type_name == "map" and isinstance(value, dict):
        for key, item in value.items():
            yield from unknown_members(shape.value, item, f"{path}.{key}")


def names_in(shape, above=()):
    """Every name that an XML answer of this shape may use."""
    if shape.name in above:
        return set()
    above, names = (*above, shape.name), set()
    if shape.type_name == "structure":
        for name, member in shape.members.items():
            names |= {member.serialization.get("name", name)} | names_in(member, above)
    elif shape.type_name == "list":
        names |= {shape.member.serialization.get("name", "member")}
        names |= names_in(shape.member, above)
    elif shape.type_name == "map":
        names |= names_in(shape.value, above)
    return names
