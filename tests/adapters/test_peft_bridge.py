"""peft knows the method: the enum member is a real one, on every Python at hand, and registering twice is harmless."""

from __future__ import annotations

import copy
import enum
import inspect
import json
import pickle
import shutil
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from qwha_cli.adapters import peft_bridge
from qwha_cli.adapters.spectral.config import SpectralConfig
from qwha_cli.adapters.spectral.model import SpectralModel

CHECK = """
import copy, enum, json, pickle

class Kind(str, enum.Enum):
    A = "A"

member = add_member(Kind, "QWHA")
assert add_member(Kind, "QWHA") is member
assert Kind("QWHA") is Kind["QWHA"] is Kind.QWHA is member
assert list(Kind) == [Kind.A, member] and len(Kind) == 2 and member in Kind and "QWHA" in list(Kind)
assert (member.name, member.value, str.__str__(member)) == ("QWHA", "QWHA", "QWHA")
assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
assert json.dumps(member) == '"QWHA"' and {member: 1}["QWHA"] == 1
print("sound")
"""


@pytest.mark.parametrize("python", [sys.executable, "python3.11", "python3.12", "python3.13", "python3.14"])
def test_an_added_member_is_an_ordinary_one_on_every_python_found(python: str) -> None:
    if shutil.which(python) is None:
        pytest.skip(f"{python} is not installed")
    source = "from __future__ import annotations\nimport enum\n" + inspect.getsource(peft_bridge.add_member) + CHECK
    result = subprocess.run([python, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    if "command exists in these Python versions" in result.stderr or "not found" in result.stderr:
        pytest.skip(f"{python} is a shim without an interpreter")
    assert result.stdout.strip() == "sound", result.stderr


def test_register_twice_leaves_one_method() -> None:
    peft_bridge.register()
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    peft_bridge.register()
    assert before == PEFT_TYPE_TO_TUNER_MAPPING
    kind = PeftType("QWHA")
    assert (PEFT_TYPE_TO_CONFIG_MAPPING[kind], PEFT_TYPE_TO_TUNER_MAPPING[kind]) == (SpectralConfig, SpectralModel)
    assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == "qwha_"
    # the text in a file finds the same entries
    assert PEFT_TYPE_TO_TUNER_MAPPING["QWHA"] is SpectralModel
    assert [member for member in PeftType if member == "QWHA"] == [kind]


def test_the_member_survives_pickle_deepcopy_and_json() -> None:
    kind = peft_bridge.peft_type()
    assert isinstance(kind, enum.Enum)
    assert pickle.loads(pickle.dumps(kind)) is copy.deepcopy(kind) is kind
    assert json.loads(json.dumps({"peft_type": kind})) == {"peft_type": "QWHA"}
    assert kind.value == "QWHA"
