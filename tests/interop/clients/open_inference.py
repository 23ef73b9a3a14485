"""open-inference-openapi's client against a server: `open_inference.py URL MODEL`, run in its own environment."""

import math
import sys

# this file's folder must not hide the package of the same name
sys.path.pop(0)

from open_inference.openapi.client import OpenInferenceClient
from open_inference.openapi.core.api_error import ApiError
from open_inference.openapi.types import InferenceRequest, RequestInput, TensorData


def nested(shape: list, start: int = 0) -> list:
    """Numbers that count up, as lists nested like the shape."""
    if len(shape) == 1:
        return [float(number) for number in range(start, start + shape[0])]
    step = math.prod(shape[1:])
    return [nested(shape[1:], start + row * step) for row in range(shape[0])]


def main(url: str, model: str) -> None:
    client = OpenInferenceClient(base_url=url, timeout=20)
    client.check_server_liveness()
    client.check_server_readiness()
    client.check_model_readiness(model)
    assert client.read_server_metadata().name == "appliance"
    metadata = client.read_model_metadata(model)
    version = metadata.versions[-1]
    client.check_model_version_readiness(model, version)
    assert client.read_model_version_metadata(model, version).name == model
    spec = metadata.inputs[0]
    shape = [1 if size < 0 else size for size in spec.shape]
    data = TensorData.parse_obj(nested(shape))
    tensor = RequestInput(name=spec.name, shape=shape, datatype=spec.datatype, data=data)
    body = InferenceRequest(id="42", inputs=[tensor])
    for answer in (
        client.model_infer(model, request=body),
        client.model_version_infer(model, version, request=body),
    ):
        assert (answer.id, answer.model_name, answer.model_version) == ("42", model, version), answer
        values = answer.outputs[0].data.dict()["__root__"]
        assert len(values) == math.prod(answer.outputs[0].shape)
        if model == "echo":
            assert values == [float(number) for number in range(4)], values
    for ask in (
        client.check_model_readiness,
        client.read_model_metadata,
        lambda nope: client.model_infer(nope, request=body),
    ):
        try:
            ask("nope")
        except ApiError as error:
            assert error.status_code == 404, error
            assert "Request for unknown model" in error.body["error"], error
        else:
            raise AssertionError("an unknown model answered")
    sys.stdout.write(f"{model}: all good\n")


main(*sys.argv[1:])
