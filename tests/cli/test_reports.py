"""Reports for people: a number that is not finite is said, and a report of another version is no traceback."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from appliance.building.verification import VerifyOrder, verify
from appliance.cli.models import _say_verification
from appliance.cli.output import CommandError
from appliance.core.manifest import ModelManifest, OnnxRuntimeManifest
from appliance.engines.base import EngineOptions
from tests.building import graphs


def test_a_report_with_a_number_that_is_not_finite_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(graphs.mixes_rows(tmp_path / "m.onnx"))
    options = EngineOptions("onnxruntime", model, "cpu", 0, 1, OnnxRuntimeManifest(), {})
    found = verify(VerifyOrder("m", "1", "fp16", model, options, ModelManifest(), (), str(tmp_path)))
    kept = msgspec.json.decode(msgspec.json.encode(found))
    assert kept["invariance"][0]["max_relative"] is None
    _say_verification({"serves": False, "engine": "fp16", "report": kept, "page": ""})
    shown = capsys.readouterr()
    assert "largest relative error is not finite" in shown.err
    assert "failed: it does not serve" in shown.out


def test_a_report_of_another_version_says_what_to_do() -> None:
    with pytest.raises(CommandError, match="another version") as error:
        _say_verification({"serves": True, "report": {"model": "m"}, "page": ""})
    assert "appliance verify" in error.value.hint
